//! Each checkpoint by itself, on scenes with individuals that no training saw.

use std::path::Path;

use candle_core::Tensor;
use image::RgbImage;

use super::{Row, Unit};
use crate::config::Sampling;
use crate::evaluation::embed::{ImageEmbedder, TextEmbedder};
use crate::evaluation::embedders::{ClipEmbedder, DinoEmbedder};
use crate::evaluation::metrics::cosine;
use crate::models::registry::family;
use crate::models::{Request, open};
use crate::nano::identity::{Class, Identity};
use crate::nano::pretrain::{Context, Model, area_under_curve, psnr, vae, vq};
use crate::nano::world::{Scene, Setting};
use crate::pipeline::opening_for;
use crate::{Result, files, images};

/// Unseen scenes for reconstruction, and for CLIP's answers.
const SCENES: usize = 500;
/// Individuals of each class for the areas under the curves.
const INDIVIDUALS: usize = 24;
/// Prompts for which the generators draw an image each.
const PROMPTS: usize = 200;
/// Prompts drawn together.
const BATCH: usize = 25;
/// Images on the sheet of a generator: rows of all classes.
const SHEET: usize = 70;
/// Guidance and denoising steps of the measured samples.
const GUIDANCE_SCALE: f64 = 3.0;
const STEPS: usize = 20;

/// The rows of `model`. Sheets of reconstructions and samples are drawn into `sheets`, if given.
///
/// # Errors
/// When the checkpoint, or CLIP's for a generator, is not there or damaged.
pub fn rows(context: &Context, model: Model, sheets: Option<&Path>) -> Result<Vec<Row>> {
    let name = model.name();
    match model {
        Model::Vq => {
            let pixels = reconstructed_scenes(context)?;
            let (images, used) = vq::reconstruct(context, &pixels)?;
            Ok(vec![
                reconstruction(name, 25.0, &pixels, &images, sheets)?,
                Row::new(name, "codes used for these", Unit::Count, used as f64, None),
            ])
        }
        Model::Vae => {
            let pixels = reconstructed_scenes(context)?;
            let images = vae::reconstruct(context, &pixels)?;
            Ok(vec![reconstruction(name, 28.0, &pixels, &images, sheets)?])
        }
        Model::Clip => {
            let clip = Answers::open(context)?;
            let (scenes, pictures) = placed_scenes(context)?;
            let wanted: Vec<_> = scenes
                .iter()
                .filter_map(|s| Some((s.identity.class, s.setting?)))
                .collect();
            let (class, setting) = clip.right(&pictures, &wanted)?;
            let count = pictures.len();
            Ok(vec![
                Row::share(
                    name,
                    format!(
                        "names the class of {count} scenes, out of {}",
                        Class::ALL.len()
                    ),
                    class,
                    count,
                    Some(0.9),
                ),
                Row::share(
                    name,
                    format!("names the setting, out of {}", Setting::ALL.len()),
                    setting,
                    count,
                    Some(0.9),
                ),
                individuals(context, name, &clip.embedder)?,
            ])
        }
        Model::Dino => {
            let dino = DinoEmbedder::load(&context.out.join("dino"), &context.device)?;
            Ok(vec![individuals(context, name, &dino)?])
        }
        Model::Gpt => generator(context, name, "llamagen", sheets),
        Model::Sd3 => generator(context, name, "sd3", sheets),
        // Without nano Lumina there is nothing of it to measure.
        Model::Vqgan | Model::Chameleon if !context.out.join("lumina").is_dir() => Ok(Vec::new()),
        Model::Vqgan => {
            let pixels = reconstructed_scenes(context)?;
            let (images, used) = vq::reconstruct_chameleon(context, &pixels)?;
            let measure = format!(
                "codes used for these, of {}",
                context.settings.vqgan.codebook_size
            );
            Ok(vec![
                reconstruction(name, 25.0, &pixels, &images, sheets)?,
                Row::new(name, measure, Unit::Count, used as f64, None),
            ])
        }
        Model::Chameleon => generator(context, name, "lumina", sheets),
    }
}

fn reconstructed_scenes(context: &Context) -> Result<Tensor> {
    let scenes = context.unseen("reconstruction");
    scenes.pixels(&scenes.batch(0, SCENES), &context.device)
}

/// The mean PSNR of `images`, and a sheet with originals over reconstructions; both (b, 3, h, w) in [−1, 1].
fn reconstruction(
    name: &str,
    aim: f64,
    originals: &Tensor,
    images: &Tensor,
    sheets: Option<&Path>,
) -> Result<Row> {
    let error = (images.clamp(-1f32, 1f32)? - originals)?;
    let errors = error.sqr()?.flatten_from(1)?.mean(1)?.to_vec1::<f32>()?;
    let decibels = errors.iter().map(|&e| psnr(f64::from(e))).sum::<f64>() / errors.len() as f64;
    let count = Class::ALL.len();
    let rows = Tensor::cat(
        &[
            &originals.narrow(0, 0, count)?,
            &images.narrow(0, 0, count)?,
        ],
        0,
    )?;
    let file = format!("reconstructions-{name}.png");
    sheet(sheets, &file, &images::from_tensor(&rows)?)?;
    let measure = format!("PSNR of {} reconstructions", errors.len());
    Ok(Row::new(name, measure, Unit::Decibel, decibels, Some(aim)))
}

fn sheet(folder: Option<&Path>, name: &str, pictures: &[RgbImage]) -> Result<()> {
    let Some(folder) = folder else {
        return Ok(());
    };
    let sheet = images::grid(pictures, Class::ALL.len() as u32, 64, 2);
    files::write(&folder.join(name), &images::encode_png(&sheet)?)
}

/// What the checkpoint in `folder` draws for prompts of all classes and settings, and what CLIP sees in it.
fn generator(
    context: &Context,
    name: &str,
    folder: &str,
    sheets: Option<&Path>,
) -> Result<Vec<Row>> {
    let classes = Class::ALL.len();
    let wanted: Vec<(Class, Setting)> = (0..PROMPTS)
        .map(|i| {
            let setting = (3 * i + i / classes) % Setting::ALL.len();
            (Class::ALL[i % classes], Setting::ALL[setting])
        })
        .collect();
    let requests: Vec<Request> = wanted
        .iter()
        .zip(0..)
        .map(|(&(class, setting), seed)| Request {
            prompt: prompt(class, setting),
            seed,
        })
        .collect();
    let checkpoint = context.out.join(folder).display().to_string();
    let mut learner = open(&opening_for(&checkpoint, None, context.named_device)?)?;
    let mut sampling = family(&checkpoint)?.sampling();
    match &mut sampling {
        Sampling::Diffusion(settings) => {
            settings.guidance_scale = GUIDANCE_SCALE;
            settings.num_inference_steps = STEPS;
        }
        Sampling::Autoregressive(settings) => {
            settings.guidance_scale = GUIDANCE_SCALE;
            settings.top_k = 0;
        }
    }
    let mut pictures = Vec::new();
    for batch in requests.chunks(BATCH) {
        pictures.extend(learner.generate(batch, &sampling)?);
    }
    sheet(sheets, &format!("samples-{name}.png"), &pictures[..SHEET])?;
    let (class, setting) = Answers::open(context)?.right(&pictures, &wanted)?;
    Ok(vec![
        Row::share(
            name,
            format!("CLIP finds the class in {PROMPTS} samples"),
            class,
            PROMPTS,
            Some(0.8),
        ),
        Row::share(name, "CLIP finds the setting", setting, PROMPTS, Some(0.8)),
    ])
}

fn prompt(class: Class, setting: Setting) -> String {
    format!("a {} {}", class.word(), setting.phrase())
}

/// Unseen individuals in a setting, neither dressed nor recoloured, and their pictures.
fn placed_scenes(context: &Context) -> Result<(Vec<Scene>, Vec<RgbImage>)> {
    let scenes = context.unseen("answers");
    let placed: Vec<Scene> = (0..)
        .map(|number| scenes.scene(number))
        .filter(|s| s.setting.is_some() && s.accessory.is_none() && s.recolour.is_none())
        .take(SCENES)
        .collect();
    let pictures = scenes.draw(&placed);
    Ok((placed, pictures))
}

/// CLIP, asked which of all classes in all settings a picture shows.
struct Answers {
    embedder: ClipEmbedder,
    texts: Vec<(Class, Setting, Vec<f32>)>,
}

impl Answers {
    fn open(context: &Context) -> Result<Self> {
        let embedder = ClipEmbedder::load(&context.out.join("clip"), &context.device)?;
        let pairs: Vec<(Class, Setting)> = Class::ALL
            .iter()
            .flat_map(|&class| Setting::ALL.map(|setting| (class, setting)))
            .collect();
        let prompts: Vec<String> = pairs
            .iter()
            .map(|&(class, setting)| prompt(class, setting))
            .collect();
        let texts = embedder.texts(&prompts)?;
        let texts = pairs
            .into_iter()
            .zip(texts)
            .map(|((c, s), text)| (c, s, text))
            .collect();
        Ok(Self { embedder, texts })
    }

    /// For how many of `pictures` the nearest text names the wanted class, and for how many the wanted setting.
    fn right(&self, pictures: &[RgbImage], wanted: &[(Class, Setting)]) -> Result<(usize, usize)> {
        let (mut classes, mut settings) = (0, 0);
        for (embedding, wanted) in self.embedder.images(pictures)?.iter().zip(wanted) {
            let mut best = (f64::NEG_INFINITY, wanted.0, wanted.1);
            for (class, setting, text) in &self.texts {
                let similarity = cosine(embedding, text)?;
                if similarity > best.0 {
                    best = (similarity, *class, *setting);
                }
            }
            classes += usize::from(best.1 == wanted.0);
            settings += usize::from(best.2 == wanted.1);
        }
        Ok((classes, settings))
    }
}

/// The mean over the classes of the area under the curve that tells two pictures of one individual from pictures of
/// two individuals of the class, by the cosine of their embeddings; all in other settings.
fn individuals(context: &Context, name: &str, embedder: &impl ImageEmbedder) -> Result<Row> {
    let scenes = context.unseen("individuals");
    let mut sum = 0.0;
    for (index, class) in Class::ALL.into_iter().enumerate() {
        let pairs: Vec<[Scene; 2]> = (0..INDIVIDUALS)
            .map(|i| scenes.pair(index * INDIVIDUALS + i, class))
            .collect();
        let views = |side: usize| -> Result<Vec<Vec<f32>>> {
            let chosen: Vec<Scene> = pairs.iter().map(|pair| pair[side].clone()).collect();
            embedder.images(&scenes.draw(&chosen))
        };
        let (first, second) = (views(0)?, views(1)?);
        let (mut same, mut other) = (Vec::new(), Vec::new());
        for (i, a) in first.iter().enumerate() {
            for (j, b) in second.iter().enumerate() {
                let similarity = cosine(a, b)? as f32;
                if i == j {
                    same.push(similarity);
                } else if !alike(&pairs[i][0].identity, &pairs[j][0].identity) {
                    other.push(similarity);
                }
            }
        }
        sum += area_under_curve(&same, &other);
    }
    Ok(Row::new(
        name,
        "tells individuals of a class apart, area under the curve",
        Unit::Area,
        sum / Class::ALL.len() as f64,
        Some(0.9),
    ))
}

/// Whether two individuals share colours, pattern, marking and build, and differ by shades and proportions alone.
fn alike(a: &Identity, b: &Identity) -> bool {
    (a.body, a.accent, a.pattern, a.marking, a.build)
        == (b.body, b.accent, b.pattern, b.marking, b.build)
}
