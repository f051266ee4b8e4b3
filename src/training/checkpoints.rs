//! Checkpoints of a training: `checkpoint-000050/{weights,optimizer}.safetensors` and, last, `state.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use super::optimizer::Optimizer;
use crate::files;
use crate::{Error, Result};

/// How many checkpoints stay, the newest first.
const KEPT: usize = 2;
/// How the names of values begin that are kept for an evaluation.
const DUE: &str = "evaluate-";

/// What stands in `state.json`; a folder without it is not a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps taken.
    pub step: usize,
    /// What is trained, with every setting that affects it: a checkpoint of another one is not continued.
    pub identity: String,
}

/// The checkpoints of one training, in one folder.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    dir: PathBuf,
    identity: String,
}

impl Checkpoints {
    /// Checkpoints under `dir`, of the training that `identity` names.
    pub fn new(dir: impl Into<PathBuf>, identity: impl Into<String>) -> Self {
        Self {
            dir: dir.into(),
            identity: identity.into(),
        }
    }

    fn path(&self, step: usize) -> PathBuf {
        self.dir.join(format!("checkpoint-{step:06}"))
    }

    /// The folders of whole checkpoints of this training by their steps, oldest first.
    pub fn list(&self) -> Result<Vec<(usize, PathBuf)>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(&self.dir)(e)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(Error::io(&self.dir))?.path();
            let Ok(text) = files::read_text(&path.join("state.json"), files::SETTINGS) else {
                continue;
            };
            let Ok(state) = serde_json::from_str::<State>(&text) else {
                continue;
            };
            if state.identity == self.identity && path == self.path(state.step) {
                found.push((state.step, path));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Writes a checkpoint after `step` steps, unless there is one, and removes all but the newest two.
    pub fn save(
        &self,
        step: usize,
        variables: &[(String, Var)],
        optimizer: &dyn Optimizer,
    ) -> Result<()> {
        if self.list()?.iter().any(|(saved, _)| *saved == step) {
            return Ok(());
        }
        let weights = variables
            .iter()
            .map(|(name, v)| (name.clone(), v.as_tensor().detach()))
            .collect();
        let state = State {
            step,
            identity: self.identity.clone(),
        };
        let manifest = serde_json::to_string_pretty(&state).map_err(|e| Error::Invalid {
            what: format!("state.json: {e}"),
            hint: None,
        })?;
        files::create_dir(&self.dir)?;
        files::write_dir(&self.path(step), |dir| {
            files::write_tensors(&dir.join("weights.safetensors"), &weights, &[])?;
            files::write_tensors(&dir.join("optimizer.safetensors"), &optimizer.state()?, &[])?;
            files::write(&dir.join("state.json"), manifest.as_bytes())
        })?;
        let list = self.list()?;
        for (_, old) in list.iter().rev().skip(KEPT) {
            std::fs::remove_dir_all(old).map_err(Error::io(old))?;
        }
        Ok(())
    }

    /// Gives `variables` and `optimizer` the newest checkpoint and returns its step, or `None` if there is none.
    pub fn resume(
        &self,
        variables: &[(String, Var)],
        optimizer: &mut dyn Optimizer,
    ) -> Result<Option<usize>> {
        let Some((step, dir)) = self.list()?.pop() else {
            return Ok(None);
        };
        let (weights, _) = files::read_tensors(&dir.join("weights.safetensors"))?;
        restore(variables, &weights, &dir)?;
        let (state, _) = files::read_tensors(&dir.join("optimizer.safetensors"))?;
        optimizer.load_state(&state)?;
        Ok(Some(step))
    }

    fn due_path(&self, step: usize) -> PathBuf {
        self.dir.join(format!("{DUE}{step:06}.safetensors"))
    }

    /// Keeps the values after `step` steps until [`clear_due`]: training may be far ahead of their evaluation
    /// when the process is killed.
    pub fn keep_due(&self, step: usize, values: &BTreeMap<String, Tensor>) -> Result<()> {
        files::create_dir(&self.dir)?;
        let identity = [("identity", self.identity.clone())];
        files::write_tensors(&self.due_path(step), values, &identity)
    }

    /// The values kept by [`Checkpoints::keep_due`] after `step` steps, if they are of this training.
    pub fn due(&self, step: usize) -> Result<Option<BTreeMap<String, Tensor>>> {
        let path = self.due_path(step);
        if !path.is_file() {
            return Ok(None);
        }
        let (values, metadata) = files::read_tensors(&path)?;
        Ok((metadata.get("identity") == Some(&self.identity)).then_some(values))
    }
}

/// Removes what [`Checkpoints::keep_due`] kept in the folder `dir`, once it is evaluated.
///
/// # Errors
/// When the folder cannot be read, or a file cannot be removed.
pub fn clear_due(dir: &Path) -> Result<()> {
    for (name, path) in files::list(dir)? {
        if name.starts_with(DUE) {
            std::fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

/// Gives `variables` the values in `tensors`; every name must be there with its shape.
pub fn restore(
    variables: &[(String, Var)],
    tensors: &BTreeMap<String, Tensor>,
    source: &Path,
) -> Result<()> {
    let faults: Vec<String> = variables
        .iter()
        .filter_map(|(name, variable)| match tensors.get(name) {
            None => Some(format!("{name} is missing")),
            Some(t) if t.shape() != variable.shape() => Some(format!(
                "{name} has shape {:?}, {:?} expected",
                t.dims(),
                variable.dims()
            )),
            Some(_) => None,
        })
        .collect();
    if !faults.is_empty() {
        return Err(Error::Checkpoint {
            path: source.to_path_buf(),
            faults,
        });
    }
    for (name, variable) in variables {
        variable.set(
            &tensors[name]
                .to_dtype(variable.dtype())?
                .to_device(variable.device())?,
        )?;
    }
    Ok(())
}
