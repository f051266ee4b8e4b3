//! Frozen weights in half precision on the CPU: what is computed is what f32 arithmetic gives for the rounded weights,
//! and a file that has the type already is not copied.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;
use proxytune::models::llamagen::{Gpt, gpt};
use proxytune::models::pickle::Pickle;
use proxytune::nn::{
    Adapter, HalfKind, HalfMatrix, Init, Lora, LoraConfig, Precision, Weight, Weights, ops,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

const CPU: Device = Device::Cpu;
const KINDS: [HalfKind; 2] = [HalfKind::Bf16, HalfKind::F16];

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = StandardNormal
        .sample_iter(&mut generator)
        .take(shape.iter().product())
        .collect();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, relative to the largest element.
fn apart(found: &Tensor, wanted: &Tensor) -> f32 {
    assert_eq!(found.dims(), wanted.dims());
    let (found, wanted) = (flat(found), flat(wanted));
    let size = wanted.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
    let differences = found.iter().zip(&wanted).map(|(f, w)| (f - w).abs());
    differences.fold(0.0, f32::max) / size
}

/// A product, its gradients and what they should be: (found, wanted).
fn products(
    kind: HalfKind,
    (rows, inputs, outputs): (usize, usize, usize),
    adapted: bool,
    seed: u64,
) -> Vec<(Tensor, Tensor)> {
    let half = HalfMatrix::new(&random(&[outputs, inputs], seed), kind).unwrap();
    let wide = half.to_tensor().unwrap();
    let bias = Var::from_tensor(&random(&[outputs], seed + 1)).unwrap();
    let x = Var::from_tensor(&random(&[rows, inputs], seed + 2)).unwrap();
    let lora = adapted.then(|| Lora {
        a: Var::from_tensor(&random(&[3, inputs], seed + 3)).unwrap(),
        b: Var::from_tensor(&random(&[outputs, 3], seed + 4)).unwrap(),
        scale: 0.5,
    });
    let found = ops::adapted_linear(
        x.as_tensor(),
        &Weight::Half(half),
        Some(&bias),
        lora.as_ref(),
    )
    .unwrap();
    let wanted = match &lora {
        None => ops::linear(x.as_tensor(), &wide, Some(&bias)).unwrap(),
        // Five tensors of which four are tracked: the definition, operation by operation.
        Some(lora) => {
            let y = ops::linear(x.as_tensor(), &wide, Some(&bias)).unwrap();
            let low = ops::linear(x.as_tensor(), &lora.a, None).unwrap();
            let addition = ops::linear(&low, &lora.b, None).unwrap();
            (y + (addition * lora.scale).unwrap()).unwrap()
        }
    };
    let weights = random(&[rows, outputs], seed + 5);
    let differentiate = |y: &Tensor| {
        (y * &weights)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap()
    };
    let (ours, theirs) = (differentiate(&found), differentiate(&wanted));
    let mut variables = vec![&x, &bias];
    variables.extend(lora.iter().flat_map(|lora| [&lora.a, &lora.b]));
    let mut pairs = vec![(found, wanted)];
    for variable in variables {
        let get = |store: &candle_core::backprop::GradStore| store.get(variable).unwrap().clone();
        pairs.push((get(&ours), get(&theirs)));
    }
    pairs
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_product_is_that_of_the_rounded_weight_in_f32(
        seed in 1u64..1000, rows in 1usize..40, inputs in 1usize..300, outputs in 1usize..300, adapted: bool,
    ) {
        for kind in KINDS {
            for (found, wanted) in products(kind, (rows, inputs, outputs), adapted, seed) {
                prop_assert!(apart(&found, &wanted) < 3e-6);
            }
        }
    }

    #[test]
    fn rows_of_a_table_are_the_rounded_rows(seed in 1u64..1000, count in 1usize..50, width in 1usize..90) {
        let table = random(&[count, width], seed);
        let ids: Vec<u32> = (0..30).map(|i| (i * 7 % count) as u32).collect();
        let ids = Tensor::from_vec(ids, (5, 6), &CPU).unwrap();
        for kind in KINDS {
            let half = HalfMatrix::new(&table, kind).unwrap();
            let found = ops::half_embedding(&half, &ids).unwrap();
            let wanted = ops::embedding(&half.to_tensor().unwrap(), &ids).unwrap();
            prop_assert_eq!(found.dims(), wanted.dims());
            prop_assert_eq!(flat(&found), flat(&wanted));
        }
    }
}

#[test]
fn products_hold_where_work_is_split_into_panels() {
    for kind in KINDS {
        // A table longer than a panel, a wide one, and rows few enough to read each weight once.
        for sizes in [
            (20, 300, 9000),
            (20, 5000, 300),
            (8, 700, 1500),
            (1, 2000, 3000),
        ] {
            for (found, wanted) in products(kind, sizes, true, 5) {
                assert!(apart(&found, &wanted) < 3e-6, "{kind:?} {sizes:?}");
            }
        }
    }
}

#[test]
fn few_rows_give_the_same_bits_as_the_widened_weight() {
    for kind in KINDS {
        let half = HalfMatrix::new(&random(&[130, 333], 1), kind).unwrap();
        let wide = half.to_tensor().unwrap();
        let half = Weight::Half(half);
        for rows in [1, 2, 8] {
            let x = random(&[rows, 333], 2);
            let found = ops::adapted_linear(&x, &half, None, None).unwrap();
            assert_eq!(flat(&found), flat(&ops::linear(&x, &wide, None).unwrap()));
        }
    }
}

#[test]
fn products_are_equal_to_the_byte_for_one_two_and_three_threads() {
    let bits = |threads: usize| -> Vec<u32> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let sizes = [(30, 500, 700), (2, 900, 1100)];
            let all = sizes.map(|sizes| products(HalfKind::Bf16, sizes, true, 3));
            let found = all.iter().flatten().flat_map(|(found, _)| flat(found));
            found.map(f32::to_bits).collect()
        })
    };
    let one = bits(1);
    assert!(one == bits(2) && one == bits(3));
}

#[test]
fn the_frozen_weight_gets_no_gradient_and_other_types_are_computed_plainly() {
    let half = Weight::Half(HalfMatrix::new(&random(&[4, 5], 1), HalfKind::F16).unwrap());
    let x = random(&[2, 5], 2).to_dtype(DType::F64).unwrap();
    let y = ops::adapted_linear(&x, &half, None, None).unwrap();
    assert_eq!(y.dtype(), DType::F64);
    let narrow = ops::adapted_linear(&random(&[2, 5], 2), &half, None, None).unwrap();
    assert!(!narrow.track_op());
    assert!(apart(&y.to_dtype(DType::F32).unwrap(), &narrow) < 1e-6);
}

#[test]
fn norms_and_softmax_in_half_precision_lose_no_more_than_their_result_is_rounded() {
    // A mean far from zero, and more elements than half precision can count.
    let x = (random(&[2, 8, 600], 1) + 3.0).unwrap();
    let (weight, bias) = (random(&[8], 2), random(&[8], 3));
    let (scale, shift) = (random(&[600], 4), random(&[600], 5));
    for kind in [DType::BF16, DType::F16] {
        let half = |t: &Tensor| t.to_dtype(kind).unwrap();
        let wide = |t: &Tensor| half(t).to_dtype(DType::F32).unwrap();
        let computed = |as_kind: &dyn Fn(&Tensor) -> Tensor| {
            let [x, weight, bias] = [&x, &weight, &bias].map(as_kind);
            let [scale, shift] = [&scale, &shift].map(as_kind);
            [
                ops::layer_norm(&x, Some(&scale), Some(&shift), 1e-5).unwrap(),
                ops::group_norm(&x, 2, &weight, &bias, 1e-5).unwrap(),
                ops::softmax(&x).unwrap(),
            ]
        };
        for (narrow, exact) in computed(&half).iter().zip(&computed(&wide)) {
            assert_eq!(narrow.dtype(), kind);
            let narrow = narrow.to_dtype(DType::F32).unwrap();
            let rounding = if kind == DType::BF16 { 4e-3 } else { 5e-4 };
            assert!(apart(&narrow, exact) <= rounding, "{kind:?}");
        }
    }
}

#[test]
fn a_convolutions_adapter_is_computed_in_the_type_of_its_input() {
    let (weight, bias) = (random(&[4, 3, 3, 3], 1), random(&[4], 2));
    let factors = proxytune::nn::Factors {
        a: random(&[2, 3, 3, 3], 3),
        b: random(&[4, 2, 1, 1], 4),
        scale: 0.5,
    };
    let x = random(&[1, 3, 5, 6], 5);
    let computed = |dtype: DType| {
        let tensors = HashMap::from([
            ("conv.weight".to_string(), weight.clone()),
            ("conv.bias".to_string(), bias.clone()),
        ]);
        let layers = BTreeMap::from([("conv".to_string(), factors.clone())]);
        let adapter = Arc::new(Adapter::from_factors(layers, str::to_string));
        let weights = Weights::from_tensors(tensors, dtype, &CPU).with_adapter(adapter);
        let padding = ops::Padding::Same(1);
        let conv = proxytune::nn::Conv2d::new(3, 4, 3, 1, padding, &weights.pp("conv")).unwrap();
        let y = conv.forward(&x.to_dtype(dtype).unwrap()).unwrap();
        assert_eq!(y.dtype(), dtype);
        y.to_dtype(DType::F32).unwrap()
    };
    assert!(apart(&computed(DType::F64), &computed(DType::F32)) < 1e-5);
}

fn write(dir: &Path, name: &str, tensors: &[(&str, Tensor)]) -> PathBuf {
    let path = dir.join(name);
    let tensors: HashMap<String, Tensor> = tensors
        .iter()
        .map(|(n, t)| (n.to_string(), t.clone()))
        .collect();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    path
}

fn matrix(weights: &Weights, name: &str, shape: (usize, usize)) -> Weight {
    weights.matrix(shape, name, Init::Zeros).unwrap()
}

#[test]
fn a_file_in_half_precision_is_mapped_and_every_other_is_rounded_once() {
    let dir = tempfile::tempdir().unwrap();
    let values = random(&[1024, 1024], 1);
    let (wide, bf16, f16) = (
        values.clone(),
        values.to_dtype(DType::BF16).unwrap(),
        values.to_dtype(DType::F16).unwrap(),
    );
    let vector = random(&[10], 2).to_dtype(DType::BF16).unwrap();
    let tensors = [
        ("wide", wide),
        ("bf16", bf16.clone()),
        ("f16", f16),
        ("vector", vector),
        ("small", random(&[6, 10], 3).to_dtype(DType::BF16).unwrap()),
    ];
    let file = write(dir.path(), "mixed.safetensors", &tensors);
    let open = |precision: Precision| {
        Weights::from_files(&[&file].map(PathBuf::from), precision, &CPU).unwrap()
    };

    let weights = open(Precision::AsStored);
    assert_eq!(weights.dtype(), DType::F32);
    assert!(
        matches!(matrix(&weights, "wide", (1024, 1024)), Weight::Tensor(t) if t.dtype() == DType::F32)
    );
    for (name, kind) in [("bf16", HalfKind::Bf16), ("f16", HalfKind::F16)] {
        match matrix(&weights, name, (1024, 1024)) {
            Weight::Half(half) => assert!(half.is_mapped() && half.kind() == kind),
            _ => panic!("{name} was widened"),
        }
    }
    assert!(
        matches!(matrix(&weights, "small", (6, 10)), Weight::Tensor(t) if t.dtype() == DType::F32)
    );
    let vector = weights.get(10, "vector", Init::Zeros).unwrap();
    assert_eq!(vector.dtype(), DType::F32);
    weights.finish().unwrap();
    assert!(weights.unused().is_empty());

    let weights = open(DType::BF16.into());
    for (name, mapped) in [("wide", false), ("bf16", true), ("f16", false)] {
        let Weight::Half(half) = matrix(&weights, name, (1024, 1024)) else {
            panic!("{name} is not in half precision");
        };
        assert_eq!(half.is_mapped(), mapped, "{name}");
        assert_eq!(half.kind(), HalfKind::Bf16);
        if name != "f16" {
            let wanted = bf16.to_dtype(DType::F32).unwrap();
            assert_eq!(flat(&half.to_tensor().unwrap()), flat(&wanted));
        }
    }

    let weights = open(DType::F32.into());
    assert!(
        matches!(matrix(&weights, "bf16", (1024, 1024)), Weight::Tensor(t) if t.dtype() == DType::F32)
    );
}

#[test]
fn a_mapped_matrix_outlives_the_weights_that_opened_it() {
    let dir = tempfile::tempdir().unwrap();
    let values = random(&[6, 10], 1).to_dtype(DType::F16).unwrap();
    let file = write(dir.path(), "one.safetensors", &[("w", values.clone())]);
    let held = matrix(
        &Weights::from_files(&[file], DType::F16, &CPU).unwrap(),
        "w",
        (6, 10),
    );
    let wanted = values.to_dtype(DType::F32).unwrap();
    assert_eq!(flat(held.to_tensor().unwrap().as_ref()), flat(&wanted));
}

#[test]
fn a_matrix_at_an_odd_address_is_copied() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd.safetensors");
    // One byte of another tensor first, and no padding of the header: the matrix starts at an odd offset.
    let values = random(&[3, 4], 1).to_dtype(DType::BF16).unwrap();
    let bits: Vec<u8> = flat(&values.to_dtype(DType::F32).unwrap())
        .iter()
        .flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes())
        .collect();
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"BF16","shape":[3,4],"data_offsets":[1,25]}}"#;
    let header = format!("{header:<width$}", width = header.len().next_multiple_of(8));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.push(0);
    bytes.extend(&bits);
    std::fs::write(&path, bytes).unwrap();
    let weights = Weights::from_files(&[path], DType::BF16, &CPU).unwrap();
    let Weight::Half(half) = matrix(&weights, "w", (3, 4)) else {
        panic!("widened");
    };
    assert!(!half.is_mapped());
    assert_eq!(
        flat(&half.to_tensor().unwrap()),
        flat(&values.to_dtype(DType::F32).unwrap())
    );
}

#[test]
fn faults_of_a_checkpoint_in_half_precision_are_named_like_those_of_any_other() {
    let tensors = HashMap::from([("w".to_string(), random(&[3, 4], 1))]);
    let weights = Weights::from_tensors(tensors, DType::BF16, &CPU);
    matrix(&weights, "w", (4, 3));
    matrix(&weights, "missing", (2, 2));
    let text = weights.finish().unwrap_err().to_string();
    assert!(
        text.contains("w has shape [3, 4], [4, 3] expected"),
        "{text}"
    );
    assert!(text.contains("missing [2, 2] is missing"), "{text}");
}

#[test]
fn a_gpt_in_half_precision_equals_the_one_of_rounded_weights_with_its_gradients() {
    let case =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llamagen-gpt/grouped-heads");
    let text = std::fs::read_to_string(case.join("model/config.json")).unwrap();
    let config: gpt::Config = serde_json::from_str(&text).unwrap();
    let tensors = Pickle::open(&case.join("model/model.pt"))
        .unwrap()
        .read_all()
        .unwrap();
    let rounded: HashMap<String, Tensor> = tensors
        .iter()
        .map(|(name, t)| {
            let is_matrix = t.rank() == 2 && name.ends_with("weight");
            let t = match is_matrix {
                true => t
                    .to_dtype(DType::BF16)
                    .unwrap()
                    .to_dtype(DType::F32)
                    .unwrap(),
                false => t.to_dtype(DType::F32).unwrap(),
            };
            (name.clone(), t)
        })
        .collect();
    let captions = random(&[2, config.cls_token_num, config.caption_dim], 1);
    let mask = Tensor::ones((2, config.cls_token_num), DType::U8, &CPU).unwrap();
    let tokens: Vec<u32> = (0..2 * (config.block_size - 1))
        .map(|i| (i * 5 % config.vocab_size) as u32)
        .collect();
    let tokens = Tensor::from_vec(tokens, (2, config.block_size - 1), &CPU).unwrap();
    let run = |weights: Weights| {
        let targets = ["wqkv", "wo", "w1", "w2", "w3"].map(String::from).to_vec();
        let settings = LoraConfig {
            rank: 2,
            alpha: 2.0,
            targets,
        };
        let adapter = Arc::new(Adapter::new(settings, 0));
        let model = Gpt::new(&config, &weights.with_adapter(adapter.clone())).unwrap();
        for (i, (_, variable)) in adapter.variables().iter().enumerate() {
            let values = (random(variable.dims(), i as u64) * 0.1).unwrap();
            variable.set(&values).unwrap();
        }
        let logits = model.forward(&captions, &mask, &tokens, None).unwrap();
        let gradients = logits
            .sqr()
            .unwrap()
            .mean_all()
            .unwrap()
            .backward()
            .unwrap();
        let gradients: BTreeMap<String, Tensor> = adapter
            .variables()
            .into_iter()
            .map(|(name, v)| (name, gradients.get(&v).unwrap().clone()))
            .collect();
        (logits, gradients)
    };
    let (half, half_gradients) = run(Weights::from_tensors(tensors, DType::BF16, &CPU));
    let (wide, wide_gradients) = run(Weights::from_tensors(rounded, DType::F32, &CPU));
    assert!(apart(&half, &wide) < 1e-5);
    for (name, wanted) in wide_gradients {
        let norm = flat(&wanted).iter().fold(0f32, |m, v| m.max(v.abs()));
        let difference = (&half_gradients[&name] - &wanted).unwrap();
        let difference = flat(&difference).iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(difference <= 1e-4 * norm, "{name}: {difference} of {norm}");
    }
}

/// Where the first number of `tensor` lies.
fn place(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(storage) => storage.as_slice::<f32>().unwrap().as_ptr().addr(),
        _ => panic!("not on the CPU"),
    }
}

#[test]
fn weights_of_the_same_files_are_loaded_once_while_somebody_keeps_them() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.safetensors");
    let write = |seed: u64| {
        let tensors = [("w".to_string(), random(&[4, 6], seed))].into();
        proxytune::files::write_tensors(&file, &tensors, &[]).unwrap();
    };
    let open = || Weights::from_files(std::slice::from_ref(&file), DType::F32, &CPU).unwrap();
    let read = |weights: &Weights| weights.get((4, 6), "w", Init::Zeros).unwrap();
    write(1);
    let (one, two) = (open(), open());
    let first = read(&one);
    assert_eq!(place(&first), place(&read(&two)));
    drop(one);
    assert_eq!(place(&first), place(&read(&open())));
    // Trained weights are nobody else's.
    let trained = Weights::trainable(std::slice::from_ref(&file), 0, &CPU).unwrap();
    assert_ne!(place(&first), place(&read(&trained)));
    // A file that was written again is another one.
    std::thread::sleep(std::time::Duration::from_millis(20));
    write(2);
    assert_ne!(flat(&first), flat(&read(&open())));
    drop(two);
}
