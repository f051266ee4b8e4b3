//! How good the nano checkpoints are, on scenes with individuals that no training saw: everything that stands in
//! `datasets/nano/README.md` as a figure.

use candle_core::Tensor;
use image::RgbImage;

use super::contrast::area_under_curve;
use super::{Context, Model, gpt, psnr, sd3, vae, vq};
use crate::evaluation::embed::{ImageEmbedder, TextEmbedder};
use crate::evaluation::embedders::{ClipEmbedder, DinoEmbedder};
use crate::evaluation::metrics::cosine;
use crate::nano::identity::{Class, Identity};
use crate::nano::world::{Scene, Setting};
use crate::{Result, files, images};

/// Unseen scenes for reconstruction, and for CLIP's answers.
const SCENES: usize = 500;
/// Individuals of each class for the areas under the curves.
const INDIVIDUALS: usize = 24;
/// Prompts for which the generators draw an image each.
const PROMPTS: usize = 100;
/// Images on the sheet of a generator: rows of all classes.
const SHEET: usize = 70;

/// Prints the measures of `models` as lines of Markdown tables, and draws sheets of reconstructions and samples beside the checkpoints.
pub fn all(context: &Context, models: &[Model]) -> Result<()> {
    println!("| model | measure | value |\n|---|---|---|");
    for model in models {
        match model {
            Model::Vq => {
                let pixels = reconstructed_scenes(context)?;
                let (reconstructions, used) = vq::reconstruct(context, &pixels)?;
                reconstruction(context, *model, &pixels, &reconstructions)?;
                println!("| vq | codes used by them | {used} |");
            }
            Model::Vae => {
                let pixels = reconstructed_scenes(context)?;
                reconstruction(
                    context,
                    *model,
                    &pixels,
                    &vae::reconstruct(context, &pixels)?,
                )?;
            }
            Model::Clip => {
                let clip = Answers::open(context)?;
                let (scenes, pictures) = placed_scenes(context)?;
                let wanted: Vec<_> = scenes
                    .iter()
                    .filter_map(|s| Some((s.identity.class, s.setting?)))
                    .collect();
                let (class, setting) = clip.shares(&pictures, &wanted)?;
                println!(
                    "| clip | names the class of {SCENES} scenes | {:.1} % |",
                    100.0 * class
                );
                println!("| clip | names the setting | {:.1} % |", 100.0 * setting);
                let area = individuals(context, &clip.embedder)?;
                println!(
                    "| clip | tells individuals of a class apart, area under the curve | {area:.3} |"
                );
            }
            Model::Dino => {
                let dino = DinoEmbedder::load(&context.out.join("dino"), &context.device)?;
                let area = individuals(context, &dino)?;
                println!(
                    "| dino | tells individuals of a class apart, area under the curve | {area:.3} |"
                );
            }
            Model::Gpt | Model::Sd3 => generator(context, *model)?,
        }
    }
    Ok(())
}

fn reconstructed_scenes(context: &Context) -> Result<Tensor> {
    let scenes = context.unseen("reconstruction");
    scenes.pixels(&scenes.batch(0, SCENES), &context.device)
}

/// Prints the mean PSNR of `images`, and draws originals over reconstructions; both (b, 3, h, w) in [−1, 1].
fn reconstruction(
    context: &Context,
    model: Model,
    originals: &Tensor,
    images: &Tensor,
) -> Result<()> {
    let error = (images.clamp(-1f32, 1f32)? - originals)?;
    let errors = error.sqr()?.flatten_from(1)?.mean(1)?.to_vec1::<f32>()?;
    let decibels = errors.iter().map(|&e| psnr(f64::from(e))).sum::<f64>() / errors.len() as f64;
    let name = model.name();
    println!("| {name} | PSNR of {SCENES} reconstructions | {decibels:.2} dB |");
    let count = Class::ALL.len();
    let rows = Tensor::cat(
        &[
            &originals.narrow(0, 0, count)?,
            &images.narrow(0, 0, count)?,
        ],
        0,
    )?;
    sheet(
        context,
        &format!("reconstructions-{name}.png"),
        &images::from_tensor(&rows)?,
    )
}

fn sheet(context: &Context, name: &str, pictures: &[RgbImage]) -> Result<()> {
    let sheet = images::grid(pictures, Class::ALL.len() as u32, 64, 2);
    files::write(&context.out.join(name), &images::encode_png(&sheet)?)
}

fn generator(context: &Context, model: Model) -> Result<()> {
    let wanted: Vec<(Class, Setting)> = (0..PROMPTS)
        .map(|i| {
            let class = Class::ALL[i % Class::ALL.len()];
            (
                class,
                Setting::ALL[(3 * i + i / Class::ALL.len()) % Setting::ALL.len()],
            )
        })
        .collect();
    let prompts: Vec<String> = wanted
        .iter()
        .map(|&(class, setting)| prompt(class, setting))
        .collect();
    let seeds: Vec<u64> = (0..PROMPTS as u64).collect();
    let pictures = match model {
        Model::Gpt => gpt::draw(context, &prompts, &seeds)?,
        _ => sd3::draw(context, &prompts, &seeds)?,
    };
    let name = model.name();
    sheet(context, &format!("samples-{name}.png"), &pictures[..SHEET])?;
    let (class, setting) = Answers::open(context)?.shares(&pictures, &wanted)?;
    println!(
        "| {name} | CLIP finds the class in {PROMPTS} samples | {:.1} % |",
        100.0 * class
    );
    println!(
        "| {name} | CLIP finds the setting | {:.1} % |",
        100.0 * setting
    );
    Ok(())
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

    /// The shares of `pictures` for which the nearest text names the wanted class, and the wanted setting.
    fn shares(&self, pictures: &[RgbImage], wanted: &[(Class, Setting)]) -> Result<(f64, f64)> {
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
        let count = wanted.len().max(1) as f64;
        Ok((classes as f64 / count, settings as f64 / count))
    }
}

/// The mean over the classes of the area under the curve that tells two pictures of one individual from pictures of
/// two individuals of the class, by the cosine of their embeddings; all in other settings.
fn individuals(context: &Context, embedder: &impl ImageEmbedder) -> Result<f64> {
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
    Ok(sum / Class::ALL.len() as f64)
}

/// Whether two individuals share colours, pattern, marking and build, and differ by shades and proportions alone.
fn alike(a: &Identity, b: &Identity) -> bool {
    (a.body, a.accent, a.pattern, a.marking, a.build)
        == (b.body, b.accent, b.pattern, b.marking, b.build)
}
