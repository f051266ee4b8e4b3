//! Whatever can be known before work starts. `check` says it, and `run` and `generate` begin with it: what cannot go well
//! ends here, before a directory is made or a model is opened.

use std::collections::BTreeSet;
use std::fmt;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use super::Options;
use super::prepare::{Purpose, device};
use crate::config::limits::NAME_BYTES;
use crate::config::{Family, Resolved, Source, Training, Tuning, prompts};
use crate::evaluation::embedders;
use crate::models::adapters::check_start;
use crate::models::lora_file::LoraFile;
use crate::models::reading::{Prompt, TextReader, clip_reader, unread};
use crate::models::{self as architectures, architecture, known, locate};
use crate::nn::LoraConfig;
use crate::stages::{Subject, Warning, direct, references};
use crate::training::tuning;
use crate::{Error, Result};

/// Something that stands in the way, and the field of the pipeline that it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// The parts of the field's path: `["subject", "dog1", "images"]`.
    pub field: Vec<String>,
    pub what: String,
    /// How to mend it.
    pub hint: String,
}

impl Obstacle {
    fn new(field: &[&str], what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            field: field.iter().map(|part| part.to_string()).collect(),
            what: what.into(),
            hint: hint.into(),
        }
    }

    fn of(field: &[&str], error: &Error) -> Self {
        let hint = error.hint().unwrap_or_default();
        Self::new(field, error.to_string(), hint)
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field.join("."), self.what)?;
        match self.hint.as_str() {
            "" => Ok(()),
            hint => write!(f, "\n  hint: {hint}"),
        }
    }
}

/// What was found.
#[derive(Debug, Default)]
pub struct Preflight {
    /// The subjects with their photos; those of which anything is usable.
    pub subjects: Vec<Arc<Subject>>,
    /// What will not go away by itself.
    pub faults: Vec<Obstacle>,
    /// Folders of photos and models that are not here.
    pub absent: Vec<Obstacle>,
    /// Models among those that can be downloaded.
    pub downloads: Vec<String>,
    /// What does not stop a run.
    pub warnings: Vec<Warning>,
}

impl Preflight {
    /// What was found, if nothing stands in the way.
    ///
    /// # Errors
    /// [`Error::Config`] with everything that does.
    pub fn ready(self) -> Result<Self> {
        let obstacles: Vec<String> = self
            .faults
            .iter()
            .chain(&self.absent)
            .map(Obstacle::to_string)
            .collect();
        match obstacles.is_empty() {
            true => Ok(self),
            false => Err(Error::Config(obstacles)),
        }
    }

    fn fault(&mut self, field: &[&str], error: &Error) {
        self.faults.push(Obstacle::of(field, error));
    }

    /// The value of `result`, or `None` with a fault.
    fn take<T>(&mut self, field: &[&str], result: Result<T>) -> Option<T> {
        result.map_err(|error| self.fault(field, &error)).ok()
    }

    fn warn(&mut self, warnings: impl IntoIterator<Item = Warning>) {
        for warning in warnings {
            if !self.warnings.contains(&warning) {
                self.warnings.push(warning);
            }
        }
    }
}

/// Looks at everything that a run of `options` needs. Blocks: photos are read, models are not.
pub fn preflight(options: &Options, purpose: Purpose) -> Preflight {
    preflight_with(options, purpose, false)
}

/// The same, where the program brings a source of images if `has_source`.
pub(super) fn preflight_with(options: &Options, purpose: Purpose, has_source: bool) -> Preflight {
    let mut found = Preflight::default();
    let resolved = &options.resolved;
    check_name(&options.pipeline, &mut found);
    match (resolved.student.source == Source::Custom, has_source) {
        (true, false) => found.faults.push(Obstacle::new(
            &["student", "source"],
            "a program brings the images of a custom source, and this one brings none",
            "write one as examples/custom_source.rs does, or set student.source = \"proxies\"",
        )),
        (false, true) => found.faults.push(Obstacle::new(
            &["student", "source"],
            "the student does not learn from the source that the program brings",
            "set student.source = \"custom\"",
        )),
        (true, true) | (false, false) => {}
    }
    let places = [
        ("--store", options.store.as_ref()),
        ("--out", Some(&options.out)),
    ];
    for (option, place) in places {
        if let Some(place) = place {
            found.take(&[option], check_writable(place));
        }
    }
    read_photos(resolved, &mut found);
    let wanted = Wanted::of(resolved, &found.subjects, purpose);
    let learns_tokens = purpose != Purpose::Proxies { tokens: false };
    if let Some(supervisor) = &resolved.supervisor {
        let role = Role {
            name: "supervisor",
            model: &supervisor.model,
            family: supervisor.family,
            resolution: supervisor.resolution,
            device: supervisor.device,
            training: &supervisor.training,
            adapter: supervisor.adapter.as_deref().map(Adapter::Given),
            prompts: &wanted.supervisor,
        };
        role.look(&mut found);
    }
    if learns_tokens {
        let student = &resolved.student;
        let role = Role {
            name: "student",
            model: &student.model,
            family: student.family,
            resolution: student.resolution,
            device: student.device,
            training: &student.training,
            adapter: match (&student.init, purpose, student.training.tuning) {
                (Some(init), Purpose::Run, Tuning::Lora) => Some(Adapter::Start(init)),
                _ => None,
            },
            prompts: &wanted.student,
        };
        role.look(&mut found);
        if let Some(direct) = resolved.direct() {
            let folder = locate(&student.model).ok();
            let role = Role {
                name: "direct",
                training: &direct.training,
                adapter: None,
                ..role
            };
            if let Some(folder) = folder {
                role.check_layers(&folder, &mut found);
            }
        }
    }
    if purpose == Purpose::Run {
        look_at_evaluators(resolved, &wanted, &mut found);
    }
    found
}

/// The run's directory is called after the file.
fn check_name(pipeline: &Path, found: &mut Preflight) {
    let name = pipeline.file_stem().unwrap_or_default().to_string_lossy();
    let what = if name.contains(char::is_control) {
        format!("{name:?} has control characters")
    } else if name.len() > 2 * NAME_BYTES {
        format!("the name {name:?} has {} bytes", name.len())
    } else {
        return;
    };
    found.faults.push(Obstacle::new(
        &["the pipeline file"],
        what,
        format!(
            "give it a name of at most {} plain characters: a run's directory is called after it",
            2 * NAME_BYTES
        ),
    ));
}

/// Fails when nothing could be written in the folder `place`, which need not be there yet.
fn check_writable(place: &Path) -> Result<()> {
    let place = std::path::absolute(place).map_err(Error::io(place))?;
    let Some(there) = place
        .ancestors()
        .find(|part| part.symlink_metadata().is_ok())
    else {
        return Ok(());
    };
    if !there.is_dir() {
        return Err(Error::io(there)(ErrorKind::NotADirectory.into()));
    }
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let name = std::ffi::CString::new(there.as_os_str().as_bytes())
            .map_err(|e| Error::io(there)(e.into()))?;
        // SAFETY: `name` ends with a zero byte and lives until the call is over.
        if unsafe { libc::access(name.as_ptr(), libc::W_OK | libc::X_OK) } != 0 {
            return Err(Error::io(there)(std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

fn read_photos(resolved: &Resolved, found: &mut Preflight) {
    for subject in &resolved.subjects {
        let field = ["subject", &subject.name, "images"];
        match subject.images.metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                found.absent.push(Obstacle::new(
                    &field,
                    format!("there is no folder {}", subject.images.display()),
                    "check the path: relative ones start at the working directory; put 3 to 6 photos of the subject there",
                ));
                continue;
            }
            Ok(metadata) if !metadata.is_dir() => {
                found.faults.push(Obstacle::new(
                    &field,
                    format!("{} is not a folder", subject.images.display()),
                    "name the folder that the photos of the subject lie in",
                ));
                continue;
            }
            _ => {}
        }
        if let Some((subject, warnings)) = found.take(&field, references::load(subject)) {
            found.warn(warnings);
            found.subjects.push(Arc::new(subject));
        }
    }
}

/// An adapter that is there before a run.
#[derive(Clone, Copy)]
enum Adapter<'a> {
    /// It is used as it is.
    Given(&'a Path),
    /// Training goes on from it.
    Start(&'a Path),
}

/// A model that learns.
#[derive(Clone, Copy)]
struct Role<'a> {
    name: &'a str,
    model: &'a str,
    family: Family,
    resolution: Option<usize>,
    device: crate::config::Device,
    training: &'a Training,
    adapter: Option<Adapter<'a>>,
    /// What it reads.
    prompts: &'a [Prompt],
}

impl Role<'_> {
    /// Looks at everything about the model.
    fn look(&self, found: &mut Preflight) {
        let field = |name| [self.name, name];
        found.take(&field("device"), device(self.device));
        let architecture = found.take(&field("model"), architecture(self.family));
        let Some(architecture) = architecture else {
            return;
        };
        found.take(&field("model"), architecture.learner());
        let asked = self.resolution.map(|side| side as u32);
        let Some(folder) = folder_of(self.model, &field("model"), found) else {
            return;
        };
        let side = architecture.resolution(&folder, asked);
        if found.take(&field("resolution"), side).is_none() {
            return;
        }
        self.check_layers(&folder, found);
        let readers = (architecture.readers)(&folder, asked, true);
        if let Some(readers) = found.take(&field("model"), readers) {
            look_at_prompts(self.model, &readers, self.prompts, self.name, found);
        }
    }

    /// Every target is the name of a layer, and the adapter that is there fits.
    fn check_layers(&self, folder: &Path, found: &mut Preflight) {
        if self.training.tuning == Tuning::Full {
            return;
        }
        let asked = self.resolution.map(|side| side as u32);
        let places = architectures::layers(self.family, folder, asked);
        let Some(Some(places)) = found.take(&[self.name, "model"], places) else {
            return;
        };
        if let Some(Adapter::Given(path)) = self.adapter {
            let fits = LoraFile::read(path).and_then(|file| {
                file.check_fit(&places)?;
                file.check_alone()
            });
            found.take(&[self.name, "adapter"], fits);
            return;
        }
        let linear = places.iter().filter(|(_, shape)| shape.len() == 2);
        let layers: Vec<&String> = linear.map(|(layer, _)| layer).collect();
        let before = found.faults.len();
        for target in &self.training.targets {
            if !layers.iter().any(|layer| LoraConfig::names(target, layer)) {
                let ends: BTreeSet<&str> = layers
                    .iter()
                    .map(|layer| layer.rsplit('.').next().unwrap_or(layer))
                    .filter(|end| end.parse::<usize>().is_err())
                    .collect();
                let ends: Vec<&str> = ends.into_iter().take(20).collect();
                found.faults.push(Obstacle::new(
                    &[self.name, "targets"],
                    format!("{} has no layer that is called {target:?}", self.model),
                    format!("its layers are called {}", ends.join(", ")),
                ));
            }
        }
        if let Some(Adapter::Start(path)) = self.adapter
            && found.faults.len() == before
            && let architectures::Tuning::Lora(config) = tuning(self.training)
        {
            let fits = check_start(path, &places, &config);
            found.take(&[self.name, "init"], fits);
        }
    }
}

/// The folder of `model`; `None` when it is not here, which is noted.
fn folder_of(model: &str, field: &[&str], found: &mut Preflight) -> Option<std::path::PathBuf> {
    match locate(model) {
        Ok(folder) => Some(folder),
        Err(error) => {
            found.absent.push(Obstacle::of(field, &error));
            if known(model).is_none_or(|known| known.hub.is_some()) {
                found.downloads.push(model.to_string());
            }
            None
        }
    }
}

fn look_at_prompts(
    model: &str,
    readers: &[TextReader],
    prompts: &[Prompt],
    role: &str,
    found: &mut Preflight,
) {
    let unread = unread(model, readers, prompts);
    if let Some(unread) = found.take(&[role, "model"], unread) {
        found.warn(unread.warnings.into_iter().map(Warning::Other));
        for fault in &unread.faults {
            found.fault(&[role], fault);
        }
    }
}

fn look_at_evaluators(resolved: &Resolved, wanted: &Wanted, found: &mut Preflight) {
    let evaluation = &resolved.evaluation;
    found.take(&["evaluation", "device"], device(evaluation.device));
    let field = ["evaluation", "clip"];
    if let Some(folder) = folder_of(&evaluation.clip, &field, found)
        && let Some(reader) = found.take(&field, clip_reader(&folder))
    {
        look_at_prompts(
            &evaluation.clip,
            &[reader],
            &wanted.scored,
            "evaluation",
            found,
        );
    }
    let field = ["evaluation", "dino"];
    if let Some(folder) = folder_of(&evaluation.dino, &field, found) {
        found.take(&field, embedders::dino_side(&folder));
    }
}

/// What each model is given to read.
#[derive(Default)]
struct Wanted {
    supervisor: Vec<Prompt>,
    student: Vec<Prompt>,
    scored: Vec<Prompt>,
}

impl Wanted {
    fn of(resolved: &Resolved, loaded: &[Arc<Subject>], purpose: Purpose) -> Self {
        let mut wanted = Self::default();
        let captions = || {
            let captions = loaded.iter().flat_map(|subject| &subject.captions);
            captions.flatten().map(|caption| caption.as_str().into())
        };
        if resolved.teacher().is_some() {
            wanted.supervisor.extend(captions());
        }
        let is_direct = !resolved.student.source.makes_proxies() || resolved.direct().is_some();
        if is_direct && purpose == Purpose::Run {
            wanted.student.extend(captions());
        }
        for subject in &resolved.subjects {
            let (token, class) = (&subject.token, &subject.class);
            let of = |template: &String| Prompt::of(template, token, class);
            if let Some((supervisor, proxies, sampling)) = resolved.teacher() {
                wanted.supervisor.push(of(&supervisor.prompt));
                wanted.supervisor.extend(proxies.prompts.iter().map(of));
                let negative = sampling.negative_prompt.as_str();
                wanted.supervisor.push(negative.into());
                if let Some(prior) = &supervisor.prior_preservation {
                    let prompt = prompts::fill_without_token(&prior.prompt, class);
                    wanted.supervisor.push(prompt.as_str().into());
                }
            }
            if let Some(proxies) = &resolved.proxies {
                wanted.student.extend(proxies.prompts.iter().map(of));
            }
            if purpose != Purpose::Run {
                continue;
            }
            if !resolved.student.source.makes_proxies() || resolved.direct().is_some() {
                wanted.student.push(of(&direct::PROMPT.to_string()));
            }
            if let crate::config::Sampling::Diffusion(sampling) = &resolved.student.sampling {
                wanted
                    .student
                    .push(sampling.negative_prompt.as_str().into());
            }
            for template in resolved.evaluation.prompts.templates(class) {
                let prompt = of(&template);
                wanted.student.push(prompt.clone());
                if resolved.teacher().is_some() {
                    wanted.supervisor.push(prompt);
                }
                let scored = prompts::fill_without_token(&template, class);
                wanted.scored.push(scored.as_str().into());
            }
        }
        wanted
    }
}
