//! What lies around the pixels of a photo's file: where its picture ends, and how EXIF wants it turned. Read here and
//! not by the decoders, which look for EXIF in one place each and in one form: cameras, phones and ImageMagick have
//! more of both.

use image::metadata::Orientation;
use miniz_oxide::inflate::decompress_to_vec_zlib_with_limit;

/// The most bytes of EXIF that are looked at: JPEG's segments hold 64 KiB at most.
const MAX_EXIF: usize = 1 << 20;

/// A JPEG as its markers tell it.
pub struct Jpeg<'a> {
    /// The file up to the end marker of its picture.
    pub picture: &'a [u8],
    pub turned: Option<Orientation>,
    /// Bytes for each pixel that decoding takes beside the result: a progressive one is kept as coefficients first.
    pub beside: u64,
}

/// What a JPEG is; `None` when there is no end marker behind its picture.
///
/// The decoder paints what is missing grey and says nothing, so the markers are walked here: segments by their length,
/// entropy-coded data up to the next marker. What follows the end (a film, a second picture, padding) is none of the
/// decoder's business.
pub fn jpeg(bytes: &[u8]) -> Option<Jpeg<'_>> {
    let (mut at, mut scans) = (2, 0);
    let (mut turned, mut beside) = (None, 0);
    while let (Some(&fill), Some(&marker)) = (bytes.get(at), bytes.get(at + 1)) {
        match (fill, marker) {
            (0xFF, 0xD9) if scans > 0 => {
                return Some(Jpeg {
                    picture: &bytes[..at + 2],
                    turned,
                    beside,
                });
            }
            (0xFF, 0xD9) => return None,
            // What no picture has, or the beginning of another one: this one is cut short, and something else follows.
            (0xFF, 0x02..=0xBF | 0xD8 | 0xF0..=0xFD) if scans > 0 => return None,
            // Fill bytes, stuffed bytes and restart markers.
            (0xFF, 0xFF) => at += 1,
            (0xFF, 0x00 | 0x01 | 0xD0..=0xD8) => at += 2,
            (0xFF, marker) => {
                let length = bytes.get(at + 2..at + 4)?;
                let length = usize::from(u16::from_be_bytes([length[0], length[1]])).max(2);
                scans += usize::from(marker == 0xDA);
                if matches!(marker, 0xC2 | 0xC6 | 0xCA | 0xCE) {
                    let components = bytes.get(at + 9).copied().unwrap_or(0);
                    beside = 2 * u64::from(components);
                }
                if marker == 0xE1 && turned.is_none() {
                    turned = bytes.get(at + 4..at + 2 + length).and_then(orientation);
                }
                at += 2 + length;
            }
            _ => at += 1,
        }
    }
    None
}

/// Bytes for each pixel that decoding a WebP takes beside the result: a canvas, and the frame on it where it moves.
pub fn webp_beside(bytes: &[u8]) -> u64 {
    match bytes.get(12..21) {
        Some([b'V', b'P', b'8', b'X', .., flags]) if flags & 2 != 0 => 8,
        _ => 4,
    }
}

/// The orientation of a WebP.
pub fn webp(bytes: &[u8]) -> Option<Orientation> {
    let mut rest = bytes.get(12..)?;
    while let Some((kind, after)) = rest.split_first_chunk::<4>() {
        let (length, after) = after.split_first_chunk::<4>()?;
        let length = u32::from_le_bytes(*length) as usize;
        if kind == b"EXIF" {
            return orientation(after.get(..length).unwrap_or(after));
        }
        // Chunks begin at even places.
        rest = after.get(length.checked_next_multiple_of(2)?..)?;
    }
    None
}

/// The orientation of a PNG: of its `eXIf` chunk, before or behind the pixels, or else of the text in which ImageMagick
/// and exiftool keep EXIF.
pub fn png(bytes: &[u8]) -> Option<Orientation> {
    let mut rest = bytes.get(8..)?;
    let mut from_text = None;
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let (kind, after) = after.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        let data = after.get(..length)?;
        match kind {
            b"eXIf" => {
                if let Some(found) = orientation(data) {
                    return Some(found);
                }
            }
            b"tEXt" | b"zTXt" | b"iTXt" if from_text.is_none() => {
                from_text = profile(kind, data).and_then(|exif| orientation(&exif));
            }
            _ => {}
        }
        // A checksum of four bytes ends each chunk.
        rest = after.get(length.checked_add(4)?..)?;
    }
    from_text
}

/// The bytes of a text chunk that is called "Raw profile type exif" (or APP1): a line with the kind, one with the
/// length, and hexadecimal digits.
fn profile(kind: &[u8; 4], data: &[u8]) -> Option<Vec<u8>> {
    let end = data.iter().position(|byte| *byte == 0)?;
    let (key, rest) = (&data[..end], &data[end + 1..]);
    let name = key.strip_prefix(b"Raw profile type ")?;
    if !name.eq_ignore_ascii_case(b"exif") && !name.eq_ignore_ascii_case(b"app1") {
        return None;
    }
    let unpacked;
    let text = match kind {
        b"tEXt" => rest,
        b"zTXt" => {
            unpacked = unpack(rest.get(1..)?)?;
            &unpacked
        }
        _ => {
            // Whether it is packed, how, a language and the translated key.
            let (flags, rest) = rest.split_first_chunk::<2>()?;
            let mut parts = rest.splitn(3, |byte| *byte == 0).skip(2);
            let text = parts.next()?;
            match flags[0] {
                0 => text,
                _ => {
                    unpacked = unpack(text)?;
                    &unpacked
                }
            }
        }
    };
    let mut words = text
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    let _kind = words.next()?;
    let length: usize = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
    let digits = words.flatten().map(|digit| (*digit as char).to_digit(16));
    let digits = digits
        .take(length.min(MAX_EXIF) * 2)
        .collect::<Option<Vec<u32>>>()?;
    let (pairs, _) = digits.as_chunks::<2>();
    Some(
        pairs
            .iter()
            .map(|[high, low]| (high << 4 | low) as u8)
            .collect(),
    )
}

/// The text that `packed` holds; `None` when there is far too much of it.
fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    // Two digits for a byte, and some spaces.
    decompress_to_vec_zlib_with_limit(packed, 3 * MAX_EXIF).ok()
}

/// The orientation in EXIF, with or without the words that containers put before it.
fn orientation(exif: &[u8]) -> Option<Orientation> {
    // "Exif\0\0" is the usual prefix; some writers have it twice, or another second zero.
    let start = exif
        .windows(4)
        .take(16)
        .position(|magic| magic == b"II*\0" || magic == b"MM\0*")?;
    let tiff = &exif[start..];
    let little = tiff[0] == b'I';
    let short = |at: usize| {
        let bytes = tiff.get(at..)?.first_chunk::<2>()?;
        Some(match little {
            true => u16::from_le_bytes(*bytes),
            false => u16::from_be_bytes(*bytes),
        })
    };
    let long = |at: usize| {
        let bytes = tiff.get(at..)?.first_chunk::<4>()?;
        Some(match little {
            true => u32::from_le_bytes(*bytes),
            false => u32::from_be_bytes(*bytes),
        })
    };
    let directory = long(4)? as usize;
    let entries = usize::from(short(directory)?);
    let entry = (0..entries)
        .map(|index| directory + 2 + 12 * index)
        .find(|entry| short(*entry) == Some(0x0112))?;
    let value = match short(entry + 2)? {
        // A byte lies where a short has its first.
        1 => u32::from(*tiff.get(entry + 8)?),
        3 => u32::from(short(entry + 8)?),
        4 => long(entry + 8)?,
        _ => return None,
    };
    Orientation::from_exif(u8::try_from(value).ok()?)
}
