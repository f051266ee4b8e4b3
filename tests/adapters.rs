//! An adapter is applied whole or refused by name, wherever one is taken; it remembers how it was drawn with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use proxytune::config::Sampling;
use proxytune::files;
use proxytune::models::adapters::{PEFT_CONFIG, PEFT_WEIGHTS};
use proxytune::models::sampling_file;

use crate::support::{Place, Said, copy_tree, find, program, say};

type Tensors = BTreeMap<String, Tensor>;

/// A layer of nano-llamagen, whose weights are (128, 128); it has six such.
const WO: &str = "layers.0.attention.wo";
const DOG: &str = "datasets/nano/subjects/dog1";
const GPT: &str = "datasets/nano/checkpoints/llamagen";

fn full(value: f32, shape: &[usize]) -> Tensor {
    Tensor::full(value, shape, &Device::Cpu).unwrap()
}

/// Factors of rank 2 for a weight of shape (`outputs`, 128) at `layer`.
fn factors(layer: &str, outputs: usize) -> Tensors {
    let name = |part: &str| format!("base_model.model.{layer}.{part}.weight");
    [
        (name("lora_A"), full(0.1, &[2, 128])),
        (name("lora_B"), full(0.1, &[outputs, 2])),
    ]
    .into()
}

fn all(layers: &[&str]) -> Tensors {
    layers
        .iter()
        .flat_map(|layer| factors(layer, 128))
        .collect()
}

/// A folder in PEFT's layout with the configuration `config`, or one that scales by 1.
fn peft(place: &Place, name: &str, tensors: &Tensors, config: Option<&str>) -> PathBuf {
    let dir = place.path().join(name);
    files::write_tensors(&dir.join(PEFT_WEIGHTS), tensors, &[]).unwrap();
    let config = config.unwrap_or(r#"{"peft_type": "LORA", "use_rslora": false}"#);
    files::write(&dir.join(PEFT_CONFIG), config.as_bytes()).unwrap();
    dir
}

fn proxytune(arguments: &[&str], adapter: &Path) -> Said {
    let mut command = program();
    command.args(arguments).arg("--adapter").arg(adapter);
    say(command)
}

fn sample(place: &Place, adapter: &Path, out: &str, more: &[&str]) -> Said {
    let out = place.path().join(out);
    let out = out.to_str().unwrap();
    let draw = [
        "sample",
        "--model",
        "nano-llamagen",
        "--prompt",
        "a sks dog",
        "--out",
        out,
    ];
    proxytune(&[&draw[..], more].concat(), adapter)
}

#[test]
fn an_adapter_of_which_anything_is_not_applied_is_refused_by_name_with_its_kind() {
    let place = Place::new();
    let with = |more: Tensors| {
        let mut tensors = all(&[WO]);
        tensors.extend(more);
        tensors
    };
    let without = |end: &str| {
        let mut tensors = all(&[WO, "layers.1.attention.wo"]);
        tensors.retain(|name, _| !name.ends_with(&format!("layers.1.attention.wo.{end}.weight")));
        tensors
    };
    let value = |part: &str, value: f32, shape: &[usize]| {
        with([(format!("base_model.model.{WO}.{part}"), full(value, shape))].into())
    };
    let renamed = |prefix: &str| -> Tensors {
        let renamed =
            |(name, tensor): (String, Tensor)| (name.replace("base_model.model.", prefix), tensor);
        all(&[WO]).into_iter().map(renamed).collect()
    };
    let kohya = ["lora_down", "lora_up"].map(|part| {
        let name = format!("lora_unet_joint_blocks_0_x_block_mlp_fc1.{part}.weight");
        (name, full(0.1, &[4, 4]))
    });
    let whole = BTreeMap::from([(format!("{WO}.weight"), full(0.1, &[128, 128]))]);
    let lokr = BTreeMap::from([("lycoris_wo.lokr_w1".to_string(), full(0.1, &[2, 2]))]);
    let text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj";
    let config = |text: &str| Some(format!("{{\"peft_type\": \"LORA\", {text}}}"));
    let cases: Vec<(&str, Tensors, Option<String>, [&str; 2])> = vec![
        (
            "kohya",
            kohya.into(),
            None,
            [
                "transformer_blocks.0.ff.net.0.proj: the model has no such layer",
                "as SD3's",
            ],
        ),
        (
            "prefix",
            renamed("gpt."),
            None,
            ["gpt.layers.0.attention.wo", "take gpt. out"],
        ),
        (
            "deeper",
            all(&[WO, "layers.9.attention.wo"]),
            None,
            ["1 of its 2 layers", "more layers"],
        ),
        (
            "encoder",
            with(factors(text, 128)),
            None,
            ["text_encoder", "denoiser alone"],
        ),
        (
            "wide",
            factors("layers.0.attention.wqkv", 128),
            None,
            ["[128, 128]", "[384, 128]"],
        ),
        (
            "no-b",
            without("lora_B"),
            None,
            ["layers.1.attention.wo.lora_B.weight is missing", ""],
        ),
        (
            "no-a",
            without("lora_A"),
            None,
            ["layers.1.attention.wo.lora_A.weight is missing", ""],
        ),
        (
            "nan",
            value("lora_B.weight", f32::NAN, &[128, 2]),
            None,
            ["lora_B.weight", "not finite"],
        ),
        (
            "infinite",
            value("lora_A.weight", f32::INFINITY, &[2, 128]),
            None,
            ["lora_A", "not finite"],
        ),
        (
            "alpha",
            value("alpha", f32::NAN, &[1]),
            None,
            [WO, "alpha is NaN"],
        ),
        ("zero", value("alpha", 0.0, &[1]), None, [WO, "alpha is 0"]),
        (
            "lonely",
            with([("x.alpha".into(), full(1.0, &[1]))].into()),
            None,
            ["x.alpha", "no factors"],
        ),
        ("twice", with(renamed("unet.")), None, ["second time", WO]),
        ("whole", whole, None, ["whole weights", "--model"]),
        ("lokr", lokr, None, ["lycoris_wo.lokr_w1", "LoKr"]),
        (
            "rank",
            all(&[WO]),
            config("\"r\": 16"),
            ["rank 2", "says 16"],
        ),
        (
            "config-alpha",
            all(&[WO]),
            config("\"lora_alpha\": \"16\""),
            ["lora_alpha", "\"16\""],
        ),
        (
            "targets",
            all(&[WO]),
            config("\"target_modules\": [\"wo\"]"),
            ["layers.1.attention.wo has no factors", "fewer layers"],
        ),
    ];
    for (name, tensors, config, parts) in cases {
        let dir = peft(&place, name, &tensors, config.as_deref());
        let said = sample(&place, &dir, "none", &[]);
        assert_eq!(said.code, Some(1), "{name}: {said:?}");
        said.says(1, &parts);
        said.says(1, &[name, "hint: "]);
        assert!(find(&place.path().join("none"), &|file| file.ends_with(".png")).is_empty());
    }
}

#[test]
fn what_sample_refuses_evaluate_merge_and_init_refuse_too() {
    let place = Place::new();
    let tensors = all(&[WO, "layers.9.attention.wo"]);
    let dir = peft(&place, "deeper", &tensors, None);
    let parts = [
        "layers.9.attention.wo: the model has no such layer",
        "more layers",
    ];
    let evaluate = [
        "evaluate",
        "--references",
        DOG,
        "--class",
        "dog",
        "--model",
        "nano-llamagen",
    ];
    proxytune(&evaluate, &dir).says(1, &parts);
    let merged = place.path().join("merged");
    let merge = [
        "merge",
        "--model",
        "nano-llamagen",
        "--out",
        merged.to_str().unwrap(),
    ];
    proxytune(&merge, &dir).says(1, &parts);
    assert!(!merged.exists());
    let begin = |dir: &Path, rank: usize| {
        say(place.command(&[
            &format!("student.init={}", dir.display()),
            &format!("student.rank={rank}"),
            "student.targets=[\"attention.wo\"]",
            "student.source=references",
            "student.steps=1",
            "evaluation.every=0",
        ]))
    };
    begin(&dir, 2).says(2, &parts);
    // It fits the model, but not what is trained here.
    let narrow = peft(&place, "narrow", &all(&[WO]), None);
    begin(&narrow, 2).says(
        2,
        &["layers.1.attention.wo is a target here", "rank and targets"],
    );
    let layers: Vec<String> = (0..6).map(|i| format!("layers.{i}.attention.wo")).collect();
    let layers: Vec<&str> = layers.iter().map(String::as_str).collect();
    let other = peft(&place, "other", &all(&layers), None);
    begin(&other, 4).says(2, &["its rank is 2, here 4", "rank and targets"]);
}

#[test]
fn a_whole_checkpoint_with_more_layers_or_numbers_that_are_not_finite_is_refused() {
    let place = Place::new();
    let file = Path::new(GPT).join("model.safetensors");
    let (tensors, _) = files::read_tensors(&file).unwrap();
    for (name, value, parts) in [
        (
            "layers.6.attention.wo.weight",
            0.1,
            ["layers.6", "not of this model"],
        ),
        (
            "layers.5.attention.wo.weight",
            f32::NAN,
            ["layers.5", "not finite"],
        ),
    ] {
        let mut tensors = tensors.clone();
        tensors.insert(name.into(), full(value, &[128, 128]));
        let dir = place.path().join(name);
        files::write_tensors(&dir.join("model.safetensors"), &tensors, &[]).unwrap();
        sample(&place, &dir, "none", &[]).says(1, &parts);
    }
}

/// The pixels of the only picture in the folder `out`.
fn picture(place: &Place, out: &str) -> image::RgbImage {
    let files = find(&place.path().join(out), &|name| name.ends_with(".png"));
    assert_eq!(files.len(), 1, "{files:?}");
    proxytune::images::load(&files[0]).unwrap()
}

#[test]
fn an_adapter_is_drawn_with_as_it_was_evaluated_unless_options_say_otherwise() {
    let place = Place::new();
    let dir = peft(&place, "student", &all(&[WO]), None);
    let draw = |out: &str, adapter: &Path, more: &[&str]| {
        let said = sample(&place, adapter, out, more);
        assert_eq!(said.code, Some(0), "{said:?}");
        (picture(&place, out), said.err)
    };
    let (general, said) = draw("general", &dir, &[]);
    assert!(said.contains("guidance_scale 7.5, top_k 1000"), "{said}");
    let (asked, _) = draw("asked", &dir, &["--guidance-scale", "2", "--top-k", "100"]);
    assert_ne!(asked, general);
    let mut noted = proxytune::models::llamagen::FAMILY.sampling();
    if let Sampling::Autoregressive(noted) = &mut noted {
        (noted.guidance_scale, noted.top_k) = (2.0, 100);
    }
    sampling_file::write(&dir, &noted).unwrap();
    let (remembered, said) = draw("remembered", &dir, &[]);
    assert!(said.contains("guidance_scale 2.0, top_k 100"), "{said}");
    assert_eq!(remembered, asked);
    let (by_file, _) = draw("by-file", &dir.join(PEFT_WEIGHTS), &[]);
    assert_eq!(by_file, asked);
    let (told, said) = draw(
        "told",
        &dir,
        &["--guidance-scale", "7.5", "--top-k", "1000"],
    );
    assert!(said.contains("but for what the options say"), "{said}");
    assert_eq!(told, general);
    let evaluate = [
        "evaluate",
        "--references",
        DOG,
        "--class",
        "dog",
        "--model",
        "nano-llamagen",
    ];
    let list = place.path().join("list.txt");
    std::fs::write(&list, "a {token} {class}\n").unwrap();
    let list = ["--prompts", list.to_str().unwrap()];
    let said = proxytune(&[&evaluate[..], &list].concat(), &dir);
    said.says(0, &["guidance_scale 2.0, top_k 100"]);
    // What an adapter was merged into remembers, too.
    let merged = place.path().join("merged");
    let merge = [
        "merge",
        "--model",
        "nano-llamagen",
        "--out",
        merged.to_str().unwrap(),
    ];
    proxytune(&merge, &dir).says(0, &[]);
    let mut command = program();
    command
        .args(["sample", "--prompt", "a sks dog", "--model"])
        .arg(&merged);
    let said = say({
        command.arg("--out").arg(place.path().join("from-merged"));
        command
    });
    said.says(0, &["guidance_scale 2.0, top_k 100"]);
}

#[test]
fn every_adapter_that_a_run_leaves_remembers_how_it_was_evaluated() {
    let place = Place::new();
    let said = say(place.command(&[
        "supervisor.steps=1",
        "proxies.guidance_scale=3",
        "student.steps=1",
        "student.guidance_scale=2",
        "student.top_k=50",
        "direct.enabled=true",
        "direct.steps=1",
        "evaluation.every=0",
    ]));
    assert_eq!(said.code, Some(0), "{said:?}");
    let read = |file: &Path| -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
    };
    let run = place.only_run();
    for folder in ["student", "direct"] {
        let noted = read(&run.join(folder).join("sampling.json"));
        assert_eq!(
            (&noted["guidance_scale"], &noted["top_k"]),
            (&2.0.into(), &50.into())
        );
    }
    let noted = |place: &Path| find(place, &|name| name == "sampling.json");
    let supervisors = [noted(&run.join("supervisor")), noted(&place.store())].concat();
    assert!(supervisors.len() >= 2, "{supervisors:?}");
    for file in supervisors {
        assert_eq!(read(&file)["guidance_scale"], 3.0, "{}", file.display());
    }
}

#[cfg(unix)]
#[test]
fn a_merged_checkpoint_shares_no_file_with_its_base_and_fills_a_folder_that_is_there() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new();
    let dir = peft(&place, "student", &all(&[WO]), None);
    let base = place.path().join("base");
    let from = std::fs::canonicalize(GPT).unwrap();
    copy_tree(&from, &base);
    let here = place.path().join("here");
    std::fs::create_dir(&here).unwrap();
    let (before, handle) = (
        std::fs::metadata(&here).unwrap(),
        std::fs::File::open(&here),
    );
    let merge = |out: &str| {
        let mut command = program();
        command
            .current_dir(&here)
            .args(["merge", "--out", out, "--model"])
            .arg(&base);
        say({
            command.arg("--adapter").arg(&dir);
            command
        })
    };
    merge(".").says(0, &[]);
    assert_eq!(std::fs::metadata(&here).unwrap().ino(), before.ino());
    drop(handle);
    let files = find(&here, &|name| name.contains('.'));
    assert!(
        files.iter().any(|file| file.ends_with("t5/config.json")),
        "{files:?}"
    );
    for file in &files {
        assert_eq!(
            std::fs::metadata(file).unwrap().nlink(),
            1,
            "{}",
            file.display()
        );
        let name = file.file_name().unwrap().to_string_lossy();
        assert!(!name.ends_with(".tmp"), "{}", file.display());
    }
    merge(".").says(1, &["is not empty", "--out"]);
    let said = merge("../student/adapter_model.safetensors");
    said.says(1, &["is no folder", "--out"]);
}
