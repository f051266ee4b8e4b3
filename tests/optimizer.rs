//! AdamW against its definition in f64, and that threads do not change a bit.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use proxytune::Error;
use proxytune::config::LrScheduler;
use proxytune::training::optimizer::{AdamW, AdamWConfig, learning_rate_factor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

const SHAPES: [&[usize]; 4] = [&[7], &[3, 5], &[300, 200], &[16, 4099]];
const RATE: f64 = 1e-2;

fn config() -> AdamWConfig {
    AdamWConfig {
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        decay_vectors: false,
        max_grad_norm: Some(5.0),
    }
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

/// The gradients of Σ v · (fixed random numbers), scaled by `size`.
fn gradients(variables: &[(String, Var)], step: u64, size: f64) -> (GradStore, Vec<Vec<f32>>) {
    let mut loss = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu).unwrap();
    let mut all = Vec::new();
    for (i, (_, v)) in variables.iter().enumerate() {
        let values = random(v.elem_count(), 100 * step + i as u64);
        let g = (Tensor::from_vec(values, v.shape(), &Device::Cpu).unwrap() * size).unwrap();
        all.push(g.flatten_all().unwrap().to_vec1().unwrap());
        loss = (loss + (v.as_tensor() * g).unwrap().sum_all().unwrap()).unwrap();
    }
    (loss.backward().unwrap(), all)
}

fn values(variables: &[(String, Var)]) -> Vec<Vec<f32>> {
    let flat = |v: &Var| v.flatten_all().unwrap().to_vec1().unwrap();
    variables.iter().map(|(_, v)| flat(v)).collect()
}

#[test]
fn steps_follow_the_definition_with_and_without_clipping() {
    let variables = variables();
    let mut optimizer = AdamW::new(variables.clone(), config()).unwrap();
    let mut wanted: Vec<Vec<[f64; 3]>> = values(&variables)
        .iter()
        .map(|v| v.iter().map(|w| [f64::from(*w), 0.0, 0.0]).collect())
        .collect();
    let c = config();
    for (step, size) in [(1u64, 1e-3), (2, 1.0), (3, 0.1)] {
        let (store, all) = gradients(&variables, step, size);
        let norm = optimizer.step(&store, RATE).unwrap();
        let squares = all.iter().flatten().map(|g| f64::from(*g) * f64::from(*g));
        let wanted_norm = squares.sum::<f64>().sqrt();
        assert!((norm / wanted_norm - 1.0).abs() < 1e-9);
        let clip = (5.0 / (wanted_norm + 1e-6)).min(1.0);
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
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let variables = variables();
            let mut optimizer = AdamW::new(variables.clone(), config()).unwrap();
            let norms: Vec<u64> = (1..4)
                .map(|step| {
                    let (store, _) = gradients(&variables, step, 1.0);
                    optimizer.step(&store, RATE).unwrap().to_bits()
                })
                .collect();
            let bits = values(&variables).into_iter().flatten().map(f32::to_bits);
            (norms, bits.collect::<Vec<u32>>())
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(3));
}

#[test]
fn an_optimizer_continues_from_its_state_and_refuses_what_is_not_finite() {
    let (one, two) = (variables(), variables());
    let mut first = AdamW::new(one.clone(), config()).unwrap();
    let mut second = AdamW::new(two.clone(), config()).unwrap();
    first.step(&gradients(&one, 1, 1.0).0, RATE).unwrap();
    second.step(&gradients(&two, 1, 1.0).0, RATE).unwrap();
    let state: BTreeMap<String, Tensor> = second.state().unwrap();
    let mut second = AdamW::new(two.clone(), config()).unwrap();
    second.load_state(&state).unwrap();
    first.step(&gradients(&one, 2, 1.0).0, RATE).unwrap();
    second.step(&gradients(&two, 2, 1.0).0, RATE).unwrap();
    assert_eq!(values(&one), values(&two));
    let before = values(&one);
    let (store, _) = gradients(&one, 3, f64::INFINITY);
    let error = first.step(&store, RATE).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    assert_eq!(values(&one), before);
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
    let config = AdamWConfig {
        weight_decay: 0.1,
        ..AdamWConfig::default()
    };
    let mut optimizer = AdamW::new(variables.clone(), config).unwrap();
    for gradient in [[1e-3f32, -0.5, 2.0], [0.25, 0.5, -1.0]] {
        let gradient = Tensor::new(&gradient, &Device::Cpu).unwrap();
        let loss = (v.as_tensor() * gradient).unwrap().sum_all().unwrap();
        optimizer.step(&loss.backward().unwrap(), RATE).unwrap();
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
