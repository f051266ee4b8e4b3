//! The vision transformer of DINO (Caron et al. 2021, arXiv 2104.14294), which is ViT's (arXiv 2010.11929).
//!
//! Checkpoints: `facebook/dino-vits16`, and timm's `vit_small_patch16_224.dino`. Three sets of names are read: the
//! hub's (`encoder.layer.0.attention.attention.query`), transformers 5's own (`layers.0.attention.q_proj`) and timm's
//! (`blocks.0.attn.qkv`); the first two may have `vit.` in front. A pooler or a classifier is not used. timm's own
//! `config.json` has no sizes: they are read from the weights.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::Value;

use super::checkpoint_files;
use super::encoder::{Activation, Layer, Names, Projections, Sizes, with_class_token};
use super::family::{Architecture, KnownModel};
use super::limits::{CHANNELS, Limited, Limits, SIDE};
use crate::config::{Family, FamilySettings, Kind, Optimizer, SamplingDefaults, TrainingDefaults};
use crate::files::read_json;
use crate::hub::catalogue;
use crate::nn::ops::{self, Padding};
use crate::nn::{Conv2d, Init, LayerNorm, Mask, Weights, parameter};
use crate::{Error, Result};

/// DINO's vision transformer.
pub const FAMILY: Family = Family::new(&FamilySettings {
    name: "DINO",
    kind: Kind::Dino,
    // Evaluators do not train: a pipeline that makes one learn is refused where its role is read.
    training: TrainingDefaults::diffusion(Optimizer::Adamw, 1e-4, None),
    targets: &[],
    sampling: SamplingDefaults::NONE,
});

/// DINO in transformers' layout.
pub static ARCHITECTURE: Architecture = Architecture {
    family: FAMILY,
    recognises: |layout| layout.is_model_type("vit"),
    models: &[
        KnownModel {
            name: "nano-dino",
            resolution: None,
            directory: "datasets/nano/checkpoints/dino",
            hub: None,
            files: &["config.json", "model.safetensors"],
        },
        KnownModel {
            name: "dino-vits16",
            resolution: None,
            directory: "datasets/checkpoints/dino-vits16",
            hub: Some(&catalogue::DINO_VITS16),
            files: &[],
        },
    ],
    readers: |_, _, _| Ok(Vec::new()),
    learner: None,
};

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
    /// Size of the images in pixels. Default 224 by 224.
    pub image_size: Size,
    /// Size of a patch in pixels. Default 16 by 16.
    pub patch_size: Size,
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
            image_size: Size::square(224),
            patch_size: Size::square(16),
            num_channels: 3,
            qkv_bias: true,
        }
    }
}

impl Limited for Config {
    fn limit(&self, limits: &mut Limits) {
        limits.encoder(
            [self.hidden_size, self.intermediate_size],
            self.num_hidden_layers,
            self.num_attention_heads,
            self.layer_norm_eps,
        );
        limits.within("num_channels", self.num_channels, &CHANNELS);
        let (image, patch) = (self.image_size, self.patch_size);
        limits.all_within("image_size", &[image.height, image.width], &SIDE);
        limits.within("patch_size", patch.height, &(1..=image.height));
        limits.within("patch_size", patch.width, &(1..=image.width));
    }
}

impl Config {
    /// What the `config.json` in `folder` says or, where it is timm's, what the shapes of the weights tell: heads are 64
    /// wide, norms add 1e-6, images are square.
    ///
    /// # Errors
    /// When a file is missing or cannot be read, or a number in it is out of its bounds.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let json: Value = read_json(&path)?;
        if json.get("hidden_size").is_none() {
            let weights = checkpoint_files::open(folder, "model", DType::F32, &Device::Cpu)?;
            if let Some(config) = Self::of_timm(&weights) {
                return config.limited(&path);
            }
        }
        let config: Self = serde_json::from_value(json).map_err(|e| Error::Checkpoint {
            path: path.clone(),
            faults: vec![e.to_string()],
        })?;
        config.limited(&path)
    }

    /// The sizes of the checkpoint with timm's names whose root is `weights`; `None` where it has others.
    fn of_timm(weights: &Weights) -> Option<Self> {
        let dims = |name: &str, place: usize| weights.dims(name)?.get(place).copied();
        let hidden_size = dims("blocks.0.attn.qkv.weight", 1)?;
        let patches = dims("pos_embed", 1)?.checked_sub(1)?;
        let patch_size = Size {
            height: dims("patch_embed.proj.weight", 2)?,
            width: dims("patch_embed.proj.weight", 3)?,
        };
        let grid = patches.isqrt();
        Some(Self {
            hidden_size,
            num_hidden_layers: (0..)
                .take_while(|i| weights.contains(&format!("blocks.{i}.norm1.weight")))
                .count(),
            num_attention_heads: hidden_size / 64,
            intermediate_size: dims("blocks.0.mlp.fc1.weight", 0)?,
            layer_norm_eps: 1e-6,
            image_size: Size {
                height: grid * patch_size.height,
                width: grid * patch_size.width,
            },
            patch_size,
            num_channels: dims("patch_embed.proj.weight", 1)?,
            qkv_bias: weights.contains("blocks.0.attn.qkv.bias"),
            ..Self::default()
        })
    }
}

/// Pixels; in a config the side of a square, or height and width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(from = "Sides")]
pub struct Size {
    pub height: usize,
    pub width: usize,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Sides {
    One(usize),
    Both([usize; 2]),
}

impl From<Sides> for Size {
    fn from(sides: Sides) -> Self {
        match sides {
            Sides::One(side) => Self::square(side),
            Sides::Both([height, width]) => Self { height, width },
        }
    }
}

impl Size {
    /// Of `side` by `side` pixels.
    pub fn square(side: usize) -> Self {
        Self {
            height: side,
            width: side,
        }
    }

    /// The side of a square; `None` where it is none.
    pub fn side(self) -> Option<usize> {
        (self.height == self.width).then_some(self.width)
    }
}

/// The linear layer over the pixels of each patch.
enum Projection {
    Square(Conv2d),
    /// (width, channels · height · width of a patch) and (width): a convolution with a kernel that is no square.
    Oblong {
        weight: Tensor,
        bias: Tensor,
    },
}

impl Projection {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let (channels, d, patch) = (c.num_channels, c.hidden_size, c.patch_size);
        if let Some(side) = patch.side() {
            let padding = Padding::Same(0);
            let conv = Conv2d::new(channels, d, side, side, padding, weights)?;
            return Ok(Self::Square(conv));
        }
        let inputs = channels * patch.height * patch.width;
        let init = Init::Normal((1.0 / inputs as f64).sqrt());
        let shape = (d, channels, patch.height, patch.width);
        Ok(Self::Oblong {
            weight: weights.get(shape, "weight", init)?.reshape((d, inputs))?,
            bias: weights.get(d, "bias", Init::Zeros)?,
        })
    }

    /// `x` (b, c, h, w) to (b, d, ⌊h / patch height⌋, ⌊w / patch width⌋).
    fn forward(&self, x: &Tensor, patch: Size) -> Result<Tensor> {
        let (weight, bias) = match self {
            Self::Square(conv) => return conv.forward(x),
            Self::Oblong { weight, bias } => (weight, bias),
        };
        let (b, c, h, w) = x.dims4()?;
        let (rows, columns) = (h / patch.height, w / patch.width);
        let patches = x
            .narrow(2, 0, rows * patch.height)?
            .narrow(3, 0, columns * patch.width)?
            .contiguous()?
            .reshape(&[b, c, rows, patch.height, columns, patch.width][..])?
            .permute([0, 2, 4, 1, 3, 5])?
            .contiguous()?
            .reshape((b, rows, columns, weight.dim(1)?))?;
        let y = ops::linear(&patches, weight, Some(bias))?;
        Ok(y.permute((0, 3, 1, 2))?.contiguous()?)
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
    projection: Projection,
    layers: Vec<Layer>,
    norm: LayerNorm,
    config: Config,
}

impl Vit {
    /// Builds the model from `weights`, whose root is the checkpoint's; new weights are drawn in the hub's layout.
    /// Position embeddings are not interpolated: another number of them is a fault. Call [`Weights::finish`] afterwards.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let c = config;
        let (image, patch) = (c.image_size, c.patch_size);
        if patch.height * patch.width == 0
            || image.height < patch.height
            || image.width < patch.width
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
        let positions = (image.height / patch.height) * (image.width / patch.width) + 1;
        let [outer, inner] = layout.patches;
        let init = Init::Normal(0.02);
        Ok(Self {
            cls_token: weights.get((1, 1, c.hidden_size), layout.class_token, init)?,
            position_embeddings: weights.get(
                (1, positions, c.hidden_size),
                layout.positions,
                init,
            )?,
            projection: Projection::new(c, &weights.pp(outer).pp(inner))?,
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

    /// The class token after the final norm, (b, hidden_size), of `pixel_values` (b, 3, height, width of
    /// [`Config::image_size`]), normalised by ImageNet's channel means and deviations for DINO.
    pub fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let (b, channels, h, w) = pixel_values.dims4()?;
        let Size { height, width } = c.image_size;
        if (channels, h, w) != (c.num_channels, height, width) {
            return Err(Error::invalid(
                format!("pixel values of shape {:?}", pixel_values.dims()),
                format!("this ViT takes (b, {}, {height}, {width})", c.num_channels),
            ));
        }
        let patches = self.projection.forward(
            &pixel_values.to_dtype(self.cls_token.dtype())?,
            c.patch_size,
        )?;
        let mut h = with_class_token(&patches, &parameter(&self.cls_token))?
            .broadcast_add(&parameter(&self.position_embeddings))?;
        for layer in &self.layers {
            h = layer.forward(&h, &Mask::None)?;
        }
        let class = h.narrow(1, 0, 1)?.contiguous()?;
        self.norm.forward(&class.reshape((b, c.hidden_size))?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn sizes_of_timms_checkpoint_are_read_from_its_weights() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.json");
        let timms =
            r#"{"architecture": "vit_small_patch16_224", "num_classes": 0, "num_features": 384}"#;
        std::fs::write(&config, timms).unwrap();
        let names: [(&str, &[usize]); 7] = [
            ("cls_token", &[1, 1, 128]),
            ("pos_embed", &[1, 10, 128]),
            ("patch_embed.proj.weight", &[128, 3, 4, 4]),
            ("blocks.0.attn.qkv.weight", &[384, 128]),
            ("blocks.0.attn.qkv.bias", &[384]),
            ("blocks.0.norm1.weight", &[128]),
            ("blocks.1.norm1.weight", &[128]),
        ];
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let mut tensors: HashMap<String, Tensor> = names
            .into_iter()
            .map(|(name, shape)| (name.to_string(), zeros(shape)))
            .collect();
        tensors.insert("blocks.0.mlp.fc1.weight".into(), zeros(&[96, 128]));
        let file = folder.path().join("model.safetensors");
        candle_core::safetensors::save(&tensors, &file).unwrap();
        let expected = Config {
            hidden_size: 128,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            intermediate_size: 96,
            layer_norm_eps: 1e-6,
            image_size: Size::square(12),
            patch_size: Size::square(4),
            ..Config::default()
        };
        assert_eq!(Config::read(folder.path()).unwrap(), expected);
        // A config of transformers is taken at its word.
        std::fs::write(&config, r#"{"hidden_size": 96, "image_size": [40, 24]}"#).unwrap();
        let read = Config::read(folder.path()).unwrap();
        assert_eq!((read.hidden_size, read.num_hidden_layers), (96, 12));
        assert_eq!((read.image_size.height, read.image_size.width), (40, 24));
        assert_eq!(read.image_size.side(), None);
    }
}
