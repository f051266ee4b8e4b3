//! Files as torch.save writes them, and as it never would.

use std::io::{Cursor, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

pub fn text(text: &str) -> Vec<u8> {
    let mut bytes = vec![b'X'];
    bytes.extend((text.len() as u32).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes
}

pub fn int(number: i64) -> Vec<u8> {
    let mut bytes = vec![0x8a, 8];
    bytes.extend(number.to_le_bytes());
    bytes
}

pub fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(".as_slice(), &items.concat(), b"t"].concat()
}

pub fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

pub fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let entries = entries
        .iter()
        .map(|(key, value)| [text(key), value.clone()].concat());
    [
        b"}(".as_slice(),
        &entries.collect::<Vec<_>>().concat(),
        b"u",
    ]
    .concat()
}

/// A tensor of the storage `key`, whose values are of the type `kind`.
pub fn tensor(kind: &str, key: &str, offset: i64, size: &[i64], stride: &[i64]) -> Vec<u8> {
    let numbers = |numbers: &[i64]| tuple(&numbers.iter().map(|n| int(*n)).collect::<Vec<_>>());
    let storage = tuple(&[
        text("storage"),
        global("torch", kind),
        text(key),
        text("cpu"),
        int(0),
    ]);
    let arguments = tuple(&[
        [storage, b"Q".to_vec()].concat(),
        int(offset),
        numbers(size),
        numbers(stride),
        vec![0x89],
        [global("collections", "OrderedDict"), b")R".to_vec()].concat(),
    ]);
    let rebuild = global("torch._utils", "_rebuild_tensor_v2");
    [rebuild, arguments, b"R".to_vec()].concat()
}

pub fn pickle(value: &[u8]) -> Vec<u8> {
    [b"\x80\x02".as_slice(), value, b"."].concat()
}

/// A zip file with the pickle and these storages.
pub fn file(pickle: &[u8], storages: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    zip.start_file("model/data.pkl", stored).unwrap();
    zip.write_all(pickle).unwrap();
    for (key, bytes) in storages {
        zip.start_file(format!("model/data/{key}"), stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}
