//! Photos as phones, cameras and ImageMagick write them, and pictures that were made to take all memory.

use std::path::Path;

use candle_core::Device;
use image::{Rgb, RgbImage, imageops};
use miniz_oxide::deflate::compress_to_vec_zlib;
use proxytune::evaluation::preprocess::Preprocessing;
use proxytune::images::{decode, encode_png, folder, square};

use crate::fuzz::mutate::crc;
use crate::support::memory::peak_of;

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/images/golden.safetensors");
    let files = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let file = files[&format!("file.{name}")].flatten_all().unwrap();
    file.to_vec1().unwrap()
}

fn picture(bytes: &[u8]) -> RgbImage {
    decode(bytes, Path::new("photo")).unwrap_or_else(|e| panic!("{e}"))
}

fn refusal(bytes: &[u8]) -> String {
    let error = decode(bytes, Path::new("photo")).unwrap_err();
    error.to_string()
}

/// EXIF that says "turn it by 90 degrees", behind what a container puts before it; with a tag before that one.
fn exif(before: &[u8], little: bool) -> Vec<u8> {
    let short = |value: u16| match little {
        true => value.to_le_bytes(),
        false => value.to_be_bytes(),
    };
    let long = |value: u32| match little {
        true => value.to_le_bytes(),
        false => value.to_be_bytes(),
    };
    let mut bytes = before.to_vec();
    bytes.extend(if little { b"II*\0" } else { b"MM\0*" });
    bytes.extend(long(8));
    bytes.extend(short(2));
    for (tag, value) in [(0x0100, 7), (0x0112, 6)] {
        bytes.extend(short(tag));
        bytes.extend(short(3));
        bytes.extend(long(1));
        bytes.extend(short(value));
        bytes.extend([0; 2]);
    }
    bytes.extend([0; 4]);
    bytes
}

const PREFIXES: [&[u8]; 4] = [b"", b"Exif\0\0", b"Exif\0\xff", b"Exif\0\0Exif\0\0"];

/// Every form of the same EXIF.
fn forms() -> impl Iterator<Item = Vec<u8>> {
    PREFIXES
        .into_iter()
        .flat_map(|before| [true, false].map(|little| exif(before, little)))
}

fn is_turned(name: &str, plain: &[u8], with_exif: &[u8]) {
    let expected = imageops::rotate90(&picture(plain));
    assert_eq!(picture(with_exif), expected, "{name}");
}

fn png_chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let body = [kind.as_slice(), data].concat();
    let mut chunk = (data.len() as u32).to_be_bytes().to_vec();
    chunk.extend(&body);
    chunk.extend(crc(&body).to_be_bytes());
    chunk
}

/// `png` with `chunk` behind its header, or before its end.
fn with_chunk(png: &[u8], chunk: &[u8], at_end: bool) -> Vec<u8> {
    let at = if at_end { png.len() - 12 } else { 33 };
    [&png[..at], chunk, &png[at..]].concat()
}

#[test]
fn exif_turns_a_jpeg_with_every_prefix() {
    let plain = golden("jpeg.colour");
    // Behind the start marker, or behind the first segment.
    let behind = 4 + usize::from(u16::from_be_bytes([plain[4], plain[5]]));
    for exif in forms() {
        for at in [2, behind] {
            let mut bytes = plain[..at].to_vec();
            bytes.extend([0xFF, 0xE1]);
            bytes.extend((exif.len() as u16 + 2).to_be_bytes());
            bytes.extend(&exif);
            bytes.extend(&plain[at..]);
            is_turned("JPEG", &plain, &bytes);
        }
    }
}

#[test]
fn exif_turns_a_webp_with_every_prefix() {
    let plain = golden("webp.lossless");
    let image = picture(&plain);
    let chunk = |kind: &[u8; 4], data: &[u8]| {
        let mut chunk = kind.to_vec();
        chunk.extend((data.len() as u32).to_le_bytes());
        chunk.extend(data);
        chunk.resize(chunk.len().next_multiple_of(2), 0);
        chunk
    };
    for exif in forms() {
        // That there is EXIF, and the sizes less one in three bytes each.
        let mut header = vec![0x08, 0, 0, 0];
        header.extend(&(image.width() - 1).to_le_bytes()[..3]);
        header.extend(&(image.height() - 1).to_le_bytes()[..3]);
        let body = [
            chunk(b"VP8X", &header),
            plain[12..].to_vec(),
            chunk(b"EXIF", &exif),
        ]
        .concat();
        let mut bytes = b"RIFF".to_vec();
        bytes.extend((body.len() as u32 + 4).to_le_bytes());
        bytes.extend(b"WEBP");
        bytes.extend(body);
        is_turned("WebP", &plain, &bytes);
    }
}

#[test]
fn exif_turns_a_png_before_and_behind_its_pixels() {
    let plain = encode_png(&picture(&golden("jpeg.colour"))).unwrap();
    for exif in forms() {
        for at_end in [false, true] {
            let bytes = with_chunk(&plain, &png_chunk(b"eXIf", &exif), at_end);
            is_turned("PNG", &plain, &bytes);
        }
    }
}

/// As ImageMagick's `-profile` and exiftool write it: `\nexif\n      44\n`, and digits in lines of 72.
#[test]
fn exif_turns_a_png_from_imagemagicks_texts() {
    let plain = encode_png(&picture(&golden("jpeg.colour"))).unwrap();
    let exif = exif(b"Exif\0\0", true);
    let digits: String = exif.iter().map(|byte| format!("{byte:02x}")).collect();
    let lines: Vec<&str> = (0..digits.len())
        .step_by(72)
        .map(|at| &digits[at..digits.len().min(at + 72)])
        .collect();
    let text = format!("\nexif\n{:8}\n{}\n", exif.len(), lines.join("\n"));
    let packed = compress_to_vec_zlib(text.as_bytes(), 6);
    for key in ["Raw profile type exif", "Raw profile type APP1"] {
        let key = [key.as_bytes(), b"\0"].concat();
        let chunks = [
            png_chunk(b"tEXt", &[&key, text.as_bytes()].concat()),
            png_chunk(b"zTXt", &[&key, b"\0".as_slice(), &packed].concat()),
            png_chunk(
                b"iTXt",
                &[&key, b"\0\0en\0\0".as_slice(), text.as_bytes()].concat(),
            ),
            png_chunk(b"iTXt", &[&key, b"\x01\0\0\0".as_slice(), &packed].concat()),
        ];
        for chunk in chunks {
            is_turned("PNG", &plain, &with_chunk(&plain, &chunk, false));
            is_turned("PNG", &plain, &with_chunk(&plain, &chunk, true));
        }
    }
    // Damaged EXIF is no reason to refuse a picture that can be seen.
    for text in ["\nexif\n", "\nexif\n999999999999\nzz", "\nexif 4 4d4d", ""] {
        let data = [b"Raw profile type exif\0", text.as_bytes()].concat();
        let bytes = with_chunk(&plain, &png_chunk(b"tEXt", &data), false);
        assert_eq!(picture(&bytes), picture(&plain));
    }
}

#[test]
fn a_jpeg_with_a_film_or_another_picture_behind_its_end_is_that_jpeg() {
    for name in ["jpeg.colour", "jpeg.progressive", "jpeg.orientation6"] {
        let own = golden(name);
        let expected = picture(&own);
        let film = b"\0\0\0\x18ftypmp42\xff\xd8\xff\xd9\xff\xda\0\x02mdat".repeat(1000);
        let behind = [
            film.as_slice(),
            &golden("jpeg.grey"),
            &[0xFF; 100],
            &[0; 1],
            b"SEFT trailer of a phone\xff\xd9",
            &own[..own.len() / 2],
        ];
        for more in behind {
            let bytes = [own.as_slice(), more].concat();
            assert_eq!(picture(&bytes), expected, "{name}");
        }
    }
}

#[test]
fn a_jpeg_that_is_cut_short_is_not_completed_by_what_follows() {
    let own = golden("jpeg.colour");
    let cut = &own[..own.len() * 3 / 4];
    for more in [golden("jpeg.grey"), own.clone()] {
        let reason = refusal(&[cut, &more].concat());
        assert!(reason.contains("cut short"), "{reason}");
    }
}

#[test]
fn a_colour_profile_that_unpacks_to_gigabytes_costs_little() {
    let plain = encode_png(&RgbImage::from_pixel(8, 8, Rgb([9, 8, 7]))).unwrap();
    let packed = compress_to_vec_zlib(&vec![0; 256 << 20], 1);
    let profile = [b"icc\0\0".as_slice(), &packed].concat();
    let text = [b"Raw profile type exif\0\0".as_slice(), &packed].concat();
    for chunk in [png_chunk(b"iCCP", &profile), png_chunk(b"zTXt", &text)] {
        let bytes = with_chunk(&plain, &chunk, false);
        let (read, peak) = peak_of(|| picture(&bytes));
        assert_eq!(read, picture(&plain));
        assert!(peak < 160 << 20, "{} MiB", peak >> 20);
    }
}

#[test]
fn sizes_that_no_photo_has_are_refused_before_anything_is_allocated() {
    let plain = encode_png(&RgbImage::new(4, 4)).unwrap();
    let sizes = [
        (1, 2_000_000),
        (2_000_000, 1),
        (0x7FFF_FFFF, 0x7FFF_FFFF),
        (0, 4),
        (20_000, 20_000),
    ];
    for (width, height) in sizes {
        let mut header = [(width as u32).to_be_bytes(), (height as u32).to_be_bytes()].concat();
        header.extend([8, 2, 0, 0, 0]);
        let bytes = [&plain[..8], &png_chunk(b"IHDR", &header), &plain[33..]].concat();
        let (_, peak) = peak_of(|| refusal(&bytes));
        assert!(peak < 1 << 20, "{width}x{height} took {peak}");
    }
    // The sizes of a JPEG stand behind its frame's marker.
    let mut jpeg = golden("jpeg.colour");
    let frame = jpeg.windows(2).position(|two| two == [0xFF, 0xC0]).unwrap();
    jpeg[frame + 5..frame + 9].fill(0xFF);
    let (reason, peak) = peak_of(|| refusal(&jpeg));
    assert!(reason.contains("65535x65535"), "{reason}");
    assert!(peak < 1 << 20, "{peak}");
}

#[test]
fn a_strip_is_prepared_in_the_memory_of_what_is_kept() {
    let strip = RgbImage::from_pixel(1, 1_000_000, Rgb([90, 140, 200]));
    for preparation in [Preprocessing::clip(224), Preprocessing::dino(224)] {
        let (prepared, peak) = peak_of(|| preparation.prepare(&strip).unwrap());
        assert_eq!(
            prepared,
            RgbImage::from_pixel(224, 224, Rgb([90, 140, 200]))
        );
        assert!(peak < 4 << 20, "{peak}");
    }
}

#[test]
fn many_photos_take_the_memory_of_one_at_full_size() {
    let place = tempfile::tempdir().unwrap();
    let full = RgbImage::from_fn(2000, 1500, |x, y| Rgb([x as u8, y as u8, 9]));
    let png = encode_png(&full).unwrap();
    let read = || {
        let reduced = folder(place.path(), |image| Ok(square(&image, 64))).unwrap();
        reduced.photos.len()
    };
    std::fs::write(place.path().join("0.png"), &png).unwrap();
    let (_, one) = peak_of(read);
    for number in 1..8 {
        std::fs::write(place.path().join(format!("{number}.png")), &png).unwrap();
    }
    let (count, eight) = peak_of(read);
    assert_eq!(count, 8);
    assert!(eight < one + (1 << 20), "one {one}, eight {eight}");
}
