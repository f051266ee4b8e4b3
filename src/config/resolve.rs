//! From what was typed to what it means: every default filled in, everything that can be known beforehand checked.

use std::path::Path;

use super::direct;
use super::effect::{first_idle, unlike};
use super::family::{Family, Kind};
use super::plan_size;
use super::prompts::PromptList;
use super::reader::{At, Faults, did_you_mean};
use super::resolved::*;
use super::subjects;
use super::surroundings::{Model, Surroundings};
use super::templates::{self, Token};
use super::training::{check_dtype, training};
use super::tree::Place;
use super::typed::{self, Typed};

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
pub(super) fn pipeline(
    typed: &typed::Pipeline,
    surroundings: &dyn Surroundings,
    faults: &Faults,
) -> Option<Resolved> {
    let subjects = subjects::resolve(typed, faults);
    let student = match &typed.student {
        Some(student) => resolve_student(student, &typed.direct, surroundings, faults),
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
            supervisor = resolve_supervisor(section, surroundings, faults);
            let family = supervisor.as_ref().map(|supervisor| supervisor.family);
            let sampling =
                family.and_then(|family| proxies_sampling(&typed.proxies, family, faults));
            let resolved = resolve_proxies(&typed.proxies, sampling, faults);
            proxies = resolved.sampling.is_some().then_some(resolved);
        }
        (None, Source::Proxies) => missing_section(faults, &typed.start, "supervisor", "nano-sd3"),
        (_, Source::Custom) => {
            no_effect_of_source(typed, source, faults);
            proxies = Some(resolve_proxies(&typed.proxies, None, faults));
        }
        (_, Source::References | Source::Augmented) => no_effect_of_source(typed, source, faults),
    }
    let evaluation = resolve_evaluation(&typed.evaluation, student.as_ref(), surroundings, faults);
    let student = student?;
    let direct = direct::resolve(typed, &student, faults);
    let resolved = Resolved {
        seed: or(&typed.seed, 0) as u64,
        threads: match or(&typed.threads, 0) {
            0 => surroundings.threads(),
            threads => threads,
        },
        subjects: subjects?,
        supervisor,
        proxies,
        student,
        direct,
        evaluation: evaluation?,
        channels: channels(&typed.channels),
    };
    plan_size::check(typed, &resolved, faults);
    let whole = source != Source::Proxies || resolved.teacher().is_some();
    whole.then_some(resolved)
}

fn missing_section(faults: &Faults, start: &Place, section: &str, model: &str) {
    faults.push(
        start,
        format!("there is no [{section}]"),
        format!("add the lines [{section}] and model = \"{model}\""),
    );
}

/// Reports what has no effect on a student that learns from another `source` than a supervisor's proxies.
fn no_effect_of_source(typed: &typed::Pipeline, source: Source, faults: &Faults) {
    let student = typed.student.as_ref();
    let switch = student.and_then(|student| student.source.as_ref());
    let switch = switch.map(|at| &at.place);
    let idle = |what: &str, place: Option<&Place>, why: &str, hint: &str| {
        if let Some(place) = first_idle(switch, place) {
            faults.push(place, format!("{what} has no effect {why}"), hint);
        }
    };
    let why = match source {
        Source::Custom => "beside a custom source",
        _ => "without proxies",
    };
    let mend = "remove it, or set student.source = \"proxies\"";
    let supervisor = typed.supervisor.iter();
    let supervisor = supervisor
        .flat_map(|section| std::iter::once(&section.place).chain(section.training.places()));
    idle("[supervisor]", first_idle(switch, supervisor), why, mend);
    if source == Source::Custom {
        for (_, place) in sampling_places(&typed.proxies.sampling) {
            let hint = "remove the line: the source's own program decides that";
            idle("how proxies are sampled", place, "on a custom source", hint);
        }
        return;
    }
    idle("[proxies]", typed.proxies.place.as_ref(), why, mend);
    let overlap = student.and_then(|student| unlike(&student.overlap, &OVERLAP));
    idle("student.overlap", overlap, why, mend);
}

/// What the model is that is to play `role`.
fn model(
    name: &At<String>,
    role: &str,
    fits: impl Fn(Kind) -> bool,
    surroundings: &dyn Surroundings,
    faults: &Faults,
) -> Option<Model> {
    let known = surroundings.models();
    match surroundings.model(&name.value) {
        Ok(model) if fits(model.family.kind()) => Some(model),
        Ok(model) => {
            let fitting = known.iter().filter(|(_, family)| fits(family.kind()));
            let fitting: Vec<&str> = fitting.map(|(name, _)| *name).collect();
            faults.push(
                &name.place,
                format!(
                    "{} is a {} model and cannot be the {role}",
                    name.value, model.family
                ),
                format!("models for this role are {}", fitting.join(", ")),
            );
            None
        }
        Err(error) => {
            let hint = match surroundings.names_a_place(&name.value) {
                true => error.hint().unwrap_or_default(),
                false => {
                    let names = known.iter().map(|(name, _)| *name);
                    did_you_mean(&name.value, names, "the known models are")
                }
            };
            faults.push(&name.place, error.to_string(), hint);
            None
        }
    }
}

fn resolution(typed: &Typed<usize>, model: Model, faults: &Faults) -> Option<usize> {
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
    typed.or(model.resolution)
}

fn resolve_supervisor(
    typed: &typed::Supervisor,
    surroundings: &dyn Surroundings,
    faults: &Faults,
) -> Option<Supervisor> {
    let name = typed.model.as_ref()?;
    let is_diffusion = |kind| kind == Kind::Diffusion;
    let model = model(name, "supervisor", is_diffusion, surroundings, faults)?;
    let family = model.family;
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
    let default = family.training();
    check_dtype(&typed.dtype, &typed.training, "supervisor", faults);
    let own = ("supervisor", family, &name.place);
    let mut supervisor = Supervisor {
        model: name.value.clone(),
        family,
        device: or(&typed.device, Device::Cpu),
        dtype: or(&typed.dtype, Dtype::Auto),
        resolution: resolution(&typed.resolution, model, faults),
        adapter: typed.adapter.as_ref().map(|at| at.value.clone().into()),
        adapter_digest: digest(
            ("supervisor.adapter", &typed.adapter),
            &typed.adapter_digest,
            "name the file or folder of an adapter",
            surroundings,
            faults,
        ),
        prompt: or(&typed.prompt, SUPERVISOR_PROMPT.to_string()),
        center_crop: or(&typed.center_crop, true),
        random_flip: or(&typed.random_flip, false),
        training: training(own, &typed.training, &default, None, false, faults),
        prior_preservation,
    };
    if let Some(adapter) = &typed.adapter {
        no_effect_of_learning(
            typed,
            &adapter.place,
            supervisor.training != default,
            faults,
        );
        supervisor.training = default;
        supervisor.prompt = SUPERVISOR_PROMPT.to_string();
        (supervisor.center_crop, supervisor.random_flip) = (true, false);
        supervisor.prior_preservation = None;
    }
    Some(supervisor)
}

/// The caption of references where nothing is typed.
const SUPERVISOR_PROMPT: &str = "a {token} {class}";

/// Reports what is said of how a supervisor learns whose adapter is given, at `switch`; `trains` says whether its training
/// is another than the default.
fn no_effect_of_learning(typed: &typed::Supervisor, switch: &Place, trains: bool, faults: &Faults) {
    let training = typed.training.places();
    let prior = typed.prior_preservation.as_ref().map(|prior| &prior.place);
    let prompt = unlike(&typed.prompt, &SUPERVISOR_PROMPT.to_string());
    for (what, place) in [
        (
            "how the supervisor learns",
            first_idle(Some(switch), training).filter(|_| trains),
        ),
        ("supervisor.prompt", first_idle(Some(switch), prompt)),
        (
            "supervisor.center_crop",
            first_idle(Some(switch), unlike(&typed.center_crop, &true)),
        ),
        (
            "supervisor.random_flip",
            first_idle(Some(switch), unlike(&typed.random_flip, &false)),
        ),
        (
            "[supervisor.prior_preservation]",
            first_idle(Some(switch), prior),
        ),
    ] {
        if let Some(place) = place {
            faults.push(
                place,
                format!("{what} has no effect with supervisor.adapter, which is learnt already"),
                "remove it, or remove supervisor.adapter",
            );
        }
    }
}

/// What was typed over `default`.
fn diffusion_sampling(
    typed: &typed::Sampling,
    default: DiffusionSampling,
    faults: &Faults,
) -> DiffusionSampling {
    let share = |typed: &Typed<f64>, whole: f64| {
        let share = typed.as_ref().map(|at| at.value);
        share.filter(|share| *share != whole)
    };
    let (start, stop) = (
        share(&typed.guidance_start, 0.0),
        share(&typed.guidance_stop, 1.0),
    );
    let place = [&typed.guidance_stop, &typed.guidance_start]
        .into_iter()
        .flatten()
        .next();
    if let Some(at) = place.filter(|_| start.unwrap_or(0.0) >= stop.unwrap_or(1.0)) {
        faults.push(
            &at.place,
            "guidance ends before it has begun",
            "set guidance_stop above guidance_start, or guidance_scale = 1 for no guidance",
        );
    }
    DiffusionSampling {
        num_inference_steps: or(&typed.num_inference_steps, default.num_inference_steps),
        guidance_scale: or(&typed.guidance_scale, default.guidance_scale),
        negative_prompt: or(&typed.negative_prompt, default.negative_prompt),
        guidance_start: start,
        guidance_stop: stop,
    }
}

/// Faults of what is said of drawing in `section` and has no effect on a model of `family`.
fn no_effect_of_sampling(section: &str, typed: &typed::Sampling, family: Family, faults: &Faults) {
    // Resolved files say that there is none.
    let is_none = typed
        .negative_prompt
        .as_ref()
        .is_some_and(|at| at.value.is_empty());
    let said = is_none && family.kind() == Kind::Diffusion;
    for (field, place) in sampling_places(typed) {
        let is_read = family.draws_with(field) || (said && field == "negative_prompt");
        if let Some(place) = place.filter(|_| !is_read) {
            faults.push(
                place,
                format!("{section}.{field} has no effect on a {family} model"),
                "remove the line",
            );
        }
    }
}

/// Where each setting of sampling was typed.
fn sampling_places(typed: &typed::Sampling) -> [(&'static str, Option<&Place>); 9] {
    fn place<T>(typed: &Typed<T>) -> Option<&Place> {
        typed.as_ref().map(|at| &at.place)
    }
    let typed::Sampling {
        guidance_scale,
        num_inference_steps,
        negative_prompt,
        guidance_start,
        guidance_stop,
        top_k,
        top_p,
        temperature,
        guidance_interval,
    } = typed;
    [
        ("guidance_scale", place(guidance_scale)),
        ("num_inference_steps", place(num_inference_steps)),
        ("negative_prompt", place(negative_prompt)),
        ("guidance_start", place(guidance_start)),
        ("guidance_stop", place(guidance_stop)),
        ("top_k", place(top_k)),
        ("top_p", place(top_p)),
        ("temperature", place(temperature)),
        ("guidance_interval", place(guidance_interval)),
    ]
}

/// How supervisors of `family` draw proxies.
fn proxies_sampling(
    typed: &typed::Proxies,
    family: Family,
    faults: &Faults,
) -> Option<DiffusionSampling> {
    no_effect_of_sampling("proxies", &typed.sampling, family, faults);
    let Sampling::Diffusion(default) = family.sampling() else {
        return None;
    };
    Some(diffusion_sampling(&typed.sampling, default, faults))
}

/// `sampling` is that of supervisors; a custom source has none.
fn resolve_proxies(
    typed: &typed::Proxies,
    sampling: Option<DiffusionSampling>,
    faults: &Faults,
) -> Proxies {
    let prompts = typed.prompts.as_ref().map(|list| {
        list.value
            .iter()
            .for_each(|template| templates::check(template, Token::Required, faults));
        list.value.iter().map(|at| at.value.clone()).collect()
    });
    Proxies {
        count: or(&typed.count, 100),
        batch_size: or(&typed.batch_size, 4),
        prompts: prompts.unwrap_or_else(|| vec!["a {token} {class}".to_string()]),
        sampling,
    }
}

fn resolve_student(
    typed: &typed::Student,
    direct: &typed::Direct,
    surroundings: &dyn Surroundings,
    faults: &Faults,
) -> Option<Student> {
    let name = typed.model.as_ref()?;
    let model = model(name, "student", Kind::draws, surroundings, faults)?;
    let family = model.family;
    let sampling = &typed.sampling;
    no_effect_of_sampling("student", sampling, family, faults);
    let resolved_sampling = match family.sampling() {
        Sampling::Diffusion(default) => {
            Sampling::Diffusion(diffusion_sampling(sampling, default, faults))
        }
        Sampling::Autoregressive(default) => Sampling::Autoregressive(AutoregressiveSampling {
            guidance_scale: or(&sampling.guidance_scale, default.guidance_scale),
            top_k: or(&sampling.top_k, default.top_k),
            top_p: or(&sampling.top_p, default.top_p),
            temperature: or(&sampling.temperature, default.temperature),
            guidance_interval: sampling.guidance_interval.as_ref().map(|at| at.value),
        }),
    };
    let default = family.training();
    check_dtype(&typed.dtype, &typed.training, "student", faults);
    let source = or(&typed.source, Source::Proxies);
    Some(Student {
        model: name.value.clone(),
        family,
        device: or(&typed.device, Device::Cpu),
        dtype: or(&typed.dtype, Dtype::Auto),
        resolution: resolution(&typed.resolution, model, faults),
        source,
        init: typed.init.as_ref().map(|at| at.value.clone().into()),
        init_digest: digest(
            ("student.init", &typed.init),
            &typed.init_digest,
            "name the folder of a trained student, such as student in a run's directory",
            surroundings,
            faults,
        ),
        training: training(
            ("student", family, &name.place),
            &typed.training,
            &default,
            None,
            or(&direct.training.tuning, Tuning::Full) == Tuning::Lora,
            faults,
        ),
        condition_dropout: or(&typed.condition_dropout, 0.1),
        dropout: dropout(
            ("student", &typed.dropout),
            (family, family.dropout()),
            &name.place,
            faults,
        ),
        overlap: match source {
            Source::Proxies | Source::Custom => or(&typed.overlap, OVERLAP),
            Source::References | Source::Augmented => OVERLAP,
        },
        sampling: resolved_sampling,
    })
}

/// The digest of the adapter that `field` names: as it was typed or, where it was not, as its files are now.
fn digest(
    (field, path): (&str, &Typed<String>),
    typed: &Typed<String>,
    hint: &str,
    surroundings: &dyn Surroundings,
    faults: &Faults,
) -> Option<String> {
    let Some(path) = path else {
        if let Some(digest) = typed {
            faults.push(
                &digest.place,
                format!("{field}_digest has no effect without {field}"),
                "remove the line",
            );
        }
        return None;
    };
    if let Some(digest) = typed {
        return Some(digest.value.clone());
    }
    match surroundings.digest(Path::new(&path.value)) {
        Ok(digest) => Some(digest),
        Err(error) => {
            faults.push(
                &path.place,
                format!("{field} cannot be read: {error}"),
                hint,
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
    surroundings: &dyn Surroundings,
    faults: &Faults,
) -> Option<Evaluation> {
    let [clip, dino] = surroundings.evaluators(student.map(|student| student.model.as_str()));
    let roles = [
        (&typed.clip, "CLIP of the evaluation", Kind::Clip),
        (&typed.dino, "DINO of the evaluation", Kind::Dino),
    ];
    let fits = roles.map(|(typed, role, wanted)| {
        let Some(name) = typed else { return true };
        model(name, role, |kind| kind == wanted, surroundings, faults).is_some()
    });
    let prompts = match &typed.prompts {
        None => Some(PromptList::DreamBooth),
        Some(typed::Prompts::Named(name)) => templates::read(name, surroundings, faults),
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
