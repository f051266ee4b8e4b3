//! Adapters merged into the weights of small layers while nothing is learnt.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use proxytune::nn::{Adapter, Init, Linear, LoraConfig, Weights, merged, no_grad};

/// A layer of the given width and rank with a random adapter.
fn layer(width: usize, rank: usize) -> (Linear, Arc<Adapter>, Tensor) {
    let config = LoraConfig {
        rank,
        alpha: 2.0 * rank as f64,
        targets: vec!["layer".into()],
    };
    let adapter = Arc::new(Adapter::new(config, 1));
    let weights = Weights::drawn(0, DType::F32, &Device::Cpu);
    let place = weights.clone().with_adapter(adapter.clone()).pp("layer");
    let linear = Linear::new(width, width, true, &place).unwrap();
    draw(&adapter, 1);
    let x = weights.buffer((20, width), "x", Init::Normal(1.0)).unwrap();
    (linear, adapter, x)
}

fn draw(adapter: &Adapter, seed: u64) {
    let weights = Weights::drawn(seed, DType::F32, &Device::Cpu);
    for (name, variable) in adapter.variables() {
        let values = weights.buffer(variable.shape(), &name, Init::Normal(0.1));
        variable.set(&values.unwrap()).unwrap();
    }
}

fn values(linear: &Linear, x: &Tensor) -> Vec<f32> {
    let y = linear.forward(x).unwrap();
    y.flatten_all().unwrap().to_vec1().unwrap()
}

fn apart(one: &[f32], two: &[f32]) -> f32 {
    one.iter()
        .zip(two)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

#[test]
fn a_small_layer_gives_what_it_gives_with_its_adapter_beside_it() {
    let (linear, adapter, x) = layer(64, 8);
    let beside = values(&linear, &x);
    let (first, second) = merged(|| no_grad(|| (values(&linear, &x), values(&linear, &x))));
    assert!(first != beside, "it was not merged");
    assert!(apart(&first, &beside) < 1e-5);
    assert_eq!(first, second);
    // Another adapter's values are merged anew by the next call.
    draw(&adapter, 2);
    let beside = values(&linear, &x);
    let again = merged(|| no_grad(|| values(&linear, &x)));
    assert!(apart(&again, &first) > 1e-2 && apart(&again, &beside) < 1e-5);
}

#[test]
fn where_something_is_learnt_the_adapter_stays_beside_the_weight() {
    let (linear, adapter, x) = layer(64, 8);
    let y = merged(|| linear.forward(&x).unwrap());
    let gradients = y.sum_all().unwrap().backward().unwrap();
    for (name, variable) in adapter.variables() {
        assert!(gradients.get(&variable).is_some(), "{name}");
    }
    assert_eq!(values(&linear, &x), no_grad(|| values(&linear, &x)));
}

#[test]
fn a_large_layer_is_not_copied() {
    let (linear, _, x) = layer(640, 4);
    let beside = values(&linear, &x);
    assert_eq!(merged(|| no_grad(|| values(&linear, &x))), beside);
}
