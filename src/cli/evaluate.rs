//! `proxytune evaluate`: scores images, or a model with an adapter, against reference photos.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::models::make_ready;
use super::sample::draw;
use super::unread::{say_unread, say_unscored};
use super::{Ended, EvaluateArgs, block_on, output_failed};
use crate::config::prompts::without_token;
use crate::config::{prompt_list, prompts};
use crate::console;
use crate::evaluation::captions::{captions, few, side_files};
use crate::evaluation::embed::{Evaluator, ImageEmbedder, Prepared};
use crate::evaluation::embedders::{ClipEmbedder, DinoEmbedder, Preparation};
use crate::evaluation::metrics::ScoredImage;
use crate::evaluation::report::{ModelScores, Report};
use crate::images::{Photo, expect_photos, folder};
use crate::models::Request;
use crate::models::locate;
use crate::models::reading::Prompt;
use crate::models::registry::evaluators;
use crate::pipeline::{device, use_threads};
use crate::plan::derive_seed;
use crate::stream::{Board, Worker};
use crate::{Error, Result};

/// Images to score: where they come from, each one's prompt and its text without the subject's token, and what the
/// output says about these.
struct Scored {
    name: String,
    prompts: Vec<(String, String)>,
    images: Vec<Prepared>,
    note: Option<String>,
}

pub(super) fn evaluate(args: &EvaluateArgs, out: &mut impl Write) -> Result<Ended> {
    args.nano.check()?;
    let (Some(references), Some(class)) = (&args.references, args.class.as_deref()) else {
        return Err(Error::invalid(
            "nothing to compare with",
            "give --references and --class, or --nano",
        ));
    };
    if args.compute.threads > 0 {
        use_threads(args.compute.threads);
    }
    let folders = [
        (Some(references), REFERENCES),
        (args.images.as_ref(), PICTURES),
    ];
    for (dir, what) in folders {
        if let Some(dir) = dir {
            expect_photos(dir).map_err(|error| named(error, what))?;
        }
    }
    let mut ended = Ended::Well;
    let [clip, dino] = evaluators(args.model.as_deref());
    let clip = args.clip.as_deref().unwrap_or(clip);
    let dino = args.dino.as_deref().unwrap_or(dino);
    make_ready([clip, dino])?;
    let preparation = Preparation::read(&locate(clip)?, &locate(dino)?)?;
    let folder = references;
    let references = photos(folder, REFERENCES, &preparation, &mut ended)?;
    let paths: Vec<_> = references.iter().map(|photo| photo.path.clone()).collect();
    if args.images.as_deref() != Some(folder.as_path()) {
        note_side_files(folder, &paths, false, &mut ended)?;
    }
    let references: Vec<_> = references.into_iter().map(|photo| photo.image).collect();
    let Scored {
        name,
        prompts,
        images,
        note,
    } = match (&args.images, &args.model) {
        (Some(dir), _) => {
            let photos = photos(dir, PICTURES, &preparation, &mut ended)?;
            let paths: Vec<_> = photos.iter().map(|photo| photo.path.clone()).collect();
            note_side_files(dir, &paths, true, &mut ended)?;
            given(dir, photos, &args.token, class)?
        }
        (None, Some(model)) => drawn(model, args, class, &preparation, &mut ended)?,
        (None, None) => {
            return Err(Error::invalid(
                "nothing to score",
                "give --images or --model",
            ));
        }
    };
    let texts: Vec<String> = prompts.iter().map(|(_, text)| text.clone()).collect();
    ended = ended.and(say_unscored(clip, &texts)?);
    let (clip, dino, on) = (locate(clip)?, locate(dino)?, device(args.compute.device)?);
    let (scores, protocol) = block_on(async move {
        let board = Board::default();
        let meter = board.meter("evaluate", "images");
        let build = move || {
            Ok(Evaluator {
                clip: ClipEmbedder::load(&clip, &on)?,
                dino: DinoEmbedder::load(&dino, &on)?,
            })
        };
        let worker = Worker::spawn("evaluator", build).await?;
        let score = move |evaluator: &mut Evaluator<ClipEmbedder, DinoEmbedder>| {
            let (references, generated) = (
                evaluator.embed_prepared(references)?,
                evaluator.embed_prepared(images)?,
            );
            let scores = evaluator.score(&references, &generated, &texts)?;
            Ok((
                scores,
                vec![evaluator.clip.description(), evaluator.dino.description()],
            ))
        };
        worker.call(&meter, score).await
    })?;
    let scored = scores
        .into_iter()
        .zip(&prompts)
        .map(|(scores, (prompt, _))| ScoredImage {
            subject: class.to_string(),
            prompt: prompt.clone(),
            run_seed: args.seed,
            scores,
        });
    let report = Report {
        models: vec![ModelScores {
            name,
            images: scored.collect(),
        }],
        ..Report::default()
    };
    write!(out, "{}", report.text()).map_err(output_failed)?;
    for sentence in protocol.into_iter().chain(note) {
        writeln!(out, "{sentence}").map_err(output_failed)?;
    }
    Ok(ended)
}

const REFERENCES: &str = "the subject's photos";
const PICTURES: &str = "pictures to score";

/// `error` of a folder that was to hold `what`.
fn named(error: Error, what: &str) -> Error {
    match error {
        Error::Invalid { what: fault, .. } => Error::invalid(
            fault,
            format!("name the folder with {what}, as JPEG, PNG or WebP"),
        ),
        other => other,
    }
}

/// The usable pictures in `dir`, which are to be `what`, at the size of the evaluators' input; the others are named.
fn photos(
    dir: &Path,
    what: &str,
    preparation: &Preparation,
    ended: &mut Ended,
) -> Result<Vec<Photo<Prepared>>> {
    let folder = folder(dir, |image| preparation.prepare(&image));
    let folder = folder.map_err(|error| named(error, what))?;
    for fault in &folder.set_aside {
        console::note(format!("warning: set aside: {fault}"));
        *ended = Ended::WithWarnings;
    }
    Ok(folder.photos)
}

/// Says which files in `dir` look like captions and are not read.
fn note_side_files(
    dir: &Path,
    pictures: &[PathBuf],
    only_unread: bool,
    ended: &mut Ended,
) -> Result<()> {
    let ignored = side_files(dir, pictures, only_unread)?;
    if !ignored.is_empty() {
        console::note(format!(
            "warning: {}: ignored: {}",
            dir.display(),
            few(&ignored)
        ));
        *ended = Ended::WithWarnings;
    }
    Ok(())
}

/// Images that are there already.
fn given(dir: &Path, photos: Vec<Photo<Prepared>>, token: &str, class: &str) -> Result<Scored> {
    let (paths, images): (Vec<_>, Vec<_>) = photos
        .into_iter()
        .map(|photo| (photo.path, photo.image))
        .unzip();
    let captions = captions(dir, &paths)?;
    let unnamed = prompts::fill_without_token("a {token} {class}", class);
    let without = captions.iter().filter(|caption| caption.is_none()).count();
    let note = (without > 0).then(|| {
        format!(
            "CLIP-T compares {without} of {} images, which have no prompt in metadata.jsonl or a .txt, with {unnamed:?}.",
            images.len()
        )
    });
    let prompts = captions.into_iter().map(|caption| match caption {
        Some(prompt) => {
            let text = without_token(&prompt, token);
            (prompt, text)
        }
        None => (unnamed.clone(), unnamed.clone()),
    });
    Ok(Scored {
        name: dir.display().to_string(),
        prompts: prompts.collect(),
        images,
        note,
    })
}

/// What `model` draws for the prompts that were asked for.
fn drawn(
    model: &str,
    args: &EvaluateArgs,
    class: &str,
    preparation: &Preparation,
    ended: &mut Ended,
) -> Result<Scored> {
    let mut requests = Vec::new();
    let mut texts = Vec::new();
    let templates = prompt_list(&args.prompts, &crate::models::Registry)?.templates(class);
    let mut read: Vec<Prompt> = templates
        .iter()
        .map(|template| Prompt::of(template, &args.token, class))
        .collect();
    let negative = args.sampling.negative_prompt.iter();
    read.extend(negative.map(|prompt| Prompt::from(prompt.as_str())));
    *ended = ended.and(say_unread(model, &read)?);
    for template in templates {
        for index in 0..args.images_per_prompt {
            let prompt = prompts::fill(&template, &args.token, class);
            texts.push((
                prompt.clone(),
                prompts::fill_without_token(&template, class),
            ));
            let seed = derive_seed(args.seed, &format!("evaluate/{template}"), index);
            requests.push(Request { prompt, seed });
        }
    }
    let mut images = Vec::with_capacity(requests.len());
    draw(
        model,
        args.adapter.as_deref(),
        &requests,
        &args.compute,
        &args.sampling,
        |_, image, _| {
            images.push(image);
            Ok(())
        },
    )?;
    Ok(Scored {
        name: model.to_string(),
        prompts: texts,
        images: images
            .iter()
            .map(|image| preparation.prepare(image))
            .collect::<Result<_>>()?,
        note: None,
    })
}
