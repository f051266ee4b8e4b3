//! The class images of prior preservation (Ruiz et al. 2023, section 3.2): a stream beside the steps that learn them. The
//! model as it was draws them while the supervisor learns from those before, in the order in which steps first need them;
//! none is drawn that no step needs, and none is kept after the last step that does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::Tensor;
use image::RgbImage;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::session::TrainingSession;
use super::{LazyLearner, ended_early};
use crate::Result;
use crate::config::Sampling;
use crate::models::{Example, Request, TrainingExample};
use crate::plan::Schedule;
use crate::stream::Meter;
use crate::training::{Trainer, restore};

/// Batches that may wait to be learnt.
const AHEAD: usize = 2;

/// Numbers of class images, drawn together.
type Drawn = (Vec<usize>, Vec<RgbImage>);

/// What is drawn, and by whom.
pub(super) struct Drawing {
    /// Draws with the model of the supervisor.
    pub sampler: LazyLearner,
    /// The values of what is trained before the first step: with them the model draws as if untouched.
    pub untouched: Arc<BTreeMap<String, Tensor>>,
    pub prompt: String,
    /// A seed for each class image.
    pub seeds: Vec<u64>,
    pub sampling: Sampling,
    pub batch_size: usize,
    /// Counts the time that drawing takes.
    pub meter: Meter,
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
    pub fn start(drawing: Drawing, schedule: &Schedule, step: usize) -> Self {
        let steps = step..schedule.steps();
        let last_use: BTreeMap<usize, usize> = steps
            .flat_map(|step| schedule.batch(step).iter().map(move |&n| (n, step)))
            .collect();
        let mut batches = batches(schedule, drawing.batch_size);
        batches.retain(|batch| batch.iter().any(|number| last_use.contains_key(number)));
        let (sender, receiver) = mpsc::channel(AHEAD);
        let prompt = drawing.prompt.clone();
        let mut task = JoinSet::new();
        task.spawn(async move {
            for batch in batches {
                let drawn = drawing.draw(batch).await;
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
    pub async fn batch(
        &mut self,
        session: &TrainingSession,
        step: usize,
    ) -> Result<Vec<TrainingExample>> {
        let numbers = self.schedule.batch(step).to_vec();
        while !numbers.iter().all(|number| self.known.contains_key(number)) {
            let drawn = self.batches.recv().await;
            let (batch, images) = drawn.ok_or_else(|| ended_early("class images"))??;
            let encode = move |trainer: &mut Trainer| {
                crate::nn::no_grad(|| trainer.learner().encode(&images))
            };
            let examples = session.call(encode).await?;
            let needed = batch.into_iter().zip(examples);
            self.known
                .extend(needed.filter(|(number, _)| self.last_use.contains_key(number)));
        }
        let learnt = numbers.iter().map(|number| TrainingExample {
            example: self.known[number].clone(),
            prompt: self.prompt.clone(),
        });
        let learnt = learnt.collect();
        self.known
            .retain(|number, _| self.last_use.get(number).is_some_and(|last| *last > step));
        Ok(learnt)
    }
}

impl Drawing {
    async fn draw(&self, batch: Vec<usize>) -> Result<Drawn> {
        let requests: Vec<Request> = batch
            .iter()
            .map(|&number| Request {
                prompt: self.prompt.clone(),
                seed: self.seeds[number],
            })
            .collect();
        let (untouched, sampling) = (self.untouched.clone(), self.sampling.clone());
        let images = self
            .sampler
            .get()
            .await?
            .call(&self.meter, move |learner| {
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
