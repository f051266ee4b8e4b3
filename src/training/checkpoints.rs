//! Checkpoints of a training: `checkpoint-000050/{weights,optimizer}.safetensors` and, last, `state.json`, which has
//! the digests of the others and of itself: whatever happened to one on disk is noticed before it is gone on from.

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
/// How the name of a checkpoint's folder begins; its step follows.
const CHECKPOINT: &str = "checkpoint-";
/// What a damaged checkpoint's name gets in front, so that it is not found again.
const DAMAGED: &str = "damaged-";
const STATE: &str = "state.json";
const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";

/// What stands in `state.json`; a folder without it is not a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps taken.
    pub step: usize,
    /// What is trained, with every setting that affects it: a checkpoint of another one is not continued.
    pub identity: String,
    /// Digests of the files beside it; older versions noted none.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// Digest of everything above.
    #[serde(default)]
    pub digest: String,
}

impl State {
    /// The state of a checkpoint whose files lie in `dir`.
    fn of(step: usize, identity: &str, dir: &Path) -> Result<Self> {
        let mut state = Self {
            step,
            identity: identity.to_string(),
            files: BTreeMap::new(),
            digest: String::new(),
        };
        for name in [WEIGHTS, OPTIMIZER] {
            let digest = files::digest(&dir.join(name))?;
            state.files.insert(name.to_string(), digest);
        }
        state.digest = state.seal();
        Ok(state)
    }

    /// What [`State::digest`] must be.
    fn seal(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(self.step as u64).to_le_bytes());
        let files = self.files.iter().flat_map(|(name, digest)| [name, digest]);
        for text in [&self.identity].into_iter().chain(files) {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Reads and checks the `state.json` of the checkpoint in `dir`, not the files beside it; the error is the reason
    /// why it is damaged.
    fn read(dir: &Path) -> Result<Self, String> {
        let fault = |what: String| format!("{STATE}: {what}");
        let text = files::read_text(&dir.join(STATE), files::SETTINGS);
        let text = text.map_err(|e| fault(e.to_string()))?;
        let state: Self = serde_json::from_str(&text).map_err(|e| fault(e.to_string()))?;
        let by_older_version = state.digest.is_empty() && state.files.is_empty();
        if !by_older_version && state.digest != state.seal() {
            return Err(fault("its digest is not that of what it says".into()));
        }
        if step_of(dir) != Some(state.step) {
            return Err(fault(format!("it is of step {}", state.step)));
        }
        Ok(state)
    }

    /// Why the checkpoint in `dir`, whose state this is, cannot be gone on from; none when it is whole.
    fn fault(&self, dir: &Path) -> Option<String> {
        let differs = |(name, expected): (&String, &String)| match files::digest(&dir.join(name)) {
            Err(Error::Io { source, .. }) => Some(format!("{name}: {source}")),
            Err(error) => Some(format!("{name}: {error}")),
            Ok(digest) if digest == *expected => None,
            Ok(_) => Some(format!("{name} is not what was written")),
        };
        self.files.iter().find_map(differs)
    }
}

/// The step of the checkpoint in the folder `dir`, by its name.
fn step_of(dir: &Path) -> Option<usize> {
    let digits = dir.file_name()?.to_str()?.strip_prefix(CHECKPOINT)?;
    let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| digits.parse().ok())?
}

/// From where a training goes on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resumed {
    /// The step of the checkpoint; `None`: from the start.
    pub step: Option<usize>,
    /// The newer checkpoints that could not be gone on from, by their folders' names, and why; newest first.
    pub damaged: Vec<(String, String)>,
    /// How many checkpoints are of another training, where there is none of this one.
    pub foreign: usize,
}

/// The checkpoints of one training, in one folder.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    dir: PathBuf,
    identity: String,
}

/// A folder that is called like a checkpoint, its step, and what its state says.
type Found = (usize, PathBuf, Result<State, String>);

impl Checkpoints {
    /// Checkpoints under `dir`, of the training that `identity` names.
    pub fn new(dir: impl Into<PathBuf>, identity: impl Into<String>) -> Self {
        Self {
            dir: dir.into(),
            identity: identity.into(),
        }
    }

    fn path(&self, step: usize) -> PathBuf {
        self.dir.join(format!("{CHECKPOINT}{step:06}"))
    }

    /// Every folder that is called like a checkpoint, by its step, oldest first, with what its state says.
    fn all(&self) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        for (_, path) in files::list(&self.dir)? {
            if let Some(step) = step_of(&path) {
                let state = State::read(&path);
                found.push((step, path, state));
            }
        }
        found.sort_by_key(|(step, ..)| *step);
        Ok(found)
    }

    /// The folders of the checkpoints of this training by their steps, oldest first. Whether the files in them are whole
    /// is not looked at.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn list(&self) -> Result<Vec<(usize, PathBuf)>> {
        let own = |(step, path, state): Found| {
            (state.ok()?.identity == self.identity).then_some((step, path))
        };
        Ok(self.all()?.into_iter().filter_map(own).collect())
    }

    /// Whether there is a whole checkpoint of this training after `step` steps.
    fn is_whole(&self, step: usize) -> bool {
        let dir = self.path(step);
        State::read(&dir)
            .is_ok_and(|state| state.identity == self.identity && state.fault(&dir).is_none())
    }

    /// Writes a checkpoint after `step` steps, unless there is one that is whole, and removes all but the newest two.
    ///
    /// # Errors
    /// When it cannot be written, or an older one not be removed.
    pub fn save(
        &self,
        step: usize,
        variables: &[(String, Var)],
        optimizer: &dyn Optimizer,
    ) -> Result<()> {
        if self.is_whole(step) {
            return Ok(());
        }
        let weights = variables
            .iter()
            .map(|(name, v)| (name.clone(), v.as_tensor().detach()))
            .collect();
        files::create_dir(&self.dir)?;
        files::write_dir(&self.path(step), |dir| {
            files::write_tensors(&dir.join(WEIGHTS), &weights, &[])?;
            files::write_tensors(&dir.join(OPTIMIZER), &optimizer.state()?, &[])?;
            self.write_state(step, dir)
        })?;
        let list = self.list()?;
        for (_, old) in list.iter().rev().skip(KEPT) {
            std::fs::remove_dir_all(old).map_err(Error::io(old))?;
        }
        Ok(())
    }

    fn write_state(&self, step: usize, dir: &Path) -> Result<()> {
        let state = State::of(step, &self.identity, dir)?;
        let text = serde_json::to_string_pretty(&state).map_err(|e| Error::Invalid {
            what: format!("{STATE}: {e}"),
            hint: None,
        })?;
        files::write(&dir.join(STATE), text.as_bytes())
    }

    /// Gives `variables` and `optimizer` the newest whole checkpoint. Those that are damaged get another name, so that
    /// they are not in the way; where none is whole, `variables` and `optimizer` are as they were.
    ///
    /// # Errors
    /// When the folder cannot be listed or changed, or a whole checkpoint has other weights than `variables`.
    pub fn resume(
        &self,
        variables: &[(String, Var)],
        optimizer: &mut dyn Optimizer,
    ) -> Result<Resumed> {
        let mut resumed = Resumed::default();
        for (step, dir, state) in self.all()?.into_iter().rev() {
            let fault = match state {
                Err(fault) => fault,
                Ok(state) if state.identity != self.identity => {
                    resumed.foreign += 1;
                    continue;
                }
                Ok(state) => match state.fault(&dir) {
                    Some(fault) => fault,
                    None => match load(&dir, variables, optimizer) {
                        Ok(()) => {
                            resumed.step = Some(step);
                            resumed.foreign = 0;
                            return Ok(resumed);
                        }
                        // With digests it is what was written: then this is no damage.
                        Err(error) if !state.files.is_empty() => return Err(error),
                        Err(error) => error.to_string(),
                    },
                },
            };
            let name = dir.file_name().unwrap_or_default().to_string_lossy();
            let aside = dir.with_file_name(format!("{DAMAGED}{name}"));
            if aside.is_dir() {
                std::fs::remove_dir_all(&aside).map_err(Error::io(&aside))?;
            }
            std::fs::rename(&dir, &aside).map_err(Error::io(&dir))?;
            resumed.damaged.push((name.into_owned(), fault));
        }
        Ok(resumed)
    }

    /// Copies the checkpoint after `step` steps of `other` here, as one of this training.
    ///
    /// # Errors
    /// When `other` has no such checkpoint that is whole; a full disk.
    pub fn take_over(&self, other: &Checkpoints, step: usize) -> Result<()> {
        if !other.is_whole(step) {
            return Err(Error::invalid(
                format!("{} is not whole", other.path(step).display()),
                "begin with a new run",
            ));
        }
        files::create_dir(&self.dir)?;
        files::write_dir(&self.path(step), |dir| {
            for name in [WEIGHTS, OPTIMIZER] {
                let from = other.path(step).join(name);
                files::copy(&from, &dir.join(name)).map_err(Error::io(&from))?;
            }
            self.write_state(step, dir)
        })
    }

    fn due_path(&self, step: usize) -> PathBuf {
        self.dir.join(format!("{DUE}{step:06}.safetensors"))
    }

    /// Keeps the values after `step` steps until [`clear_due`]: training may be far ahead of their evaluation
    /// when the process is killed.
    pub fn keep_due(&self, step: usize, values: &BTreeMap<String, Tensor>) -> Result<()> {
        files::create_dir(&self.dir)?;
        let metadata = [
            ("identity", self.identity.clone()),
            ("digest", files::values_digest(values)?),
        ];
        files::write_tensors(&self.due_path(step), values, &metadata)
    }

    /// The values kept by [`Checkpoints::keep_due`] after `step` steps, if they are of this training.
    ///
    /// # Errors
    /// When the file cannot be read, or is not what was written.
    pub fn due(&self, step: usize) -> Result<Option<BTreeMap<String, Tensor>>> {
        let path = self.due_path(step);
        if !path.is_file() {
            return Ok(None);
        }
        let (values, metadata) = files::read_tensors(&path)?;
        if let Some(digest) = metadata.get("digest")
            && *digest != files::values_digest(&values)?
        {
            return Err(Error::Checkpoint {
                path,
                faults: vec!["it is not what was written".into()],
            });
        }
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

/// Gives `variables` and `optimizer` the checkpoint in `dir`; after an error both are as they were.
fn load(dir: &Path, variables: &[(String, Var)], optimizer: &mut dyn Optimizer) -> Result<()> {
    let (weights, _) = files::read_tensors(&dir.join(WEIGHTS))?;
    fits(variables, &weights, dir)?;
    let (state, _) = files::read_tensors(&dir.join(OPTIMIZER))?;
    optimizer.load_state(&state)?;
    restore(variables, &weights, dir)
}

/// Gives `variables` the values in `tensors`; every name must be there with its shape.
pub fn restore(
    variables: &[(String, Var)],
    tensors: &BTreeMap<String, Tensor>,
    source: &Path,
) -> Result<()> {
    fits(variables, tensors, source)?;
    for (name, variable) in variables {
        variable.set(
            &tensors[name]
                .to_dtype(variable.dtype())?
                .to_device(variable.device())?,
        )?;
    }
    Ok(())
}

/// Whether `tensors` has every name of `variables` with its shape.
fn fits(
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
    match faults.is_empty() {
        true => Ok(()),
        false => Err(Error::Checkpoint {
            path: source.to_path_buf(),
            faults,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::optimizer::{AdamW, AdamWConfig};
    use super::*;
    use candle_core::Device;

    struct Place {
        dir: tempfile::TempDir,
        variables: Vec<(String, Var)>,
        optimizer: AdamW,
    }

    impl Place {
        /// Two whole checkpoints, after 10 and 20 steps, whose weights say so.
        fn new() -> Self {
            let variable = Var::zeros((3, 5), candle_core::DType::F32, &Device::Cpu).unwrap();
            let variables = vec![("layer.weight".to_string(), variable)];
            let optimizer = AdamW::new(variables.clone(), AdamWConfig::default()).unwrap();
            let place = Self {
                dir: tempfile::tempdir().unwrap(),
                variables,
                optimizer,
            };
            for step in [10, 20] {
                place.set(step as f32);
                let (variables, optimizer) = (&place.variables, &place.optimizer);
                place.own().save(step, variables, optimizer).unwrap();
            }
            place
        }

        fn own(&self) -> Checkpoints {
            Checkpoints::new(self.dir.path(), "student a1b2")
        }

        fn newest(&self) -> PathBuf {
            self.dir.path().join("checkpoint-000020")
        }

        fn set(&self, value: f32) {
            let variable = &self.variables[0].1;
            let filled = Tensor::full(value, variable.shape(), &Device::Cpu).unwrap();
            variable.set(&filled).unwrap();
        }

        fn value(&self) -> f32 {
            let values = self.variables[0].1.flatten_all().unwrap();
            values.to_vec1::<f32>().unwrap()[7]
        }

        fn resume(&mut self) -> Resumed {
            self.set(-1.0);
            let own = self.own();
            own.resume(&self.variables, &mut self.optimizer).unwrap()
        }
    }

    fn flip(path: &Path, from_end: usize) {
        let mut bytes = std::fs::read(path).unwrap();
        let place = bytes.len() - 1 - from_end;
        bytes[place] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }

    fn cut(path: &Path) {
        let bytes = std::fs::read(path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    }

    fn replace(path: &Path, from: &str, to: &str) {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(path, text.replace(from, to)).unwrap();
    }

    type Damage = (&'static str, fn(&Path));

    /// What disks, kills and people do to a checkpoint's folder.
    const DAMAGES: [Damage; 14] = [
        ("a truncated optimizer", |dir| cut(&dir.join(OPTIMIZER))),
        ("truncated weights", |dir| cut(&dir.join(WEIGHTS))),
        ("a flipped bit in the weights", |dir| {
            flip(&dir.join(WEIGHTS), 9)
        }),
        ("a flipped bit in the optimizer", |dir| {
            flip(&dir.join(OPTIMIZER), 20)
        }),
        ("empty weights", |dir| {
            std::fs::write(dir.join(WEIGHTS), "").unwrap()
        }),
        ("no weights", |dir| {
            std::fs::remove_file(dir.join(WEIGHTS)).unwrap()
        }),
        ("no optimizer", |dir| {
            std::fs::remove_file(dir.join(OPTIMIZER)).unwrap()
        }),
        ("no state", |dir| {
            std::fs::remove_file(dir.join(STATE)).unwrap()
        }),
        ("an empty state", |dir| {
            std::fs::write(dir.join(STATE), "").unwrap()
        }),
        ("broken JSON", |dir| cut(&dir.join(STATE))),
        ("another identity", |dir| {
            replace(&dir.join(STATE), "a1b2", "a1b3")
        }),
        ("another step", |dir| replace(&dir.join(STATE), "20", "10")),
        ("a renamed field", |dir| {
            replace(&dir.join(STATE), "files", "giles")
        }),
        ("nothing in it", |dir| {
            std::fs::remove_dir_all(dir).unwrap();
            std::fs::create_dir(dir).unwrap();
        }),
    ];

    #[test]
    fn whatever_happened_to_the_newest_checkpoint_the_one_before_is_gone_on_from() {
        for (what, damage) in DAMAGES {
            let mut place = Place::new();
            damage(&place.newest());
            let resumed = place.resume();
            assert_eq!((resumed.step, place.value()), (Some(10), 10.0), "{what}");
            let [(name, why)] = &resumed.damaged[..] else {
                panic!("{what}: {resumed:?}");
            };
            assert!(
                name == "checkpoint-000020" && !why.is_empty(),
                "{what}: {why}"
            );
            // It is not in the way of what is written anew.
            place.set(20.5);
            place
                .own()
                .save(20, &place.variables, &place.optimizer)
                .unwrap();
            let resumed = place.resume();
            assert_eq!((resumed.step, place.value()), (Some(20), 20.5), "{what}");
            assert_eq!(resumed.damaged.len(), 0, "{what}");
            let steps: Vec<usize> = place.own().list().unwrap().iter().map(|c| c.0).collect();
            assert_eq!(steps, [10, 20], "{what}");
        }
    }

    #[test]
    fn where_no_checkpoint_is_whole_nothing_is_changed_and_all_are_named() {
        let mut place = Place::new();
        for name in ["checkpoint-000010", "checkpoint-000020"] {
            flip(&place.dir.path().join(name).join(OPTIMIZER), 3);
        }
        let resumed = place.resume();
        assert_eq!((resumed.step, resumed.damaged.len()), (None, 2));
        let steps = place.optimizer.state().unwrap()["step"].to_vec1::<i64>();
        assert_eq!((place.value(), steps.unwrap()), (-1.0, vec![0]));
        // Those of another training are whole, and not gone on from.
        let mut place = Place::new();
        let other = Checkpoints::new(place.dir.path(), "student ffff");
        let resumed = other
            .resume(&place.variables, &mut place.optimizer)
            .unwrap();
        assert_eq!((resumed.step, resumed.foreign), (None, 2));
        assert_eq!(place.own().list().unwrap().len(), 2);
    }

    #[test]
    fn a_checkpoint_of_an_older_version_is_gone_on_from_and_its_damage_is_noticed_where_it_shows() {
        let old = |dir: &Path| {
            let text = r#"{"step": 20, "identity": "student a1b2"}"#;
            std::fs::write(dir.join(STATE), text).unwrap();
        };
        let mut place = Place::new();
        old(&place.newest());
        assert_eq!(place.resume().step, Some(20));
        cut(&place.newest().join(OPTIMIZER));
        assert_eq!((place.resume().step, place.value()), (Some(10), 10.0));
    }

    #[test]
    fn values_that_are_kept_for_an_evaluation_are_those_that_were_written() {
        let place = Place::new();
        let values = [(
            "layer.weight".to_string(),
            place.variables[0].1.as_tensor().clone(),
        )];
        place.own().keep_due(5, &values.into()).unwrap();
        assert!(place.own().due(5).unwrap().is_some());
        assert!(place.own().due(6).unwrap().is_none());
        flip(&place.own().due_path(5), 4);
        assert!(place.own().due(5).is_err());
    }
}
