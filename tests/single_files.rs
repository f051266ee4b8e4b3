//! Models in single files, as Stability AI, Black Forest Labs and ComfyUI publish them, and in GGUF: the small pipelines of
//! `tests/golden` under other names, made by `tests/golden/single_files.py`, which diffusers' own conversions take back.

use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Tensor};
use proxytune::config::{DiffusionSampling, Dtype, Memory, Sampling};
use proxytune::models::checkpoint_files::{Layout, WeightFiles};
use proxytune::models::registry::family_of;
use proxytune::models::{
    LearnerOptions, Request, Tuning, autoencoder, family, flux, locate, open as open_learner, sd3,
    sdxl, t5,
};
use proxytune::nn::Weights;
use proxytune::plan::checkpoint_digest;

use crate::support::golden::{CPU, difference};
use crate::support::{program, say};

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(path)
}

/// A case of single files, and the pipeline in diffusers' layout that it was made of.
struct Case {
    single: &'static str,
    pipeline: &'static str,
    components: &'static [&'static str],
    references: &'static [&'static str],
}

const FLUX: Case = Case {
    single: "flux",
    pipeline: "text-to-image/flux/model",
    components: &["transformer", "vae", "text_encoder", "text_encoder_2"],
    references: &["text-to-image/flux/reference-short.safetensors"],
};

const SDXL: Case = Case {
    single: "sdxl",
    pipeline: "text-to-image/sdxl-euler/model",
    components: &["unet", "vae", "text_encoder", "text_encoder_2"],
    references: &[
        "text-to-image/sdxl-euler/reference-negative.safetensors",
        "text-to-image/sdxl-euler/reference-zeros.safetensors",
    ],
};

const SD3: Case = Case {
    single: "sd3",
    pipeline: "sd3-pipeline/tiny",
    components: &[
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    ],
    references: &["sd3-pipeline/tiny/reference-negative.safetensors"],
};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy(&path, &target),
            false => drop(std::fs::copy(&path, &target).unwrap()),
        }
    }
}

/// The single files of a case, with tokenizers beside them and, if `configs`, what no shape tells of models so small.
fn folder(case: &Case, configs: bool) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    copy(&golden("single-file").join(case.single), place.path());
    let pipeline = golden(case.pipeline);
    for name in ["tokenizer", "tokenizer_2", "tokenizer_3"] {
        if pipeline.join(name).is_dir() {
            copy(&pipeline.join(name), &place.path().join(name));
        }
    }
    if configs {
        copy(&pipeline.join("scheduler"), &place.path().join("scheduler"));
        for component in case.components {
            let to = place.path().join(component);
            std::fs::create_dir_all(&to).unwrap();
            let config = pipeline.join(component).join("config.json");
            std::fs::copy(config, to.join("config.json")).unwrap();
        }
        // The small CLIP-L has a projection that is none of the published: a folder goes before what files hold.
        if case.single == "sd3" {
            copy(
                &pipeline.join("text_encoder"),
                &place.path().join("text_encoder"),
            );
        }
    }
    place
}

fn stem(component: &str) -> &'static str {
    match component.starts_with("text_encoder") {
        true => "model",
        false => "diffusion_pytorch_model",
    }
}

fn open(files: WeightFiles) -> Weights {
    files.open(DType::F32, &CPU).unwrap()
}

/// Every tensor of `theirs` is the same in `ours`, up to `apart`, but for what is left out on purpose.
fn assert_same(what: &str, ours: &Weights, theirs: &Weights, apart: f64) {
    for name in theirs.names() {
        // A CLIP alone may be without the name of its tower, and CLIP-L is taken without its projection.
        let left_out = name.starts_with("text_projection") && what.contains("text_encoder ");
        if left_out || name.ends_with("embed_tokens.weight") {
            continue;
        }
        let found = [name.clone(), format!("text_model.{name}")];
        let found = found.iter().find_map(|name| ours.stored(name).unwrap());
        let found = found.unwrap_or_else(|| panic!("{what}{name} is missing"));
        let expected = theirs.stored(&name).unwrap().unwrap();
        let (found, expected) = (
            found.to_dtype(DType::F32).unwrap(),
            expected.to_dtype(DType::F32).unwrap(),
        );
        let difference = difference(&found, &expected);
        assert!(difference <= apart, "{what}{name}: {difference}");
    }
}

#[test]
fn every_tensor_of_a_single_file_is_that_of_diffusers_layout() {
    for case in [FLUX, SDXL, SD3] {
        let place = folder(&case, false);
        let layout = Layout::open(place.path()).unwrap();
        for component in case.components {
            let ours = open(layout.weights(component).unwrap());
            let theirs = golden(case.pipeline).join(component);
            let theirs = open(WeightFiles::find(&theirs, stem(component)).unwrap());
            assert_same(
                &format!("{} {component} ", case.single),
                &ours,
                &theirs,
                0.0,
            );
        }
    }
    // With norms of queries and keys, and a second attention.
    let file = golden("single-file/sd35/sd3.5_medium.safetensors");
    let ours = open(Layout::open(&file).unwrap().weights("transformer").unwrap());
    let theirs = golden("sd3-transformer/sd35/model");
    let theirs = open(WeightFiles::find(&theirs, "diffusion_pytorch_model").unwrap());
    assert_same("sd35 ", &ours, &theirs, 0.0);
}

fn verified(place: &Path, reference: &str) {
    let mut command: Command = program();
    command
        .args(["verify", "text-to-image", "--model"])
        .arg(place);
    command.arg("--reference").arg(golden(reference));
    let said = say(command);
    assert_eq!(said.code, Some(0), "{}: {said:?}", place.display());
}

#[test]
fn single_files_go_from_text_to_image_as_diffusers_does() {
    for case in [FLUX, SDXL, SD3] {
        let place = folder(&case, true);
        for reference in case.references {
            verified(place.path(), reference);
        }
        // The file named itself.
        let network = Layout::open(place.path()).unwrap();
        let network = network.weights(case.components[0]).unwrap();
        let WeightFiles::Part(part) = network else {
            panic!("{network:?}");
        };
        verified(&part.path, case.references[0]);
    }
}

/// The deduced config of `component` with so many groups of its norms: the published 32 do not divide widths so small.
fn with_groups<T: serde::de::DeserializeOwned>(
    layout: &Layout,
    component: &str,
    groups: usize,
) -> T {
    let text = layout.config_text(component).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["norm_num_groups"] = groups.into();
    serde_json::from_value(config).unwrap()
}

#[test]
fn configs_that_single_files_lack_are_deduced_from_shapes() {
    let place = folder(&FLUX, false);
    let layout = Layout::open(place.path()).unwrap();
    let config = |case: &Case, component: &str| {
        let path = golden(case.pipeline).join(component).join("config.json");
        serde_json::from_str::<serde_json::Value>(&std::fs::read_to_string(path).unwrap()).unwrap()
    };
    let expected: flux::Config = serde_json::from_value(config(&FLUX, "transformer")).unwrap();
    let found: flux::Config = layout.config("transformer").unwrap();
    let found = flux::Config {
        axes_dims_rope: expected.axes_dims_rope.clone(),
        out_channels: expected.out_channels,
        ..found
    };
    assert_eq!(found, expected);
    let expected: t5::Config = serde_json::from_value(config(&FLUX, "text_encoder_2")).unwrap();
    assert_eq!(
        layout.config::<t5::Config>("text_encoder_2").unwrap(),
        expected
    );
    let expected: autoencoder::Config = serde_json::from_value(config(&FLUX, "vae")).unwrap();
    let found: autoencoder::Config = with_groups(&layout, "vae", expected.norm_num_groups);
    assert_eq!(found, expected);

    let path = golden("sd3-transformer/sd35/model/config.json");
    let expected: sd3::Config =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let layout = Layout::open(&golden("single-file/sd35")).unwrap();
    let found: sd3::Config = layout.config("transformer").unwrap();
    let found = sd3::Config {
        sample_size: expected.sample_size,
        ..found
    };
    assert_eq!(found, expected);

    let place = folder(&SDXL, false);
    let layout = Layout::open(place.path()).unwrap();
    let expected: sdxl::Config = serde_json::from_value(config(&SDXL, "unet")).unwrap();
    let found: sdxl::Config = with_groups(&layout, "unet", expected.norm_num_groups);
    let told = |config: &sdxl::Config| {
        (
            config.down_block_types.clone(),
            config.up_block_types.clone(),
            config.block_out_channels.clone(),
            config.layers_per_block.clone(),
            config.transformer_layers_per_block.clone(),
            config.projection_class_embeddings_input_dim,
        )
    };
    assert_eq!(told(&found), told(&expected));
    assert_eq!(family_of(place.path()).unwrap(), Some(sdxl::FAMILY));
}

/// A safetensors file with tensors of these shapes, in bf16, whose numbers take no place on the disk.
fn sparse(path: &Path, tensors: &[(&str, &[usize])]) {
    let mut at = 0;
    let mut header = serde_json::Map::new();
    for (name, dims) in tensors {
        let bytes = 2 * dims.iter().product::<usize>();
        let entry =
            serde_json::json!({"dtype": "BF16", "shape": dims, "data_offsets": [at, at + bytes]});
        header.insert(name.to_string(), entry);
        at += bytes;
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend(header.bytes());
    std::fs::write(path, &start).unwrap();
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len((start.len() + at) as u64).unwrap();
}

#[test]
fn files_of_published_sizes_have_the_published_configs() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("flux1-dev.safetensors");
    sparse(
        &path,
        &[
            ("double_blocks.0.img_attn.qkv.weight", &[9216, 3072]),
            ("double_blocks.18.img_attn.norm.query_norm.scale", &[128]),
            ("double_blocks.0.img_attn.norm.query_norm.scale", &[128]),
            ("single_blocks.37.linear2.weight", &[3072, 15360]),
            ("img_in.weight", &[3072, 64]),
            ("txt_in.weight", &[3072, 4096]),
            ("vector_in.in_layer.weight", &[3072, 768]),
            ("guidance_in.in_layer.weight", &[3072, 256]),
            ("final_layer.linear.weight", &[64, 3072]),
        ],
    );
    let found: flux::Config = Layout::open(&path).unwrap().config("transformer").unwrap();
    let published = flux::Config {
        guidance_embeds: true,
        out_channels: Some(64),
        ..flux::Config::default()
    };
    assert_eq!(found, published);

    let path = place.path().join("sd3.5_large.safetensors");
    sparse(
        &path,
        &[
            (
                "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
                &[7296, 2432],
            ),
            (
                "model.diffusion_model.joint_blocks.0.x_block.attn.ln_q.weight",
                &[64],
            ),
            (
                "model.diffusion_model.joint_blocks.37.x_block.attn.ln_q.weight",
                &[64],
            ),
            (
                "model.diffusion_model.x_embedder.proj.weight",
                &[2432, 16, 2, 2],
            ),
            ("model.diffusion_model.pos_embed", &[1, 36864, 2432]),
            (
                "model.diffusion_model.context_embedder.weight",
                &[2432, 4096],
            ),
            (
                "model.diffusion_model.y_embedder.mlp.0.weight",
                &[2432, 2048],
            ),
            (
                "model.diffusion_model.final_layer.linear.weight",
                &[64, 2432],
            ),
        ],
    );
    let found: sd3::Config = Layout::open(&path).unwrap().config("transformer").unwrap();
    assert_eq!((found.num_layers, found.num_attention_heads), (38, 38));
    assert_eq!(
        (found.pos_embed_max_size, found.caption_projection_dim),
        (192, 2432)
    );
    assert_eq!(found.qk_norm, Some(sd3::QkNorm::RmsNorm));

    // Two networks in one folder: the file is to be named.
    let error = Layout::open(place.path()).unwrap_err();
    let told = error.to_string();
    assert!(
        told.contains("flux1-dev.safetensors") && told.contains("sd3.5_large"),
        "{told}"
    );
    assert!(error.hint().unwrap().contains("name the file"), "{error}");
}

#[test]
fn what_single_files_miss_is_named_with_where_it_comes_from() {
    let place = folder(&FLUX, true);
    std::fs::remove_dir_all(place.path().join("tokenizer_2")).unwrap();
    let layout = Layout::open(place.path()).unwrap();
    let error = layout.tokenizer("tokenizer_2").unwrap_err();
    assert!(
        error.to_string().contains("tokenizer_2 is missing"),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("FLUX.1-dev"), "{error}");
    std::fs::remove_file(place.path().join("t5xxl_fp16.safetensors")).unwrap();
    let layout = Layout::open(place.path()).unwrap();
    let error = layout.weights("text_encoder_2").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("T5's encoder of FLUX is missing"),
        "{error}"
    );
    assert!(
        error.hint().unwrap().contains("t5xxl_fp16.safetensors"),
        "{error}"
    );
    // SD3 can do without T5, and without nothing else.
    let place = folder(&SD3, true);
    assert!(
        Layout::open(place.path())
            .unwrap()
            .has("text_encoder_3")
            .unwrap()
    );
    let alone = golden("single-file/sd35/sd3.5_medium.safetensors");
    let layout = Layout::open(&alone).unwrap();
    assert!(!layout.has("text_encoder_3").unwrap());
    let error = layout.weights("text_encoder_2").unwrap_err();
    assert!(
        error.to_string().contains("CLIP-G of SD3 is missing"),
        "{error}"
    );
}

#[test]
fn a_name_that_no_table_has_is_a_fault_and_no_other_model() {
    let place = folder(&FLUX, true);
    let path = place.path().join("flux1-dev.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &CPU).unwrap();
    let moved = tensors.remove("double_blocks.0.img_mlp.0.weight").unwrap();
    tensors.insert("double_blocks.0.img_mlp.1.weight".into(), moved);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let mut command = program();
    command
        .args(["verify", "text-to-image", "--model"])
        .arg(place.path());
    command.arg("--reference").arg(golden(FLUX.references[0]));
    let said = say(command);
    said.says(
        2,
        &[
            "transformer_blocks.0.ff.net.0.proj.weight",
            "is missing",
            "double_blocks.0.img_mlp.1.weight is not expected",
        ],
    );
}

#[test]
fn gguf_files_hold_the_same_under_the_names_of_their_writers() {
    let place = folder(&FLUX, true);
    for name in ["flux1-dev.safetensors", "t5xxl_fp16.safetensors"] {
        std::fs::remove_file(place.path().join(name)).unwrap();
    }
    copy(&golden("single-file/flux-gguf"), place.path());
    let layout = Layout::open(place.path()).unwrap();
    for (component, apart) in [("transformer", 0.0), ("text_encoder_2", 1e-3)] {
        let ours = open(layout.weights(component).unwrap());
        let theirs = golden(FLUX.pipeline).join(component);
        let theirs = open(WeightFiles::find(&theirs, stem(component)).unwrap());
        assert_same(&format!("gguf {component} "), &ours, &theirs, apart);
    }
    // T5 has half precision here.
    let mut command = program();
    command.args(["verify", "text-to-image", "--tolerance", "1e-2", "--model"]);
    command
        .arg(place.path())
        .arg("--reference")
        .arg(golden(FLUX.references[0]));
    let said = say(command);
    assert_eq!(said.code, Some(0), "{said:?}");

    // In the folders of a pipeline too.
    let pipeline = tempfile::tempdir().unwrap();
    copy(&golden(FLUX.pipeline), pipeline.path());
    let transformer = pipeline.path().join("transformer");
    std::fs::remove_file(transformer.join("diffusion_pytorch_model.safetensors")).unwrap();
    std::fs::copy(
        golden("single-file/flux-gguf/flux1-dev-F32.gguf"),
        transformer.join("flux1-dev-F32.gguf"),
    )
    .unwrap();
    verified(pipeline.path(), FLUX.references[0]);
}

#[test]
fn a_model_in_a_single_file_is_found_by_its_path_and_trained_as_a_whole() {
    let place = folder(&SDXL, true);
    let file = place.path().join("sd_xl_base_1.0.safetensors");
    let name = file.display().to_string();
    assert_eq!(family(&name).unwrap(), sdxl::FAMILY);
    assert_eq!(locate(&name).unwrap(), file);
    let layout = Layout::open(&file).unwrap();
    let weights = layout
        .weights("unet")
        .unwrap()
        .open_trainable(0, &CPU)
        .unwrap();
    let config = layout.config("unet").unwrap();
    sdxl::UNet::new(config, &weights).unwrap();
    weights.finish().unwrap();
    let (name, variable) = &weights.variables()[0];
    let theirs = golden(SDXL.pipeline).join("unet");
    let theirs = open(WeightFiles::find(&theirs, stem("unet")).unwrap());
    let theirs: Tensor = theirs.stored(name).unwrap().unwrap();
    let theirs = theirs.to_dtype(DType::F32).unwrap();
    assert_eq!(difference(variable.as_tensor(), &theirs), 0.0);
}

#[test]
fn text_encoders_are_let_go_of_once_every_prompt_is_foreseen() {
    let sampling = Sampling::Diffusion(DiffusionSampling {
        guidance_scale: 3.0,
        num_inference_steps: 2,
        negative_prompt: "rain".into(),
        guidance_start: None,
        guidance_stop: None,
    });
    for (case, family) in [
        (FLUX, flux::FAMILY),
        (SDXL, sdxl::FAMILY),
        (SD3, sd3::FAMILY),
    ] {
        let place = tempfile::tempdir().unwrap();
        copy(&golden(case.pipeline), place.path());
        let opening = LearnerOptions {
            dir: place.path().to_path_buf(),
            name: "tiny".into(),
            family,
            resolution: (family == flux::FAMILY).then_some(16),
            tuning: Tuning::Frozen,
            seed: 0,
            device: CPU,
            dtype: Dtype::F32,
            memory: Memory::Auto,
            dropout: 0.0,
            condition_dropout: 0.0,
        };
        let request = |prompt: &str| Request {
            prompt: prompt.into(),
            seed: 3,
        };
        let requests = ["a dog", "a cat"].map(request);
        let expected = open_learner(&opening)
            .unwrap()
            .generate(&requests, &sampling)
            .unwrap();
        let mut learner = open_learner(&opening).unwrap();
        let prompts = ["a dog", "a cat", "rain"].map(String::from);
        learner.foresee(&prompts).unwrap();
        let encoder = place.path().join("text_encoder/model.safetensors");
        let aside = place.path().join("text_encoder/aside");
        std::fs::rename(&encoder, &aside).unwrap();
        assert_eq!(
            learner.generate(&requests, &sampling).unwrap(),
            expected,
            "{family}"
        );
        let new = [request("a house")];
        let error = learner.generate(&new, &sampling).unwrap_err().to_string();
        assert!(error.contains("text_encoder"), "{error}");
        std::fs::rename(&aside, &encoder).unwrap();
        let expected = open_learner(&opening)
            .unwrap()
            .generate(&new, &sampling)
            .unwrap();
        assert_eq!(
            learner.generate(&new, &sampling).unwrap(),
            expected,
            "{family}"
        );
    }
}

#[test]
fn the_digest_of_a_single_file_is_that_of_all_parts_that_its_model_has() {
    let place = folder(&FLUX, true);
    let file = place.path().join("flux1-dev.safetensors");
    let digest = || checkpoint_digest(&file).unwrap();
    let before = digest();
    std::fs::write(place.path().join("notes.json"), "{}").unwrap();
    let other = golden("single-file/sd35/sd3.5_medium.safetensors");
    std::fs::copy(other, place.path().join("sd3.5_medium.safetensors")).unwrap();
    assert_eq!(digest(), before);
    let tokenizer = place.path().join("tokenizer/tokenizer_config.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    std::fs::write(&tokenizer, format!("{text} ")).unwrap();
    let changed = digest();
    assert_ne!(changed, before);
    std::fs::copy(
        golden("single-file/flux-gguf/t5-v1_1-xxl-encoder-F16.gguf"),
        place.path().join("t5.gguf"),
    )
    .unwrap();
    std::fs::remove_file(place.path().join("t5xxl_fp16.safetensors")).unwrap();
    assert_ne!(digest(), changed);
}
