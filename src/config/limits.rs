//! Which numbers are taken, by pipeline files and by the command line alike, and why no others. A number that is taken
//! is one that a run survives: what is planned and held for it fits into memory, and nothing overflows.

use std::fmt;
use std::ops::{Bound, RangeBounds};

/// A range of whole numbers.
#[derive(Debug, Clone, Copy)]
pub struct Count {
    pub least: usize,
    pub most: usize,
    /// Why there is an end.
    pub why: &'static str,
}

impl Count {
    const fn new(least: usize, most: usize, why: &'static str) -> Self {
        Self { least, most, why }
    }

    /// `number`, if it is in the range.
    pub fn admit(&self, number: i128) -> Option<usize> {
        let number = usize::try_from(number).ok()?;
        (self.least..=self.most).contains(&number).then_some(number)
    }

    /// What reads an option of the command line: a number in the range, or the range in words.
    pub fn parser(self) -> impl Fn(&str) -> Result<usize, String> + Clone {
        move |text| {
            let number = text.trim().parse().ok();
            number
                .and_then(|number| self.admit(number))
                .ok_or_else(|| self.to_string())
        }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { least, most, why } = self;
        write!(f, "a whole number from {least} to {most}: {why}")
    }
}

/// A range of numbers.
#[derive(Debug, Clone, Copy)]
pub struct Real {
    least: Bound<f64>,
    most: Bound<f64>,
}

impl Real {
    const fn new(least: Bound<f64>, most: Bound<f64>) -> Self {
        Self { least, most }
    }

    /// Whether `number` is in the range, in which nothing infinite is.
    pub fn admits(&self, number: f64) -> bool {
        number.is_finite() && (self.least, self.most).contains(&number)
    }

    /// What reads an option of the command line: a number in the range, or the range in words.
    pub fn parser(self) -> impl Fn(&str) -> Result<f64, String> + Clone {
        move |text| {
            let number = text.trim().parse().ok();
            number
                .filter(|number| self.admits(*number))
                .ok_or_else(|| self.to_string())
        }
    }
}

impl fmt::Display for Real {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lower = match self.least {
            Bound::Included(least) => Some(format!("of at least {least}")),
            Bound::Excluded(bound) => Some(format!("above {bound}")),
            Bound::Unbounded => None,
        };
        let upper = match self.most {
            Bound::Included(most) => Some(format!("at most {most}")),
            Bound::Excluded(bound) => Some(format!("below {bound}")),
            Bound::Unbounded => None,
        };
        let bounds: Vec<String> = lower.into_iter().chain(upper).collect();
        write!(f, "a number {}", bounds.join(" and "))
    }
}

const MEMORY: &str = "they are held in memory together";
const PLANNED: &str = "all are planned beforehand, in memory";

pub const SEED: Count = Count::new(0, i64::MAX as usize, "TOML has no larger ones");
pub const THREADS: Count = Count::new(0, 1024, "each takes memory, and 0 is one for every core");
/// Optimizer steps.
pub const STEPS: Count = Count::new(1, 1_000_000, PLANNED);
/// Steps after which something happens, of which some need not happen.
pub const STEPS_OR_NONE: Count = Count::new(0, STEPS.most, "no training has more steps");
pub const CHECKPOINT_EVERY: Count = Count::new(1, STEPS.most, "no training has more steps");
pub const BATCH_SIZE: Count = Count::new(1, 1024, MEMORY);
/// The rank of an adapter; no layer of a model that is known is less wide on its narrow side.
pub const RANK: Count = Count::new(1, 4096, "no more than a layer is wide");
pub const RESOLUTION: Count = Count::new(8, 4096, "pixels a side, in multiples of 8");
/// Proxies of a subject.
pub const PROXIES: Count = Count::new(1, 1_000_000, PLANNED);
pub const CLASS_IMAGES: Count = Count::new(1, 100_000, PLANNED);
pub const IMAGES_PER_PROMPT: Count = Count::new(1, 100_000, PLANNED);
pub const NUM_INFERENCE_STEPS: Count =
    Count::new(1, 1000, "diffusion models know as many timesteps");
pub const TOP_K: Count = Count::new(0, 1_000_000, "no vocabulary has more tokens, and 0 is all");
pub const GUIDANCE_INTERVAL: Count = Count::new(0, 1_000_000, "no image has more tokens");
/// How many items may wait between two stages.
pub const CHANNEL: Count = Count::new(1, 65_536, MEMORY);
/// Processes that share a work.
pub const SHARDS: Count = Count::new(1, 4096, "each claims a place of its own");
/// Pictures in a row of a sheet.
pub const COLUMNS: Count = Count::new(1, 1000, "a sheet has no more pictures");
/// Everything else that is counted.
pub const ROWS: Count = Count::new(1, 1_000_000_000, "no store has more rows");

/// Examples that all steps of a run use, over the trainings of all its subjects.
pub const USES: usize = 1 << 24;
/// Proxies of all subjects, and pictures of an evaluation.
pub const PICTURES: usize = 2_000_000;

/// What f32, in which all is computed, holds, with room to spare.
const FINITE: f64 = 1e30;
pub const ABOVE_ZERO: Real = Real::new(Bound::Excluded(0.0), Bound::Included(FINITE));
pub const NOT_NEGATIVE: Real = Real::new(Bound::Included(0.0), Bound::Included(FINITE));
pub const SHARE: Real = Real::new(Bound::Included(0.0), Bound::Included(1.0));
pub const BELOW_ONE: Real = Real::new(Bound::Included(0.0), Bound::Excluded(1.0));
pub const AT_LEAST_ONE: Real = Real::new(Bound::Included(1.0), Bound::Included(FINITE));
pub const PROBABILITY: Real = Real::new(Bound::Excluded(0.0), Bound::Included(1.0));
pub const GUIDANCE_SCALE: Real = Real::new(Bound::Included(1.0), Bound::Included(1000.0));
/// A logit: beyond it a sigmoid is 0 or 1.
pub const LOGIT: Real = Real::new(Bound::Included(-100.0), Bound::Included(100.0));
/// Between these every noise level is drawn by a density (Esser et al. 2024, section 3.1: up to 2 / (π − 2)).
pub const MODE_SCALE: Real = Real::new(Bound::Included(-1.0), Bound::Included(1.75));
/// Seconds: a year at most, as clocks overflow at some time.
pub const SECONDS: Real = Real::new(Bound::Included(0.0), Bound::Included(31_536_000.0));

/// The most bytes of a name that becomes part of a path: file systems take 255, and numbers and endings are added.
pub const NAME_BYTES: usize = 100;
/// The most bytes of a text that people write: a pipeline, a list of prompts, a caption.
pub const TEXT_BYTES: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_read_in_the_range_that_its_refusal_names() {
        let steps = STEPS.parser();
        assert_eq!(steps("1000000"), Ok(1_000_000));
        for text in ["0", "1000001", "9223372036854775807", "1e3", "", "-1"] {
            let refusal = steps(text).unwrap_err();
            assert!(refusal.contains("from 1 to 1000000"), "{text}: {refusal}");
        }
        assert_eq!(GUIDANCE_SCALE.parser()("1"), Ok(1.0));
        for text in ["0.9", "1e300", "inf", "nan", "x"] {
            let refusal = GUIDANCE_SCALE.parser()(text).unwrap_err();
            assert_eq!(refusal, "a number of at least 1 and at most 1000", "{text}");
        }
    }
}
