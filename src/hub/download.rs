//! Files from the hub into its usual cache, laid out and locked as `huggingface_hub` does it. A file takes its place when
//! it has the length and the digest that the hub publishes; each goes on where it was broken off.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::runtime::Runtime;

use super::client::{Client, Failure, Listed, Listing, Metadata};
use super::digest::Digest;
use super::names::is_repository_path;
use super::progress::Meter;
use super::published::{Presence, Published, is_index, link_file, shards_named};
use super::snapshot::{RepoId, Snapshot, choose, is_settings};
use super::{Settings, human_bytes};
use crate::console;
use crate::files;
use crate::{Error, Result};

/// The largest tokenizers have 35 MB.
const LARGEST_SETTINGS: u64 = 64 << 20;
/// So many bytes take longer to read than a person waits without a word.
const TOLD_FROM: u64 = 1 << 30;
/// Attempts in a row that may come no further than one before.
const ATTEMPTS: u32 = 4;

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
    for path in &presence.missing_by_hand {
        console::note(format!("{path} is on no hub: it is to be placed by hand"));
    }
    for repository in repositories {
        let hub = Hub::open(settings, RepoId::main(repository.id))?.with_listing(false)?;
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
                Some((path, at)) => hub.get_all(&shards_named(path, &at)?)?,
                None if needed => return Err(hub.lacks(&choices.join(" or "))),
                None => {}
            }
        }
    }
    Ok(())
}

/// Gets the files of any repository that loading may want. Before the weights come, `is_of_use` sees the folder with
/// the settings.
///
/// # Errors
/// As [`download`], and with the error of `is_of_use`.
pub fn download_repository(
    settings: &Settings,
    repo: &RepoId,
    is_of_use: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    console::note(format!(
        "downloading {repo} to {}",
        settings.cache.display()
    ));
    let hub = Hub::open(settings, repo.clone())?.with_listing(true)?;
    let listed: Vec<String> = hub.listing.keys().cloned().collect();
    let paths = choose(&listed);
    if paths.is_empty() {
        return Err(Error::invalid(
            format!("{repo} has no files of a checkpoint"),
            "name a repository with weights",
        ));
    }
    let (few, weights): (Vec<String>, Vec<String>) =
        paths.into_iter().partition(|path| is_settings(path));
    hub.get_all(&few)?;
    let folder = || Snapshot::find(settings, repo).map(|snapshot| snapshot.folder);
    if let Some(folder) = folder() {
        is_of_use(&folder)?;
    }
    hub.get_all(&weights)?;
    if let Some(folder) = folder() {
        for path in few.iter().filter(|path| is_index(path)) {
            hub.get_all(&shards_named(path, &folder.join(path))?)?;
        }
    }
    Ok(())
}

/// One repository of the hub.
struct Hub<'a> {
    settings: &'a Settings,
    repo: RepoId,
    client: Client,
    runtime: Runtime,
    listing: Listing,
}

impl<'a> Hub<'a> {
    fn open(settings: &'a Settings, repo: RepoId) -> Result<Self> {
        let parts = || {
            if settings.offline {
                return Err(Failure::Final("HF_HUB_OFFLINE is set".to_string()));
            }
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(Failure::Io)?;
            Ok((Client::new(settings)?, runtime))
        };
        let (client, runtime) = parts().map_err(|failure| explain(settings, &repo, "", failure))?;
        Ok(Self {
            settings,
            repo,
            client,
            runtime,
            listing: Listing::new(),
        })
    }

    /// Asks what files there are. Mirrors that give files alone may not know it: for them it must not be `needed`.
    fn with_listing(mut self, needed: bool) -> Result<Self> {
        match self.runtime.block_on(self.client.list(&self.repo)) {
            Ok(listing) => self.listing = listing,
            Err(Failure::Status(_)) if !needed => {}
            Err(failure) => return Err(self.explain("", failure)),
        }
        Ok(self)
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
        let listed = self.listing.get(path).cloned().unwrap_or_default();
        let at = Snapshot::find(self.settings, &self.repo)
            .and_then(|snapshot| snapshot.file(path))
            .filter(|at| listed.size.is_none_or(|size| has_length(at, size)));
        if at.is_some() {
            return Ok(at);
        }
        let meter = Meter::new(&format!("{}/{path}", self.repo.id));
        let mut furthest = 0;
        let mut failures = 0;
        loop {
            let fetched = self.runtime.block_on(self.fetch(path, &listed, &meter));
            let failure = match fetched {
                Ok(at) => return Ok(Some(at)),
                Err(Failure::Status(404)) => return Ok(None),
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

    async fn fetch(&self, path: &str, listed: &Listed, meter: &Meter) -> Result<PathBuf, Failure> {
        let metadata = self.client.metadata(&self.repo, path, listed).await?;
        if is_settings(path) && metadata.size > LARGEST_SETTINGS {
            let size = human_bytes(metadata.size);
            return Err(Failure::Final(format!("{size} for a file of settings")));
        }
        let folder = self.repo.folder(self.settings);
        let blob = folder.join("blobs").join(&metadata.etag);
        make_folder_of(&blob)?;
        let _lock = self.lock(&metadata.etag, path, meter)?;
        if !is_whole(&blob, &metadata).map_err(Failure::Io)? {
            let partial = blob.with_file_name(format!("{}.incomplete", metadata.etag));
            self.transfer(path, &metadata, &partial, meter).await?;
            files::into_place(&partial, &blob).map_err(unplaced)?;
        }
        let snapshots = folder.join("snapshots");
        let link = snapshots.join(&metadata.commit).join(path);
        make_folder_of(&link)?;
        remove(&link).map_err(Failure::Io)?;
        let up = "../".repeat(path.matches('/').count() + 2);
        let target = PathBuf::from(format!("{up}blobs/{}", metadata.etag));
        link_file(&target, &link).map_err(Failure::Io)?;
        if self.repo.revision != metadata.commit {
            let reference = folder.join("refs").join(&self.repo.revision);
            files::write(&reference, metadata.commit.as_bytes()).map_err(unplaced)?;
        }
        Ok(link)
    }

    /// Nobody else writes the blob `etag` as long as the file is held, `huggingface_hub` neither.
    fn lock(&self, etag: &str, path: &str, meter: &Meter) -> Result<File, Failure> {
        let folder = self.repo.folder(self.settings);
        let locks = self.settings.cache.join(".locks");
        let at = locks
            .join(folder.file_name().unwrap_or_default())
            .join(format!("{etag}.lock"));
        make_folder_of(&at)?;
        let file = File::create(&at).map_err(Failure::Io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                meter.say(&format!("{path}: waiting for another program's download"));
                file.lock().map_err(Failure::Io)?;
            }
            Err(TryLockError::Error(error)) => return Err(Failure::Io(error)),
        }
        Ok(file)
    }

    /// Makes `partial` the whole file, going on behind what it has, and proves it.
    async fn transfer(
        &self,
        path: &str,
        metadata: &Metadata,
        partial: &Path,
        meter: &Meter,
    ) -> Result<(), Failure> {
        let size = metadata.size;
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(partial)
            .map_err(Failure::Io)?;
        let mut there = file.metadata().map_err(Failure::Io)?.len();
        if there > size {
            file.set_len(0).map_err(Failure::Io)?;
            there = 0;
        }
        let free = files::free_space(&self.settings.cache).unwrap_or(u64::MAX);
        if size - there > free {
            return Err(Failure::NoSpace(size - there, free));
        }
        let resumed = there > 0;
        if there < size {
            let content = self.client.content(&self.repo, path, metadata, there);
            let content = match content.await {
                Err(failure @ (Failure::Final(_) | Failure::Status(416))) => {
                    remove(partial).map_err(Failure::Io)?;
                    return Err(failure);
                }
                other => other?,
            };
            if content.start != there {
                file.set_len(content.start).map_err(Failure::Io)?;
                there = content.start;
            }
            meter.begin(size, there);
            let taken = content.read(|bytes| {
                there += bytes.len() as u64;
                if there > size {
                    let what = format!("it goes on beyond the {size} bytes that were announced");
                    return Err(Failure::Final(what));
                }
                meter.advance(bytes.len() as u64);
                file.write_all(bytes).map_err(Failure::Io)
            });
            let taken = taken.await;
            if let Err(Failure::Final(_)) = &taken {
                remove(partial).map_err(Failure::Io)?;
            }
            taken?;
            if there < size {
                let what = format!("it ended after {there} of {size} bytes");
                return Err(Failure::Broken(what));
            }
        }
        drop(file);
        meter.end();
        let Some(digest) = &metadata.digest else {
            return Ok(());
        };
        if digest.fits(partial).map_err(Failure::Io)? {
            return Ok(());
        }
        remove(partial).map_err(Failure::Io)?;
        let what = format!("what arrived is not what the hub publishes, which has the {digest}");
        Err(match resumed {
            // The beginning may be of another time.
            true => Failure::Broken(what),
            false => Failure::Final(what),
        })
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
        explain(self.settings, &self.repo, path, failure)
    }
}

fn explain(settings: &Settings, repo: &RepoId, path: &str, failure: Failure) -> Error {
    let (endpoint, id) = (&settings.endpoint, &repo.id);
    // The name is the hub's, and may hold anything.
    let what = match path {
        "" => repo.to_string(),
        path if is_repository_path(path) => format!("{repo}: {path}"),
        path => format!("{repo}: {path:?}"),
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
            Failure::Status(401) if settings.token.is_none() => (
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
            Failure::Final(why) if settings.offline => (
                format!("not on this machine, and {why}"),
                format!("unset HF_HUB_OFFLINE to download; {without}"),
            ),
            Failure::Final(why) => (why, without),
            Failure::NoSpace(size, free) => (
                format!("{} are to come, and {} are free", human_bytes(size), human_bytes(free)),
                "free some space, or set HF_HOME to a folder on a larger disk".to_string(),
            ),
            Failure::Io(source) => {
                let path = settings.cache.clone();
                return Error::Io { path, source };
            }
        };
    Error::invalid(format!("{what}: {why}"), hint)
}

/// Removes from the cache what of `repo` is not the content that its name promises, and says what that was.
///
/// # Errors
/// When a file cannot be read or removed.
pub fn drop_damaged(settings: &Settings, repo: &RepoId) -> Result<()> {
    let Some(snapshot) = Snapshot::find(settings, repo) else {
        return Ok(());
    };
    let links = snapshot.links()?;
    let bytes: u64 = links
        .iter()
        .filter_map(|link| Some(std::fs::metadata(link).ok()?.len()))
        .sum();
    if bytes > TOLD_FROM {
        console::note(format!(
            "comparing {} of {repo} with their digests",
            human_bytes(bytes)
        ));
    }
    // Links of a snapshot may lead anywhere: only what lies in its own repository is judged.
    let blobs = repo.folder(settings).join("blobs").canonicalize().ok();
    for link in links {
        let Ok(blob) = link.canonicalize() else {
            continue;
        };
        let name = blob.file_name().unwrap_or_default().to_string_lossy();
        let digest = Digest::sha256(&name).or_else(|| Digest::git_blob(&name));
        let is_blob = blob.parent() == blobs.as_deref();
        if let Some(digest) = digest.filter(|_| is_blob)
            && !digest.fits(&blob).map_err(Error::io(&blob))?
        {
            console::note(format!(
                "{}: damaged, and therefore removed",
                link.display()
            ));
            remove(&blob).map_err(Error::io(&blob))?;
        }
    }
    Ok(())
}

fn has_length(path: &Path, length: u64) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() == length)
}

/// Whether `blob` is the file of `metadata`; what else is there under its name is removed.
fn is_whole(blob: &Path, metadata: &Metadata) -> std::io::Result<bool> {
    let proved = match &metadata.digest {
        Some(digest) => has_length(blob, metadata.size) && digest.fits(blob)?,
        None => has_length(blob, metadata.size),
    };
    if !proved {
        remove(blob)?;
    }
    Ok(proved)
}

fn make_folder_of(path: &Path) -> Result<(), Failure> {
    path.parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .map_err(Failure::Io)
}

/// Removes the file or link `path`, if it is there.
fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn unplaced(error: Error) -> Failure {
    match error {
        Error::Io { source, .. } => Failure::Io(source),
        other => Failure::Final(other.to_string()),
    }
}
