//! The next run of the chain: which subject it learns, from which adapter, beside which others.

use std::path::{Path, PathBuf};

use super::reconcile::is_id;
use super::scan::Scan;
use super::state::{Home, Look, Run, State, Subject};
use crate::config::{Document, Resolved, Source, Subject as Learnt};
use crate::plan::{Digest, settings_digest};
use crate::{Error, Result, files, images};

/// What all runs of a watch have in common: a pipeline file whose subjects, baseline and untouched student do not
/// count, as subjects come from the folder and the student goes on.
#[derive(Debug, Clone)]
pub struct Recipe {
    resolved: Resolved,
    /// Proxies of every other subject that each run replays.
    replay: usize,
}

impl Recipe {
    /// The recipe of the pipeline file at `path` with `overrides` laid over it.
    ///
    /// # Errors
    /// [`Error::Config`] with every fault of the file; a file whose student does not learn from proxies.
    pub fn open(path: &Path, overrides: &[String], replay: usize) -> Result<Self> {
        let stand_in =
            ["images=\"-\"", "class=\"thing\""].map(|field| format!("subject.any.{field}"));
        let overrides = [overrides, &stand_in].concat();
        let mut resolved = Document::open(path, &overrides, &crate::models::Registry)?.resolve()?;
        if resolved.student.source != Source::Proxies {
            return Err(Error::invalid(
                format!("{}: a watch needs proxies", path.display()),
                "remove student.source, and add [supervisor] where there is none",
            ));
        }
        if resolved.student.init.is_some() {
            return Err(Error::invalid(
                format!(
                    "{}: a watch begins with a student of its own",
                    path.display()
                ),
                "remove student.init: every run goes on from the adapter that the one before it made",
            ));
        }
        // There is no baseline, and what the file says of one would have no effect.
        resolved.direct = crate::config::Direct {
            enabled: false,
            source: crate::config::Source::References,
            training: resolved.student.training.clone(),
            condition_dropout: resolved.student.condition_dropout,
            dropout: resolved.student.dropout,
        };
        resolved.evaluation.untouched = false;
        Ok(Self { resolved, replay })
    }

    /// Digest of all settings of the chain, with the `margin` of what may be published.
    pub fn settings(&self, margin: f64) -> String {
        Digest::new("watch settings 1")
            .field("pipeline", settings_digest(&self.resolved))
            .number("replay", self.replay as u64)
            .real("margin", margin)
            .finish()
    }

    /// The resolved pipeline of the run that learns `subject`, going on from `init`, an adapter and its digest. The
    /// others that the student knows are replayed as they were learnt.
    fn pipeline(
        &self,
        home: &Home,
        state: &State,
        subject: &Subject,
        init: Option<(PathBuf, String)>,
    ) -> Result<String> {
        let entry = |subject: &Subject, look: &Look, replay| Learnt {
            name: subject.id.clone(),
            images: home.photos(&subject.id, look),
            class: look.class.clone(),
            token: subject.token.clone(),
            replay,
        };
        let mut resolved = self.resolved.clone();
        resolved.subjects = vec![entry(subject, &subject.look(), None)];
        for other in &state.subjects {
            if let (Some(look), false) = (&other.learnt, other.retired || other.id == subject.id) {
                resolved
                    .subjects
                    .push(entry(other, look, Some(self.replay)));
            }
        }
        (resolved.student.init, resolved.student.init_digest) = init.unzip();
        resolved.to_toml()
    }

    /// The next run, with copies of its photos made; `None` when nothing waits that could be learnt now.
    ///
    /// # Errors
    /// When copies cannot be written, or the published adapter cannot be read.
    pub fn next(&self, home: &Home, state: &State, scan: &Scan) -> Result<Option<Run>> {
        for subject in state.queue() {
            if !copy_photos(home, subject, scan)? {
                continue;
            }
            let init = state
                .published
                .as_ref()
                .map(|published| (home.adapter(published.number), published.adapter.clone()));
            return Ok(Some(Run {
                number: state.next_number(),
                subject: subject.id.clone(),
                look: subject.look(),
                init: init.as_ref().map(|(_, digest)| digest.clone()),
                pipeline: self.pipeline(home, state, subject, init)?,
                started_us: crate::store::now_us(),
            }));
        }
        Ok(None)
    }
}

/// Whether `pipeline`, the resolved file of a run under way, reads photos and adapters of the watch in `home` alone: one
/// of a folder that was moved does not, nor one that somebody else wrote.
pub fn is_of(home: &Home, pipeline: &str) -> bool {
    let Ok(resolved) =
        Document::parse(pipeline, "pipeline.toml", &[], &crate::models::Registry).resolve()
    else {
        return false;
    };
    let photos = home.path().join("photos");
    let reads_own = |subject: &Learnt| {
        let own = photos.join(&subject.name);
        is_id(&subject.name)
            && subject.images.parent() == Some(&own)
            && files::within(home.path(), &subject.images).is_ok()
    };
    let adapters = home.path().join("adapters");
    let init = resolved.student.init.as_deref();
    resolved.subjects.iter().all(reads_own)
        && init.is_none_or(|init| {
            init.parent() == Some(&adapters) && files::within(home.path(), init).is_ok()
        })
}

/// Copies the photos of `subject` to where its run reads them, named by their digests, so that nothing which happens
/// to the folder later changes the run. False when they are no longer what they were.
fn copy_photos(home: &Home, subject: &Subject, scan: &Scan) -> Result<bool> {
    let to = home.photos(&subject.id, &subject.look());
    if to.is_dir() {
        return Ok(true);
    }
    let Some(folder) = scan.folders.get(&subject.folder) else {
        return Ok(false);
    };
    files::within(home.path(), &to)?;
    if let Some(parent) = to.parent() {
        files::create_dir(parent)?;
    }
    let mut same = true;
    let written = files::write_dir(&to, |dir| {
        for digest in &subject.photos {
            let path = folder.photos.get(digest);
            let read = path.map(|path| (path, images::read(path)));
            let Some((path, Ok(bytes))) = read
                .filter(|(_, bytes)| bytes.as_ref().is_ok_and(|bytes| has_digest(bytes, digest)))
            else {
                same = false;
                return Err(Error::Interrupted);
            };
            let extension = path.extension().unwrap_or_default().to_string_lossy();
            let name = format!("{}.{}", &digest[..16], extension.to_lowercase());
            files::write(&dir.join(name), &bytes)?;
        }
        Ok(())
    });
    match same {
        true => written.map(|()| true),
        false => Ok(false),
    }
}

fn has_digest(bytes: &[u8], digest: &str) -> bool {
    blake3::hash(bytes).to_hex().as_str() == digest
}
