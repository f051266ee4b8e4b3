//! The configuration of Chameleon's transformer and of the images that Lumina-mGPT draws with it.

use std::collections::HashMap;

use serde::Deserialize;

use crate::models::encoder::Activation;
use crate::models::limits::{HEADS, LAYERS, Limited, Limits, POSITIONS, SIDE, VOCABULARY, WIDTH};
use crate::{Error, Result};

/// `config.json` of a Hugging Face `ChameleonForConditionalGeneration`, transformers 4 or 5, with Chameleon-7B's
/// numbers as defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Number of tokens, of text and of images together. Default 65536.
    pub vocab_size: usize,
    /// Width of the residual stream. Default 4096.
    pub hidden_size: usize,
    /// Width of the feed-forward's hidden layer. Default 11008.
    pub intermediate_size: usize,
    /// Number of layers. Default 32.
    pub num_hidden_layers: usize,
    /// Number of query heads. Default 32.
    pub num_attention_heads: usize,
    /// Number of key and value heads; as many as there are query heads where absent.
    pub num_key_value_heads: Option<usize>,
    /// The feed-forward's activation. Default Silu.
    pub hidden_act: Activation,
    /// The longest sequence in tokens that the model learns and draws. Default 4096.
    pub max_position_embeddings: usize,
    /// Added to the mean square in norms. Default 1e-5.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies where the next two name none. Default 10000.
    pub rope_theta: f64,
    /// Kind and base of the rotary embeddings, as transformers 5 writes them.
    pub rope_parameters: Option<Rope>,
    /// The same as transformers 4 writes them, which stands above `rope_parameters`.
    pub rope_scaling: Option<Rope>,
    /// Whether the projections of attention have a bias. Default false.
    pub attention_bias: bool,
    /// Whether those of the feed-forward have one. Default false.
    pub mlp_bias: bool,
    /// Whether norms follow attention and feed-forward instead of preceding them, as in Chameleon-34B. Default false.
    pub swin_norm: bool,
    /// Whether the embeddings also give the logits. Default false.
    pub tie_word_embeddings: bool,
    /// Token names and ids.
    pub vocabulary_map: Option<HashMap<String, u32>>,
    /// The image tokenizer's sizes, see [`super::vq::Config::from_vq_config`].
    pub vq_config: serde_json::Value,
    /// Pixels of one unit of the height and width tokens. Not in published files: Lumina-mGPT's is 32, the default.
    pub patch_size: usize,
    /// Side in pixels of the square images that are drawn where nothing else is asked for. Not in published files;
    /// default 768.
    pub image_size: usize,
}

/// Rotary embeddings as transformers describes them.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Rope {
    /// Only `default` is supported, which is also what an absent kind means.
    pub rope_type: Option<String>,
    /// The older name of `rope_type`.
    pub r#type: Option<String>,
    /// Base of the frequencies.
    pub rope_theta: Option<f64>,
}

impl Rope {
    fn kind(&self) -> Option<&str> {
        self.rope_type.as_deref().or(self.r#type.as_deref())
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 65536,
            hidden_size: 4096,
            intermediate_size: 11008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            hidden_act: Activation::Silu,
            max_position_embeddings: 4096,
            rms_norm_eps: 1e-5,
            rope_theta: 10000.0,
            rope_parameters: None,
            rope_scaling: None,
            attention_bias: false,
            mlp_bias: false,
            swin_norm: false,
            tie_word_embeddings: false,
            vocabulary_map: None,
            vq_config: serde_json::Value::Object(serde_json::Map::new()),
            patch_size: 32,
            image_size: 768,
        }
    }
}

impl Limited for Config {
    fn limit(&self, limits: &mut Limits) {
        limits.within("vocab_size", self.vocab_size, &VOCABULARY);
        limits.within("hidden_size", self.hidden_size, &WIDTH);
        limits.within("intermediate_size", self.intermediate_size, &WIDTH);
        limits.within("num_hidden_layers", self.num_hidden_layers, &LAYERS);
        limits.within("num_attention_heads", self.num_attention_heads, &HEADS);
        limits.within("num_key_value_heads", self.kv_heads(), &HEADS);
        let positions = self.max_position_embeddings;
        limits.within("max_position_embeddings", positions, &POSITIONS);
        limits.from_zero("rms_norm_eps", self.rms_norm_eps);
        limits.above_zero("rope_theta", self.rope_base());
        limits.within("patch_size", self.patch_size, &SIDE);
        limits.within("image_size", self.image_size, &SIDE);
    }
}

impl Config {
    /// Number of key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads.max(1)
    }

    /// Base of the rotary frequencies.
    pub fn rope_base(&self) -> f64 {
        let named = self.rope().and_then(|rope| rope.rope_theta);
        named.unwrap_or(self.rope_theta)
    }

    fn rope(&self) -> Option<&Rope> {
        // An empty map says as little as none.
        let scaling = self.rope_scaling.as_ref();
        let scaling = scaling.filter(|rope| **rope != Rope::default());
        scaling.or(self.rope_parameters.as_ref())
    }

    /// Fails where the config asks for what [`super::Backbone`] is not, with all reasons.
    pub(super) fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        let kind = self.rope().and_then(Rope::kind);
        if let Some(kind) = kind.filter(|kind| *kind != "default") {
            faults.push(format!("rotary embeddings are {kind}, default expected"));
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.kv_heads());
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            faults.push(format!(
                "num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            ));
        } else if !self.hidden_size.is_multiple_of(heads) || !self.head_dim().is_multiple_of(2) {
            faults.push(format!(
                "hidden_size {} does not give {heads} heads of an even width",
                self.hidden_size
            ));
        }
        if faults.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(
            format!("config of a Chameleon model: {}", faults.join("; ")),
            "only Chameleon's and Lumina-mGPT's architecture is supported",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: serde_json::Value) -> Config {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_rotary_base_is_found_wherever_transformers_looks_for_it() {
        for (json, base) in [
            (serde_json::json!({}), 1e4),
            (serde_json::json!({"rope_theta": 500.0}), 500.0),
            (
                serde_json::json!({"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}}),
                500.0,
            ),
            (
                serde_json::json!({"rope_theta": 500.0, "rope_parameters": {"rope_theta": 20}}),
                20.0,
            ),
            (
                serde_json::json!({"rope_scaling": {"type": "default", "rope_theta": 7}, "rope_theta": 1}),
                7.0,
            ),
            (
                serde_json::json!({"rope_scaling": {}, "rope_parameters": {"rope_theta": 20}}),
                20.0,
            ),
        ] {
            let config = config(json.clone());
            config.validate().unwrap();
            assert_eq!(config.rope_base(), base, "{json}");
        }
    }

    #[test]
    fn other_rotary_embeddings_are_refused_by_their_name() {
        for json in [
            serde_json::json!({"rope_parameters": {"type": "linear", "factor": 2.0}}),
            serde_json::json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ] {
            let error = config(json).validate().unwrap_err().to_string();
            assert!(error.contains("linear"), "{error}");
        }
    }
}
