//! Where the hub's cache lies and how the hub is spoken to, from the environment variables that `huggingface_hub`
//! honours.

use std::path::PathBuf;

use crate::{Error, Result};

const ENDPOINT: &str = "https://huggingface.co";

/// How checkpoints by name are looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The folder with `models--owner--name` in it: `HF_HUB_CACHE`, else `HUGGINGFACE_HUB_CACHE`, else `HF_HOME/hub`,
    /// else `huggingface/hub` in the user's cache.
    pub cache: PathBuf,
    /// `HF_TOKEN`, else `HUGGING_FACE_HUB_TOKEN`, else the content of `HF_TOKEN_PATH`, else of `HF_HOME/token`.
    pub token: Option<String>,
    /// `HF_ENDPOINT`, without a slash at its end.
    pub endpoint: String,
    /// `HF_HUB_OFFLINE`: nothing is asked of the hub.
    pub offline: bool,
}

impl Settings {
    /// Reads the environment.
    ///
    /// # Errors
    /// When neither it nor a home directory says where the cache is.
    pub fn from_env() -> Result<Self> {
        Self::read(|name| std::env::var(name).ok())
    }

    /// Reads variables through `lookup`. Empty ones count as unset.
    ///
    /// # Errors
    /// When they do not say where the cache is.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let set = |name: &str| lookup(name).filter(|value| !value.trim().is_empty());
        let home = set("HOME").or_else(|| set("USERPROFILE"));
        let path = |text: String| match (text.strip_prefix("~/"), &home) {
            (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
            _ => PathBuf::from(text),
        };
        let user_cache = || match set("XDG_CACHE_HOME") {
            Some(cache) => Some(path(cache)),
            None => home.as_ref().map(|home| PathBuf::from(home).join(".cache")),
        };
        let hf_home = set("HF_HOME")
            .map(path)
            .or_else(|| Some(user_cache()?.join("huggingface")));
        let cache = set("HF_HUB_CACHE")
            .or_else(|| set("HUGGINGFACE_HUB_CACHE"))
            .map(path)
            .or_else(|| Some(hf_home.as_ref()?.join("hub")))
            .ok_or_else(|| {
                Error::invalid(
                    "there is no place for downloaded checkpoints",
                    "set HF_HOME to a folder",
                )
            })?;
        let token_file = set("HF_TOKEN_PATH")
            .map(path)
            .or_else(|| Some(hf_home.as_ref()?.join("token")));
        let token = set("HF_TOKEN")
            .or_else(|| set("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| crate::files::read_text(&token_file?, crate::files::SETTINGS).ok())
            .map(|token| token.trim().to_string())
            .filter(|token| !token.is_empty());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_string());
        let offline = set("HF_HUB_OFFLINE").is_some_and(|value| {
            ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str())
        });
        Ok(Self {
            cache,
            token,
            endpoint: endpoint.trim_end_matches('/').to_string(),
            offline,
        })
    }

    /// What proxytune makes of downloaded files lies here, beside the cache.
    pub fn made(&self) -> PathBuf {
        self.cache.with_file_name("proxytune")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings> {
        let variables: Vec<(String, String)> = variables
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()))
            .collect();
        Settings::read(move |name| {
            let found = variables.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| value.clone())
        })
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_has_it() {
        let cache = |variables: &[(&str, &str)]| read(variables).unwrap().cache;
        let home = ("HOME", "/home/ada");
        for (variables, expected) in [
            (vec![home], "/home/ada/.cache/huggingface/hub"),
            (vec![home, ("XDG_CACHE_HOME", "/c")], "/c/huggingface/hub"),
            (vec![home, ("HF_HOME", "~/hf")], "/home/ada/hf/hub"),
            (
                vec![("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/h/b")],
                "/h/b",
            ),
            (
                vec![("HUGGINGFACE_HUB_CACHE", "/h/b"), ("HF_HUB_CACHE", "/h/c")],
                "/h/c",
            ),
            (
                vec![home, ("HF_HOME", "")],
                "/home/ada/.cache/huggingface/hub",
            ),
        ] {
            assert_eq!(cache(&variables), PathBuf::from(expected), "{variables:?}");
        }
        let error = read(&[]).unwrap_err();
        assert!(error.hint().unwrap().contains("HF_HOME"));
        assert_eq!(
            read(&[("HF_HUB_CACHE", "/h/c")]).unwrap().made(),
            PathBuf::from("/h/proxytune")
        );
    }

    #[test]
    fn the_token_is_taken_from_the_environment_before_its_file() {
        let home = tempfile::tempdir().unwrap();
        let hf_home = ("HF_HOME", home.path().to_str().unwrap());
        assert_eq!(read(&[hf_home]).unwrap().token, None);
        std::fs::write(home.path().join("token"), "from-file\n").unwrap();
        let token = |variables: &[_]| read(variables).unwrap().token.unwrap();
        assert_eq!(token(&[hf_home]), "from-file");
        assert_eq!(token(&[hf_home, ("HUGGING_FACE_HUB_TOKEN", "old")]), "old");
        assert_eq!(
            token(&[
                hf_home,
                ("HUGGING_FACE_HUB_TOKEN", "old"),
                ("HF_TOKEN", " new ")
            ]),
            "new"
        );
    }

    #[test]
    fn the_endpoint_and_being_offline_are_read() {
        let plain = read(&[("HF_HOME", "/hf")]).unwrap();
        assert!(!plain.offline && plain.endpoint.starts_with("https://"));
        let set = read(&[
            ("HF_HOME", "/hf"),
            ("HF_ENDPOINT", "http://127.0.0.1:8080/"),
            ("HF_HUB_OFFLINE", "true"),
        ])
        .unwrap();
        assert!(set.offline);
        assert_eq!(set.endpoint, "http://127.0.0.1:8080");
    }
}
