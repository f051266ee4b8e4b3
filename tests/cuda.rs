//! The fused operations on a card against their plain forms in f64 on the CPU: values and gradients, on random shapes,
//! strides and masks, in every type. Where there is no card the tests say so and pass.

use candle_core::{DType, Device, Tensor, Var};
use proxytune::Result;
use proxytune::nn::ops::Mask;
use proxytune::nn::{backward, layout, no_grad, ops, plain, recompute, recomputing};
use proxytune::training::TrainingLoop;
use proxytune::training::optimizer::{AdamWConfig, OptimizerConfig, ProdigyConfig};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// Shapes that are tried of each operation.
const SHAPES: u64 = 6;

fn card() -> Option<Device> {
    match proxytune::pipeline::device(proxytune::config::Device::Cuda(0)) {
        Ok(device) => Some(device),
        Err(error) => {
            eprintln!("skipped, since there is no card: {error}");
            None
        }
    }
}

fn random(shape: &[usize], generator: &mut ChaCha8Rng) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> = StandardNormal.sample_iter(generator).take(count).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// How far results may be off, as a share of the norm.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 4e-3,
        _ => 3e-2,
    }
}

fn flat(x: &Tensor) -> Vec<f64> {
    let x = x.to_device(&Device::Cpu).unwrap();
    let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    x.to_vec1().unwrap()
}

fn assert_close(found: &Tensor, wanted: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(found.dims(), wanted.dims(), "{what}");
    let (found, wanted) = (flat(found), flat(wanted));
    let norm = wanted.iter().map(|w| w * w).sum::<f64>().sqrt();
    let off = found.iter().zip(&wanted).map(|(f, w)| (f - w) * (f - w));
    let off = off.sum::<f64>().sqrt();
    assert!(
        off <= tolerance * norm + 1e-12,
        "{what}: off by {off:e} of {norm:e}"
    );
}

type Function<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// The result, and the gradients of Σ result · weights for the inputs that are tracked.
fn differentiate(
    function: Function,
    inputs: &[Tensor],
    tracked: &[bool],
    weights: &mut Option<Tensor>,
) -> (Tensor, Vec<Option<Tensor>>) {
    let inputs: Vec<Tensor> = inputs
        .iter()
        .zip(tracked)
        .map(|(t, tracked)| match tracked {
            true => Var::from_tensor(t).unwrap().into_inner(),
            false => t.clone(),
        })
        .collect();
    let y = function(&inputs).unwrap();
    if !y.track_op() {
        return (y, vec![None; inputs.len()]);
    }
    let weights = weights.get_or_insert_with(|| {
        random(y.dims(), &mut ChaCha8Rng::seed_from_u64(77))
            .to_dtype(DType::BF16)
            .unwrap()
    });
    let weights = weights.to_dtype(y.dtype()).unwrap();
    let weights = weights.to_device(y.device()).unwrap();
    let loss = (&y * weights).unwrap().sum_all().unwrap();
    let candles = loss.backward().unwrap();
    let ours = backward(&loss).unwrap();
    for input in &inputs {
        if let Some(gradient) = candles.get(input) {
            let same = ours.get(input).unwrap();
            assert_eq!(flat(gradient), flat(same), "candle's backward and ours");
        }
    }
    let gradients = inputs.iter().map(|t| ours.get(t).cloned()).collect();
    (y, gradients)
}

/// Compares `fused` on the card with `plain` in f64, for every type of the first `typed` inputs; the others stay in f32.
fn compare(
    name: &str,
    inputs: &[Tensor],
    typed: usize,
    tracked: &[bool],
    fused: Function,
    plain: Function,
) {
    let Some(card) = card() else { return };
    for dtype in TYPES {
        let on_card: Vec<Tensor> = inputs
            .iter()
            .enumerate()
            .map(|(i, x)| {
                // A view of something larger, with strides of its own.
                let dtype = if i < typed { dtype } else { x.dtype() };
                let x = x.to_dtype(dtype).unwrap().to_device(&card).unwrap();
                match tracked[i] || x.rank() == 0 || !x.dtype().is_float() {
                    true => x,
                    false => {
                        let wide = Tensor::cat(&[&x, &x, &x], 0).unwrap();
                        wide.narrow(0, x.dim(0).unwrap(), x.dim(0).unwrap())
                            .unwrap()
                    }
                }
            })
            .collect();
        let exact: Vec<Tensor> = on_card
            .iter()
            .map(|x| {
                let x = x.to_device(&Device::Cpu).unwrap();
                match x.dtype().is_float() {
                    true => x.to_dtype(DType::F64).unwrap(),
                    false => x,
                }
            })
            .collect();
        let mut weights = None;
        let (y, gradients) = differentiate(fused, &on_card, tracked, &mut weights);
        let (wanted, wanted_gradients) = differentiate(plain, &exact, tracked, &mut weights);
        let allowed = tolerance(dtype);
        assert_close(&y, &wanted, allowed, &format!("{name} in {dtype:?}"));
        for (i, (found, wanted)) in gradients.iter().zip(&wanted_gradients).enumerate() {
            // candle also finds gradients of what is frozen.
            assert_eq!(found.is_some(), tracked[i], "{name}, gradient {i}");
            if let (Some(found), Some(wanted)) = (found, wanted) {
                let what = format!("{name} in {dtype:?}, gradient {i}");
                assert_close(found, wanted, allowed, &what);
            }
        }
        let without = no_grad(|| {
            let inputs: Vec<Tensor> = on_card.iter().map(Tensor::detach).collect();
            fused(&inputs).unwrap()
        });
        assert!(!without.track_op(), "{name}");
        let what = format!("{name} in {dtype:?} without a graph");
        assert_close(&without, &wanted, allowed, &what);
    }
}

fn each_shape(body: impl Fn(&mut ChaCha8Rng)) {
    for seed in 0..SHAPES {
        body(&mut ChaCha8Rng::seed_from_u64(seed));
    }
}

#[test]
fn norms() {
    each_shape(|g| {
        let (b, n, c) = (
            g.random_range(1..4),
            g.random_range(1..40),
            g.random_range(1..700),
        );
        let inputs = [random(&[b, n, c], g), random(&[c], g), random(&[c], g)];
        for tracked in [[true, false, false], [true, true, true]] {
            compare(
                "layer_norm",
                &inputs,
                3,
                &tracked,
                &|x| ops::layer_norm(&x[0], Some(&x[1]), Some(&x[2]), 1e-5),
                &|x| plain::layer_norm(&x[0], Some(&x[1]), Some(&x[2]), 1e-5),
            );
            compare(
                "rms_norm",
                &inputs[..2],
                2,
                &tracked[..2],
                &|x| ops::rms_norm(&x[0], &x[1], 1e-5),
                &|x| plain::rms_norm(&x[0], &x[1], 1e-5),
            );
        }
        compare(
            "layer_norm alone, of heads",
            &inputs[..1],
            1,
            &[true],
            &|x| ops::layer_norm(&x[0].unsqueeze(2)?.transpose(1, 2)?, None, None, 1e-5),
            &|x| plain::layer_norm(&x[0].unsqueeze(2)?.transpose(1, 2)?, None, None, 1e-5),
        );
    });
}

#[test]
fn group_norms() {
    each_shape(|g| {
        let (b, groups, each, side) = (
            g.random_range(1..3),
            g.random_range(1..5),
            g.random_range(1..5),
            g.random_range(2..20),
        );
        let c = groups * each;
        let inputs = [
            random(&[b, c, side, side + 1], g),
            random(&[c], g),
            random(&[c], g),
        ];
        for tracked in [[true, false, false], [true, true, true]] {
            compare(
                "group_norm",
                &inputs,
                3,
                &tracked,
                &move |x| ops::group_norm(&x[0], groups, &x[1], &x[2], 1e-5),
                &move |x| plain::group_norm(&x[0], groups, &x[1], &x[2], 1e-5),
            );
            compare(
                "group_norm_silu",
                &inputs,
                3,
                &tracked,
                &move |x| ops::group_norm_silu(&x[0], groups, &x[1], &x[2], 1e-5),
                &move |x| Ok(plain::group_norm(&x[0], groups, &x[1], &x[2], 1e-5)?.silu()?),
            );
        }
    });
}

#[test]
fn rotary_embeddings() {
    each_shape(|g| {
        let (b, h, n, half) = (
            g.random_range(1..3),
            g.random_range(1..5),
            g.random_range(1..50),
            g.random_range(1..40),
        );
        let inputs = [
            random(&[b, n, h, 2 * half], g),
            random(&[n, half], g),
            random(&[n, half], g),
        ];
        let tracked = [true, false, false];
        compare(
            "rope_adjacent",
            &inputs,
            1,
            &tracked,
            &|x| ops::rope_adjacent(&x[0].transpose(1, 2)?, &x[1], &x[2]),
            &|x| plain::rope_adjacent(&x[0].transpose(1, 2)?, &x[1], &x[2]),
        );
        compare(
            "rope_halves",
            &inputs,
            1,
            &tracked,
            &|x| ops::rope_halves(&x[0].transpose(1, 2)?, &x[1], &x[2]),
            &|x| plain::rope_halves(&x[0].transpose(1, 2)?, &x[1], &x[2]),
        );
    });
}

#[test]
fn attention_with_every_mask() {
    each_shape(|g| {
        let (b, h, n, d) = (
            g.random_range(1..3),
            g.random_range(1..4),
            g.random_range(1..40),
            2 * g.random_range(1..40),
        );
        let m = n + g.random_range(0..9);
        // Queries and values lie as layers leave them, keys as a cache does.
        let inputs = [
            random(&[b, n, h, d], g),
            random(&[b, h, m + 3, d], g),
            random(&[b, m, h, d], g),
        ];
        let heads = |x: &[Tensor]| -> Result<[Tensor; 3]> {
            Ok([
                x[0].transpose(1, 2)?,
                x[1].narrow(2, 0, m)?,
                x[2].transpose(1, 2)?,
            ])
        };
        let hidden: Vec<f32> = (0..b * m)
            .map(|_| {
                if g.random_bool(0.4) {
                    f32::NEG_INFINITY
                } else {
                    0.5
                }
            })
            .collect();
        let hidden = Tensor::from_vec(hidden, (b, 1, 1, m), &Device::Cpu).unwrap();
        let biases = [
            random(&[b, 1, n, m], g),
            random(&[1, h, n, m], g),
            random(&[1, 1, 1, m], g),
        ];
        let run = |name: &str,
                   extra: Option<&Tensor>,
                   track_extra: bool,
                   mask: &dyn Fn(&[Tensor]) -> Mask| {
            let mut inputs = inputs.to_vec();
            inputs.extend(extra.cloned());
            let mut tracked = vec![true; 3];
            tracked.extend(extra.map(|_| track_extra));
            compare(
                name,
                &inputs,
                3,
                &tracked,
                &|x| {
                    let [q, k, v] = heads(x)?;
                    ops::attention(&q, &k, &v, 0.3, &mask(x))
                },
                &|x| {
                    let [q, k, v] = heads(x)?;
                    plain::attention(&q, &k, &v, 0.3, &mask(x))
                },
            );
        };
        run("attention", None, false, &|_| Mask::None);
        run("causal attention", None, false, &|_| Mask::Causal);
        run("attention with hidden keys", Some(&hidden), false, &|x| {
            Mask::CausalKeys(x[3].clone())
        });
        for bias in &biases {
            run("attention with a bias", Some(bias), false, &|x| {
                Mask::Additive(x[3].clone())
            });
            run("attention with a learnt bias", Some(bias), true, &|x| {
                Mask::Additive(x[3].clone())
            });
        }
    });
}

#[test]
fn linear_layers_and_adapters() {
    each_shape(|g| {
        let (b, n, inputs_, outputs, rank) = (
            g.random_range(1..3),
            g.random_range(1..30),
            8 * g.random_range(1..20),
            8 * g.random_range(1..20),
            g.random_range(1..17),
        );
        let inputs = [
            random(&[b, n, inputs_], g),
            random(&[outputs, inputs_], g),
            random(&[outputs], g),
            random(&[rank, inputs_], g),
            random(&[outputs, rank], g),
        ];
        for tracked in [
            [true, false, false],
            [true, true, true],
            [false, true, false],
        ] {
            compare(
                "linear",
                &inputs[..3],
                3,
                &tracked,
                &|x| ops::linear(&x[0], &x[1], Some(&x[2])),
                &|x| plain::linear(&x[0], &x[1], Some(&x[2])),
            );
        }
        for tracked in [
            [true, false, false, true, true],
            [true; 5],
            [false, false, false, true, true],
            [true, false, false, false, true],
        ] {
            compare(
                "linear_lora",
                &inputs,
                3,
                &tracked,
                &|x| ops::linear_lora(&x[0], &x[1], Some(&x[2]), &x[3], &x[4], 0.7),
                &|x| plain::linear_lora(&x[0], &x[1], Some(&x[2]), &x[3], &x[4], 0.7),
            );
        }
    });
}

#[test]
fn activations_and_gates() {
    each_shape(|g| {
        let shape = [g.random_range(1..4), g.random_range(1..3000)];
        let inputs = [random(&shape, g), random(&shape, g)];
        let one = |name: &str, fused: Function, plain: Function| {
            compare(name, &inputs[..1], 1, &[true], fused, plain);
        };
        one("silu", &|x| ops::silu(&x[0]), &|x| Ok(x[0].silu()?));
        one("gelu", &|x| ops::gelu(&x[0]), &|x| Ok(x[0].gelu()?));
        one("gelu_erf", &|x| ops::gelu_erf(&x[0]), &|x| {
            Ok(x[0].gelu_erf()?)
        });
        one("quick_gelu", &|x| ops::quick_gelu(&x[0]), &|x| {
            plain::quick_gelu(&x[0])
        });
        one("softmax", &|x| ops::softmax(&x[0]), &|x| {
            plain::softmax(&x[0])
        });
        for tracked in [[true, true], [false, true], [true, false]] {
            let two = |name: &str, fused: Function, plain: Function| {
                compare(name, &inputs, 2, &tracked, fused, plain);
            };
            two("swiglu", &|x| ops::swiglu(&x[0], &x[1]), &|x| {
                plain::swiglu(&x[0], &x[1])
            });
            two("geglu_tanh", &|x| ops::geglu_tanh(&x[0], &x[1]), &|x| {
                plain::geglu_tanh(&x[0], &x[1])
            });
            two("add", &|x| layout::add(&x[0], &x[1]), &|x| {
                Ok((&x[0] + &x[1])?)
            });
            two("join", &|x| layout::join(&x[0], &x[1], 1), &|x| {
                Ok(Tensor::cat(&[&x[0], &x[1]], 1)?)
            });
        }
    });
}

#[test]
fn cross_entropies_and_tables() {
    each_shape(|g| {
        let (n, count) = (g.random_range(1..60), g.random_range(2..3000));
        let ids: Vec<u32> = (0..n).map(|_| g.random_range(0..count as u32)).collect();
        let ids = Tensor::from_vec(ids, n, &Device::Cpu).unwrap();
        let inputs = [random(&[n, count], g), ids];
        // The result is in f32 whatever the logits are in.
        compare(
            "cross_entropy",
            &inputs,
            1,
            &[true, false],
            &|x| ops::cross_entropy(&x[0], &x[1]),
            &|x| plain::cross_entropy(&x[0], &x[1]),
        );
        let inputs = [random(&[count, 17], g), inputs[1].clone()];
        compare(
            "embedding",
            &inputs,
            1,
            &[true, false],
            &|x| ops::embedding(&x[0], &x[1]),
            &|x| plain::embedding(&x[0], &x[1]),
        );
    });
}

#[test]
fn sequences_and_vectors() {
    each_shape(|g| {
        let (b, n, c) = (
            g.random_range(1..4),
            g.random_range(1..40),
            g.random_range(1..90),
        );
        // The vectors are chunks of one tensor, as a modulation has them.
        let inputs = [
            random(&[b, n, c], g),
            random(&[b, n, c], g),
            random(&[b, 2 * c], g),
        ];
        let with_vectors = [inputs[0].clone(), inputs[2].clone()];
        for tracked in [[true, false], [true, true], [false, true]] {
            compare(
                "modulate",
                &with_vectors,
                2,
                &tracked,
                &|x| ops::modulate(&x[0], &x[1].narrow(1, 0, c)?, &x[1].narrow(1, c, c)?),
                &|x| plain::modulate(&x[0], &x[1].narrow(1, 0, c)?, &x[1].narrow(1, c, c)?),
            );
        }
        for tracked in [
            [true, true, false],
            [true, true, true],
            [false, false, true],
        ] {
            compare(
                "gated_residual",
                &inputs,
                3,
                &tracked,
                &|x| ops::gated_residual(&x[0], &x[2].narrow(1, c, c)?, &x[1]),
                &|x| plain::gated_residual(&x[0], &x[2].narrow(1, c, c)?, &x[1]),
            );
        }
        let pixels = [random(&[b, n, 7, 5], g)];
        compare(
            "upsample_nearest2x",
            &pixels,
            1,
            &[true],
            &|x| ops::upsample_nearest2x(&x[0]),
            &|x| plain::upsample_nearest2x(&x[0]),
        );
    });
}

#[test]
fn dropout_drops_as_many_as_it_should_and_the_same_backwards() {
    let Some(card) = card() else { return };
    for dtype in TYPES {
        let ones = Tensor::ones((300, 400), dtype, &card).unwrap();
        let x = Var::from_tensor(&ones).unwrap();
        let generator = &mut ChaCha8Rng::seed_from_u64(3);
        let y = ops::dropout(&x, 0.25, generator).unwrap();
        let again = ops::dropout(&x, 0.25, &mut ChaCha8Rng::seed_from_u64(3)).unwrap();
        let next = ops::dropout(&x, 0.25, generator).unwrap();
        assert_eq!(flat(&y), flat(&again));
        assert_ne!(flat(&y), flat(&next));
        let kept = flat(&y).iter().filter(|v| **v != 0.0).count() as f64;
        assert!((kept / 120_000.0 - 0.75).abs() < 0.01, "{kept} kept");
        let gradients = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(flat(gradients.get(&x).unwrap()), flat(&y));
    }
}

/// Views of one tensor that overlap, sums and joins: gradients meet in slots.
fn network(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (a, b) = (ops::silu(x)?, ops::gelu(y)?);
    let long = layout::join(&a, &b, 1)?;
    let (one, two) = (layout::rows(&long, 0, 5)?, layout::rows(&long, 3, 5)?);
    let sum = layout::add(&one, &layout::add(&two, &one)?)?;
    let heads = |x: &Tensor, start| layout::split_heads(x, start, 2, 2);
    let (q, k, v) = (heads(&sum, 0)?, heads(&long, 2)?, heads(&long, 4)?);
    let z = ops::attention(&q, &k, &v, 0.7, &Mask::None)?;
    let z = layout::merge_heads(&layout::add(&z, &q)?)?;
    // One of candle's own among them.
    let z = (z * 0.5)?;
    layout::add(&ops::quick_gelu(&z)?, &layout::reshape(&z, z.shape())?)
}

#[test]
fn gradients_meet_on_a_card_as_on_the_cpu() {
    let Some(card) = card() else { return };
    let g = &mut ChaCha8Rng::seed_from_u64(5);
    let (x, y) = (random(&[2, 3, 8], g), random(&[2, 5, 8], g));
    let of = |device: &Device| {
        let var = |t: &Tensor| Var::from_tensor(&t.to_device(device).unwrap()).unwrap();
        let (x, y) = (var(&x), var(&y));
        let z = network(&x, &y).unwrap();
        let loss = z.sqr().unwrap().sum_all().unwrap();
        let gradients = backward(&loss).unwrap();
        let of = |v: &Var| gradients.get(v).unwrap().clone();
        [z, of(&x), of(&y)]
    };
    for (found, wanted) in of(&card).iter().zip(&of(&Device::Cpu)) {
        assert_close(found, wanted, 2e-5, "a network");
    }
}

#[test]
fn a_recomputed_block_has_the_same_gradients() {
    let Some(card) = card() else { return };
    let g = &mut ChaCha8Rng::seed_from_u64(6);
    let new = |shape: &[usize], g: &mut ChaCha8Rng| {
        Var::from_tensor(&random(shape, g).to_device(&card).unwrap()).unwrap()
    };
    let (x, w) = (new(&[2, 9, 16], g), new(&[16, 16], g));
    let of = |recomputes: bool| {
        let mut generator = ChaCha8Rng::seed_from_u64(8);
        let loss = recomputing(recomputes, || {
            let mut h = ops::silu(&x)?;
            for _ in 0..3 {
                let w = w.as_tensor().clone();
                h = recompute(&[&h], Some(&mut generator), move |h, generator| {
                    let y = ops::linear(&h[0], &w, None)?;
                    let y = match generator {
                        Some(generator) => ops::dropout(&y, 0.2, generator)?,
                        None => y,
                    };
                    layout::add(&h[0], &y)
                })?;
            }
            Ok::<_, proxytune::Error>(h.sqr()?.mean_all()?)
        })
        .unwrap();
        let gradients = backward(&loss).unwrap();
        [
            loss.clone(),
            gradients.get(&x).unwrap().clone(),
            gradients.get(&w).unwrap().clone(),
        ]
    };
    for (found, wanted) in of(true).iter().zip(&of(false)) {
        assert_close(found, wanted, 1e-6, "a recomputed block");
    }
}

#[test]
fn optimizers_step_as_on_the_cpu() {
    let Some(card) = card() else { return };
    let adamw = AdamWConfig {
        weight_decay: 0.1,
        decay_vectors: false,
        ..AdamWConfig::default()
    };
    let own = proxytune::config::Prodigy::default();
    let of = |device: &Device, optimizer: &OptimizerConfig| {
        let g = &mut ChaCha8Rng::seed_from_u64(9);
        let variables: Vec<Var> = [&[70, 33][..], &[5], &[300, 1000]]
            .iter()
            .map(|shape| Var::from_tensor(&random(shape, g).to_device(device).unwrap()).unwrap())
            .collect();
        let named = variables.iter().enumerate();
        let named = named.map(|(i, v)| (i.to_string(), v.clone())).collect();
        let mut training = TrainingLoop::new(named, optimizer, Some(0.5)).unwrap();
        let mut norms = Vec::new();
        for step in 0..3 {
            let loss = |_| {
                let sums = variables
                    .iter()
                    .map(|v| (v.sqr().unwrap() * 0.3).unwrap().sum_all().unwrap());
                Ok(sums.reduce(|a, b| (a + b).unwrap()).unwrap())
            };
            norms.push(training.step(step, 0.05, 1, loss).unwrap().grad_norm);
        }
        (variables, norms, training.state().unwrap())
    };
    for (optimizer, tolerance) in [
        (OptimizerConfig::AdamW(adamw), 1e-6),
        (OptimizerConfig::Prodigy(ProdigyConfig { adamw, own }), 1e-6),
        (OptimizerConfig::Muon(adamw), 1e-4),
    ] {
        let (found, wanted) = (of(&card, &optimizer), of(&Device::Cpu, &optimizer));
        for (found, wanted) in found.0.iter().zip(&wanted.0) {
            assert_close(found, wanted, tolerance, "weights");
        }
        for (found, wanted) in found.1.iter().zip(&wanted.1) {
            assert!((found - wanted).abs() < 1e-5 * wanted, "{found} {wanted}");
        }
        for (name, wanted) in &wanted.2 {
            assert_close(&found.2[name], wanted, 10.0 * tolerance, name);
        }
    }
}
