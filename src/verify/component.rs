//! The components by name, and what is particular to each: how its folder is recognised, what its layers are called,
//! and what runs it.

use std::path::Path;

use serde_json::Value;

use super::optimizers;
use super::runners::{self, Place, Runner};
use super::{Precision, text_to_image};
use crate::Result;
use crate::models::chameleon::files::{VQ_CONFIG, tokenizer_dir};
use crate::nn::Weights;

/// A model, a part of one, or an optimizer, that a reference implementation can be compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Component {
    /// LlamaGen's GPT.
    LlamagenGpt,
    /// LlamaGen's image tokenizer.
    LlamagenVq,
    /// The transformer of transformers' `ChameleonForConditionalGeneration`, whose image logits are not masked.
    Chameleon,
    /// Chameleon's image tokenizer, in Meta's layout or inside transformers'.
    ChameleonVq,
    /// transformers' `CLIPModel`.
    Clip,
    /// transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`.
    ClipText,
    /// The encoder of transformers' T5.
    T5,
    /// transformers' `ViTModel`, with DINO's weights.
    Dino,
    /// diffusers' `SD3Transformer2DModel`.
    Sd3Transformer,
    /// diffusers' `FluxTransformer2DModel`.
    FluxTransformer,
    /// diffusers' `UNet2DConditionModel`, as SDXL has it.
    SdxlUnet,
    /// diffusers' `AutoencoderKL`.
    Vae,
    /// A whole pipeline of diffusers: SDXL, SD3, SD3.5 or FLUX.1.
    TextToImage,
    /// torch's `AdamW`.
    Adamw,
    /// prodigyopt's `Prodigy`.
    Prodigy,
}

impl Component {
    /// All of them, in the order of the documentation.
    pub const ALL: [Component; 15] = [
        Component::LlamagenGpt,
        Component::LlamagenVq,
        Component::Chameleon,
        Component::ChameleonVq,
        Component::Clip,
        Component::ClipText,
        Component::T5,
        Component::Dino,
        Component::Sd3Transformer,
        Component::FluxTransformer,
        Component::SdxlUnet,
        Component::Vae,
        Component::TextToImage,
        Component::Adamw,
        Component::Prodigy,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Component::LlamagenGpt => "llamagen-gpt",
            Component::LlamagenVq => "llamagen-vq",
            Component::Chameleon => "chameleon",
            Component::ChameleonVq => "chameleon-vq",
            Component::Clip => "clip",
            Component::ClipText => "clip-text",
            Component::T5 => "t5",
            Component::Dino => "dino",
            Component::Sd3Transformer => "sd3-transformer",
            Component::FluxTransformer => "flux-transformer",
            Component::SdxlUnet => "sdxl-unet",
            Component::Vae => "vae",
            Component::TextToImage => "text-to-image",
            Component::Adamw => "adamw",
            Component::Prodigy => "prodigy",
        }
    }

    /// Builds the component from the files at `place`. The caller asks the weights and the adapter whether all fits.
    pub(super) fn open(self, place: &Place) -> Result<(Box<dyn Runner>, Weights)> {
        match self {
            Component::LlamagenGpt => runners::llamagen_gpt(place),
            Component::LlamagenVq => runners::llamagen_vq(place),
            Component::Chameleon => runners::chameleon(place),
            Component::ChameleonVq => runners::chameleon_vq(place),
            Component::Clip => runners::clip(place),
            Component::ClipText => runners::clip_text(place),
            Component::T5 => runners::t5(place),
            Component::Dino => runners::dino(place),
            Component::Sd3Transformer => runners::sd3_transformer(place),
            Component::FluxTransformer => runners::flux_transformer(place),
            Component::SdxlUnet => runners::sdxl_unet(place),
            Component::Vae => runners::vae(place),
            Component::TextToImage => text_to_image::open(place),
            Component::Adamw => optimizers::adamw(place),
            Component::Prodigy => optimizers::prodigy(place),
        }
    }

    /// Whether `config` is the `config.json` of such a component; `None` where it does not say.
    pub(super) fn recognises(self, config: &Value) -> Option<bool> {
        let text = |key: &str| config.get(key).and_then(Value::as_str);
        let has = |keys: &[&str]| keys.iter().any(|key| config.get(key).is_some());
        let kind = |kinds: &[&str]| text("model_type").map(|kind| kinds.contains(&kind));
        let class = |name: &str| text("_class_name").map(|class| class == name);
        let gpt = has(&["n_layer", "cls_token_num", "caption_dim"]);
        let vq = has(&["codebook_size", "codebook_embed_dim", "encoder_ch_mult"]);
        let foreign = has(&["_class_name", "architectures"]);
        match self {
            Component::LlamagenGpt => Some(gpt).filter(|_| gpt || vq || foreign),
            Component::LlamagenVq => Some(vq).filter(|_| gpt || vq || foreign),
            Component::Chameleon | Component::ChameleonVq => kind(&["chameleon"]),
            Component::Clip => kind(&["clip"]),
            Component::ClipText => kind(&["clip_text_model", "clip"]),
            Component::T5 => kind(&["t5", "mt5"]),
            Component::Dino => kind(&["vit"]),
            Component::Sd3Transformer => class("SD3Transformer2DModel"),
            Component::FluxTransformer => class("FluxTransformer2DModel"),
            Component::SdxlUnet => class("UNet2DConditionModel"),
            Component::Vae => class("AutoencoderKL"),
            Component::TextToImage => None,
            Component::Adamw => class("AdamW"),
            Component::Prodigy => class("Prodigy"),
        }
    }

    /// Whether `dir` holds such a component by files of its own, without a `config.json`.
    pub(super) fn is_in(self, dir: &Path) -> bool {
        match self {
            Component::ChameleonVq => tokenizer_dir(dir).join(VQ_CONFIG).is_file(),
            Component::TextToImage => text_to_image::is_in(dir),
            _ => false,
        }
    }

    /// The file that says what it is.
    pub(super) fn config_file(self) -> &'static str {
        match self {
            Component::TextToImage => text_to_image::INDEX,
            _ => "config.json",
        }
    }

    /// What an output's relative error may be where nothing else is asked for: a sampler's steps add theirs up.
    pub fn tolerance(self, precision: Precision) -> f64 {
        match self {
            Component::TextToImage => 10.0 * precision.tolerance(),
            _ => precision.tolerance(),
        }
    }

    /// The one name of the layer that may be called `path` in a file: libraries have renamed layers over time, and
    /// what they call them in memory, and so in adapters, is not always what they write into checkpoints.
    pub(super) fn layer(self, path: &str) -> String {
        self.layer_names()(path)
    }

    /// Whether the layer called `layer` is of the model around the component, such as T5's decoder, and of no effect
    /// on what the component gives.
    pub(super) fn is_without(self, layer: &str) -> bool {
        let beside: &[&str] = match self {
            Component::T5 => &["decoder.", "lm_head"],
            Component::Dino => &["pooler.", "classifier"],
            Component::ClipText => &["vision_model.", "visual_projection"],
            Component::Chameleon => &["vqmodel."],
            Component::LlamagenGpt
            | Component::LlamagenVq
            | Component::ChameleonVq
            | Component::Clip
            | Component::Sd3Transformer
            | Component::FluxTransformer
            | Component::SdxlUnet
            | Component::Vae
            | Component::TextToImage
            | Component::Adamw
            | Component::Prodigy => &[],
        };
        beside.iter().any(|start| layer.starts_with(start))
    }

    /// [`Component::layer`] as a function.
    pub(super) fn layer_names(self) -> fn(&str) -> String {
        match self {
            Component::ClipText => |path| stripped(path, "text_model."),
            Component::Chameleon => |path| stripped(path, "model."),
            Component::Dino => vit_layer,
            Component::Vae => vae_layer,
            Component::LlamagenGpt
            | Component::LlamagenVq
            | Component::ChameleonVq
            | Component::Clip
            | Component::T5
            | Component::Sd3Transformer
            | Component::FluxTransformer
            | Component::SdxlUnet
            | Component::TextToImage
            | Component::Adamw
            | Component::Prodigy => str::to_string,
        }
    }
}

fn stripped(path: &str, prefix: &str) -> String {
    path.strip_prefix(prefix).unwrap_or(path).to_string()
}

/// The names of transformers 5 in memory: those of the hub's files are older.
fn vit_layer(path: &str) -> String {
    let path = stripped(path, "vit.").replace("encoder.layer.", "layers.");
    [
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ]
    .iter()
    .fold(path, |path, (old, new)| path.replace(old, new))
}

/// Attention's names since diffusers 0.15.
fn vae_layer(path: &str) -> String {
    let renamed = [
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out.0"),
    ];
    for (old, new) in renamed {
        if let Some(place) = path.strip_suffix(old).filter(|place| place.ends_with('.')) {
            return format!("{place}{new}");
        }
    }
    path.to_string()
}

impl std::fmt::Display for Component {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Component {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.into_iter().find(|c| c.name() == text);
        found.ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|c| c.name()).collect();
            format!("the components are {}", names.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_names_of_a_vit_layer_come_to_one() {
        let old = "vit.encoder.layer.3.attention.attention.key";
        assert_eq!(vit_layer(old), "layers.3.attention.k_proj");
        let names = [
            "attention.output.dense",
            "output.dense",
            "intermediate.dense",
        ];
        let new = names.map(|name| vit_layer(&format!("encoder.layer.0.{name}")));
        assert_eq!(
            new,
            [
                "layers.0.attention.o_proj",
                "layers.0.mlp.fc2",
                "layers.0.mlp.fc1"
            ]
        );
        assert_eq!(vit_layer("layers.0.mlp.fc2"), "layers.0.mlp.fc2");
    }
}
