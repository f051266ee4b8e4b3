//! What the nano job makes of the checkpoints: how much more a supervisor, a proxy-tuned and a directly tuned student
//! look like their subject than the untouched model does, and what they lose of the prompt.

use std::path::{Path, PathBuf};

use super::{Row, Unit};
use crate::config::Sampling;
use crate::config::{Document, Resolved, prompts};
use crate::console;
use crate::evaluation::embed::Evaluator;
use crate::evaluation::embedders::{ClipEmbedder, DinoEmbedder};
use crate::evaluation::metrics::{Scores, mean, standard_error};
use crate::images::folder;
use crate::models::{Request, open};
use crate::nano::pretrain::Context;
use crate::nano::subjects::{SUBJECTS, write_subjects};
use crate::pipeline::{self, Options, opening_for};
use crate::plan::derive_seed;
use crate::stream::Stop;
use crate::{Error, Result};

/// Two live subjects and two objects.
const CHOSEN: [&str; 4] = ["dog1", "cat2", "backpack1", "teapot1"];
/// Runs with one seed for each subject, and so on.
pub const RUNS: usize = 3 * CHOSEN.len();
/// Differences are to exceed so many of their standard errors.
const ERRORS: f64 = 3.0;
/// What CLIP-T may lose, as a share of the untouched model's.
const LOSS: f64 = 0.05;

/// Who is compared with whom: the row's model and words, the model's name in the report, whether there is an aim.
const COMPARED: [(&str, &str, &str, bool); 3] = [
    ("sd3", "supervisor", "supervisor", true),
    ("llamagen", "proxy-tuned", "proxy-tuned student", true),
    (
        "llamagen",
        "directly tuned",
        "directly tuned student",
        false,
    ),
];
const UNTOUCHED: &str = "untouched student";

/// The mean scores of one model in one run.
type Means = [f64; 3];
/// Their names.
const SCORES: [&str; 3] = ["DINO", "CLIP-I", "CLIP-T"];

/// Runs the pipeline `file` `runs` times with the checkpoints of `context`, each time with the next of four subjects,
/// with another seed after every four. Stores and run directories are temporary.
///
/// # Errors
/// Those of a run.
pub async fn rows(context: &Context, file: &Path, runs: usize) -> Result<Vec<Row>> {
    let folder = std::env::temp_dir().join(format!("proxytune-adaptation-{}", std::process::id()));
    let mut pairs: [Vec<(Means, Means)>; 3] = Default::default();
    for number in 0..runs {
        console::note(format!("adaptation {} of {runs}", number + 1));
        let measured = run(context, file, &folder, number).await;
        let removed = crate::files::remove_dir(&folder);
        // What stopped the run comes before what is wrong with its leftovers.
        for (pairs, pair) in pairs.iter_mut().zip(measured?) {
            pairs.push(pair);
        }
        removed?;
    }
    let mut rows = Vec::new();
    for ((model, words, _, aimed), pairs) in COMPARED.into_iter().zip(&pairs) {
        rows.extend(compared(model, words, aimed, pairs));
    }
    Ok(rows)
}

/// The rows of one adapted model: its scores beside those of the untouched one, run by run.
fn compared(model: &str, words: &str, aimed: bool, pairs: &[(Means, Means)]) -> Vec<Row> {
    let mut rows = Vec::new();
    if pairs.len() < 2 {
        return rows;
    }
    for (score, name) in SCORES.into_iter().enumerate() {
        let relative = name == "CLIP-T";
        // Beside the untouched model's mean: a single run's may be close to nothing.
        let untouched: Vec<f64> = pairs
            .iter()
            .map(|(_, untouched)| untouched[score])
            .collect();
        let whole = match relative {
            true => mean(&untouched),
            false => 1.0,
        };
        let changes: Vec<f64> = pairs
            .iter()
            .map(|(adapted, untouched)| (adapted[score] - untouched[score]) / whole)
            .collect();
        let (mean, error) = (mean(&changes), standard_error(&changes).unwrap_or_default());
        let (unit, measure, aim) = match relative {
            true => (Unit::Change, "beside the untouched model's", -LOSS),
            false => (
                Unit::Difference,
                "above the untouched model's, aim three standard errors",
                ERRORS * error,
            ),
        };
        rows.push(Row {
            standard_error: Some(error),
            ..Row::new(
                model,
                format!("{words}, {} runs: {name} {measure}", pairs.len()),
                unit,
                mean,
                aimed.then_some(aim),
            )
        });
    }
    rows
}

/// One run: for each of [`COMPARED`] its means and those of its untouched model.
async fn run(
    context: &Context,
    file: &Path,
    folder: &Path,
    number: usize,
) -> Result<[(Means, Means); 3]> {
    let text = crate::files::read_text(file, crate::files::SETTINGS)?;
    let name = CHOSEN[number % CHOSEN.len()];
    let photos = folder.join("subjects").join(name);
    write_subjects(&folder.join("subjects"))?;
    let class = SUBJECTS
        .iter()
        .find(|subject| subject.name == name)
        .map_or("", |subject| subject.identity.class.word());
    let subject = subject_of(&text, file)?;
    let checkpoint = |name: &str| context.out.join(name).display().to_string();
    let seed = 1 + number / CHOSEN.len();
    let overrides = [
        format!("seed={seed}"),
        format!("subject.\"{subject}\".images={}", photos.display()),
        format!("subject.\"{subject}\".class={class}"),
        format!("supervisor.device={}", context.named_device),
        format!("student.device={}", context.named_device),
        format!("evaluation.device={}", context.named_device),
        format!("supervisor.model={}", checkpoint("sd3")),
        format!("student.model={}", checkpoint("llamagen")),
        format!("evaluation.clip={}", checkpoint("clip")),
        format!("evaluation.dino={}", checkpoint("dino")),
    ];
    let options = Options {
        store: Some(folder.join("store")),
        out: folder.join("runs"),
        new: true,
        ..Options::new(file, text, &overrides)?
    };
    let outcome = pipeline::run(&options, Stop::default()).await?;
    let of = |name: &str| {
        outcome
            .report
            .models
            .iter()
            .find(|model| model.name == name)
            .and_then(|model| model.summary())
            .map(|s| [s.dino.mean, s.clip_i.mean, s.clip_t.mean])
            .ok_or_else(|| {
                Error::invalid(
                    format!("{} gives no scores of the {name}", file.display()),
                    "use a pipeline with supervisor, direct tuning and the untouched student",
                )
            })
    };
    let (student, supervisor) = (
        of(UNTOUCHED)?,
        untouched_supervisor(context, &options.resolved, photos)?,
    );
    let [first, second, third] = COMPARED.map(|(_, _, name, _)| of(name));
    Ok([(first?, supervisor), (second?, student), (third?, student)])
}

/// The name of the one subject of the pipeline `text`.
fn subject_of(text: &str, file: &Path) -> Result<String> {
    let resolved = Document::parse(
        text,
        &file.display().to_string(),
        &[],
        &crate::models::Registry,
    )
    .resolve()?;
    match resolved.subjects.as_slice() {
        [subject] => Ok(subject.name.clone()),
        subjects => Err(Error::invalid(
            format!("{} has {} subjects", file.display(), subjects.len()),
            "use a pipeline with one subject, such as pipelines/nano.toml",
        )),
    }
}

/// What the run's supervisor draws for the run's prompts before it has learnt anything, scored.
fn untouched_supervisor(context: &Context, resolved: &Resolved, photos: PathBuf) -> Result<Means> {
    let (Some((supervisor, _, sampling)), Some(subject)) =
        (resolved.teacher(), resolved.subjects.first())
    else {
        return Err(Error::invalid(
            "a pipeline without a supervisor",
            "use one that has one, such as pipelines/nano.toml",
        ));
    };
    let templates = resolved.evaluation.prompts.templates(&subject.class);
    let requests: Vec<Request> = templates
        .iter()
        .enumerate()
        .map(|(index, template)| Request {
            prompt: prompts::fill(template, &subject.token, &subject.class),
            seed: derive_seed(resolved.seed, "untouched supervisor", index),
        })
        .collect();
    let texts: Vec<String> = templates
        .iter()
        .map(|template| prompts::fill_without_token(template, &subject.class))
        .collect();
    let mut learner = open(&opening_for(&supervisor.model, None, supervisor.device)?)?;
    let images = learner.generate(&requests, &Sampling::Diffusion(sampling.clone()))?;
    let evaluator = Evaluator {
        clip: ClipEmbedder::load(&context.out.join("clip"), &context.device)?,
        dino: DinoEmbedder::load(&context.out.join("dino"), &context.device)?,
    };
    let references: Vec<_> = folder(&photos, Ok)?
        .photos
        .into_iter()
        .map(|photo| photo.image)
        .collect();
    let scores: Vec<Scores> = evaluator.score(
        &evaluator.embed(&references)?,
        &evaluator.embed(&images)?,
        &texts,
    )?;
    let mean_of = |score: fn(&Scores) -> f64| mean(&scores.iter().map(score).collect::<Vec<_>>());
    Ok([
        mean_of(|s| s.dino),
        mean_of(|s| s.clip_i),
        mean_of(|s| s.clip_t),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_compared_in_pairs() {
        let pairs = [
            ([0.6, 0.7, 0.19], [0.5, 0.5, 0.20]),
            ([0.4, 0.3, 0.38], [0.3, 0.2, 0.40]),
        ];
        let rows = compared("sd3", "supervisor", true, &pairs);
        assert!((rows[0].value - 0.1).abs() < 1e-12);
        // Both runs gain the same, however much they differ.
        assert!(rows[0].standard_error.unwrap() < 1e-12);
        assert_eq!(rows[0].met(), Some(true));
        // 0.2 and 0.1: mean 0.15, error 0.05.
        assert!((rows[1].standard_error.unwrap() - 0.05).abs() < 1e-12);
        assert_eq!(rows[1].met(), Some(true));
        assert!((rows[2].value + 0.05).abs() < 1e-12);
        assert_eq!(compared("x", "y", false, &pairs)[0].met(), None);
    }

    #[test]
    fn the_chosen_subjects_ship_and_half_of_them_live() {
        let live = CHOSEN.iter().filter(|name| {
            let subject = SUBJECTS.iter().find(|subject| subject.name == **name);
            subject.unwrap().identity.class.is_live()
        });
        assert_eq!(live.count(), 2);
    }
}
