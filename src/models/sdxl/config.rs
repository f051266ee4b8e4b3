//! `unet/config.json` of diffusers' `UNet2DConditionModel`, as far as Stable Diffusion XL and its kin use it.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use crate::models::encoder::{Activation, act_fn};
use crate::models::limits::{CHANNELS, HEADS, LAYERS, LEVELS, Limited, Limits, SIDE, WIDTH};
use crate::{Error, Result};

/// One number for all levels, or one for each, finest first.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum PerLevel<T> {
    All(T),
    Each(Vec<T>),
}

impl<T: Clone> PerLevel<T> {
    /// As many as there are levels, which [`Config::check`] has counted.
    fn each(&self, levels: usize) -> Vec<T> {
        match self {
            Self::All(value) => vec![value.clone(); levels],
            Self::Each(values) => values.clone(),
        }
    }

    fn fits(&self, levels: usize) -> bool {
        match self {
            Self::All(_) => true,
            Self::Each(values) => values.len() == levels,
        }
    }
}

/// A level on the way down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum DownBlock {
    /// Residual blocks.
    DownBlock2D,
    /// Residual blocks, each followed by a transformer.
    CrossAttnDownBlock2D,
}

/// The coarsest level between the ways down and up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum MidBlock {
    /// One residual block.
    UNetMidBlock2D,
    /// A residual block, a transformer and another residual block.
    UNetMidBlock2DCrossAttn,
}

/// A level on the way up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum UpBlock {
    /// Residual blocks.
    UpBlock2D,
    /// Residual blocks, each followed by a transformer.
    CrossAttnUpBlock2D,
}

/// The U-Net's config; the defaults are diffusers'.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Side of the latents that the model is for.
    #[serde(deserialize_with = "side")]
    pub sample_size: Option<usize>,
    /// Channels of the latents that go in.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Cosines before sines in the embedded numbers.
    pub flip_sin_to_cos: bool,
    /// See [`crate::models::timestep::Sinusoid`].
    pub freq_shift: f64,
    /// The levels on the way down, finest first.
    pub down_block_types: Vec<DownBlock>,
    /// The coarsest level; absent in distilled models.
    pub mid_block_type: Option<MidBlock>,
    /// The levels on the way up, coarsest first.
    pub up_block_types: Vec<UpBlock>,
    /// Width of each level.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each level on the way down; there is one more on the way up.
    pub layers_per_block: PerLevel<usize>,
    /// Zeros around the convolutions that halve: 1, or 0 for one on the right and at the bottom.
    pub downsample_padding: usize,
    /// The activation everywhere but in the transformers.
    #[serde(deserialize_with = "act_fn")]
    pub act_fn: Activation,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Epsilon of the group norms outside the transformers.
    pub norm_eps: f64,
    /// Width of `encoder_hidden_states`.
    pub cross_attention_dim: PerLevel<usize>,
    /// Blocks of each transformer on the way down and in the middle: of each level, or of each transformer of each.
    #[serde(deserialize_with = "depths")]
    pub transformer_layers_per_block: PerLevel<PerLevel<usize>>,
    /// The same on the way up, coarsest first; absent means those on the way down.
    pub reverse_transformer_layers_per_block: Option<Vec<PerLevel<usize>>>,
    /// Heads of each attention, in spite of its name.
    pub attention_head_dim: PerLevel<usize>,
    /// Whether the ways into transformers and out of them are linear layers, not convolutions.
    pub use_linear_projection: bool,
    /// `text_time`: pooled text and sizes are told beside the timestep.
    pub addition_embed_type: Option<String>,
    /// Width of the embedding of each size.
    pub addition_time_embed_dim: Option<usize>,
    /// Width of `text_embeds` and all embedded sizes.
    pub projection_class_embeddings_input_dim: Option<usize>,
    /// Width of the embedded timestep; absent means four times the finest level's.
    pub time_embedding_dim: Option<usize>,
    /// Side of the first convolution, odd.
    pub conv_in_kernel: usize,
    /// Side of the last convolution, odd.
    pub conv_out_kernel: usize,
    /// What else the file says.
    #[serde(flatten)]
    pub others: BTreeMap<String, Value>,
}

/// One depth for all transformers, or one entry for each level: a list is never the depths of every level's transformers.
fn depths<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<PerLevel<PerLevel<usize>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Depths {
        All(usize),
        Each(Vec<PerLevel<usize>>),
    }
    Ok(match Depths::deserialize(deserializer)? {
        Depths::All(depth) => PerLevel::All(PerLevel::All(depth)),
        Depths::Each(levels) => PerLevel::Each(levels),
    })
}

/// A side, or the two equal sides that diffusers also takes.
fn side<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<usize>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let number = value.get(0).unwrap_or(&value).as_u64();
    Ok(number.and_then(|side| side.try_into().ok()))
}

impl<T> PerLevel<T> {
    fn values(&self) -> &[T] {
        match self {
            Self::All(value) => std::slice::from_ref(value),
            Self::Each(values) => values,
        }
    }
}

impl Limited for Config {
    fn limit(&self, limits: &mut Limits) {
        limits.within("sample_size", self.sample_size.unwrap_or(1), &SIDE);
        limits.within("in_channels", self.in_channels, &CHANNELS);
        limits.within("out_channels", self.out_channels, &CHANNELS);
        let widths = &self.block_out_channels;
        limits.within("number of block_out_channels", widths.len(), &LEVELS);
        limits.all_within("block_out_channels", widths, &CHANNELS);
        let groups = ("norm_num_groups", self.norm_num_groups);
        limits.within(groups.0, groups.1, &CHANNELS);
        for width in widths.iter().take(*LEVELS.end()) {
            limits.multiple("block_out_channels", *width, groups);
        }
        let layers = self.layers_per_block.values();
        limits.all_within("layers_per_block", layers, &LAYERS);
        let across = self.cross_attention_dim.values();
        limits.all_within("cross_attention_dim", across, &WIDTH);
        let name = "transformer_layers_per_block";
        let reverse = self.reverse_transformer_layers_per_block.iter().flatten();
        for depths in self
            .transformer_layers_per_block
            .values()
            .iter()
            .chain(reverse)
        {
            limits.all_within(name, depths.values(), &(0..=*LAYERS.end()));
        }
        let heads = self.attention_head_dim.values();
        limits.all_within("attention_head_dim", heads, &HEADS);
        limits.above_zero("norm_eps", self.norm_eps);
        for (name, width) in [
            ("addition_time_embed_dim", self.addition_time_embed_dim),
            (
                "projection_class_embeddings_input_dim",
                self.projection_class_embeddings_input_dim,
            ),
            ("time_embedding_dim", self.time_embedding_dim),
        ] {
            limits.within(name, width.unwrap_or(1), &WIDTH);
        }
        for (name, side) in [
            ("conv_in_kernel", self.conv_in_kernel),
            ("conv_out_kernel", self.conv_out_kernel),
        ] {
            limits.within(name, side, &(1..=31));
        }
        limits.within("downsample_padding", self.downsample_padding, &(0..=1));
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            down_block_types: vec![
                DownBlock::CrossAttnDownBlock2D,
                DownBlock::CrossAttnDownBlock2D,
                DownBlock::CrossAttnDownBlock2D,
                DownBlock::DownBlock2D,
            ],
            mid_block_type: Some(MidBlock::UNetMidBlock2DCrossAttn),
            up_block_types: vec![
                UpBlock::UpBlock2D,
                UpBlock::CrossAttnUpBlock2D,
                UpBlock::CrossAttnUpBlock2D,
                UpBlock::CrossAttnUpBlock2D,
            ],
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerLevel::All(2),
            downsample_padding: 1,
            act_fn: Activation::Silu,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            cross_attention_dim: PerLevel::All(1280),
            transformer_layers_per_block: PerLevel::All(PerLevel::All(1)),
            reverse_transformer_layers_per_block: None,
            attention_head_dim: PerLevel::All(8),
            use_linear_projection: false,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
            time_embedding_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            others: BTreeMap::new(),
        }
    }
}

/// One level of a checked config, on either way.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Level {
    pub channels: usize,
    /// Residual blocks.
    pub resnets: usize,
    /// Blocks of the transformer after each residual block; empty where there are none.
    pub depths: Vec<usize>,
    pub heads: usize,
    pub context: usize,
}

/// All levels of a checked config.
pub(super) struct Levels {
    /// Finest first.
    pub down: Vec<Level>,
    /// Coarsest first.
    pub up: Vec<Level>,
    /// Depth of the transformer in the middle.
    pub mid_depth: usize,
    /// Width of each embedded size, and of them all with the pooled text.
    pub added: (usize, usize),
}

impl Config {
    /// Side of the latents that the model is for; where the config says nothing, SDXL's.
    pub fn side(&self) -> usize {
        self.sample_size.unwrap_or(128)
    }

    /// Settings of diffusers that change what is computed in ways that are not built, with the values that do not.
    fn neutral() -> [(&'static str, Value); 19] {
        [
            ("center_input_sample", json!(false)),
            ("only_cross_attention", json!(false)),
            ("mid_block_only_cross_attention", json!(false)),
            ("dual_cross_attention", json!(false)),
            ("mid_block_scale_factor", json!(1.0)),
            ("resnet_out_scale_factor", json!(1.0)),
            ("resnet_time_scale_shift", json!("default")),
            ("resnet_skip_time_act", json!(false)),
            ("encoder_hid_dim", json!(null)),
            ("encoder_hid_dim_type", json!(null)),
            ("num_attention_heads", json!(null)),
            ("class_embed_type", json!(null)),
            ("class_embeddings_concat", json!(false)),
            ("time_embedding_type", json!("positional")),
            ("time_embedding_act_fn", json!(null)),
            ("timestep_post_act", json!(null)),
            ("time_cond_proj_dim", json!(null)),
            ("attention_type", json!("default")),
            ("cross_attention_norm", json!(null)),
        ]
    }

    /// The levels, one by one.
    ///
    /// # Errors
    /// Names the first setting that is not supported or contradicts another.
    pub(super) fn levels(&self) -> Result<Levels> {
        let count = self.block_out_channels.len();
        self.check(count)?;
        let per_transformer = |depth: &PerLevel<usize>, resnets: usize| {
            if depth.fits(resnets) {
                return Ok(depth.each(resnets));
            }
            Err(Error::invalid(
                format!("transformer depths {depth:?} for {resnets} transformers"),
                "give one depth, or one for each transformer of the level",
            ))
        };
        let resnets = self.layers_per_block.each(count);
        let heads = self.attention_head_dim.each(count);
        let context = self.cross_attention_dim.each(count);
        let depths = self.transformer_layers_per_block.each(count);
        let level = |at: usize, resnets: usize, depth: Option<&PerLevel<usize>>| {
            Ok(Level {
                channels: self.block_out_channels[at],
                resnets,
                depths: match depth {
                    Some(depth) => per_transformer(depth, resnets)?,
                    None => Vec::new(),
                },
                heads: heads[at],
                context: context[at],
            })
        };
        let down = (0..count).map(|i| {
            let attends = self.down_block_types[i] == DownBlock::CrossAttnDownBlock2D;
            level(i, resnets[i], attends.then_some(&depths[i]))
        });
        let upwards = match &self.reverse_transformer_layers_per_block {
            Some(depths) => depths.clone(),
            None => depths.iter().rev().cloned().collect(),
        };
        let up = (0..count).map(|i| {
            let attends = self.up_block_types[i] == UpBlock::CrossAttnUpBlock2D;
            let at = count - 1 - i;
            level(at, resnets[at] + 1, attends.then_some(&upwards[i]))
        });
        let mid_depth = match depths.last() {
            Some(PerLevel::All(depth)) => *depth,
            Some(PerLevel::Each(depths)) => depths.first().copied().unwrap_or(0),
            None => 0,
        };
        let (Some(size), Some(all)) = (
            self.addition_time_embed_dim,
            self.projection_class_embeddings_input_dim,
        ) else {
            return Err(Error::invalid(
                "a U-Net without addition_time_embed_dim or projection_class_embeddings_input_dim",
                "those of SDXL have both",
            ));
        };
        Ok(Levels {
            down: down.collect::<Result<_>>()?,
            up: up.collect::<Result<_>>()?,
            mid_depth,
            added: (size, all),
        })
    }

    fn check(&self, count: usize) -> Result<()> {
        for (key, neutral) in Self::neutral() {
            let Some(value) = self.others.get(key) else {
                continue;
            };
            let same = |value: &Value| {
                value.is_null()
                    || *value == neutral
                    || value.as_f64().is_some() && value.as_f64() == neutral.as_f64()
            };
            let all = value.as_array().is_some_and(|list| list.iter().all(same));
            if !(same(value) || all) {
                return Err(Error::invalid(
                    format!("the U-Net's config sets {key} to {value}, which is not built"),
                    format!("SDXL is published with {neutral}"),
                ));
            }
        }
        if self.addition_embed_type.as_deref() != Some("text_time") {
            return Err(Error::invalid(
                format!(
                    "a U-Net with addition_embed_type {:?}",
                    self.addition_embed_type
                ),
                "those of SDXL have \"text_time\"; older models of Stable Diffusion are not supported",
            ));
        }
        let reversed = &self.reverse_transformer_layers_per_block;
        let lengths = [
            ("down_block_types", self.down_block_types.len() == count),
            ("up_block_types", self.up_block_types.len() == count),
            ("layers_per_block", self.layers_per_block.fits(count)),
            ("attention_head_dim", self.attention_head_dim.fits(count)),
            ("cross_attention_dim", self.cross_attention_dim.fits(count)),
            (
                "transformer_layers_per_block",
                self.transformer_layers_per_block.fits(count),
            ),
            (
                "reverse_transformer_layers_per_block",
                reversed.as_ref().is_none_or(|depths| depths.len() == count),
            ),
        ];
        if let Some((name, _)) = lengths.iter().find(|(_, fits)| !fits) {
            return Err(Error::invalid(
                format!("{name} of the U-Net's config has not {count} entries"),
                "block_out_channels has as many levels: give one entry for each",
            ));
        }
        let odd = |kernel: usize| kernel % 2 == 1;
        if count == 0 || !odd(self.conv_in_kernel) || !odd(self.conv_out_kernel) {
            return Err(Error::invalid(
                format!(
                    "a U-Net of {count} levels with kernels of {} and {}",
                    self.conv_in_kernel, self.conv_out_kernel
                ),
                "there is at least one level, and both kernels are odd",
            ));
        }
        if self.downsample_padding > 1 {
            return Err(Error::invalid(
                format!("downsample_padding {}", self.downsample_padding),
                "0 and 1 are built",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(changes: Value) -> Config {
        let mut config = json!({
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 30,
            "block_out_channels": [8, 16],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "mid_block_scale_factor": 1,
            "only_cross_attention": [false, false],
        });
        let own = config.as_object_mut().unwrap();
        own.extend(changes.as_object().unwrap().clone());
        serde_json::from_value(config).unwrap()
    }

    #[test]
    fn depths_are_of_levels_or_of_single_transformers() {
        let levels = config(json!({"transformer_layers_per_block": [1, 3]}))
            .levels()
            .unwrap();
        let depths = |levels: &[Level]| levels.iter().map(|l| l.depths.clone()).collect::<Vec<_>>();
        assert_eq!(depths(&levels.down), [vec![], vec![3, 3]]);
        assert_eq!(depths(&levels.up), [vec![3, 3, 3], vec![]]);
        assert_eq!(levels.mid_depth, 3);
        let levels = config(json!({
            "transformer_layers_per_block": [1, [2, 4]],
            "reverse_transformer_layers_per_block": [[5, 6, 7], 1],
        }));
        let levels = levels.levels().unwrap();
        assert_eq!(levels.down[1].depths, [2, 4]);
        assert_eq!(levels.up[0].depths, [5, 6, 7]);
        assert_eq!(levels.mid_depth, 2);
    }

    #[test]
    fn what_is_not_built_is_named() {
        for (changes, named) in [
            (json!({"class_embed_type": "timestep"}), "class_embed_type"),
            (
                json!({"only_cross_attention": [true, false]}),
                "only_cross_attention",
            ),
            (
                json!({"mid_block_scale_factor": 1.4}),
                "mid_block_scale_factor",
            ),
            (json!({"addition_embed_type": null}), "addition_embed_type"),
            (
                json!({"attention_head_dim": [1, 2, 3]}),
                "attention_head_dim",
            ),
            (
                json!({"transformer_layers_per_block": [1, [2, 4, 5]]}),
                "transformer depths",
            ),
        ] {
            let error = config(changes).levels().map(|_| ()).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
    }
}
