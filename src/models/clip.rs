//! CLIP (Radford et al. 2021, arXiv 2103.00020): both towers, or the text's alone, in the Hugging Face layout
//! (`CLIPModel`, `CLIPTextModel`, `CLIPTextModelWithProjection`).
//!
//! Checkpoints: `openai/clip-vit-base-patch32`; the `text_encoder` folders of diffusion models.

use candle_core::{D, Tensor};
use serde::Deserialize;

use super::encoder::{Activation, Layer, Names, Projections, Sizes, with_class_token};
use super::family::{Architecture, KnownModel};
use super::limits::{CHANNELS, Limited, Limits, POSITIONS, SIDE, VOCABULARY, WIDTH};
use super::reading::clip_reader;
use crate::config::{Family, FamilySettings, Kind, Optimizer, SamplingDefaults, TrainingDefaults};
use crate::hub::catalogue;
use crate::nn::ops::Padding;
use crate::nn::{Conv2d, Embedding, Init, LayerNorm, Linear, Mask, Weights, parameter};
use crate::{Error, Result};

/// CLIP, image and text.
pub const FAMILY: Family = Family::new(&FamilySettings {
    name: "CLIP",
    kind: Kind::Clip,
    // Evaluators do not train: a pipeline that makes one learn is refused where its role is read.
    training: TrainingDefaults::diffusion(Optimizer::Adamw, 1e-4, None),
    targets: &[],
    sampling: SamplingDefaults::NONE,
});

/// CLIP in transformers' layout.
pub static ARCHITECTURE: Architecture = Architecture {
    family: FAMILY,
    recognises: |layout| layout.is_model_type("clip"),
    models: &[
        KnownModel {
            name: "nano-clip",
            resolution: None,
            directory: "datasets/nano/checkpoints/clip",
            hub: None,
            files: &["config.json", "model.safetensors"],
        },
        KnownModel {
            name: "clip-vit-base-patch32",
            resolution: None,
            directory: "datasets/checkpoints/clip-vit-base-patch32",
            hub: Some(&catalogue::CLIP_VIT_BASE_PATCH32),
            files: &[],
        },
    ],
    readers: |dir, _, _| Ok(vec![clip_reader(dir)?]),
    learner: None,
};

/// The text tower's part of `config.json`, with Hugging Face's defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    /// Number of tokens. Default 49408.
    pub vocab_size: usize,
    /// Width of the residual stream. Default 512.
    pub hidden_size: usize,
    /// Width of the feed-forward's hidden layer. Default 2048.
    pub intermediate_size: usize,
    /// Width of the projection, where the tower stands alone and has one. Default 512.
    pub projection_dim: usize,
    /// Number of layers. Default 12.
    pub num_hidden_layers: usize,
    /// Heads of each attention; they divide `hidden_size`. Default 8.
    pub num_attention_heads: usize,
    /// Longest text in tokens. Default 77.
    pub max_position_embeddings: usize,
    /// The feed-forward's activation. Default QuickGelu.
    pub hidden_act: Activation,
    /// Added to the variance in norms. Default 1e-5.
    pub layer_norm_eps: f64,
    /// 2 in old configs, where the pooled position is that of the largest id. Default 49407.
    pub eos_token_id: u32,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
        }
    }
}

/// The vision tower's part of `config.json`, with Hugging Face's defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Width of the residual stream. Default 768.
    pub hidden_size: usize,
    /// Width of the feed-forward's hidden layer. Default 3072.
    pub intermediate_size: usize,
    /// Number of layers. Default 12.
    pub num_hidden_layers: usize,
    /// Heads of each attention; they divide `hidden_size`. Default 12.
    pub num_attention_heads: usize,
    /// Channels of an image. Default 3.
    pub num_channels: usize,
    /// Side of the square images in pixels. Default 224.
    pub image_size: usize,
    /// Side of a patch in pixels. Default 32.
    pub patch_size: usize,
    /// The feed-forward's activation. Default QuickGelu.
    pub hidden_act: Activation,
    /// Added to the variance in norms. Default 1e-5.
    pub layer_norm_eps: f64,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

/// `config.json` of a `CLIPModel`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The text tower.
    pub text_config: TextConfig,
    /// The vision tower.
    pub vision_config: VisionConfig,
    /// Width of the space that texts and images share. Default 512.
    pub projection_dim: usize,
    /// Start of the logarithm of the factor on similarities. Default 2.6592.
    pub logit_scale_init_value: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            text_config: TextConfig::default(),
            vision_config: VisionConfig::default(),
            projection_dim: 512,
            logit_scale_init_value: 2.6592,
        }
    }
}

impl Limited for TextConfig {
    fn limit(&self, limits: &mut Limits) {
        limits.within("vocab_size", self.vocab_size, &VOCABULARY);
        limits.encoder(
            [self.hidden_size, self.intermediate_size],
            self.num_hidden_layers,
            self.num_attention_heads,
            self.layer_norm_eps,
        );
        limits.within("projection_dim", self.projection_dim, &WIDTH);
        let positions = self.max_position_embeddings;
        limits.within("max_position_embeddings", positions, &POSITIONS);
    }
}

impl Limited for VisionConfig {
    fn limit(&self, limits: &mut Limits) {
        limits.encoder(
            [self.hidden_size, self.intermediate_size],
            self.num_hidden_layers,
            self.num_attention_heads,
            self.layer_norm_eps,
        );
        limits.within("num_channels", self.num_channels, &CHANNELS);
        limits.within("image_size", self.image_size, &SIDE);
        limits.within("patch_size", self.patch_size, &(1..=self.image_size));
    }
}

impl Limited for Config {
    fn limit(&self, limits: &mut Limits) {
        self.text_config.limit(limits);
        self.vision_config.limit(limits);
        limits.within("projection_dim", self.projection_dim, &WIDTH);
    }
}

const NAMES: Names = Names {
    norm1: "layer_norm1",
    attention: Projections::Separate(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    out: "self_attn.out_proj",
    norm2: "layer_norm2",
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
};

fn layers(sizes: &Sizes, weights: &Weights) -> Result<Vec<Layer>> {
    if sizes.heads == 0 || !sizes.width.is_multiple_of(sizes.heads) {
        return Err(Error::invalid(
            format!(
                "{} attention heads for a width of {}",
                sizes.heads, sizes.width
            ),
            "the width must be a multiple of the number of heads",
        ));
    }
    let weights = weights.pp("encoder").pp("layers");
    (0..sizes.layers)
        .map(|i| Layer::new(sizes, &NAMES, &weights.pp(i)))
        .collect()
}

fn projection(inputs: usize, outputs: usize, weights: &Weights) -> Result<Linear> {
    let init = Init::Normal((inputs as f64).powf(-0.5));
    Linear::with_init(inputs, outputs, false, init, weights)
}

/// What the text tower says of a batch of texts.
#[derive(Debug, Clone)]
pub struct TextOutput {
    /// Hidden states entering the last layer, (b, n, hidden_size), without the final norm.
    pub penultimate: Tensor,
    /// The final norm's output at the end of the text, (b, hidden_size), or (b, projection_dim) where the tower has a
    /// projection. Not normalised.
    pub pooled: Tensor,
}

/// The text tower, with its projection where the checkpoint has one.
pub struct TextModel {
    token_embedding: Embedding,
    position_embedding: Tensor,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
    projection: Option<Linear>,
    config: TextConfig,
}

impl TextModel {
    /// The tower that stands alone in a checkpoint, or inside a `CLIPModel`, with `text_projection` where the
    /// checkpoint has it. `weights` is the checkpoint's root; its names start with `text_model.` or, as newer
    /// versions of transformers write a `CLIPTextModel`, without it.
    pub fn new(config: &TextConfig, weights: &Weights) -> Result<Self> {
        let bare = weights.contains("embeddings.token_embedding.weight");
        let mut tower = Self::tower(
            config,
            &if bare {
                weights.clone()
            } else {
                weights.pp("text_model")
            },
        )?;
        if let Some(shape) = weights.dims("text_projection.weight") {
            // Inside a CLIPModel the width is the outer config's; the file knows it either way.
            let outputs = shape.first().copied().unwrap_or(config.projection_dim);
            tower.projection = Some(projection(
                config.hidden_size,
                outputs,
                &weights.pp("text_projection"),
            )?);
        }
        Ok(tower)
    }

    fn tower(c: &TextConfig, weights: &Weights) -> Result<Self> {
        let sizes = Sizes {
            width: c.hidden_size,
            hidden: c.intermediate_size,
            heads: c.num_attention_heads,
            layers: c.num_hidden_layers,
            eps: c.layer_norm_eps,
            activation: c.hidden_act,
            qkv_bias: true,
        };
        let embeddings = weights.pp("embeddings");
        Ok(Self {
            token_embedding: Embedding::new(
                c.vocab_size,
                c.hidden_size,
                &embeddings.pp("token_embedding"),
            )?,
            position_embedding: embeddings.pp("position_embedding").get(
                (c.max_position_embeddings, c.hidden_size),
                "weight",
                Init::Normal(0.02),
            )?,
            layers: layers(&sizes, weights)?,
            final_layer_norm: LayerNorm::new(
                c.hidden_size,
                c.layer_norm_eps,
                &weights.pp("final_layer_norm"),
            )?,
            projection: None,
            config: c.clone(),
        })
    }

    /// `input_ids` (b, n) of u32 with n at most `max_position_embeddings`, start and end of text included.
    pub fn forward(&self, input_ids: &Tensor) -> Result<TextOutput> {
        let (b, n) = input_ids.dims2()?;
        if n == 0 || n > self.config.max_position_embeddings {
            return Err(Error::invalid(
                format!("{n} text tokens"),
                format!("CLIP takes 1 to {}", self.config.max_position_embeddings),
            ));
        }
        let positions = parameter(&self.position_embedding).narrow(0, 0, n)?;
        let mut h = self
            .token_embedding
            .forward(input_ids)?
            .broadcast_add(&positions)?;
        let mut penultimate = h.clone();
        for layer in &self.layers {
            penultimate = h;
            h = layer.forward(&penultimate, &Mask::Causal)?;
        }
        let h = self.final_layer_norm.forward(&h)?;
        let ends: Vec<u32> = input_ids
            .to_vec2::<u32>()?
            .iter()
            .enumerate()
            .map(|(row, ids)| (row * n + end_of_text(ids, self.config.eos_token_id)) as u32)
            .collect();
        let ends = Tensor::new(ends, h.device())?;
        let pooled = h
            .reshape((b * n, self.config.hidden_size))?
            .index_select(&ends, 0)?;
        let pooled = match &self.projection {
            Some(projection) => projection.forward(&pooled)?,
            None => pooled,
        };
        Ok(TextOutput {
            penultimate,
            pooled,
        })
    }
}

/// The position whose state stands for the text: the first end of text, or, for the configs that have 2 as its id,
/// the first of the largest ids. 0 where there is none, as in the reference.
fn end_of_text(ids: &[u32], eos_token_id: u32) -> usize {
    let wanted = if eos_token_id == 2 {
        ids.iter().copied().max().unwrap_or(0)
    } else {
        eos_token_id
    };
    ids.iter().position(|&id| id == wanted).unwrap_or(0)
}

/// The vision tower with its projection.
struct VisionModel {
    class_embedding: Tensor,
    patch_embedding: Conv2d,
    position_embedding: Tensor,
    pre_layrnorm: LayerNorm,
    layers: Vec<Layer>,
    post_layernorm: LayerNorm,
    projection: Linear,
    config: VisionConfig,
}

impl VisionModel {
    /// `weights` is the root of a `CLIPModel`'s checkpoint.
    fn new(c: &VisionConfig, outputs: usize, weights: &Weights) -> Result<Self> {
        let sizes = Sizes {
            width: c.hidden_size,
            hidden: c.intermediate_size,
            heads: c.num_attention_heads,
            layers: c.num_hidden_layers,
            eps: c.layer_norm_eps,
            activation: c.hidden_act,
            qkv_bias: true,
        };
        if c.patch_size == 0 || c.image_size < c.patch_size {
            return Err(Error::invalid(
                format!("patches of {} in images of {}", c.patch_size, c.image_size),
                "a patch must fit into the image",
            ));
        }
        let tower = weights.pp("vision_model");
        let embeddings = tower.pp("embeddings");
        let positions = (c.image_size / c.patch_size).pow(2) + 1;
        let norm = |name| LayerNorm::new(c.hidden_size, c.layer_norm_eps, &tower.pp(name));
        let wide = Init::Normal((c.hidden_size as f64).powf(-0.5));
        Ok(Self {
            class_embedding: embeddings.get(c.hidden_size, "class_embedding", wide)?,
            patch_embedding: Conv2d::without_bias(
                c.num_channels,
                c.hidden_size,
                c.patch_size,
                c.patch_size,
                Padding::Same(0),
                &embeddings.pp("patch_embedding"),
            )?,
            position_embedding: embeddings.pp("position_embedding").get(
                (positions, c.hidden_size),
                "weight",
                Init::Normal(0.02),
            )?,
            // Spelt so in the published files.
            pre_layrnorm: norm("pre_layrnorm")?,
            layers: layers(&sizes, &tower)?,
            post_layernorm: norm("post_layernorm")?,
            projection: projection(c.hidden_size, outputs, &weights.pp("visual_projection"))?,
            config: c.clone(),
        })
    }

    /// Projected, not normalised embeddings (b, projection_dim) of `pixel_values` (b, 3, image_size, image_size),
    /// normalised by CLIP's channel means and deviations.
    fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let (b, channels, h, w) = pixel_values.dims4()?;
        if (channels, h, w) != (c.num_channels, c.image_size, c.image_size) {
            return Err(Error::invalid(
                format!("pixel values of shape {:?}", pixel_values.dims()),
                format!(
                    "this CLIP takes (b, {}, {s}, {s})",
                    c.num_channels,
                    s = c.image_size
                ),
            ));
        }
        let patches = self
            .patch_embedding
            .forward(&pixel_values.to_dtype(self.class_embedding.dtype())?)?;
        let h = with_class_token(&patches, &parameter(&self.class_embedding))?
            .broadcast_add(&parameter(&self.position_embedding))?;
        let mut h = self.pre_layrnorm.forward(&h)?;
        for layer in &self.layers {
            h = layer.forward(&h, &Mask::None)?;
        }
        let class = h.narrow(1, 0, 1)?.contiguous()?;
        let class = class.reshape((b, c.hidden_size))?;
        self.projection
            .forward(&self.post_layernorm.forward(&class)?)
    }
}

/// Both towers.
pub struct Clip {
    text: TextModel,
    vision: VisionModel,
    logit_scale: Tensor,
}

impl Clip {
    /// `weights` is the root of a `CLIPModel`'s checkpoint. Call [`Weights::finish`] afterwards.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let text = &config.text_config;
        let mut tower = TextModel::tower(text, &weights.pp("text_model"))?;
        tower.projection = Some(projection(
            text.hidden_size,
            config.projection_dim,
            &weights.pp("text_projection"),
        )?);
        Ok(Self {
            text: tower,
            vision: VisionModel::new(&config.vision_config, config.projection_dim, weights)?,
            logit_scale: weights.get(
                (),
                "logit_scale",
                Init::Constant(config.logit_scale_init_value),
            )?,
        })
    }

    /// Logarithm of the factor on similarities, a scalar; training the towers trains it.
    pub fn logit_scale(&self) -> Tensor {
        parameter(&self.logit_scale)
    }

    /// Embeddings (b, projection_dim) of unit length of texts; `input_ids` as in [`TextModel::forward`].
    pub fn encode_text(&self, input_ids: &Tensor) -> Result<Tensor> {
        normalised(&self.text.forward(input_ids)?.pooled)
    }

    /// Embeddings (b, projection_dim) of unit length of images; `pixel_values` (b, 3, image_size, image_size),
    /// normalised by CLIP's channel means and deviations.
    pub fn encode_image(&self, pixel_values: &Tensor) -> Result<Tensor> {
        normalised(&self.vision.forward(pixel_values)?)
    }
}

/// Rows of `x` (b, d) divided by their lengths.
pub fn normalised(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?)
}
