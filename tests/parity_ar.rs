//! The AR students' models, their tokenizers and encoders and the evaluators compute what their reference
//! implementations compute. The cases and the programs that made them are in `tests/golden`; see
//! `tests/golden/ar/common.py` for their files.

use std::path::Path;

use candle_core::{DType, Tensor};
use proxytune::models::llamagen::{Gpt, Sampling, VqModel, gpt, vq};
use proxytune::models::pickle::Pickle;
use proxytune::models::{checkpoint_files, clip, t5, vit};
use proxytune::nn::Weights;

use crate::support::golden::*;

#[test]
fn t5_encoder_equals_transformers_with_gradients_for_every_weight() {
    for name in ["gated-gelu", "relu"] {
        let case = case("t5", name);
        let reference = load(case.join("reference.safetensors"));
        let config: t5::Config = config(&case);
        let weights = frozen(&case);
        let model = t5::T5Encoder::new(&config, &weights).unwrap();
        weights.finish().unwrap();
        assert_eq!(weights.unused(), Vec::<String>::new());
        let mask = ids(&reference, "input.attention_mask");
        let output = model
            .forward(&ids(&reference, "input.input_ids"), &mask)
            .unwrap();
        // Only what is valid means something.
        let mask = mask.to_dtype(DType::F32).unwrap().unsqueeze(2).unwrap();
        let (ours, theirs) = (
            output.broadcast_mul(&mask).unwrap(),
            reference["output"].broadcast_mul(&mask).unwrap(),
        );
        assert_close(name, &ours, &theirs);

        let reference = load(case.join("training.safetensors"));
        let weights = trainable(&case);
        let model = t5::T5Encoder::new(&config, &weights).unwrap();
        let mask = ids(&reference, "input.attention_mask");
        let output = model
            .forward(&ids(&reference, "input.input_ids"), &mask)
            .unwrap();
        let loss = dot(&output, &reference["cotangent"]);
        assert_gradients(&weights.variables(), &loss, &reference);
    }
}

/// A second implementation, on texts longer and shorter than those of the golden cases.
#[test]
fn t5_encoder_equals_that_of_candle_transformers() {
    use candle_transformers::models::t5::T5EncoderModel;
    for name in ["gated-gelu", "relu"] {
        let case = case("t5", name);
        let weights = frozen(&case);
        let ours = t5::T5Encoder::new(&config(&case), &weights).unwrap();
        let tensors = load(case.join("model/model.safetensors"));
        let tensors = tensors.into_iter().collect();
        let vb = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &CPU);
        let mut theirs = T5EncoderModel::load(vb, &config(&case)).unwrap();
        for length in [1u32, 3, 70] {
            let ids: Vec<u32> = (0..length).map(|i| (i * 7 + 3) % 33).collect();
            let ids = Tensor::new(ids, &CPU).unwrap().unsqueeze(0).unwrap();
            assert_close(
                name,
                &ours.forward(&ids, &ids.ones_like().unwrap()).unwrap(),
                &theirs.forward(&ids).unwrap(),
            );
        }
    }
}

#[test]
fn padding_does_not_change_what_t5_says_of_a_text() {
    let case = case("t5", "gated-gelu");
    let weights = frozen(&case);
    let model = t5::T5Encoder::new(&config(&case), &weights).unwrap();
    let text = Tensor::new(&[[7u32, 3, 9]], &CPU).unwrap();
    let padded = Tensor::new(&[[7u32, 3, 9, 0, 0]], &CPU).unwrap();
    let alone = model.forward(&text, &Tensor::new(&[[1u32, 1, 1]], &CPU).unwrap());
    let mask = Tensor::new(&[[1u32, 1, 1, 0, 0]], &CPU).unwrap();
    let together = model.forward(&padded, &mask).unwrap();
    assert_close("text", &together.narrow(1, 0, 3).unwrap(), &alone.unwrap());
}

#[test]
fn clip_embeddings_equal_transformers_with_gradients_for_every_weight() {
    for name in ["first-end-of-text", "largest-id"] {
        let case = case("clip", name);
        let config: clip::Config = config(&case);
        let weights = frozen(&case);
        let model = clip::Clip::new(&config, &weights).unwrap();
        weights.finish().unwrap();
        assert_eq!(weights.unused(), Vec::<String>::new());
        let reference = load(case.join("reference-text.safetensors"));
        let texts = ids(&reference, "input.input_ids");
        assert_close(
            name,
            &model.encode_text(&texts).unwrap(),
            &reference["output"],
        );
        let reference = load(case.join("reference-image.safetensors"));
        let images = &reference["input.pixel_values"];
        assert_close(
            name,
            &model.encode_image(images).unwrap(),
            &reference["output"],
        );

        let reference = load(case.join("training.safetensors"));
        let weights = trainable(&case);
        let model = clip::Clip::new(&config, &weights).unwrap();
        let texts = model
            .encode_text(&ids(&reference, "input.input_ids"))
            .unwrap();
        let images = model
            .encode_image(&reference["input.pixel_values"])
            .unwrap();
        let similarities = images.matmul(&texts.t().unwrap()).unwrap();
        let scale = model.logit_scale().exp().unwrap();
        let logits = similarities.broadcast_mul(&scale).unwrap();
        let loss = dot(&logits, &reference["cotangent"]);
        assert_gradients(&weights.variables(), &loss, &reference);
    }
}

#[test]
fn clip_text_towers_equal_transformers_in_every_layout() {
    for name in ["projected", "plain", "plain-prefixed"] {
        let case = case("clip-text", name);
        let config: clip::TextConfig = config(&case);
        let reference = load(case.join("reference.safetensors"));
        let weights = frozen(&case);
        let model = clip::TextModel::new(&config, &weights).unwrap();
        weights.finish().unwrap();
        assert_eq!(weights.unused(), Vec::<String>::new());
        let output = model.forward(&ids(&reference, "input.input_ids")).unwrap();
        assert_close(name, &output.penultimate, &reference["output"]);
        assert_close(name, &output.pooled, &reference["output.pooled"]);
        if name != "plain-prefixed" {
            let reference = load(case.join("training.safetensors"));
            let weights = trainable(&case);
            let model = clip::TextModel::new(&config, &weights).unwrap();
            let output = model.forward(&ids(&reference, "input.input_ids")).unwrap();
            let loss = dot(&output.pooled, &reference["cotangent"]);
            assert_gradients(&weights.variables(), &loss, &reference);
        }
    }
}

#[test]
fn dino_class_tokens_equal_transformers_under_all_names() {
    for name in [
        "hub-with-pooler",
        "classifier",
        "transformers-5-names",
        "timm-names",
    ] {
        let case = case("dino", name);
        let config: vit::Config = config(&case);
        let reference = load(case.join("reference.safetensors"));
        let weights = frozen(&case);
        let model = vit::Vit::new(&config, &weights).unwrap();
        weights.finish().unwrap();
        let unused = weights.unused();
        assert!(
            unused
                .iter()
                .all(|name| name.starts_with("pooler") || name.starts_with("classifier")),
            "{unused:?}"
        );
        let output = model.forward(&reference["input.pixel_values"]).unwrap();
        assert_close(name, &output, &reference["output"]);
        if case.join("training.safetensors").exists() {
            let reference = load(case.join("training.safetensors"));
            let weights = trainable(&case);
            let model = vit::Vit::new(&config, &weights).unwrap();
            let output = model.forward(&reference["input.pixel_values"]).unwrap();
            let loss = dot(&output, &reference["cotangent"]);
            assert_gradients(&weights.variables(), &loss, &reference);
        }
    }
}

#[test]
fn position_embeddings_of_another_size_are_refused() {
    let case = case("dino", "classifier");
    let mut config: vit::Config = config(&case);
    config.image_size = vit::Size::square(20);
    let weights = frozen(&case);
    vit::Vit::new(&config, &weights).unwrap();
    let error = weights.finish().unwrap_err().to_string();
    assert!(error.contains("position_embeddings"), "{error}");
}

fn open_gpt(case: &Path) -> (Gpt, Weights) {
    let config: gpt::Config = config(case);
    let weights = checkpoint_files::open(&case.join("model"), "model", DType::F32, &CPU).unwrap();
    let model = Gpt::new(&config, &weights).unwrap();
    weights.finish().unwrap();
    (model, weights)
}

fn gpt_logits(model: &Gpt, tensors: &Tensors) -> Tensor {
    model
        .forward(
            &tensors["input.caption_embeddings"],
            &tensors["input.caption_mask"],
            &ids(tensors, "input.tokens"),
            None,
        )
        .unwrap()
}

const GPT_CASES: [&str; 2] = ["two-layers", "grouped-heads"];

#[test]
fn llamagen_gpt_has_its_sources_gradients_for_every_weight() {
    for name in GPT_CASES {
        let case = case("llamagen-gpt", name);
        let reference = load(case.join("training.safetensors"));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("model.safetensors");
        let tensors = Pickle::open(&case.join("model/model.pt"))
            .unwrap()
            .read_all()
            .unwrap();
        candle_core::safetensors::save(&tensors, &file).unwrap();
        let weights = Weights::trainable(&[file], 0, &CPU).unwrap();
        let model = Gpt::new(&config(&case), &weights).unwrap();
        let loss = dot(&gpt_logits(&model, &reference), &reference["cotangent"]);
        assert_gradients(&weights.variables(), &loss, &reference);
    }
}

#[test]
fn greedy_tokens_equal_llamagens_with_and_without_guidance() {
    for name in GPT_CASES {
        let case = case("llamagen-gpt", name);
        let reference = load(case.join("greedy.safetensors"));
        let (model, _) = open_gpt(&case);
        let captions = &reference["caption_embeddings"];
        let mask = &reference["caption_mask"];
        let b = captions.dim(0).unwrap();
        for (key, guidance_scale, guidance_interval) in [
            ("tokens", 1.0, None),
            ("guided", 3.0, None),
            ("interval", 3.0, Some(10)),
        ] {
            let greedy = Sampling {
                guidance_scale,
                guidance_interval,
                temperature: 0.0,
                ..Sampling::default()
            };
            let theirs = ids(&reference, key).to_vec2::<u32>().unwrap();
            let batch = model
                .generate(captions, mask, 64, &greedy, &vec![0; b])
                .unwrap();
            assert_eq!(batch, theirs, "{name}, {key}, as one batch");
            for (i, row) in theirs.iter().enumerate() {
                let (caption, mask) = (
                    captions.narrow(0, i, 1).unwrap(),
                    mask.narrow(0, i, 1).unwrap(),
                );
                let single = model.generate(&caption, &mask, 64, &greedy, &[0]).unwrap();
                assert_eq!(&single[0], row, "{name}, {key}, row {i} alone");
            }
        }
    }
}

#[test]
fn decoding_without_a_cache_gives_the_same_tokens() {
    for name in GPT_CASES {
        let case = case("llamagen-gpt", name);
        let reference = load(case.join("greedy.safetensors"));
        let (model, _) = open_gpt(&case);
        let b = reference["caption_mask"].dim(0).unwrap();
        // All rows as one batch, then each alone.
        let batches = std::iter::once((0, b)).chain((0..b).map(|row| (row, 1)));
        for (first, rows) in batches {
            let of = |name: &str| reference[name].narrow(0, first, rows).unwrap();
            let (captions, mask) = (of("caption_embeddings"), of("caption_mask"));
            let null = model.drop_captions(&captions, &vec![true; rows]).unwrap();
            for (key, scale, guided_tokens) in [
                ("tokens", 1.0, 0),
                ("guided", 3.0, 64),
                // The first token, and the interval's ten after the second.
                ("interval", 3.0, 12),
            ] {
                // All tokens but the last are given, and the largest logit at each place is the next.
                let theirs = of(key).to_dtype(DType::U32).unwrap();
                let given = theirs.narrow(1, 0, 63).unwrap().contiguous().unwrap();
                let logits = model.forward(&captions, &mask, &given, None).unwrap();
                let null = model.forward(&null, &mask, &given, None).unwrap();
                let guided = (((&logits - &null).unwrap() * scale).unwrap() + null).unwrap();
                let logits = Tensor::cat(
                    &[
                        guided.narrow(1, 0, guided_tokens).unwrap(),
                        logits.narrow(1, guided_tokens, 64 - guided_tokens).unwrap(),
                    ],
                    1,
                );
                let ours = logits.unwrap().argmax(2).unwrap().to_vec2::<u32>().unwrap();
                let theirs = theirs.to_vec2::<u32>().unwrap();
                assert_eq!(ours, theirs, "{name}, {key}, {rows} rows from {first}");
            }
        }
    }
}

#[test]
fn a_row_is_drawn_by_its_own_seed_whatever_shares_its_batch() {
    let case = case("llamagen-gpt", "grouped-heads");
    let reference = load(case.join("greedy.safetensors"));
    let (model, _) = open_gpt(&case);
    let captions = &reference["caption_embeddings"];
    let mask = &reference["caption_mask"];
    let sampling = Sampling::default();
    let together = model
        .generate(captions, mask, 20, &sampling, &[4, 5, 6])
        .unwrap();
    let pick = Tensor::new(&[2u32, 1], &CPU).unwrap();
    let (captions, mask) = (
        captions.index_select(&pick, 0).unwrap(),
        mask.index_select(&pick, 0).unwrap(),
    );
    let apart = model
        .generate(&captions, &mask, 20, &sampling, &[6, 5])
        .unwrap();
    assert_eq!(apart, [together[2].clone(), together[1].clone()]);
    let other = model
        .generate(&captions, &mask, 20, &sampling, &[7, 5])
        .unwrap();
    assert_ne!(other[0], apart[0]);
}

#[test]
fn dropout_acts_only_with_a_generator_and_repeats_with_its_seed() {
    use rand::SeedableRng;
    let case = case("llamagen-gpt", "two-layers");
    let reference = load(case.join("reference.safetensors"));
    let mut config: gpt::Config = config(&case);
    (
        config.token_dropout_p,
        config.resid_dropout_p,
        config.ffn_dropout_p,
    ) = (0.1, 0.1, 0.1);
    let weights = checkpoint_files::open(&case.join("model"), "model", DType::F32, &CPU).unwrap();
    let model = Gpt::new(&config, &weights).unwrap();
    let draw = |seed| {
        let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let logits = model.forward(
            &reference["input.caption_embeddings"],
            &reference["input.caption_mask"],
            &ids(&reference, "input.tokens"),
            Some(&mut generator),
        );
        values(&logits.unwrap())
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    assert_ne!(draw(1), values(&gpt_logits(&model, &reference)));
}

#[test]
fn a_checkpoint_without_tensors_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.pt");
    assert!(checkpoint_files::open(directory.path(), "model", DType::F32, &CPU).is_err());
    std::fs::write(&path, "not a zip").unwrap();
    let error = Pickle::open(&path).err().unwrap().to_string();
    assert!(error.contains("model.pt"), "{error}");
}

fn open_vq(case: &Path, trainable: bool) -> (VqModel, Weights) {
    let config: vq::Config = config(case);
    let weights = if trainable {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("model.safetensors");
        let tensors = Pickle::open(&case.join("model/model.pt"))
            .unwrap()
            .read_all()
            .unwrap();
        candle_core::safetensors::save(&tensors, &file).unwrap();
        Weights::trainable(&[file], 0, &CPU).unwrap()
    } else {
        checkpoint_files::open(&case.join("model"), "model", DType::F32, &CPU).unwrap()
    };
    let model = VqModel::new(&config, &weights).unwrap();
    weights.finish().unwrap();
    (model, weights)
}

const VQ_CASES: [&str; 2] = ["one-level", "unnormalised-codes"];

#[test]
fn llamagen_vq_trains_as_its_source_does() {
    for name in VQ_CASES {
        let case = case("llamagen-vq", name);
        let reference = load(case.join("training.safetensors"));
        let (model, weights) = open_vq(&case, true);
        let image = &reference["input.image"];
        let z = model.encode_continuous(image).unwrap();
        assert_close(name, &z, &reference["output.z"]);
        let output = model.forward_train(image).unwrap();
        assert_close(
            name,
            &output.reconstruction,
            &reference["output.reconstruction"],
        );
        assert_close(name, &output.vq_loss, &reference["output.vq_loss"]);
        assert_close(name, &output.commit_loss, &reference["output.commit_loss"]);
        let loss = dot(&output.reconstruction, &reference["cotangent"]);
        let loss = ((loss + &output.vq_loss).unwrap() + &output.commit_loss).unwrap();
        let watched: Vec<_> = weights
            .variables()
            .into_iter()
            .filter(|(name, _)| reference.contains_key(&format!("grad.{name}")))
            .collect();
        assert_gradients(&watched, &loss, &reference);
        let gradients = loss.backward().unwrap();
        for (name, variable) in weights.variables() {
            let gradient = gradients.get(variable.as_tensor());
            assert!(gradient.is_some(), "{name} has no gradient");
        }
    }
}
