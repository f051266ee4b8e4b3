//! `proxytune evaluate`: scores images, or a model with an adapter, against reference photos.

use std::io::Write;

use super::models::make_ready;
use super::sample::{Drawn, draw};
use super::{Ended, EvaluateArgs, block_on, output_failed};
use crate::config::{PromptList, locate, prompts};
use crate::evaluation::embed::{Evaluator, ImageEmbedder};
use crate::evaluation::embedders::{ClipEmbedder, DinoEmbedder};
use crate::evaluation::metrics::ScoredImage;
use crate::evaluation::report::{ModelScores, Report};
use crate::images::folder;
use crate::models::Request;
use crate::pipeline::{device, use_threads};
use crate::plan::derive_seed;
use crate::stream::{Board, Worker};
use crate::{Error, Result};

pub(super) fn evaluate(args: &EvaluateArgs, out: &mut impl Write) -> Result<Ended> {
    let (Some(references), Some(class)) = (&args.references, args.class.as_deref()) else {
        return Err(Error::invalid(
            "nothing to compare with",
            "give --references and --class, or --nano",
        ));
    };
    if args.compute.threads > 0 {
        use_threads(args.compute.threads);
    }
    let mut ended = Ended::Well;
    let mut photos = |dir: &std::path::Path| -> Result<Vec<(String, image::RgbImage)>> {
        let folder = folder(dir)?;
        for fault in &folder.set_aside {
            eprintln!("warning: set aside: {fault}");
            ended = Ended::WithWarnings;
        }
        let name = |path: &std::path::Path| {
            path.file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        };
        Ok(folder
            .photos
            .into_iter()
            .map(|photo| (name(&photo.path), photo.image))
            .collect())
    };
    let references: Vec<_> = photos(references)?
        .into_iter()
        .map(|(_, image)| image)
        .collect();
    make_ready([args.clip.as_str(), &args.dino])?;
    let (name, prompts, images) = match (&args.images, &args.model) {
        (Some(dir), _) => {
            let named = photos(dir)?;
            let prompt = prompts::fill_without_token("a {token} {class}", class);
            let prompts: Vec<(String, String)> = named
                .iter()
                .map(|_| (prompt.clone(), prompt.clone()))
                .collect();
            (
                dir.display().to_string(),
                prompts,
                named
                    .into_iter()
                    .map(|(_, image)| image)
                    .collect::<Vec<_>>(),
            )
        }
        (None, Some(model)) => {
            let templates = templates(&args.prompts, class)?;
            let mut requests = Vec::new();
            let mut texts = Vec::new();
            for template in &templates {
                for index in 0..args.images_per_prompt {
                    let prompt = prompts::fill(template, &args.token, class);
                    texts.push((prompt.clone(), prompts::fill_without_token(template, class)));
                    let seed = derive_seed(args.seed, &format!("evaluate/{template}"), index);
                    requests.push(Request { prompt, seed });
                }
            }
            let Drawn { images, .. } = draw(
                model,
                args.adapter.as_deref(),
                &requests,
                &args.compute,
                &args.sampling,
            )?;
            (model.clone(), texts, images)
        }
        (None, None) => {
            return Err(Error::invalid(
                "nothing to score",
                "give --images or --model",
            ));
        }
    };
    let (clip, dino, on) = (
        locate(&args.clip)?,
        locate(&args.dino)?,
        device(args.compute.device)?,
    );
    let texts: Vec<String> = prompts.iter().map(|(_, text)| text.clone()).collect();
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
            let (references, generated) =
                (evaluator.embed(&references)?, evaluator.embed(&images)?);
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
    for sentence in protocol {
        writeln!(out, "{sentence}").map_err(output_failed)?;
    }
    Ok(ended)
}

fn templates(list: &str, class: &str) -> Result<Vec<String>> {
    if let Some(list) = PromptList::named(list) {
        return Ok(list.templates(class));
    }
    let path = std::path::Path::new(list);
    let text = std::fs::read_to_string(path).map_err(|_| {
        Error::invalid(
            format!("{list:?} is no list of prompts"),
            "dreambooth, nano-10, or a file with one prompt per line",
        )
    })?;
    Ok(prompts::lines(&text)
        .map(|(_, line)| line.to_string())
        .collect())
}
