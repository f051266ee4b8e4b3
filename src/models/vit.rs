//! The vision transformer of DINO (Caron et al. 2021, arXiv 2104.14294), which is ViT's (arXiv 2010.11929).
//!
//! Checkpoints: `facebook/dino-vits16`, and timm's `vit_small_patch16_224.dino`. Three sets of names are read: the
//! hub's (`encoder.layer.0.attention.attention.query`), transformers 5's own (`layers.0.attention.q_proj`) and timm's
//! (`blocks.0.attn.qkv`); the first two may have `vit.` in front. A pooler or a classifier is not used.

use candle_core::Tensor;
use serde::{Deserialize, Deserializer};

use super::encoder::{Activation, Layer, Names, Projections, Sizes, with_class_token};
use crate::nn::ops::Padding;
use crate::nn::{Conv2d, Init, LayerNorm, Mask, Weights, parameter};
use crate::{Error, Result};

/// `config.json` of a Hugging Face `ViTModel`, with its defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Width of the residual stream. Default 768.
    pub hidden_size: usize,
    /// Number of layers. Default 12.
    pub num_hidden_layers: usize,
    /// Heads of each attention; they divide `hidden_size`. Default 12.
    pub num_attention_heads: usize,
    /// Width of the feed-forward's hidden layer. Default 3072.
    pub intermediate_size: usize,
    /// The feed-forward's activation. Default Gelu.
    pub hidden_act: Activation,
    /// Added to the variance in norms. Default 1e-12.
    pub layer_norm_eps: f64,
    /// Side of the square images in pixels. Default 224.
    #[serde(deserialize_with = "side")]
    pub image_size: usize,
    /// Side of a patch in pixels. Default 16.
    #[serde(deserialize_with = "side")]
    pub patch_size: usize,
    /// Channels of an image. Default 3.
    pub num_channels: usize,
    /// Whether queries, keys and values have a bias. Default true.
    pub qkv_bias: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-12,
            image_size: 224,
            patch_size: 16,
            num_channels: 3,
            qkv_bias: true,
        }
    }
}

/// The side of a square, which a config may give as a number or as two equal ones.
fn side<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<usize, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Side {
        One(usize),
        Both([usize; 2]),
    }
    match Side::deserialize(deserializer)? {
        Side::One(side) => Ok(side),
        Side::Both([height, width]) if height == width => Ok(width),
        Side::Both([height, width]) => Err(serde::de::Error::custom(format!(
            "{height} by {width} is not square"
        ))),
    }
}

struct Layout {
    class_token: &'static str,
    positions: &'static str,
    patches: [&'static str; 2],
    layers: &'static [&'static str],
    layer: Names,
    norm: &'static str,
}

const HUB: Layout = Layout {
    class_token: "embeddings.cls_token",
    positions: "embeddings.position_embeddings",
    patches: ["embeddings", "patch_embeddings.projection"],
    layers: &["encoder", "layer"],
    layer: Names {
        norm1: "layernorm_before",
        attention: Projections::Separate([
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
        ]),
        out: "attention.output.dense",
        norm2: "layernorm_after",
        fc1: "intermediate.dense",
        fc2: "output.dense",
    },
    norm: "layernorm",
};

const TRANSFORMERS_5: Layout = Layout {
    layers: &["layers"],
    layer: Names {
        norm1: "layernorm_before",
        attention: Projections::Separate([
            "attention.q_proj",
            "attention.k_proj",
            "attention.v_proj",
        ]),
        out: "attention.o_proj",
        norm2: "layernorm_after",
        fc1: "mlp.fc1",
        fc2: "mlp.fc2",
    },
    ..HUB
};

const TIMM: Layout = Layout {
    class_token: "cls_token",
    positions: "pos_embed",
    patches: ["patch_embed", "proj"],
    layers: &["blocks"],
    layer: Names {
        norm1: "norm1",
        attention: Projections::Joint("attn.qkv"),
        out: "attn.proj",
        norm2: "norm2",
        fc1: "mlp.fc1",
        fc2: "mlp.fc2",
    },
    norm: "norm",
};

/// The model.
pub struct Vit {
    cls_token: Tensor,
    position_embeddings: Tensor,
    projection: Conv2d,
    layers: Vec<Layer>,
    norm: LayerNorm,
    config: Config,
}

impl Vit {
    /// Builds the model from `weights`, whose root is the checkpoint's; new weights are drawn in the hub's layout.
    /// Position embeddings are not interpolated: another number of them is a fault. Call [`Weights::finish`] afterwards.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let c = config;
        if c.patch_size == 0
            || c.image_size < c.patch_size
            || c.num_attention_heads == 0
            || !c.hidden_size.is_multiple_of(c.num_attention_heads)
        {
            return Err(Error::invalid(
                format!("config of a ViT: {c:?}"),
                "a patch must fit into the image, and the heads must divide hidden_size",
            ));
        }
        let weights = if weights.contains("vit.embeddings.cls_token") {
            weights.pp("vit")
        } else {
            weights.clone()
        };
        let layout = if weights.contains("cls_token") {
            TIMM
        } else if weights.contains("layers.0.attention.q_proj.weight") {
            TRANSFORMERS_5
        } else {
            HUB
        };
        let sizes = Sizes {
            width: c.hidden_size,
            hidden: c.intermediate_size,
            heads: c.num_attention_heads,
            layers: c.num_hidden_layers,
            eps: c.layer_norm_eps,
            activation: c.hidden_act,
            qkv_bias: c.qkv_bias,
        };
        let stack = layout.layers.iter().fold(weights.clone(), |w, p| w.pp(p));
        let positions = (c.image_size / c.patch_size).pow(2) + 1;
        let [outer, inner] = layout.patches;
        let init = Init::Normal(0.02);
        Ok(Self {
            cls_token: weights.get((1, 1, c.hidden_size), layout.class_token, init)?,
            position_embeddings: weights.get(
                (1, positions, c.hidden_size),
                layout.positions,
                init,
            )?,
            projection: Conv2d::new(
                c.num_channels,
                c.hidden_size,
                c.patch_size,
                c.patch_size,
                Padding::Same(0),
                &weights.pp(outer).pp(inner),
            )?,
            layers: (0..c.num_hidden_layers)
                .map(|i| Layer::new(&sizes, &layout.layer, &stack.pp(i)))
                .collect::<Result<_>>()?,
            norm: LayerNorm::new(c.hidden_size, c.layer_norm_eps, &weights.pp(layout.norm))?,
            config: c.clone(),
        })
    }

    /// The configuration it was built with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The class token after the final norm, (b, hidden_size), of `pixel_values` (b, 3, image_size, image_size),
    /// normalised by ImageNet's channel means and deviations for DINO.
    pub fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let (b, channels, h, w) = pixel_values.dims4()?;
        if (channels, h, w) != (c.num_channels, c.image_size, c.image_size) {
            return Err(Error::invalid(
                format!("pixel values of shape {:?}", pixel_values.dims()),
                format!(
                    "this ViT takes (b, {}, {s}, {s})",
                    c.num_channels,
                    s = c.image_size
                ),
            ));
        }
        let patches = self
            .projection
            .forward(&pixel_values.to_dtype(self.cls_token.dtype())?)?;
        let mut h = with_class_token(&patches, &parameter(&self.cls_token))?
            .broadcast_add(&parameter(&self.position_embeddings))?;
        for layer in &self.layers {
            h = layer.forward(&h, &Mask::None)?;
        }
        let class = h.narrow(1, 0, 1)?.contiguous()?;
        self.norm.forward(&class.reshape((b, c.hidden_size))?)
    }
}
