//! Chameleon's transformer and image tokenizer compute what transformers, Meta's source and Lumina-mGPT compute. The
//! cases and the programs that made them are in `tests/golden`; see `tests/golden/ar/chameleon.py` and
//! `chameleon_vq.py` for their files.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use proxytune::models::chameleon::files::open_image_tokenizer;
use proxytune::models::chameleon::grammar::{Format, Vocabulary};
use proxytune::models::chameleon::{Backbone, Config, Dropout, Sequence, VqGan, vq};
use proxytune::models::checkpoint_files::{self, WeightFiles};
use proxytune::models::llamagen::Sampling;
use proxytune::models::lora_file::LoraFile;
use proxytune::models::pickle::Pickle;
use proxytune::nn::{Adapter, Weights};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::support::golden::{
    CPU, Tensors, assert_close, assert_gradients, case, config, dot, ids, load, values,
};

const CASES: [&str; 3] = [
    "own-norm-for-each-head",
    "lumina-mgpt",
    "swin-norm-grouped-heads",
];

fn frozen(case: &Path) -> Weights {
    checkpoint_files::open(&case.join("model"), "model", DType::F32, &CPU).unwrap()
}

fn trainable(case: &Path) -> (Backbone, Weights) {
    let files = WeightFiles::find(&case.join("model"), "model").unwrap();
    let files = files.into_safetensors().unwrap();
    let weights = Weights::trainable(&files, 0, &CPU).unwrap();
    let model = Backbone::new(&config(case), &weights).unwrap();
    weights.finish().unwrap();
    (model, weights)
}

fn open(case: &Path) -> Backbone {
    let weights = frozen(case);
    let model = Backbone::new(&config(case), &weights).unwrap();
    weights.finish().unwrap();
    assert_eq!(weights.unused(), Vec::<String>::new());
    model
}

#[test]
fn chameleon_with_a_peft_adapter_equals_transformers_and_so_do_the_adapters_gradients() {
    for name in CASES {
        let case = case("chameleon", name);
        let reference = load(case.join("reference.safetensors"));
        let file = LoraFile::read(&case.join("adapter")).unwrap();
        let adapter = Arc::new(Adapter::from_factors(file.layers, str::to_string));
        let weights = frozen(&case).with_adapter(adapter.clone());
        let model = Backbone::new(&config(&case), &weights).unwrap();
        weights.finish().unwrap();
        let output = model.forward(&ids(&reference, "input.input_ids")).unwrap();
        assert_close(name, &output, &reference["output"]);
        let loss = dot(&output, &reference["cotangent"]);
        assert_gradients(&adapter.variables(), &loss, &reference);
    }
}

#[test]
fn chameleon_has_transformers_gradients_for_every_weight() {
    for name in CASES {
        let case = case("chameleon", name);
        let reference = load(case.join("training.safetensors"));
        let (model, weights) = trainable(&case);
        let output = model.forward(&ids(&reference, "input.input_ids")).unwrap();
        let loss = dot(&output, &reference["cotangent"]);
        assert_gradients(&weights.variables(), &loss, &reference);
    }
}

#[test]
fn the_loss_and_its_gradients_are_lumina_mgpts_for_answers_of_unequal_length() {
    for name in CASES {
        let case = case("chameleon", name);
        let reference = load(case.join("loss.safetensors"));
        let tokens = reference["tokens"].to_vec2::<i64>().unwrap();
        let labelled = reference["labelled"].to_vec1::<i64>().unwrap();
        let batch: Vec<Sequence> = tokens
            .iter()
            .zip(labelled)
            .map(|(row, labelled)| Sequence {
                tokens: row
                    .iter()
                    .filter_map(|&id| u32::try_from(id).ok())
                    .collect(),
                labelled: labelled as usize,
            })
            .collect();
        assert_ne!(batch[0].tokens.len(), batch[1].tokens.len());
        let (model, weights) = trainable(&case);
        let loss = model.loss(&batch, None).unwrap();
        assert_close(name, &loss, &reference["output"]);
        let watched: Vec<_> = weights
            .variables()
            .into_iter()
            .filter(|(name, _)| reference.contains_key(&format!("grad.{name}")))
            .collect();
        assert!(watched.len() >= 2);
        assert_gradients(&watched, &loss, &reference);
    }
}

#[test]
fn dropout_acts_in_the_loss_alone_and_repeats_with_its_seed() {
    let case = case("chameleon", "lumina-mgpt");
    let model = open(&case);
    let batch = [Sequence {
        tokens: (0..30).collect(),
        labelled: 4,
    }];
    let loss = |seed: Option<u64>| {
        let mut generator = seed.map(ChaCha8Rng::seed_from_u64);
        let dropout = generator
            .as_mut()
            .map(|generator| Dropout { p: 0.05, generator });
        values(&model.loss(&batch, dropout).unwrap())
    };
    assert_eq!(loss(Some(1)), loss(Some(1)));
    assert_ne!(loss(Some(1)), loss(Some(2)));
    assert_ne!(loss(Some(1)), loss(None));
}

/// The format of 8x8 codes in the case's own vocabulary.
fn format(config: &Config) -> Format {
    let names = config.vocabulary_map.as_ref().unwrap();
    let vocabulary = Vocabulary::new(|name| names.get(name).copied(), 40, config.vocab_size);
    Format::new(vocabulary.unwrap(), (8, 8), 2, 1).unwrap()
}

fn prompts(greedy: &Tensors) -> Vec<Vec<u32>> {
    (0..3)
        .map(|i| ids(greedy, &format!("prompt.{i}")).to_vec1().unwrap())
        .collect()
}

fn at_temperature_zero(guidance_scale: f64) -> Sampling {
    Sampling {
        guidance_scale,
        temperature: 0.0,
        ..Sampling::default()
    }
}

#[test]
fn greedy_codes_equal_lumina_mgpts_with_and_without_guidance_batched_and_single() {
    for name in CASES {
        let case = case("chameleon", name);
        let reference = load(case.join("greedy.safetensors"));
        let model = open(&case);
        let (format, prompts) = (format(model.config()), prompts(&reference));
        for (key, scale) in [("plain", 1.0), ("guided", 3.0)] {
            let greedy = at_temperature_zero(scale);
            let theirs = ids(&reference, key).to_vec2::<u32>().unwrap();
            let batch = model.draw(&prompts, &format, 64, &greedy, &[0; 3]).unwrap();
            assert_eq!(batch, theirs, "{name}, {key}, as one batch");
            for (prompt, row) in prompts.iter().zip(&theirs) {
                let alone = std::slice::from_ref(prompt);
                let single = model.draw(alone, &format, 64, &greedy, &[0]).unwrap();
                assert_eq!(&single[0], row, "{name}, {key}, alone");
            }
        }
    }
}

#[test]
fn decoding_without_a_cache_gives_the_same_codes() {
    for name in CASES {
        let case = case("chameleon", name);
        let reference = load(case.join("greedy.safetensors"));
        let model = open(&case);
        let format = format(model.config());
        let codes = Tensor::new(format.code_ids(), &CPU).unwrap();
        for (key, scale) in [("plain", None), ("guided", Some(3.0))] {
            let theirs = ids(&reference, key).to_vec2::<u32>().unwrap();
            for (prompt, row) in prompts(&reference).iter().zip(&theirs) {
                let answer = format.answer(row).unwrap();
                let logits = |before: &[u32]| {
                    let tokens = [before, answer.as_slice()].concat();
                    let tokens = Tensor::new(tokens, &CPU).unwrap().unsqueeze(0).unwrap();
                    let logits = model.forward(&tokens).unwrap().squeeze(0).unwrap();
                    let after = logits.narrow(0, before.len(), answer.len()).unwrap();
                    after.index_select(&codes, 1).unwrap()
                };
                let mut scores = logits(prompt);
                if let Some(scale) = scale {
                    let null = logits(&[]);
                    scores = (((scores - &null).unwrap() * scale).unwrap() + null).unwrap();
                }
                let best: Vec<u32> = scores.argmax(1).unwrap().to_vec1().unwrap();
                // A code follows the opening, another code, or a new line.
                let ours: Vec<u32> = (0..64).map(|i| best[2 + i + i / 8]).collect();
                assert_eq!(&ours, row, "{name}, {key}");
            }
        }
    }
}

#[test]
fn an_image_is_drawn_by_its_own_seed_whatever_shares_its_batch() {
    let case = case("chameleon", "own-norm-for-each-head");
    let reference = load(case.join("greedy.safetensors"));
    let model = open(&case);
    let (format, prompts) = (format(model.config()), prompts(&reference));
    let sampling = Sampling {
        guidance_scale: 2.0,
        top_k: 30,
        ..Sampling::default()
    };
    let draw = |prompts: &[Vec<u32>], seeds: &[u64]| {
        model.draw(prompts, &format, 20, &sampling, seeds).unwrap()
    };
    let together = draw(&prompts, &[4, 5, 6]);
    let apart = draw(&[prompts[2].clone(), prompts[1].clone()], &[6, 5]);
    assert_eq!(apart, [together[2].clone(), together[1].clone()]);
    assert_ne!(draw(&prompts[2..], &[7])[0], apart[0]);
}

#[test]
fn logits_of_sequences_longer_than_the_model_has_positions_are_computed() {
    let case = case("chameleon", "swin-norm-grouped-heads");
    let mut config: Config = config(&case);
    let tokens: Vec<u32> = (0..130).map(|i| i * 7 % 40).collect();
    let tokens = Tensor::from_vec(tokens, (1, 130), &CPU).unwrap();
    let short = Backbone::new(&config, &frozen(&case)).unwrap();
    config.max_position_embeddings = 200;
    let long = Backbone::new(&config, &frozen(&case)).unwrap();
    let (short, long) = (short.forward(&tokens), long.forward(&tokens));
    assert_eq!(values(&short.unwrap()), values(&long.unwrap()));
}

#[test]
fn sequences_longer_than_the_model_has_positions_are_not_learnt_or_drawn() {
    let case = case("chameleon", "swin-norm-grouped-heads");
    let model = open(&case);
    let format = format(model.config());
    let greedy = at_temperature_zero(1.0);
    // Fed are the prompt, 3 tokens that open the image, and 63 codes with 7 new lines.
    assert!(
        model
            .draw(&[vec![1; 17]], &format, 64, &greedy, &[0])
            .is_ok()
    );
    let error = model.draw(&[vec![1; 18]], &format, 64, &greedy, &[0]);
    assert!(error.unwrap_err().to_string().contains("90 positions"));
    let sequence = Sequence {
        tokens: vec![1; 92],
        labelled: 1,
    };
    let error = model.loss(&[sequence], None).unwrap_err().to_string();
    assert!(error.contains("90 positions"), "{error}");
    assert!(
        model
            .draw(&[vec![1; 4]], &format, 65, &greedy, &[0])
            .is_err()
    );
}

#[test]
fn other_architectures_and_missing_weights_are_refused_by_name() {
    let case = case("chameleon", "own-norm-for-each-head");
    let mut config: Config = config(&case);
    config.num_hidden_layers = 3;
    let weights = frozen(&case);
    Backbone::new(&config, &weights).unwrap();
    let error = weights.finish().unwrap_err().to_string();
    assert!(
        error.contains("model.layers.2.self_attn.q_norm.weight"),
        "{error}"
    );
}

const META: [&str; 2] = ["meta-attention-at-a-level", "meta-no-attention"];

fn assert_tokens(name: &str, model: &VqGan, reference: &Tensors) {
    let z = model.encode_continuous(&reference["input.image"]).unwrap();
    let ours = values(&model.quantize(&z).unwrap());
    let compared = model.compared(&z).unwrap();
    for (i, (ours, theirs)) in ours
        .into_iter()
        .zip(values(&reference["output"]))
        .enumerate()
    {
        let distances = compared.distances(i);
        let apart = distances[ours as usize] - distances[theirs as usize];
        assert!(ours == theirs || apart.abs() < 1e-5, "{name}, token {i}");
    }
}

#[test]
fn chameleons_image_tokenizer_gives_metas_codes_and_images() {
    for name in META {
        let case = case("chameleon-vq", name);
        let model = open_image_tokenizer(&case.join("model"), &CPU).unwrap();
        assert_tokens(name, &model, &load(case.join("reference.safetensors")));
        let reference = load(case.join("reference-decode.safetensors"));
        let images = model.decode(&ids(&reference, "input.tokens")).unwrap();
        assert_close(name, &images, &reference["output"]);
    }
}

#[test]
fn chameleons_encoder_in_transformers_layout_gives_its_codes_and_decodes_nothing() {
    let case = case("chameleon-vq", "transformers");
    let model = open_image_tokenizer(&case.join("model"), &CPU).unwrap();
    let reference = load(case.join("reference.safetensors"));
    assert_tokens("transformers", &model, &reference);
    let error = model.decode(&ids(&reference, "output")).unwrap_err();
    assert!(error.to_string().contains("no decoder"), "{error}");
}

#[test]
fn chameleons_image_tokenizer_trains_as_metas_source_does() {
    for name in META {
        let case = case("chameleon-vq", name);
        let reference = load(case.join("training.safetensors"));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("vqgan.safetensors");
        let tensors = Pickle::open(&case.join("model/vqgan.ckpt"))
            .unwrap()
            .read_all()
            .unwrap();
        candle_core::safetensors::save(&tensors, &file).unwrap();
        let weights = Weights::trainable(&[file], 0, &CPU).unwrap();
        let yaml = std::fs::read_to_string(case.join("model/vqgan.yaml")).unwrap();
        let config = vq::Config::from_yaml(&yaml).unwrap();
        let model = VqGan::new(&config, &weights).unwrap();
        weights.finish().unwrap();
        assert_eq!(weights.unused(), Vec::<String>::new());
        let image = &reference["input.image"];
        let z = model.encode_continuous(image).unwrap();
        assert_close(name, &z, &reference["output.z"]);
        let output = model.forward_train(image, 1.0).unwrap();
        let decoded = &reference["output.reconstruction"];
        assert_close(name, &output.reconstruction, decoded);
        let lost = ((&output.vq_loss * 0.25).unwrap() + &output.commit_loss).unwrap();
        assert_close(name, &lost, &reference["output.loss"]);
        let loss = dot(&output.reconstruction, &reference["cotangent"]);
        let loss = (loss + lost).unwrap();
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

#[test]
fn a_folder_without_an_image_tokenizer_says_where_one_belongs() {
    let case = case("chameleon", "own-norm-for-each-head");
    let error = open_image_tokenizer(&case.join("model"), &CPU)
        .err()
        .unwrap();
    assert!(error.to_string().contains("no image tokenizer"), "{error}");
    assert!(error.hint().unwrap().contains("vqgan.yaml"));
}

#[test]
fn names_of_codes_are_read_from_the_vocabulary_and_checked_against_the_configs() {
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "unk_token": "<s>", "vocab": {
            "<s>": 0, "<reserved08706>": 1, "<racm3:break>": 2, "<eoss>": 3, "<reserved08799>": 4,
            "<reserved08801>": 5, "IMGIMGAZ": 7, "IMGIMGBZ": 6
        }}
    });
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    let tokenizer = proxytune::models::tokenizer::TextTokenizer::from_file(&path).unwrap();
    let mut config = Config {
        vocab_size: 8,
        ..Config::default()
    };
    let vocabulary = Vocabulary::of(&tokenizer, &config, 2).unwrap();
    assert_eq!(vocabulary.codes, [7, 6]);
    assert!(Vocabulary::of(&tokenizer, &config, 3).is_err());
    let map = HashMap::from([("IMGIMGAZ".to_string(), 7), ("IMGIMGBZ".to_string(), 5)]);
    config.vocabulary_map = Some(map);
    let error = Vocabulary::of(&tokenizer, &config, 2).unwrap_err();
    assert!(error.to_string().contains("IMGIMGBZ"), "{error}");
}

#[test]
fn adapters_of_checkpoints_without_the_models_prefix_are_named_as_those_with_it() {
    let paths = |name| -> BTreeMap<String, Tensor> {
        let adapter = Arc::new(Adapter::new(
            proxytune::nn::LoraConfig {
                rank: 1,
                alpha: 1.0,
                targets: vec!["q_proj".into(), "lm_head".into()],
            },
            0,
        ));
        let case = case("chameleon", name);
        let weights = frozen(&case).with_adapter(adapter.clone());
        Backbone::new(&config(&case), &weights).unwrap();
        adapter.snapshot().unwrap()
    };
    let (bare, prefixed) = (paths(CASES[2]), paths(CASES[0]));
    assert!(bare.keys().eq(prefixed.keys()));
    assert!(bare.contains_key("model.layers.1.self_attn.q_proj.lora_A.weight"));
}
