//! How a backbone learns: what was typed over the family's defaults, and what of it has no effect.

use super::effect::{first_idle, unlike};
use super::family::Family;
use super::reader::{At, Faults};
use super::resolve::or;
use super::resolved::{
    Dtype, FlowMatching, LrScheduler, Optimizer, Prodigy, Training, Tuning, WeightingScheme,
};
use super::tree::Place;
use super::typed::{self, Typed};

/// Weights that are all trained are f32.
pub(super) fn check_dtype(
    dtype: &Typed<Dtype>,
    training: &typed::Training,
    role: &str,
    faults: &Faults,
) {
    if let Some(at) = dtype
        && matches!(at.value, Dtype::Bf16 | Dtype::F16)
        && or(&training.tuning, Tuning::Lora) == Tuning::Full
    {
        faults.push(
            &at.place,
            format!("{role}.dtype has no effect with tuning = \"full\": trained weights are f32"),
            "remove the line, or use tuning = \"lora\"",
        );
    }
}

/// What was typed for `role`, a model of `family` that `model` names, over `default`. `inherited` is what `default` itself was typed as, if
/// it was. Where all weights are trained, what an adapter would be like has no effect, unless `keeps_adapter`: somebody
/// inherits it.
pub(super) fn training(
    (role, family, model): (&str, Family, &Place),
    typed: &typed::Training,
    default: &Training,
    inherited: Option<&typed::Training>,
    keeps_adapter: bool,
    faults: &Faults,
) -> Training {
    let tuning = or(&typed.tuning, default.tuning);
    let adapter = if tuning == Tuning::Full && !keeps_adapter {
        let switch = typed
            .tuning
            .as_ref()
            .or_else(|| inherited.and_then(|typed| typed.tuning.as_ref()));
        let unlike = [
            ("rank", unlike(&typed.rank, &default.rank)),
            ("alpha", unlike(&typed.alpha, &default.alpha)),
            ("targets", unlike_targets(&typed.targets, &default.targets)),
        ];
        for (field, place) in unlike {
            let places = place.into_iter();
            if let Some(place) = first_idle(switch.map(|at| &at.place), places) {
                faults.push(
                    place,
                    format!("{role}.{field} has no effect with tuning = \"full\""),
                    "remove the line, or use tuning = \"lora\"",
                );
            }
        }
        None
    } else {
        Some(typed)
    };
    let rank = adapter.map_or(default.rank, |typed| or(&typed.rank, default.rank));
    let alpha = match adapter {
        Some(typed) if typed.rank.is_some() => or(&typed.alpha, rank as f64),
        Some(typed) => or(&typed.alpha, default.alpha),
        None => default.alpha,
    };
    let targets = adapter
        .and_then(|typed| typed.targets.as_ref())
        .map(|list| list.value.iter().map(|at| at.value.clone()).collect());
    let optimizer = or(&typed.optimizer, default.optimizer);
    let accumulation = &typed.gradient_accumulation_steps;
    // Prodigy's rate is of another kind than that of the others.
    let is_prodigy = |optimizer| optimizer == Optimizer::Prodigy;
    let rate = match is_prodigy(optimizer) == is_prodigy(default.optimizer) {
        true => default.learning_rate,
        false => family.learning_rate(optimizer),
    };
    let training = Training {
        tuning,
        steps: or(&typed.steps, default.steps),
        batch_size: or(&typed.batch_size, default.batch_size),
        gradient_accumulation_steps: or(accumulation, default.gradient_accumulation_steps),
        learning_rate: or(&typed.learning_rate, rate),
        optimizer,
        adam_beta1: or(&typed.adam_beta1, default.adam_beta1),
        adam_beta2: or(&typed.adam_beta2, default.adam_beta2),
        adam_epsilon: or(&typed.adam_epsilon, default.adam_epsilon),
        weight_decay: or(&typed.weight_decay, default.weight_decay),
        decay_vectors: default.decay_vectors,
        prodigy: prodigy(role, typed, (optimizer, default), inherited, faults),
        snr_gamma: snr_gamma((role, family, model), typed, default, faults),
        flow_matching: flow_matching((role, family, model), typed, default, inherited, faults),
        max_grad_norm: or(&typed.max_grad_norm, default.max_grad_norm),
        lr_scheduler: or(&typed.lr_scheduler, default.lr_scheduler),
        warmup_steps: or(&typed.warmup_steps, default.warmup_steps),
        rank,
        alpha,
        targets: targets.unwrap_or_else(|| default.targets.clone()),
        checkpoint_every: or(&typed.checkpoint_every, default.checkpoint_every),
        memory: or(&typed.memory, default.memory),
    };
    check_warmup(typed, default, &training, faults);
    training
}

/// What Prodigy is told. With another optimizer nothing, and what was typed for it has no effect.
fn prodigy(
    role: &str,
    typed: &typed::Training,
    (optimizer, default): (Optimizer, &Training),
    inherited: Option<&typed::Training>,
    faults: &Faults,
) -> Option<Prodigy> {
    let own = &typed.prodigy;
    if optimizer != Optimizer::Prodigy {
        let switch = typed.optimizer.as_ref();
        let switch = switch.or_else(|| inherited.and_then(|typed| typed.optimizer.as_ref()));
        for (field, place) in own.places() {
            if let Some(place) = first_idle(switch.map(|at| &at.place), place) {
                faults.push(
                    place,
                    format!("{role}.{field} has no effect without optimizer = \"prodigy\""),
                    "remove the line, or use optimizer = \"prodigy\"",
                );
            }
        }
        return None;
    }
    let default = default.prodigy.unwrap_or_default();
    let value = |typed: &Typed<f64>| typed.as_ref().map(|at| at.value);
    Some(Prodigy {
        beta3: value(&own.beta3).or(default.beta3),
        d0: or(&own.d0, default.d0),
        d_coef: or(&own.d_coef, default.d_coef),
        growth_rate: value(&own.growth_rate).or(default.growth_rate),
        decouple: or(&own.decouple, default.decouple),
        use_bias_correction: or(&own.use_bias_correction, default.use_bias_correction),
        safeguard_warmup: or(&own.safeguard_warmup, default.safeguard_warmup),
    })
}

/// Faults of the first of `fields` that was typed although `why`, which was said at `switch`.
fn without_effect<'a>(
    role: &str,
    switch: Option<&Place>,
    fields: impl IntoIterator<Item = (&'static str, Option<&'a Place>)>,
    (why, hint): (&str, &str),
    faults: &Faults,
) {
    for (field, place) in fields {
        if let Some(place) = first_idle(switch, place) {
            faults.push(place, format!("{role}.{field} has no effect {why}"), hint);
        }
    }
}

fn snr_gamma(
    (role, family, model): (&str, Family, &Place),
    typed: &typed::Training,
    default: &Training,
    faults: &Faults,
) -> Option<f64> {
    let own = &typed.snr_gamma;
    if !family.has_snr() {
        let field = ("snr_gamma", own.as_ref().map(|at| &at.place));
        let why = format!("on a {family} model");
        without_effect(
            role,
            Some(model),
            [field],
            (&why, "remove the line"),
            faults,
        );
        return None;
    }
    own.as_ref().map(|at| at.value).or(default.snr_gamma)
}

/// What a model of flow matching is trained on; each scheme has numbers of its own.
fn flow_matching(
    (role, family, model): (&str, Family, &Place),
    typed: &typed::Training,
    default: &Training,
    inherited: Option<&typed::Training>,
    faults: &Faults,
) -> Option<FlowMatching> {
    let own = &typed.flow_matching;
    let Some(default) = default.flow_matching else {
        let why = format!("on a {family} model");
        without_effect(
            role,
            Some(model),
            own.places(),
            (&why, "remove the line"),
            faults,
        );
        return None;
    };
    let scheme = or(&own.weighting_scheme, default.weighting_scheme);
    let numbers = match scheme == default.weighting_scheme {
        true => default,
        false => FlowMatching::weighted(scheme),
    };
    let switch = own.weighting_scheme.as_ref().or_else(|| {
        let inherited = inherited?;
        inherited.flow_matching.weighting_scheme.as_ref()
    });
    let of = |typed: &Typed<f64>, default: Option<f64>| default.map(|number| or(typed, number));
    let [_, logit_mean, logit_std, mode_scale] = own.places();
    for (needed, name, fields) in [
        (
            WeightingScheme::LogitNormal,
            "logit_normal",
            vec![logit_mean, logit_std],
        ),
        (WeightingScheme::Mode, "mode", vec![mode_scale]),
    ] {
        if scheme != needed {
            let why = format!("without weighting_scheme = \"{name}\"");
            let hint = format!("remove the line, or use weighting_scheme = \"{name}\"");
            let switch = switch.map(|at| &at.place);
            without_effect(role, switch, fields, (&why, &hint), faults);
        }
    }
    Some(FlowMatching {
        weighting_scheme: scheme,
        logit_mean: of(&own.logit_mean, numbers.logit_mean),
        logit_std: of(&own.logit_std, numbers.logit_std),
        mode_scale: of(&own.mode_scale, numbers.mode_scale),
    })
}

/// Reports a warm-up that is longer than its training, or that the scheduler does not have. What is wholly inherited
/// has been reported where it was typed.
fn check_warmup(typed: &typed::Training, default: &Training, training: &Training, faults: &Faults) {
    let warms_up = training.lr_scheduler != LrScheduler::Constant;
    let place = [
        typed.warmup_steps.as_ref().map(|at| &at.place),
        typed.steps.as_ref().map(|at| &at.place),
        typed.lr_scheduler.as_ref().map(|at| &at.place),
    ];
    if let Some(place) = place.into_iter().flatten().next()
        && warms_up
        && training.warmup_steps > training.steps
    {
        faults.push(
            place,
            format!(
                "{} warm-up steps are more than all {} steps",
                training.warmup_steps, training.steps
            ),
            "lower warmup_steps, or raise steps",
        );
    }
    if let Some(place) = unlike(&typed.warmup_steps, &default.warmup_steps)
        && training.warmup_steps > 0
        && !warms_up
    {
        faults.push(
            place,
            "warmup_steps has no effect with lr_scheduler = \"constant\"",
            "use lr_scheduler = \"constant_with_warmup\"",
        );
    }
}

fn unlike_targets<'a>(typed: &'a Typed<Vec<At<String>>>, default: &[String]) -> Option<&'a Place> {
    let typed = typed.as_ref()?;
    let same = typed.value.iter().map(|at| &at.value).eq(default);
    (!same).then_some(&typed.place)
}
