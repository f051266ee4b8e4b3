//! Fused projections against the single layers that they are made of: results, and the gradients of the input and of
//! every adapter, for each way in which weights are kept.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;
use proxytune::nn::{
    Adapter, FusedLinear, Init, Linear, LoraConfig, Precision, Weights, backward, layout, merged,
    no_grad, ops,
};

const NAMES: [&str; 3] = ["q", "k", "v"];

/// Three layers of one input, or two, and which of them carry an adapter.
#[derive(Debug, Clone)]
struct Case {
    rows: usize,
    inputs: usize,
    /// In multiples of [`Case::HEAD`].
    outputs: Vec<usize>,
    bias: bool,
    targets: Vec<bool>,
    rank: usize,
}

impl Case {
    const HEAD: usize = 4;

    /// The places of the layers, with an adapter of the same values each time.
    fn places(&self, weights: Weights) -> (Vec<(usize, Weights)>, Arc<Adapter>) {
        let targets = NAMES.iter().zip(&self.targets).filter(|(_, yes)| **yes);
        let config = LoraConfig {
            rank: self.rank,
            alpha: 1.5 * self.rank as f64,
            targets: targets.map(|(name, _)| name.to_string()).collect(),
        };
        let adapter = Arc::new(Adapter::new(config, 1));
        let weights = weights.with_adapter(adapter.clone());
        let outputs = self.outputs.iter().zip(NAMES);
        let places = outputs.map(|(outputs, name)| (outputs * Self::HEAD, weights.pp(name)));
        (places.collect(), adapter)
    }

    fn fused(&self, weights: Weights) -> (FusedLinear, Arc<Adapter>) {
        let (places, adapter) = self.places(weights);
        let init = Init::fan_in(self.inputs);
        let fused = FusedLinear::new(self.inputs, &places, self.bias, init).unwrap();
        draw(&adapter);
        (fused, adapter)
    }

    fn each(&self, weights: Weights) -> (Vec<Linear>, Arc<Adapter>) {
        let (places, adapter) = self.places(weights);
        let init = Init::fan_in(self.inputs);
        let layer = |(outputs, place): &(usize, Weights)| {
            Linear::with_init(self.inputs, *outputs, self.bias, init, place).unwrap()
        };
        let each = places.iter().map(layer).collect();
        draw(&adapter);
        (each, adapter)
    }

    fn x(&self) -> Tensor {
        drawn((1, self.rows, self.inputs), "x")
    }

    /// Results of the fused layers and of the single ones, and all gradients of both.
    fn compare(&self, weights: impl Fn() -> Weights, tolerance: f32) {
        let (fused, of_fused) = self.fused(weights());
        let (each, of_each) = self.each(weights());
        let head = Self::HEAD;
        let x = Var::from_tensor(&self.x()).unwrap();
        let y = fused.forward(&x).unwrap();
        let found: Vec<Tensor> = (0..each.len()).map(|i| y.heads(i, head).unwrap()).collect();
        let wanted: Vec<Tensor> = each
            .iter()
            .map(|layer| layer.forward(&x).unwrap())
            .map(|y| layout::split_heads(&y, 0, y.dim(2).unwrap() / head, head).unwrap())
            .collect();
        for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            assert_close(found, wanted, tolerance, &format!("layer {i}"));
            let joined = layout::merge_heads(found).unwrap();
            assert_eq!(values(&y.part(i).unwrap()), values(&joined), "part {i}");
        }
        let gradients = |parts: &[Tensor], adapter: &Adapter| -> Vec<(String, Tensor)> {
            let weighted = parts.iter().enumerate().map(|(i, part)| {
                let weight = drawn(part.dims(), &format!("gradient {i}"));
                (part * weight).unwrap().sum_all().unwrap()
            });
            let loss = weighted.reduce(|a, b| (a + b).unwrap()).unwrap();
            let gradients = backward(&loss).unwrap();
            let of = |v: &Var| gradients.get(v).unwrap().clone();
            let mut all = vec![("x".to_string(), of(&x))];
            let variables = adapter.variables().into_iter();
            all.extend(variables.map(|(name, v)| (name, of(&v))));
            all
        };
        let (found, wanted) = (gradients(&found, &of_fused), gradients(&wanted, &of_each));
        assert_eq!(found.len(), wanted.len());
        for ((name, found), (wanted_name, wanted)) in found.iter().zip(&wanted) {
            assert_eq!(name, wanted_name);
            assert_close(found, wanted, tolerance, name);
        }
    }
}

fn drawn(shape: impl Into<candle_core::Shape>, name: &str) -> Tensor {
    let weights = Weights::drawn(5, DType::F32, &Device::Cpu);
    weights.buffer(shape, name, Init::Normal(1.0)).unwrap()
}

fn draw(adapter: &Adapter) {
    for (name, variable) in adapter.variables() {
        let values = drawn(variable.shape(), &name);
        variable.set(&(values * 0.3).unwrap()).unwrap();
    }
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(found: &Tensor, wanted: &Tensor, tolerance: f32, what: &str) {
    assert_eq!(found.dims(), wanted.dims(), "{what}");
    let (found, wanted) = (values(found), values(wanted));
    let size = wanted.iter().fold(1.0f32, |m, v| m.max(v.abs()));
    for (i, (f, w)) in found.iter().zip(&wanted).enumerate() {
        let apart = (f - w).abs();
        assert!(
            apart <= tolerance * size,
            "{what}: element {i} is {f}, {w} expected"
        );
    }
}

prop_compose! {
    fn any_case()(
        rows in prop_oneof![1..9usize, 9..200usize],
        inputs in 1..80usize,
        outputs in prop::collection::vec(1..20usize, 2..4),
        bias in any::<bool>(),
        targets in prop::collection::vec(any::<bool>(), 3),
        rank in 1..20usize,
    ) -> Case {
        Case { rows, inputs, outputs, bias, targets, rank }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..Default::default() })]

    #[test]
    fn fused_layers_are_the_single_ones_side_by_side(case in any_case()) {
        for precision in [DType::F32, DType::BF16, DType::F16] {
            case.compare(|| Weights::drawn(7, Precision::In(precision), &Device::Cpu), 2e-5);
        }
    }

    #[test]
    fn so_they_are_where_the_weights_are_trained(case in any_case()) {
        case.compare(|| Weights::trainable(&[], 7, &Device::Cpu).unwrap(), 2e-5);
    }
}

/// Large enough for several blocks of each product, and for matrices in half precision of several panels.
#[test]
fn large_ones_are_too() {
    let case = Case {
        rows: 300,
        inputs: 256,
        outputs: vec![300, 20, 128],
        bias: true,
        targets: vec![true, false, true],
        rank: 8,
    };
    for precision in [DType::F32, DType::BF16] {
        case.compare(
            || Weights::drawn(7, Precision::In(precision), &Device::Cpu),
            2e-5,
        );
    }
}

#[test]
fn a_gate_and_what_it_gates_are_multiplied() {
    let case = Case {
        rows: 12,
        inputs: 24,
        outputs: vec![10, 10],
        bias: false,
        targets: vec![true, true],
        rank: 4,
    };
    let weights = || Weights::drawn(7, DType::F32, &Device::Cpu);
    let ((fused, _), (each, _)) = (case.fused(weights()), case.each(weights()));
    let x = case.x();
    let [gate, up] = [0, 1].map(|i| each[i].forward(&x).unwrap());
    let wanted = ops::swiglu(&gate, &up).unwrap();
    let found = fused.forward(&x).unwrap().swiglu().unwrap();
    assert_close(&found, &wanted, 1e-5, "gated");
}

#[test]
fn adapters_of_small_layers_are_merged_while_nothing_is_learnt() {
    let case = Case {
        rows: 20,
        inputs: 64,
        outputs: vec![16, 8, 16],
        bias: true,
        targets: vec![false, true, true],
        rank: 8,
    };
    let (fused, _) = case.fused(Weights::drawn(7, DType::F32, &Device::Cpu));
    let x = case.x();
    let all = || -> Vec<Tensor> {
        let y = fused.forward(&x).unwrap();
        (0..3).map(|i| y.part(i).unwrap()).collect()
    };
    let beside = no_grad(all);
    let (first, second) = merged(|| no_grad(|| (all(), all())));
    for (i, beside) in beside.iter().enumerate() {
        assert_close(&first[i], beside, 1e-5, "merged");
        assert_eq!(values(&first[i]), values(&second[i]));
    }
    assert_eq!(values(&first[0]), values(&beside[0]), "without an adapter");
    assert!(values(&first[1]) != values(&beside[1]), "it was not merged");
}

/// What a checkpoint lacks is named as for single layers.
#[test]
fn a_missing_layer_is_a_fault_of_its_own_name() {
    let weights = Weights::from_tensors(Default::default(), DType::F32, &Device::Cpu);
    let places = NAMES.map(|name| (4, weights.pp(name)));
    FusedLinear::new(3, &places, true, Init::Zeros).unwrap();
    let fault = weights.finish().unwrap_err().to_string();
    for name in NAMES {
        assert!(fault.contains(&format!("{name}.weight")), "{fault}");
        assert!(fault.contains(&format!("{name}.bias")), "{fault}");
    }
}
