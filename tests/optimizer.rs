//! Optimizers against torch's and prodigyopt's recorded steps (`golden/optimizers.py`), AdamW against its definition in
//! f64 too; gradients that are accumulated; and that threads do not change a bit.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor, Var};
use proxytune::config::{self, LrScheduler};
use proxytune::training::TrainingLoop;
use proxytune::training::optimizer::{
    AdamWConfig, OptimizerConfig, ProdigyConfig, learning_rate_factor,
};
use proxytune::{Error, Result};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::support;

const SHAPES: [&[usize]; 4] = [&[7], &[3, 5], &[300, 200], &[16, 4099]];
const RATE: f64 = 1e-2;

/// What gradients' norms are clipped to.
const LIMIT: f64 = 5.0;

fn config() -> AdamWConfig {
    AdamWConfig {
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        decay_vectors: false,
    }
}

/// Every optimizer with these constants.
fn all() -> [OptimizerConfig; 3] {
    let adamw = config();
    let own = config::Prodigy::default();
    [
        OptimizerConfig::AdamW(adamw),
        OptimizerConfig::Prodigy(ProdigyConfig { adamw, own }),
        OptimizerConfig::Muon(adamw),
    ]
}

fn training(variables: &[(String, Var)], optimizer: &OptimizerConfig) -> TrainingLoop {
    TrainingLoop::new(variables.to_vec(), optimizer, Some(LIMIT)).unwrap()
}

/// One step along the gradients that [`loss`] gives for `step`. Returns their norm.
fn take(training: &mut TrainingLoop, step: u64, size: f64) -> Result<f64> {
    let variables = training.variables().to_vec();
    let loss = |_| Ok(loss(&variables, step, size).0);
    Ok(training.step(step as usize, RATE, 1, loss)?.grad_norm)
}

fn random(count: usize, seed: u64) -> Vec<f32> {
    let generator = ChaCha8Rng::seed_from_u64(seed);
    StandardNormal.sample_iter(generator).take(count).collect()
}

fn variables() -> Vec<(String, Var)> {
    SHAPES
        .iter()
        .enumerate()
        .map(|(i, shape)| {
            let values = random(shape.iter().product(), i as u64);
            let v = Var::from_vec(values, *shape, &Device::Cpu).unwrap();
            (format!("v{i}"), v)
        })
        .collect()
}

/// Σ v · (fixed random numbers) · `size`, and these numbers: its gradients.
fn loss(variables: &[(String, Var)], step: u64, size: f64) -> (Tensor, Vec<Vec<f32>>) {
    let mut loss = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu).unwrap();
    let mut all = Vec::new();
    for (i, (_, v)) in variables.iter().enumerate() {
        let values = random(v.elem_count(), 100 * step + i as u64);
        let g = (Tensor::from_vec(values, v.shape(), &Device::Cpu).unwrap() * size).unwrap();
        all.push(g.flatten_all().unwrap().to_vec1().unwrap());
        loss = (loss + (v.as_tensor() * g).unwrap().sum_all().unwrap()).unwrap();
    }
    (loss, all)
}

fn values(variables: &[(String, Var)]) -> Vec<Vec<f32>> {
    let flat = |v: &Var| v.flatten_all().unwrap().to_vec1().unwrap();
    variables.iter().map(|(_, v)| flat(v)).collect()
}

#[test]
fn steps_follow_the_definition_with_and_without_clipping() {
    let variables = variables();
    let mut optimizer = training(&variables, &OptimizerConfig::AdamW(config()));
    let mut wanted: Vec<Vec<[f64; 3]>> = values(&variables)
        .iter()
        .map(|v| v.iter().map(|w| [f64::from(*w), 0.0, 0.0]).collect())
        .collect();
    let c = config();
    for (step, size) in [(1u64, 1e-3), (2, 1.0), (3, 0.1)] {
        let (_, all) = loss(&variables, step, size);
        let norm = take(&mut optimizer, step, size).unwrap();
        let squares = all.iter().flatten().map(|g| f64::from(*g) * f64::from(*g));
        let wanted_norm = squares.sum::<f64>().sqrt();
        assert!((norm / wanted_norm - 1.0).abs() < 1e-9);
        let clip = (LIMIT / (wanted_norm + 1e-6)).min(1.0);
        for (i, (wanted, g)) in wanted.iter_mut().zip(&all).enumerate() {
            let decay = if SHAPES[i].len() >= 2 {
                1.0 - RATE * c.weight_decay
            } else {
                1.0
            };
            for ([w, m, v], g) in wanted.iter_mut().zip(g) {
                let g = f64::from(*g) * clip;
                *m = c.beta1 * *m + (1.0 - c.beta1) * g;
                *v = c.beta2 * *v + (1.0 - c.beta2) * g * g;
                let (m, v) = (
                    *m / (1.0 - c.beta1.powi(step as i32)),
                    *v / (1.0 - c.beta2.powi(step as i32)),
                );
                *w = *w * decay - RATE * m / (v.sqrt() + c.epsilon);
            }
        }
    }
    for (found, wanted) in values(&variables).iter().zip(&wanted) {
        for (found, [wanted, _, _]) in found.iter().zip(wanted) {
            assert!(
                (f64::from(*found) - wanted).abs() < 2e-6,
                "{found}, {wanted}"
            );
        }
    }
}

#[test]
fn a_step_is_equal_to_the_byte_for_one_two_and_three_threads() {
    for optimizer in all() {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let variables = variables();
                let mut training = training(&variables, &optimizer);
                let norms: Vec<u64> = (1..4)
                    .map(|step| take(&mut training, step, 1.0).unwrap().to_bits())
                    .collect();
                let bits = values(&variables).into_iter().flatten().map(f32::to_bits);
                (norms, bits.collect::<Vec<u32>>())
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(3), "{optimizer:?}");
    }
}

#[test]
fn an_optimizer_continues_from_its_state_and_refuses_what_is_not_finite() {
    for optimizer in all() {
        let (one, two) = (variables(), variables());
        let mut first = training(&one, &optimizer);
        let mut second = training(&two, &optimizer);
        take(&mut first, 1, 1.0).unwrap();
        take(&mut second, 1, 1.0).unwrap();
        let state: BTreeMap<String, Tensor> = second.state().unwrap();
        let mut second = training(&two, &optimizer);
        second.optimizer().load_state(&state).unwrap();
        for step in 2..5 {
            take(&mut first, step, 1.0).unwrap();
            take(&mut second, step, 1.0).unwrap();
        }
        assert_eq!(values(&one), values(&two), "{optimizer:?}");
        let before = values(&one);
        let error = take(&mut first, 5, f64::INFINITY).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        assert_eq!(values(&one), before, "{optimizer:?}");
        // What lacks something is refused, and nothing of it is taken.
        let kept = second.state().unwrap();
        for part in state.keys() {
            let mut partial = state.clone();
            partial.remove(part);
            let error = second.optimizer().load_state(&partial).unwrap_err();
            assert!(error.to_string().contains(part.as_str()), "{error}");
        }
        for (name, tensor) in second.state().unwrap() {
            let bits = |x: &Tensor| -> Vec<u64> {
                let values = x
                    .flatten_all()
                    .unwrap()
                    .to_dtype(candle_core::DType::F64)
                    .unwrap();
                let values = values.to_vec1::<f64>().unwrap();
                values.into_iter().map(f64::to_bits).collect()
            };
            assert_eq!(bits(&tensor), bits(&kept[&name]), "{optimizer:?} {name}");
        }
    }
}

#[test]
fn one_norm_is_taken_over_what_muon_and_adamw_move() {
    let device = &Device::Cpu;
    let ones = |shape: &[usize]| Var::ones(shape, candle_core::DType::F32, device).unwrap();
    let variables = vec![
        ("norm".to_string(), ones(&[16])),
        ("inner.weight".to_string(), ones(&[16, 16])),
    ];
    let optimizer = OptimizerConfig::Muon(AdamWConfig::default());
    let mut training = TrainingLoop::new(variables.clone(), &optimizer, Some(1.0)).unwrap();
    let sum = |i: usize, scale: f64| variables[i].1.as_tensor().sum_all()? * scale;
    let progress = training.step(0, 0.1, 1, |_| Ok((sum(0, 4.0)? + sum(1, 3.0)?)?));
    let norm = progress.unwrap().grad_norm;
    assert!((norm - (256.0 * 9.0 + 16.0 * 16.0f64).sqrt()).abs() < 1e-3);
    let state = training.state().unwrap();
    let first = |name: &str| {
        let tensor = state[name].flatten_all().unwrap();
        f64::from(tensor.to_vec1::<f32>().unwrap()[0])
    };
    assert!((first("norm.exp_avg") - 0.1 * 4.0 / norm).abs() < 1e-6);
    assert!((first("inner.weight.momentum_buffer") - 3.0 / norm).abs() < 1e-6);
}

#[test]
fn accumulated_gradients_are_those_of_the_mean_over_all_batches() {
    for optimizer in all() {
        let (whole, parts) = (variables(), variables());
        let mut at_once = training(&whole, &optimizer);
        let mut in_four = training(&parts, &optimizer);
        for step in 1..4 {
            let of =
                |variables: &[(String, Var)], part: u64| loss(variables, 4 * step + part, 1.0).0;
            let mean = |_| {
                let sum = (0..4)
                    .map(|part| of(&whole, part))
                    .reduce(|a, b| (a + b).unwrap());
                Ok((sum.unwrap() / 4.0)?)
            };
            let one = at_once.step(step as usize, RATE, 1, mean).unwrap();
            let each = |part: usize| Ok(of(&parts, part as u64));
            let four = in_four.step(step as usize, RATE, 4, each).unwrap();
            assert!(
                (one.grad_norm / four.grad_norm - 1.0).abs() < 1e-5,
                "{one:?} {four:?}"
            );
            assert!((one.loss - four.loss).abs() < 1e-3, "{one:?} {four:?}");
        }
        let pairs = values(&whole)
            .concat()
            .into_iter()
            .zip(values(&parts).concat());
        for (one, four) in pairs {
            assert!((one - four).abs() < 1e-5, "{optimizer:?}: {one} {four}");
        }
    }
}

/// How far parameters have come at each of 50 steps, against what the reference recorded: equal at each step and not
/// only in the end. `proxytune verify` compares the parameters themselves.
#[test]
fn adamw_and_prodigy_come_as_far_as_their_references_at_every_step() {
    for (component, cases) in [
        (
            "adamw",
            ["torch-defaults", "diffusers", "warm-up-and-cosine"],
        ),
        (
            "prodigy",
            ["library-defaults", "diffusers", "coupled-decay-and-warm-up"],
        ),
    ] {
        for case in cases {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
            let folder = folder.join(component).join(case);
            let mut command = support::program();
            command.args(["verify", component, "--tolerance", "1e-5", "--model"]);
            command.arg(folder.join("model")).arg("--reference");
            let said = support::say({
                command.arg(folder.join("reference.safetensors"));
                command
            });
            assert_eq!(said.code, Some(0), "{component} {case}: {said:?}");
            let apart = farthest(&folder, component);
            assert!(apart < 1e-5, "{component} {case}: {apart:.1e}");
        }
    }
}

/// The largest relative L2 difference of the ways that a parameter has come after any step.
fn farthest(folder: &Path, component: &str) -> f64 {
    let file = folder.join("reference.safetensors");
    let reference = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let text = std::fs::read_to_string(folder.join("model/config.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let (optimizer, limit) = described(component, &json);
    let names = reference
        .keys()
        .filter_map(|key| key.strip_prefix("input.parameters."));
    let variables: Vec<(String, Var)> = names
        .map(|name| {
            let start = &reference[&format!("input.parameters.{name}")];
            (name.to_string(), Var::from_tensor(start).unwrap())
        })
        .collect();
    let mut training = TrainingLoop::new(variables.clone(), &optimizer, limit).unwrap();
    let rates = reference["input.learning_rate"].to_vec1::<f64>().unwrap();
    assert_eq!(rates.len(), 50);
    let flat = |x: &Tensor| {
        let x = x.to_dtype(candle_core::DType::F64).unwrap();
        x.flatten_all().unwrap().to_vec1::<f64>().unwrap()
    };
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut farthest = 0f64;
    for (step, rate) in rates.into_iter().enumerate() {
        let part = |kind: &str, name: &str| reference[&format!("{kind}.{name}")].get(step).unwrap();
        let loss = |_| {
            let parts = variables
                .iter()
                .map(|(name, v)| (v.as_tensor() * part("input.gradients", name))?.sum_all());
            let sum = parts.reduce(|a, b| a? + b?).unwrap();
            Ok(sum?)
        };
        training.step(step, rate, 1, loss).unwrap();
        for (name, v) in &variables {
            let start = flat(&reference[&format!("input.parameters.{name}")]);
            let (ours, theirs) = (flat(v.as_tensor()), flat(&part("output", name)));
            let pairs = ours.iter().zip(&theirs);
            let apart: Vec<f64> = pairs.map(|(a, b)| a - b).collect();
            let way: Vec<f64> = theirs.iter().zip(&start).map(|(a, b)| a - b).collect();
            // Nothing has moved before a warm-up's second step, and what has moved by less than rounding is no measure.
            let rounding = 1e-7 * norm(&start);
            assert!(norm(&apart).is_finite(), "{name}");
            farthest = farthest.max((norm(&apart) - rounding).max(0.0) / norm(&way).max(1e-12));
        }
    }
    farthest
}

/// What a case's `config.json` asks for.
fn described(component: &str, json: &serde_json::Value) -> (OptimizerConfig, Option<f64>) {
    let real = |name: &str| json.get(name).and_then(serde_json::Value::as_f64);
    let flag = |name: &str| json.get(name).and_then(serde_json::Value::as_bool);
    let beta = |i: usize| json.get("betas").and_then(|betas| betas[i].as_f64());
    let decay = if component == "adamw" { 1e-2 } else { 0.0 };
    let adamw = AdamWConfig {
        beta1: beta(0).unwrap_or(0.9),
        beta2: beta(1).unwrap_or(0.999),
        epsilon: real("eps").unwrap_or(1e-8),
        weight_decay: real("weight_decay").unwrap_or(decay),
        decay_vectors: true,
    };
    let own = config::Prodigy {
        beta3: real("beta3"),
        d0: real("d0").unwrap_or(1e-6),
        d_coef: real("d_coef").unwrap_or(1.0),
        growth_rate: real("growth_rate"),
        decouple: flag("decouple").unwrap_or(true),
        use_bias_correction: flag("use_bias_correction").unwrap_or(false),
        safeguard_warmup: flag("safeguard_warmup").unwrap_or(false),
    };
    let optimizer = match component {
        "adamw" => OptimizerConfig::AdamW(adamw),
        _ => OptimizerConfig::Prodigy(ProdigyConfig { adamw, own }),
    };
    (optimizer, real("max_grad_norm"))
}

#[test]
fn diffusers_arguments_are_the_defaults_of_a_pipeline_that_trains_with_prodigy() {
    let flux = proxytune::models::flux::FAMILY.training();
    assert_eq!(flux.optimizer, config::Optimizer::Prodigy);
    assert_eq!(flux.learning_rate, 1.0);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/prodigy/diffusers");
    let text = std::fs::read_to_string(folder.join("model/config.json")).unwrap();
    let (recorded, limit) = described("prodigy", &serde_json::from_str(&text).unwrap());
    assert_eq!(OptimizerConfig::new(&flux), recorded);
    assert_eq!(limit, Some(flux.max_grad_norm));
}

/// Schedulers, warm-up steps, and the factor of each step by `get_scheduler` of transformers 5.24, to nine digits.
const SCHEDULES: [(LrScheduler, usize, &[f64]); 7] = [
    (LrScheduler::Constant, 3, &[1.0, 1.0, 1.0, 1.0]),
    (LrScheduler::ConstantWithWarmup, 1, &[0.0, 1.0, 1.0, 1.0]),
    (LrScheduler::ConstantWithWarmup, 4, &[0.0, 0.25, 0.5, 0.75]),
    (
        LrScheduler::Linear,
        0,
        &[1.0, 0.833333333, 0.666666667, 0.5, 0.333333333, 0.166666667],
    ),
    (
        LrScheduler::Linear,
        3,
        &[0.0, 0.333333333, 0.666666667, 1.0, 0.8, 0.6, 0.4, 0.2],
    ),
    (
        LrScheduler::Cosine,
        0,
        &[1.0, 0.933012702, 0.75, 0.5, 0.25, 0.066987298],
    ),
    (
        LrScheduler::Cosine,
        3,
        &[
            0.0,
            0.333333333,
            0.666666667,
            1.0,
            0.904508497,
            0.654508497,
            0.345491503,
            0.095491503,
        ],
    ),
];

#[test]
fn learning_rates_are_those_of_transformers() {
    for (scheduler, warmup_steps, factors) in SCHEDULES {
        for (step, wanted) in factors.iter().enumerate() {
            let factor = learning_rate_factor(scheduler, step, factors.len(), warmup_steps);
            assert!(
                (factor - wanted).abs() < 1e-9,
                "{scheduler:?}, {warmup_steps} warm-up steps, step {step}: {factor}, {wanted}"
            );
        }
    }
}

/// Two steps of torch 2's AdamW with a rate of 1e-2, β (0.9, 0.999) and a decay of 0.1.
#[test]
fn weights_and_moments_are_those_of_torch() {
    let v = Var::new(&[0.5f32, -1.25, 2.0], &Device::Cpu).unwrap();
    let variables = vec![("v".to_string(), v.clone())];
    let config = OptimizerConfig::AdamW(AdamWConfig {
        weight_decay: 0.1,
        ..AdamWConfig::default()
    });
    let mut optimizer = TrainingLoop::new(variables.clone(), &config, None).unwrap();
    for gradient in [[1e-3f32, -0.5, 2.0], [0.25, 0.5, -1.0]] {
        let gradient = Tensor::new(&gradient, &Device::Cpu).unwrap();
        let loss = |_| Ok((v.as_tensor() * &gradient)?.sum_all()?);
        optimizer.step(0, RATE, 1, loss).unwrap();
    }
    let state = optimizer.state().unwrap();
    let second = state["v.exp_avg_sq"].to_vec1::<f32>().unwrap();
    let found = [values(&variables).concat(), second].concat();
    let torch = [
        [0.481_542_5f32, -1.238_037_6, 1.983_348_7],
        [6.250_1e-5, 4.997_5e-4, 4.996_000_3e-3],
    ];
    for (found, torch) in found.iter().zip(torch.concat()) {
        assert!((found / torch - 1.0).abs() < 1e-6, "{found}, {torch}");
    }
}

const PIPELINE: &str = r#"
[subject.dog6]
images = "photos/dog6"
class = "dog"
[supervisor]
model = "flux.1-dev"
gradient_accumulation_steps = 4
batch_size = 1
[student]
model = "llamagen-xl"
"#;

#[test]
fn a_pipeline_names_its_optimizer_and_a_rate_goes_with_it() {
    let resolve = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        let document = config::Document::parse(
            PIPELINE,
            "test.toml",
            &overrides,
            &proxytune::models::Registry,
        );
        let resolved = document.resolve().unwrap();
        let text = resolved.to_toml().unwrap();
        let again =
            config::Document::parse(&text, "resolved.toml", &[], &proxytune::models::Registry);
        assert_eq!(again.resolve().unwrap(), resolved, "{text}");
        (resolved, text)
    };
    let (resolved, text) = resolve(&[]);
    let supervisor = &resolved.supervisor.as_ref().unwrap().training;
    assert_eq!(supervisor.optimizer, config::Optimizer::Prodigy);
    assert_eq!(supervisor.learning_rate, 1.0);
    assert_eq!(supervisor.examples_per_step(), 4);
    // Nothing is said of Prodigy where it is not used.
    assert_eq!(text.matches("prodigy_d0").count(), 1, "{text}");
    // FLUX with AdamW has a rate of AdamW's; the baseline inherits the student's optimizer, not its rate for another.
    let (resolved, _) = resolve(&[
        "supervisor.optimizer=adamw",
        "student.optimizer=prodigy",
        "student.prodigy_beta3=0.9",
        "student.prodigy_growth_rate=1.02",
    ]);
    assert_eq!(resolved.supervisor.unwrap().training.learning_rate, 1e-4);
    let (student, direct) = (resolved.student.training, resolved.direct.training);
    assert_eq!((student.learning_rate, direct.learning_rate), (1.0, 1.0));
    let own = direct.prodigy.unwrap();
    assert_eq!((own.beta3, own.growth_rate), (Some(0.9), Some(1.02)));
    let (resolved, _) = resolve(&["student.optimizer=prodigy", "direct.optimizer=muon"]);
    let direct = resolved.direct.training;
    assert_eq!((direct.learning_rate, direct.prodigy), (1e-4, None));
}
