//! Settings in keys: each struct of a resolved pipeline field by field. What cannot affect a result is named too, and
//! left out.

use super::Digest;
use crate::config::{
    AutoregressiveSampling, Device, DiffusionSampling, Direct, Dtype, Evaluation, Family,
    FlowMatching, LrScheduler, Optimizer, PriorPreservation, Prodigy, PromptList, Proxies,
    Resolved, Sampling, Source, Student, Subject, Supervisor, Training, Tuning, WeightingScheme,
};

/// Every setting of `resolved` that affects the result of a run.
pub(super) fn pipeline(digest: Digest, resolved: &Resolved) -> Digest {
    let Resolved {
        seed,
        threads,
        subjects,
        supervisor: teacher,
        proxies: made,
        student: learner,
        direct: baseline,
        evaluation: evaluated,
        channels: _,
    } = resolved;
    // Sums are cut into as many parts as there are threads.
    let digest = digest
        .number("seed", *seed)
        .number("threads", *threads as u64)
        .number("subjects", subjects.len() as u64);
    let digest = subjects.iter().fold(digest, subject);
    let digest = match teacher {
        Some(teacher) => supervisor(digest.field("section", "supervisor"), teacher)
            .field("model", &teacher.model),
        None => digest,
    };
    let digest = match made {
        Some(made) => proxies(digest.field("section", "proxies"), made),
        None => digest,
    };
    let digest = student(digest.field("section", "student"), learner);
    let digest = direct(digest.field("section", "direct"), baseline, learner.family);
    evaluation(digest.field("section", "evaluation"), evaluated)
}

fn subject(digest: Digest, subject: &Subject) -> Digest {
    let Subject {
        name,
        // what is in the folder counts, not where it lies
        images: _,
        class,
        token,
        replay,
    } = subject;
    let digest = digest
        .field("subject", name)
        .field("class", class)
        .field("token", token);
    optional(digest, "replay", replay.map(|count| count as u64))
}

/// All of a supervisor but its model, of which keys have the checkpoint's digest.
pub(super) fn supervisor(digest: Digest, supervisor: &Supervisor) -> Digest {
    let Supervisor {
        model: _,
        // the checkpoint is of one
        family,
        device,
        dtype: kept,
        resolution: side,
        // its digest says it better
        adapter: _,
        adapter_digest,
        prompt,
        center_crop,
        random_flip,
        training: learning,
        prior_preservation,
    } = supervisor;
    let digest = digest.field("device", device.kind());
    let digest = dtype(digest, *kept);
    let digest = resolution(digest, side.map(|side| side as u64));
    if let Some(adapter) = adapter_digest {
        // It is learnt already: nothing else affects it.
        return digest.field("adapter", adapter);
    }
    let digest = digest
        .field("prompt", prompt)
        .added(center_crop, &true, |digest, is| {
            digest.flag("centre crop", *is)
        })
        .added(random_flip, &false, |digest, is| {
            digest.flag("random flip", *is)
        });
    let digest = training(digest, learning, *family);
    match prior_preservation {
        None => digest,
        Some(PriorPreservation {
            class_images,
            weight,
            prompt,
        }) => digest
            .number("prior class images", *class_images as u64)
            .real("prior weight", *weight)
            .field("prior prompt", prompt),
    }
}

fn training(digest: Digest, training: &Training, family: Family) -> Digest {
    let Training {
        tuning,
        steps,
        batch_size,
        gradient_accumulation_steps,
        learning_rate,
        optimizer,
        adam_beta1,
        adam_beta2,
        adam_epsilon,
        weight_decay,
        decay_vectors,
        prodigy,
        snr_gamma,
        flow_matching: levels,
        max_grad_norm,
        lr_scheduler,
        warmup_steps,
        rank,
        alpha,
        targets,
        // a run that resumes comes to the same
        checkpoint_every: _,
        // and so does one that computes activations again
        memory: _,
    } = training;
    let digest = match tuning {
        Tuning::Full => digest.field("tuning", "full"),
        Tuning::Lora => digest
            .field("tuning", "lora")
            .number("rank", *rank as u64)
            .real("alpha", *alpha)
            .list("targets", targets),
    };
    let digest = digest
        .number("steps", *steps as u64)
        .number("batch size", *batch_size as u64)
        .added(gradient_accumulation_steps, &1, |digest, steps| {
            digest.number("gradient accumulation steps", *steps as u64)
        })
        .real("learning rate", *learning_rate)
        .field(
            "scheduler",
            match lr_scheduler {
                LrScheduler::Constant => "constant",
                LrScheduler::ConstantWithWarmup => "constant with warm-up",
                LrScheduler::Linear => "linear",
                LrScheduler::Cosine => "cosine",
            },
        )
        .number("warm-up steps", *warmup_steps as u64)
        .real("largest gradient norm", *max_grad_norm)
        .real("beta 1", *adam_beta1)
        .real("beta 2", *adam_beta2)
        .real("epsilon", *adam_epsilon)
        .real("weight decay", *weight_decay)
        .flag("vectors decay", *decay_vectors);
    let digest = optional_real(digest, "SNR gamma", *snr_gamma);
    let digest = digest.added(levels, &learnt_levels(family), flow_matching);
    match (optimizer, prodigy) {
        (Optimizer::Adamw, _) => digest.field("optimizer", "AdamW"),
        (Optimizer::Muon, _) => digest.field("optimizer", "Muon"),
        (Optimizer::Prodigy, own) => {
            let Prodigy {
                beta3,
                d0,
                d_coef,
                growth_rate,
                decouple,
                use_bias_correction,
                safeguard_warmup,
            } = own.unwrap_or_default();
            let digest = digest.field("optimizer", "Prodigy");
            let digest = optional_real(digest, "beta 3", beta3);
            let digest = digest.real("d0", d0).real("d coefficient", d_coef);
            optional_real(digest, "growth rate", growth_rate)
                .flag("decoupled decay", decouple)
                .flag("bias correction", use_bias_correction)
                .flag("safeguarded warm-up", safeguard_warmup)
        }
    }
}

/// The noise levels that models of `family` learnt before there were settings for it.
fn learnt_levels(family: Family) -> Option<FlowMatching> {
    let (weighting_scheme, normal) = match family.name() {
        "SD3" => (WeightingScheme::LogitNormal, Some((0.0, 1.0))),
        "FLUX" => (WeightingScheme::None, None),
        _ => return None,
    };
    Some(FlowMatching {
        weighting_scheme,
        logit_mean: normal.map(|(mean, _)| mean),
        logit_std: normal.map(|(_, std)| std),
        mode_scale: None,
    })
}

fn flow_matching(digest: Digest, levels: &Option<FlowMatching>) -> Digest {
    let Some(levels) = levels else {
        return digest;
    };
    let FlowMatching {
        weighting_scheme,
        logit_mean,
        logit_std,
        mode_scale,
    } = levels;
    let digest = digest.field(
        "weighting scheme",
        match weighting_scheme {
            WeightingScheme::SigmaSqrt => "sigma sqrt",
            WeightingScheme::LogitNormal => "logit normal",
            WeightingScheme::Mode => "mode",
            WeightingScheme::Cosmap => "cosmap",
            WeightingScheme::None => "none",
        },
    );
    let digest = optional_real(digest, "logit mean", *logit_mean);
    let digest = optional_real(digest, "logit deviation", *logit_std);
    optional_real(digest, "mode scale", *mode_scale)
}

fn proxies(digest: Digest, proxies: &Proxies) -> Digest {
    let Proxies {
        count,
        batch_size,
        prompts,
        sampling,
    } = proxies;
    let digest = digest
        .number("count", *count as u64)
        .number("batch size", *batch_size as u64)
        .list("prompts", prompts);
    match sampling {
        Some(sampling) => diffusion_sampling(digest, sampling),
        None => digest,
    }
}

fn student(digest: Digest, student: &Student) -> Digest {
    let Student {
        model,
        // the model is of one
        family,
        device,
        dtype: kept,
        resolution: side,
        source: learnt,
        // its digest says it better
        init: _,
        init_digest,
        training: learning,
        condition_dropout,
        dropout,
        overlap,
        sampling: drawing,
    } = student;
    let digest = digest.field("model", model).field("device", device.kind());
    let digest = dtype(digest, *kept);
    let digest = resolution(digest, side.map(|side| side as u64));
    let digest = source(digest, *learnt);
    let digest = match init_digest {
        Some(init) => digest.field("init", init),
        None => digest,
    };
    let digest = training(digest, learning, *family)
        .real("condition dropout", *condition_dropout)
        .real("dropout", *dropout)
        .real("overlap", *overlap);
    sampling(digest, drawing)
}

fn direct(digest: Digest, direct: &Direct, family: Family) -> Digest {
    let Direct {
        enabled,
        source: learnt,
        training: learning,
        condition_dropout,
        dropout,
    } = direct;
    let digest = digest.flag("enabled", *enabled);
    if !enabled {
        return digest;
    }
    training(source(digest, *learnt), learning, family)
        .real("condition dropout", *condition_dropout)
        .real("dropout", *dropout)
}

fn evaluation(digest: Digest, evaluation: &Evaluation) -> Digest {
    let Evaluation {
        prompts,
        images_per_prompt,
        batch_size,
        every,
        untouched,
        clip,
        dino,
        device,
    } = evaluation;
    let digest = match prompts {
        PromptList::DreamBooth => digest.field("prompts", "DreamBooth"),
        PromptList::Nano10 => digest.field("prompts", "nano 10"),
        PromptList::Listed(templates) => digest.list("prompts", templates),
    };
    digest
        .number("images per prompt", *images_per_prompt as u64)
        .number("batch size", *batch_size as u64)
        .number("every", *every as u64)
        .flag("untouched", *untouched)
        .field("CLIP", clip)
        .field("DINO", dino)
        .field("device", Device::kind(*device))
}

pub(super) fn sampling(digest: Digest, sampling: &Sampling) -> Digest {
    match sampling {
        Sampling::Diffusion(sampling) => diffusion_sampling(digest, sampling),
        Sampling::Autoregressive(sampling) => {
            let AutoregressiveSampling {
                guidance_scale,
                top_k,
                top_p,
                temperature,
                guidance_interval,
            } = sampling;
            let digest = digest
                .field("sampling", "autoregressive")
                .real("guidance scale", *guidance_scale)
                .number("top k", *top_k as u64)
                .real("top p", *top_p)
                .real("temperature", *temperature);
            let interval = guidance_interval.map(|tokens| tokens as u64);
            optional(digest, "guidance interval", interval)
        }
    }
}

pub(super) fn diffusion_sampling(digest: Digest, sampling: &DiffusionSampling) -> Digest {
    let DiffusionSampling {
        num_inference_steps,
        guidance_scale,
        negative_prompt,
        guidance_start,
        guidance_stop,
    } = sampling;
    let digest = digest
        .field("sampling", "diffusion")
        .number("inference steps", *num_inference_steps as u64)
        .real("guidance scale", *guidance_scale)
        .field("negative prompt", negative_prompt);
    let digest = optional_real(digest, "guidance start", *guidance_start);
    optional_real(digest, "guidance stop", *guidance_stop)
}

fn source(digest: Digest, source: Source) -> Digest {
    digest.field(
        "source",
        match source {
            Source::Proxies => "proxies",
            Source::References => "references",
            Source::Augmented => "augmented",
            Source::Custom => "custom",
        },
    )
}

/// The type of frozen weights; nothing where it is the checkpoint's own, which the checkpoint's digest says.
pub(super) fn dtype(digest: Digest, dtype: Dtype) -> Digest {
    match dtype {
        Dtype::Auto => digest,
        Dtype::F32 => digest.field("dtype", "f32"),
        Dtype::Bf16 => digest.field("dtype", "bf16"),
        Dtype::F16 => digest.field("dtype", "f16"),
    }
}

/// The side length in pixels; nothing where it is the checkpoint's own.
pub(super) fn resolution(digest: Digest, side: Option<u64>) -> Digest {
    optional(digest, "resolution", side)
}

fn optional(digest: Digest, name: &str, value: Option<u64>) -> Digest {
    match value {
        Some(value) => digest.number(name, value),
        None => digest,
    }
}

fn optional_real(digest: Digest, name: &str, value: Option<f64>) -> Digest {
    match value {
        Some(value) => digest.real(name, value),
        None => digest,
    }
}
