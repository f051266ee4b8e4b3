//! A checkpoint's folder is somebody else's: numbers in its configs, headers of its weights and names in its indexes are
//! checked before anything is made of them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Said, copy_tree, say};

const NANO: &str = "datasets/nano/checkpoints";

/// The program with as much address space as a nano model needs several times over.
fn bounded(arguments: &[&str]) -> Said {
    let mut command = Command::new("sh");
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["-c", "ulimit -v 8000000; exec \"$0\" \"$@\""])
        .arg(env!("CARGO_BIN_EXE_proxytune"))
        .args(arguments)
        .stdin(Stdio::null());
    let began = Instant::now();
    let said = say(command);
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{arguments:?}: {said:?}"
    );
    said
}

fn sample(model: &Path) -> Said {
    let out = tempfile::tempdir().unwrap();
    let (model, out) = (
        model.display().to_string(),
        out.path().display().to_string(),
    );
    bounded(&[
        "sample",
        "--model",
        &model,
        "--prompt",
        "a red dog",
        "--out",
        &out,
    ])
}

fn evaluate(option: &str, model: &Path) -> Said {
    let (model, dog) = (model.display().to_string(), "datasets/nano/subjects/dog1");
    bounded(&[
        "evaluate",
        "--references",
        dog,
        "--class",
        "dog",
        "--images",
        dog,
        option,
        &model,
    ])
}

/// A copy of a nano checkpoint.
fn checkpoint(name: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join(name);
    let nano = Path::new(env!("CARGO_MANIFEST_DIR")).join(NANO);
    copy_tree(&nano.join(name), &model);
    (folder, model)
}

/// Sets `field`, with dots between levels, of the JSON file `path` while `body` runs.
fn with(path: &Path, field: &str, value: &Value, body: impl FnOnce() -> Said) -> Said {
    let original = std::fs::read_to_string(path).unwrap();
    let mut json: Value = serde_json::from_str(&original).unwrap();
    let mut place = &mut json;
    for name in field.split('.') {
        place = &mut place[name];
    }
    *place = value.clone();
    std::fs::write(path, json.to_string()).unwrap();
    let said = body();
    std::fs::write(path, original).unwrap();
    said
}

/// Every value is refused by the field's name, when the checkpoint is opened by `open`.
fn refuses(file: &Path, fields: &[(&str, &[Value])], open: impl Fn() -> Said) {
    for (field, values) in fields {
        for value in *values {
            let said = with(file, field, value, &open);
            let last = field.rsplit('.').next().unwrap();
            assert_eq!(said.code, Some(1), "{field} {value}: {said:?}");
            assert!(said.err.contains(last), "{field} {value}: {said:?}");
            assert!(said.err.contains("hint: "), "{field} {value}: {said:?}");
            assert!(!said.err.contains("panicked"), "{field} {value}: {said:?}");
        }
    }
}

#[test]
fn a_llamagen_of_absurd_sizes_is_refused_by_the_name_of_the_number() {
    let (_folder, model) = checkpoint("llamagen");
    let open = || sample(&model);
    assert_eq!(open().code, Some(0));
    let (layers, large) = (json!(1u64 << 31), json!(1u64 << 63));
    refuses(
        &model.join("config.json"),
        &[
            ("n_layer", &[layers.clone(), json!(0)]),
            ("n_head", &[json!(0), large.clone()]),
            ("dim", &[json!(0), json!(130), large.clone()]),
            ("vocab_size", std::slice::from_ref(&large)),
            ("block_size", &[json!(0), json!(1u64 << 40), large.clone()]),
            ("cls_token_num", &[json!(1u64 << 40)]),
            ("multiple_of", &[json!(0), large.clone()]),
            ("ffn_dim_multiplier", &[json!(1e300), json!(-1)]),
            ("rope_base", &[json!(0)]),
            ("token_dropout_p", &[json!(1), json!(-0.5)]),
        ],
        open,
    );
    refuses(
        &model.join("t5/config.json"),
        &[
            ("num_layers", &[layers]),
            ("num_heads", &[json!(0)]),
            ("d_kv", &[json!(0), json!(1u64 << 40)]),
            ("relative_attention_num_buckets", &[json!(0), json!(1)]),
            ("relative_attention_max_distance", &[json!(0)]),
            ("vocab_size", std::slice::from_ref(&large)),
        ],
        open,
    );
    refuses(
        &model.join("vq/config.json"),
        &[
            (
                "encoder_ch_mult",
                &[json!([]), json!(vec![1; 70]), json!([1, 1u64 << 60])],
            ),
            ("norm_num_groups", &[json!(0)]),
            ("ch", &[json!(0), large]),
            ("codebook_size", &[json!(1u64 << 62)]),
        ],
        open,
    );
}

#[test]
fn an_sd3_of_absurd_sizes_is_refused_by_the_name_of_the_number() {
    let (_folder, model) = checkpoint("sd3");
    let open = || sample(&model);
    let large = json!(1u64 << 63);
    refuses(
        &model.join("transformer/config.json"),
        &[
            ("num_layers", &[json!(1u64 << 31), json!(0)]),
            ("num_attention_heads", &[json!(0), large.clone()]),
            ("pos_embed_max_size", &[json!(0), json!(1u64 << 33)]),
            ("patch_size", &[json!(0), large.clone()]),
            ("sample_size", &[json!(0), json!(1u64 << 40)]),
            ("joint_attention_dim", std::slice::from_ref(&large)),
        ],
        open,
    );
    refuses(
        &model.join("vae/config.json"),
        &[
            (
                "block_out_channels",
                &[json!([]), json!([1u64 << 60]), json!(vec![8; 80])],
            ),
            ("norm_num_groups", &[json!(0), json!(7)]),
            ("layers_per_block", &[json!(1u64 << 31)]),
            ("scaling_factor", &[json!(0)]),
        ],
        open,
    );
    refuses(
        &model.join("text_encoder/config.json"),
        &[
            ("num_hidden_layers", &[json!(1u64 << 31)]),
            ("num_attention_heads", &[json!(0), json!(3)]),
            ("max_position_embeddings", &[json!(1u64 << 62), json!(0)]),
            ("vocab_size", &[large]),
        ],
        open,
    );
    let scheduler = model.join("scheduler/scheduler_config.json");
    let steps = [json!(0), json!(1u64 << 62)];
    refuses(&scheduler, &[("num_train_timesteps", &steps)], open);
}

#[test]
fn a_lumina_of_absurd_sizes_is_refused_by_the_name_of_the_number() {
    let (_folder, model) = checkpoint("lumina");
    let open = || sample(&model);
    refuses(
        &model.join("config.json"),
        &[
            ("num_hidden_layers", &[json!(1u64 << 31), json!(0)]),
            ("num_attention_heads", &[json!(0), json!(1u64 << 63)]),
            ("hidden_size", &[json!(0), json!(1u64 << 63), json!(97)]),
            ("max_position_embeddings", &[json!(0), json!(1u64 << 40)]),
            ("vocab_size", &[json!(1u64 << 63)]),
            ("image_size", &[json!(0), json!((1u64 << 32) + 32)]),
            ("patch_size", &[json!(0)]),
        ],
        open,
    );
    let file = model.join("tokenizer/vqgan.yaml");
    let yaml = std::fs::read_to_string(&file).unwrap();
    for field in [
        "n_embed",
        "embed_dim",
        "ch",
        "num_res_blocks",
        "norm_num_groups",
        "resolution",
    ] {
        for value in ["0", "4611686018427387904", "-1"] {
            let is_it = |line: &&str| line.trim_start().starts_with(&format!("{field}:"));
            let line = yaml.lines().find(is_it).unwrap();
            let start = &line[..=line.find(':').unwrap()];
            std::fs::write(&file, yaml.replace(line, &format!("{start} {value}"))).unwrap();
            let said = open();
            assert_eq!(said.code, Some(1), "{field} {value}: {said:?}");
            assert!(
                said.err.contains("VQGAN") && !said.err.contains("panicked"),
                "{said:?}"
            );
        }
    }
}

#[test]
fn evaluators_of_absurd_sizes_are_refused_by_the_name_of_the_number() {
    let (_folder, clip) = checkpoint("clip");
    refuses(
        &clip.join("config.json"),
        &[
            ("text_config.num_hidden_layers", &[json!(1u64 << 31)]),
            ("text_config.vocab_size", &[json!(1u64 << 63)]),
            ("text_config.num_attention_heads", &[json!(0)]),
            // In 32 bits it would be the nano model's own.
            ("vision_config.image_size", &[json!((1u64 << 32) + 32)]),
            ("vision_config.patch_size", &[json!(0), json!(64)]),
            ("projection_dim", &[json!(0), json!(1u64 << 40)]),
        ],
        || evaluate("--clip", &clip),
    );
    let (_folder, dino) = checkpoint("dino");
    refuses(
        &dino.join("config.json"),
        &[
            ("num_hidden_layers", &[json!(1u64 << 31)]),
            ("num_attention_heads", &[json!(0), json!(3)]),
            ("image_size", &[json!((1u64 << 32) + 32), json!([32, 0])]),
            ("patch_size", &[json!(0), json!(64)]),
        ],
        || evaluate("--dino", &dino),
    );
}

#[test]
fn a_config_of_a_far_larger_model_is_told_before_its_memory_is_taken() {
    let (_folder, model) = checkpoint("llamagen");
    let file = model.join("config.json");
    for (field, value) in [
        ("dim", json!(131_072)),
        ("n_layer", json!(1024)),
        ("vocab_size", json!(1 << 20)),
    ] {
        let said = with(&file, field, &value, || sample(&model));
        assert_eq!(said.code, Some(1), "{field}: {said:?}");
        assert!(
            said.err.contains("is missing") || said.err.contains("expected"),
            "{said:?}"
        );
    }
}

#[test]
fn an_index_names_files_beside_it_and_nothing_else() {
    let (folder, model) = checkpoint("dino");
    let weights = model.join("model.safetensors");
    std::fs::rename(&weights, model.join("one.safetensors")).unwrap();
    std::fs::copy(
        model.join("one.safetensors"),
        folder.path().join("one.safetensors"),
    )
    .unwrap();
    let index = model.join("model.safetensors.index.json");
    let absolute = folder.path().join("one.safetensors").display().to_string();
    for name in [
        "../one.safetensors",
        &absolute,
        "sub/../one.safetensors",
        "./one.safetensors",
        "one\0.safetensors",
    ] {
        std::fs::write(&index, json!({"weight_map": {"x": name}}).to_string()).unwrap();
        let said = evaluate("--dino", &model);
        said.says(
            1,
            &[
                "no name of a file beside it",
                "model.safetensors.index.json",
            ],
        );
    }
    std::fs::write(
        &index,
        json!({"weight_map": {"x": "one.safetensors"}}).to_string(),
    )
    .unwrap();
    evaluate("--dino", &model).says(0, &[]);
}

#[test]
fn weights_that_are_no_whole_file_are_refused_by_their_name() {
    let (_folder, model) = checkpoint("dino");
    let weights = model.join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let mut endless = whole.clone();
    endless[..8].copy_from_slice(&(1u64 << 63).to_le_bytes());
    for damaged in [
        &whole[..whole.len() - 1],
        &whole[..100],
        &[][..],
        &endless,
        b"<html>sign in</html>",
    ] {
        std::fs::write(&weights, damaged).unwrap();
        let said = evaluate("--dino", &model);
        said.says(1, &["model.safetensors", "safetensors file", "hint: "]);
        assert!(!said.err.contains("panicked"), "{said:?}");
    }
}

#[cfg(unix)]
#[test]
fn a_pipe_or_an_endless_file_in_place_of_a_config_is_refused() {
    for name in ["config.json", "preprocessor_config.json"] {
        let (_folder, model) = checkpoint("dino");
        let file = model.join(name);
        std::fs::remove_file(&file).unwrap();
        assert!(
            Command::new("mkfifo")
                .arg(&file)
                .status()
                .unwrap()
                .success()
        );
        evaluate("--dino", &model).says(1, &[name]);
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        evaluate("--dino", &model).says(1, &[name]);
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, vec![b' '; 17 << 20]).unwrap();
        evaluate("--dino", &model).says(1, &[name, "at most 8 MiB are read"]);
        let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
        std::fs::write(&file, deep).unwrap();
        evaluate("--dino", &model).says(1, &[name]);
    }
}
