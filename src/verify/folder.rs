//! Where in a folder a component lies: there, or in one of the folders inside, as in pipelines.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Component;
use crate::files::read_json;
use crate::{Error, Result};

/// `dir`, or the only folder in it that holds a `component`, by their `config.json`.
///
/// # Errors
/// When there is none, or more than one.
pub(super) fn find(component: Component, dir: &Path) -> Result<PathBuf> {
    if component.is_in(dir) {
        return Ok(dir.to_path_buf());
    }
    let here = dir.join("config.json");
    let own = if here.is_file() {
        let config: Value = read_json(&here)?;
        let recognised = component.recognises(&config);
        if recognised == Some(true) {
            return Ok(dir.to_path_buf());
        }
        Some(recognised)
    } else {
        None
    };
    let mut inside = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let folder = entry.map_err(Error::io(dir))?.path();
        let config = folder.join("config.json");
        if config.is_file() && component.recognises(&read_json(&config)?) == Some(true) {
            inside.push(folder);
        }
    }
    inside.sort();
    match (inside.as_slice(), own) {
        ([folder], _) => Ok(folder.clone()),
        // Its config.json does not say what it is of: the names and shapes of the weights will tell.
        ([], Some(None)) => Ok(dir.to_path_buf()),
        ([], Some(_)) => Err(Error::invalid(
            format!("{} is not the config of {component}", here.display()),
            "name the component whose folder this is, or the folder of the component",
        )),
        ([], None) => Err(Error::Checkpoint {
            path: dir.to_path_buf(),
            faults: vec![format!("{} is missing", component.config_file())],
        }),
        (several, _) => {
            let names: Vec<String> = several.iter().map(|f| f.display().to_string()).collect();
            Err(Error::invalid(
                format!("{} holds several of {component}", dir.display()),
                format!("name one: {}", names.join(", ")),
            ))
        }
    }
}
