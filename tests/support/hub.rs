//! A hub on this machine: the few requests that downloads make, with everything that can go wrong on the way.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use super::program;

/// The commit of every repository.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the hub behaves.
#[derive(Default)]
pub struct Manner {
    /// Who may read; everybody where absent. No token is 401, another one 403.
    pub token: Option<String>,
    /// So many transfers break off half-way, each after a body has begun.
    pub breaks: usize,
    /// A file at least this large is answered with a redirect to another host, as large files are.
    pub redirects_from: Option<usize>,
}

struct Inner {
    /// Files by `owner/name/path`.
    files: BTreeMap<String, Vec<u8>>,
    manner: Manner,
    /// Request lines with the range asked for.
    requests: Vec<String>,
    sent: u64,
}

/// A hub that serves until the test ends.
#[derive(Clone)]
pub struct Hub {
    inner: Arc<Mutex<Inner>>,
    port: u16,
}

impl Hub {
    pub fn start(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let inner = Inner {
            files: BTreeMap::new(),
            manner,
            requests: Vec::new(),
            sent: 0,
        };
        let hub = Self {
            inner: Arc::new(Mutex::new(inner)),
            port,
        };
        let serving = hub.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let hub = serving.clone();
                // A client that goes away is no fault of the hub's.
                std::thread::spawn(move || hub.serve(stream));
            }
        });
        hub
    }

    pub fn add(&self, repository: &str, path: &str, content: impl Into<Vec<u8>>) {
        let name = format!("{repository}/{path}");
        self.inner
            .lock()
            .unwrap()
            .files
            .insert(name, content.into());
    }

    /// All files below `folder`.
    pub fn add_folder(&self, repository: &str, folder: &Path) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_file() {
                self.add(repository, &name, std::fs::read(&path).unwrap());
            }
        }
    }

    pub fn change(&self, change: impl FnOnce(&mut Manner)) {
        change(&mut self.inner.lock().unwrap().manner);
    }

    /// The requests so far, which are then forgotten.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.inner.lock().unwrap().requests)
    }

    /// Bytes of bodies sent so far.
    pub fn sent(&self) -> u64 {
        self.inner.lock().unwrap().sent
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The program, with this hub and a cache in `home`.
    pub fn program(&self, home: &Path) -> Command {
        let mut command = program();
        for (name, _) in std::env::vars() {
            if name.starts_with("HF_") || name.to_lowercase().ends_with("_proxy") {
                command.env_remove(name);
            }
        }
        command
            .env_remove("HUGGINGFACE_HUB_CACHE")
            .env_remove("HUGGING_FACE_HUB_TOKEN")
            .env("HF_HOME", home)
            .env("HF_ENDPOINT", self.endpoint());
        command
    }

    fn serve(&self, stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok().filter(|&read| read > 0)?;
            let target = line.split(' ').nth(1)?.to_string();
            let (mut range, mut token) = (None, None);
            loop {
                let mut header = String::new();
                reader.read_line(&mut header).ok()?;
                let header = header.trim_end();
                if header.is_empty() {
                    break;
                }
                let (name, value) = header.split_once(':')?;
                match name.to_lowercase().as_str() {
                    "range" => range = Some(value.trim().to_string()),
                    "authorization" => token = Some(value.trim().to_string()),
                    _ => {}
                }
            }
            if !self.answer(&stream, &target, range.as_deref(), token.as_deref())? {
                return None;
            }
        }
    }

    /// Whether the connection stays.
    fn answer(
        &self,
        mut stream: &TcpStream,
        target: &str,
        range: Option<&str>,
        token: Option<&str>,
    ) -> Option<bool> {
        let mut inner = self.inner.lock().unwrap();
        inner
            .requests
            .push(format!("{target} {}", range.unwrap_or("")));
        let wanted = inner
            .manner
            .token
            .clone()
            .map(|token| format!("Bearer {token}"));
        let refusal = match (&wanted, token) {
            (Some(_), None) => Some("401 Unauthorized"),
            (Some(wanted), Some(token)) if wanted != token => Some("403 Forbidden"),
            _ => None,
        };
        let mut plain = |status: &str, headers: &str, body: &str| {
            write!(
                stream,
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\n{headers}\r\n{body}",
                body.len()
            )
            .ok()
            .map(|()| true)
        };
        if let Some(refusal) = refusal {
            return plain(refusal, "", "");
        }
        if let Some(rest) = target.strip_prefix("/api/models/") {
            let id = rest.split("/revision/").next()?;
            let start = format!("{id}/");
            let paths = inner
                .files
                .keys()
                .filter_map(|name| name.strip_prefix(&start));
            let siblings: Vec<_> = paths
                .map(|path| serde_json::json!({"rfilename": path}))
                .collect();
            if siblings.is_empty() {
                return plain("404 Not Found", "", "");
            }
            let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
            return plain("200 OK", "content-type: application/json\r\n", &body);
        }
        let (name, is_elsewhere) = match target.strip_prefix("/elsewhere/") {
            Some(name) => (name.to_string(), true),
            None => {
                let (id, rest) = target[1..].split_once("/resolve/")?;
                (format!("{id}/{}", rest.split_once('/')?.1), false)
            }
        };
        let Some(content) = inner.files.get(&name).cloned() else {
            return plain("404 Not Found", "", "");
        };
        let etag = blake3::hash(&content).to_hex();
        let is_large = inner
            .manner
            .redirects_from
            .is_some_and(|from| content.len() >= from);
        if is_large && !is_elsewhere {
            let headers = format!(
                "location: http://localhost:{}/elsewhere/{name}\r\nx-repo-commit: {COMMIT}\r\n\
                 x-linked-etag: \"{etag}\"\r\netag: \"not-this\"\r\n",
                self.port
            );
            return plain("302 Found", &headers, "");
        }
        let (start, end) = range
            .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'))
            .map(|(start, end)| (start.parse().unwrap(), end.parse().unwrap()))
            .unwrap_or((0usize, content.len()));
        let part = &content[start.min(content.len())..(end + 1).min(content.len())];
        let breaks = part.len() > 1 && inner.manner.breaks > 0;
        inner.manner.breaks -= usize::from(breaks);
        let sent = if breaks { part.len() / 2 } else { part.len() };
        inner.sent += sent as u64;
        drop(inner);
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {start}-{}/{}\r\n\
             x-repo-commit: {COMMIT}\r\netag: \"{etag}\"\r\n\r\n",
            part.len(),
            (start + part.len()).saturating_sub(1),
            content.len()
        )
        .ok()?;
        stream.write_all(&part[..sent]).ok()?;
        Some(!breaks)
    }
}
