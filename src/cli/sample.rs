//! `proxytune sample`: draws images with a model and, if given, an adapter.

use std::io::Write;
use std::time::Instant;

use super::memory::{gibibytes, peak_memory};
use super::models::make_ready;
use super::unread::say_unread;
use super::{ComputeArgs, Ended, SampleArgs, SamplingArgs, block_on, output_failed};
use crate::config::models::Family;
use crate::config::{Kind, sampling_defaults};
use crate::images::encode_png;
use crate::models::reading::Prompt;
use crate::models::{Opening, Request, Sampling, open};
use crate::pipeline::{opening_for, use_threads};
use crate::plan::derive_seed;
use crate::stream::{Board, Worker};
use crate::training::restore;
use crate::{Error, Result, files};

pub(super) fn sample(args: &SampleArgs, out: &mut impl Write) -> Result<Ended> {
    let requests: Vec<Request> = args
        .prompts
        .iter()
        .flat_map(|prompt| {
            let seed = move |index| derive_seed(args.seed, &format!("sample/{prompt}"), index);
            (0..args.count).map(move |index| Request {
                prompt: prompt.clone(),
                seed: seed(index),
            })
        })
        .collect();
    let negative = args.sampling.negative_prompt.iter();
    let read: Vec<Prompt> = args
        .prompts
        .iter()
        .chain(negative)
        .map(|prompt| prompt.as_str().into())
        .collect();
    let ended = say_unread(&args.model, &read)?;
    files::create_dir(&args.out)?;
    let Drawn { images, costs } = draw(
        &args.model,
        args.adapter.as_deref(),
        &requests,
        &args.compute,
        &args.sampling,
    )?;
    for (number, (request, image)) in requests.iter().zip(&images).enumerate() {
        let words: Vec<&str> = request
            .prompt
            .split(|c: char| !c.is_alphanumeric())
            .filter(|w| !w.is_empty())
            .collect();
        let path = args
            .out
            .join(format!("{number:04}-{}.png", words.join("-")));
        files::write(&path, &encode_png(image)?)?;
        writeln!(out, "{}", path.display()).map_err(output_failed)?;
    }
    eprintln!("{costs}");
    Ok(ended)
}

/// Images, and what they cost.
pub(super) struct Drawn {
    pub(super) images: Vec<image::RgbImage>,
    costs: Costs,
}

/// What drawing took.
struct Costs {
    images: usize,
    /// Seconds until the model stood ready, and from then on.
    loading: f64,
    drawing: f64,
    tokens_per_image: Option<usize>,
}

impl std::fmt::Display for Costs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (n, s) = (self.images, if self.images == 1 { "" } else { "s" });
        write!(f, "{n} image{s} in {:.1} s", self.drawing)?;
        if let Some(tokens) = self.tokens_per_image {
            let each = self.drawing / (n * tokens).max(1) as f64;
            write!(f, " ({tokens} tokens each, {:.1} ms a token)", 1e3 * each)?;
        }
        write!(f, "; loaded in {:.1} s", self.loading)?;
        match peak_memory() {
            0 => Ok(()),
            bytes => write!(f, "; at most {:.2} GiB of memory", gibibytes(bytes)),
        }
    }
}

/// The sampling that was asked for; what was not, by the family's defaults.
fn sampling(family: Family, args: &SamplingArgs) -> Sampling {
    let mut sampling = Sampling::student(&sampling_defaults(family));
    sampling.guidance_scale = args.guidance_scale.unwrap_or(sampling.guidance_scale);
    sampling.num_inference_steps = args
        .num_inference_steps
        .unwrap_or(sampling.num_inference_steps);
    sampling.top_k = args.top_k.unwrap_or(sampling.top_k);
    sampling.top_p = args.top_p.unwrap_or(sampling.top_p);
    sampling.temperature = args.temperature.unwrap_or(sampling.temperature);
    sampling.guidance_interval = args.guidance_interval.or(sampling.guidance_interval);
    if let Some(negative) = &args.negative_prompt {
        sampling.negative_prompt = negative.clone();
    }
    sampling
}

/// Draws `requests` in batches, on the model's own thread.
pub(super) fn draw(
    model: &str,
    adapter: Option<&std::path::Path>,
    requests: &[Request],
    compute: &ComputeArgs,
    asked: &SamplingArgs,
) -> Result<Drawn> {
    if compute.threads > 0 {
        use_threads(compute.threads);
    }
    make_ready([model])?;
    let opening = Opening {
        dtype: compute.dtype,
        ..opening_for(model, adapter, compute.device)?
    };
    if opening.family.kind() == Kind::Evaluator {
        return Err(Error::invalid(
            format!("{model} does not draw"),
            "name a diffusion or an autoregressive model",
        ));
    }
    let sampling = sampling(opening.family, asked);
    let (adapter, requests, batch) = (
        adapter.map(std::path::Path::to_path_buf),
        requests.to_vec(),
        compute.batch_size,
    );
    block_on(async move {
        let board = Board::default();
        let meter = board.meter("sample", "images");
        let start = Instant::now();
        let worker = Worker::spawn("sample", move || open(&opening)).await?;
        let loading = start.elapsed().as_secs_f64();
        worker
            .call(&meter, move |learner| {
                if let Some(dir) = &adapter {
                    restore(&learner.variables(), &learner.read(dir)?, dir)?;
                }
                let start = Instant::now();
                let mut images = Vec::new();
                for batch in requests.chunks(batch) {
                    images.extend(learner.generate(batch, &sampling)?);
                }
                let costs = Costs {
                    images: images.len(),
                    loading,
                    drawing: start.elapsed().as_secs_f64(),
                    tokens_per_image: learner.tokens_per_image(),
                };
                Ok(Drawn { images, costs })
            })
            .await
    })
}
