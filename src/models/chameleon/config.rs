//! The configuration of Chameleon's transformer and of the images that Lumina-mGPT draws with it.

use std::collections::HashMap;

use serde::Deserialize;

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
    /// The feed-forward's activation; only `silu` is supported.
    pub hidden_act: String,
    /// The longest sequence in tokens. Default 4096.
    pub max_position_embeddings: usize,
    /// Added to the mean square in norms. Default 1e-5.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies, as transformers 4 writes it. Default 10000.
    pub rope_theta: f64,
    /// The same as transformers 5 writes it, which stands above `rope_theta`.
    pub rope_parameters: Option<Rope>,
    /// Other rotary embeddings of transformers 4; none is supported.
    pub rope_scaling: Option<serde_json::Value>,
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

/// Rotary embeddings as transformers 5 describes them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Rope {
    /// `default`; nothing else is supported.
    pub rope_type: String,
    /// Base of the frequencies.
    pub rope_theta: f64,
}

impl Default for Rope {
    fn default() -> Self {
        Self {
            rope_type: "default".into(),
            rope_theta: 10000.0,
        }
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
            hidden_act: "silu".into(),
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
        self.rope_parameters
            .as_ref()
            .map_or(self.rope_theta, |rope| rope.rope_theta)
    }

    /// Fails where the config asks for what [`super::Backbone`] is not, with all reasons.
    pub(super) fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        if self.hidden_act != "silu" {
            faults.push(format!(
                "hidden_act is {:?}, silu expected",
                self.hidden_act
            ));
        }
        let kind = self.rope_parameters.as_ref().map(|rope| &rope.rope_type);
        if kind.is_some_and(|kind| kind != "default") || self.rope_scaling.is_some() {
            faults.push("rotary embeddings are scaled".into());
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
