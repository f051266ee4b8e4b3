//! Which noise levels a model of flow matching learns.

use crate::config::{Training, WeightingScheme};
use crate::diffusion::{Density, Weighting};

/// How often levels are drawn, and what their losses weigh.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Levels {
    pub density: Density,
    pub weighting: Weighting,
}

impl Levels {
    /// As diffusers trains FLUX.
    pub const EVEN: Self = Self {
        density: Density::Uniform,
        weighting: Weighting::One,
    };

    /// As SD3 was trained.
    pub const LOGIT_NORMAL: Self = Self {
        density: Density::STANDARD,
        weighting: Weighting::One,
    };

    /// What `training` says; `None` where it says nothing.
    pub fn of(training: &Training) -> Option<Self> {
        let settings = training.flow_matching?;
        let drawn = |density| Self {
            density,
            ..Self::EVEN
        };
        let weighted = |weighting| Self {
            weighting,
            ..Self::EVEN
        };
        Some(match settings.weighting_scheme {
            WeightingScheme::LogitNormal => drawn(Density::LogitNormal {
                mean: settings.logit_mean.unwrap_or(0.0),
                std: settings.logit_std.unwrap_or(1.0),
            }),
            WeightingScheme::Mode => drawn(Density::Mode {
                scale: settings.mode_scale.unwrap_or(1.29),
            }),
            WeightingScheme::SigmaSqrt => weighted(Weighting::SigmaSqrt),
            WeightingScheme::Cosmap => weighted(Weighting::Cosmap),
            WeightingScheme::None => Self::EVEN,
        })
    }
}
