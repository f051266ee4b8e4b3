//! What is asked of the hub, and how far its answers are believed: redirects are followed one by one, the token goes to
//! the configured address alone, answers have a bounded size, and every name is in the form that we would write.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, LOCATION, RANGE,
};
use reqwest::{Response, StatusCode, Url, redirect};
use serde::Deserialize;

use super::digest::Digest;
use super::names::{is_id, is_repository_path};
use super::{RepoId, Settings};

/// A transfer without a byte for this long has broken off.
const STALLED: Duration = Duration::from_secs(60);
/// A host that has not answered by then is not there.
const CONNECTING: Duration = Duration::from_secs(30);
/// Large files are one or two redirects away.
const REDIRECTS: usize = 10;
/// The listing of a repository with 100,000 files has about 20 MB.
const LARGEST_LISTING: usize = 32 << 20;

/// Why a file did not arrive.
pub(super) enum Failure {
    /// The hub answered with this status.
    Status(u16),
    /// It was not reached.
    Unreachable(String),
    /// The transfer broke off.
    Broken(String),
    /// So many bytes are announced, and so many are free.
    NoSpace(u64, u64),
    /// Nothing that trying again would mend.
    Final(String),
    Io(std::io::Error),
}

impl Failure {
    /// The answer is not what hubs give.
    fn unlike(what: impl std::fmt::Display) -> Self {
        Self::Final(format!("the answer is not a hub's: {what}"))
    }
}

impl From<reqwest::Error> for Failure {
    fn from(error: reqwest::Error) -> Self {
        // The address may carry a signature that lets anyone read the file.
        let error = error.without_url();
        if error.is_connect() {
            Self::Unreachable(chain(&error))
        } else if error.is_builder() {
            Self::Final(chain(&error))
        } else if error.is_timeout() {
            Self::Broken(format!("nothing arrived for {} s", STALLED.as_secs()))
        } else {
            Self::Broken(chain(&error))
        }
    }
}

/// An error with its causes, the last of which usually says it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// What a repository's listing says of one file.
#[derive(Debug, Clone, Default)]
pub(super) struct Listed {
    pub size: Option<u64>,
    pub digest: Option<Digest>,
}

/// The files of a repository by path.
pub(super) type Listing = BTreeMap<String, Listed>;

#[derive(Deserialize)]
struct Info {
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Sibling {
    fn listed(&self) -> Result<Listed, Failure> {
        let published = match &self.lfs {
            Some(lfs) => lfs.sha256.as_ref().map(|text| (text, Digest::sha256(text))),
            None => {
                let id = self.blob_id.as_ref();
                id.map(|text| (text, Digest::git_blob(text)))
            }
        };
        let digest = match published {
            Some((text, None)) => {
                let what = format!("{:?} has the digest {text:?}", self.rfilename);
                return Err(Failure::unlike(what));
            }
            Some((_, digest)) => digest,
            None => None,
        };
        let size = self.lfs.as_ref().and_then(|lfs| lfs.size).or(self.size);
        Ok(Listed { size, digest })
    }
}

/// What the hub itself says of a file, over all its redirects.
#[derive(Debug, Default)]
struct Headers {
    commit: Option<String>,
    etag: Option<String>,
    /// The etag of a large file, which is its SHA-256; it stands above `etag`.
    linked_etag: Option<String>,
    linked_size: Option<u64>,
}

impl Headers {
    fn read(&mut self, headers: &HeaderMap) -> Result<(), Failure> {
        if let Some(etag) = id_in(headers, "x-linked-etag")? {
            self.linked_etag = Some(etag);
        }
        if let Some(commit) = id_in(headers, "x-repo-commit")? {
            self.commit = Some(commit);
            // Without a commit beside it, it would be that of a redirect's page.
            if self.linked_etag.is_none() {
                self.etag = id_in(headers, ETAG.as_str())?.or(self.etag.take());
            }
        }
        if let Some(size) = text_in(headers, "x-linked-size")? {
            self.linked_size = Some(number(size)?);
        }
        Ok(())
    }

    fn etag(&self) -> Option<&String> {
        self.linked_etag.as_ref().or(self.etag.as_ref())
    }
}

/// The files that `answer`, of the hub's interface, lists.
pub(super) fn listing(answer: &[u8]) -> Result<Listing, Failure> {
    let info: Info = serde_json::from_slice(answer).map_err(Failure::unlike)?;
    let files = info.siblings.iter();
    files
        .map(|file| Ok((file.rfilename.clone(), file.listed()?)))
        .collect()
}

fn text_in<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Failure> {
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    let text = value.to_str().ok().map(str::trim);
    let text = text.ok_or_else(|| Failure::unlike(format!("{name} is no text")))?;
    Ok(Some(text))
}

/// A digest or a commit, which will name a file.
fn id_in(headers: &HeaderMap, name: &str) -> Result<Option<String>, Failure> {
    let Some(text) = text_in(headers, name)? else {
        return Ok(None);
    };
    let id = text.trim_start_matches("W/").trim_matches('"');
    if !is_id(id) {
        return Err(Failure::unlike(format!("{name} is {text:?}")));
    }
    Ok(Some(id.to_string()))
}

fn number(text: &str) -> Result<u64, Failure> {
    let number = text.parse();
    number.map_err(|_| Failure::unlike(format!("{text:?} for a number of bytes")))
}

/// A file of the hub before it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Metadata {
    pub commit: String,
    pub etag: String,
    pub size: u64,
    /// What its content is known by, where that is published.
    pub digest: Option<Digest>,
}

/// The content of a file from some place on.
pub(super) struct Content {
    response: Response,
    /// The place of the first byte.
    pub start: u64,
}

impl Content {
    /// Gives all of it to `take`, part by part.
    pub async fn read(
        mut self,
        mut take: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        while let Some(bytes) = self.response.chunk().await? {
            take(&bytes)?;
        }
        Ok(())
    }
}

/// The configured hub.
pub(super) struct Client {
    http: reqwest::Client,
    endpoint: Url,
    token: Option<HeaderValue>,
}

impl Client {
    pub fn new(settings: &Settings) -> Result<Self, Failure> {
        let endpoint = Url::parse(&settings.endpoint).ok();
        let endpoint = endpoint.filter(|url| ["http", "https"].contains(&url.scheme()));
        let endpoint = endpoint.ok_or_else(|| {
            let what = format!("HF_ENDPOINT is {:?}, no http address", settings.endpoint);
            Failure::Final(what)
        })?;
        let header = |token: &String| {
            let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| {
                Failure::Final("HF_TOKEN has characters that no token has".to_string())
            })?;
            value.set_sensitive(true);
            Ok::<_, Failure>(value)
        };
        let token = settings.token.as_ref().map(header).transpose()?;
        let http = reqwest::Client::builder()
            .user_agent(concat!("proxytune/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none())
            .referer(false)
            .no_gzip()
            .no_brotli()
            .no_zstd()
            .no_deflate()
            .connect_timeout(CONNECTING)
            .read_timeout(STALLED)
            .build()?;
        Ok(Self {
            http,
            endpoint,
            token,
        })
    }

    /// The address of `parts` below the endpoint, each encoded as one part of a path.
    fn url<'a>(&self, parts: impl IntoIterator<Item = &'a str>) -> Result<Url, Failure> {
        let mut url = self.endpoint.clone();
        match url.path_segments_mut() {
            Ok(mut path) => path.pop_if_empty().extend(parts),
            Err(()) => return Err(Failure::Final("HF_ENDPOINT has no paths".to_string())),
        };
        Ok(url)
    }

    fn file_url(&self, repo: &RepoId, path: &str) -> Result<Url, Failure> {
        let id = repo.id.split('/');
        self.url(
            id.chain(["resolve", repo.revision.as_str()])
                .chain(path.split('/')),
        )
    }

    /// All files in the repository. Names may be anything here.
    pub async fn list(&self, repo: &RepoId) -> Result<Listing, Failure> {
        let id = repo.id.split('/');
        let parts = ["api", "models"].into_iter().chain(id);
        let mut url = self.url(parts.chain(["revision", repo.revision.as_str()]))?;
        url.set_query(Some("blobs=true"));
        let (_, mut response) = self.get(url, None).await?;
        let mut body = Vec::new();
        while let Some(bytes) = response.chunk().await? {
            if body.len() + bytes.len() > LARGEST_LISTING {
                let mib = LARGEST_LISTING >> 20;
                return Err(Failure::unlike(format!("a listing of over {mib} MiB")));
            }
            body.extend_from_slice(&bytes);
        }
        listing(&body)
    }

    /// What the hub says of the file `path`, of which it also said `listed`.
    pub async fn metadata(
        &self,
        repo: &RepoId,
        path: &str,
        listed: &Listed,
    ) -> Result<Metadata, Failure> {
        if !is_repository_path(path) {
            return Err(Failure::Final(
                "this name is none that a file may have here".to_string(),
            ));
        }
        let url = self.file_url(repo, path)?;
        let first = self.get(url.clone(), Some("bytes=0-0".to_string())).await;
        let (said, response) = match first {
            // An empty file has no first byte.
            Err(Failure::Status(416)) => self.get(url, None).await?,
            other => other?,
        };
        let total = match response.status() {
            StatusCode::PARTIAL_CONTENT => Some(content_range(&response)?.1),
            _ => response.content_length(),
        };
        let sizes = [listed.size, said.linked_size, total];
        let mut sizes = sizes.into_iter().flatten();
        let size = sizes.next().ok_or_else(|| Failure::unlike("no length"))?;
        if let Some(other) = sizes.find(|other| *other != size) {
            let what = format!("{size} bytes in one place and {other} in another");
            return Err(Failure::unlike(what));
        }
        let missing = |what| move || Failure::unlike(format!("no {what}"));
        let etag = said.etag().cloned().ok_or_else(missing("etag"))?;
        let commit = said.commit.ok_or_else(missing("commit"))?;
        let named = Digest::sha256(&etag);
        let digest = match (&listed.digest, named) {
            (Some(listed @ Digest::Sha256(_)), Some(named)) if *listed != named => {
                return Err(Failure::unlike(format!(
                    "{listed} in one place and {named} in another"
                )));
            }
            (listed, named) => listed.clone().or(named),
        };
        Ok(Metadata {
            commit,
            etag,
            size,
            digest,
        })
    }

    /// The content of the file `path` from its byte `start` on, or from its beginning where the hub gives no parts.
    pub async fn content(
        &self,
        repo: &RepoId,
        path: &str,
        expected: &Metadata,
        start: u64,
    ) -> Result<Content, Failure> {
        let range = (start > 0).then(|| format!("bytes={start}-"));
        let (said, response) = self.get(self.file_url(repo, path)?, range).await?;
        if said.etag().is_some_and(|etag| *etag != expected.etag) {
            return Err(Failure::Broken("the file changed meanwhile".to_string()));
        }
        let (start, size) = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let (from, total) = content_range(&response)?;
                if from != start {
                    let what = format!("it begins at byte {from} instead of {start}");
                    return Err(Failure::unlike(what));
                }
                (from, Some(total))
            }
            _ => (0, response.content_length()),
        };
        match size.filter(|size| *size != expected.size) {
            Some(size) => Err(Failure::unlike(format!(
                "{size} bytes instead of {}",
                expected.size
            ))),
            None => Ok(Content { response, start }),
        }
    }

    /// The answer to `url`, behind all redirects, and what the hub itself said on the way.
    async fn get(
        &self,
        mut url: Url,
        range: Option<String>,
    ) -> Result<(Headers, Response), Failure> {
        let mut said = Headers::default();
        for _ in 0..=REDIRECTS {
            let is_hub = url.origin() == self.endpoint.origin();
            let mut request = self.http.get(url.clone());
            request = request.header(ACCEPT_ENCODING, "identity");
            if let Some(token) = self.token.as_ref().filter(|_| is_hub) {
                request = request.header(AUTHORIZATION, token.clone());
            }
            if let Some(range) = &range {
                request = request.header(RANGE, range);
            }
            let response = request.send().await?;
            let status = response.status();
            let redirects = [301, 302, 303, 307, 308].contains(&status.as_u16());
            if is_hub && (redirects || status.is_success()) {
                said.read(response.headers())?;
            }
            match (redirects, status.is_success()) {
                (true, _) => url = next(&url, &response)?,
                (_, true) => return Ok((said, response)),
                _ if is_hub => return Err(Failure::Status(status.as_u16())),
                // Such as a signature that has run out: the hub gives another.
                _ => {
                    let host = url.host_str().unwrap_or_default();
                    let what = format!("{host} answered {}", status.as_u16());
                    return Err(Failure::Broken(what));
                }
            }
        }
        Err(Failure::unlike("more than ten redirects"))
    }
}

/// Where a redirect leads.
fn next(url: &Url, response: &Response) -> Result<Url, Failure> {
    let location = text_in(response.headers(), LOCATION.as_str())?;
    let location = location.ok_or_else(|| Failure::unlike("a redirect to nowhere"))?;
    let next = url.join(location);
    let next = next.map_err(|e| Failure::unlike(format!("a redirect: {e}")))?;
    match (url.scheme(), next.scheme()) {
        (_, "https") | ("http", "http") => Ok(next),
        (from, to) => Err(Failure::unlike(format!("a redirect from {from} to {to}"))),
    }
}

/// The first byte and the size of the whole in an answer with a part.
fn content_range(response: &Response) -> Result<(u64, u64), Failure> {
    let text = text_in(response.headers(), CONTENT_RANGE.as_str())?.unwrap_or_default();
    let read = || {
        let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
        let (start, _) = range.split_once('-')?;
        Some((start, total))
    };
    let (start, total) = read().ok_or_else(|| Failure::unlike(format!("the range {text:?}")))?;
    Ok((number(start)?, number(total)?))
}
