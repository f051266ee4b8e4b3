//! Matrices that stay in the blocks of GGUF files: what they hold, products with them, gradients through them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Tensor, Var};
use proxytune::files::gguf::{self, READ};
use proxytune::models::flux::{Condition, Config, FluxTransformer, LORA_TARGETS};
use proxytune::models::t5::T5Encoder;
use proxytune::nn::{
    Adapter, Cut, Embedding, Form, Init, Linear, LoraConfig, Precision, Weight, Weights, backward,
};

use crate::support::golden::{CPU, difference, load};

fn golden(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/golden/single-file/kinds").join(name)
}

/// Kinds that are kept in blocks, as the file of all kinds calls them.
const PACKED: [&str; 10] = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
];

fn all_kinds() -> Weights {
    let files = [golden("kinds.gguf")];
    let called = |name: &str, _: &[usize]| vec![(format!("{name}.weight"), Cut::default())];
    Weights::from_renamed(&files, Some(&called), Precision::AsStored, &CPU).unwrap()
}

fn random(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::randn(0f32, 1f32, shape, &CPU).unwrap()
}

#[test]
fn every_kind_unpacks_to_the_numbers_of_candle_and_of_the_gguf_package() {
    let weights = all_kinds();
    let theirs = load(golden("unpacked.safetensors"));
    let mut file = std::fs::File::open(golden("kinds.gguf")).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    for (name, expected) in &theirs {
        let weight = weights
            .pp(name)
            .matrix((6, 512), "weight", Init::Zeros)
            .unwrap();
        assert_eq!(
            matches!(weight, Weight::Quantised(_)),
            PACKED.contains(&name.as_str()),
            "{name}: {weight:?}"
        );
        let ours = weight.to_tensor().unwrap().into_owned();
        assert!(difference(&ours, expected) < 1e-6, "{name}");
        let candles = content.tensor(&mut file, name, &CPU).unwrap();
        let candles = candles.dequantize(&CPU).unwrap();
        assert_eq!(difference(&ours, &candles), 0.0, "{name}");
    }
    weights.finish().unwrap();
}

#[test]
fn rows_of_a_packed_matrix_are_those_of_the_unpacked_one_in_any_order() {
    let files = [golden("kinds.gguf")];
    let theirs = load(golden("unpacked.safetensors"));
    let called = |name: &str, _: &[usize]| {
        let cut = |rows| Cut {
            rows,
            form: Form::Same,
        };
        vec![
            (format!("{name}.turned"), cut(vec![3..6, 0..3])),
            (format!("{name}.some"), cut(std::iter::once(2..4).collect())),
        ]
    };
    let weights = Weights::from_renamed(&files, Some(&called), Precision::AsStored, &CPU).unwrap();
    for (name, whole) in &theirs {
        let at = weights.pp(name);
        let turned = at.matrix((6, 512), "turned", Init::Zeros).unwrap();
        let (first, second) = (
            whole.narrow(0, 3, 3).unwrap(),
            whole.narrow(0, 0, 3).unwrap(),
        );
        let expected = Tensor::cat(&[first, second], 0).unwrap();
        assert!(
            difference(&turned.to_tensor().unwrap(), &expected) < 1e-6,
            "{name}"
        );
        let some = at.matrix((2, 512), "some", Init::Zeros).unwrap();
        let expected = whole.narrow(0, 2, 2).unwrap();
        assert!(
            difference(&some.to_tensor().unwrap(), &expected) < 1e-6,
            "{name}"
        );
        assert_eq!(
            at.stored(&format!("{name}.some")).unwrap().unwrap().dims(),
            [2, 512]
        );
    }
    weights.finish().unwrap();
}

#[test]
fn a_packed_layer_and_its_adapter_give_the_values_and_gradients_of_the_unpacked_one() {
    let weights = all_kinds();
    let theirs = load(golden("unpacked.safetensors"));
    let config = LoraConfig {
        rank: 2,
        alpha: 3.0,
        targets: PACKED.map(String::from).to_vec(),
    };
    for name in PACKED {
        // Few rows are multiplied otherwise than many.
        for rows in [1, 5, 40] {
            let built = |weights: Weights| {
                let adapter = Arc::new(Adapter::new(config.clone(), 1));
                let place = weights.with_adapter(adapter.clone()).pp(name);
                (Linear::new(512, 6, false, &place).unwrap(), adapter)
            };
            let unpacked = HashMap::from([(format!("{name}.weight"), theirs[name].clone())]);
            let plain = Weights::from_tensors(unpacked, DType::F32, &CPU);
            let ((packed, one), (plain, other)) = (built(weights.clone()), built(plain));
            assert!(matches!(packed.weight(), Weight::Quantised(_)), "{name}");
            let b = random((6, 2));
            for (name, variable) in one.variables().iter().chain(&other.variables()) {
                if name.contains("lora_B") || variable.dims() == [6, 2] {
                    variable.set(&b).unwrap();
                }
            }
            let x = Var::from_tensor(&random((rows, 512))).unwrap();
            let g = random((rows, 6));
            let run = |layer: &Linear, adapter: &Adapter| {
                let y = layer.forward(&x).unwrap();
                let loss = (&y * &g).unwrap().sum_all().unwrap();
                let mut variables = adapter.variables();
                variables.push(("x".to_string(), x.clone()));
                let store = backward(&loss).unwrap();
                let gradient = |(_, v): &(String, Var)| store.get(v).unwrap().clone();
                (y, variables.iter().map(gradient).collect::<Vec<Tensor>>())
            };
            let ((y, dy), (plain_y, plain_dy)) = (run(&packed, &one), run(&plain, &other));
            assert!(difference(&y, &plain_y) < 1e-6, "{name} {rows}");
            assert_eq!((dy.len(), plain_dy.len()), (3, 3));
            for (ours, theirs) in dy.iter().zip(&plain_dy) {
                assert!(difference(ours, theirs) < 1e-5, "{name} {rows}");
            }
        }
    }
}

#[test]
fn a_packed_table_gives_the_rows_of_the_unpacked_one() {
    let weights = all_kinds();
    let theirs = load(golden("unpacked.safetensors"));
    let ids = Tensor::new(&[[5u32, 0], [3, 3]], &CPU).unwrap();
    for name in PACKED {
        let table = Embedding::new(6, 512, &weights.pp(name)).unwrap();
        let expected = theirs[name]
            .index_select(&ids.flatten_all().unwrap(), 0)
            .unwrap();
        let expected = expected.reshape((2, 2, 512)).unwrap();
        assert!(
            difference(&table.forward(&ids).unwrap(), &expected) < 1e-6,
            "{name}"
        );
    }
}

fn flux() -> Config {
    Config {
        in_channels: 32,
        num_layers: 2,
        num_single_layers: 2,
        attention_head_dim: 32,
        num_attention_heads: 2,
        joint_attention_dim: 32,
        pooled_projection_dim: 32,
        guidance_embeds: true,
        axes_dims_rope: vec![4, 14, 14],
        ..Config::default()
    }
}

/// Random weights for a model that took `new` ones: in Q8_0 in a file, and in f32, as they are and as Q8_0 leaves them.
fn packed(
    new: &Weights,
    path: &Path,
    factor: f64,
) -> (HashMap<String, Tensor>, HashMap<String, Tensor>) {
    let (mut packed, mut exact, mut rounded) = (Vec::new(), HashMap::new(), HashMap::new());
    for (name, variable) in new.variables() {
        let width = *variable.dims().last().unwrap();
        let scale = if variable.dims().len() == 2 {
            factor * (width as f64).powf(-0.5)
        } else {
            0.3
        };
        let tensor = (random(variable.shape()) * scale).unwrap();
        let kind = match variable.dims() {
            [_, columns] if columns.is_multiple_of(32) => GgmlDType::Q8_0,
            _ => GgmlDType::F32,
        };
        let quantised = QTensor::quantize(&tensor, kind).unwrap();
        rounded.insert(name.clone(), quantised.dequantize(&CPU).unwrap());
        exact.insert(name.clone(), tensor);
        packed.push((name, quantised));
    }
    let mut file = std::fs::File::create(path).unwrap();
    let architecture = gguf_file::Value::String("any".into());
    let tensors: Vec<_> = packed
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    gguf_file::write(
        &mut file,
        &[("general.architecture", &architecture)],
        &tensors,
    )
    .unwrap();
    (exact, rounded)
}

#[test]
fn a_flux_in_q8_0_draws_and_learns_as_its_unpacked_weights_do() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("flux1-dev-Q8_0.gguf");
    let new = Weights::trainable(&[], 0, &CPU).unwrap();
    FluxTransformer::new(flux(), &new).unwrap();
    let (exact, rounded) = packed(&new, &path, 1.0);
    let packed = Weights::from_files(&[path], Precision::AsStored, &CPU).unwrap();
    let (n, m) = (12, 5);
    let (x, context, pooled) = (random((2, n, 32)), random((2, m, 32)), random((2, 32)));
    let timestep = Tensor::new(&[0.3f32, 0.9], &CPU).unwrap();
    let guidance = Tensor::new(&[1f32, 3.5], &CPU).unwrap();
    let text = Tensor::zeros((m, 3), DType::F32, &CPU).unwrap();
    let ids: Vec<f32> = (0..n)
        .flat_map(|i| [0.0, (i / 4) as f32, (i % 4) as f32])
        .collect();
    let image = Tensor::from_vec(ids, (n, 3), &CPU).unwrap();
    let cotangent = random((2, n, 32));
    let run = |weights: Weights| {
        let config = LoraConfig {
            rank: 2,
            alpha: 2.0,
            targets: LORA_TARGETS.map(String::from).to_vec(),
        };
        let adapter = Arc::new(Adapter::new(config, 4));
        let weights = weights.with_adapter(adapter.clone());
        let model = FluxTransformer::new(flux(), &weights).unwrap();
        weights.expect_no_others();
        weights.finish().unwrap();
        let condition = Condition {
            timestep: &timestep,
            guidance: Some(&guidance),
            encoder_hidden_states: &context,
            pooled_projections: &pooled,
            txt_ids: &text,
            img_ids: &image,
        };
        let y = model.forward(&x, &condition).unwrap();
        let loss = (&y * &cotangent).unwrap().sum_all().unwrap();
        let store = backward(&loss).unwrap();
        let variables = adapter.variables();
        let gradients = variables
            .iter()
            .map(|(_, v)| store.get(v).unwrap().flatten_all().unwrap());
        (
            y.detach(),
            Tensor::cat(&gradients.collect::<Vec<_>>(), 0).unwrap(),
        )
    };
    let memory = |tensors| Weights::from_tensors(tensors, DType::F32, &CPU);
    let (packed, unpacked, exact) = (run(packed), run(memory(rounded)), run(memory(exact)));
    assert!(difference(&packed.0, &unpacked.0) < 1e-5);
    assert!(difference(&packed.1, &unpacked.1) < 1e-4);
    // Q8_0 rounds by up to a 254th of a block's largest number.
    let apart = difference(&packed.0, &exact.0);
    assert!(apart > 1e-5 && apart < 2e-2, "{apart}");
}

#[test]
fn a_t5_in_q8_0_says_what_that_of_candle_transformers_does() {
    use candle_transformers::models::quantized_t5::{T5EncoderModel, VarBuilder};
    let config = serde_json::json!({
        "vocab_size": 64, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2,
        "relative_attention_num_buckets": 32, "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": false,
        "pad_token_id": 0, "eos_token_id": 1,
    });
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("t5-Q8_0.gguf");
    let new = Weights::trainable(&[], 1, &CPU).unwrap();
    let own = serde_json::from_value(config.clone()).unwrap();
    T5Encoder::new(&own, &new).unwrap();
    let (_, rounded) = packed(&new, &path, 0.5);
    let ids = Tensor::new(&[[5u32, 63, 0, 7, 7, 2, 40, 1, 33, 12]], &CPU).unwrap();
    let run = |weights: Weights| {
        let model = T5Encoder::new(&own, &weights).unwrap();
        weights.finish().unwrap();
        model.forward(&ids, &ids.ones_like().unwrap()).unwrap()
    };
    let ours = run(Weights::from_files(std::slice::from_ref(&path), DType::F32, &CPU).unwrap());
    let unpacked = run(Weights::from_tensors(rounded, DType::F32, &CPU));
    assert!(difference(&ours, &unpacked) < 1e-5);
    // candle's products round what goes in to 8 bits too.
    let vb = VarBuilder::from_gguf(&path, &CPU).unwrap();
    let mut theirs = T5EncoderModel::load(vb, &serde_json::from_value(config).unwrap()).unwrap();
    let apart = difference(&ours, &theirs.forward(&ids).unwrap());
    assert!(apart < 3e-2, "{apart}");
}

/// A GGUF file of version 3 with these counts of tensors and entries, and what follows.
fn file(tensors: u64, entries: u64, rest: &[u8]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(entries.to_le_bytes());
    bytes.extend(rest);
    bytes
}

fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = (name.len() as u64).to_le_bytes().to_vec();
    bytes.extend(name.bytes());
    bytes.extend((dims.len() as u32).to_le_bytes());
    bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    let mut bytes = (key.len() as u64).to_le_bytes().to_vec();
    bytes.extend(key.bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(value);
    bytes
}

#[test]
fn gguf_files_that_lie_are_refused_with_what_is_wrong() {
    let long = u64::MAX.to_le_bytes();
    let mut big_endian = b"GGUF".to_vec();
    big_endian.extend(3u32.to_be_bytes());
    let mut array = 8u32.to_le_bytes().to_vec();
    array.extend(long);
    let mut numbers = 10u32.to_le_bytes().to_vec();
    numbers.extend((1u64 << 62).to_le_bytes());
    let mut twice = tensor("x", &[32], 0, 0);
    twice.extend(tensor("x", &[32], 0, 0));
    twice.extend([0; 256]);
    for (bytes, told) in [
        (b"GGML".to_vec(), "does not start with GGUF"),
        (b"GG".to_vec(), "4 bytes are announced"),
        (big_endian, "big-endian"),
        (file(u64::MAX, 0, &[]), "bytes are announced"),
        (file(0, u64::MAX, &[]), "bytes are announced"),
        (file(0, 1, &long), "bytes are announced"),
        (file(0, 1, &entry("a", 8, &long)), "bytes are announced"),
        (file(0, 1, &entry("a", 9, &array)), "bytes are announced"),
        (file(0, 1, &entry("a", 9, &numbers)), "beyond any file"),
        (file(0, 1, &entry("a", 77, &[])), "kind 77"),
        (
            file(0, 1, &entry("general.alignment", 4, &[3, 0, 0, 0])),
            "general.alignment",
        ),
        (
            file(1, 0, &tensor("x", &[1, 1, 1, 1, 1], 0, 0)),
            "5 dimensions",
        ),
        (file(1, 0, &tensor("x", &[32], 20, 0)), "ggml's kind 20"),
        (file(1, 0, &tensor("x", &[33], 8, 0)), "blocks of 32"),
        (
            file(1, 0, &tensor("x", &[1 << 62, 32], 0, 0)),
            "larger than any file",
        ),
        (file(1, 0, &tensor("x", &[32], 0, 0)), "behind the end"),
        (
            file(1, 0, &tensor("x", &[32], 0, 8)),
            "multiple of the alignment",
        ),
        (
            file(1, 0, &tensor("x", &[32], 0, u64::MAX - 31)),
            "larger than any file",
        ),
        (file(2, 0, &twice), "twice"),
    ] {
        let error = gguf::header(&bytes).unwrap_err();
        assert!(error.contains(told), "{told}: {error}");
    }
    let mut deep = 9u32.to_le_bytes().to_vec();
    for _ in 0..100_000 {
        deep.extend(1u64.to_le_bytes());
        deep.extend(9u32.to_le_bytes());
    }
    let error = gguf::header(&file(0, 1, &entry("a", 9, &deep))).unwrap_err();
    assert!(error.contains("arrays"), "{error}");
    // Cut anywhere, the file of all kinds is refused by its name.
    let whole = std::fs::read(golden("kinds.gguf")).unwrap();
    let place = tempfile::tempdir().unwrap();
    // A file may be padded to a multiple of the alignment behind its last tensor.
    for length in [0, 3, 20, 100, 500, whole.len() - 64] {
        let path = place.path().join("cut.gguf");
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = Weights::from_files(&[path], DType::F32, &CPU)
            .err()
            .unwrap();
        assert!(error.to_string().contains("cut.gguf"), "{error}");
    }
    assert!(READ.iter().all(|(_, kind)| *kind != GgmlDType::Q8_1));
}
