//! The class images of prior preservation (Ruiz et al. 2023, section 3.2): a stream beside the steps that learn them. The
//! model as it was draws them while the supervisor learns from those before, in the order in which steps first need them;
//! none is drawn that no step needs, and none is kept after the last step that does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::Tensor;
use image::RgbImage;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::train::Course;
use super::{Lazy, ended_early};
use crate::Result;
use crate::config::Sampling;
use crate::models::{Example, Lesson, Request};
use crate::plan::Schedule;
use crate::training::restore;

/// Batches that may wait to be learnt.
const AHEAD: usize = 2;

/// Numbers of class images, drawn together.
type Drawn = (Vec<usize>, Vec<RgbImage>);

/// What is drawn, and by whom.
pub(super) struct Drawing {
    /// Draws with the model of the supervisor.
    pub painter: Lazy,
    /// The values of what is trained before the first step: with them the model draws as if untouched.
    pub untouched: Arc<BTreeMap<String, Tensor>>,
    pub prompt: String,
    /// A seed for each class image.
    pub seeds: Vec<u64>,
    pub sampling: Sampling,
    pub batch_size: usize,
}

/// Class images on their way.
pub(super) struct ClassImages {
    prompt: String,
    /// Which are used by each step.
    schedule: Schedule,
    /// The last step that uses a class image, by its number.
    last_use: BTreeMap<usize, usize>,
    known: BTreeMap<usize, Example>,
    batches: mpsc::Receiver<Result<Drawn>>,
    /// Ends with this value.
    _drawing: JoinSet<()>,
}

/// Batches of the class images that `schedule` uses, in the order in which steps first do. They are those of the whole
/// training, whatever step it goes on from, so that equal batches give equal images.
fn batches(schedule: &Schedule, batch_size: usize) -> Vec<Vec<usize>> {
    let mut seen = BTreeSet::new();
    let first_uses = schedule.items().iter().copied();
    let order: Vec<usize> = first_uses.filter(|number| seen.insert(*number)).collect();
    order.chunks(batch_size).map(<[usize]>::to_vec).collect()
}

impl ClassImages {
    /// Begins to draw what the steps from `step` on use.
    pub fn start(drawing: Drawing, schedule: &Schedule, course: &Course, step: usize) -> Self {
        let steps = step..schedule.steps();
        let last_use: BTreeMap<usize, usize> = steps
            .flat_map(|step| schedule.lessons(step).iter().map(move |&n| (n, step)))
            .collect();
        let mut batches = batches(schedule, drawing.batch_size);
        batches.retain(|batch| batch.iter().any(|number| last_use.contains_key(number)));
        let (sender, receiver) = mpsc::channel(AHEAD);
        let (prompt, meter) = (drawing.prompt.clone(), course.meter.clone());
        let mut task = JoinSet::new();
        task.spawn(async move {
            for batch in batches {
                let drawn = drawing.draw(batch, &meter).await;
                let failed = drawn.is_err();
                if sender.send(drawn).await.is_err() || failed {
                    return;
                }
            }
        });
        Self {
            prompt,
            schedule: schedule.clone(),
            last_use,
            known: BTreeMap::new(),
            batches: receiver,
            _drawing: task,
        }
    }

    /// What `step` learns, as soon as it is drawn. Steps are asked for in their order.
    ///
    /// # Errors
    /// Those of drawing and encoding.
    pub async fn lessons(&mut self, course: &Course, step: usize) -> Result<Vec<Lesson>> {
        let numbers = self.schedule.lessons(step).to_vec();
        while !numbers.iter().all(|number| self.known.contains_key(number)) {
            let drawn = self.batches.recv().await;
            let (batch, images) = drawn.ok_or_else(|| ended_early("class images"))??;
            let encode = move |trainee: &mut crate::training::Trainer| {
                crate::nn::no_grad(|| trainee.learner().encode(&images))
            };
            let examples = course.worker.call(&course.meter, encode).await?;
            let needed = batch.into_iter().zip(examples);
            self.known
                .extend(needed.filter(|(number, _)| self.last_use.contains_key(number)));
        }
        let lessons = numbers.iter().map(|number| Lesson {
            example: self.known[number].clone(),
            prompt: self.prompt.clone(),
        });
        let lessons = lessons.collect();
        self.known
            .retain(|number, _| self.last_use.get(number).is_some_and(|last| *last > step));
        Ok(lessons)
    }
}

impl Drawing {
    async fn draw(&self, batch: Vec<usize>, meter: &crate::stream::Meter) -> Result<Drawn> {
        let requests: Vec<Request> = batch
            .iter()
            .map(|&number| Request {
                prompt: self.prompt.clone(),
                seed: self.seeds[number],
            })
            .collect();
        let (untouched, sampling) = (self.untouched.clone(), self.sampling.clone());
        let images = self
            .painter
            .get()
            .await?
            .call(meter, move |learner| {
                restore(
                    &learner.variables(),
                    &untouched,
                    std::path::Path::new("the untouched model"),
                )?;
                learner.generate(&requests, &sampling)
            })
            .await?;
        Ok((batch, images))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_drawn_once_in_the_order_of_their_first_use_and_none_that_is_not_used() {
        let schedule = Schedule::epochs(3, 2, 40, 7, "class images");
        let batches = batches(&schedule, 4);
        let order: Vec<usize> = batches.concat();
        assert_eq!(order, schedule.items());
        assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [4, 2]);
        let again = Schedule::epochs(9, 2, 4, 7, "class images");
        let mut order = super::batches(&again, 3).concat();
        order.sort_unstable();
        assert_eq!(order, [0, 1, 2, 3]);
    }
}
