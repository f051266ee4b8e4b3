//! Bounds on the numbers in configs of checkpoints, at the door: whatever a config says is turned into sizes of tensors,
//! numbers of loops and divisors, so it is checked before anything is made of it.

use std::ops::RangeInclusive;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::files::read_json;
use crate::{Error, Result};

/// The deepest published transformers have 126 layers.
pub const LAYERS: RangeInclusive<usize> = 1..=1024;
/// The widest feed-forward of a published transformer has 53,248.
pub const WIDTH: RangeInclusive<usize> = 1..=1 << 17;
/// The most heads in published transformers are 128.
pub const HEADS: RangeInclusive<usize> = 1..=1024;
/// The largest published vocabularies have 262,144 tokens, codebooks of images as many.
pub const VOCABULARY: RangeInclusive<usize> = 1..=1 << 20;
/// Positions of tokens, of which tables are made.
pub const POSITIONS: RangeInclusive<usize> = 1..=1 << 17;
/// Pixels or latents along a side of an image.
pub const SIDE: RangeInclusive<usize> = 1..=1 << 14;
/// Channels of images, latents and convolutions.
pub const CHANNELS: RangeInclusive<usize> = 1..=1 << 14;
/// Levels of a convolutional network, each half the size of the one before.
pub const LEVELS: RangeInclusive<usize> = 1..=10;
/// The faults of one config.
#[derive(Default)]
pub struct Limits {
    faults: Vec<String>,
}

impl Limits {
    /// `value`, called `name`, must be one of `range`.
    pub fn within(&mut self, name: &str, value: usize, range: &RangeInclusive<usize>) {
        if !range.contains(&value) {
            let (start, end) = (range.start(), range.end());
            let fault = format!("{name} is {value}, from {start} to {end} expected");
            self.faults.push(fault);
        }
    }

    /// All of `values`, called `name`, must be of `range`.
    pub fn all_within(&mut self, name: &str, values: &[usize], range: &RangeInclusive<usize>) {
        if let Some(value) = values.iter().find(|value| !range.contains(value)) {
            self.within(name, *value, range);
        }
    }

    /// `value` must be a multiple of `divisor`, which is at least 1.
    pub fn multiple(&mut self, name: &str, value: usize, (of, divisor): (&str, usize)) {
        if divisor > 0 && !value.is_multiple_of(divisor) {
            let fault = format!("{name} {value} is not a multiple of {of} {divisor}");
            self.faults.push(fault);
        }
    }

    /// `value` must be a number from 0 up, as what is added in norms.
    pub fn from_zero(&mut self, name: &str, value: f64) {
        if !value.is_finite() || value < 0.0 {
            self.faults.push(format!("{name} is {value}"));
        }
    }

    /// `value` must be a number above 0.
    pub fn above_zero(&mut self, name: &str, value: f64) {
        if !value.is_finite() || value <= 0.0 {
            self.faults.push(format!("{name} is {value}"));
        }
    }

    /// What transformers calls these sizes of an encoder: the widths `hidden_size` and `intermediate_size`,
    /// `num_hidden_layers`, `num_attention_heads`, `layer_norm_eps`.
    pub fn encoder(&mut self, [hidden, inner]: [usize; 2], layers: usize, heads: usize, eps: f64) {
        self.within("hidden_size", hidden, &WIDTH);
        self.within("intermediate_size", inner, &WIDTH);
        self.within("num_hidden_layers", layers, &LAYERS);
        self.within("num_attention_heads", heads, &HEADS);
        self.multiple("hidden_size", hidden, ("num_attention_heads", heads));
        self.from_zero("layer_norm_eps", eps);
    }

    /// `value` must be a share that leaves something, as dropout.
    pub fn share(&mut self, name: &str, value: f64) {
        if !(0.0..1.0).contains(&value) {
            self.faults
                .push(format!("{name} is {value}, from 0 to below 1 expected"));
        }
    }

    /// What is wrong, else nothing.
    pub fn faults(self) -> Vec<String> {
        self.faults
    }
}

/// A config whose numbers have bounds.
pub trait Limited {
    /// Notes in `limits` every number that is out of its bounds.
    fn limit(&self, limits: &mut Limits);

    /// Fails with every number of the config, which lies at `path`, that is out of its bounds.
    fn limited(self, path: &Path) -> Result<Self>
    where
        Self: Sized,
    {
        let mut limits = Limits::default();
        self.limit(&mut limits);
        match limits.faults() {
            faults if faults.is_empty() => Ok(self),
            faults => Err(Error::Checkpoint {
                path: path.to_path_buf(),
                faults,
            }),
        }
    }
}

/// Reads the config of a checkpoint.
///
/// # Errors
/// As [`read_json`], and when a number is out of its bounds.
pub fn read_config<T: DeserializeOwned + Limited>(path: &Path) -> Result<T> {
    read_json::<T>(path)?.limited(path)
}
