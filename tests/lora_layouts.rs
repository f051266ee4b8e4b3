//! Adapters of diffusers, peft, kohya's scripts and ComfyUI are one thing: read by every command, written back without
//! loss, and refused by name where they do not fit. The cases are made by `golden/lora.py`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use proxytune::files;
use proxytune::models::lora_file::LoraFile;
use proxytune::models::lora_write::{Layout, Written, fuse};
use proxytune::models::{flux, sd3};

use crate::support::{Place, Said, find, program, say};

pub type Tensors = BTreeMap<String, Tensor>;

/// The golden models with their components.
const MODELS: [(&str, &str); 3] = [
    ("sdxl", "sdxl-unet"),
    ("sd3", "sd3-transformer"),
    ("flux", "flux-transformer"),
];
const LAYOUTS: [&str; 4] = [
    "diffusers.safetensors",
    "kohya.safetensors",
    "comfyui.safetensors",
    "peft",
];

fn golden(model: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/golden/lora").join(model)
}

fn tell(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Said {
    let mut command = program();
    arguments.iter().for_each(|argument| {
        command.arg(argument);
    });
    say(command)
}

/// What each layer changes: scale·B·A.
pub fn changes(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let file = LoraFile::read(path).unwrap();
    let change = |(layer, factors): (String, proxytune::nn::Factors)| {
        let (a, b) = (factors.a.flatten_from(1), factors.b.flatten_from(1));
        let product = (b.unwrap().matmul(&a.unwrap()).unwrap() * factors.scale).unwrap();
        (layer, product.flatten_all().unwrap().to_vec1().unwrap())
    };
    file.layers.into_iter().map(change).collect()
}

pub fn assert_same(
    ours: &BTreeMap<String, Vec<f32>>,
    theirs: &BTreeMap<String, Vec<f32>>,
    what: &str,
) {
    let names = |all: &BTreeMap<String, Vec<f32>>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(ours), names(theirs), "{what}");
    for (layer, own) in ours {
        let apart = own.iter().zip(&theirs[layer]).map(|(a, b)| (a - b).abs());
        assert!(apart.fold(0.0, f32::max) < 1e-6, "{what}: {layer}");
    }
}

#[test]
fn every_layout_makes_a_model_compute_what_the_reference_computes_with_it() {
    for (model, component) in MODELS {
        let folder = golden(model);
        for layout in LAYOUTS {
            let said = tell(&[
                &"verify",
                &component,
                &"--model",
                &folder.join("model"),
                &"--reference",
                &folder.join("reference.safetensors"),
                &"--adapter",
                &folder.join(layout),
                &"--tolerance",
                &"1e-5",
            ]);
            assert_eq!(said.code, Some(0), "{model} {layout}: {said:?}");
        }
    }
}

#[test]
fn an_adapter_goes_from_every_layout_to_every_other_without_loss() {
    for (model, _) in MODELS {
        let place = tempfile::tempdir().unwrap();
        let reference = changes(&golden(model).join("diffusers.safetensors"));
        for from in LAYOUTS {
            for to in ["diffusers", "kohya", "comfyui", "peft"] {
                let name = format!("{from}-{to}");
                let out = match to {
                    "peft" => place.path().join(name),
                    _ => place.path().join(format!("{name}.safetensors")),
                };
                let said = tell(&[&"convert", &golden(model).join(from), &out, &"--to", &to]);
                assert_eq!(said.code, Some(0), "{model} {from} {to}: {said:?}");
                assert_same(&changes(&out), &reference, &format!("{model} {from} {to}"));
            }
        }
        // What went through our names and back is the very file that it was.
        for back in [
            "kohya.safetensors-kohya.safetensors",
            "diffusers.safetensors-kohya.safetensors",
        ] {
            let (ours, header) = files::read_tensors(&place.path().join(back)).unwrap();
            let (theirs, _) =
                files::read_tensors(&golden(model).join("kohya.safetensors")).unwrap();
            assert_eq!(
                ours.keys().collect::<Vec<_>>(),
                theirs.keys().collect::<Vec<_>>()
            );
            for (name, tensor) in &ours {
                assert_eq!(tensor.dims(), theirs[name].dims(), "{model} {name}");
                // Without an alpha diffusers' file has it worked into B.
                let exact = back.starts_with("kohya") || !name.contains("lora_up");
                let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert!(
                    !exact || values(tensor) == values(&theirs[name]),
                    "{model} {name}"
                );
            }
            for entry in [
                "ss_base_model_version",
                "ss_network_module",
                "modelspec.architecture",
            ] {
                assert!(header.contains_key(entry), "{model}: {header:?}");
            }
            assert_eq!(
                (&header["ss_network_dim"], &header["ss_network_alpha"]),
                (&"4".to_string(), &"6".to_string())
            );
        }
    }
}

/// The golden adapter of `model`, every layer with an A of its own, as diffusers trains them.
fn with_own_factors(model: &str) -> LoraFile {
    let mut file = LoraFile::read(&golden(model).join("diffusers.safetensors")).unwrap();
    for (number, factors) in file.layers.values_mut().enumerate() {
        factors.a = (&factors.a + 0.01 * (number + 1) as f64).unwrap();
    }
    file
}

#[test]
fn layers_with_factors_of_their_own_come_back_from_kohyas_as_they_were() {
    let place = tempfile::tempdir().unwrap();
    for (model, family) in [("sd3", sd3::FAMILY), ("flux", flux::FAMILY)] {
        let mut file = with_own_factors(model);
        // Some trainers leave the keys out.
        file.layers.retain(|layer, _| !layer.ends_with("attn.to_k"));
        let out = place.path().join(format!("{model}.safetensors"));
        let written = Written {
            layers: &file.layers,
            family,
            base: None,
            dtype: DType::F32,
        };
        written.write(Layout::Kohya, &out).unwrap();
        let back = LoraFile::read(&out).unwrap();
        assert_eq!(back.family, Some(family));
        assert_eq!(
            back.layers.keys().collect::<Vec<_>>(),
            file.layers.keys().collect::<Vec<_>>()
        );
        for (layer, own) in &file.layers {
            let read = &back.layers[layer];
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(&read.a), values(&own.a), "{layer}");
            assert_eq!(values(&read.b), values(&own.b), "{layer}");
            assert_eq!(read.scale, own.scale, "{layer}");
        }
    }
}

#[test]
fn adapters_fused_with_weights_do_what_their_sum_does() {
    let place = tempfile::tempdir().unwrap();
    let [one, other] =
        ["diffusers.safetensors", "kohya.safetensors"].map(|name| golden("sd3").join(name));
    let out = place.path().join("sum.safetensors");
    let addition = format!("{}=-0.25", other.display());
    let said = tell(&[
        &"convert",
        &one,
        &out,
        &"--to",
        &"diffusers",
        &"--weight",
        &"0.5",
        &"--fuse",
        &addition,
    ]);
    said.says(0, &[]);
    assert!(said.out.contains("rank 8"), "{said:?}");
    let folder = place.path().join("folder");
    tell(&[&"convert", &out, &folder, &"--to", &"kohya"]).says(0, &[]);
    assert_same(
        &changes(&folder),
        &changes(&out),
        "a folder of kohya's layout",
    );
    let quarter: BTreeMap<String, Vec<f32>> = changes(&one)
        .into_iter()
        .map(|(layer, change)| (layer, change.iter().map(|value| 0.25 * value).collect()))
        .collect();
    assert_same(&changes(&out), &quarter, "0.5 - 0.25");
    let (sd3, flux) = (
        LoraFile::read(&one).unwrap(),
        LoraFile::read(&golden("flux").join("diffusers.safetensors")).unwrap(),
    );
    let error = fuse(&[(&sd3, 1.0), (&flux, 1.0)]).unwrap_err().to_string();
    assert!(error.contains("another shape"), "{error}");
    let addition = golden("flux").join("kohya.safetensors");
    let other = place.path().join("other.safetensors");
    let said = tell(&[
        &"convert", &one, &other, &"--to", &"kohya", &"--fuse", &addition,
    ]);
    said.says(1, &["FLUX", "one model"]);
}

#[test]
fn nothing_is_replaced_and_what_cannot_be_carried_is_named() {
    let place = tempfile::tempdir().unwrap();
    let sd3 = golden("sd3").join("kohya.safetensors");
    let out = place.path().join("out.safetensors");
    std::fs::write(&out, "mine").unwrap();
    let convert = |from: &Path, to: &str, out: &Path, model: &str| match model {
        "" => tell(&[&"convert", &from, &out, &"--to", &to]),
        model => tell(&[&"convert", &from, &out, &"--to", &to, &"--model", &model]),
    };
    convert(&sd3, "diffusers", &out, "").says(1, &["is there already", "nothing is replaced"]);
    assert_eq!(std::fs::read(&out).unwrap(), b"mine");
    let new = place.path().join("new.safetensors");
    convert(&sd3, "peft", &new, "").says(1, &["names a file", "peft reads a folder"]);
    let (tensors, _) = files::read_tensors(&sd3).unwrap();
    let with = |name: &str, more: &[(&str, &[usize])]| {
        let mut tensors = tensors.clone();
        for (name, shape) in more {
            let value = Tensor::full(0.5f32, *shape, &Device::Cpu).unwrap();
            tensors.insert(name.to_string(), value);
        }
        let path = place.path().join(name);
        files::write_tensors(&path, &tensors, &[]).unwrap();
        path
    };
    let text = "lora_te1_text_model_encoder_layers_0_mlp_fc1";
    let [down, up] = ["lora_down", "lora_up"].map(|part| format!("{text}.{part}.weight"));
    let cases: [(Added<'_>, &[&str]); 6] = [
        (
            &[(down.as_str(), &[2, 8]), (up.as_str(), &[8, 2])],
            &[text, "text encoders"],
        ),
        (
            &[("lora_unet_context_embedder.dora_scale", &[8])],
            &["dora_scale", "DoRA"],
        ),
        (
            &[
                ("lora_unet_joint_blocks_0_x_block_mlp_fc2.lokr_w1", &[2, 2]),
                ("lora_unet_joint_blocks_1_x_block_mlp_fc2.lokr_w1", &[2, 2]),
            ],
            &["lokr_w1", "(and 1 more of other blocks)", "LoKr"],
        ),
        (
            &[("lora_unet_context_embedder.hada_w1_a", &[2, 2])],
            &["hada_w1_a", "LoHa"],
        ),
        (
            &[
                (
                    "lora_unet_joint_blocks_1_x_block_attn2_qkv.lora_down.weight",
                    &[2, 8],
                ),
                (
                    "lora_unet_joint_blocks_1_x_block_attn2_qkv.lora_up.weight",
                    &[25, 2],
                ),
            ],
            &["attn2_qkv", "3 layers in one"],
        ),
        (
            &[
                (
                    "transformer.transformer_blocks.0.ff.net.0.proj.lora_A.weight",
                    &[2, 8],
                ),
                (
                    "transformer.transformer_blocks.0.ff.net.0.proj.lora_B.weight",
                    &[32, 2],
                ),
            ],
            &["transformer_blocks.0.ff.net.0.proj is there a second time"],
        ),
    ];
    for (number, (more, parts)) in cases.into_iter().enumerate() {
        let file = with(&format!("{number}.safetensors"), more);
        convert(&file, "diffusers", &new, "").says(1, parts);
        assert!(!new.exists());
    }
    // Convolutions of a model that has none there, and layers of another model.
    let conv = with(
        "conv.safetensors",
        &[
            (
                "lora_unet_joint_blocks_0_x_block_mlp_fc2.lora_down.weight",
                &[2, 8, 3, 3],
            ),
            (
                "lora_unet_joint_blocks_0_x_block_mlp_fc2.lora_up.weight",
                &[8, 2, 1, 1],
            ),
        ],
    );
    let parts = [
        "transformer_blocks.0.ff.net.2: the adapter is for a weight of shape [8, 8, 3, 3]",
        "transformer_blocks.0.attn.to_q",
    ];
    convert(&conv, "diffusers", &new, "nano-sd3").says(1, &parts);
    convert(&sd3, "kohya", &new, "flux.1-dev").says(1, &["FLUX has no such layer", "attn2"]);
    let students = tempfile::tempdir().unwrap();
    let student = factors(students.path(), "peft", &["layers.0.attention.wo"]);
    convert(&student, "diffusers", &new, "nano-llamagen").says(1, &["--to peft"]);
    let ambiguous = place.path().join("double.safetensors");
    let layers = ["transformer.transformer_blocks.0.attn.to_q"];
    let double = factors(students.path(), "double", &layers);
    let (tensors, _) = files::read_tensors(&double.join("adapter_model.safetensors")).unwrap();
    let named = tensors
        .into_iter()
        .map(|(name, t)| (name.replace("base_model.model.", ""), t));
    files::write_tensors(&ambiguous, &named.collect(), &[]).unwrap();
    convert(&ambiguous, "kohya", &new, "").says(1, &["more than one model", "--model sd3-medium"]);
}

/// Tensors that are added to a file, by name with their shapes.
type Added<'a> = &'a [(&'a str, &'a [usize])];

/// peft's folder `name` with factors of rank 2 for (128, 128) at `layers`.
pub fn factors(place: &Path, name: &str, layers: &[&str]) -> PathBuf {
    let folder = place.join(name);
    let mut tensors = Tensors::new();
    for layer in layers {
        for (part, shape) in [("lora_A", [2, 128]), ("lora_B", [128, 2])] {
            let value = Tensor::full(0.05f32, &shape, &Device::Cpu).unwrap();
            tensors.insert(format!("base_model.model.{layer}.{part}.weight"), value);
        }
    }
    files::write_tensors(&folder.join("adapter_model.safetensors"), &tensors, &[]).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 3}"#;
    files::write(&folder.join("adapter_config.json"), config.as_bytes()).unwrap();
    folder
}

/// An adapter for nano-sd3 as kohya's scripts would write it: ranks differ, q, k and v are one layer.
pub fn theirs(place: &Path, name: &str) -> PathBuf {
    let mut tensors = Tensors::new();
    for (layer, rank, rows) in [
        ("joint_blocks_0_x_block_attn_qkv", 4, 384),
        ("joint_blocks_1_context_block_attn_qkv", 2, 384),
        ("joint_blocks_2_x_block_mlp_fc1", 3, 512),
    ] {
        let wave = |count: usize, step: f64| {
            let numbers: Vec<f32> = (0..count)
                .map(|i| (i as f64 * step).sin() as f32 / 8.0)
                .collect();
            Tensor::from_vec(numbers, count, &Device::Cpu).unwrap()
        };
        let name = |part: &str| format!("lora_unet_{layer}.{part}");
        let a = wave(rank * 128, 0.7).reshape((rank, 128)).unwrap();
        let b = wave(rows * rank, 1.3).reshape((rows, rank)).unwrap();
        tensors.insert(name("lora_down.weight"), a);
        tensors.insert(name("lora_up.weight"), b);
        tensors.insert(name("alpha"), Tensor::new(3f32, &Device::Cpu).unwrap());
    }
    let path = place.join(name);
    files::write_tensors(&path, &tensors, &[]).unwrap();
    path
}

#[test]
fn pictures_are_drawn_with_and_models_merged_with_what_kohyas_scripts_wrote() {
    let place = Place::new();
    let file = theirs(place.path(), "theirs.safetensors");
    let draw = |model: &dyn AsRef<std::ffi::OsStr>, adapter: Option<&Path>, out: &str| {
        let out = place.path().join(out);
        let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![
            &"sample",
            &"--prompt",
            &"a dog",
            &"--num-inference-steps",
            &"4",
            &"--out",
            &out,
            &"--model",
            model,
        ];
        if let Some(adapter) = &adapter {
            arguments.extend([&"--adapter" as &dyn AsRef<std::ffi::OsStr>, adapter]);
        }
        let said = tell(&arguments);
        assert_eq!(said.code, Some(0), "{said:?}");
        let pictures = find(&out, &|name| name.ends_with(".png"));
        proxytune::images::load(&pictures[0]).unwrap()
    };
    let apart = |a: &image::RgbImage, b: &image::RgbImage| {
        let pairs = a.as_raw().iter().zip(b.as_raw());
        pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0)
    };
    let ours = place.path().join("ours");
    tell(&[&"convert", &file, &ours, &"--to", &"diffusers"]).says(0, &[]);
    let adapted = draw(&"nano-sd3", Some(file.as_path()), "adapted");
    let converted = draw(&"nano-sd3", Some(ours.as_path()), "converted");
    assert!(apart(&converted, &adapted) <= 1);
    assert!(apart(&draw(&"nano-sd3", None, "plain"), &adapted) > 8);
    let merged = place.path().join("merged");
    let merge = tell(&[
        &"merge",
        &"--model",
        &"nano-sd3",
        &"--adapter",
        &file,
        &"--out",
        &merged,
    ]);
    merge.says(0, &[]);
    assert!(apart(&draw(&merged, None, "from-merged"), &adapted) <= 1);
}
