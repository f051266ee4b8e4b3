//! evaluate: every checkpoint draws the planned samples, and these are scored. Downstream of training.

use std::ops::Range;
use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};
use image::RgbImage;

use super::score::Scorer;
use super::{Checkpoint, LazyLearner, Log, Method};
use crate::config;
use crate::evaluation::embed::Embeddings;
use crate::evaluation::metrics::Scores;
use crate::files::values_digest;
use crate::images::encode_png;
use crate::models::Request;
use crate::plan::{Plan, Sampled, Versions, sample_keys};
use crate::store::{EvaluationRow, PictureKind, now_us};
use crate::stream::blocking;
use crate::training::restore;
use crate::{Error, Result};

/// The scored samples of one checkpoint, by the keys of their rows, in the order of the plan.
#[derive(Debug, Clone)]
pub struct Evaluated {
    pub method: Method,
    pub step: usize,
    /// Digest of what was trained.
    pub adapter: String,
    /// Positions in the evaluation plan, and the rows' keys.
    pub samples: Vec<(usize, String)>,
}

/// What draws samples, and how.
#[derive(Clone)]
pub struct Sampler {
    pub model: LazyLearner,
    pub sampling: config::Sampling,
}

/// What the stage needs.
pub struct Evaluate {
    pub plan: Arc<Plan>,
    pub student: Sampler,
    /// `None` where no supervisor is evaluated.
    pub supervisor: Option<Sampler>,
    pub scorer: Scorer,
    pub log: Log,
}

impl Evaluate {
    /// Draws and scores the samples of each checkpoint of `input`, in planned batches that are always drawn whole.
    pub fn run(
        self,
        input: impl Stream<Item = Checkpoint> + Send,
    ) -> impl Stream<Item = Result<Evaluated>> + Send {
        try_stream! {
            let Log { meter, stop, .. } = &self.log;
            let table = self.scorer.table().await?;
            let mut input = std::pin::pin!(input);
            while let Some(checkpoint) = input.next().await {
                if stop.requested() {
                    // Taking what comes lets training get on to its checkpoint.
                    continue;
                }
                let values = checkpoint.values.clone();
                let digesting = blocking("the digest of an adapter", move || values_digest(&values));
                let adapter = meter.busy(digesting).await?;
                let mut samples = Vec::new();
                let plan = self.plan.evaluation();
                for batch in &plan.batches {
                    let images = &plan.images[batch.clone()];
                    let Some(subject) = images.first().map(|image| image.subject) else { continue };
                    if stop.requested() {
                        break;
                    }
                    if !checkpoint.subjects.contains(&subject) {
                        continue;
                    }
                    let keys = self.known_keys(&checkpoint, &adapter, batch.clone())?;
                    let keys = keys.found(|keys| table.missing(keys).is_empty()).clone();
                    samples.extend(batch.clone().zip(keys.iter().cloned()));
                    if table.missing(&keys).is_empty() {
                        meter.reuse(keys.len());
                        continue;
                    }
                    let requests =
                        images.iter().map(|image| Request { prompt: image.prompt.clone(), seed: image.seed }).collect();
                    let drawn = Arc::new(self.draw(&checkpoint, requests).await?);
                    let texts = images.iter().map(|image| image.text.clone()).collect();
                    let scored = self.scorer.score(subject, drawn.clone(), texts, meter).await?;
                    let encoding = blocking("encoding pictures", move || {
                        drawn.iter().map(encode_png).collect::<Result<Vec<_>>>()
                    });
                    let pictures = meter.busy(encoding).await?;
                    let rows = self.rows(&checkpoint, &adapter, batch.clone(), &keys, scored, pictures);
                    meter.busy(table.append(&rows)).await?;
                    meter.add(rows.len());
                }
                if stop.requested() {
                    continue;
                }
                yield Evaluated { method: checkpoint.method, step: checkpoint.step, adapter, samples };
            }
        }
    }

    /// Keys of the samples of one planned batch, in every known version.
    fn known_keys(
        &self,
        checkpoint: &Checkpoint,
        adapter: &str,
        batch: Range<usize>,
    ) -> Result<Versions<Vec<String>>> {
        let photos: Vec<String> = checkpoint
            .subjects
            .iter()
            .flat_map(|&subject| self.scorer.subjects[subject].digests.clone())
            .collect();
        let sampler = self.sampler(checkpoint.method)?;
        Ok(sample_keys(&Sampled {
            method: checkpoint.method.name(),
            model: &sampler.model.digest,
            adapter,
            step: checkpoint.step,
            sampling: &sampler.sampling,
            photos: &photos,
            images: &self.plan.evaluation().images[batch],
        }))
    }

    /// What draws the samples of `method`.
    fn sampler(&self, method: Method) -> Result<&Sampler> {
        match method {
            Method::Untouched | Method::Direct | Method::Student => Ok(&self.student),
            Method::Supervisor => self.supervisor.as_ref().ok_or_else(|| Error::Invalid {
                what: "a supervisor's samples without a supervisor".into(),
                hint: None,
            }),
        }
    }

    async fn draw(&self, checkpoint: &Checkpoint, requests: Vec<Request>) -> Result<Vec<RgbImage>> {
        let sampler = self.sampler(checkpoint.method)?;
        let sampling = sampler.sampling.clone();
        let values = checkpoint.values.clone();
        let model = sampler.model.get().await?;
        model
            .call(&self.log.meter, move |learner| {
                restore(
                    &learner.variables(),
                    &values,
                    std::path::Path::new("a checkpoint to evaluate"),
                )?;
                learner.generate(&requests, &sampling)
            })
            .await
    }

    fn rows(
        &self,
        checkpoint: &Checkpoint,
        adapter: &str,
        batch: Range<usize>,
        keys: &[String],
        (embeddings, scores): (Embeddings, Vec<Scores>),
        pictures: Vec<Vec<u8>>,
    ) -> Vec<EvaluationRow> {
        let images = &self.plan.evaluation().images[batch];
        let embeddings = embeddings.clip.into_iter().zip(embeddings.dino);
        images
            .iter()
            .zip(keys)
            .zip(embeddings.zip(scores))
            .zip(pictures)
            .map(
                |(((image, key), ((clip, dino), scores)), picture)| EvaluationRow {
                    key: key.clone(),
                    kind: PictureKind::Sample,
                    run: self.log.run.clone(),
                    method: Some(checkpoint.method),
                    step: checkpoint.step as u64,
                    subject: self.scorer.subjects[image.subject].name.clone(),
                    prompt: image.prompt.clone(),
                    seed: image.seed,
                    clip_i: Some(scores.clip_i as f32),
                    clip_t: Some(scores.clip_t as f32),
                    dino: Some(scores.dino as f32),
                    clip_embedding: Some(clip),
                    dino_embedding: Some(dino),
                    image: Some(picture),
                    created_us: now_us(),
                    adapter: Some(adapter.to_string()),
                },
            )
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use futures::stream;

    use super::super::fakes::{Fakes, all, next, picture, values};
    use super::*;
    use crate::store::Columns;

    async fn stage(fakes: &Fakes) -> Evaluate {
        let sampling = fakes.keys().sampling.unwrap();
        Evaluate {
            plan: fakes.plan.clone(),
            student: Sampler {
                model: fakes.sampler(),
                sampling: fakes.resolved.student.sampling.clone(),
            },
            supervisor: Some(Sampler {
                model: fakes.sampler(),
                sampling: config::Sampling::Diffusion(sampling),
            }),
            scorer: fakes.scorer(),
            log: fakes.log("evaluate").await,
        }
    }

    fn checkpoints() -> Vec<Checkpoint> {
        let of = |method, step, subjects: &[usize]| Checkpoint {
            method,
            step,
            subjects: subjects.to_vec(),
            values: values(step as f32),
        };
        vec![
            of(Method::Student, 4, &[0, 1]),
            of(Method::Supervisor, 4, &[1]),
            of(Method::Student, 8, &[0, 1]),
        ]
    }

    #[tokio::test]
    async fn checkpoints_come_out_in_order_with_samples_of_the_subjects_that_they_know() {
        let fakes = Fakes::new(&[]).await;
        let evaluated = all(stage(&fakes).await.run(stream::iter(checkpoints())))
            .await
            .unwrap();
        let told: Vec<_> = evaluated
            .iter()
            .map(|e| (e.method, e.step, e.samples.len()))
            .collect();
        let expected = [
            (Method::Student, 4, 4),
            (Method::Supervisor, 4, 2),
            (Method::Student, 8, 4),
        ];
        assert_eq!(told, expected);
        // Two prompts for each subject; the supervisor knows the second alone.
        assert_eq!(fakes.work.drawn.load(SeqCst), 10);
        let table = fakes.scorer().table().await.unwrap();
        let (place, key) = &evaluated[1].samples[1];
        let planned = &fakes.plan.evaluation().images[*place];
        assert_eq!(planned.subject, 1);
        let row = table
            .get(std::slice::from_ref(key), Columns::All)
            .await
            .unwrap()
            .remove(0)
            .unwrap();
        let told = (row.kind, row.method, row.subject.as_str(), row.prompt);
        let expected = (
            PictureKind::Sample,
            Some(Method::Supervisor),
            "cat1",
            planned.prompt.clone(),
        );
        assert_eq!(told, expected);
        assert_eq!(
            row.image.unwrap(),
            encode_png(&picture(planned.seed)).unwrap()
        );
        assert_ne!(evaluated[0].adapter, evaluated[2].adapter);
        // A second run finds them all.
        let again = fakes.again(&[]);
        let found = all(stage(&again).await.run(stream::iter(checkpoints())))
            .await
            .unwrap();
        assert_eq!(found[2].samples, evaluated[2].samples);
        assert_eq!(again.work.of_learners(), [0; 4]);
    }

    #[tokio::test]
    async fn after_a_stop_it_takes_what_comes_and_draws_nothing() {
        let fakes = Fakes::new(&[]).await;
        let stage = stage(&fakes).await.run(stream::iter(checkpoints()));
        let mut stage = std::pin::pin!(stage);
        assert!(next(&mut stage).await.unwrap().is_ok());
        fakes.stop.request();
        assert!(next(&mut stage).await.is_none());
        assert_eq!(fakes.work.drawn.load(SeqCst), 4);
    }

    #[tokio::test]
    async fn the_error_of_a_broken_model_or_of_a_missing_one_comes_out() {
        let fakes = Fakes::new(&[]).await;
        fakes.work.fails_after.store(4, SeqCst);
        let broken = stage(&fakes).await.run(stream::iter(checkpoints()));
        let mut broken = std::pin::pin!(broken);
        assert!(next(&mut broken).await.unwrap().is_ok());
        let error = next(&mut broken).await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "the model is broken");
        let mut missing = stage(&fakes.again(&[])).await;
        missing.supervisor = None;
        let error = all(missing.run(stream::iter(checkpoints().into_iter().skip(1)))).await;
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("without a supervisor")
        );
    }
}
