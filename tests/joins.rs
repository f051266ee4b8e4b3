//! Sums, parts, joins and heads of activations have candle's values and gradients.

use candle_core::{Device, Tensor, Var};
use proxytune::nn::layout::{add, join, merge_heads, rows, split_heads};
use proxytune::nn::{backward, ops};

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

fn numbers(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// The gradients of sum(weights · f(x, y)) for x (2, 3, 8) and y (2, 5, 8), with our functions and with candle's.
fn compare(f: impl Fn(&Tensor, &Tensor, bool) -> Tensor) {
    let (x, y) = (random(&[2, 3, 8]), random(&[2, 5, 8]));
    let of = |ours: bool| {
        let x = Var::from_tensor(&x).unwrap();
        let y = Var::from_tensor(&y).unwrap();
        // Results of fused operations, so that gradients meet in slots.
        let (a, b) = (ops::silu(&x).unwrap(), ops::silu(&y).unwrap());
        let z = f(&a, &b, ours);
        let weights = Tensor::arange(0f32, z.elem_count() as f32, &Device::Cpu);
        let weights = weights.unwrap().reshape(z.shape()).unwrap();
        let loss = (&z * weights).unwrap().sum_all().unwrap();
        let plain = loss.backward().unwrap();
        let ours = backward(&loss).unwrap();
        let both = [x.as_tensor(), y.as_tensor()].map(|v| {
            let (one, two) = (
                numbers(plain.get(v).unwrap()),
                numbers(ours.get(v).unwrap()),
            );
            assert_eq!(one, two, "candle's backward and ours");
            one
        });
        (numbers(&z), both)
    };
    let (ours, candles) = (of(true), of(false));
    assert_eq!(ours.0, candles.0);
    for (ours, candles) in ours.1.iter().zip(&candles.1) {
        for (a, b) in ours.iter().zip(candles) {
            assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{a} and {b}");
        }
    }
}

#[test]
fn sums_parts_and_joins_have_candles_values_and_gradients() {
    // A tensor that is used in many ways at once: by our functions, by fused operations and by candle's own.
    compare(|x, y, ours| {
        let long = match ours {
            true => join(x, y, 1).unwrap(),
            false => Tensor::cat(&[x, y], 1).unwrap(),
        };
        let part = |start, count| match ours {
            true => rows(&long, start, count).unwrap(),
            false => long.narrow(1, start, count).unwrap().contiguous().unwrap(),
        };
        let (one, two) = (part(0, 4), part(4, 4));
        let sum = match ours {
            true => add(&one, &two).unwrap(),
            false => (&one + &two).unwrap(),
        };
        let again = ops::silu(&one).unwrap();
        (sum + (again * &two).unwrap()).unwrap()
    });
}

#[test]
fn views_are_joined_along_any_dimension() {
    for dim in 0..4 {
        let [x, y] = [2, 3].map(|n| {
            let mut shape = [4, 3, 5, 6];
            shape[dim] = n;
            // Heads as an attention has them, within something wider.
            let [b, h, n, d] = shape;
            let wide = random(&[b, n, h + 2, d]);
            let view = wide.narrow(2, 1, h).unwrap().transpose(1, 2).unwrap();
            (wide, view)
        });
        let tracked = Var::from_tensor(&x.0).unwrap();
        let h = x.1.dim(1).unwrap();
        let view = tracked.narrow(2, 1, h).unwrap().transpose(1, 2).unwrap();
        let joined = join(&view, &y.1, dim).unwrap();
        let wanted = Tensor::cat(&[&view, &y.1], dim).unwrap();
        assert_eq!(joined.dims(), wanted.dims());
        assert_eq!(numbers(&joined), numbers(&wanted));
        let of = |joined: Tensor| {
            let weights = Tensor::arange(0f32, joined.elem_count() as f32, &Device::Cpu);
            let weights = weights.unwrap().reshape(joined.shape()).unwrap();
            let loss = (joined * weights).unwrap().sum_all().unwrap();
            numbers(backward(&loss).unwrap().get(&tracked).unwrap())
        };
        assert_eq!(of(joined), of(wanted));
    }
}

#[test]
fn heads_have_candles_values_and_gradients() {
    compare(|x, y, ours| {
        let heads = |x: &Tensor, start: usize, heads: usize| match ours {
            true => split_heads(x, start, heads, 2).unwrap(),
            false => {
                let (b, n, _) = x.dims3().unwrap();
                let part = x.narrow(2, start, 2 * heads).unwrap();
                part.reshape((b, n, heads, 2))
                    .unwrap()
                    .transpose(1, 2)
                    .unwrap()
            }
        };
        // Keys overlap with queries, and candle takes one view as well.
        let (q, k, v) = (heads(x, 0, 2), heads(y, 2, 2), heads(y, 4, 2));
        let z = ops::attention(&q, &k, &v, 0.7, &ops::Mask::None).unwrap();
        let z = (z + &q).unwrap();
        match ours {
            true => merge_heads(&z).unwrap(),
            false => z
                .transpose(1, 2)
                .unwrap()
                .contiguous()
                .unwrap()
                .reshape((2, 3, 4))
                .unwrap(),
        }
    });
}
