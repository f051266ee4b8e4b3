use candle_core::Tensor;

use crate::Result;

/// Classifier-free guidance over a part of a sampler's steps (Kynkäänniemi et al. 2024, arXiv 2404.07724), cut as diffusers'
/// `ClassifierFreeGuidance` cuts it. A scale alone is guidance in every step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guidance {
    pub scale: f64,
    /// The share of the steps before the first guided one, in [0, 1].
    pub start: f64,
    /// The share of the steps before the first that is not guided again, in [0, 1].
    pub stop: f64,
}

impl From<f64> for Guidance {
    fn from(scale: f64) -> Self {
        Self {
            scale,
            start: 0.0,
            stop: 1.0,
        }
    }
}

impl Guidance {
    /// Whether step `step`, from 0, of `steps` is guided.
    pub fn guides(&self, step: usize, steps: usize) -> bool {
        let before = |share: f64| (share * steps as f64) as usize;
        (before(self.start)..before(self.stop)).contains(&step)
    }
}

/// Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, equation 6 in the form `u + s · (c − u)`).
/// `both` (2b, …) holds the b predictions without the text first, then the b with it; the result is (b, …). Scale 1
/// gives the prediction with the text.
pub fn guide(both: &Tensor, guidance_scale: f64) -> Result<Tensor> {
    let b = both.dim(0)? / 2;
    let without = both.narrow(0, 0, b)?;
    let with = both.narrow(0, b, b)?;
    Ok((&without + ((with - &without)? * guidance_scale)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn guidance_is_in_the_steps_that_diffusers_has_it_in() {
        let guided = |start, stop, steps| {
            let guidance = Guidance {
                scale: 2.0,
                start,
                stop,
            };
            (0..steps)
                .filter(|step| guidance.guides(*step, steps))
                .collect::<Vec<_>>()
        };
        assert_eq!(guided(0.0, 1.0, 3), [0, 1, 2]);
        assert_eq!(guided(0.25, 0.75, 10), [2, 3, 4, 5, 6]);
        assert_eq!(guided(0.5, 0.5, 4), [0; 0]);
        assert!(Guidance::from(3.0).guides(27, 28));
    }

    #[test]
    fn guidance_moves_from_the_first_half_towards_the_second() -> Result<()> {
        let both = Tensor::from_vec(vec![1f32, 2.0, 3.0, 6.0], (2, 2), &Device::Cpu)?;
        let guided = guide(&both, 2.5)?.to_vec2::<f32>()?;
        assert_eq!(guided, [[6.0, 12.0]]);
        Ok(())
    }
}
