//! Photos from files: JPEG, PNG and WebP of any size, upright, on white, 8-bit; or a reason why not.

use std::ffi::OsStr;
use std::io::{Cursor, ErrorKind};
use std::path::{Path, PathBuf};

use image::codecs::{jpeg::JpegDecoder, png::PngDecoder, webp::WebPDecoder};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, Limits, RgbImage};

use super::container;
use crate::{Error, Result, files};

/// The most pixels a photo may have: 100 million.
pub const MAX_PIXELS: u64 = 100_000_000;

/// The most pixels along a side: a million. Longer strips are no photos, and resizing them would take more than they
/// do.
pub const MAX_SIDE: u32 = 1 << 20;

/// The most bytes a photo may take, as a file and decoded: 512 MiB.
pub const MAX_BYTES: u64 = 512 << 20;

/// The most bytes that decoding a photo may take: 960 MiB.
const MAX_DECODING: u64 = 960 << 20;

/// The most bytes of what a PNG has beside its pixels, such as a colour profile unpacked; it is not used.
const MAX_BESIDE: u64 = 64 << 20;

/// Names that are tried as photos.
const PHOTO_EXTENSIONS: [&str; 6] = ["jpg", "jpeg", "jpe", "jfif", "png", "webp"];

/// Pictures that people may expect to work: left out by name rather than in silence.
const OTHER_PICTURES: [&str; 10] = [
    "heic", "heif", "avif", "gif", "bmp", "tif", "tiff", "jp2", "jxl", "dng",
];

/// One photo of a folder, as it was wanted.
#[derive(Debug, Clone)]
pub struct Photo<T> {
    pub path: PathBuf,
    /// blake3 of the file's bytes, 64 hexadecimal digits.
    pub digest: String,
    pub image: T,
}

/// What a folder of photos holds, in the order of the file names' bytes.
#[derive(Debug)]
pub struct Folder<T> {
    /// At least one.
    pub photos: Vec<Photo<T>>,
    /// Pictures that could not be used, each an [`Error::Image`] (or [`Error::Io`]) with its path and reason.
    pub set_aside: Vec<Error>,
}

/// Reads the photo at `path`: see [`decode`]. Fails with [`Error::Io`] when the file cannot be read.
pub fn load(path: &Path) -> Result<RgbImage> {
    decode(&read(path)?, path)
}

/// Reads every photo in `dir` (not in folders below it), one after another, and keeps of each what `reduce` makes of
/// it: at full size there is never more than one. What has another extension, is hidden or is an editor's leftover is
/// passed over; a picture that cannot be used, or that `reduce` refuses, is set aside with its reason. Fails when `dir` cannot be listed or holds
/// nothing usable.
pub fn folder<T>(dir: &Path, reduce: impl Fn(RgbImage) -> Result<T>) -> Result<Folder<T>> {
    let paths = files_in(dir)?;
    let mut found = Folder {
        photos: Vec::new(),
        set_aside: Vec::new(),
    };
    for path in paths {
        if is_photo_name(&path) {
            match photo(&path, &reduce) {
                Ok(photo) => found.photos.push(photo),
                Err(error) => found.set_aside.push(error),
            }
        } else if is_other_picture(&path) {
            let reason = format!("{} is not read", extension(&path).to_uppercase());
            found.set_aside.push(Error::Image { path, reason });
        }
    }
    match found.photos.is_empty() {
        true => Err(nothing_usable(dir, &found.set_aside)),
        false => Ok(found),
    }
}

/// Fails, as [`folder`] would, when `dir` cannot be listed or nothing in it has a photo's name: what can be known
/// before anything else is fetched or read.
pub fn expect_photos(dir: &Path) -> Result<()> {
    match files_in(dir)?.iter().any(|path| is_photo_name(path)) {
        true => Ok(()),
        false => folder(dir, |_| Ok(())).map(drop),
    }
}

/// What lies in `dir` and is no folder, in the order of the names' bytes.
fn files_in(dir: &Path) -> Result<Vec<PathBuf>> {
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
    Ok(paths)
}

fn nothing_usable(dir: &Path, set_aside: &[Error]) -> Error {
    let reasons: String = set_aside.iter().map(|e| format!("\n  {e}")).collect();
    Error::invalid(
        format!("{}: no usable photo{reasons}", dir.display()),
        "put 3 to 6 JPEG, PNG or WebP photos of the subject into the folder",
    )
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
/// something else, cut short or damaged, or larger than [`MAX_PIXELS`], [`MAX_SIDE`] or [`MAX_BYTES`] (told from the
/// header, before anything is allocated). Bytes behind the end of a picture do not count.
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
            let jpeg = container::jpeg(bytes).ok_or("the JPEG is cut short")?;
            let decoder = JpegDecoder::new(Cursor::new(jpeg.picture));
            pixels(decoder, jpeg.turned, jpeg.beside)
        }
        Ok(ImageFormat::Png) => {
            let decoder = PngDecoder::with_limits(Cursor::new(bytes), limits(MAX_BESIDE));
            pixels(decoder, container::png(bytes), 0)
        }
        Ok(ImageFormat::WebP) => {
            let decoder = WebPDecoder::new(Cursor::new(bytes));
            pixels(
                decoder,
                container::webp(bytes),
                container::webp_beside(bytes),
            )
        }
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

fn limits(bytes: u64) -> Limits {
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(bytes);
    limits
}

/// The picture, which takes `beside` bytes for each pixel beside itself while it is decoded.
fn pixels<D: ImageDecoder>(
    decoder: Result<D, ImageError>,
    turned: Option<Orientation>,
    beside: u64,
) -> Result<RgbImage, String> {
    let mut decoder = decoder.map_err(|e| reason(&e))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(format!("the picture is {width}x{height} pixels"));
    }
    let count = u64::from(width) * u64::from(height);
    if count > MAX_PIXELS || decoder.total_bytes() > MAX_BYTES || width.max(height) > MAX_SIDE {
        return Err(format!(
            "the picture is {width}x{height} pixels, {} MiB decoded; at most {} million pixels, {MAX_SIDE} a side, and \
             {} MiB are read",
            decoder.total_bytes() >> 20,
            MAX_PIXELS / 1_000_000,
            MAX_BYTES >> 20
        ));
    }
    if count * beside + decoder.total_bytes() > MAX_DECODING {
        return Err(format!(
            "the picture is {width}x{height} pixels and needs more than {} MiB to decode",
            MAX_DECODING >> 20
        ));
    }
    decoder
        .set_limits(limits(MAX_BYTES))
        .map_err(|e| reason(&e))?;
    let decoded = DynamicImage::from_decoder(decoder).map_err(|e| reason(&e))?;
    let mut upright = DynamicImage::ImageRgb8(on_white(decoded));
    if let Some(turned) = turned {
        upright.apply_orientation(turned);
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
    let mut mixed = RgbImage::new(image.width(), image.height());
    if image.color().bytes_per_pixel() > 4 || matches!(image, DynamicImage::ImageLumaA16(_)) {
        let source = image.into_rgba16();
        for (to, from) in mixed.pixels_mut().zip(source.pixels()) {
            let [r, g, b, a] = from.0.map(u64::from);
            let mix = |v: u64| to_8_bit(((v * a + 65535 * (65535 - a) + 32767) / 65535) as u16);
            *to = image::Rgb([mix(r), mix(g), mix(b)]);
        }
        return mixed;
    }
    let source = image.into_rgba8();
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
        *to = to_8_bit(*from);
    }
    scaled
}

fn to_8_bit(value: u16) -> u8 {
    ((u32::from(value) + 128) / 257) as u8
}

fn photo<T>(path: &Path, reduce: &impl Fn(RgbImage) -> Result<T>) -> Result<Photo<T>> {
    let bytes = read(path)?;
    Ok(Photo {
        path: path.to_path_buf(),
        digest: blake3::hash(&bytes).to_hex().to_string(),
        image: reduce(decode(&bytes, path)?).map_err(|error| Error::Image {
            path: path.to_path_buf(),
            reason: error.to_string(),
        })?,
    })
}

/// The bytes of the photo at `path`. Fails with [`Error::Image`] when there are more than [`MAX_BYTES`], or it is no
/// file but a pipe or a device.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    files::read(path, MAX_BYTES).map_err(|error| match error.kind() {
        ErrorKind::FileTooLarge | ErrorKind::InvalidInput => Error::Image {
            path: path.to_path_buf(),
            reason: error.to_string(),
        },
        _ => Error::io(path)(error),
    })
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
