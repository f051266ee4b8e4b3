//! A folder as LlamaGen publishes it, without a config, opens and draws what LlamaGen's own source draws from it, and
//! what is merged into it stays. The folder and the program that made it are in `tests/golden`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use candle_core::{DType, Device, Tensor};
use proxytune::config::{AutoregressiveSampling, Dtype, Memory, Sampling};
use proxytune::models::adapters::write_peft;
use proxytune::models::checkpoint_files::converted;
use proxytune::models::lora_file::LoraFile;
use proxytune::models::pickle::Pickle;
use proxytune::models::{Learner, LearnerOptions, Request, Tuning, merge, open};
use proxytune::nn::LoraConfig;

use crate::support::{program, say};

const PROMPT: &str = "a red dog on the beach";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llamagen-published/xl-256")
}

/// The published folder with the nano tokenizer beside its T5.
fn published() -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    std::fs::create_dir(place.path().join("t5")).unwrap();
    for folder in ["", "t5"] {
        for entry in std::fs::read_dir(golden().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                std::fs::copy(
                    &path,
                    place.path().join(folder).join(path.file_name().unwrap()),
                )
                .unwrap();
            }
        }
    }
    let tokenizer = "datasets/nano/checkpoints/llamagen/t5/tokenizer.json";
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join(tokenizer);
    std::fs::copy(tokenizer, place.path().join("t5/tokenizer.json")).unwrap();
    place
}

fn opening(dir: &Path, tuning: Tuning) -> LearnerOptions {
    LearnerOptions {
        dir: dir.to_path_buf(),
        name: "published".into(),
        family: proxytune::models::llamagen::FAMILY,
        resolution: None,
        tuning,
        seed: 0,
        device: Device::Cpu,
        dtype: Dtype::F32,
        memory: Memory::Fast,
        dropout: 0.0,
        condition_dropout: 0.0,
    }
}

fn sampling(guidance_interval: Option<usize>) -> Sampling {
    Sampling::Autoregressive(AutoregressiveSampling {
        top_k: 1,
        temperature: 0.0,
        guidance_interval,
        ..AutoregressiveSampling::default()
    })
}

fn draw(learner: &mut dyn Learner, sampling: &Sampling) -> image::RgbImage {
    let request = Request {
        prompt: PROMPT.into(),
        seed: 0,
    };
    learner.generate(&[request], sampling).unwrap().remove(0)
}

/// Means of the 16×16 pixels of each token, (3, 16, 16).
fn means(image: &image::RgbImage) -> Vec<f32> {
    let mut means = vec![0.0; 3 * 256];
    for (x, y, pixel) in image.enumerate_pixels() {
        for channel in 0..3 {
            let place = channel * 256 + (y / 16 * 16 + x / 16) as usize;
            means[place] += f32::from(pixel[channel]) / 256.0;
        }
    }
    means
}

fn furthest(image: &image::RgbImage, expected: &Tensor) -> f32 {
    let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
    let found = means(image);
    assert_eq!(found.len(), expected.len());
    let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    apart.fold(0.0, f32::max)
}

#[test]
fn the_published_folder_draws_what_its_source_draws_with_and_without_an_interval() {
    let place = published();
    let drawn =
        candle_core::safetensors::load(golden().join("drawn.safetensors"), &Device::Cpu).unwrap();
    let mut learner = open(&opening(place.path(), Tuning::Frozen)).unwrap();
    assert_eq!(learner.resolution(), 256);
    for (name, interval) in [("image.tokens", None), ("image.interval", Some(20))] {
        let image = draw(learner.as_mut(), &sampling(interval));
        let apart = furthest(&image, &drawn[name]);
        assert!(apart < 0.5, "{name}: {apart} of 255");
    }
    let tokens = |name: &str| {
        drawn[name]
            .flatten_all()
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
            .to_vec1::<f32>()
    };
    assert_ne!(tokens("tokens").unwrap(), tokens("interval").unwrap());
}

#[test]
fn the_command_draws_the_same_image() {
    let place = published();
    let mut command = program();
    command.args([
        "sample",
        "--prompt",
        PROMPT,
        "--temperature",
        "0",
        "--guidance-interval",
        "20",
    ]);
    command
        .arg("--model")
        .arg(place.path())
        .arg("--out")
        .arg(place.path().join("out"));
    say(command).says(0, &[]);
    let file = place.path().join("out/0000-a-red-dog-on-the-beach.png");
    let image = image::open(file).unwrap().to_rgb8();
    let drawn =
        candle_core::safetensors::load(golden().join("drawn.safetensors"), &Device::Cpu).unwrap();
    assert!(furthest(&image, &drawn["image.interval"]) < 0.5);
}

fn adapter(dir: &Path, seed: u64) -> LoraConfig {
    let config = LoraConfig {
        rank: 3,
        alpha: 5.0,
        targets: ["wqkv", "wo", "w1", "w2", "w3"].map(String::from).to_vec(),
    };
    let place = published();
    let learner = open(&LearnerOptions {
        seed,
        ..opening(place.path(), Tuning::Lora(config.clone()))
    })
    .unwrap();
    let mut number = seed as f32;
    let tensors: BTreeMap<String, Tensor> = learner
        .variables()
        .into_iter()
        .map(|(name, variable)| {
            let values: Vec<f32> = (0..variable.elem_count())
                .map(|_| {
                    number = (number * 16807.0 + 1.0) % 8191.0;
                    (number / 8191.0 - 0.5) * 0.3
                })
                .collect();
            (
                name,
                Tensor::from_vec(values, variable.shape(), &Device::Cpu).unwrap(),
            )
        })
        .collect();
    write_peft(dir, &tensors, &config, "published").unwrap();
    config
}

#[test]
fn a_merged_checkpoint_draws_what_the_adapter_draws() {
    let (place, work) = (published(), tempfile::tempdir().unwrap());
    let adapter_dir = work.path().join("adapter");
    let config = adapter(&adapter_dir, 3);
    let mut carrying = open(&opening(place.path(), Tuning::Lora(config))).unwrap();
    let values = carrying.read(&adapter_dir).unwrap();
    for (name, variable) in carrying.variables() {
        variable.set(&values[&name]).unwrap();
    }
    let out = work.path().join("merged");
    let mut command = program();
    command
        .arg("merge")
        .arg("--model")
        .arg(place.path())
        .arg("--adapter")
        .arg(&adapter_dir);
    command.args(["--dtype", "f32", "--out"]).arg(&out);
    let said = say(command);
    said.says(0, &[]);
    assert!(said.out.contains("10 layers"), "{said:?}");
    let mut merged = open(&opening(&out, Tuning::Frozen)).unwrap();
    let mut plain = open(&opening(place.path(), Tuning::Frozen)).unwrap();
    let images =
        [&mut carrying, &mut merged, &mut plain].map(|model| draw(model.as_mut(), &sampling(None)));
    let apart = |a: &image::RgbImage, b: &image::RgbImage| {
        let pairs = means(a).into_iter().zip(means(b));
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    assert!(
        apart(&images[0], &images[1]) < 0.5,
        "{}",
        apart(&images[0], &images[1])
    );
    assert!(apart(&images[0], &images[2]) > 5.0);

    let again = say({
        let mut command = program();
        command
            .arg("merge")
            .arg("--model")
            .arg(place.path())
            .arg("--adapter")
            .arg(&adapter_dir);
        command.arg("--out").arg(&out);
        command
    });
    again.says(1, &["is not empty", "hint: "]);
}

#[test]
fn shards_stay_shards_when_an_adapter_is_merged_and_every_misfit_is_named() {
    let place = tempfile::tempdir().unwrap();
    let base = place.path().join("base");
    std::fs::create_dir(&base).unwrap();
    let full =
        |value: f32, shape: (usize, usize)| Tensor::full(value, shape, &Device::Cpu).unwrap();
    let half = |tensor: Tensor| tensor.to_dtype(DType::BF16).unwrap();
    let save = |name: &str, tensors: &[(&str, Tensor)]| {
        let tensors = tensors.iter().cloned().collect();
        candle_core::safetensors::save(&tensors, base.join(name)).unwrap();
    };
    save(
        "model-00001-of-00002.safetensors",
        &[("a.q_proj.weight", half(full(1.0, (2, 3))))],
    );
    save(
        "model-00002-of-00002.safetensors",
        &[
            ("b.q_proj.weight", half(full(2.0, (4, 2)))),
            ("norm", half(full(1.0, (1, 1)))),
        ],
    );
    let index = serde_json::json!({"weight_map": {
        "a.q_proj.weight": "model-00001-of-00002.safetensors",
        "b.q_proj.weight": "model-00002-of-00002.safetensors",
        "norm": "model-00002-of-00002.safetensors",
    }});
    std::fs::write(base.join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::write(base.join("config.json"), r#"{"model_type": "chameleon"}"#).unwrap();
    let config = LoraConfig {
        rank: 2,
        alpha: 4.0,
        targets: vec!["q_proj".into()],
    };
    let factors = |module: &str, outputs: usize, inputs: usize| {
        [
            (format!("{module}.lora_A.weight"), full(0.5, (2, inputs))),
            (format!("{module}.lora_B.weight"), full(0.25, (outputs, 2))),
        ]
    };
    let adapter = place.path().join("adapter");
    let tensors = [factors("a.q_proj", 2, 3), factors("b.q_proj", 4, 2)]
        .concat()
        .into_iter()
        .collect();
    write_peft(&adapter, &tensors, &config, "base").unwrap();
    let out = place.path().join("out");
    let read = LoraFile::read(&adapter).unwrap();
    let merged = merge::merge(
        &base,
        proxytune::models::chameleon::FAMILY,
        None,
        &read,
        &out,
        None,
    )
    .unwrap();
    assert_eq!((merged.layers, merged.bytes), (2, 2 * (6 + 8 + 1)));
    let shards =
        proxytune::models::checkpoint_files::shards(&out.join("model.safetensors.index.json"))
            .unwrap();
    assert_eq!(shards.len(), 2);
    let second = candle_core::safetensors::load(&shards[1], &Device::Cpu).unwrap();
    // 2 + 4/2 · (0.25 · 0.5 + 0.25 · 0.5)
    let values = second["b.q_proj.weight"]
        .to_dtype(DType::F32)
        .unwrap()
        .to_vec2::<f32>()
        .unwrap();
    assert_eq!(values, vec![vec![2.5; 2]; 4]);
    assert_eq!(second["norm"].dtype(), DType::BF16);
    assert!(out.join("config.json").is_file());

    let tensors = [factors("a.q_proj", 2, 4), factors("c.q_proj", 4, 2)]
        .concat()
        .into_iter()
        .collect();
    write_peft(&adapter, &tensors, &config, "base").unwrap();
    let read = LoraFile::read(&adapter).unwrap();
    let error = merge::merge(
        &base,
        proxytune::models::chameleon::FAMILY,
        None,
        &read,
        &place.path().join("no"),
        None,
    )
    .unwrap_err()
    .to_string();
    assert!(
        error.contains(
            "a.q_proj: the adapter is for a weight of shape [2, 4], the model's has [2, 3]"
        ),
        "{error}"
    );
    assert!(
        error.contains("c.q_proj: the model has no such layer"),
        "{error}"
    );
    assert!(!place.path().join("no").exists());
}

#[test]
fn a_file_of_torch_is_converted_once_and_again_when_it_changes() {
    let place = published();
    let source = place.path().join("t2i_XL_stage1_256.pt");
    let made = place.path().join("made");
    let modified = |path: &Path| std::fs::metadata(path).unwrap().modified().unwrap();
    // Several at once: one converts, the others wait for it.
    let results: Vec<PathBuf> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| converted(&source, &made).unwrap()))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let target = &results[0];
    assert!(results.iter().all(|other| other == target));
    let original = Pickle::open(&source).unwrap().read_all().unwrap();
    let copy = candle_core::safetensors::load(target, &Device::Cpu).unwrap();
    assert_eq!(original.len(), copy.len());
    for (name, tensor) in &original {
        assert_eq!(tensor.dtype(), copy[name].dtype());
        let values = |t: &Tensor| {
            t.to_dtype(DType::F32)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        assert_eq!(values(tensor), values(&copy[name]), "{name}");
    }
    let before = modified(target);
    converted(&source, &made).unwrap();
    assert_eq!(modified(target), before);

    std::fs::copy(place.path().join("vq_ds16_t2i.pt"), &source).unwrap();
    let later = SystemTime::now() + Duration::from_secs(5);
    std::fs::File::options()
        .write(true)
        .open(&source)
        .unwrap()
        .set_modified(later)
        .unwrap();
    let again = converted(&source, &made).unwrap();
    assert_eq!(&again, target);
    let copy = candle_core::safetensors::load(&again, &Device::Cpu).unwrap();
    assert!(copy.contains_key("quantize.embedding.weight"));

    // A conversion that was broken off does not count.
    std::fs::write(&source, "not a zip").unwrap();
    assert!(converted(&source, &made).is_err());
}

#[test]
fn everything_that_differs_is_reported_at_once() {
    let place = published();
    let mut tensors = Pickle::open(&place.path().join("t2i_XL_stage1_256.pt"))
        .unwrap()
        .read_all()
        .unwrap();
    tensors.remove("norm.weight").unwrap();
    let short = tensors["layers.1.attention.wo.weight"]
        .narrow(0, 0, 3)
        .unwrap();
    tensors.insert("layers.1.attention.wo.weight".into(), short);
    let stray = tensors["layers.0.ffn_norm.weight"].clone();
    tensors.insert("layers.0.extra_norm.weight".into(), stray);
    std::fs::remove_file(place.path().join("t2i_XL_stage1_256.pt")).unwrap();
    let file = place.path().join("t2i_XL_stage1_256.safetensors");
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let mut codes = Pickle::open(&place.path().join("vq_ds16_t2i.pt"))
        .unwrap()
        .read_all()
        .unwrap();
    codes.remove("post_quant_conv.bias").unwrap();
    std::fs::remove_file(place.path().join("vq_ds16_t2i.pt")).unwrap();
    candle_core::safetensors::save(&codes, place.path().join("vq_ds16_t2i.safetensors")).unwrap();
    let error = open(&opening(place.path(), Tuning::Frozen))
        .err()
        .unwrap()
        .to_string();
    for part in [
        "norm.weight [64] is missing",
        "layers.1.attention.wo.weight has shape [3, 64], [64, 64] expected",
        "layers.0.extra_norm.weight is not expected",
        "post_quant_conv.bias [16] is missing",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
}
