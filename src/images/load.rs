//! Photos from files: JPEG, PNG and WebP of any size, upright, on white, 8-bit; or a reason why not.

use std::ffi::OsStr;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::codecs::{jpeg::JpegDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, Limits, RgbImage};

use crate::{Error, Result};

/// The most pixels a photo may have: 100 million.
pub const MAX_PIXELS: u64 = 100_000_000;

/// The most bytes a photo may take, as a file and decoded: 512 MiB.
pub const MAX_BYTES: u64 = 512 << 20;

/// Names that are tried as photos.
const PHOTO_EXTENSIONS: [&str; 6] = ["jpg", "jpeg", "jpe", "jfif", "png", "webp"];

/// Pictures that people may expect to work: left out by name rather than in silence.
const OTHER_PICTURES: [&str; 10] = [
    "heic", "heif", "avif", "gif", "bmp", "tif", "tiff", "jp2", "jxl", "dng",
];

/// One photo of a folder.
#[derive(Debug, Clone)]
pub struct Photo {
    pub path: PathBuf,
    /// blake3 of the file's bytes, 64 hexadecimal digits.
    pub digest: String,
    pub image: RgbImage,
}

/// What a folder of photos holds, in the order of the file names' bytes.
#[derive(Debug)]
pub struct Folder {
    /// At least one.
    pub photos: Vec<Photo>,
    /// Pictures that could not be used, each an [`Error::Image`] (or [`Error::Io`]) with its path and reason.
    pub set_aside: Vec<Error>,
}

/// Reads the photo at `path`: see [`decode`]. Fails with [`Error::Io`] when the file cannot be read.
pub fn load(path: &Path) -> Result<RgbImage> {
    decode(&read(path)?, path)
}

/// Reads every photo in `dir` (not in folders below it). What has another extension, is hidden or is an editor's
/// leftover is passed over; a picture that cannot be used is set aside with its reason. Fails when `dir` cannot be
/// listed or holds nothing usable.
pub fn folder(dir: &Path) -> Result<Folder> {
    if dir.is_file() {
        return Err(Error::invalid(
            format!("{} is not a folder", dir.display()),
            "name the folder that the pictures lie in",
        ));
    }
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        if !path.is_dir() {
            paths.push(path);
        }
    }
    paths.sort();
    let mut found = Folder {
        photos: Vec::new(),
        set_aside: Vec::new(),
    };
    for path in paths {
        if is_photo_name(&path) {
            match photo(&path) {
                Ok(photo) => found.photos.push(photo),
                Err(error) => found.set_aside.push(error),
            }
        } else if is_other_picture(&path) {
            let reason = format!("{} is not read", extension(&path).to_uppercase());
            found.set_aside.push(Error::Image { path, reason });
        }
    }
    if found.photos.is_empty() {
        let reasons: String = found.set_aside.iter().map(|e| format!("\n  {e}")).collect();
        return Err(Error::invalid(
            format!("{}: no usable photo{reasons}", dir.display()),
            "put pictures into the folder, as JPEG, PNG or WebP",
        ));
    }
    Ok(found)
}

/// Whether [`folder`] would try the file at `path` as a photo, judging by its name alone.
pub fn is_photo_name(path: &Path) -> bool {
    visible(path) && PHOTO_EXTENSIONS.contains(&extension(path).as_str())
}

/// Whether the file at `path` is by its name a picture of a kind that is not read.
pub fn is_other_picture(path: &Path) -> bool {
    visible(path) && OTHER_PICTURES.contains(&extension(path).as_str())
}

/// Decodes a photo whose kind is told by its content: JPEG (grey, colour, CMYK), PNG (any depth, palette) or WebP (the
/// first frame, if it moves). The picture is turned as its EXIF orientation says, transparent parts are laid on white,
/// and 16-bit samples become v/257, rounded. Fails with [`Error::Image`], naming `path`, when the content is empty,
/// something else, cut short or damaged, or larger than [`MAX_PIXELS`] or [`MAX_BYTES`] (told from the header, before
/// anything is allocated).
pub fn decode(bytes: &[u8], path: &Path) -> Result<RgbImage> {
    decode_or_reason(bytes).map_err(|reason| Error::Image {
        path: path.to_path_buf(),
        reason,
    })
}

fn decode_or_reason(bytes: &[u8]) -> Result<RgbImage, String> {
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => {
            if !jpeg_is_complete(bytes) {
                return Err("the JPEG is cut short".into());
            }
            pixels(JpegDecoder::new(Cursor::new(bytes)))
        }
        Ok(ImageFormat::Png) => pixels(PngDecoder::with_limits(Cursor::new(bytes), limits())),
        Ok(ImageFormat::WebP) => pixels(WebPDecoder::new(Cursor::new(bytes))),
        Ok(other) => Err(format!(
            "the content is {other:?}, only JPEG, PNG and WebP are read"
        )),
        Err(_) if bytes.get(4..8) == Some(b"ftyp") => {
            Err("the content is HEIC, AVIF or a film, only JPEG, PNG and WebP are read".into())
        }
        Err(_) if bytes.iter().take(512).all(|b| (9..127).contains(b)) => {
            Err("the content is text, not a picture".into())
        }
        Err(_) => Err("the content is not a JPEG, PNG or WebP picture".into()),
    }
}

fn limits() -> Limits {
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_BYTES);
    limits
}

fn pixels<D: ImageDecoder>(decoder: Result<D, ImageError>) -> Result<RgbImage, String> {
    let mut decoder = decoder.map_err(|e| reason(&e))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(format!("the picture is {width}x{height} pixels"));
    }
    let count = u64::from(width) * u64::from(height);
    if count > MAX_PIXELS || decoder.total_bytes() > MAX_BYTES {
        return Err(format!(
            "the picture is {width}x{height} pixels, {} MiB decoded; at most {} million pixels and {} MiB are read",
            decoder.total_bytes() >> 20,
            MAX_PIXELS / 1_000_000,
            MAX_BYTES >> 20
        ));
    }
    // Damaged EXIF is no reason to refuse a picture that can be seen.
    let orientation = decoder.orientation().ok();
    decoder.set_limits(limits()).map_err(|e| reason(&e))?;
    let decoded = DynamicImage::from_decoder(decoder).map_err(|e| reason(&e))?;
    let mut upright = DynamicImage::ImageRgb8(on_white(decoded));
    if let Some(orientation) = orientation {
        upright.apply_orientation(orientation);
    }
    Ok(upright.into_rgb8())
}

fn reason(error: &ImageError) -> String {
    match error {
        ImageError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            "the picture is cut short".into()
        }
        ImageError::Limits(_) => format!(
            "the picture needs more than {} MiB to decode",
            MAX_BYTES >> 20
        ),
        ImageError::Unsupported(e) => format!("this kind of picture is not read: {e}"),
        other => format!("the picture is damaged: {other}"),
    }
}

/// 8-bit RGB; what is transparent is mixed with white at the depth it was stored in.
fn on_white(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return match image {
            DynamicImage::ImageLuma16(_) | DynamicImage::ImageRgb16(_) => {
                from_16_bit(&image.into_rgb16())
            }
            other => other.into_rgb8(),
        };
    }
    if image.color().bytes_per_pixel() > 4 || matches!(image, DynamicImage::ImageLumaA16(_)) {
        let source = image.into_rgba16();
        let mut mixed = image::ImageBuffer::new(source.width(), source.height());
        for (to, from) in mixed.pixels_mut().zip(source.pixels()) {
            let [r, g, b, a] = from.0.map(u64::from);
            let mix = |v: u64| ((v * a + 65535 * (65535 - a) + 32767) / 65535) as u16;
            *to = image::Rgb([mix(r), mix(g), mix(b)]);
        }
        return from_16_bit(&mixed);
    }
    let source = image.into_rgba8();
    let mut mixed = RgbImage::new(source.width(), source.height());
    for (to, from) in mixed.pixels_mut().zip(source.pixels()) {
        let [r, g, b, a] = from.0.map(u32::from);
        let mix = |v: u32| ((v * a + 255 * (255 - a) + 127) / 255) as u8;
        *to = image::Rgb([mix(r), mix(g), mix(b)]);
    }
    mixed
}

fn from_16_bit(source: &image::ImageBuffer<image::Rgb<u16>, Vec<u16>>) -> RgbImage {
    let mut scaled = RgbImage::new(source.width(), source.height());
    for (to, from) in scaled.iter_mut().zip(source.iter()) {
        *to = ((u32::from(*from) + 128) / 257) as u8;
    }
    scaled
}

/// Whether a JPEG's end marker follows its picture. The decoder paints what is missing grey and says nothing, so the
/// markers are walked here: segments by their length, entropy-coded data up to the next real marker.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    let mut at = 2;
    let mut scans = 0;
    while let (Some(&fill), Some(&marker)) = (bytes.get(at), bytes.get(at + 1)) {
        match (fill, marker) {
            (0xFF, 0xD9) => return scans > 0,
            // Fill bytes, stuffed bytes and restart markers.
            (0xFF, 0xFF) => at += 1,
            (0xFF, 0x00 | 0x01 | 0xD0..=0xD8) => at += 2,
            (0xFF, marker) => {
                let Some(length) = bytes.get(at + 2..at + 4) else {
                    return false;
                };
                scans += usize::from(marker == 0xDA);
                at += 2 + usize::from(u16::from_be_bytes([length[0], length[1]])).max(2);
            }
            _ => at += 1,
        }
    }
    false
}

fn photo(path: &Path) -> Result<Photo> {
    let bytes = read(path)?;
    Ok(Photo {
        path: path.to_path_buf(),
        digest: blake3::hash(&bytes).to_hex().to_string(),
        image: decode(&bytes, path)?,
    })
}

/// The bytes of the photo at `path`. Fails with [`Error::Image`] when there are more than [`MAX_BYTES`].
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let size = std::fs::metadata(path).map_err(Error::io(path))?.len();
    if size > MAX_BYTES {
        return Err(Error::Image {
            path: path.to_path_buf(),
            reason: format!(
                "the file has {} MiB, at most {} MiB are read",
                size >> 20,
                MAX_BYTES >> 20
            ),
        });
    }
    std::fs::read(path).map_err(Error::io(path))
}

fn extension(path: &Path) -> String {
    path.extension()
        .and_then(OsStr::to_str)
        .unwrap_or_default()
        .to_ascii_lowercase()
}

/// Neither hidden nor an editor's or a download's temporary file.
fn visible(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| !name.to_string_lossy().starts_with(['.', '~', '#']))
}
