//! A hub on this machine: the few requests that downloads make, with everything that can go wrong on the way, by
//! accident or on purpose.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use serde_json::{Value, json};

use super::program;

/// The commit of every repository.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The SHA-256 of `content` in hexadecimal digits.
pub fn sha256(content: &[u8]) -> String {
    hexadecimal(digest(&SHA256, content).as_ref())
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How the hub behaves.
#[derive(Clone, Default)]
pub struct Manner {
    /// Who may read; everybody where absent. No token is 401, another one 403.
    pub token: Option<String>,
    /// So many transfers break off half-way, each after a body has begun.
    pub breaks: usize,
    /// Bodies end before their first byte.
    pub silent: bool,
    /// A file at least this large is answered with a redirect to another host, as large files are.
    pub redirects_from: Option<usize>,
    /// Every file is answered with a redirect to there, or to nowhere.
    pub redirect: Option<Option<String>>,
    /// What it says for an etag, a commit, and a file's whole size.
    pub etag: Option<String>,
    pub commit: Option<String>,
    pub size: Option<String>,
    /// Files are answered whole, whatever part is asked for.
    pub ignores_ranges: bool,
    /// Parts begin so many bytes later than they were asked for.
    pub range_off_by: usize,
    /// The last byte of every file is another one.
    pub flips: bool,
    /// Files end so many bytes early, which no header admits to the digest.
    pub cuts: usize,
    /// Bodies go on behind their end.
    pub goes_on: bool,
    /// The listing of every repository, instead of the true one.
    pub listing: Option<Vec<u8>>,
    /// Files that are not there are empty objects.
    pub has_everything: bool,
}

struct Inner {
    /// Files by `owner/name/path`.
    files: BTreeMap<String, Vec<u8>>,
    manner: Manner,
    /// Request lines with the range asked for.
    requests: Vec<String>,
    /// The host that was spoken to, and the token that came along.
    tokens: Vec<(String, Option<String>)>,
    sent: u64,
}

/// A hub that serves until the test ends.
#[derive(Clone)]
pub struct Hub {
    inner: Arc<Mutex<Inner>>,
    port: u16,
}

struct Request {
    target: String,
    host: String,
    range: Option<String>,
    token: Option<String>,
}

impl Hub {
    pub fn start(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let inner = Inner {
            files: BTreeMap::new(),
            manner,
            requests: Vec::new(),
            tokens: Vec::new(),
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

    /// Hosts and tokens of the requests so far, which are then forgotten.
    pub fn tokens(&self) -> Vec<(String, Option<String>)> {
        std::mem::take(&mut self.inner.lock().unwrap().tokens)
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
            let mut request = Request {
                target: line.split(' ').nth(1)?.to_string(),
                host: String::new(),
                range: None,
                token: None,
            };
            loop {
                let mut header = String::new();
                reader.read_line(&mut header).ok()?;
                let header = header.trim_end();
                if header.is_empty() {
                    break;
                }
                let (name, value) = header.split_once(':')?;
                let value = value.trim().to_string();
                match name.to_lowercase().as_str() {
                    "range" => request.range = Some(value),
                    "authorization" => request.token = Some(value),
                    "host" => request.host = value,
                    _ => {}
                }
            }
            if !self.answer(&stream, &request)? {
                return None;
            }
        }
    }

    /// Whether the connection stays.
    fn answer(&self, mut stream: &TcpStream, request: &Request) -> Option<bool> {
        let mut inner = self.inner.lock().unwrap();
        let range = request.range.as_deref();
        let target = request.target.split('?').next()?;
        inner
            .requests
            .push(format!("{} {}", request.target, range.unwrap_or("")));
        let came = (request.host.clone(), request.token.clone());
        inner.tokens.push(came);
        let mut plain = |status: &str, headers: &str, body: &[u8]| {
            let length = body.len();
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{headers}\r\n");
            stream.write_all(head.as_bytes()).ok()?;
            stream.write_all(body).ok()?;
            Some(true)
        };
        let elsewhere = target.strip_prefix("/elsewhere/");
        let wanted = inner.manner.token.as_ref();
        let wanted = wanted.map(|token| format!("Bearer {token}"));
        let refusal = match (&wanted, &request.token) {
            _ if elsewhere.is_some() => None,
            (Some(_), None) => Some("401 Unauthorized"),
            (Some(wanted), Some(token)) if wanted != token => Some("403 Forbidden"),
            _ => None,
        };
        if let Some(refusal) = refusal {
            return plain(refusal, "", b"");
        }
        if let Some(rest) = target.strip_prefix("/api/models/") {
            let json = "content-type: application/json\r\n";
            return match inner.listing(rest.split("/revision/").next()?) {
                Some(body) => plain("200 OK", json, &body),
                None => plain("404 Not Found", "", b""),
            };
        }
        let name = match elsewhere {
            Some(name) => name.to_string(),
            None => {
                let (id, rest) = target[1..].split_once("/resolve/")?;
                format!("{id}/{}", rest.split_once('/')?.1)
            }
        };
        let content = match inner.files.get(&name) {
            Some(content) => content.clone(),
            None if inner.manner.has_everything => b"{}".to_vec(),
            None => return plain("404 Not Found", "", b""),
        };
        let manner = inner.manner.clone();
        let etag = manner.etag.clone();
        let etag = etag.unwrap_or_else(|| inner.published(&content).1);
        let commit = manner.commit.as_deref().unwrap_or(COMMIT);
        let mut said = format!("x-repo-commit: {commit}\r\netag: \"{etag}\"\r\n");
        if elsewhere.is_none() {
            let away = format!("http://localhost:{}/elsewhere/{name}", self.port);
            let redirect = match manner.redirect {
                Some(redirect) => Some(redirect),
                None => inner.is_large(&content).then_some(Some(away)),
            };
            if let Some(redirect) = redirect {
                said = format!(
                    "x-repo-commit: {commit}\r\nx-linked-etag: \"{etag}\"\r\netag: \"not-this\"\r\n"
                );
                let location = redirect.map(|to| format!("location: {to}\r\n"));
                return plain("302 Found", &(said + &location.unwrap_or_default()), b"");
            }
        } else {
            said = "etag: \"somebody-elses\"\r\n".to_string();
        }
        inner.file(stream, content, range, &said)
    }
}

impl Inner {
    fn is_large(&self, content: &[u8]) -> bool {
        let from = self.manner.redirects_from;
        from.is_some_and(|from| content.len() >= from)
    }

    /// Whether the digest is that of a large file, which is the SHA-256, and the digest.
    fn published(&self, content: &[u8]) -> (bool, String) {
        if self.is_large(content) {
            return (true, sha256(content));
        }
        let blob = [format!("blob {}\0", content.len()).as_bytes(), content].concat();
        let digest = digest(&SHA1_FOR_LEGACY_USE_ONLY, &blob);
        (false, hexadecimal(digest.as_ref()))
    }

    /// What is told of the repository `id`, if there is one.
    fn listing(&self, id: &str) -> Option<Vec<u8>> {
        if let Some(listing) = &self.manner.listing {
            return Some(listing.clone());
        }
        let start = format!("{id}/");
        let files = self.files.iter();
        let files = files.filter_map(|(name, content)| Some((name.strip_prefix(&start)?, content)));
        let siblings: Vec<Value> = files
            .map(|(path, content)| {
                let size = content.len();
                match self.published(content) {
                    (true, sha256) => {
                        json!({"rfilename": path, "size": size, "blobId": "0".repeat(40),
                        "lfs": {"sha256": sha256, "size": size, "pointerSize": 134}})
                    }
                    (false, id) => json!({"rfilename": path, "size": size, "blobId": id}),
                }
            })
            .collect();
        let listing = json!({"sha": COMMIT, "siblings": siblings});
        (!siblings.is_empty()).then(|| listing.to_string().into_bytes())
    }

    /// Sends the part of `content` that is asked for; whether the connection stays.
    fn file(
        &mut self,
        mut stream: &TcpStream,
        mut content: Vec<u8>,
        range: Option<&str>,
        said: &str,
    ) -> Option<bool> {
        content.truncate(content.len().saturating_sub(self.manner.cuts));
        if self.manner.flips
            && let Some(last) = content.last_mut()
        {
            *last ^= 1;
        }
        let asked = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
        let asked = asked.filter(|_| !self.manner.ignores_ranges);
        let (start, end) = match asked {
            Some((start, end)) => {
                let start: usize = start.parse().unwrap();
                let end = end.parse().map_or(content.len(), |end: usize| end + 1);
                (
                    start + usize::from(start > 0) * self.manner.range_off_by,
                    end,
                )
            }
            None => (0, content.len()),
        };
        let part = &content[start.min(content.len())..end.min(content.len())];
        let silent = part.len() > 1 && self.manner.silent;
        let breaks = part.len() > 1 && self.manner.breaks > 0;
        self.manner.breaks -= usize::from(breaks);
        let sent = match (silent, breaks) {
            (true, _) => 0,
            (_, true) => part.len() / 2,
            _ => part.len(),
        };
        self.sent += sent as u64;
        let whole = content.len().to_string();
        let size = self.manner.size.as_ref().unwrap_or(&whole);
        let head = match asked {
            Some(_) => format!(
                "206 Partial Content\r\ncontent-range: bytes {start}-{}/{size}",
                (start + part.len()).saturating_sub(1)
            ),
            None => "200 OK".to_string(),
        };
        let length = if self.manner.goes_on {
            "transfer-encoding: chunked".to_string()
        } else {
            format!("content-length: {}", part.len())
        };
        write!(stream, "HTTP/1.1 {head}\r\n{length}\r\n{said}\r\n").ok()?;
        if self.manner.goes_on {
            let body = [part, &[b' '; 4096]].concat();
            write!(stream, "{:x}\r\n", body.len()).ok()?;
            stream.write_all(&body).ok()?;
            stream.write_all(b"\r\n0\r\n\r\n").ok()?;
            return Some(true);
        }
        stream.write_all(&part[..sent]).ok()?;
        Some(!breaks && !silent)
    }
}
