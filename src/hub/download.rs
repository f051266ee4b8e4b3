//! Files from the hub into its usual cache, with the hub's own crate: each file goes on where it was broken off.

use std::path::PathBuf;
use std::time::Duration;

use hf_hub::api::tokio::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use super::progress::Meter;
use super::published::{Presence, Published, is_index, shards_named};
use super::snapshot::{RepoId, Snapshot, choose};
use super::{Settings, human_bytes};
use crate::console;
use crate::{Error, Result};

/// Bytes asked for at once; what is lost when a transfer breaks off.
const CHUNK: usize = 16 << 20;
/// Parts of a file that arrive side by side.
const AT_ONCE: usize = 4;
/// A transfer without a byte for this long has broken off.
const STALLED: Duration = Duration::from_secs(60);
/// Attempts in a row that may come no further than one before.
const ATTEMPTS: u32 = 4;

/// Why a file did not arrive.
enum Failure {
    /// The hub answered with this status.
    Status(u16),
    /// It was not reached.
    Unreachable(String),
    /// The transfer broke off.
    Broken(String),
    /// Another program is downloading the same file.
    Locked,
    /// Nothing that trying again would mend.
    Final(String),
    Io(std::io::Error),
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        match error {
            ApiError::RequestError(error) => match error.status() {
                Some(status) => Self::Status(status.as_u16()),
                None if error.is_connect() => Self::Unreachable(chain(&error)),
                None => Self::Broken(chain(&error)),
            },
            ApiError::LockAcquisition(_) => Self::Locked,
            ApiError::IoError(error) => Self::Io(error),
            ApiError::MissingHeader(_) | ApiError::InvalidHeader(_) => {
                Self::Final(format!("the answer is not a hub's: {error}"))
            }
            other => Self::Final(other.to_string()),
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

/// Gets what is missing of `published`, called `name`, as `presence` says.
///
/// # Errors
/// When there is no network, no access (with how to get it), or no such file.
pub fn download(
    settings: &Settings,
    name: &str,
    published: &Published,
    presence: &Presence,
) -> Result<()> {
    let repositories = presence
        .incomplete
        .iter()
        .map(|&number| &published.repositories[number]);
    let megabytes: u64 = repositories
        .clone()
        .map(|repository| repository.megabytes)
        .sum();
    console::note(format!(
        "downloading {name}, at most {}, to {}",
        human_bytes(megabytes * 1_000_000),
        settings.cache.display()
    ));
    for repository in repositories {
        let hub = Hub::new(settings, RepoId::main(repository.id));
        for wanted in repository.files {
            let (choices, needed) = wanted.choices();
            let mut found = None;
            for path in choices {
                found = hub.get(path)?.map(|at| (*path, at));
                if found.is_some() {
                    break;
                }
            }
            match found {
                Some((path, at)) => hub.get_all(&shards_named(path, &at))?,
                None if needed => return Err(hub.lacks(&choices.join(" or "))),
                None => {}
            }
        }
    }
    Ok(())
}

/// Gets the files of any repository that loading may want.
///
/// # Errors
/// As [`download`].
pub fn download_repository(settings: &Settings, repo: &RepoId) -> Result<()> {
    let hub = Hub::new(settings, repo.clone());
    console::note(format!(
        "downloading {repo} to {}",
        settings.cache.display()
    ));
    let paths = choose(&hub.list()?);
    if paths.is_empty() {
        return Err(Error::invalid(
            format!("{repo} has no files of a checkpoint"),
            "name a repository with weights",
        ));
    }
    hub.get_all(&paths)?;
    let folder = Snapshot::find(settings, repo).map(|snapshot| snapshot.folder);
    for path in paths.iter().filter(|path| is_index(path)) {
        let at = folder.as_ref().map(|folder| folder.join(path));
        hub.get_all(&shards_named(path, &at.unwrap_or_default()))?;
    }
    Ok(())
}

/// One repository of the hub.
struct Hub<'a> {
    settings: &'a Settings,
    repo: RepoId,
}

impl<'a> Hub<'a> {
    fn new(settings: &'a Settings, repo: RepoId) -> Self {
        Self { settings, repo }
    }

    fn get_all(&self, paths: &[String]) -> Result<()> {
        for path in paths {
            if self.get(path)?.is_none() {
                return Err(self.lacks(path));
            }
        }
        Ok(())
    }

    /// Where the file lies in the cache, in which it is now at the latest; `None` when the repository has none.
    fn get(&self, path: &str) -> Result<Option<PathBuf>> {
        let meter = Meter::new(&format!("{}/{path}", self.repo.id));
        let mut furthest = 0;
        let mut failures = 0;
        let mut waiting = false;
        loop {
            if let Some(at) = self.present(path) {
                return Ok(Some(at));
            }
            let failure = match self.attempt(|api| self.fetch(api, path, meter.clone()), &meter) {
                Ok(at) => return Ok(Some(at)),
                Err(Failure::Status(404)) => return Ok(None),
                Err(Failure::Locked) => {
                    if !waiting {
                        meter.say(&format!("{path}: waiting for another program's download"));
                    }
                    waiting = true;
                    continue;
                }
                Err(failure) => failure,
            };
            let may_pass = match &failure {
                Failure::Broken(_) | Failure::Status(408 | 429 | 500..) => true,
                // Where nothing has ever come from, nothing will.
                Failure::Unreachable(_) => meter.position() > 0,
                _ => false,
            };
            if meter.position() > furthest {
                (furthest, failures) = (meter.position(), 0);
            }
            failures += 1;
            if !may_pass || failures >= ATTEMPTS {
                return Err(self.explain(path, failure));
            }
            let at = human_bytes(meter.position());
            meter.say(&format!("{path}: broken off at {at}, trying again"));
            std::thread::sleep(Duration::from_millis(500 << failures));
        }
    }

    fn present(&self, path: &str) -> Option<PathBuf> {
        let at = Snapshot::find(self.settings, &self.repo)?.folder.join(path);
        at.is_file().then_some(at)
    }

    /// All paths in the repository.
    fn list(&self) -> Result<Vec<String>> {
        let meter = Meter::new(&self.repo.id);
        let listed = self.attempt(
            |api| async move {
                let info = api.repo(self.on_hub()).info().await?;
                Ok(info
                    .siblings
                    .into_iter()
                    .map(|file| file.rfilename)
                    .collect())
            },
            &meter,
        );
        listed.map_err(|failure| self.explain("", failure))
    }

    /// Runs one attempt on threads of its own, which end with it: parts that are still under way when one has failed
    /// would otherwise go on beside the next attempt.
    fn attempt<T, F>(&self, body: impl FnOnce(Api) -> F, meter: &Meter) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        if self.settings.offline {
            return Err(Failure::Final("HF_HUB_OFFLINE is set".to_string()));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(Failure::Io)?;
        meter.touch();
        let result = runtime.block_on(async {
            let api = ApiBuilder::from_cache(Cache::new(self.settings.cache.clone()))
                .with_endpoint(self.settings.endpoint.clone())
                .with_token(self.settings.token.clone())
                .with_progress(false)
                .with_max_files(AT_ONCE)
                .with_chunk_size(Some(CHUNK))
                .with_user_agent("proxytune", env!("CARGO_PKG_VERSION"))
                .build()?;
            tokio::select! {
                result = body(api) => result,
                () = stall(meter) => {
                    Err(Failure::Broken(format!("nothing arrived for {} s", STALLED.as_secs())))
                }
            }
        });
        runtime.shutdown_background();
        result
    }

    async fn fetch(&self, api: Api, path: &str, meter: Meter) -> Result<PathBuf, Failure> {
        let repository = api.repo(self.on_hub());
        let metadata = api.metadata(&repository.url(path)).await?;
        let cached = Cache::new(self.settings.cache.clone()).repo(self.on_hub());
        let blob = cached.blob_path(metadata.etag());
        let is_whole = |blob: &PathBuf| {
            std::fs::metadata(blob).is_ok_and(|file| file.len() == metadata.size() as u64)
        };
        if !is_whole(&blob) {
            let at = repository.download_with_progress(path, meter).await?;
            return if is_whole(&at) {
                Ok(at)
            } else {
                Err(Failure::Final(
                    "it arrived with another size than announced".to_string(),
                ))
            };
        }
        // The same content under an older commit: only its name is new.
        let link = cached.pointer_path(metadata.commit_hash()).join(path);
        if let Some(parent) = link.parent() {
            std::fs::create_dir_all(parent).map_err(Failure::Io)?;
        }
        let up = "../".repeat(path.matches('/').count() + 2);
        let target = PathBuf::from(format!("{up}blobs/{}", metadata.etag()));
        super::published::link_file(&target, &link).map_err(Failure::Io)?;
        cached
            .create_ref(metadata.commit_hash())
            .map_err(Failure::Io)?;
        Ok(link)
    }

    fn on_hub(&self) -> Repo {
        Repo::with_revision(
            self.repo.id.clone(),
            RepoType::Model,
            self.repo.revision.clone(),
        )
    }

    fn lacks(&self, path: &str) -> Error {
        Error::invalid(
            format!(
                "{} has no file {path} on {}",
                self.repo, self.settings.endpoint
            ),
            "name another revision (owner/name@revision), or a directory that has the files",
        )
    }

    fn explain(&self, path: &str, failure: Failure) -> Error {
        let (endpoint, id) = (&self.settings.endpoint, &self.repo.id);
        let what = if path.is_empty() {
            self.repo.to_string()
        } else {
            format!("{}: {path}", self.repo)
        };
        let access = format!(
            "accept the terms on {endpoint}/{id} if it has any, make a token that may read it on \
             {endpoint}/settings/tokens, and set HF_TOKEN to it"
        );
        let without = format!(
            "the same command goes on where it stopped; files of {id} that were fetched elsewhere can be used by \
             naming their directory"
        );
        let (why, hint) = match failure {
            Failure::Status(401) if self.settings.token.is_none() => (
                "the hub wants to know who asks (401): the repository is gated or private, or there is none of this \
                 name"
                    .to_string(),
                access,
            ),
            Failure::Status(401) => ("the hub does not know this token (401)".to_string(), access),
            Failure::Status(403) => (
                "this token has no access (403): the repository is gated and its terms are not accepted".to_string(),
                access,
            ),
            Failure::Status(404) => (
                "the hub has no such repository or revision (404)".to_string(),
                "check the spelling of owner/name@revision".to_string(),
            ),
            Failure::Status(status) => (format!("the hub answered {status}"), without),
            Failure::Unreachable(why) => (
                format!("{endpoint} is not reached: {why}"),
                format!("check the network, or HF_ENDPOINT; {without}"),
            ),
            Failure::Broken(why) => (format!("the download broke off: {why}"), without),
            Failure::Final(why) if self.settings.offline => (
                format!("not on this machine, and {why}"),
                format!("unset HF_HUB_OFFLINE to download; {without}"),
            ),
            Failure::Final(why) => (why, without),
            Failure::Locked => ("another program is downloading it".to_string(), without),
            Failure::Io(source) => {
                let path = self.settings.cache.clone();
                return Error::Io { path, source };
            }
        };
        Error::invalid(format!("{what}: {why}"), hint)
    }
}

async fn stall(meter: &Meter) {
    while meter.idle() < STALLED {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
