//! A Lumina student in the whole program: pretrained a little, then proxy-tuned, drawn with and evaluated.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use candle_core::{DType, Tensor};
use proxytune::files::read_tensors;
use proxytune::models::lora_file::LoraFile;

use crate::support::{Place, find, program, say};

/// Smaller sizes than the shipped settings have, so that a checkpoint is made in seconds.
const SMALLER: [(&str, &str); 4] = [
    (
        "multipliers = [2, 4, 5]\nnorm_groups = 4",
        "multipliers = [1, 1, 1]\nnorm_groups = 4",
    ),
    (
        "codebook_size = 1024\ncodebook_dim = 16",
        "codebook_size = 40\ncodebook_dim = 6",
    ),
    (
        "width = 96\nlayers = 6\nheads = 4",
        "width = 32\nlayers = 2\nheads = 2",
    ),
    ("feed_forward = 256", "feed_forward = 48"),
];

/// A folder does not say which evaluators fit it.
const EVALUATORS: [&str; 2] = ["evaluation.clip=nano-clip", "evaluation.dino=nano-dino"];

fn run(command: Command) -> String {
    let said = say(command);
    said.says(0, &[]);
    said.out
}

/// Trains the models `only` on a few images, into `folder`, by the shipped settings made [`SMALLER`] and then `changed`.
fn pretrain(only: &str, folder: &Path, changed: impl Fn(String) -> String) -> Command {
    let mut settings = std::fs::read_to_string("pipelines/nano-pretrain.toml").unwrap();
    for (from, to) in SMALLER {
        assert!(settings.contains(from), "{from}");
        settings = settings.replace(from, to);
    }
    let file = folder.join("settings.toml");
    std::fs::write(&file, changed(settings)).unwrap();
    let mut command = program();
    command
        .arg("pretrain")
        .arg(&file)
        .args(["--only", only, "--images", "64", "--out"])
        .arg(folder)
        .arg("--store")
        .arg(folder.join("store"));
    command
}

/// A folder with a checkpoint of Lumina that has seen a few images.
fn checkpoint() -> &'static Path {
    static DIR: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, dir) = DIR.get_or_init(|| {
        let place = tempfile::tempdir().unwrap();
        run(pretrain("vqgan,chameleon", place.path(), |same| same));
        let dir = place.path().join("lumina");
        (place, dir)
    });
    dir
}

fn set(field: &str, value: &str) -> String {
    format!("student.{field}={value}")
}

fn sample(adapter: Option<&Path>, seed: &str, out: &Path) -> Vec<Vec<u8>> {
    let mut command = program();
    command.args(["sample", "--model"]).arg(checkpoint());
    if let Some(adapter) = adapter {
        command.arg("--adapter").arg(adapter);
    }
    command
        .args([
            "--prompt",
            "a sks dog in the snow",
            "--count",
            "2",
            "--seed",
            seed,
        ])
        .args(["--guidance-scale", "2"])
        .arg("--out")
        .arg(out);
    run(command);
    let files = find(out, &|name| name.ends_with(".png"));
    assert_eq!(files.len(), 2);
    files
        .iter()
        .map(|file| std::fs::read(file).unwrap())
        .collect()
}

#[test]
fn a_lumina_student_learns_draws_and_is_evaluated() {
    let place = Place::new();
    let model = checkpoint().display().to_string();
    let of_model = set("model", &model);
    run(place.command(&[&of_model, EVALUATORS[0], EVALUATORS[1]]));
    let student = place.only_run().join("student");
    let adapter = LoraFile::read(&student).unwrap();
    assert_eq!(adapter.layers.len(), 2 * 7);
    let module = "model.layers.1.self_attn.q_proj";
    let sum = adapter.layers[module].b.abs().unwrap().sum_all().unwrap();
    assert!(sum.to_scalar::<f32>().unwrap() > 0.0);

    let draw = |adapter, seed, name: &str| sample(adapter, seed, &place.path().join(name));
    let pictures = draw(Some(&student), "5", "first");
    assert_eq!(pictures, draw(Some(&student), "5", "again"));
    assert_ne!(pictures, draw(Some(&student), "6", "other"));
    assert_ne!(pictures[0], pictures[1]);
    let image = image::load_from_memory(&pictures[0]).unwrap();
    assert_eq!((image.width(), image.height()), (32, 32));

    let list = place.path().join("prompts.txt");
    std::fs::write(&list, "a {token} {class} in the snow\n").unwrap();
    let mut command = program();
    command
        .args(["evaluate", "--references", "datasets/nano/subjects/dog1"])
        .args(["--class", "dog", "--model", &model, "--adapter"])
        .arg(&student)
        .arg("--prompts")
        .arg(&list);
    assert!(run(command).contains("CLIP-T"));
}

#[test]
fn all_weights_of_a_lumina_student_can_be_tuned_and_drawn_with() {
    let place = Place::new();
    let model = checkpoint().display().to_string();
    let overrides = [
        set("model", &model),
        set("tuning", "full"),
        set("steps", "3"),
        set("dropout", "0.1"),
    ];
    let mut overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
    overrides.extend(EVALUATORS);
    overrides.push("evaluation.every=3");
    run(place.command(&overrides));
    let student = place.only_run().join("student");
    assert!(student.join("model.safetensors").is_file());
    let pictures = sample(Some(&student), "5", &place.path().join("own"));
    assert_ne!(pictures, sample(None, "5", &place.path().join("base")));
}

#[test]
fn a_checkpoint_without_an_image_tokenizer_says_what_it_lacks() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(checkpoint().join(name), dir.path().join(name)).unwrap();
    }
    let mut command = program();
    command.args(["sample", "--prompt", "a dog", "--model"]);
    command.arg(dir.path()).arg("--out").arg(dir.path());
    say(command).says(1, &["no image tokenizer", "hint: ", "vqgan.yaml"]);
}

#[test]
fn a_decoder_that_learns_alone_leaves_the_tokens_as_they_are() {
    let alone = |settings: String| settings.replace("decoder_only = false", "decoder_only = true");
    let place = tempfile::tempdir().unwrap();
    let fault = pretrain("vqgan", place.path(), alone);
    say(fault).says(1, &["without tokens", "hint: ", "decoder_only = false"]);

    run(pretrain("vqgan", place.path(), |same| same));
    let file = place.path().join("lumina/tokenizer/vqgan.safetensors");
    let (before, _) = read_tensors(&file).unwrap();
    run(pretrain("vqgan", place.path(), alone));
    let (after, _) = read_tensors(&file).unwrap();
    assert_eq!(before.len(), after.len());
    let values = |tensor: &Tensor| -> Vec<f32> {
        let tensor = tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap();
        tensor.to_vec1().unwrap()
    };
    let mut moved = 0;
    for (name, tensor) in &before {
        let same = values(tensor) == values(&after[name]);
        if name.starts_with("decoder.") || name.starts_with("post_quant_conv.") {
            moved += usize::from(!same);
        } else {
            assert!(same, "{name} has moved");
        }
    }
    assert!(moved > 20, "{moved} tensors have moved");
}
