//! What evaluators are given and what they give back. The numbers come from `golden/images/generate.py`; the tiny
//! models are those that CLIP and ViT are proved with.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use image::{Rgb, RgbImage};
use proxytune::evaluation::embed::{Evaluator, ImageEmbedder, TextEmbedder};
use proxytune::evaluation::embedders::{ClipEmbedder, DinoEmbedder};
use proxytune::evaluation::preprocess::Preprocessing;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(path)
}

#[test]
fn pictures_are_prepared_as_the_reference_processors_do() {
    let tensors =
        candle_core::safetensors::load(golden("images/golden.safetensors"), &Device::Cpu).unwrap();
    let (h, w, _) = tensors["source"].dims3().unwrap();
    let bytes = tensors["source"].flatten_all().unwrap().to_vec1().unwrap();
    let source = RgbImage::from_raw(w as u32, h as u32, bytes).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("preprocessor_config.json");
    let vit = r#"{"image_processor_type":"ViTImageProcessor","size":{"height":32,"width":32},"resample":2,
        "image_mean":[0.5,0.5,0.5],"image_std":[0.5,0.5,0.5]}"#;
    std::fs::write(file, vit).unwrap();
    let vit = Preprocessing::from_checkpoint(directory.path(), Preprocessing::dino(32)).unwrap();
    for (name, steps) in [
        ("clip", Preprocessing::clip(32)),
        ("dino", Preprocessing::dino(28)),
        ("vit", vit),
    ] {
        let ours = steps
            .apply(std::slice::from_ref(&source), &Device::Cpu)
            .unwrap();
        let theirs = tensors[&format!("preprocess.{name}")].unsqueeze(0).unwrap();
        assert_eq!(ours.dims(), theirs.dims(), "{name}");
        let difference: f32 = (ours - theirs)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar()
            .unwrap();
        assert!(difference < 1e-5, "{name} differs by {difference}");
    }
}

fn copy(from: &str, to: &Path) {
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden(from).join(name), to.join(name)).unwrap();
    }
}

fn clip_checkpoint() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    copy("clip/largest-id/model", directory.path());
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [49], "tokens": ["<s>"]}, "</s>": {"id": "</s>", "ids": [50], "tokens": ["</s>"]}}
        },
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "dog": 2, "red": 3, "<s>": 49, "</s>": 50}, "unk_token": "<unk>"}
    });
    std::fs::write(
        directory.path().join("tokenizer.json"),
        tokenizer.to_string(),
    )
    .unwrap();
    directory
}

fn pictures() -> Vec<RgbImage> {
    (0..19u32)
        .map(|i| {
            RgbImage::from_fn(40 + i, 40, |x, y| {
                Rgb([(x * i) as u8, (y * 5) as u8, (i * 13) as u8])
            })
        })
        .collect()
}

#[test]
fn an_embedding_does_not_depend_on_its_neighbours() {
    let clip_directory = clip_checkpoint();
    let clip = ClipEmbedder::load(clip_directory.path(), &Device::Cpu).unwrap();
    let dino_directory = tempfile::tempdir().unwrap();
    copy("dino/hub-with-pooler/model", dino_directory.path());
    let dino = DinoEmbedder::load(dino_directory.path(), &Device::Cpu).unwrap();
    for embedder in [&clip as &dyn ImageEmbedder, &dino] {
        let together = embedder.images(&pictures()).unwrap();
        assert_eq!(together.len(), 19);
        for (picture, expected) in pictures().iter().zip(&together) {
            let alone = embedder.images(std::slice::from_ref(picture)).unwrap();
            assert!(
                alone[0]
                    .iter()
                    .zip(expected)
                    .all(|(a, b)| (a - b).abs() < 1e-5)
            );
        }
    }
    let texts = [
        "a dog".to_string(),
        "a red dog a red dog a red dog".to_string(),
    ];
    let together = clip.texts(&texts).unwrap();
    assert_eq!(together[1], clip.texts(&texts[1..]).unwrap()[0]);
    assert_ne!(together[0], together[1]);
    let length: f32 = together[0].iter().map(|v| v * v).sum();
    assert!((length - 1.0).abs() < 1e-5);
}

#[test]
fn embeddings_are_the_same_from_every_kind_of_file() {
    let directory = clip_checkpoint();
    let embeddings = || {
        let clip = ClipEmbedder::load(directory.path(), &Device::Cpu).unwrap();
        let texts = clip.texts(&["a red dog".to_string()]).unwrap();
        (clip.images(&pictures()[..2]).unwrap(), texts)
    };
    let whole = embeddings();
    let file = directory.path().join("model.safetensors");
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    std::fs::remove_file(&file).unwrap();
    let bin = directory.path().join("pytorch_model.bin");
    std::fs::copy(golden("clip/largest-id-torch/pytorch_model.bin"), &bin).unwrap();
    assert_eq!(embeddings(), whole);
    std::fs::remove_file(&bin).unwrap();

    let mut shards = [("one.safetensors", vec![]), ("two.safetensors", vec![])];
    let mut map = serde_json::Map::new();
    for (number, (name, tensor)) in tensors.into_iter().enumerate() {
        let (shard, content) = &mut shards[number % 2];
        map.insert(name.clone(), (*shard).into());
        content.push((name, tensor));
    }
    for (shard, content) in shards {
        let content = content.into_iter().collect();
        candle_core::safetensors::save(&content, directory.path().join(shard)).unwrap();
    }
    let index = serde_json::json!({"weight_map": map}).to_string();
    std::fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(embeddings(), whole);
    std::fs::remove_file(directory.path().join("two.safetensors")).unwrap();
    let error = ClipEmbedder::load(directory.path(), &Device::Cpu)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("two.safetensors is missing"),
        "{error}"
    );
}

#[test]
fn a_subject_scores_one_against_itself() {
    let clip_directory = clip_checkpoint();
    let dino_directory = tempfile::tempdir().unwrap();
    copy("dino/hub-with-pooler/model", dino_directory.path());
    let evaluator = Evaluator {
        clip: ClipEmbedder::load(clip_directory.path(), &Device::Cpu).unwrap(),
        dino: DinoEmbedder::load(dino_directory.path(), &Device::Cpu).unwrap(),
    };
    assert!(
        evaluator
            .dino
            .description()
            .contains("official: short side 34 bicubic, crop 30x30")
    );
    let embeddings = evaluator.embed(&pictures()[3..4]).unwrap();
    let scores = evaluator
        .score(&embeddings, &embeddings, &["a dog".to_string()])
        .unwrap();
    assert!((scores[0].clip_i - 1.0).abs() < 1e-6 && (scores[0].dino - 1.0).abs() < 1e-6);
    assert!(scores[0].clip_t.abs() < 1.0);
}

#[test]
fn a_checkpoint_that_lacks_a_file_or_a_tensor_is_named() {
    let directory = clip_checkpoint();
    std::fs::remove_file(directory.path().join("tokenizer.json")).unwrap();
    let error = ClipEmbedder::load(directory.path(), &Device::Cpu)
        .err()
        .unwrap();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    let tensors = std::collections::HashMap::from([(
        "norm.weight".to_string(),
        Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap(),
    )]);
    candle_core::safetensors::save(&tensors, directory.path().join("model.safetensors")).unwrap();
    let error = DinoEmbedder::load(directory.path(), &Device::Cpu)
        .err()
        .unwrap();
    assert!(error.to_string().contains("missing"), "{error}");
    std::fs::remove_file(directory.path().join("config.json")).unwrap();
    let error = DinoEmbedder::load(directory.path(), &Device::Cpu)
        .err()
        .unwrap();
    assert!(error.to_string().contains("config.json") && error.hint().is_some());
}
