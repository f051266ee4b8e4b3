//! Valid files made invalid.

use proptest::prelude::*;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The most bytes of an input.
const MAX_INPUT: usize = 1 << 20;

/// One change: what kind, and three numbers that say where and how.
pub type Edit = (u8, u32, u32, u64);

/// Numbers at which sizes, lengths and counts break.
const EXTREMES: [u64; 16] = [
    0,
    1,
    2,
    0x7F,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x10_0000,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    0x1_0000_0000,
    1 << 40,
    (1 << 53) + 1,
    i64::MAX as u64,
    u64::MAX,
];

/// What a number of a text becomes.
const NUMBERS: [&str; 16] = [
    "0",
    "-1",
    "1",
    "2147483647",
    "2147483648",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551616",
    "1e400",
    "-0.0",
    "1e-400",
    "0.5",
    "null",
    "[]",
    "\"9\"",
];

/// What is put into a text anywhere.
const TOKENS: [&str; 24] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    "'",
    ":",
    ",",
    "\n",
    "\r\n",
    "\t",
    "- ",
    "# ",
    "&a ",
    "*a",
    "<<: ",
    "null",
    "NaN",
    "../",
    "\u{FEFF}",
    "\u{202E}",
    "\u{1F600}",
    "\\ud800",
    "\0",
];

/// An input: which of the valid files it starts from, and what is done to it.
pub fn inputs() -> impl Strategy<Value = (u32, Vec<Edit>)> {
    (any::<u32>(), prop::collection::vec(any::<Edit>(), 1..8))
}

/// The input that (`pick`, `edits`) means. One in sixteen is nothing but random bytes.
pub fn input(seeds: &[Vec<u8>], pick: u32, edits: &[Edit]) -> Vec<u8> {
    let mut bytes = seeds[pick as usize / 16 % seeds.len()].clone();
    if pick.is_multiple_of(16) {
        let (_, length, _, seed) = edits[0];
        bytes = vec![0; length as usize % 2048];
        ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut bytes);
    }
    for edit in edits {
        apply(&mut bytes, *edit, seeds);
        bytes.truncate(MAX_INPUT);
    }
    // Half of all pictures keep their checksums, so that what lies behind these is reached.
    if pick % 2 == 1 {
        mend_png(&mut bytes);
    }
    bytes
}

fn apply(bytes: &mut Vec<u8>, (kind, a, b, c): Edit, seeds: &[Vec<u8>]) {
    let length = bytes.len();
    if length == 0 {
        bytes.extend(c.to_le_bytes());
        return;
    }
    let at = a as usize % length;
    // Short ranges are as likely as long ones.
    let range = at..(at + (b as usize >> (c % 32)) % (length - at + 1)).min(length);
    match kind % 13 {
        0 => bytes[at] ^= 1 << (b % 8),
        1 => bytes[at] = c as u8,
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(range)),
        4 => {
            let chunk = bytes[range].repeat(1 + c as usize % 50);
            bytes.splice(at..at, chunk);
        }
        5 => {
            let other = &seeds[c as usize % seeds.len()];
            let from = b as usize % other.len().max(1);
            bytes.splice(at..at, other[from..].iter().take(4096).copied());
        }
        6 => {
            let other = &seeds[c as usize % seeds.len()];
            bytes.truncate(at);
            bytes.extend(&other[at.min(other.len())..]);
        }
        7 | 8 => {
            let number = EXTREMES[b as usize % EXTREMES.len()];
            let width = 1 << (c % 4);
            let little = number.to_le_bytes();
            let written: Vec<u8> = match kind % 13 {
                7 => little[..width].to_vec(),
                _ => little[..width].iter().rev().copied().collect(),
            };
            for (place, byte) in bytes[at..].iter_mut().zip(written) {
                *place = byte;
            }
        }
        9 | 10 => number(bytes, at, NUMBERS[c as usize % NUMBERS.len()]),
        11 => {
            let token = TOKENS[b as usize % TOKENS.len()];
            bytes.splice(at..at, token.repeat(1 + (c % 3) as usize).into_bytes());
        }
        _ => {
            let mut random = ChaCha8Rng::seed_from_u64(c);
            let count = random.random_range(0..64);
            let more: Vec<u8> = (0..count).map(|_| random.random()).collect();
            bytes.splice(at..at, more);
        }
    }
}

/// Writes `new` in place of the first number at or behind `at`.
fn number(bytes: &mut Vec<u8>, at: usize, new: &str) {
    let Some(start) = bytes[at..].iter().position(u8::is_ascii_digit) else {
        return;
    };
    let start = at + start;
    let is_part = |byte: &u8| byte.is_ascii_digit() || *byte == b'.';
    let length = bytes[start..]
        .iter()
        .take_while(|byte| is_part(byte))
        .count();
    bytes.splice(start..start + length, new.bytes());
}

/// Gives every chunk of a PNG the checksum of what is in it.
fn mend_png(bytes: &mut [u8]) {
    if !bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        return;
    }
    let mut at = 8;
    while let Some(length) = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>()) {
        let end = at + 8 + u32::from_be_bytes(*length) as usize;
        if end + 4 > bytes.len() {
            return;
        }
        let checksum = crc(&bytes[at + 4..end]);
        bytes[end..end + 4].copy_from_slice(&checksum.to_be_bytes());
        at = end + 4;
    }
}

/// The checksum of PNG and zip.
pub fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| match crc & 1 {
            1 => crc >> 1 ^ 0xEDB8_8320,
            _ => crc >> 1,
        })
    })
}
