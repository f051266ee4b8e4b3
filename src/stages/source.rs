//! Sources of images: what makes the proxies that a student learns from. A supervisor that has learnt its subject is
//! one; a program that uses the library brings its own with [`run_with_source`](crate::pipeline::run_with_source).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use candle_core::Tensor;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};
use image::RgbImage;

use super::{Caption, LazyLearner, Made, Subject};
use crate::config::{DiffusionSampling, Sampling};
use crate::models::Request;
use crate::plan::Plan;
use crate::stream::Meter;
use crate::training::restore;
use crate::{Error, Result};

/// Makes images for a student to learn from. It is asked for one planned batch after another, of those that are not in
/// the store yet, and only when there is room for what it makes: a source may wait for its images (a camera, a folder
/// that fills), and the stages after it then wait for the source.
///
/// Time must not change the result: equal keys, subjects, prompts and seeds promise equal images, whatever was asked for
/// before.
pub trait ImageSource: Send + Sync + 'static {
    /// Names everything that decides its images of `subject`, except what it is asked for: its data, models, settings.
    /// Images in the store are found again by it. A digest, or any text.
    fn key(&self, subject: &Subject) -> String;

    /// As many images as `wanted` asks for, in its order. `meter` counts the time that it computes.
    ///
    /// An error in the stream ends the run.
    fn images<'a>(
        &'a self,
        wanted: &'a WantedBatch,
        meter: &'a Meter,
    ) -> BoxStream<'a, Result<SourceImage>>;
}

/// The images of a planned batch.
#[derive(Debug, Clone)]
pub struct WantedBatch {
    pub subject: Arc<Subject>,
    pub images: Vec<WantedImage>,
}

/// An image that a plan wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedImage {
    /// From 0, within the subject.
    pub index: usize,
    /// One of the prompts of `[proxies]`, with the subject's token and class.
    pub prompt: String,
    /// Where its randomness comes from.
    pub seed: u64,
}

/// An image that a source has made.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceImage {
    /// A square; one of another side than the student learns from is resized.
    pub image: RgbImage,
    /// What the student learns it by: the prompt that was asked for, or a better one.
    pub prompt: String,
    /// Where it comes from, for the column `settings` of the proxies: JSON.
    pub settings: String,
}

impl WantedBatch {
    /// Batch `batch` of `plan`, which is of `subject`.
    pub fn planned(plan: &Plan, batch: usize, subject: &Arc<Subject>) -> Self {
        let proxies = &plan.proxies()[plan.batch(batch).numbers.clone()];
        let wanted = proxies.iter().map(|proxy| WantedImage {
            index: proxy.index,
            prompt: proxy.prompt.clone(),
            seed: proxy.seed,
        });
        Self {
            subject: subject.clone(),
            images: wanted.collect(),
        }
    }
}

/// Where the images of one subject come from, once they can.
#[derive(Clone)]
pub struct ReadySource {
    /// The subject's index in the plan.
    pub subject: usize,
    pub images: Arc<dyn ImageSource>,
    /// The supervisor's adapter, which is evaluated when its proxies are made; none of another source.
    pub adapter: Option<PathBuf>,
}

impl ReadySource {
    /// Makes batch `batch` of `plan`.
    ///
    /// # Errors
    /// Those of the source; when it gives fewer images than it was asked for, or one that is no square.
    pub(super) async fn make(
        &self,
        plan: &Plan,
        batch: usize,
        subject: &Arc<Subject>,
        meter: &Meter,
    ) -> Result<Made> {
        let wanted = WantedBatch::planned(plan, batch, subject);
        let count = wanted.images.len();
        let made: Vec<SourceImage> = self
            .images
            .images(&wanted, meter)
            .take(count)
            .try_collect()
            .await?;
        if made.len() < count {
            return Err(Error::invalid(
                format!(
                    "the source of {} gave {} of {count} images",
                    subject.name,
                    made.len()
                ),
                "let it give an image for each that is wanted, or lower proxies.count",
            ));
        }
        if let Some(image) = made
            .iter()
            .map(|made| &made.image)
            .find(|image| image.width() != image.height())
        {
            return Err(Error::invalid(
                format!(
                    "the source of {} gave an image of {} x {} pixels",
                    subject.name,
                    image.width(),
                    image.height()
                ),
                "let it give squares",
            ));
        }
        let (images, captions): (Vec<_>, Vec<_>) = made
            .into_iter()
            .map(|made| {
                let SourceImage {
                    image,
                    prompt,
                    settings,
                } = made;
                (image, Caption { prompt, settings })
            })
            .unzip();
        Ok(Made {
            images: Arc::new(images),
            captions: Arc::new(captions),
        })
    }
}

/// A supervisor that has learnt its subject.
pub struct SupervisorSource {
    /// Digest of everything that made the supervisor.
    pub key: String,
    pub sampler: LazyLearner,
    /// The folder with its adapter.
    pub adapter: PathBuf,
    /// What the adapter holds, once it has been read.
    pub values: Arc<OnceLock<BTreeMap<String, Tensor>>>,
    pub sampling: DiffusionSampling,
    /// Every prompt that the sampler will be asked for.
    pub foreseen: Arc<Vec<String>>,
}

impl SupervisorSource {
    /// The images of a batch, which are drawn together.
    async fn draw(&self, wanted: &WantedBatch, meter: &Meter) -> Result<Vec<SourceImage>> {
        let requests: Vec<Request> = wanted
            .images
            .iter()
            .map(|image| Request {
                prompt: image.prompt.clone(),
                seed: image.seed,
            })
            .collect();
        let sampling = Sampling::Diffusion(self.sampling.clone());
        let settings = serde_json::to_string(&self.sampling).map_err(|e| Error::Invalid {
            what: format!("settings as JSON: {e}"),
            hint: None,
        })?;
        let (adapter, values) = (self.adapter.clone(), self.values.clone());
        let foreseen = self.foreseen.clone();
        let drawn = self
            .sampler
            .get()
            .await?
            .call(meter, move |learner| {
                let values = match values.get() {
                    Some(values) => values,
                    None => {
                        let read = learner.read(&adapter)?;
                        values.get_or_init(|| read)
                    }
                };
                // Others draw with the same learner: subjects, and class images of what has learnt nothing yet.
                restore(&learner.variables(), values, &adapter)?;
                learner.foresee(&foreseen)?;
                learner.generate(&requests, &sampling)
            })
            .await?;
        let made = drawn.into_iter().zip(&wanted.images);
        let image = |(image, wanted): (RgbImage, &WantedImage)| SourceImage {
            image,
            prompt: wanted.prompt.clone(),
            settings: settings.clone(),
        };
        Ok(made.map(image).collect())
    }
}

impl ImageSource for SupervisorSource {
    fn key(&self, _: &Subject) -> String {
        self.key.clone()
    }

    fn images<'a>(
        &'a self,
        wanted: &'a WantedBatch,
        meter: &'a Meter,
    ) -> BoxStream<'a, Result<SourceImage>> {
        let drawn = stream::once(self.draw(wanted, meter));
        drawn
            .map_ok(|images| stream::iter(images.into_iter().map(Ok)))
            .try_flatten()
            .boxed()
    }
}
