//! The configuration of LlamaGen's GPT.

use serde::{Deserialize, Serialize};

use crate::models::limits::{HEADS, LAYERS, Limited, Limits, POSITIONS, VOCABULARY, WIDTH};
use crate::{Error, Result};

/// `config.json`: the fields of the reference's `ModelArgs` that matter here, with its text-to-image defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Width of the residual stream.
    pub dim: usize,
    /// Number of blocks.
    pub n_layer: usize,
    /// Number of query heads.
    pub n_head: usize,
    /// Number of key and value heads; `n_head` where absent.
    pub n_kv_head: Option<usize>,
    /// The feed-forward's width is rounded up to a multiple of this.
    pub multiple_of: usize,
    /// Factor on the feed-forward's width before rounding.
    pub ffn_dim_multiplier: Option<f64>,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// Added to the mean square in norms.
    pub norm_eps: f64,
    /// Dropout after the embeddings, in training.
    pub token_dropout_p: f64,
    /// Dropout on attention probabilities; training supports only 0, the published value.
    pub attn_dropout_p: f64,
    /// Dropout after the attention's output projection, in training.
    pub resid_dropout_p: f64,
    /// Dropout after the feed-forward, in training.
    pub ffn_dropout_p: f64,
    /// Width of the caption features.
    pub caption_dim: usize,
    /// Share of training samples whose caption is replaced by the null condition.
    pub class_dropout_prob: f64,
    /// `t2i`; nothing else is supported.
    pub model_type: String,
    /// Number of image tokens in the codebook.
    pub vocab_size: usize,
    /// Number of caption positions.
    pub cls_token_num: usize,
    /// Number of tokens of an image; a square.
    pub block_size: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            dim: 4096,
            n_layer: 32,
            n_head: 32,
            n_kv_head: None,
            multiple_of: 256,
            ffn_dim_multiplier: None,
            rope_base: 10000.0,
            norm_eps: 1e-5,
            token_dropout_p: 0.1,
            attn_dropout_p: 0.0,
            resid_dropout_p: 0.1,
            ffn_dropout_p: 0.1,
            caption_dim: 2048,
            class_dropout_prob: 0.1,
            model_type: "t2i".into(),
            vocab_size: 16384,
            cls_token_num: 120,
            block_size: 256,
        }
    }
}

impl Limited for Config {
    fn limit(&self, limits: &mut Limits) {
        limits.within("dim", self.dim, &WIDTH);
        limits.within("n_layer", self.n_layer, &LAYERS);
        limits.within("n_head", self.n_head, &HEADS);
        limits.within("n_kv_head", self.kv_heads(), &HEADS);
        limits.within("multiple_of", self.multiple_of, &WIDTH);
        if let Some(factor) = self.ffn_dim_multiplier {
            limits.above_zero("ffn_dim_multiplier", factor);
            limits.within("ffn_dim_multiplier", factor as usize, &(0..=16));
        }
        limits.above_zero("rope_base", self.rope_base);
        limits.from_zero("norm_eps", self.norm_eps);
        limits.within("caption_dim", self.caption_dim, &WIDTH);
        limits.within("vocab_size", self.vocab_size, &VOCABULARY);
        limits.within("cls_token_num", self.cls_token_num, &POSITIONS);
        limits.within("block_size", self.block_size, &POSITIONS);
        for (name, share) in [
            ("token_dropout_p", self.token_dropout_p),
            ("attn_dropout_p", self.attn_dropout_p),
            ("resid_dropout_p", self.resid_dropout_p),
            ("ffn_dropout_p", self.ffn_dropout_p),
        ] {
            limits.share(name, share);
        }
    }
}

impl Config {
    /// Width of the feed-forward's hidden layer.
    pub fn hidden_dim(&self) -> usize {
        let mut hidden = 8 * self.dim / 3;
        if let Some(factor) = self.ffn_dim_multiplier {
            hidden = (factor * hidden as f64) as usize;
        }
        hidden.next_multiple_of(self.multiple_of)
    }

    /// Number of key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.n_kv_head.unwrap_or(self.n_head)
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.dim / self.n_head
    }

    /// Side of the square of image tokens.
    pub fn grid(&self) -> usize {
        self.block_size.isqrt()
    }

    /// Whether learning draws random numbers for dropout.
    pub fn drops_out(&self) -> bool {
        let all = [
            self.token_dropout_p,
            self.attn_dropout_p,
            self.resid_dropout_p,
            self.ffn_dropout_p,
        ];
        all.iter().any(|p| *p != 0.0)
    }

    /// Fails where the config asks for what [`super::gpt::Gpt`] is not.
    pub(super) fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        if self.model_type != "t2i" {
            faults.push(format!("model_type is {:?}, t2i expected", self.model_type));
        }
        if self.grid() * self.grid() != self.block_size {
            faults.push(format!("block_size {} is not a square", self.block_size));
        }
        if self.n_head == 0 || self.kv_heads() == 0 || !self.n_head.is_multiple_of(self.kv_heads())
        {
            faults.push(format!(
                "n_head {} is not a multiple of n_kv_head {}",
                self.n_head,
                self.kv_heads()
            ));
        } else if !self.dim.is_multiple_of(self.n_head) || !self.head_dim().is_multiple_of(4) {
            faults.push(format!(
                "dim {} does not give {} heads of a width that is a multiple of 4",
                self.dim, self.n_head
            ));
        }
        if self.multiple_of == 0 || self.cls_token_num == 0 {
            faults.push("multiple_of and cls_token_num must be at least 1".into());
        }
        if faults.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(
            format!("config of a LlamaGen GPT: {}", faults.join("; ")),
            "only LlamaGen's text-to-image models are supported",
        ))
    }
}
