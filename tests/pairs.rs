//! Every diffusion model teaches every model, itself among them (the paper's Table 4), and the two need not draw pictures
//! of one size. Neither time nor a kill changes what a pair comes to.

use std::collections::BTreeMap;
use std::path::Path;

use proxytune::images::{Filter, decode_png, resize_exact};
use proxytune::models::architecture;
use proxytune::store::{Columns, Store, TokenRow};

use crate::support::golden::CPU;
use crate::support::{Place, Remains, Running, copy_tree, find, program, say, tables};

const SDXL: &str = "tests/golden/text-to-image/sdxl-euler/model";
const FLUX: &str = "tests/golden/text-to-image/flux/model";

/// Model and side in pixels.
const SUPERVISORS: [(&str, usize); 3] = [("nano-sd3", 16), (SDXL, 24), (FLUX, 32)];
const STUDENTS: [(&str, usize); 5] = [
    ("nano-llamagen", 32),
    ("nano-lumina", 32),
    ("nano-sd3", 24),
    (SDXL, 16),
    (FLUX, 24),
];

/// The smoke pipeline with these two, cut to what tells them apart.
fn pair(supervisor: (&str, usize), student: (&str, usize)) -> Vec<String> {
    let fixed = [
        "supervisor.steps=2",
        "supervisor.checkpoint_every=1",
        "proxies.count=4",
        "proxies.batch_size=2",
        "student.steps=3",
        "student.batch_size=2",
        "student.checkpoint_every=1",
        "direct.enabled=false",
        "evaluation.every=0",
        "evaluation.untouched=false",
        "evaluation.prompts=[\"a {token} {class}\"]",
        "evaluation.clip=nano-clip",
        "evaluation.dino=nano-dino",
    ];
    let models = [("supervisor", supervisor), ("student", student)];
    let models = models.into_iter().flat_map(|(role, (model, side))| {
        [
            format!("{role}.model={model}"),
            format!("{role}.resolution={side}"),
        ]
    });
    models.chain(fixed.map(String::from)).collect()
}

fn borrowed(overrides: &[String]) -> Vec<&str> {
    overrides.iter().map(String::as_str).collect()
}

/// Every file of trained weights below `dir`, by its name.
fn weights(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let found = find(dir, &|name| name.ends_with(".safetensors"));
    let read = |path: std::path::PathBuf| {
        let name = path.strip_prefix(dir).unwrap().display().to_string();
        (name, std::fs::read(&path).unwrap())
    };
    found.into_iter().map(read).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_supervisor_teaches_every_student_and_streaming_equals_sequential() {
    for supervisor in SUPERVISORS {
        let (streaming, sequential) = (Place::new(), Place::new());
        let mut learnt = Vec::new();
        for student in STUDENTS {
            let what = format!("{supervisor:?} teaches {student:?}");
            let overrides = pair(supervisor, student);
            let mut results = Vec::new();
            for (place, in_order) in [(&streaming, false), (&sequential, true)] {
                let outcome = place.run(&borrowed(&overrides), in_order).await;
                let outcome = outcome.unwrap_or_else(|error| panic!("{what}: {error}"));
                results.push(weights(&outcome.dir.join("student")));
            }
            assert_eq!(results[0].len(), 1, "{what}");
            assert!(results[0] == results[1], "{what}: the adapters differ");
            learnt.push(results.remove(0));
        }
        // All learnt from the same proxies.
        let proxies = streaming.proxies().await;
        let rows = proxies.rows(None, Columns::WithoutPictures).await.unwrap();
        assert_eq!(rows.len(), 4, "{supervisor:?}");
        let side = supervisor.1 as u32;
        assert!(
            rows.iter()
                .all(|row| (row.width, row.height) == (side, side))
        );
        assert_eq!(
            tables(&streaming.store()).await,
            tables(&sequential.store()).await,
            "{supervisor:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_run_of_a_pair_comes_to_what_an_undisturbed_one_does() {
    let kills = ["supervise", "student"];
    for (number, supervisor) in SUPERVISORS.into_iter().enumerate() {
        for student in [STUDENTS[(number + 3) % 5], STUDENTS[2 * number]] {
            let what = format!("{supervisor:?} teaches {student:?}");
            let overrides = pair(supervisor, student);
            let overrides = borrowed(&overrides);
            let (undisturbed, killed) = (Place::new(), Place::new());
            undisturbed.run(&overrides, false).await.unwrap();
            for stage in kills {
                let mut run = Running::start(killed.command(&overrides));
                let place = match stage {
                    "supervise" => killed.store().join("training"),
                    _ => killed.out(),
                };
                let is_checkpoint = |name: &str| name == "state.json";
                run.runs_until(|| !find(&place, &is_checkpoint).is_empty());
                run.kill();
            }
            let (status, said) = Running::start(killed.command(&overrides)).wait();
            // The small tokenizers lack words of the prompts, which is told.
            assert!(matches!(status.code(), Some(0 | 3)), "{what}: {said}");
            let (ours, theirs) = (killed.remains().await, undisturbed.remains().await);
            ours.assert_equal(&theirs, &what);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_are_kept_as_they_were_drawn_and_resized_on_their_way_to_the_tokenizer() {
    let place = Place::new();
    let smaller = ["supervisor.resolution=16", "direct.steps=1"];
    let outcome = place.run(&smaller, false).await.unwrap();
    for folder in ["student", "direct"] {
        assert!(outcome.dir.join(folder).is_dir(), "{folder}");
    }
    let store = Store::open(place.store()).await.unwrap();
    let names = store.table_names().await.unwrap();
    let digests = |names: &[String]| -> Vec<String> {
        let tokens = names.iter().filter_map(|name| name.strip_prefix("tokens_"));
        tokens.map(String::from).collect()
    };
    let resized = digests(&names);
    assert_eq!(resized.len(), 1, "{names:?}");

    // The tokens are those of what LANCZOS makes of each.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/nano/checkpoints/llamagen");
    let llamagen = architecture(proxytune::models::llamagen::FAMILY).unwrap();
    let llamagen = llamagen.learner().unwrap();
    let tokenizer = (llamagen.tokenizer.unwrap().open)(&folder, None, &CPU).unwrap();
    let rows = store
        .proxies()
        .await
        .unwrap()
        .rows(None, Columns::All)
        .await
        .unwrap();
    let table = store.tokens(&resized[0], 64).await.unwrap();
    assert_eq!((rows.len(), table.count()), (12, 12));
    for row in &rows {
        let proxy = decode_png(&row.image, &row.key).unwrap();
        assert_eq!(proxy.dimensions(), (16, 16));
        let tokens: Vec<Option<TokenRow>> = table
            .get(std::slice::from_ref(&row.key), Columns::All)
            .await
            .unwrap();
        let tokens = tokens.into_iter().next().unwrap().unwrap();
        let larger = resize_exact(&proxy, 32, 32, Filter::Lanczos);
        assert_eq!(tokens.content, row.content);
        assert_eq!(tokens.tokens, tokenizer.encode(&[larger]).unwrap()[0]);
    }

    // Another process finds them, and pictures go out as they were drawn.
    let mut command = program();
    command.args([
        "generate",
        "pipelines/nano-smoke.toml",
        "--tokens",
        "--keep-free",
        "0",
    ]);
    command
        .args(["--set", smaller[0], "--store"])
        .arg(place.store())
        .arg("--out")
        .arg(place.path().join("runs"));
    let said = say(command);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.out.contains("12 were there, 0 made here"), "{said:?}");
    let to = place.path().join("to");
    let mut command = program();
    command
        .args(["export", "--layout", "imagefolder", "--store"])
        .arg(place.store());
    let said = say({
        command.arg("--to").arg(&to);
        command
    });
    assert_eq!(said.code, Some(0), "{said:?}");
    let pictures = find(&to, &|name| name.ends_with(".png"));
    assert_eq!(pictures.len(), 12);
    assert_eq!(image::image_dimensions(&pictures[0]).unwrap(), (16, 16));

    // Of proxies that need no resizing the tokens are found by the tokenizer alone.
    place.run(&["direct.enabled=false"], false).await.unwrap();
    let store = Store::open(place.store()).await.unwrap();
    let both = digests(&store.table_names().await.unwrap());
    assert_eq!(both.len(), 2);
    let vq = proxytune::plan::checkpoint_digest(&folder.join("vq")).unwrap();
    assert!(both.iter().any(|digest| vq.starts_with(digest.as_str())));
}

/// What a supervisor with class images learnt, and the table of its curve.
async fn with_class_images(place: &Place, more: &[&str]) -> Remains {
    let overrides = [CLASS_IMAGES.as_slice(), more].concat();
    place.run(&overrides, false).await.unwrap();
    place.remains().await
}

const CLASS_IMAGES: [&str; 9] = [
    "supervisor.prior_preservation={class_images=5}",
    "supervisor.steps=4",
    "supervisor.checkpoint_every=1",
    "proxies.count=4",
    "student.steps=1",
    "direct.enabled=false",
    "evaluation.every=0",
    "evaluation.untouched=false",
    "evaluation.prompts=[\"a {token} {class}\"]",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn class_images_come_while_they_are_learnt_and_kills_do_not_change_the_supervisor() {
    let (place, killed) = (Place::new(), Place::new());
    let undisturbed = with_class_images(&place, &[]).await;
    let is_checkpoint = |name: &str| name == "state.json";
    let mut run = Running::start(killed.command(&CLASS_IMAGES));
    let training = killed.store().join("training");
    assert!(run.runs_until(|| !find(&training, &is_checkpoint).is_empty()));
    run.kill();
    let (status, said) = Running::start(killed.command(&CLASS_IMAGES)).wait();
    assert!(status.success(), "{said}");
    let ours = killed.remains().await;
    ours.assert_equal(&undisturbed, "killed while it learnt class images");
    // They are learnt, and where all weights are trained the model as it was draws them, too.
    let without = Place::new();
    let mut without_them = CLASS_IMAGES;
    without_them[0] = "seed=1";
    without.run(&without_them, false).await.unwrap();
    let values = |remains: &Remains| remains.adapters.values().cloned().collect::<Vec<_>>();
    assert_ne!(values(&undisturbed), values(&without.remains().await));
    with_class_images(&Place::new(), &["supervisor.tuning=full"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_photo_with_a_caption_of_its_own_is_learnt_with_it() {
    let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/nano/subjects/dog1");
    let place = Place::new();
    let folder = place.path().join("photos");
    copy_tree(&photos, &folder);
    let images = format!("subject.dog1.images={}", folder.display());
    let short: Vec<&str> = CLASS_IMAGES[1..]
        .iter()
        .copied()
        .chain([images.as_str()])
        .collect();
    let adapters = || weights(&place.store().join("adapters"));
    place.run(&short, false).await.unwrap();
    let before = adapters();
    let first = find(&folder, &|name| name.ends_with(".png")).remove(0);
    std::fs::write(
        first.with_extension("txt"),
        "a {token} {class} in the snow\n",
    )
    .unwrap();
    place.run(&short, false).await.unwrap();
    let after = adapters();
    assert_eq!((before.len(), after.len()), (1, 2));
    let values: std::collections::BTreeSet<&Vec<u8>> = after.values().collect();
    assert_eq!(values.len(), 2);
}
