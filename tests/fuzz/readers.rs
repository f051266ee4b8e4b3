//! The readers, one test for each, with the files that they are given.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use proxytune::config::{Document, prompt_list};
use proxytune::diffusion::{Ddpm, DiscreteConfig, FlowMatchEuler, SchedulerConfig, Spacing};
use proxytune::evaluation::captions::captions;
use proxytune::evaluation::embed::ImageEmbedder;
use proxytune::evaluation::embedders::{ClipEmbedder, DinoEmbedder};
use proxytune::evaluation::preprocess::Preprocessing;
use proxytune::files::{read_json, read_tensors};
use proxytune::hub::wanted_of;
use proxytune::images::{decode, square};
use proxytune::models::checkpoint_files::WeightFiles;
use proxytune::models::limits::read_config;
use proxytune::models::lora_file::LoraFile;
use proxytune::models::pickle::Pickle;
use proxytune::models::sampling_file;
use proxytune::models::tokenizer::TextTokenizer;
use proxytune::models::{autoencoder, chameleon, clip, flux, llamagen, sd3, sdxl, t5, vit};
use proxytune::nn::{Init, Weights};
use proxytune::watch::state::Home;

use super::{Reader, fuzz};
use crate::support::torch;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn seed(path: &str) -> Vec<u8> {
    std::fs::read(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn seeds(paths: &[&str]) -> Vec<Vec<u8>> {
    paths.iter().map(|path| seed(path)).collect()
}

fn as_it_is(bytes: Vec<u8>) -> Vec<u8> {
    bytes
}

/// A reader of whole files called `file`, with nothing beside.
fn reader(
    name: &'static str,
    file: &'static str,
    seeds: Vec<Vec<u8>>,
    read: impl Fn(&Path) -> bool + 'static,
) -> Reader {
    Reader {
        name,
        file,
        seeds,
        beside: Vec::new(),
        wrap: as_it_is,
        read: Box::new(read),
    }
}

#[test]
fn pictures_of_any_content_are_read_or_refused() {
    let golden = root().join("tests/golden/images/golden.safetensors");
    let golden = candle_core::safetensors::load(golden, &Device::Cpu).unwrap();
    let mut files: Vec<_> = golden
        .iter()
        .filter(|(key, _)| key.starts_with("file."))
        .collect();
    files.sort_by_key(|(key, _)| *key);
    let mut seeds: Vec<Vec<u8>> = files
        .iter()
        .map(|(_, file)| file.flatten_all().unwrap().to_vec1().unwrap())
        .collect();
    seeds.push(seed("datasets/nano/subjects/dog1/00.png"));
    fuzz(reader("pictures", "photo.jpg", seeds, |folder| {
        let path = folder.join("photo.jpg");
        let picture = decode(&std::fs::read(&path).unwrap(), &path);
        picture.is_ok_and(|picture| square(&picture, 32).width() == 32)
    }));
}

fn read_safetensors(path: &Path) -> bool {
    let held = read_tensors(path).is_ok();
    let mapped = Weights::from_files(&[path.to_path_buf()], DType::F32, &Device::Cpu);
    held && mapped.is_ok_and(|weights| weights.contains("weight") || !weights.contains(""))
}

#[test]
fn safetensors_of_any_content_are_read_or_refused() {
    let seeds = seeds(&[
        "tests/golden/vae/mish/adapter-encoder/adapter_model.safetensors",
        "tests/golden/dino/oblong/adapter-renamed/adapter_model.safetensors",
        "tests/golden/clip-text/half-precision-shards/reference-text.safetensors",
    ]);
    fuzz(reader(
        "safetensors",
        "model.safetensors",
        seeds,
        |folder| read_safetensors(&folder.join("model.safetensors")),
    ));
}

#[test]
fn gguf_files_of_any_content_are_read_or_refused() {
    let whole = seed("tests/golden/single-file/kinds/kinds.gguf");
    // The headers alone have room for more faults than the numbers behind them.
    let small = {
        let mut small = b"GGUF".to_vec();
        small.extend(3u32.to_le_bytes());
        small.extend([1u64, 1].map(u64::to_le_bytes).concat());
        small.extend(4u64.to_le_bytes());
        small.extend(b"name");
        small.extend(8u32.to_le_bytes());
        small.extend(4u64.to_le_bytes());
        small.extend(b"flux");
        small.extend(6u64.to_le_bytes());
        small.extend(b"weight");
        small.extend(2u32.to_le_bytes());
        small.extend([32u64, 2].map(u64::to_le_bytes).concat());
        small.extend(8u32.to_le_bytes());
        small.extend(0u64.to_le_bytes());
        small.extend([7; 30 + 68]);
        small
    };
    fuzz(reader("gguf", "model.gguf", vec![small, whole], |folder| {
        let path = folder.join("model.gguf");
        let Ok(weights) = Weights::from_files(&[path], DType::F32, &Device::Cpu) else {
            return false;
        };
        let read = |name: String| weights.stored(&name).is_ok_and(|tensor| tensor.is_some());
        let names = weights.names();
        let read = names.into_iter().filter(|name| !name.is_empty()).map(read);
        let packed = weights.matrix((2, 32), "weight", Init::Zeros);
        read.fold(true, |all, one| all & one) && packed.is_ok()
    }));
}

/// A safetensors file with this header and some values.
fn with_header(header: Vec<u8>) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend([0; 64]);
    bytes
}

#[test]
fn headers_of_safetensors_of_any_content_are_read_or_refused() {
    let headers = [
        r#"{"__metadata__":{"format":"pt"},"weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}"#,
        r#"{"a":{"dtype":"F16","shape":[2,2,2,2],"data_offsets":[0,32]},"b":{"dtype":"I64","shape":[],"data_offsets":[32,40]},"c":{"dtype":"U8","shape":[24,1],"data_offsets":[40,64]}}"#,
    ];
    fuzz(Reader {
        wrap: with_header,
        ..reader(
            "safetensors-header",
            "model.safetensors",
            headers.map(|header| header.as_bytes().to_vec()).into(),
            |folder| read_safetensors(&folder.join("model.safetensors")),
        )
    });
}

fn read_torch(folder: &Path) -> bool {
    let opened = Pickle::open(&folder.join("model.pt"));
    opened.is_ok_and(|pickle| !pickle.entries().is_empty() && pickle.read_all().is_ok())
}

#[test]
fn torch_files_of_any_content_are_read_or_refused() {
    let seeds = seeds(&[
        "tests/golden/llamagen-gpt/two-layers/model/model.pt",
        "tests/golden/llamagen-vq/one-level/model/model.pt",
    ]);
    fuzz(reader("torch", "model.pt", seeds, read_torch));
}

/// A zip file as torch writes it, with this pickle and one storage of 64 bytes.
fn with_pickle(pickle: Vec<u8>) -> Vec<u8> {
    torch::file(&pickle, &[("0", vec![0; 64])])
}

#[test]
fn pickles_in_torch_files_of_any_content_are_read_or_refused() {
    let tensor = |offset, size: &[i64], stride: &[i64]| {
        torch::tensor("FloatStorage", "0", offset, size, stride)
    };
    let own = torch::dict(&[
        ("weight", tensor(0, &[2, 4], &[4, 1])),
        ("turned", tensor(1, &[3, 2], &[1, 3])),
        ("epoch", torch::int(7)),
    ]);
    let nested = torch::dict(&[("state_dict", own.clone()), ("step", torch::int(1))]);
    fuzz(Reader {
        wrap: with_pickle,
        ..reader(
            "torch-pickle",
            "model.pt",
            vec![torch::pickle(&own), torch::pickle(&nested)],
            read_torch,
        )
    });
}

/// Configs are read by everything that reads a `config.json`, whose fields overlap.
fn read_configs(folder: &Path) -> bool {
    let path = folder.join("config.json");
    let accepted = [
        read_config::<clip::Config>(&path).is_ok(),
        read_config::<clip::TextConfig>(&path).is_ok(),
        vit::Config::read(folder).is_ok(),
        read_config::<t5::Config>(&path).is_ok(),
        read_config::<llamagen::gpt::Config>(&path).is_ok(),
        read_config::<llamagen::vq::Config>(&path).is_ok(),
        read_config::<sd3::Config>(&path).is_ok(),
        read_config::<sdxl::Config>(&path).is_ok(),
        read_config::<flux::Config>(&path).is_ok(),
        read_config::<autoencoder::Config>(&path).is_ok(),
        read_config::<chameleon::Config>(&path).is_ok(),
        chameleon::files::tokenizer_config(folder).is_ok(),
        proxytune::models::family(&folder.display().to_string()).is_ok(),
    ];
    accepted.contains(&true)
}

#[test]
fn configs_of_any_content_are_read_or_refused() {
    let seeds = seeds(&[
        "datasets/nano/checkpoints/clip/config.json",
        "datasets/nano/checkpoints/dino/config.json",
        "datasets/nano/checkpoints/llamagen/config.json",
        "datasets/nano/checkpoints/llamagen/t5/config.json",
        "datasets/nano/checkpoints/llamagen/vq/config.json",
        "datasets/nano/checkpoints/lumina/config.json",
        "datasets/nano/checkpoints/sd3/text_encoder/config.json",
        "datasets/nano/checkpoints/sd3/transformer/config.json",
        "datasets/nano/checkpoints/sd3/vae/config.json",
        "tests/golden/chameleon-vq/transformers/model/config.json",
        "tests/golden/chameleon/own-norm-for-each-head/model/config.json",
        "tests/golden/dino/timm-names/model/config.json",
        "tests/golden/sd3-transformer/sd35/model/config.json",
        "tests/golden/sdxl-unet/unlike-the-published/model/config.json",
        "tests/golden/flux-transformer/dev/model/config.json",
    ]);
    fuzz(reader("configs", "config.json", seeds, read_configs));
}

/// Schedules become tables.
#[test]
fn schedules_of_any_content_are_read_or_refused() {
    let seeds = seeds(&[
        "datasets/nano/checkpoints/sd3/scheduler/scheduler_config.json",
        "tests/golden/text-to-image/flux/model/scheduler/scheduler_config.json",
        "tests/golden/text-to-image/sdxl-dpm/model/scheduler/scheduler_config.json",
        "tests/golden/text-to-image/sdxl-euler/model/scheduler/scheduler_config.json",
    ]);
    let name = "scheduler_config.json";
    fuzz(reader("schedule", name, seeds, move |folder| {
        let path = folder.join(name);
        let discrete = |config: DiscreteConfig| {
            Ddpm::new(&config).is_ok() && config.check_sampler().is_ok() && config.levels(4).is_ok()
        };
        let flow = |config: SchedulerConfig| {
            let schedule = FlowMatchEuler::new(config);
            schedule.is_ok_and(|schedule| schedule.sigmas(4, 64, Spacing::Table).is_ok())
        };
        let accepted = [
            read_json::<DiscreteConfig>(&path).is_ok_and(discrete),
            read_json::<SchedulerConfig>(&path).is_ok_and(flow),
        ];
        accepted.contains(&true)
    }));
}

/// A config is turned into layers only as far as it fits the weights.
#[test]
fn denoisers_with_configs_of_any_content_are_opened_or_refused() {
    let weights = |case: &str| {
        let folder = root().join("tests/golden").join(case).join("model");
        let files = WeightFiles::find(&folder, "diffusion_pytorch_model").unwrap();
        files.open(DType::F32, &Device::Cpu).unwrap()
    };
    let own = |case: &str| seeds(&[&format!("tests/golden/{case}/model/config.json")]);
    let (unet, transformer) = (
        "sdxl-unet/three-levels",
        "flux-transformer/without-guidance",
    );
    let tensors = weights(unet);
    fuzz(reader("unet", "config.json", own(unet), move |folder| {
        let config = read_config::<sdxl::Config>(&folder.join("config.json"));
        config.is_ok_and(|config| {
            let weights = tensors.clone();
            sdxl::UNet::new(config, &weights).is_ok() && weights.finish().is_ok()
        })
    }));
    let tensors = weights(transformer);
    fuzz(reader(
        "flux",
        "config.json",
        own(transformer),
        move |folder| {
            let config = read_config::<flux::Config>(&folder.join("config.json"));
            config.is_ok_and(|config| {
                let weights = tensors.clone();
                flux::FluxTransformer::new(config, &weights).is_ok() && weights.finish().is_ok()
            })
        },
    ));
}

#[test]
fn sampling_notes_of_any_content_are_read_or_refused() {
    let seeds = [
        r#"{"guidance_scale": 2.0, "top_k": 100, "top_p": 1.0, "temperature": 1.0}"#,
        r#"{"num_inference_steps": 28, "guidance_scale": 3.5, "negative_prompt": "blurry"}"#,
    ];
    let seeds = seeds.map(|text| text.as_bytes().to_vec()).into();
    fuzz(reader("sampling", "sampling.json", seeds, |folder| {
        let read = |family| sampling_file::read(folder, family).is_ok();
        [
            read(proxytune::models::llamagen::FAMILY),
            read(proxytune::models::sdxl::FAMILY),
        ]
        .contains(&true)
    }));
}

#[test]
fn pipelines_of_diffusers_of_any_content_are_read_or_refused() {
    let seeds = seeds(&[
        "datasets/nano/checkpoints/sd3/model_index.json",
        "tests/golden/sd3-pipeline/tiny/model_index.json",
    ]);
    fuzz(reader("model-index", "model_index.json", seeds, |folder| {
        proxytune::models::family(&folder.display().to_string()).is_ok()
    }));
}

#[test]
fn indexes_of_shards_of_any_content_are_read_or_refused() {
    let names = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    fuzz(Reader {
        beside: names.map(|name| (name.to_string(), Vec::new())).into(),
        ..reader(
            "shards",
            "model.safetensors.index.json",
            seeds(&["tests/golden/chameleon/lumina-mgpt/model/model.safetensors.index.json"]),
            |folder| WeightFiles::find(folder, "model").is_ok(),
        )
    });
}

#[test]
fn preparations_of_evaluators_of_any_content_are_read_or_refused() {
    let seeds = seeds(&[
        "datasets/nano/checkpoints/clip/preprocessor_config.json",
        "datasets/nano/checkpoints/dino/preprocessor_config.json",
    ]);
    fuzz(reader(
        "preprocessor",
        "preprocessor_config.json",
        seeds,
        |folder| Preprocessing::from_checkpoint(folder, Preprocessing::clip(32)).is_ok(),
    ));
}

fn use_tokenizer(folder: &Path) -> bool {
    let tokenizer = TextTokenizer::from_folder(folder);
    tokenizer.is_ok_and(|tokenizer| {
        let texts = ["a photo of a sks dog", "", "<|endoftext|> \u{1F600}"];
        let fault = |text: &&str| tokenizer.ids(text, 77).is_err();
        !texts.iter().any(fault)
    })
}

#[test]
fn tokenizers_of_any_content_are_read_or_refused() {
    let seeds = seeds(&[
        "tests/golden/sd3-pipeline/tiny/tokenizer/tokenizer.json",
        "tests/golden/sd3-pipeline/tiny/tokenizer_3/tokenizer.json",
        "datasets/nano/checkpoints/clip/tokenizer.json",
    ]);
    fuzz(reader("tokenizer", "tokenizer.json", seeds, use_tokenizer));
}

#[test]
fn vocabularies_of_clip_of_any_content_are_read_or_refused() {
    let folder = "tests/golden/clip-tokenizer/tokens-in-the-lowercased-text";
    let beside = |name: &str| (name.to_string(), seed(&format!("{folder}/{name}")));
    let own = |name: &str| vec![seed(&format!("{folder}/{name}"))];
    let files = [
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
    ];
    for file in files {
        let others = files.iter().filter(|other| **other != file);
        fuzz(Reader {
            beside: others.map(|name| beside(name)).collect(),
            ..reader(file, file, own(file), use_tokenizer)
        });
    }
}

#[test]
fn yaml_of_any_content_is_read_or_refused() {
    let mut seeds = seeds(&[
        "tests/golden/chameleon-vq/meta-attention-at-a-level/model/vqgan.yaml",
        "datasets/nano/checkpoints/lumina/tokenizer/vqgan.yaml",
    ]);
    seeds.push(
        "{model: {params: &p {ddconfig: {attn_resolutions: [], ch: 128, ch_mult: [1, 1,\n 2], double_z: False, \
         in_channels: 3, num_res_blocks: 2, out_ch: 3, resolution: 512, z_channels: 256}, embed_dim: 256, n_embed: \
         8192}}, more: [*p, *p, *p]}\n"
            .into(),
    );
    fuzz(reader("yaml", "vqgan.yaml", seeds, |folder| {
        chameleon::files::tokenizer_config(folder).is_ok()
    }));
}

#[test]
fn pipeline_files_and_overrides_of_any_content_are_read_or_refused() {
    let seeds = seeds(&[
        "pipelines/nano-smoke.toml",
        "pipelines/nano.toml",
        "pipelines/augmented.toml",
        "pipelines/nano-lumina.toml",
        "pipelines/table1-direct.toml",
    ]);
    fuzz(reader("pipeline", "pipeline.toml", seeds, |folder| {
        let document = Document::open(
            &folder.join("pipeline.toml"),
            &[],
            &proxytune::models::Registry,
        );
        document.is_ok_and(|document| document.resolve().is_ok())
    }));
    let overrides = [
        "seed=3",
        "student.learning_rate=1e-4",
        "subject.dog1.images=\"photos/a b\"",
        "proxies.count=2",
    ];
    let overrides = overrides.map(|text| text.as_bytes().to_vec()).into();
    fuzz(reader("override", "override.txt", overrides, |folder| {
        let text = std::fs::read(folder.join("override.txt")).unwrap();
        let text = String::from_utf8_lossy(&text).into_owned();
        let pipeline = std::fs::read_to_string(root().join("pipelines/nano-smoke.toml")).unwrap();
        Document::parse(
            &pipeline,
            "pipeline.toml",
            &[text],
            &proxytune::models::Registry,
        )
        .resolve()
        .is_ok()
    }));
}

#[test]
fn adapters_of_any_content_are_read_or_refused() {
    let folder = "tests/golden/vae/mish/adapter-encoder";
    let (config, weights) = ("adapter_config.json", "adapter_model.safetensors");
    let read = |folder: &Path| LoraFile::read(folder).is_ok();
    let own = |name: &str| seed(&format!("{folder}/{name}"));
    fuzz(Reader {
        beside: vec![(weights.to_string(), own(weights))],
        ..reader("adapter-config", config, vec![own(config)], read)
    });
    fuzz(Reader {
        beside: vec![(config.to_string(), own(config))],
        ..reader("adapter-weights", weights, vec![own(weights)], read)
    });
}

#[test]
fn prompts_captions_and_metadata_of_any_content_are_read_or_refused() {
    let prompts = "# ten\na {token} {class} on the beach\r\n\na {class} with a city behind\n";
    fuzz(reader(
        "prompts",
        "prompts.txt",
        vec![prompts.into()],
        |folder| {
            let path = folder.join("prompts.txt");
            prompt_list(&path.display().to_string(), &proxytune::models::Registry).is_ok()
        },
    ));
    let read = |folder: &Path| captions(folder, &[folder.join("0.png")]).is_ok();
    fuzz(reader(
        "caption",
        "0.txt",
        vec!["a sks dog\r\n".into()],
        read,
    ));
    let lines = "{\"file_name\": \"0.png\", \"text\": \"a dog\", \"seed\": 1}\n\n{\"file_name\": \"1.png\", \"text\": \"\"}\n";
    fuzz(reader(
        "metadata",
        "metadata.jsonl",
        vec![lines.into()],
        read,
    ));
}

#[test]
fn states_of_watched_folders_of_any_content_are_read_or_refused() {
    let scores = r#"{"rex": {"clip_i": 0.7, "clip_t": 0.2, "dino": 0.5}}"#;
    let digest = "0123456789abcdef".repeat(4);
    let look = format!(r#"{{"class": "dog", "photos": ["{digest}"]}}"#);
    let state = format!(
        r#"{{"version": 1, "store": "store", "settings": "00", "subjects": [{{"id": "rex", "folder": "dog/rex", "class":
        "dog", "token": "sks", "photos": ["{digest}"], "retired": false, "pending": 1, "learnt": {look}, "held":
        [{look}, "why"]}}], "tokens": ["sks"], "arrivals": 2, "waiting": {{"cat/max": "no photo"}}, "set_aside":
        [{{"path": "dog/rex/a.gif", "reason": "GIF is not read"}}], "run": {{"number": 2, "subject": "rex", "look":
        {look}, "pipeline": "seed = 1", "init": null, "started_us": 1}}, "published": {{"number": 1, "run":
        "runs/run-0001-ab", "adapter": "{digest}", "scores": {scores}}}, "history": [{{"number": 1, "subject": "rex",
        "init": null, "adapter": "{digest}", "scores": {scores}, "refused": null, "seconds": 1.5}}]}}"#
    );
    let seeds = vec![state.into_bytes()];
    fuzz(reader("watch-state", "state.json", seeds, |folder| {
        // The file lies in a folder of its own.
        let inside = folder.join(".proxytune");
        std::fs::create_dir_all(&inside).unwrap();
        std::fs::rename(folder.join("state.json"), inside.join("state.json")).unwrap();
        Home::of(folder).unwrap().load().is_ok()
    }));
}

/// The checkpoint `name` without its `config.json`.
fn without_config(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = format!("datasets/nano/checkpoints/{name}");
    [
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
    ]
    .iter()
    .filter(|file| root().join(&folder).join(file).is_file())
    .map(|file| (file.to_string(), seed(&format!("{folder}/{file}"))))
    .collect()
}

/// A config is turned into layers only as far as it fits the weights.
#[test]
fn evaluators_with_configs_of_any_content_are_opened_or_refused() {
    let picture = || image::RgbImage::new(40, 30);
    let clip = move |folder: &Path| {
        let opened = ClipEmbedder::load(folder, &Device::Cpu);
        opened.is_ok_and(|clip| clip.images(&[picture()]).is_ok())
    };
    let dino = move |folder: &Path| {
        let opened = DinoEmbedder::load(folder, &Device::Cpu);
        opened.is_ok_and(|dino| dino.images(&[picture()]).is_ok())
    };
    let own = |name: &str| {
        vec![seed(&format!(
            "datasets/nano/checkpoints/{name}/config.json"
        ))]
    };
    fuzz(Reader {
        beside: without_config("clip"),
        ..reader("clip", "config.json", own("clip"), clip)
    });
    fuzz(Reader {
        beside: without_config("dino"),
        ..reader("dino", "config.json", own("dino"), dino)
    });
}

#[test]
fn listings_of_a_hub_of_any_content_are_read_or_refused() {
    let digest = "0123456789abcdef".repeat(4);
    let listing = format!(
        r#"{{"id": "owner/model", "sha": "{}", "siblings": [{{"rfilename": "config.json", "size": 20, "blobId": "{}"}},
        {{"rfilename": "unet/model.safetensors", "size": 9, "lfs": {{"sha256": "{digest}", "size": 9, "pointerSize":
        135}}}}]}}"#,
        &digest[..40],
        &digest[..40]
    );
    let seeds = vec![listing.into_bytes()];
    fuzz(reader("hub-listing", "listing.json", seeds, |folder| {
        wanted_of(&std::fs::read(folder.join("listing.json")).unwrap()).is_some()
    }));
}
