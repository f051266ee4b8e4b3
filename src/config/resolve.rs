//! From what was typed to what it means: every default filled in, everything that can be known beforehand checked.

use std::path::Path;

use super::defaults;
use super::direct;
use super::effect::{first_idle, unlike};
use super::limits;
use super::models::{self, Family, Kind};
use super::prompts::PromptList;
use super::reader::{At, Faults, did_you_mean};
use super::resolved::*;
use super::subjects;
use super::templates::{self, Token};
use super::training::{check_dtype, training, training_defaults};
use super::tree::Place;
use super::typed::{self, Typed};
use crate::files;
use crate::hub::RepoId;

pub(super) fn place_of<'a, T>(typed: &'a Typed<T>, otherwise: &'a Place) -> &'a Place {
    typed.as_ref().map_or(otherwise, |at| &at.place)
}

/// What was typed, or else `default`.
pub(super) fn or<T: Clone>(typed: &Typed<T>, default: T) -> T {
    typed.as_ref().map_or(default, |at| at.value.clone())
}

/// The student's `overlap` where nothing is typed.
const OVERLAP: f64 = 0.5;

/// `None` only with a fault.
pub(super) fn pipeline(typed: &typed::Pipeline, faults: &Faults) -> Option<Resolved> {
    let subjects = subjects::resolve(typed, faults);
    let student = match &typed.student {
        Some(student) => resolve_student(student, &typed.direct, faults),
        None => {
            missing_section(faults, &typed.start, "student", "nano-llamagen");
            None
        }
    };
    let source = typed.student.as_ref().map_or(Source::Proxies, |student| {
        or(&student.source, Source::Proxies)
    });
    let mut supervisor = None;
    let mut proxies = None;
    match (&typed.supervisor, source) {
        (Some(section), Source::Proxies) => {
            supervisor = resolve_supervisor(section, faults);
            let family = supervisor
                .as_ref()
                .map_or(Family::Sd3, |supervisor| supervisor.family);
            proxies = Some(resolve_proxies(&typed.proxies, Some(family), faults));
        }
        (None, Source::Proxies) => missing_section(faults, &typed.start, "supervisor", "nano-sd3"),
        (_, Source::Custom) => {
            no_effect_of_supervisor(typed, faults);
            proxies = Some(resolve_proxies(&typed.proxies, None, faults));
        }
        (_, Source::References | Source::Augmented) => no_effect_of_proxies(typed, faults),
    }
    let evaluation = resolve_evaluation(&typed.evaluation, student.as_ref(), faults);
    let student = student?;
    let direct = direct::resolve(typed, &student, faults);
    let resolved = Resolved {
        seed: or(&typed.seed, 0) as u64,
        threads: threads(or(&typed.threads, 0)),
        subjects: subjects?,
        supervisor,
        proxies,
        student,
        direct,
        evaluation: evaluation?,
        channels: channels(&typed.channels),
    };
    check_plan(typed, &resolved, faults);
    let whole = source != Source::Proxies || resolved.teacher().is_some();
    whole.then_some(resolved)
}

/// Reports numbers that are in range, but together too large to be planned.
fn check_plan(typed: &typed::Pipeline, resolved: &Resolved, faults: &Faults) {
    let start = &typed.start;
    let subjects = resolved.subjects.len() as u128;
    let uses = |training: &Training| training.steps as u128 * training.examples_per_step() as u128;
    let student = typed.student.as_ref();
    let mut checks = vec![(
        uses(&resolved.student.training),
        limits::USES,
        student.map_or(start, |student| place_of(&student.training.steps, start)),
        "the examples of all steps of the student (steps · batch_size)",
    )];
    if let Some(direct) = resolved.direct() {
        checks.push((
            uses(&direct.training),
            limits::USES,
            place_of(&typed.direct.training.steps, start),
            "the examples of all steps of direct tuning (steps · batch_size)",
        ));
    }
    if let Some(proxies) = &resolved.proxies {
        checks.push((
            subjects * proxies.count as u128,
            limits::PICTURES,
            place_of(&typed.proxies.count, start),
            "the proxies of all subjects (subjects · count)",
        ));
    }
    if let (Some(supervisor), Some(section)) = (&resolved.supervisor, &typed.supervisor) {
        let prior = supervisor.prior_preservation.as_ref();
        let class_images = prior.map_or(0, |prior| prior.class_images as u128);
        checks.extend([
            (
                subjects * uses(&supervisor.training),
                limits::USES,
                place_of(&section.training.steps, &section.place),
                "the examples of all steps of the supervisors (subjects · steps · batch_size)",
            ),
            (
                subjects * class_images,
                limits::PICTURES,
                &section.place,
                "the class images of all subjects (subjects · class_images)",
            ),
        ]);
    }
    let prompts = resolved.subjects.iter().map(|subject| {
        let templates = resolved.evaluation.prompts.templates(&subject.class);
        templates.len() as u128
    });
    checks.push((
        prompts.sum::<u128>() * resolved.evaluation.images_per_prompt as u128,
        limits::PICTURES,
        place_of(&typed.evaluation.images_per_prompt, start),
        "the pictures of an evaluation (subjects · prompts · images_per_prompt)",
    ));
    for (number, most, place, what) in checks {
        if number > most as u128 {
            faults.push(
                place,
                format!("{what} are {number}"),
                format!("at most {most} can be planned beforehand"),
            );
        }
    }
}

fn missing_section(faults: &Faults, start: &Place, section: &str, model: &str) {
    faults.push(
        start,
        format!("there is no [{section}]"),
        format!("add the lines [{section}] and model = \"{model}\""),
    );
}

/// Reports what only a student that learns from proxies has a use for.
fn no_effect_of_proxies(typed: &typed::Pipeline, faults: &Faults) {
    let student = typed.student.as_ref();
    let switch = student.and_then(|student| student.source.as_ref());
    let switch = switch.map(|at| &at.place);
    let supervisor = typed.supervisor.iter();
    let supervisor = supervisor
        .flat_map(|section| std::iter::once(&section.place).chain(section.training.places()));
    let overlap = student.and_then(|student| unlike(&student.overlap, &OVERLAP));
    for (what, place) in [
        ("[supervisor]", first_idle(switch, supervisor)),
        ("[proxies]", first_idle(switch, &typed.proxies.place)),
        ("student.overlap", first_idle(switch, overlap)),
    ] {
        if let Some(place) = place {
            faults.push(
                place,
                format!("{what} has no effect without proxies"),
                "remove it, or set student.source = \"proxies\"",
            );
        }
    }
}

/// Reports a supervisor beside a source that needs none.
fn no_effect_of_supervisor(typed: &typed::Pipeline, faults: &Faults) {
    if let Some(section) = &typed.supervisor {
        faults.push(
            &section.place,
            "[supervisor] has no effect beside a custom source",
            "remove it, or set student.source = \"proxies\"",
        );
    }
}

fn threads(typed: usize) -> usize {
    match typed {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}

/// The family of a model that is to play `role`.
fn family(
    model: &At<String>,
    role: &str,
    fits: impl Fn(Family) -> bool,
    faults: &Faults,
) -> Option<Family> {
    match models::family(&model.value) {
        Ok(family) if fits(family) => Some(family),
        Ok(family) => {
            let fitting = models::KNOWN
                .iter()
                .filter(|model| fits(model.family))
                .map(|model| model.name);
            faults.push(
                &model.place,
                format!(
                    "{} is a {family} model and cannot be the {role}",
                    model.value
                ),
                format!(
                    "models for this role are {}",
                    fitting.collect::<Vec<_>>().join(", ")
                ),
            );
            None
        }
        Err(error) => {
            let names_a_place =
                Path::new(&model.value).is_dir() || RepoId::parse(&model.value).is_some();
            let hint = if names_a_place {
                error.hint().unwrap_or_default()
            } else {
                did_you_mean(
                    &model.value,
                    models::known_names().into_iter(),
                    "the known models are",
                )
            };
            faults.push(&model.place, error.to_string(), hint);
            None
        }
    }
}

fn resolution(typed: &Typed<usize>, model: &str, faults: &Faults) -> Option<usize> {
    if let Some(at) = typed
        && at.value % 8 != 0
    {
        faults.push(
            &at.place,
            format!("a resolution of {} is not a multiple of 8", at.value),
            format!("for example {}", at.value.next_multiple_of(8)),
        );
    }
    let typed = typed.as_ref().map(|at| at.value);
    typed.or_else(|| models::known(model).and_then(|model| model.resolution))
}

fn resolve_supervisor(typed: &typed::Supervisor, faults: &Faults) -> Option<Supervisor> {
    let model = typed.model.as_ref()?;
    let family = family(
        model,
        "supervisor",
        |family| family.kind() == Kind::Diffusion,
        faults,
    )?;
    let prior_preservation = typed.prior_preservation.as_ref().map(|prior| {
        if let Some(prompt) = &prior.prompt {
            templates::check(prompt, Token::Forbidden, faults);
        }
        PriorPreservation {
            class_images: or(&prior.class_images, 100),
            weight: or(&prior.weight, 1.0),
            prompt: or(&prior.prompt, "a {class}".to_string()),
        }
    });
    if let Some(prompt) = &typed.prompt {
        templates::check(prompt, Token::Required, faults);
    }
    let default = training_defaults(family);
    check_dtype(&typed.dtype, &typed.training, "supervisor", faults);
    Some(Supervisor {
        model: model.value.clone(),
        family,
        device: or(&typed.device, Device::Cpu),
        dtype: or(&typed.dtype, Dtype::Auto),
        resolution: resolution(&typed.resolution, &model.value, faults),
        prompt: or(&typed.prompt, "a {token} {class}".to_string()),
        training: training(
            ("supervisor", family),
            &typed.training,
            &default,
            None,
            false,
            faults,
        ),
        prior_preservation,
    })
}

fn diffusion_sampling(typed: &typed::Sampling, family: Family) -> DiffusionSampling {
    let default = defaults::diffusion_sampling(family);
    DiffusionSampling {
        num_inference_steps: or(&typed.num_inference_steps, default.num_inference_steps),
        guidance_scale: or(&typed.guidance_scale, default.guidance_scale),
        negative_prompt: or(&typed.negative_prompt, default.negative_prompt),
    }
}

/// Faults of what is said of drawing in `section` and has no effect on a model of `family`.
fn no_effect_of_sampling(section: &str, typed: &typed::Sampling, family: Family, faults: &Faults) {
    let negative = typed.negative_prompt.as_ref();
    for (field, place) in [
        (
            "num_inference_steps",
            typed.num_inference_steps.as_ref().map(|at| &at.place),
        ),
        // Resolved files say that there is none.
        (
            "negative_prompt",
            negative
                .filter(|at| family != Family::Flux || !at.value.is_empty())
                .map(|at| &at.place),
        ),
        ("top_k", typed.top_k.as_ref().map(|at| &at.place)),
        ("top_p", typed.top_p.as_ref().map(|at| &at.place)),
        (
            "temperature",
            typed.temperature.as_ref().map(|at| &at.place),
        ),
        (
            "guidance_interval",
            typed.guidance_interval.as_ref().map(|at| &at.place),
        ),
    ] {
        if let Some(place) = place.filter(|_| !draws_with(family, field)) {
            faults.push(
                place,
                format!("{section}.{field} has no effect on a {family} model"),
                "remove the line",
            );
        }
    }
}

/// Whether models of `family` draw with the setting `field`.
pub fn draws_with(family: Family, field: &str) -> bool {
    match field {
        "num_inference_steps" => family.kind() == Kind::Diffusion,
        // FLUX was distilled: there is no second prediction to lead away from.
        "negative_prompt" => family.kind() == Kind::Diffusion && family != Family::Flux,
        "top_k" | "top_p" | "temperature" => family.kind() == Kind::Autoregressive,
        "guidance_interval" => family == Family::LlamaGen,
        _ => true,
    }
}

/// `family` is that of the supervisor; a custom source has none.
fn resolve_proxies(typed: &typed::Proxies, family: Option<Family>, faults: &Faults) -> Proxies {
    let prompts = typed.prompts.as_ref().map(|list| {
        list.value
            .iter()
            .for_each(|template| templates::check(template, Token::Required, faults));
        list.value.iter().map(|at| at.value.clone()).collect()
    });
    match family {
        Some(family) => no_effect_of_sampling("proxies", &typed.sampling, family, faults),
        None => {
            let typed::Sampling {
                num_inference_steps,
                guidance_scale,
                negative_prompt,
                ..
            } = &typed.sampling;
            let steps = num_inference_steps.as_ref().map(|at| &at.place);
            let scale = guidance_scale.as_ref().map(|at| &at.place);
            let negative = negative_prompt.as_ref().map(|at| &at.place);
            for place in [steps, scale, negative].into_iter().flatten() {
                faults.push(
                    place,
                    "how proxies are sampled has no effect on a custom source",
                    "remove the line: the source's own program decides that",
                );
            }
        }
    }
    Proxies {
        count: or(&typed.count, 100),
        batch_size: or(&typed.batch_size, 4),
        prompts: prompts.unwrap_or_else(|| vec!["a {token} {class}".to_string()]),
        sampling: family.map(|family| diffusion_sampling(&typed.sampling, family)),
    }
}

fn resolve_student(
    typed: &typed::Student,
    direct: &typed::Direct,
    faults: &Faults,
) -> Option<Student> {
    let model = typed.model.as_ref()?;
    let family = family(
        model,
        "student",
        |family| family.kind() != Kind::Evaluator,
        faults,
    )?;
    let sampling = &typed.sampling;
    no_effect_of_sampling("student", sampling, family, faults);
    let resolved_sampling = if family.kind() == Kind::Diffusion {
        Sampling::Diffusion(diffusion_sampling(sampling, family))
    } else {
        let default = defaults::autoregressive_sampling(family);
        Sampling::Autoregressive(AutoregressiveSampling {
            guidance_scale: or(&sampling.guidance_scale, default.guidance_scale),
            top_k: or(&sampling.top_k, default.top_k),
            top_p: or(&sampling.top_p, default.top_p),
            temperature: or(&sampling.temperature, default.temperature),
            guidance_interval: sampling.guidance_interval.as_ref().map(|at| at.value),
        })
    };
    let default = training_defaults(family);
    check_dtype(&typed.dtype, &typed.training, "student", faults);
    let source = or(&typed.source, Source::Proxies);
    Some(Student {
        model: model.value.clone(),
        family,
        device: or(&typed.device, Device::Cpu),
        dtype: or(&typed.dtype, Dtype::Auto),
        resolution: resolution(&typed.resolution, &model.value, faults),
        source,
        init: typed.init.as_ref().map(|at| at.value.clone().into()),
        init_digest: init_digest(typed, faults),
        training: training(
            ("student", family),
            &typed.training,
            &default,
            None,
            or(&direct.training.tuning, Tuning::Full) == Tuning::Lora,
            faults,
        ),
        condition_dropout: or(&typed.condition_dropout, 0.1),
        dropout: dropout(
            ("student", &typed.dropout),
            (family, defaults::training(family).dropout),
            &model.place,
            faults,
        ),
        overlap: match source {
            Source::Proxies | Source::Custom => or(&typed.overlap, OVERLAP),
            Source::References | Source::Augmented => OVERLAP,
        },
        sampling: resolved_sampling,
    })
}

/// The digest of the adapter that the student starts from: as it was typed or, where it was not, as its files are now.
fn init_digest(typed: &typed::Student, faults: &Faults) -> Option<String> {
    let Some(init) = &typed.init else {
        if let Some(digest) = &typed.init_digest {
            faults.push(
                &digest.place,
                "student.init_digest has no effect without student.init",
                "remove the line",
            );
        }
        return None;
    };
    if let Some(digest) = &typed.init_digest {
        return Some(digest.value.clone());
    }
    match files::digest_dir(Path::new(&init.value)) {
        Ok(digest) => Some(digest),
        Err(error) => {
            faults.push(
                &init.place,
                format!("student.init cannot be read: {error}"),
                "name the folder of a trained student, such as student in a run's directory",
            );
            None
        }
    }
}

/// The dropout that was typed for `role`, or else the default; diffusion models have none.
pub(super) fn dropout(
    (role, typed): (&str, &Typed<f64>),
    (family, default): (Family, f64),
    model: &Place,
    faults: &Faults,
) -> f64 {
    if family.kind() != Kind::Diffusion {
        return or(typed, default);
    }
    if let Some(place) = first_idle(Some(model), unlike(typed, &default)) {
        faults.push(
            place,
            format!("{role}.dropout has no effect on a {family} model"),
            "remove the line",
        );
    }
    default
}

fn resolve_evaluation(
    typed: &typed::Evaluation,
    student: Option<&Student>,
    faults: &Faults,
) -> Option<Evaluation> {
    let [clip, dino] = models::evaluators(student.map(|student| student.model.as_str()));
    let fits = [(&typed.clip, Family::Clip), (&typed.dino, Family::Dino)].map(|(typed, wanted)| {
        let Some(model) = typed else { return true };
        let role = format!("{wanted} of the evaluation");
        family(model, &role, |family| family == wanted, faults).is_some()
    });
    let prompts = match &typed.prompts {
        None => Some(PromptList::DreamBooth),
        Some(typed::Prompts::Named(name)) => templates::read(name, faults),
        Some(typed::Prompts::Listed(templates)) => {
            templates
                .iter()
                .for_each(|template| templates::check(template, Token::Allowed, faults));
            Some(PromptList::Listed(
                templates.iter().map(|at| at.value.clone()).collect(),
            ))
        }
    };
    (fits == [true, true]).then_some(())?;
    Some(Evaluation {
        prompts: prompts?,
        images_per_prompt: or(&typed.images_per_prompt, 4),
        batch_size: or(&typed.batch_size, 5),
        every: or(&typed.every, 0),
        untouched: or(&typed.untouched, true),
        clip: or(&typed.clip, clip.to_string()),
        dino: or(&typed.dino, dino.to_string()),
        device: or(&typed.device, Device::Cpu),
    })
}

fn channels(typed: &typed::Channels) -> Channels {
    Channels {
        references: or(&typed.references, 4),
        supervisors: or(&typed.supervisors, 1),
        proxies: or(&typed.proxies, 2),
        kept: or(&typed.kept, 4),
        tokens: or(&typed.tokens, 16),
        checkpoints: or(&typed.checkpoints, 2),
        evaluations: or(&typed.evaluations, 4),
    }
}
