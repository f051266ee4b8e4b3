//! What is wrong with the input is said: what, where, and how to mend it; and nothing that is committed is lost.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::record_batch::RecordBatch;
use candle_core::{DType, Device, Tensor};
use lance::dataset::InsertBuilder;
use proxytune::files;
use proxytune::store::{Columns, SCHEMA_VERSION};

use crate::support::{PROXIES, Place, Said, copy_tree, say};

const PHOTOS: &str = "datasets/nano/subjects/dog1";
const STUDENT: &str = "datasets/nano/checkpoints/llamagen";

/// The beginning of a PNG of `side` x `side` pixels, with nothing behind its header.
fn png_header(side: u32) -> Vec<u8> {
    let mut header = b"IHDR".to_vec();
    header.extend(side.to_be_bytes());
    header.extend(side.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]);
    let crc = header.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                crc >> 1 ^ 0xEDB8_8320
            } else {
                crc >> 1
            }
        })
    });
    let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    bytes.extend(header);
    bytes.extend((!crc).to_be_bytes());
    bytes.extend(b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xae\x42\x60\x82");
    bytes
}

fn bad_photos(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let good = std::fs::read(Path::new(PHOTOS).join("00.png")).unwrap();
    std::fs::write(dir.join("cut.png"), &good[..good.len() / 2]).unwrap();
    std::fs::write(dir.join("empty.jpg"), []).unwrap();
    std::fs::write(dir.join("enormous.png"), png_header(60_000)).unwrap();
    std::fs::write(dir.join("letter.jpg"), "Dear reader,\nthis is a letter.\n").unwrap();
}

fn images(dir: &Path) -> String {
    format!("subject.dog1.images={}", dir.display())
}

#[test]
fn bad_photos_are_set_aside_by_name_the_run_goes_on_and_the_exit_code_says_so() {
    let place = Place::new();
    let photos = place.path().join("photos");
    copy_tree(Path::new(PHOTOS), &photos);
    bad_photos(&photos);
    let said = say(place.command(&[
        &images(&photos),
        "direct.enabled=false",
        "evaluation.every=0",
    ]));
    let named = |name: &str, reason: &str| {
        format!(
            "warning: subject dog1: set aside: {}: {reason}",
            photos.join(name).display()
        )
    };
    said.says(
        3,
        &[
            &named("cut.png", "the picture is cut short"),
            &named("empty.jpg", "the file is empty"),
            &named("enormous.png", "the picture is 60000x60000 pixels"),
            &named("letter.jpg", "the content is text, not a picture"),
        ],
    );
    assert!(
        place
            .only_run()
            .join("student/adapter_model.safetensors")
            .is_file()
    );
    let report = std::fs::read_to_string(place.only_run().join("report.html")).unwrap();
    assert!(
        report.contains("letter.jpg"),
        "the report names what was set aside"
    );
}

#[test]
fn a_folder_with_nothing_usable_stops_the_run_before_it_starts() {
    let place = Place::new();
    let photos = place.path().join("photos");
    bad_photos(&photos);
    let said = say(place.command(&[&images(&photos)]));
    let folder = photos.display().to_string();
    said.says(
        2,
        &[
            &folder,
            "no usable photo",
            "cut.png: the picture is cut short",
            "letter.jpg",
            "hint: put 3 to 6",
        ],
    );

    let missing = place.path().join("nowhere");
    let said = say(place.command(&[&images(&missing)]));
    said.says(2, &[&missing.display().to_string(), "hint: check the path"]);
    assert!(!place.store().join("proxies.lance").exists());
}

/// A copy of the student's checkpoint, to be damaged.
fn student(place: &Place) -> (PathBuf, String) {
    let dir = place.path().join("llamagen");
    copy_tree(Path::new(STUDENT), &dir);
    let model = format!("student.model={}", dir.display());
    (dir, model)
}

/// Runs with `model`, whose name no longer tells that the small evaluators belong to it.
fn run_with(place: &Place, model: &str) -> Said {
    let evaluators = ["evaluation.clip=nano-clip", "evaluation.dino=nano-dino"];
    say(place.command(&[model, evaluators[0], evaluators[1]]))
}

#[test]
fn a_missing_checkpoint_file_is_named() {
    let place = Place::new();
    let (dir, model) = student(&place);
    let file = dir.join("vq/model.safetensors");
    std::fs::remove_file(&file).unwrap();
    let said = run_with(&place, &model);
    let folder = dir.join("vq").display().to_string();
    said.says(2, &[&folder, "model.safetensors is missing", "hint: "]);

    let said = say(place.command(&["student.model=no-such-model"]));
    said.says(
        2,
        &[
            "student.model",
            "no-such-model",
            "hint: the known models are",
        ],
    );
}

#[test]
fn a_tensor_of_the_wrong_shape_is_named_with_both_shapes() {
    let place = Place::new();
    let (dir, model) = student(&place);
    let file = dir.join("model.safetensors");
    let (mut tensors, _) = files::read_tensors(&file).unwrap();
    let right = tensors["norm.weight"].dims().to_vec();
    let wrong = Tensor::ones(right[0] + 1, DType::F16, &Device::Cpu).unwrap();
    tensors.insert("norm.weight".into(), wrong);
    files::write_tensors(&file, &tensors, &[]).unwrap();
    let said = run_with(&place, &model);
    let shapes = [format!("{right:?}"), format!("[{}]", right[0] + 1)];
    said.says(
        1,
        &[
            &dir.display().to_string(),
            "norm.weight",
            &shapes[0],
            &shapes[1],
            "hint: ",
        ],
    );

    let length = std::fs::metadata(&file).unwrap().len();
    std::fs::File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(length / 2)
        .unwrap();
    let said = run_with(&place, &model);
    said.says(2, &[&file.display().to_string(), "hint: "]);
}

#[tokio::test]
async fn a_store_of_another_schema_version_is_refused_and_left_as_it_is() {
    let place = Place::new();
    let path = place.store().join("proxies.lance");
    std::fs::create_dir_all(place.store()).unwrap();
    let version = [("proxytune.schema_version".to_string(), "99".to_string())];
    let schema = Schema::new_with_metadata(
        vec![Field::new("key", DataType::Utf8, false)],
        version.into(),
    );
    let keys: ArrayRef = Arc::new(StringArray::from(vec!["from the future"]));
    let batch = RecordBatch::try_new(Arc::new(schema), vec![keys]).unwrap();
    InsertBuilder::new(path.to_str().unwrap())
        .execute(vec![batch])
        .await
        .unwrap();

    let said = say(place.command(&[]));
    let ours = format!("this program reads versions up to {SCHEMA_VERSION}");
    said.says(
        1,
        &[
            "proxies.lance has schema version 99",
            &ours,
            "hint: ",
            "--store",
        ],
    );
    let dataset = lance::Dataset::open(path.to_str().unwrap()).await.unwrap();
    assert_eq!(dataset.count_rows(None).await.unwrap(), 1);
}

#[test]
fn a_file_where_a_directory_belongs_is_named() {
    for option in ["--store", "--out"] {
        let place = Place::new();
        let path = if option == "--store" {
            place.store()
        } else {
            place.out()
        };
        std::fs::write(&path, "a file").unwrap();
        let said = say(place.command(&[]));
        said.says(2, &[&path.display().to_string(), "hint: ", option]);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a file");
    }
}

#[cfg(unix)]
#[test]
fn a_read_only_directory_is_named() {
    use std::os::unix::fs::PermissionsExt;
    // SAFETY: it only asks for a number. Nothing is read-only to root.
    if unsafe { libc::geteuid() } == 0 {
        return;
    }
    for option in ["--store", "--out"] {
        let place = Place::new();
        let path = if option == "--store" {
            place.store()
        } else {
            place.out()
        };
        std::fs::create_dir_all(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o555)).unwrap();
        let said = say(place.command(&[]));
        said.says(2, &[&path.display().to_string(), "hint: make ", option]);
    }
}

#[tokio::test]
async fn a_loss_that_is_no_number_stops_the_run_with_a_hint_and_leaves_the_store_readable() {
    let place = Place::new();
    let said = say(place.command(&["student.learning_rate=1e30", "direct.enabled=false"]));
    said.says(
        1,
        &[
            "stage train: ",
            " is not finite at step ",
            "hint: lower learning_rate",
        ],
    );
    let rows = place
        .proxies()
        .await
        .rows(None, Columns::All)
        .await
        .unwrap();
    // The first step needs the first batch alone, so others may not have been made yet.
    assert!(
        (4..=PROXIES).contains(&rows.len()) && rows.len() % 4 == 0,
        "{}",
        rows.len()
    );
    assert!(!place.only_run().join("student").exists());
    // What is committed serves the next run.
    let said = say(place.command(&[
        "direct.enabled=false",
        "evaluation.every=0",
        "student.steps=2",
    ]));
    assert_eq!(said.code, Some(0), "{}", said.err);
    assert_eq!(place.proxies().await.count(), PROXIES);
}
