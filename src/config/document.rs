//! A pipeline file as it was read: what it means, and what of it is missing here.

use std::path::Path;

use super::locate::locate;
use super::models;
use super::reader::{Fault, Faults};
use super::resolve::{pipeline, place_of};
use super::resolved::Resolved;
use super::tree::{self, Place};
use super::typed;
use crate::hub::RepoId;
use crate::{Error, Result};

/// A pipeline file that has been read but not yet given a meaning; it remembers where everything was typed.
pub struct Document {
    typed: typed::Pipeline,
    faults: Vec<Fault>,
    syntax_is_broken: bool,
}

impl Document {
    /// Reads the file at `path` and lays `overrides` (`a.b=value`) over it.
    ///
    /// # Errors
    /// Only when the file cannot be read; faults in it are kept for [`Document::resolve`].
    pub fn open(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = crate::files::read_text(path, crate::files::SETTINGS)?;
        Ok(Self::parse(&text, &path.display().to_string(), overrides))
    }

    /// Reads `text`, which faults call `file`, and lays `overrides` over it.
    pub fn parse(text: &str, file: &str, overrides: &[String]) -> Self {
        let (table, syntax, overriding) = tree::parse(text, file, overrides);
        let start = Place::File {
            file: file.to_string(),
            line: 1,
            column: 1,
        };
        let faults = Faults::default();
        let typed = typed::Pipeline::read(&faults, start, &table);
        let syntax_is_broken = !syntax.is_empty();
        // after a broken line, what seems to be missing may only not have been understood
        let faults = if syntax_is_broken {
            syntax
        } else {
            faults.into_inner()
        };
        Document {
            typed,
            faults: [faults, overriding].concat(),
            syntax_is_broken,
        }
    }

    /// This document as far as proxies depend on it. Without `tokens`, whatever it says of a student does not count
    /// and may be missing: the supervisor's own model takes the place, which nothing will open. Nothing is evaluated.
    pub fn for_proxies(mut self, tokens: bool) -> Self {
        if let (false, Some(supervisor)) = (tokens, &self.typed.supervisor) {
            self.typed.student = Some(typed::Student {
                model: supervisor.model.clone(),
                ..typed::Student::default()
            });
            self.typed.direct = typed::Direct::default();
        }
        self.typed.evaluation = typed::Evaluation {
            prompts: Some(typed::Prompts::Listed(Vec::new())),
            ..typed::Evaluation::default()
        };
        self
    }

    /// What the file means.
    ///
    /// # Errors
    /// [`Error::Config`] with every fault of the file.
    pub fn resolve(&self) -> Result<Resolved> {
        let faults = Faults::default();
        faults.extend(self.faults.clone());
        let resolved = if self.syntax_is_broken {
            None
        } else {
            pipeline(&self.typed, &faults)
        };
        let lines = faults.into_lines();
        match resolved {
            Some(resolved) if lines.is_empty() => Ok(resolved),
            _ => Err(Error::Config(lines)),
        }
    }

    /// The repositories of the hub (`owner/name`) that the document names as models. What such a model is can only be
    /// said once it is here.
    pub fn repositories(&self) -> Vec<&str> {
        let (student, supervisor) = (&self.typed.student, &self.typed.supervisor);
        let evaluation = &self.typed.evaluation;
        [
            student.as_ref().and_then(|student| student.model.as_ref()),
            supervisor
                .as_ref()
                .and_then(|supervisor| supervisor.model.as_ref()),
            evaluation.clip.as_ref(),
            evaluation.dino.as_ref(),
        ]
        .into_iter()
        .flatten()
        .map(|at| at.value.as_str())
        .filter(|name| {
            let is_here = models::known(name).is_some() || Path::new(name).is_dir();
            !is_here && RepoId::parse(name).is_some()
        })
        .collect()
    }

    /// Every folder and checkpoint that `resolved`, the meaning of this document, names and that is not there; in
    /// the form of faults.
    pub fn missing_files(&self, resolved: &Resolved) -> Vec<String> {
        let faults = Faults::default();
        for (typed, subject) in self.typed.subjects.iter().zip(&resolved.subjects) {
            if !subject.images.is_dir() {
                faults.push(
                    place_of(&typed.images, &typed.place),
                    format!("there is no folder {}", subject.images.display()),
                    "place 3 to 6 photos of the subject there; relative paths start at the working directory",
                );
            }
        }
        let start = &self.typed.start;
        let student = self.typed.student.as_ref();
        let student = student.map_or(start, |student| place_of(&student.model, start));
        let mut models = vec![(resolved.student.model.as_str(), student)];
        if let (Some(typed), Some(supervisor)) = (&self.typed.supervisor, &resolved.supervisor) {
            models.push((&supervisor.model, place_of(&typed.model, start)));
        }
        let evaluation = &self.typed.evaluation;
        models.push((
            &resolved.evaluation.clip,
            place_of(&evaluation.clip, student),
        ));
        models.push((
            &resolved.evaluation.dino,
            place_of(&evaluation.dino, student),
        ));
        for (model, place) in models {
            if let Err(error) = locate(model) {
                faults.push(place, error.to_string(), error.hint().unwrap_or_default());
            }
        }
        faults.into_lines()
    }
}
