//! `proxytune verify` on every case in `tests/golden`: the real program finds what the reference libraries computed,
//! and names what is wrong with cases that were tampered with. The cases are made by `golden/ar`, `golden/diffusion.py`,
//! `golden/verify.py` and `golden/settings.py`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::support;
use crate::support::{Said, program, say};

const COMPONENTS: [&str; 13] = [
    "llamagen-gpt",
    "llamagen-vq",
    "chameleon",
    "chameleon-vq",
    "clip",
    "clip-text",
    "t5",
    "dino",
    "sd3-transformer",
    "flux-transformer",
    "sdxl-unet",
    "vae",
    "text-to-image",
];

type Tensors = BTreeMap<String, Tensor>;

/// A reference file with its checkpoint and, where it has gradients, its adapter.
#[derive(Debug, Clone)]
struct Case {
    component: &'static str,
    model: PathBuf,
    adapter: Option<PathBuf>,
    reference: PathBuf,
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

impl Case {
    /// `reference-NAME.safetensors` of `component/case`, or `reference.safetensors` where the name is empty.
    fn named(component: &'static str, case: &str, name: &str) -> Self {
        let folder = golden().join(component).join(case);
        let file = match name {
            "" => "reference.safetensors".to_string(),
            name => format!("reference-{name}.safetensors"),
        };
        Self::of(component, &folder.join(file))
    }

    fn of(component: &'static str, reference: &Path) -> Self {
        let folder = reference.parent().unwrap();
        let stem = reference.file_stem().unwrap().to_string_lossy();
        let own = folder.join(stem.replacen("reference", "adapter", 1));
        let has_gradients = load(reference).keys().any(|key| key.starts_with("grad."));
        Self {
            component,
            model: folder.join("model"),
            adapter: has_gradients.then_some(own),
            reference: reference.to_path_buf(),
        }
    }

    fn run(&self, more: &[&str]) -> Said {
        say(self.command(more))
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = program();
        command.args(["verify", self.component, "--model"]);
        command.arg(&self.model);
        command.arg("--reference").arg(&self.reference);
        if let Some(adapter) = &self.adapter {
            command.arg("--adapter").arg(adapter);
        }
        command.args(more);
        command
    }

    /// The same with another reference file, which `edit` makes of this one's.
    fn tampered(&self, place: &Path, edit: impl FnOnce(&mut Tensors)) -> Self {
        let mut tensors = load(&self.reference);
        edit(&mut tensors);
        let reference = place.join("tampered.safetensors");
        let tensors: std::collections::HashMap<_, _> = tensors.into_iter().collect();
        candle_core::safetensors::save(&tensors, &reference).unwrap();
        Self {
            reference,
            ..self.clone()
        }
    }
}

fn load(path: &Path) -> Tensors {
    // candle reads no booleans; the tests edit none.
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            use candle_core::safetensors::Load;
            let tensor = match view.dtype() {
                safetensors::Dtype::BOOL => {
                    Tensor::from_slice(view.data(), view.shape(), &Device::Cpu).unwrap()
                }
                _ => view.load(&Device::Cpu).unwrap(),
            };
            (name, tensor)
        })
        .collect()
}

fn cases(component: &'static str) -> Vec<Case> {
    let mut files = support::find(&golden().join(component), &|name| {
        name.starts_with("reference") && name.ends_with(".safetensors")
    });
    files.sort();
    files.iter().map(|file| Case::of(component, file)).collect()
}

fn json(said: &Said) -> Value {
    serde_json::from_str(&said.out).unwrap_or_else(|e| panic!("{e}: {said:?}"))
}

#[test]
fn every_case_of_every_component_is_computed_as_its_reference_did() {
    for component in COMPONENTS {
        let cases = cases(component);
        let configs: std::collections::BTreeSet<_> = cases.iter().map(|c| &c.model).collect();
        assert!(configs.len() >= 2, "{component}: {configs:?}");
        let adapted = cases.iter().any(|c| c.adapter.is_some());
        let without = ["chameleon-vq", "text-to-image"];
        assert!(adapted || without.contains(&component), "{component}");
        for case in cases {
            let name = case.reference.display().to_string();
            let in_bf16 = name.ends_with("-bf16.safetensors");
            let dtype = if in_bf16 { "bf16" } else { "f32" };
            let said = case.run(&["--json", "--dtype", dtype]);
            assert_eq!(said.code, Some(0), "{name}: {said:?}");
            let report = json(&said);
            assert_eq!(report["passed"], true, "{name}");
            // Heads that the component is without; beyond them, all of a checkpoint is used.
            for note in report["notes"].as_array().unwrap() {
                let note = note.as_str().unwrap();
                let head = ["pooler", "classifier", "decoder", "lm_head"];
                // The tokenizer in transformers' layout lies among the weights of the transformer.
                // What comes after the output has no gradient.
                let beside = component == "chameleon-vq" && note.contains("model.")
                    || note.contains("no gradient in the reference file");
                assert!(
                    beside || head.iter().any(|part| note.contains(part)),
                    "{name}: {note}"
                );
            }
            let tensors = load(&case.reference);
            let count = |kind: &str| {
                let of = |key: &&String| *key == kind || key.starts_with(&format!("{kind}."));
                tensors.keys().filter(of).count()
            };
            let compared = |list: &str| report[list].as_array().unwrap().len();
            assert_eq!(compared("outputs"), count("output"), "{name}");
            assert_eq!(compared("gradients"), count("grad"), "{name}");
        }
    }
}

#[test]
fn pipelines_of_sd3_go_from_text_to_image_too() {
    let model = golden().join("sd3-pipeline/tiny");
    for name in ["empty", "negative"] {
        let case = Case {
            component: "text-to-image",
            reference: model.join(format!("reference-{name}.safetensors")),
            adapter: None,
            model: model.clone(),
        };
        let said = case.run(&[]);
        assert_eq!(said.code, Some(0), "{said:?}");
        for part in ["output.latents [2, 3, 8, 6]", "output.image [2, 3, 16, 12]"] {
            assert!(said.out.contains(part), "{said:?}");
        }
    }
}

#[test]
fn guidance_over_a_part_of_the_steps_is_diffusers() {
    for (model, reference) in [
        ("sd3-pipeline/tiny", "sd3-pipeline/tiny"),
        ("text-to-image/sdxl-euler/model", "text-to-image/sdxl-euler"),
    ] {
        let reference = golden()
            .join(reference)
            .join("reference-interval.safetensors");
        let case = Case {
            component: "text-to-image",
            reference,
            adapter: None,
            model: golden().join(model),
        };
        let said = case.run(&[]);
        assert_eq!(said.code, Some(0), "{said:?}");
        assert!(said.out.contains("output.image [2, 3, 16, 24]"), "{said:?}");
    }
}

#[test]
fn what_text_to_image_is_not_told_or_told_wrongly_is_named() {
    let case = Case::named("text-to-image", "sdxl-euler", "zeros");
    // Rewritten without its metadata.
    let place = tempfile::tempdir().unwrap();
    case.tampered(place.path(), |_| {})
        .run(&[])
        .says(2, &["the reference file's metadata has no height"]);
    let case = Case {
        model: case.model.join("unet"),
        ..case
    };
    case.run(&[]).says(2, &["model_index.json"]);
}

#[test]
fn candles_own_operations_can_be_asked_for_and_agree_too() {
    for case in [
        Case::named("llamagen-gpt", "two-layers", ""),
        Case::named("sd3-transformer", "sd35", "every-kind"),
        Case::named("vae", "kl-f4-quant", "convolutions-decoder"),
    ] {
        let outputs = [None, Some("candle")].map(|operations| {
            let mut command = case.command(&["--json"]);
            if let Some(operations) = operations {
                command.env("PROXYTUNE_OPERATIONS", operations);
            }
            let said = say(command);
            said.says(0, &[]);
            said.out
        });
        // Equal within tolerance, but not computed alike: the errors differ.
        assert_ne!(outputs[0], outputs[1], "{}", case.reference.display());
    }
    let mut command = Case::named("llamagen-gpt", "two-layers", "").command(&[]);
    command.env("PROXYTUNE_OPERATIONS", "Candle");
    say(command).says(1, &["PROXYTUNE_OPERATIONS is Candle", "set it to candle"]);
}

#[test]
fn the_report_names_the_worst_gradients_and_says_equal() {
    let said = Case::named("llamagen-gpt", "two-layers", "").run(&[]);
    assert_eq!(said.code, Some(0), "{said:?}");
    for part in [
        "output [2, 14, 48]: relative error",
        "within 1.0e-4",
        "gradients: 20 of 20 within 1.0e-3; the worst:",
        "lora_A.weight",
        "equal within tolerance",
    ] {
        assert!(said.out.contains(part), "{part:?} in {}", said.out);
    }
}

#[test]
fn an_output_that_is_off_is_named_with_its_error() {
    let place = tempfile::tempdir().unwrap();
    for (component, case, name) in [
        ("llamagen-gpt", "two-layers", ""),
        ("clip", "largest-id", "image"),
        ("t5", "relu", ""),
        ("dino", "timm-names", ""),
        ("sd3-transformer", "sd3", ""),
        ("vae", "one-level-no-attention", "decoder"),
    ] {
        let case = Case::named(component, case, name).tampered(place.path(), |tensors| {
            let output = tensors.get_mut("output").unwrap();
            *output = (&*output * 1.001).unwrap();
        });
        let said = case.run(&[]);
        said.says(
            1,
            &[
                "does not compute what its reference computed",
                "output",
                "1.0e-3, above 1.0e-4",
            ],
        );
        assert!(said.out.contains("different"), "{said:?}");
        assert_eq!(
            case.run(&["--tolerance", "2e-3"]).code,
            Some(0),
            "{component}"
        );
    }
    // One of two outputs.
    let case = Case::named("clip-text", "projected", "");
    let case = case.tampered(place.path(), |tensors| {
        let pooled = tensors.get_mut("output.pooled").unwrap();
        *pooled = (&*pooled + 0.1).unwrap();
    });
    let report = json(&case.run(&["--json"]));
    assert_eq!(report["outputs"][0]["passed"], true);
    assert_eq!(report["outputs"][1]["name"], "output.pooled");
    assert_eq!(report["outputs"][1]["passed"], false);
    // Not a number.
    let case = Case::named("dino", "classifier", "").tampered(place.path(), |tensors| {
        let output = tensors.get_mut("output").unwrap();
        *output = (&*output * f64::NAN).unwrap();
    });
    case.run(&[]).says(1, &["output"]);
}

#[test]
fn only_valid_positions_of_t5_are_compared() {
    let place = tempfile::tempdir().unwrap();
    let case = Case::named("t5", "gated-gelu", "");
    let at = |row: usize, position: usize| {
        move |tensors: &mut Tensors| {
            let output = tensors.get_mut("output").unwrap();
            let ones = Tensor::ones((1, 1, 16), output.dtype(), &Device::Cpu).unwrap();
            let ranges = [row..row + 1, position..position + 1, 0..16];
            *output = output.slice_assign(&ranges, &ones).unwrap();
        }
    };
    // The second text has five tokens.
    let said = case.tampered(place.path(), at(1, 5)).run(&[]);
    assert_eq!(said.code, Some(0), "{said:?}");
    case.tampered(place.path(), at(1, 4))
        .run(&[])
        .says(1, &["output"]);
}

#[test]
fn another_token_is_counted_and_placed() {
    let place = tempfile::tempdir().unwrap();
    let case = Case::named("llamagen-vq", "one-level", "");
    assert!(case.run(&[]).out.contains("90 tokens, 0 different, 0 ties"));
    let case = case.tampered(place.path(), |tensors| {
        let output = &tensors["output"];
        let mut tokens = output.flatten_all().unwrap().to_vec1::<i64>().unwrap();
        tokens[7] = (tokens[7] + 1) % 90;
        let tokens = Tensor::from_vec(tokens, output.dims(), &Device::Cpu).unwrap();
        tensors.insert("output".into(), tokens);
    });
    case.run(&[])
        .says(1, &["90 tokens, 1 different, 0 ties; the first is token 7"]);
}

#[test]
fn equally_near_codes_stand_for_each_other_and_are_counted_as_ties() {
    let place = tempfile::tempdir().unwrap();
    let case = Case::named("llamagen-vq", "one-level", "");
    // Every code twice: the reference may have taken either.
    let model = place.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let config = std::fs::read_to_string(case.model.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["codebook_size"] = 180.into();
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    let pickle = proxytune::models::pickle::Pickle::open(&case.model.join("model.pt")).unwrap();
    let mut tensors = pickle.read_all().unwrap();
    let codes = tensors["quantize.embedding.weight"].clone();
    let twice = Tensor::cat(&[&codes, &codes], 0).unwrap();
    tensors.insert("quantize.embedding.weight".into(), twice);
    candle_core::safetensors::save(&tensors, model.join("model.safetensors")).unwrap();
    let case = Case { model, ..case };
    let case = case.tampered(place.path(), |tensors| {
        let output = (&tensors["output"] + 90f64).unwrap();
        tensors.insert("output".into(), output);
    });
    let said = case.run(&[]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(
        said.out.contains("90 tokens, 0 different, 90 ties"),
        "{said:?}"
    );
    // A tie excuses neither of the other codes.
    let case = case.tampered(place.path(), |tensors| {
        let output = &tensors["output"];
        let mut tokens = output.flatten_all().unwrap().to_vec1::<i64>().unwrap();
        tokens[7] = 90 + (tokens[7] + 1) % 90;
        let tokens = Tensor::from_vec(tokens, output.dims(), &Device::Cpu).unwrap();
        tensors.insert("output".into(), tokens);
    });
    case.run(&[])
        .says(1, &["1 different, 89 ties; the first is token 7"]);
}

const WO: &str = "layers.1.attention.wo.lora_B.weight";

/// The gradient of one weight of the tuned GPT's second layer, replaced.
fn with_gradient(place: &Path, edit: impl Fn(&Tensor) -> Tensor) -> Case {
    Case::named("llamagen-gpt", "two-layers", "").tampered(place, |tensors| {
        let gradient = tensors
            .get_mut(&format!("grad.base_model.model.{WO}"))
            .unwrap();
        *gradient = edit(gradient);
    })
}

#[test]
fn a_gradient_that_differs_fails_on_its_own_and_is_named_first() {
    let place = tempfile::tempdir().unwrap();
    let case = with_gradient(place.path(), |gradient| (gradient * 1.01).unwrap());
    let said = case.run(&[]);
    said.says(1, &["1 of 20 gradients differ", WO, "9.9e-3"]);
    let first = said
        .out
        .lines()
        .skip_while(|line| !line.contains("the worst"))
        .nth(1);
    assert!(first.unwrap().contains(WO), "{}", said.out);
    assert_eq!(case.run(&["--gradient-tolerance", "0.02"]).code, Some(0));
    let zeroed = with_gradient(place.path(), |gradient| gradient.zeros_like().unwrap());
    zeroed.run(&[]).says(1, &["1 of 20 gradients differ", WO]);
}

#[test]
fn a_gradient_that_vanishes_here_is_called_zero_or_missing() {
    let place = tempfile::tempdir().unwrap();
    // The queries of the text in the last block lead nowhere: their gradients are zero on both sides.
    let name = "transformer_blocks.2.attn.add_q_proj.lora_B.weight";
    let case = Case::named("sd3-transformer", "sd3", "");
    assert_eq!(case.run(&[]).code, Some(0));
    let case = case.tampered(place.path(), |tensors| {
        let gradient = tensors
            .get_mut(&format!("grad.transformer.{name}"))
            .unwrap();
        *gradient = gradient.ones_like().unwrap();
    });
    let said = case.run(&[]);
    said.says(1, &[&format!("the gradient of {name} is zero here")]);
    // What only the pooled vector needs has no gradient from the hidden states.
    let case = Case::named("clip-text", "projected", "both-outputs");
    let case = case.tampered(place.path(), |tensors| {
        tensors.remove("cotangent.pooled");
    });
    let said = case.run(&[]);
    said.says(
        1,
        &["encoder.layers.1.mlp.fc1.lora_", "has no gradient here"],
    );
}

#[test]
fn a_reference_that_leaves_gradients_out_is_compared_with_a_note() {
    let place = tempfile::tempdir().unwrap();
    let case = Case::named("llamagen-gpt", "two-layers", "");
    let case = case.tampered(place.path(), |tensors| {
        tensors.remove(&format!("grad.base_model.model.{WO}"));
    });
    let said = case.run(&[]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(
        said.out
            .contains("1 weights of the adapter have no gradient in the reference")
    );
}

#[test]
fn names_of_gradients_are_read_in_every_spelling() {
    let place = tempfile::tempdir().unwrap();
    let spellings: [fn(&str) -> String; 3] = [
        |key| key.replace("grad.transformer.", "grad.base_model.model."),
        |key| {
            key.replace("lora_A.weight", "lora.down.weight")
                .replace("lora_B.weight", "lora.up.weight")
        },
        |key| {
            key.replace("grad.transformer.", "grad.")
                .replace(".weight", ".default.weight")
        },
    ];
    for spelling in spellings {
        let case = Case::named("sd3-transformer", "sd35", "");
        let case = case.tampered(place.path(), |tensors| {
            *tensors = std::mem::take(tensors)
                .into_iter()
                .map(|(key, tensor)| match key.starts_with("grad.") {
                    true => (spelling(&key), tensor),
                    false => (key, tensor),
                })
                .collect();
        });
        let said = case.run(&[]);
        assert_eq!(said.code, Some(0), "{said:?}");
    }
}

#[test]
fn a_scalar_alpha_beside_the_factors_scales_its_layer() {
    let place = tempfile::tempdir().unwrap();
    // rank 4, alpha 6: as a file of its own, with kohya's words.
    let case = Case::named("sd3-transformer", "sd3", "");
    let file = case
        .adapter
        .clone()
        .unwrap()
        .join("pytorch_lora_weights.safetensors");
    let mut tensors = std::collections::HashMap::new();
    for (key, tensor) in load(&file) {
        let key = key
            .replace("lora_A", "lora_down")
            .replace("lora_B", "lora_up");
        if let Some(layer) = key.strip_suffix(".lora_down.weight") {
            let alpha = Tensor::new(6f32, &Device::Cpu).unwrap();
            tensors.insert(format!("{layer}.alpha"), alpha);
        }
        tensors.insert(key, tensor);
    }
    let file = place.path().join("lora.safetensors");
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let case = Case {
        adapter: Some(file),
        ..case
    };
    let said = case.run(&[]);
    assert_eq!(said.code, Some(0), "{said:?}");
}

/// Cuts `names` to three positions.
fn shorten(tensors: &mut Tensors, names: &[&str]) {
    for name in names {
        let short = tensors[*name].narrow(1, 0, 3).unwrap();
        tensors.insert(name.to_string(), short.contiguous().unwrap());
    }
}

#[test]
fn whole_weights_beside_the_factors_must_be_the_checkpoints() {
    let case = Case::named("chameleon", "gelu-beyond-its-positions", "logits");
    let checkpoint = load(&case.model.join("model.safetensors"));
    let place = tempfile::tempdir().unwrap();
    let file = "adapter_model.safetensors";
    let own = case.adapter.clone().unwrap();
    let config = "adapter_config.json";
    std::fs::copy(own.join(config), place.path().join(config)).unwrap();
    let beside = |factor: f64, dtype: &str| {
        let mut tensors: std::collections::HashMap<_, _> =
            load(&own.join(file)).into_iter().collect();
        let name = "model.embed_tokens.weight";
        let whole = (&checkpoint[name] * factor).unwrap();
        tensors.insert(format!("base_model.model.{name}"), whole);
        candle_core::safetensors::save(&tensors, place.path().join(file)).unwrap();
        Case {
            adapter: Some(place.path().to_path_buf()),
            ..case.clone()
        }
        .run(&[
            "--dtype",
            dtype,
            "--tolerance",
            "1",
            "--gradient-tolerance",
            "9",
        ])
    };
    for dtype in ["f32", "bf16"] {
        let said = beside(1.0, dtype);
        assert_eq!(said.code, Some(0), "{said:?}");
        beside(1.05, dtype).says(2, &["model.embed_tokens.weight is not the base's"]);
    }
}

#[test]
fn what_cannot_be_compared_ends_with_2_and_says_why() {
    let place = tempfile::tempdir().unwrap();
    let case = Case::named("llamagen-gpt", "two-layers", "");
    let with = |edit: fn(&mut Tensors)| case.tampered(place.path(), edit).run(&[]);
    with(|t| drop(t.remove("cotangent"))).says(2, &["gradients but no cotangent", "hint: "]);
    with(|t| drop(t.remove("input.tokens"))).says(2, &["no input.tokens", "caption_mask"]);
    with(|t| drop(t.remove("output"))).says(2, &["no output"]);
    with(|t| drop(t.insert("input.pixels".into(), t["input.tokens"].clone())))
        .says(2, &["does not take input.pixels"]);
    with(|t| drop(t.insert("output.pooled".into(), t["output"].clone())))
        .says(2, &["output.pooled", "does not give"]);
    with(|t| shorten(t, &["cotangent"])).says(
        2,
        &["cotangent has shape [2, 3, 48], the output [2, 14, 48]"],
    );
    with(|t| {
        let wide = Tensor::cat(&[&t["input.caption_embeddings"]; 2], 2).unwrap();
        t.insert("input.caption_embeddings".into(), wide);
    })
    .says(2, &["caption embeddings of shape [2, 5, 24]", "(b, 5, 12)"]);
    with(|t| {
        let large = (&t["input.tokens"] + 48f64).unwrap();
        t.insert("input.tokens".into(), large);
    })
    .says(2, &["input.tokens holds", "0 to 47"]);
    with(|t| {
        let gradient = t[&format!("grad.base_model.model.{WO}")].clone();
        t.insert("grad.layers.7.attention.wo.lora_B.weight".into(), gradient);
    })
    .says(
        2,
        &[
            "layers.7.attention.wo.lora_B.weight",
            "no weight of the adapter",
        ],
    );
    // An output of another shape is a difference, also where the cotangent has it.
    let shortened: [fn(&mut Tensors); 2] = [
        |t| shorten(t, &["output"]),
        |t| shorten(t, &["output", "cotangent"]),
    ];
    for edit in shortened {
        let different = "output has shape [2, 3, 48] in the reference, [2, 14, 48] here";
        with(edit).says(1, &[different]);
    }
    let t5 = Case::named("t5", "gated-gelu", "");
    let masked = t5.tampered(place.path(), |t| {
        let mask = t["input.attention_mask"].zeros_like().unwrap();
        t.insert("input.attention_mask".into(), mask);
    });
    masked
        .run(&[])
        .says(2, &["output has no values to compare"]);

    Case {
        adapter: None,
        ..case.clone()
    }
    .run(&[])
    .says(2, &["has gradients", "--adapter"]);
    let missing = |case: Case| case.run(&[]).says(2, &["nowhere", "No such file"]);
    missing(Case {
        reference: "nowhere".into(),
        ..case.clone()
    });
    missing(Case {
        model: "nowhere".into(),
        ..case.clone()
    });
    missing(Case {
        adapter: Some("nowhere".into()),
        ..case.clone()
    });
    Case {
        component: "vae",
        ..case.clone()
    }
    .run(&[])
    .says(2, &["config.json"]);
    Case {
        reference: case.model.join("config.json"),
        ..case.clone()
    }
    .run(&[])
    .says(2, &["not a safetensors file"]);
    case.run(&["--tolerance", "-1"]).says(2, &["at least 0"]);
    let said = Case {
        component: "gpt",
        ..case.clone()
    }
    .run(&[]);
    said.says(2, &["the components are llamagen-gpt, llamagen-vq"]);
}

#[test]
fn checkpoints_and_adapters_that_do_not_fit_are_reported_whole() {
    let place = tempfile::tempdir().unwrap();
    let copy = |case: &Case, edit: fn(&mut Value)| {
        let model = place.path().join(format!("{}-model", case.component));
        std::fs::create_dir_all(&model).unwrap();
        for entry in std::fs::read_dir(&case.model).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
        }
        let file = model.join("config.json");
        let text = std::fs::read_to_string(&file).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        edit(&mut config);
        std::fs::write(&file, config.to_string()).unwrap();
        Case {
            model,
            ..case.clone()
        }
    };
    let case = Case::named("t5", "gated-gelu", "");
    let said = copy(&case, |config| {
        config["num_layers"] = 3.into();
        config["d_ff"] = 26.into();
    })
    .run(&[]);
    said.says(
        2,
        &[
            "encoder.block.2.layer.0",
            "wi_0.weight has shape [27, 16], [26, 16] expected",
        ],
    );
    assert_eq!(
        said.err.matches("model.safetensors").count(),
        1,
        "{}",
        said.err
    );

    let case = Case::named("llamagen-gpt", "two-layers", "");
    let other = Case::named("llamagen-gpt", "grouped-heads", "");
    let said = Case {
        adapter: other.adapter,
        ..case.clone()
    }
    .run(&[]);
    said.says(
        2,
        &[
            "the adapter does not fit the model",
            "layers.0.attention.w",
            "more",
        ],
    );

    let adapter = place.path().join("adapter");
    std::fs::create_dir(&adapter).unwrap();
    let file = "adapter_model.safetensors";
    std::fs::copy(
        case.adapter.as_ref().unwrap().join(file),
        adapter.join(file),
    )
    .unwrap();
    let config = r#"{"peft_type": "LORA", "lora_alpha": 5, "use_dora": true}"#;
    std::fs::write(adapter.join("adapter_config.json"), config).unwrap();
    Case {
        adapter: Some(adapter),
        ..case
    }
    .run(&[])
    .says(2, &["use_dora is set: DoRA cannot be carried"]);
}

#[test]
fn a_pipelines_folder_stands_for_its_only_component_of_a_kind() {
    let pipeline = golden().join("sd3-pipeline/tiny");
    let case = Case::named("clip-text", "plain", "");
    let said = Case {
        model: pipeline.clone(),
        ..case
    }
    .run(&[]);
    said.says(2, &["several of clip-text", "text_encoder_2"]);
    let case = Case::named("vae", "one-level-no-attention", "decoder");
    // It is found, and does not fit these latents.
    let said = Case {
        model: pipeline,
        ..case
    }
    .run(&["--json"]);
    assert_eq!(said.code, Some(2), "{said:?}");
    let gpt = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/nano/checkpoints/llamagen");
    let place = tempfile::tempdir().unwrap();
    let tokens = Tensor::zeros((1, 256), candle_core::DType::I64, &Device::Cpu).unwrap();
    let image = Tensor::zeros((1, 3, 32, 32), candle_core::DType::F32, &Device::Cpu).unwrap();
    let reference = place.path().join("reference.safetensors");
    let tensors = std::collections::HashMap::from([("input.image", image), ("output", tokens)]);
    candle_core::safetensors::save(&tensors, &reference).unwrap();
    let case = Case {
        component: "llamagen-vq",
        model: gpt,
        adapter: None,
        reference,
    };
    let report = case.run(&["--json"]);
    let found = json(&report)["model"].as_str().unwrap().to_string();
    assert!(found.ends_with("llamagen/vq"), "{found}");
}
