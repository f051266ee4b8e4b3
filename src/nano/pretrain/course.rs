//! One training course: the loop, its learning rate, its progress lines, its saves and its notes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use super::average::Average;
use super::curves::Curves;
use super::files;
use super::settings::Training;
use crate::config::Optimizer;
use crate::console;
use crate::files::{LISTS, read_text_if_there};
use crate::training::TrainingLoop;
use crate::{Error, Result};

/// How long a course lasts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// This many minutes of wall time.
    Minutes(f64),
    /// This many images.
    Images(usize),
}

/// How often the weights are saved, and a line is printed.
const SAVE_EVERY: Duration = Duration::from_secs(180);
const PRINT_EVERY: Duration = Duration::from_secs(20);

/// The most points of a session's curve in `training.json`, which lies beside the weights for good. The store has all.
const POINTS: usize = 40;

/// What one step computed: the loss to descend (a scalar), and named figures for the progress line.
pub struct Step {
    pub loss: Tensor,
    pub figures: Vec<(&'static str, f64)>,
}

/// `training.json` beside a checkpoint: everything that it has seen.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Notes {
    /// Images over all sessions. Scenes are numbered, so a resumed training goes on with scenes it has not seen.
    pub images: usize,
    /// Seconds of wall time over all sessions.
    pub seconds: f64,
    /// One entry for each time that the training was started.
    pub sessions: Vec<Session>,
}

/// One start of a training.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Session {
    pub images: usize,
    pub seconds: f64,
    /// Processor, threads and device.
    pub machine: String,
    pub batch_size: usize,
    pub learning_rate: f64,
    #[serde(default)]
    pub optimizer: Optimizer,
    /// Points of the curve: images seen in this session, then the mean of each figure over the 20 seconds before.
    pub figures: Vec<String>,
    pub curve: Vec<Vec<f64>>,
}

impl Notes {
    /// Those in `path`; empty if there are none.
    pub fn read(path: &Path) -> Result<Self> {
        match read_text_if_there(path, LISTS)? {
            Some(text) => serde_json::from_str(&text).map_err(|e| Error::Invalid {
                what: format!("{}: {e}", path.display()),
                hint: Some("remove the file to count from zero again".into()),
            }),
            None => Ok(Self::default()),
        }
    }

    /// Leaves each session a curve of [`POINTS`] points at most, its last among them.
    fn thin(&mut self) {
        for session in &mut self.sessions {
            let each = session.curve.len().div_ceil(POINTS).max(1);
            let until_last = session.curve.len().saturating_sub(1);
            let mut place = 0;
            session.curve.retain(|_| {
                place += 1;
                (until_last + 1 - place).is_multiple_of(each)
            });
        }
    }
}

/// A course about to run.
pub struct Course<'a> {
    /// For the progress line.
    pub name: &'a str,
    pub training: &'a Training,
    pub budget: Budget,
    pub machine: &'a str,
    /// Where the notes lie.
    pub notes: PathBuf,
    /// Where the curve is logged too.
    pub curves: Option<&'a Curves>,
    /// What the optimizer moves.
    pub trained: Vec<(String, Var)>,
}

impl Course<'_> {
    /// The notes of earlier sessions; empty if there are none.
    pub fn notes(&self) -> Result<Notes> {
        Notes::read(&self.notes)
    }

    /// Trains until the budget is spent. `step` is given the number of images seen before it, over all sessions, and
    /// the share of the budget that is spent; `save` writes the checkpoint, and finds the average of the weights over
    /// the last part of the session in their place.
    pub fn run(
        &self,
        mut step: impl FnMut(usize, f64) -> Result<Step>,
        mut save: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let earlier = self.notes()?;
        let training = self.training;
        let (optimizer, max_grad_norm) = (training.optimizer(), Some(training.max_grad_norm));
        let mut training_loop = TrainingLoop::new(self.trained.clone(), &optimizer, max_grad_norm)?;
        let mut steps = 0;
        let mut average = Average::new(&self.trained)?;
        let weights: usize = self.trained.iter().map(|(_, v)| v.elem_count()).sum();
        console::print(format!(
            "{}: {weights} weights, {} images seen before",
            self.name, earlier.images
        ))?;
        let mut session = Session {
            machine: self.machine.to_string(),
            batch_size: training.batch_size,
            learning_rate: training.learning_rate,
            optimizer: training.optimizer,
            ..Session::default()
        };
        let start = Instant::now();
        let (mut printed, mut saved) = (start, start);
        let mut means = Means::default();
        let mut logged = 0;
        loop {
            let spent = match self.budget {
                Budget::Minutes(minutes) => start.elapsed().as_secs_f64() / (60.0 * minutes),
                Budget::Images(images) => session.images as f64 / images.max(1) as f64,
            };
            let last = spent >= 1.0;
            if means.steps > 0 && (last || printed.elapsed() > PRINT_EVERY) {
                session.seconds = start.elapsed().as_secs_f64();
                let rate = means.images as f64 / printed.elapsed().as_secs_f64();
                console::print(format!(
                    "{}: {:>3.0} %  {} images  {rate:.1} images/s  {}",
                    self.name,
                    100.0 * spent.min(1.0),
                    earlier.images + session.images,
                    means.line()
                ))?;
                session.figures = means.names();
                session.curve.push(means.point(session.images));
                means = Means::default();
                printed = Instant::now();
            }
            if session.images > 0 && (last || saved.elapsed() > SAVE_EVERY) {
                session.seconds = start.elapsed().as_secs_f64();
                average.lend(&mut save)?;
                let mut notes = earlier.clone();
                notes.images += session.images;
                notes.seconds += session.seconds;
                notes.sessions.push(session.clone());
                notes.thin();
                files::write_json(&self.notes, &notes)?;
                if let Some(curves) = self.curves {
                    let points = &session.curve[logged..];
                    curves.log(self.name, &session.figures, points)?;
                    logged = session.curve.len();
                }
                saved = Instant::now();
            }
            if last {
                return Ok(());
            }
            let mut figures = Vec::new();
            let rate = training.rate(session.images, spent);
            let progress = training_loop.step(steps, rate, 1, |_| {
                let result = step(earlier.images + session.images, spent)?;
                figures = result.figures;
                Ok(result.loss)
            })?;
            average.follow()?;
            steps += 1;
            session.images += training.batch_size;
            means.add("loss", progress.loss);
            for (name, value) in figures {
                means.add(name, value);
            }
            means.add("gradient", progress.grad_norm);
            means.steps += 1;
            means.images += training.batch_size;
        }
    }
}

/// Means of named figures, in the order in which they first came.
#[derive(Default)]
struct Means {
    steps: usize,
    images: usize,
    sums: Vec<(&'static str, f64, usize)>,
}

impl Means {
    fn add(&mut self, name: &'static str, value: f64) {
        match self.sums.iter_mut().find(|(known, ..)| *known == name) {
            Some((_, sum, count)) => {
                *sum += value;
                *count += 1;
            }
            None => self.sums.push((name, value, 1)),
        }
    }

    fn line(&self) -> String {
        let parts: Vec<String> = self
            .sums
            .iter()
            .map(|(name, sum, count)| format!("{name} {:.4}", sum / *count as f64))
            .collect();
        parts.join("  ")
    }

    fn names(&self) -> Vec<String> {
        std::iter::once("images")
            .chain(self.sums.iter().map(|(name, ..)| *name))
            .map(String::from)
            .collect()
    }

    fn point(&self, images: usize) -> Vec<f64> {
        let values = self
            .sums
            .iter()
            .map(|(_, sum, count)| (sum / *count as f64 * 1e4).round() / 1e4);
        std::iter::once(images as f64).chain(values).collect()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn long_curves_are_thinned_and_keep_their_last_point() {
        for length in [0, 1, POINTS, POINTS + 1, 5 * POINTS + 7] {
            let curve: Vec<Vec<f64>> = (0..length).map(|i| vec![i as f64]).collect();
            let mut notes = Notes::default();
            notes.sessions.push(Session {
                curve: curve.clone(),
                ..Session::default()
            });
            notes.thin();
            let thinned = notes.sessions[0].curve.clone();
            assert!(thinned.len() <= POINTS);
            assert_eq!(thinned.last(), curve.last());
            if length <= POINTS {
                assert_eq!(thinned, curve);
            } else {
                assert!(2 * thinned.len() >= POINTS, "{}", thinned.len());
            }
            notes.thin();
            assert_eq!(notes.sessions[0].curve, thinned);
        }
    }

    #[test]
    fn a_resumed_course_counts_on_and_descends() {
        let folder = tempfile::tempdir().unwrap();
        let training = Training {
            image_size: None,
            images: 40,
            batch_size: 4,
            learning_rate: 0.1,
            warmup_images: 4,
            beta2: 0.99,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            optimizer: Optimizer::Adamw,
        };
        let variable = Var::new(&[2f32], &Device::Cpu).unwrap();
        let course = Course {
            name: "test",
            training: &training,
            budget: Budget::Images(40),
            machine: "a machine",
            notes: folder.path().join("training.json"),
            curves: None,
            trained: vec![("x".into(), variable.clone())],
        };
        let mut seen = Vec::new();
        for _ in 0..2 {
            let step = |images: usize, _: f64| {
                seen.push(images);
                let loss = variable.as_tensor().sqr()?.sum_all()?;
                Ok(Step {
                    loss,
                    figures: Vec::new(),
                })
            };
            course.run(step, || Ok(())).unwrap();
        }
        assert_eq!(seen, (0..20).map(|step| 4 * step).collect::<Vec<_>>());
        let notes = course.notes().unwrap();
        assert_eq!((notes.images, notes.sessions.len()), (80, 2));
        let value = variable.as_tensor().to_vec1::<f32>().unwrap()[0];
        assert!(value.abs() < 1.0, "{value}");
    }
}
