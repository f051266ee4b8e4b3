//! Pictures as bytes: lossless PNG for storing, and a digest of the pixels.

use std::io::Cursor;
use std::path::Path;

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder, RgbImage};

use super::load::decode;
use crate::{Error, Result};

/// `image` as an 8-bit RGB PNG, compressed for speed. The same pixels give the same bytes.
pub fn encode_png(image: &RgbImage) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    PngEncoder::new_with_quality(
        Cursor::new(&mut bytes),
        CompressionType::Fast,
        FilterType::Adaptive,
    )
    .write_image(
        image.as_raw(),
        image.width(),
        image.height(),
        ExtendedColorType::Rgb8,
    )
    .map_err(|e| unwritable(image, &e))?;
    Ok(bytes)
}

/// [`encode_png`] with `texts`, keyword and text, before the pixels, in UTF-8. A keyword has 1 to 79 letters.
pub fn encode_png_with(image: &RgbImage, texts: &[(String, String)]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut encode = || -> std::result::Result<(), png::EncodingError> {
        let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::Fast);
        encoder.set_filter(png::Filter::Adaptive);
        for (keyword, text) in texts {
            encoder.add_itxt_chunk(keyword.clone(), text.clone())?;
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(image.as_raw())?;
        writer.finish()
    };
    encode().map_err(|e| unwritable(image, &e))?;
    Ok(bytes)
}

fn unwritable(image: &RgbImage, why: &dyn std::fmt::Display) -> Error {
    Error::invalid(
        format!(
            "a picture of {}x{} pixels cannot be written as PNG: {why}",
            image.width(),
            image.height()
        ),
        "both sides must be at least 1",
    )
}

/// The pixels of a PNG that [`encode_png`] made (any photo format is read too). Fails with [`Error::Image`], which
/// names `origin`, a file or a record, when the bytes are damaged.
pub fn decode_png(bytes: &[u8], origin: &str) -> Result<RgbImage> {
    decode(bytes, Path::new(origin))
}

/// blake3 of width and height (u32, little-endian) and the RGB bytes in rows: 64 hexadecimal digits. Equal for equal
/// pixels however they were stored.
pub fn pixel_digest(image: &RgbImage) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&image.width().to_le_bytes());
    hasher.update(&image.height().to_le_bytes());
    hasher.update(image.as_raw());
    hasher.finalize().to_hex().to_string()
}
