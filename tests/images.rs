//! Photos as people have them, and pixels as Pillow has them. The numbers come from `golden/images/generate.py`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use image::{Rgb, RgbImage};
use proxytune::Error;
use proxytune::images::{
    Filter, center_crop, decode, decode_png, encode_png, folder, from_tensor, load, pixel_digest,
    resize_exact, resize_short_side, square, to_tensor,
};

fn golden() -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/images/golden.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn picture(tensor: &Tensor) -> RgbImage {
    let (h, w, _) = tensor.dims3().unwrap();
    RgbImage::from_raw(w as u32, h as u32, bytes(tensor)).unwrap()
}

fn file(name: &str) -> Vec<u8> {
    bytes(&golden()[&format!("file.{name}")])
}

fn largest_difference(a: &RgbImage, b: &RgbImage) -> u8 {
    assert_eq!(a.dimensions(), b.dimensions());
    let differences = a.iter().zip(b.iter()).map(|(a, b)| a.abs_diff(*b));
    differences.max().unwrap_or(0)
}

fn refusal(bytes: &[u8]) -> String {
    match decode(bytes, Path::new("photo.jpg")).unwrap_err() {
        Error::Image { path, reason } => {
            assert_eq!(path, Path::new("photo.jpg"));
            reason
        }
        other => panic!("another error: {other}"),
    }
}

#[test]
fn every_filter_equals_pillow_to_the_byte() {
    let golden = golden();
    let source = picture(&golden["source"]);
    let mut compared = 0;
    for (filter, name) in [
        (Filter::Box, "box"),
        (Filter::Bilinear, "bilinear"),
        (Filter::Bicubic, "bicubic"),
        (Filter::Lanczos, "lanczos"),
    ] {
        for (key, expected) in &golden {
            if key.starts_with(&format!("resize.{name}.")) {
                let expected = picture(expected);
                let ours = resize_exact(&source, expected.width(), expected.height(), filter);
                assert_eq!(largest_difference(&ours, &expected), 0, "{key}");
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 28);
}

#[test]
fn every_kind_of_photo_is_read_upright_on_white_and_in_8_bits() {
    let golden = golden();
    let mut compared = 0;
    for (key, file) in &golden {
        let Some(name) = key.strip_prefix("file.") else {
            continue;
        };
        let ours = decode(&bytes(file), Path::new(name)).unwrap_or_else(|e| panic!("{e}"));
        let expected = picture(&golden[&format!("pixels.{name}")]);
        // JPEG is lossy, and its decoders and the lossy WebP ones round differently.
        let tolerance = match name {
            _ if name.starts_with("jpeg.") => 16,
            "webp.lossy" => 4,
            _ => 0,
        };
        let difference = largest_difference(&ours, &expected);
        assert!(difference <= tolerance, "{name} differs by {difference}");
        compared += 1;
    }
    assert_eq!(compared, 24);
}

#[test]
fn a_photo_that_is_cut_short_is_refused() {
    for name in [
        "jpeg.colour",
        "jpeg.progressive",
        "jpeg.orientation6",
        "png.alpha",
        "webp.lossless",
        "webp.lossy",
    ] {
        let whole = file(name);
        for keep in [whole.len() / 4, whole.len() / 2, whole.len() - 20] {
            let reason = refusal(&whole[..keep]);
            assert!(
                reason.contains("cut short") || reason.contains("damaged"),
                "{name} at {keep}: {reason}"
            );
        }
    }
}

#[test]
fn what_follows_a_complete_jpeg_does_no_harm() {
    let mut bytes = file("jpeg.colour");
    bytes.extend_from_slice(b"a phone's film, or padding");
    assert!(decode(&bytes, Path::new("photo.jpg")).is_ok());
}

#[test]
fn empty_files_texts_and_other_formats_are_refused_with_their_reason() {
    assert_eq!(refusal(b""), "the file is empty");
    assert_eq!(
        refusal(b"not a picture at all\n"),
        "the content is text, not a picture"
    );
    assert!(refusal(b"GIF89a\x01\x00\x01\x00").contains("Gif"));
    assert!(refusal(b"\0\0\0\x18ftypheic\0\0\0\0").contains("HEIC"));
    assert!(refusal(&[0, 159, 146, 150]).contains("not a JPEG, PNG or WebP"));
}

/// A PNG header for a picture that nobody has the memory for, with a correct checksum.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut header = b"IHDR".to_vec();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    header.extend([16, 6, 0, 0, 0]);
    let mut crc = !0u32;
    for byte in &header {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ 0xEDB8_8320
            } else {
                crc >> 1
            };
        }
    }
    let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    bytes.extend(header);
    bytes.extend((!crc).to_be_bytes());
    bytes.extend(b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xae\x42\x60\x82");
    bytes
}

#[test]
fn an_enormous_photo_is_refused_by_its_header() {
    let reason = refusal(&png_header(60_000, 60_000));
    assert!(reason.contains("60000x60000 pixels"), "{reason}");
    // 90 million pixels would do, 8 bytes each do not.
    let reason = refusal(&png_header(10_000, 9_000));
    assert!(reason.contains("512 MiB"), "{reason}");
    let reason = refusal(&png_header(0, 5));
    assert!(!reason.is_empty());
}

#[test]
fn a_folder_gives_its_photos_by_name_and_sets_bad_ones_aside() {
    let directory = tempfile::tempdir().unwrap();
    let put =
        |name: &str, bytes: &[u8]| std::fs::write(directory.path().join(name), bytes).unwrap();
    put("b.JPG", &file("jpeg.colour"));
    put("a.png", &file("png.alpha"));
    // A kind that its name does not tell.
    put("c.jpeg", &file("webp.lossless"));
    put("d.jpg", b"a letter");
    put("e.webp", b"");
    put("f.heic", b"\0\0\0\x18ftypheic");
    put("a.txt", b"a caption");
    put("a.json", b"{}");
    put(".hidden.png", b"");
    put("~b.jpg", b"");
    put("b.jpg.tmp", b"");
    std::fs::create_dir(directory.path().join("folder.png")).unwrap();
    let found = folder(directory.path(), Ok).unwrap();
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_string();
    let photos: Vec<String> = found.photos.iter().map(|p| name(&p.path)).collect();
    assert_eq!(photos, ["a.png", "b.JPG", "c.jpeg"]);
    assert_eq!(
        found.photos[0].digest,
        blake3::hash(&file("png.alpha")).to_hex().to_string()
    );
    let aside: Vec<String> = found.set_aside.iter().map(ToString::to_string).collect();
    assert_eq!(aside.len(), 3);
    assert!(aside[0].ends_with("d.jpg: the content is text, not a picture"));
    assert!(aside[1].ends_with("e.webp: the file is empty"));
    assert!(aside[2].ends_with("f.heic: HEIC is not read"));
}

#[test]
fn a_folder_with_nothing_usable_names_every_reason() {
    let directory = tempfile::tempdir().unwrap();
    let error = folder(directory.path(), Ok).unwrap_err();
    assert!(error.to_string().contains("no usable photo"));
    assert!(error.hint().unwrap().contains("3 to 6"));
    std::fs::write(directory.path().join("x.png"), b"").unwrap();
    let error = folder(directory.path(), Ok).unwrap_err();
    assert!(error.to_string().contains("x.png: the file is empty"));
    let missing = folder(&directory.path().join("nowhere"), Ok).unwrap_err();
    assert!(missing.to_string().contains("nowhere"));
    assert!(missing.hint().is_some());
    assert!(load(&directory.path().join("nothing.png")).is_err());
}

#[test]
fn squares_and_crops_have_the_size_that_was_asked_for() {
    let wide = RgbImage::new(301, 200);
    assert_eq!(square(&wide, 64).dimensions(), (64, 64));
    assert_eq!(square(&RgbImage::new(3, 500), 32).dimensions(), (32, 32));
    assert_eq!(
        resize_short_side(&wide, 100, Filter::Bicubic).dimensions(),
        (150, 100)
    );
    let marked = RgbImage::from_fn(7, 4, |x, y| Rgb([x as u8, y as u8, 0]));
    // Margins 3 and 1: 1.5 goes to 2, 0.5 to 0.
    assert_eq!(center_crop(&marked, 4, 3).get_pixel(0, 0).0, [2, 0, 0]);
    assert_eq!(center_crop(&marked, 50, 50), marked);
}

#[test]
fn every_level_survives_the_way_to_a_tensor_and_back() {
    let levels = RgbImage::from_fn(16, 16, |x, y| Rgb([(y * 16 + x) as u8; 3]));
    let other = RgbImage::from_fn(16, 16, |x, y| Rgb([x as u8, y as u8, 7]));
    let tensor = to_tensor(&[levels.clone(), other.clone()], &Device::Cpu).unwrap();
    assert_eq!(tensor.dims(), [2, 3, 16, 16]);
    assert_eq!(from_tensor(&tensor).unwrap(), [levels.clone(), other]);
    let outside = (tensor * 3.0).unwrap();
    assert_eq!(
        from_tensor(&outside).unwrap()[0].get_pixel(15, 15).0,
        [255; 3]
    );
    let broken = Tensor::full(f32::NAN, (1, 3, 2, 2), &Device::Cpu).unwrap();
    assert!(from_tensor(&broken).is_err());
    assert!(to_tensor(&[levels, RgbImage::new(2, 2)], &Device::Cpu).is_err());
    assert!(to_tensor(&[], &Device::Cpu).is_err());
}

#[test]
fn png_keeps_every_pixel_and_the_digest_tells_pictures_apart() {
    let source = picture(&golden()["source"]);
    let png = encode_png(&source).unwrap();
    assert_eq!(png, encode_png(&source).unwrap());
    assert_eq!(decode_png(&png, "row 3").unwrap(), source);
    let error = decode_png(&png[..png.len() / 2], "row 3").unwrap_err();
    assert!(error.to_string().starts_with("row 3: "));
    assert_eq!(pixel_digest(&source).len(), 64);
    let flat = |w, h| pixel_digest(&RgbImage::new(w, h));
    assert_ne!(flat(2, 8), flat(4, 4));
}
