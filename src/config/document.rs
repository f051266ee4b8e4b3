//! A pipeline file as it was read: what it means, and what of it is missing here.

use std::path::Path;

use super::limits::TEXT_BYTES;
use super::own_subjects::Changes;
use super::reader::Faults;
use super::resolve::pipeline;
use super::resolved::Resolved;
use super::surroundings::Surroundings;
use super::tree::{self, Place, Table};
use super::typed;
use crate::files::text;
use crate::{Error, Result};

/// A pipeline file that has been read but not yet given a meaning; it remembers where everything was typed.
pub struct Document<'a> {
    tree: Table,
    typed: typed::Pipeline,
    faults: Faults,
    syntax_is_broken: bool,
    surroundings: &'a dyn Surroundings,
}

impl<'a> Document<'a> {
    /// Reads the file at `path` and lays `overrides` (`a.b=value`) over it.
    ///
    /// # Errors
    /// Only when the file cannot be read; faults in it are kept for [`Document::resolve`].
    pub fn open(
        path: &Path,
        overrides: &[String],
        surroundings: &'a dyn Surroundings,
    ) -> Result<Self> {
        let text = text::read(path, TEXT_BYTES)?;
        let name = path.display().to_string();
        Ok(Self::parse(&text, &name, overrides, surroundings))
    }

    /// Reads `text`, which faults call `file`, and lays `overrides` over it.
    pub fn parse(
        text: &str,
        file: &str,
        overrides: &[String],
        surroundings: &'a dyn Surroundings,
    ) -> Self {
        let changes = Changes {
            overrides,
            ..Changes::default()
        };
        Self::with_changes(text, file, &changes, surroundings)
    }

    /// Reads `text`, which faults call `file`, and lays `changes` over it.
    pub fn with_changes(
        text: &str,
        file: &str,
        changes: &Changes<'_>,
        surroundings: &'a dyn Surroundings,
    ) -> Self {
        let (table, syntax, overriding) = tree::parse(text, file, changes, surroundings);
        let start = Place::File {
            file: file.into(),
            line: 1,
            column: 1,
        };
        let mut faults = Faults::default();
        let typed = typed::Pipeline::read(&faults, start, &table);
        let syntax_is_broken = !syntax.is_empty();
        if syntax_is_broken {
            // after a broken line, what seems to be missing may only not have been understood
            faults = Faults::default();
            faults.extend(syntax);
        }
        faults.append(&overriding);
        Document {
            tree: table,
            typed,
            faults,
            syntax_is_broken,
            surroundings,
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
        faults.append(&self.faults);
        let resolved = if self.syntax_is_broken {
            None
        } else {
            pipeline(&self.typed, self.surroundings, &faults)
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
            let is_known = self
                .surroundings
                .models()
                .iter()
                .any(|(known, _)| known == name);
            let is_here = is_known || self.surroundings.is_dir(Path::new(name));
            !is_here && self.surroundings.names_a_place(name)
        })
        .collect()
    }

    /// Where the field with these parts of its path was typed, or else the nearest table around it.
    pub fn place(&self, field: &[String]) -> String {
        self.tree
            .place(field)
            .unwrap_or(&self.typed.start)
            .to_string()
    }
}
