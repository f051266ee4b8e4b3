//! The fused operations against their plain forms, the plain forms against finite differences, and what must hold of
//! both: no gradient for what is frozen, no graph inside `no_grad`, the same bytes on any number of threads.

use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;
use proxytune::Result;
use proxytune::nn::ops::{Mask, Padding};
use proxytune::nn::{no_grad, ops, plain};
use proxytune::stream::beside_others;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

type Function = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + Sync>;

/// An operation in both forms, with inputs for it.
struct Case {
    name: &'static str,
    inputs: Vec<Tensor>,
    fused: Function,
    plain: Function,
}

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = StandardNormal
        .sample_iter(&mut generator)
        .take(shape.iter().product())
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn inputs(shapes: &[&[usize]], seed: u64) -> Vec<Tensor> {
    let seeds = seed * 100..;
    shapes
        .iter()
        .zip(seeds)
        .map(|(s, i)| random(s, i))
        .collect()
}

fn case<F, P>(name: &'static str, inputs: Vec<Tensor>, fused: F, plain: P) -> Case
where
    F: Fn(&[Tensor]) -> Result<Tensor> + Sync + 'static,
    P: Fn(&[Tensor]) -> Result<Tensor> + Sync + 'static,
{
    Case {
        name,
        inputs,
        fused: Box::new(fused),
        plain: Box::new(plain),
    }
}

/// The result and the gradients of Σ result · (fixed random numbers) for the inputs that are tracked.
fn differentiate(
    function: &Function,
    inputs: &[Tensor],
    tracked: &[bool],
) -> (Tensor, Vec<Option<Tensor>>) {
    let inputs: Vec<Tensor> = inputs
        .iter()
        .zip(tracked)
        .map(|(t, tracked)| match tracked {
            true => Var::from_tensor(t).unwrap().as_tensor().clone(),
            false => t.clone(),
        })
        .collect();
    let y = function(&inputs).unwrap();
    let weights = random(y.dims(), 77).to_dtype(y.dtype()).unwrap();
    let loss = (&y * weights).unwrap().sum_all().unwrap();
    let gradients = loss.backward().unwrap();
    let gradients = inputs.iter().map(|t| gradients.get(t).cloned()).collect();
    (y, gradients)
}

fn assert_close(found: &Tensor, wanted: &Tensor, tolerance: f32, what: &str) {
    assert_eq!(found.dims(), wanted.dims(), "{what}");
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (found, wanted) = (flat(found), flat(wanted));
    let size = wanted.iter().fold(1.0f32, |m, v| m.max(v.abs()));
    for (i, (f, w)) in found.iter().zip(&wanted).enumerate() {
        assert!(
            (f - w).abs() <= tolerance * size,
            "{what}: element {i} is {f}, {w} expected (largest {size})"
        );
    }
}

fn assert_equal_to_plain(case: &Case) {
    let count = case.inputs.len();
    let mut choices = vec![vec![true; count]];
    choices.extend((0..count).map(|i| (0..count).map(|j| j == i).collect()));
    for tracked in choices {
        let (y, gradients) = differentiate(&case.fused, &case.inputs, &tracked);
        let (wanted_y, wanted) = differentiate(&case.plain, &case.inputs, &tracked);
        assert_close(&y, &wanted_y, 1e-5, case.name);
        for i in 0..count {
            let what = format!("{}, gradient of input {i}", case.name);
            match (&gradients[i], tracked[i]) {
                (Some(found), true) => {
                    let wanted = wanted[i].as_ref().expect("a plain gradient");
                    assert_close(found, wanted, 2e-5, &what);
                }
                (None, false) => {}
                (found, _) => panic!("{what}: {:?}", found.is_some()),
            }
        }
    }
}

/// Every operation on shapes made from a few numbers.
fn cases(seed: u64, b: usize, n: usize, width: usize) -> Vec<Case> {
    let mut all = linear_cases(seed, b, n, width);
    all.extend(conv_cases(seed, b, width));
    all.extend(attention_cases(seed, b, n, width));
    all.extend(norm_cases(seed, b, n, width));
    all.extend(elementwise_cases(seed, b, n, width));
    all
}

/// Large enough for every operation to use several threads.
fn large_cases() -> Vec<Case> {
    let mut all = cases(1, 9, 150, 64);
    all.extend(linear_cases(2, 5, 120, 300));
    all
}

fn linear_cases(seed: u64, b: usize, n: usize, width: usize) -> Vec<Case> {
    let (o, r) = (width + 3, 4);
    let x: &[usize] = &[b, n, width];
    vec![
        case(
            "linear",
            inputs(&[x, &[o, width], &[o]], seed),
            |t| ops::linear(&t[0], &t[1], Some(&t[2])),
            |t| plain::linear(&t[0], &t[1], Some(&t[2])),
        ),
        case(
            "linear of a transposed view, without a bias",
            inputs(&[&[width, b * n], &[o, width]], seed),
            |t| ops::linear(&t[0].t()?, &t[1], None),
            |t| plain::linear(&t[0].t()?, &t[1], None),
        ),
        case(
            "linear with an adapter on a frozen weight",
            inputs(&[x, &[r, width], &[o, r]], seed),
            move |t| {
                let (w, bias) = (random(&[o, width], 5), random(&[o], 6));
                ops::linear_lora(&t[0], &w, Some(&bias), &t[1], &t[2], 0.5)
            },
            move |t| {
                let w = random(&[o, width], 5).to_dtype(t[0].dtype())?;
                let bias = random(&[o], 6).to_dtype(t[0].dtype())?;
                plain::linear_lora(&t[0], &w, Some(&bias), &t[1], &t[2], 0.5)
            },
        ),
        case(
            "linear with an adapter on a trained weight",
            inputs(&[x, &[o, width], &[o], &[r, width], &[o, r]], seed),
            |t| ops::linear_lora(&t[0], &t[1], Some(&t[2]), &t[3], &t[4], 0.5),
            |t| plain::linear_lora(&t[0], &t[1], Some(&t[2]), &t[3], &t[4], 0.5),
        ),
        case(
            "embedding",
            inputs(&[&[width, 5]], seed),
            move |t| ops::embedding(&t[0], &ids(b, n, width)?),
            move |t| plain::embedding(&t[0], &ids(b, n, width)?),
        ),
    ]
}

fn ids(b: usize, n: usize, count: usize) -> Result<Tensor> {
    let values: Vec<u32> = (0..b * n).map(|i| (i * i % count) as u32).collect();
    Ok(Tensor::from_vec(values, (b, n), &Device::Cpu)?)
}

fn conv_cases(seed: u64, b: usize, c: usize) -> Vec<Case> {
    let o = 5;
    let conv = |name, k: usize, stride, padding, size: usize| {
        case(
            name,
            inputs(&[&[b, c, size, size + 2], &[o, c, k, k], &[o]], seed),
            move |t| ops::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding),
            move |t| plain::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding),
        )
    };
    vec![
        conv("conv 3x3", 3, 1, Padding::Same(1), 8),
        conv("conv 3x3 without padding", 3, 1, Padding::Same(0), 7),
        conv("conv 3x3 stride 2", 3, 2, Padding::Same(1), 8),
        conv(
            "conv 3x3 stride 2, right and bottom",
            3,
            2,
            Padding::RightBottom,
            8,
        ),
        conv("conv 1x1", 1, 1, Padding::Same(0), 6),
        conv("conv 1x1 stride 2", 1, 2, Padding::Same(0), 6),
        conv("conv 5x5 stride 1", 5, 1, Padding::Same(2), 6),
        conv("patches", 4, 4, Padding::Same(0), 10),
        case(
            "conv of a transposed view, without a bias",
            inputs(&[&[b, 6, 8, c], &[o, c, 3, 3]], seed),
            |t| {
                ops::conv2d(
                    &t[0].permute((0, 3, 1, 2))?,
                    &t[1],
                    None,
                    1,
                    Padding::Same(1),
                )
            },
            |t| {
                plain::conv2d(
                    &t[0].permute((0, 3, 1, 2))?,
                    &t[1],
                    None,
                    1,
                    Padding::Same(1),
                )
            },
        ),
        case(
            "upsample",
            inputs(&[&[b, c, 3, 4]], seed),
            |t| ops::upsample_nearest2x(&t[0]),
            |t| plain::upsample_nearest2x(&t[0]),
        ),
    ]
}

fn attention_cases(seed: u64, b: usize, n: usize, d: usize) -> Vec<Case> {
    let (h, m) = (2, n + 3);
    let attention = |name, mask: fn(usize, usize, usize) -> Mask| {
        case(
            name,
            inputs(&[&[b, h, n, d], &[b, h, m, d], &[b, h, m, d]], seed),
            move |t| ops::attention(&t[0], &t[1], &t[2], 0.3, &mask(b, n, m)),
            move |t| plain::attention(&t[0], &t[1], &t[2], 0.3, &mask(b, n, m)),
        )
    };
    // Hides every third key but the first.
    let additive = |b: usize, n: usize, m: usize| {
        let values = random(&[b, 1, n, m], 9);
        let hidden: Vec<f32> = (0..m)
            .map(|j| if j % 3 == 2 { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        let hidden = Tensor::from_vec(hidden, m, &Device::Cpu).unwrap();
        Mask::Additive(values.broadcast_add(&hidden).unwrap())
    };
    vec![
        attention("attention", |_, _, _| Mask::None),
        attention("causal attention", |_, _, _| Mask::Causal),
        attention("masked attention", additive),
        case(
            "attention of transposed views",
            inputs(&[&[b, n, h, d], &[b, n, h, d], &[b, n, h, d]], seed),
            |t| {
                let [q, k, v] = [0, 1, 2].map(|i| t[i].transpose(1, 2).unwrap());
                ops::attention(&q, &k, &v, 0.3, &Mask::Causal)
            },
            |t| {
                let [q, k, v] = [0, 1, 2].map(|i| t[i].transpose(1, 2).unwrap());
                plain::attention(&q, &k, &v, 0.3, &Mask::Causal)
            },
        ),
        trained_mask(
            "attention with a trained mask",
            [b, h, n, m, d],
            [1, h, n, m],
            seed,
        ),
        trained_mask(
            "attention with a trained mask for each image",
            [b, h, n, m, d],
            [b, 1, n, m],
            seed,
        ),
        trained_mask(
            "attention with a trained mask for all",
            [b, h, n, m, d],
            [1, 1, n, m],
            seed,
        ),
        trained_mask(
            "attention with a trained mask of one row",
            [b, h, n, m, d],
            [b, h, 1, m],
            seed,
        ),
        attention("causal attention with hidden keys", |b, n, m| {
            // Padding at the start, more of it in later images, as far as past the first query's own key.
            let values: Vec<f32> = (0..b)
                .flat_map(|i| {
                    let padding = (m - n + 1 + i).min(m);
                    (0..m).map(move |j| {
                        if j < padding {
                            f32::NEG_INFINITY
                        } else {
                            0.1 * j as f32
                        }
                    })
                })
                .collect();
            Mask::CausalKeys(Tensor::from_vec(values, (b, 1, 1, m), &Device::Cpu).unwrap())
        }),
        attention("attention with one row of hidden keys", |b, _, m| {
            let values: Vec<f32> = (0..b * m)
                .map(|j| {
                    if j % m % 3 == 1 {
                        f32::NEG_INFINITY
                    } else {
                        0.0
                    }
                })
                .collect();
            Mask::Additive(Tensor::from_vec(values, (b, 1, 1, m), &Device::Cpu).unwrap())
        }),
        rope_case(
            "adjacent rope",
            b,
            n,
            seed,
            ops::rope_adjacent,
            plain::rope_adjacent,
        ),
        rope_case(
            "rope in halves",
            b,
            n,
            seed,
            ops::rope_halves,
            plain::rope_halves,
        ),
    ]
}

fn trained_mask(
    name: &'static str,
    [b, h, n, m, d]: [usize; 5],
    mask: [usize; 4],
    seed: u64,
) -> Case {
    case(
        name,
        inputs(&[&[b, h, n, d], &[b, h, m, d], &[b, h, m, d], &mask], seed),
        |t| ops::attention(&t[0], &t[1], &t[2], 0.3, &Mask::Additive(t[3].clone())),
        |t| plain::attention(&t[0], &t[1], &t[2], 0.3, &Mask::Additive(t[3].clone())),
    )
}

type Rope = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

fn rope_case(name: &'static str, b: usize, n: usize, seed: u64, fused: Rope, plain: Rope) -> Case {
    let angles = random(&[n, 4], seed + 1);
    let table = move |like: &Tensor| -> Result<[Tensor; 2]> {
        let angles = angles.to_dtype(like.dtype())?;
        Ok([angles.cos()?, angles.sin()?])
    };
    let table2 = table.clone();
    case(
        name,
        inputs(&[&[b, n, 3, 8]], seed),
        move |t| {
            let [cos, sin] = table(&t[0])?;
            fused(&t[0].transpose(1, 2)?, &cos, &sin)
        },
        move |t| {
            let [cos, sin] = table2(&t[0])?;
            plain(&t[0].transpose(1, 2)?.contiguous()?, &cos, &sin)
        },
    )
}

fn norm_cases(seed: u64, b: usize, n: usize, width: usize) -> Vec<Case> {
    let x: &[usize] = &[b, n, width];
    let image: &[usize] = &[b, 6, n, 5];
    vec![
        case(
            "layer norm",
            inputs(&[x, &[width], &[width]], seed),
            |t| ops::layer_norm(&t[0], Some(&t[1]), Some(&t[2]), 1e-5),
            |t| plain::layer_norm(&t[0], Some(&t[1]), Some(&t[2]), 1e-5),
        ),
        case(
            "layer norm without parameters of a transposed view",
            inputs(&[&[b, width, n]], seed),
            |t| ops::layer_norm(&t[0].transpose(1, 2)?, None, None, 1e-5),
            |t| plain::layer_norm(&t[0].transpose(1, 2)?, None, None, 1e-5),
        ),
        case(
            "rms norm",
            inputs(&[x, &[width]], seed),
            |t| ops::rms_norm(&t[0], &t[1], 1e-5),
            |t| plain::rms_norm(&t[0], &t[1], 1e-5),
        ),
        case(
            "group norm",
            inputs(&[image, &[6], &[6]], seed),
            |t| ops::group_norm(&t[0], 3, &t[1], &t[2], 1e-5),
            |t| plain::group_norm(&t[0], 3, &t[1], &t[2], 1e-5),
        ),
        case(
            "group norm with SiLU",
            inputs(&[image, &[6], &[6]], seed),
            |t| ops::group_norm_silu(&t[0], 2, &t[1], &t[2], 1e-5),
            |t| Ok(plain::group_norm(&t[0], 2, &t[1], &t[2], 1e-5)?.silu()?),
        ),
        case(
            "softmax",
            inputs(&[x], seed),
            |t| ops::softmax(&t[0]),
            |t| plain::softmax(&t[0]),
        ),
        case(
            "cross entropy",
            inputs(&[&[b * n, width]], seed),
            move |t| ops::cross_entropy(&t[0], &ids(b, n, width)?.flatten_all()?),
            move |t| plain::cross_entropy(&t[0], &ids(b, n, width)?.flatten_all()?),
        ),
    ]
}

fn elementwise_cases(seed: u64, b: usize, n: usize, c: usize) -> Vec<Case> {
    let x: &[usize] = &[b, n, c];
    let v: &[usize] = &[b, c];
    let one = |name, fused: fn(&Tensor) -> Result<Tensor>, plain: fn(&Tensor) -> Result<Tensor>| {
        case(
            name,
            vec![(random(x, seed) * 3.0).unwrap()],
            move |t| fused(&t[0]),
            move |t| plain(&t[0]),
        )
    };
    vec![
        one("silu", ops::silu, |x| Ok(x.silu()?)),
        one("gelu", ops::gelu, |x| Ok(x.gelu()?)),
        one("gelu with erf", ops::gelu_erf, |x| Ok(x.gelu_erf()?)),
        one("quick gelu", ops::quick_gelu, plain::quick_gelu),
        case(
            "swiglu",
            inputs(&[x, x], seed),
            |t| ops::swiglu(&t[0], &t[1]),
            |t| plain::swiglu(&t[0], &t[1]),
        ),
        case(
            "geglu of two views",
            inputs(&[&[b, n, 2 * c]], seed),
            move |t| ops::geglu_tanh(&t[0].narrow(2, 0, c)?, &t[0].narrow(2, c, c)?),
            move |t| plain::geglu_tanh(&t[0].narrow(2, 0, c)?, &t[0].narrow(2, c, c)?),
        ),
        case(
            "geglu with tanh",
            inputs(&[x, x], seed),
            |t| ops::geglu_tanh(&t[0], &t[1]),
            |t| plain::geglu_tanh(&t[0], &t[1]),
        ),
        case(
            "modulate",
            inputs(&[x, v, v], seed),
            |t| ops::modulate(&t[0], &t[1], &t[2]),
            |t| plain::modulate(&t[0], &t[1], &t[2]),
        ),
        case(
            "gated residual",
            inputs(&[x, v, x], seed),
            |t| ops::gated_residual(&t[0], &t[1], &t[2]),
            |t| plain::gated_residual(&t[0], &t[1], &t[2]),
        ),
        case(
            "dropout",
            inputs(&[x], seed),
            |t| ops::dropout(&t[0], 0.4, &mut ChaCha8Rng::seed_from_u64(3)),
            |t| {
                let ones = t[0].ones_like()?.to_dtype(DType::F64)?;
                let factors = ops::dropout(&ones, 0.4, &mut ChaCha8Rng::seed_from_u64(3))?;
                Ok((&t[0] * factors.to_dtype(t[0].dtype())?)?)
            },
        ),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_fused_operation_equals_its_plain_form(
        seed in 1u64..1000, b in 1usize..4, n in 1usize..40, width in 2usize..70,
    ) {
        for case in cases(seed, b, n, width) {
            assert_equal_to_plain(&case);
        }
    }
}

#[test]
fn fused_operations_equal_their_plain_forms_where_work_is_split() {
    for case in large_cases() {
        assert_equal_to_plain(&case);
    }
}

#[test]
fn every_gradient_equals_finite_differences() {
    for case in cases(4, 2, 5, 6) {
        let inputs: Vec<Tensor> = case
            .inputs
            .iter()
            .map(|t| t.to_dtype(DType::F64).unwrap())
            .collect();
        let y = (case.plain)(&inputs).unwrap();
        let weights = random(y.dims(), 77).to_dtype(DType::F64).unwrap();
        let (_, gradients) = differentiate(&case.plain, &inputs, &vec![true; inputs.len()]);
        let loss = |inputs: &[Tensor]| -> f64 {
            let y = (case.plain)(inputs).unwrap();
            (y * &weights)
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar()
                .unwrap()
        };
        for (i, input) in inputs.iter().enumerate() {
            let values = input.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let gradient = gradients[i].as_ref().unwrap();
            let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for j in (0..values.len()).step_by(values.len().div_ceil(12)) {
                let shifted = |by: f64| {
                    let mut values = values.clone();
                    values[j] += by;
                    let mut inputs = inputs.clone();
                    inputs[i] = Tensor::from_vec(values, input.shape(), &Device::Cpu).unwrap();
                    loss(&inputs)
                };
                let difference = (shifted(1e-5) - shifted(-1e-5)) / 2e-5;
                assert!(
                    (difference - gradient[j]).abs() <= 1e-6 * (1.0 + difference.abs()),
                    "{}: input {i}, element {j}: {} by backward, {difference} by differences",
                    case.name,
                    gradient[j]
                );
            }
        }
    }
}

#[test]
fn results_are_equal_to_the_byte_for_one_two_and_three_threads_and_in_a_crowd() {
    let bytes = |threads: usize, others: usize| -> Vec<(String, Vec<u32>)> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let large_cases = || {
            let mut all = Vec::new();
            for case in large_cases() {
                let tracked = vec![true; case.inputs.len()];
                let (y, gradients) = differentiate(&case.fused, &case.inputs, &tracked);
                for t in [Some(y)].into_iter().chain(gradients).flatten() {
                    let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    let bits = values.iter().map(|v| v.to_bits()).collect();
                    all.push((case.name.to_string(), bits));
                }
            }
            all
        };
        match others {
            0 => pool.install(large_cases),
            _ => pool.install(|| beside_others(|| beside_others(large_cases))),
        }
    };
    let one = bytes(1, 0);
    for (threads, others) in [(2, 0), (3, 0), (2, 1)] {
        for ((name, a), (_, b)) in one.iter().zip(bytes(threads, others)) {
            assert!(
                *a == b,
                "{name} differs between 1 and {threads} threads beside {others} others"
            );
        }
    }
}

#[test]
fn no_graph_is_built_inside_no_grad() {
    for case in cases(3, 2, 6, 8) {
        // Parameters are variables; the input, which comes from outside, is not.
        let inputs: Vec<Tensor> = case
            .inputs
            .iter()
            .enumerate()
            .map(|(i, t)| match i {
                0 => t.clone(),
                _ => Var::from_tensor(t).unwrap().as_tensor().clone(),
            })
            .collect();
        let takes_parameters = ["linear", "conv", "norm", "embedding", "patches"];
        if takes_parameters.iter().any(|word| case.name.contains(word)) {
            let y = no_grad(|| (case.fused)(&inputs)).unwrap();
            assert!(!y.track_op(), "{}", case.name);
        }
    }
}

#[test]
fn nan_is_never_hidden() {
    let x = Tensor::new(&[[0.5f32, f32::NAN, 1.0]], &Device::Cpu).unwrap();
    let w = Tensor::ones((3, 3), DType::F32, &Device::Cpu).unwrap();
    let one = Tensor::ones(3, DType::F32, &Device::Cpu).unwrap();
    let target = Tensor::new(&[0u32], &Device::Cpu).unwrap();
    for y in [
        ops::linear(&x, &w, None),
        ops::silu(&x),
        ops::gelu(&x),
        ops::gelu_erf(&x),
        ops::softmax(&x),
        ops::layer_norm(&x, Some(&one), Some(&one), 1e-5),
        ops::rms_norm(&x, &one, 1e-5),
        ops::cross_entropy(&x, &target),
    ] {
        let sum: f32 = y.unwrap().sum_all().unwrap().to_scalar().unwrap();
        assert!(sum.is_nan());
    }
}

#[test]
fn wrong_shapes_are_errors() {
    let t = |shape: &[usize]| random(shape, 1);
    assert!(ops::linear(&t(&[2, 3]), &t(&[4, 5]), None).is_err());
    assert!(ops::linear(&t(&[2, 5]), &t(&[4, 5]), Some(&t(&[3]))).is_err());
    assert!(
        ops::conv2d(
            &t(&[1, 2, 4, 4]),
            &t(&[3, 3, 3, 3]),
            None,
            1,
            Padding::Same(1)
        )
        .is_err()
    );
    assert!(
        ops::conv2d(
            &t(&[1, 2, 2, 2]),
            &t(&[3, 2, 3, 3]),
            None,
            1,
            Padding::Same(0)
        )
        .is_err()
    );
    assert!(ops::layer_norm(&t(&[2, 3]), Some(&t(&[4])), None, 1e-5).is_err());
    assert!(ops::group_norm(&t(&[1, 4, 2]), 3, &t(&[4]), &t(&[4]), 1e-5).is_err());
    assert!(ops::embedding(&t(&[2, 3]), &Tensor::new(&[2u32], &Device::Cpu).unwrap()).is_err());
    let target = Tensor::new(&[3u32, 0], &Device::Cpu).unwrap();
    assert!(ops::cross_entropy(&t(&[2, 3]), &target).is_err());
    for (keys, mask) in [(0, Mask::None), (2, Mask::Causal)] {
        let (q, k) = (t(&[1, 2, 3, 4]), t(&[1, 2, keys, 4]));
        assert!(ops::attention(&q, &k, &k, 1.0, &mask).is_err());
        assert!(plain::attention(&q, &k, &k, 1.0, &mask).is_err());
    }
    assert!(ops::dropout(&t(&[2]), 1.0, &mut ChaCha8Rng::seed_from_u64(0)).is_err());
}
