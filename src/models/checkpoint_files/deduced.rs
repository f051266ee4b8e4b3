//! Configs of parts in single files, which have none: sizes are those of the tensors, everything else is what the family is
//! published with.

use serde_json::{Value, json};

use super::names::Names;
use crate::hub::parts::{Network, Part};

/// Width of an attention head where no tensor tells it.
const HEAD: usize = 64;

/// Names and shapes of a part's tensors, in our names but for [`Names::layers`].
pub struct Shapes {
    tensors: Vec<(String, Vec<usize>)>,
    layers: usize,
}

impl Shapes {
    /// Those of the `tensors` of a file.
    pub fn new(tensors: &[(String, Vec<usize>)], names: &Names) -> Self {
        let ours = tensors.iter().flat_map(|(name, dims)| {
            let cuts = names.ours(name, dims).into_iter();
            cuts.map(|(ours, cut)| (ours, cut.shape(dims)))
                .collect::<Vec<_>>()
        });
        Self {
            tensors: ours.collect(),
            layers: names.layers(),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.iter().any(|(known, _)| known == name)
    }

    /// A size of a tensor, 0 where it is not there: what is built of it is then told to be missing.
    fn size(&self, name: &str, dimension: usize) -> usize {
        let found = self.tensors.iter().find(|(known, _)| known == name);
        let size = found.and_then(|(_, dims)| dims.get(dimension));
        size.copied().unwrap_or(0)
    }

    /// How many numbers follow `start` in names, counted from 0.
    fn count(&self, start: &str) -> usize {
        let numbers = self.tensors.iter().filter_map(|(name, _)| {
            let (number, _) = name.strip_prefix(start)?.split_once('.')?;
            number.parse::<usize>().ok()
        });
        numbers.max().map_or(0, |most| most.saturating_add(1))
    }

    /// The config of diffusers or transformers for `part` of a model of `family`.
    pub fn config(&self, part: Part, family: Network) -> Value {
        match part {
            Part::Denoiser(Network::Flux) => self.flux(),
            Part::Denoiser(Network::Sd3) => self.sd3(),
            Part::Denoiser(_) => self.sdxl(),
            Part::Vae => self.vae(family),
            Part::ClipL => self.clip("quick_gelu"),
            Part::ClipG => self.clip("gelu"),
            Part::T5 => self.t5(),
        }
    }

    fn flux(&self) -> Value {
        let query = "transformer_blocks.0.attn.norm_q.weight";
        let head = self.size(query, 0).max(1);
        // A position's index takes an eighth of a head, its row and column the rest: 16, 56, 56 of 128.
        let first = head / 8;
        let rest = (head - first) / 2;
        json!({
            "in_channels": self.size("x_embedder.weight", 1),
            "out_channels": self.size("proj_out.weight", 0),
            "num_layers": self.count("transformer_blocks."),
            "num_single_layers": self.count("single_transformer_blocks."),
            "attention_head_dim": head,
            "num_attention_heads": self.size("x_embedder.weight", 0) / head,
            "joint_attention_dim": self.size("context_embedder.weight", 1),
            "pooled_projection_dim": self.size("time_text_embed.text_embedder.linear_1.weight", 1),
            "guidance_embeds": self.has("time_text_embed.guidance_embedder.linear_1.weight"),
            "axes_dims_rope": [first, rest, rest],
        })
    }

    fn sd3(&self) -> Value {
        let normed = self.size("transformer_blocks.0.attn.norm_q.weight", 0);
        let head = if normed > 0 { normed } else { HEAD };
        let width = self.size("pos_embed.proj.weight", 0);
        let side = self.size("pos_embed.pos_embed", 1).isqrt();
        let patch = self.size("pos_embed.proj.weight", 2).max(1);
        let layers = self.count("transformer_blocks.");
        let dual = |i: &usize| self.has(&format!("transformer_blocks.{i}.attn2.to_q.weight"));
        let dual: Vec<usize> = (0..layers).filter(dual).collect();
        json!({
            "sample_size": 128,
            "patch_size": patch,
            "in_channels": self.size("pos_embed.proj.weight", 1),
            "out_channels": self.size("proj_out.weight", 0) / (patch * patch),
            "num_layers": layers,
            "attention_head_dim": head,
            "num_attention_heads": width / head,
            "joint_attention_dim": self.size("context_embedder.weight", 1),
            "caption_projection_dim": width,
            "pooled_projection_dim": self.size("time_text_embed.text_embedder.linear_1.weight", 1),
            "pos_embed_max_size": side,
            "dual_attention_layers": dual,
            "qk_norm": (normed > 0).then_some("rms_norm"),
        })
    }

    fn sdxl(&self) -> Value {
        let levels = self.count("down_blocks.");
        let width = |level: usize| {
            let conv = format!("down_blocks.{level}.resnets.0.conv1.weight");
            self.size(&conv, 0)
        };
        let widths: Vec<usize> = (0..levels).map(width).collect();
        let depth = |level: usize| {
            let blocks = format!("down_blocks.{level}.attentions.0.transformer_blocks.");
            self.count(&blocks)
        };
        let depths: Vec<usize> = (0..levels).map(depth).collect();
        let kind = |depth: &usize, way: &str| match depth {
            0 => format!("{way}Block2D"),
            _ => format!("CrossAttn{way}Block2D"),
        };
        let heads: Vec<usize> = widths.iter().map(|width| (width / HEAD).max(1)).collect();
        let down: Vec<String> = depths.iter().map(|depth| kind(depth, "Down")).collect();
        let up: Vec<String> = depths.iter().rev().map(|depth| kind(depth, "Up")).collect();
        let text = self
            .tensors
            .iter()
            .find(|(name, _)| name.ends_with(".attn2.to_k.weight"));
        json!({
            "sample_size": 128,
            "in_channels": self.size("conv_in.weight", 1),
            "out_channels": self.size("conv_out.weight", 0),
            "down_block_types": down,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": up,
            "block_out_channels": widths,
            "layers_per_block": self.layers,
            "cross_attention_dim": text.and_then(|(_, dims)| dims.get(1)),
            "transformer_layers_per_block": depths.iter().map(|depth| *depth.max(&1)).collect::<Vec<_>>(),
            "attention_head_dim": heads,
            "use_linear_projection": true,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": self.size("add_embedding.linear_1.weight", 1),
        })
    }

    fn vae(&self, family: Network) -> Value {
        let levels = self.count("encoder.down_blocks.");
        let width = |level: usize| {
            let conv = format!("encoder.down_blocks.{level}.resnets.0.conv1.weight");
            self.size(&conv, 0)
        };
        let (scale, shift) = match family {
            Network::Flux => (0.3611, Some(0.1159)),
            Network::Sd3 => (1.5305, Some(0.0609)),
            _ => (0.13025, None),
        };
        json!({
            "block_out_channels": (0..levels).map(width).collect::<Vec<_>>(),
            "down_block_types": vec!["DownEncoderBlock2D"; levels],
            "up_block_types": vec!["UpDecoderBlock2D"; levels],
            "layers_per_block": self.count("encoder.down_blocks.0.resnets."),
            "latent_channels": self.size("decoder.conv_in.weight", 1),
            "scaling_factor": scale,
            "shift_factor": shift,
            "use_quant_conv": self.has("quant_conv.weight"),
            "use_post_quant_conv": self.has("post_quant_conv.weight"),
            "mid_block_add_attention": self.has("encoder.mid_block.attentions.0.to_q.weight"),
        })
    }

    fn clip(&self, activation: &str) -> Value {
        let table = "text_model.embeddings.token_embedding.weight";
        let first = "text_model.encoder.layers.0.mlp.fc1.weight";
        let width = self.size(table, 1);
        json!({
            "vocab_size": self.size(table, 0),
            "hidden_size": width,
            "intermediate_size": self.size(first, 0),
            "projection_dim": width,
            "num_hidden_layers": self.count("text_model.encoder.layers."),
            "num_attention_heads": (width / HEAD).max(1),
            "max_position_embeddings": self.size("text_model.embeddings.position_embedding.weight", 0),
            "hidden_act": activation,
        })
    }

    fn t5(&self) -> Value {
        let first = "encoder.block.0.layer";
        let bias = format!("{first}.0.SelfAttention.relative_attention_bias.weight");
        let heads = self.size(&bias, 1);
        let query = self.size(&format!("{first}.0.SelfAttention.q.weight"), 0);
        let gated = self.has(&format!("{first}.1.DenseReluDense.wi_0.weight"));
        let table = match self.has("shared.weight") {
            true => "shared.weight",
            false => "encoder.embed_tokens.weight",
        };
        json!({
            "vocab_size": self.size(table, 0),
            "d_model": self.size(table, 1),
            "d_kv": query / heads.max(1),
            "d_ff": self.size(&format!("{first}.1.DenseReluDense.wo.weight"), 1),
            "num_layers": self.count("encoder.block."),
            "num_heads": heads,
            "relative_attention_num_buckets": self.size(&bias, 0),
            "feed_forward_proj": if gated { "gated-gelu" } else { "relu" },
        })
    }
}

/// `scheduler_config.json` of a `family`, as it is published.
pub fn scheduler(family: Network) -> Value {
    match family {
        Network::Flux => json!({
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "shift": 3.0,
            "use_dynamic_shifting": true,
        }),
        Network::Sd3 => json!({
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "shift": 3.0,
        }),
        _ => json!({
            "_class_name": "EulerDiscreteScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "steps_offset": 1,
            "timestep_spacing": "leading",
        }),
    }
}
