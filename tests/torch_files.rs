//! Torch's files: what a state dict needs is read, and what would take all memory or could not be is refused.

use std::collections::HashMap;

use candle_core::Tensor;
use proxytune::models::pickle::Pickle;

use crate::support::memory::peak_of;
use crate::support::torch::{dict, file, global, int, pickle, tensor, text, tuple};

/// What reading a file of these bytes comes to.
fn read(bytes: &[u8]) -> Result<HashMap<String, Tensor>, String> {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("model.pt");
    std::fs::write(&path, bytes).unwrap();
    let opened = Pickle::open(&path).and_then(|pickle| pickle.read_all());
    opened.map_err(|error| error.to_string())
}

/// A file with one tensor called `weight`, in a storage of six floats.
fn with_tensor(weight: Vec<u8>) -> Vec<u8> {
    file(&pickle(&dict(&[("weight", weight)])), &[("0", six())])
}

fn six() -> Vec<u8> {
    (0..6u8).flat_map(|n| f32::from(n).to_le_bytes()).collect()
}

fn matrix(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_vec2().unwrap()
}

#[test]
fn tensors_and_parameters_are_read_from_their_place_in_shared_storages() {
    let whole = tensor("FloatStorage", "0", 0, &[2, 3], &[3, 1]);
    let turned = tensor("FloatStorage", "0", 0, &[3, 2], &[1, 3]);
    let part = tensor("FloatStorage", "0", 4, &[1, 2], &[9, 1]);
    let empty = tensor("FloatStorage", "0", 6, &[0, 3], &[3, 1]);
    let parameter = [
        global("torch._utils", "_rebuild_parameter"),
        tuple(&[whole.clone(), vec![0x88], vec![b'N']]),
        b"R".to_vec(),
    ];
    let entries = [
        ("whole", whole),
        ("turned", turned),
        ("part", part),
        ("empty", empty),
        ("parameter", parameter.concat()),
        ("bits", tensor("BoolStorage", "0", 0, &[1], &[1])),
        ("epoch", int(7)),
    ];
    for nested in [false, true] {
        let value = match nested {
            true => dict(&[("step", int(1)), ("state_dict", dict(&entries))]),
            false => dict(&entries),
        };
        let found = read(&file(&pickle(&value), &[("0", six())])).unwrap();
        assert_eq!(found.len(), 5);
        assert_eq!(matrix(&found["whole"]), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
        assert_eq!(matrix(&found["parameter"]), matrix(&found["whole"]));
        assert_eq!(
            matrix(&found["turned"]),
            [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
        );
        assert_eq!(matrix(&found["part"]), [[4.0, 5.0]]);
        assert_eq!(found["empty"].dims(), [0, 3]);
    }
}

#[test]
fn a_tensor_that_lies_beyond_its_storage_is_refused_by_name() {
    let float =
        |offset, size: &[i64], stride: &[i64]| tensor("FloatStorage", "0", offset, size, stride);
    let most = i64::MAX;
    for (weight, what) in [
        (float(0, &[7], &[1]), "does not lie in its storage"),
        (float(1, &[2, 3], &[3, 1]), "does not lie in its storage"),
        (float(most, &[1], &[1]), "does not lie in its storage"),
        (float(0, &[2, 3], &[most, 1]), "does not lie in its storage"),
        (
            float(0, &[most, most], &[1, 1]),
            "does not lie in its storage",
        ),
        (
            float(0, &[1 << 32, 1 << 32, 2], &[0, 0, 0]),
            "does not lie in its storage",
        ),
        (
            float(0, &[0, most, most], &[1, 1, 1]),
            "does not lie in its storage",
        ),
        // Six values, a billion times.
        (
            float(0, &[1 << 30, 6], &[0, 1]),
            "does not lie in its storage",
        ),
        (float(0, &[2, 2], &[3, 1]), "side by side"),
        (float(0, &[-1], &[1]), "numbers"),
        (float(-1, &[1], &[1]), "offset"),
        (float(0, &[2], &[]), "1 sizes and 0 strides"),
        (float(0, &[1; 60], &[1; 60]), "60 sizes"),
        (
            tensor("DoubleStorage", "0", 0, &[6], &[1]),
            "does not lie in its storage",
        ),
        (tensor("FloatStorage", "1", 0, &[6], &[1]), "missing"),
        (
            tensor("FloatStorage", "../data.pkl", 0, &[6], &[1]),
            "missing",
        ),
    ] {
        let (result, peak) = peak_of(|| read(&with_tensor(weight)));
        let error = result.unwrap_err();
        assert!(error.contains(what), "{error}, not {what}");
        assert!(peak < 1 << 20, "{peak}");
    }
}

#[test]
fn arguments_that_are_too_few_are_refused() {
    let rebuild = |module: &str, name: &str, arguments: &[Vec<u8>]| {
        [global(module, name), tuple(arguments), b"R".to_vec()].concat()
    };
    for few in 0..4 {
        let some = vec![int(0); few];
        let weight = rebuild("torch._utils", "_rebuild_tensor_v2", &some);
        let error = read(&with_tensor(weight)).unwrap_err();
        assert!(error.contains("weight"), "{error}");
        for (module, name) in [
            ("torch._utils", "_rebuild_parameter"),
            ("torch._tensor", "_rebuild_from_type_v2"),
        ] {
            let error = read(&with_tensor(rebuild(module, name, &some))).unwrap_err();
            assert!(error.contains("no tensors"), "{error}");
        }
    }
    let storage = [tuple(&[text("storage")]), b"Q".to_vec()].concat();
    let arguments = [storage, int(0), tuple(&[]), tuple(&[])];
    let weight = rebuild("torch._utils", "_rebuild_tensor_v2", &arguments);
    assert!(read(&with_tensor(weight)).is_err());
}

#[test]
fn a_few_hundred_bytes_take_neither_all_memory_nor_the_stack() {
    // A list that holds the one before twice, 200 times; tuples in one another; a text of four gigabytes.
    let mut shared = b"\x80\x02)q\x00".to_vec();
    for key in 0..200u8 {
        shared.extend([b'h', key, b'h', key, 0x86, b'q', key + 1]);
    }
    shared.push(b'.');
    let deep = [b"\x80\x02)".as_slice(), &b"\x85".repeat(500_000), b"."].concat();
    let calls = [b"\x80\x02)".as_slice(), &b")R".repeat(500_000), b"."].concat();
    let long = b"\x80\x02X\xff\xff\xff\xff.".to_vec();
    let marks = [b"\x80\x02".as_slice(), &b"(".repeat(500_000), b"t."].concat();
    for bytes in [shared, deep, calls, long, marks] {
        let (result, peak) = peak_of(|| read(&file(&bytes, &[])));
        assert!(result.is_err());
        assert!(peak < 200 << 20, "{} MiB", peak >> 20);
    }
}

#[test]
fn one_storage_named_by_thousands_of_tensors_does_not_fill_the_memory() {
    let names: Vec<String> = (0..1000).map(|number| format!("weight{number}")).collect();
    let big = vec![0; 1 << 20];
    let many: Vec<(&str, Vec<u8>)> = names
        .iter()
        .map(|name| {
            (
                name.as_str(),
                tensor("ByteStorage", "0", 0, &[1 << 20], &[1]),
            )
        })
        .collect();
    let error = read(&file(&pickle(&dict(&many)), &[("0", big.clone())])).unwrap_err();
    assert!(error.contains("8 times the file"), "{error}");
    // T5 has its embeddings four times.
    let found = read(&file(&pickle(&dict(&many[..4])), &[("0", big)])).unwrap();
    assert_eq!(found.len(), 4);
}

#[test]
fn entries_that_are_packed_or_lie_about_their_size_are_refused() {
    let weight = tensor("FloatStorage", "0", 0, &[6], &[1]);
    let right = with_tensor(weight);
    assert!(read(&right).is_ok());
    // The sizes in the table at the end: of the entry model/data/0 the last.
    let table = right
        .windows(4)
        .rposition(|four| four == b"PK\x01\x02")
        .unwrap();
    for (at, value) in [
        (20, u32::MAX - 1),
        (24, u32::MAX - 1),
        (42, u32::MAX - 1),
        (20, 1 << 20),
    ] {
        let mut wrong = right.clone();
        wrong[table + at..table + at + 4].copy_from_slice(&value.to_le_bytes());
        assert!(read(&wrong).is_err(), "{value} at {at}");
    }
    let mut packed = right.clone();
    packed[table + 10] = 8;
    assert!(read(&packed).unwrap_err().contains("packed"));
    for keep in [0, 10, right.len() / 2, right.len() - 1] {
        assert!(read(&right[..keep]).is_err());
    }
}
