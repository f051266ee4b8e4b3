//! What single files call the layers of each part, and what the models here call them, which is what diffusers and
//! transformers do. Reference: `single_file_utils.py` and `scripts/convert_*` of diffusers, `tensor_mapping.py` of
//! llama.cpp.

use crate::hub::parts::{Network, Part};
use crate::nn::{Cut, Form};

/// How a tensor of a single file becomes those of diffusers.
#[derive(Debug, Clone, Copy)]
enum Change {
    /// It is the same.
    Same,
    /// Rows in equal shares, as queries, keys and values.
    Shares,
    /// Rows as queries, keys and values of the model's width, and all others.
    WidthsAndRest,
    /// The first half of its rows, shifts, follows the second, scales.
    Halves,
    /// As `Halves` where there are two of the model's width: in the last block.
    HalvesInLast,
    /// A convolution with a kernel of one pixel is a matrix.
    Flat,
    /// Transposed.
    Turned,
}

use Change::{Flat, Halves, HalvesInLast, Same, Shares, Turned, WidthsAndRest};

/// What a single file calls a tensor, what it becomes, and how. `#` stands for a number, in the order of their appearance,
/// and `*` for the last part of a name; `~` is a number counted from the other end of the levels.
type Row = (&'static str, &'static [&'static str], Change);

#[rustfmt::skip]
const FLUX: &[Row] = &[
    ("time_in.in_layer.*", &["time_text_embed.timestep_embedder.linear_1.*"], Same),
    ("time_in.out_layer.*", &["time_text_embed.timestep_embedder.linear_2.*"], Same),
    ("guidance_in.in_layer.*", &["time_text_embed.guidance_embedder.linear_1.*"], Same),
    ("guidance_in.out_layer.*", &["time_text_embed.guidance_embedder.linear_2.*"], Same),
    ("vector_in.in_layer.*", &["time_text_embed.text_embedder.linear_1.*"], Same),
    ("vector_in.out_layer.*", &["time_text_embed.text_embedder.linear_2.*"], Same),
    ("txt_in.*", &["context_embedder.*"], Same),
    ("img_in.*", &["x_embedder.*"], Same),
    ("double_blocks.#.img_mod.lin.*", &["transformer_blocks.#.norm1.linear.*"], Same),
    ("double_blocks.#.txt_mod.lin.*", &["transformer_blocks.#.norm1_context.linear.*"], Same),
    (
        "double_blocks.#.img_attn.qkv.*",
        &[
            "transformer_blocks.#.attn.to_q.*",
            "transformer_blocks.#.attn.to_k.*",
            "transformer_blocks.#.attn.to_v.*",
        ],
        Shares,
    ),
    (
        "double_blocks.#.txt_attn.qkv.*",
        &[
            "transformer_blocks.#.attn.add_q_proj.*",
            "transformer_blocks.#.attn.add_k_proj.*",
            "transformer_blocks.#.attn.add_v_proj.*",
        ],
        Shares,
    ),
    ("double_blocks.#.img_attn.norm.query_norm.*", &["transformer_blocks.#.attn.norm_q.weight"], Same),
    ("double_blocks.#.img_attn.norm.key_norm.*", &["transformer_blocks.#.attn.norm_k.weight"], Same),
    ("double_blocks.#.txt_attn.norm.query_norm.*", &["transformer_blocks.#.attn.norm_added_q.weight"], Same),
    ("double_blocks.#.txt_attn.norm.key_norm.*", &["transformer_blocks.#.attn.norm_added_k.weight"], Same),
    ("double_blocks.#.img_attn.proj.*", &["transformer_blocks.#.attn.to_out.0.*"], Same),
    ("double_blocks.#.txt_attn.proj.*", &["transformer_blocks.#.attn.to_add_out.*"], Same),
    ("double_blocks.#.img_mlp.0.*", &["transformer_blocks.#.ff.net.0.proj.*"], Same),
    ("double_blocks.#.img_mlp.2.*", &["transformer_blocks.#.ff.net.2.*"], Same),
    ("double_blocks.#.txt_mlp.0.*", &["transformer_blocks.#.ff_context.net.0.proj.*"], Same),
    ("double_blocks.#.txt_mlp.2.*", &["transformer_blocks.#.ff_context.net.2.*"], Same),
    ("single_blocks.#.modulation.lin.*", &["single_transformer_blocks.#.norm.linear.*"], Same),
    (
        "single_blocks.#.linear1.*",
        &[
            "single_transformer_blocks.#.attn.to_q.*",
            "single_transformer_blocks.#.attn.to_k.*",
            "single_transformer_blocks.#.attn.to_v.*",
            "single_transformer_blocks.#.proj_mlp.*",
        ],
        WidthsAndRest,
    ),
    ("single_blocks.#.linear2.*", &["single_transformer_blocks.#.proj_out.*"], Same),
    ("single_blocks.#.norm.query_norm.*", &["single_transformer_blocks.#.attn.norm_q.weight"], Same),
    ("single_blocks.#.norm.key_norm.*", &["single_transformer_blocks.#.attn.norm_k.weight"], Same),
    ("final_layer.linear.*", &["proj_out.*"], Same),
    ("final_layer.adaLN_modulation.1.*", &["norm_out.linear.*"], Halves),
];

#[rustfmt::skip]
const SD3: &[Row] = &[
    ("pos_embed", &["pos_embed.pos_embed"], Same),
    ("x_embedder.proj.*", &["pos_embed.proj.*"], Same),
    ("t_embedder.mlp.0.*", &["time_text_embed.timestep_embedder.linear_1.*"], Same),
    ("t_embedder.mlp.2.*", &["time_text_embed.timestep_embedder.linear_2.*"], Same),
    ("y_embedder.mlp.0.*", &["time_text_embed.text_embedder.linear_1.*"], Same),
    ("y_embedder.mlp.2.*", &["time_text_embed.text_embedder.linear_2.*"], Same),
    (
        "joint_blocks.#.x_block.attn.qkv.*",
        &[
            "transformer_blocks.#.attn.to_q.*",
            "transformer_blocks.#.attn.to_k.*",
            "transformer_blocks.#.attn.to_v.*",
        ],
        Shares,
    ),
    (
        "joint_blocks.#.x_block.attn2.qkv.*",
        &[
            "transformer_blocks.#.attn2.to_q.*",
            "transformer_blocks.#.attn2.to_k.*",
            "transformer_blocks.#.attn2.to_v.*",
        ],
        Shares,
    ),
    (
        "joint_blocks.#.context_block.attn.qkv.*",
        &[
            "transformer_blocks.#.attn.add_q_proj.*",
            "transformer_blocks.#.attn.add_k_proj.*",
            "transformer_blocks.#.attn.add_v_proj.*",
        ],
        Shares,
    ),
    ("joint_blocks.#.x_block.attn.ln_q.*", &["transformer_blocks.#.attn.norm_q.*"], Same),
    ("joint_blocks.#.x_block.attn.ln_k.*", &["transformer_blocks.#.attn.norm_k.*"], Same),
    ("joint_blocks.#.x_block.attn2.ln_q.*", &["transformer_blocks.#.attn2.norm_q.*"], Same),
    ("joint_blocks.#.x_block.attn2.ln_k.*", &["transformer_blocks.#.attn2.norm_k.*"], Same),
    ("joint_blocks.#.context_block.attn.ln_q.*", &["transformer_blocks.#.attn.norm_added_q.*"], Same),
    ("joint_blocks.#.context_block.attn.ln_k.*", &["transformer_blocks.#.attn.norm_added_k.*"], Same),
    ("joint_blocks.#.x_block.attn.proj.*", &["transformer_blocks.#.attn.to_out.0.*"], Same),
    ("joint_blocks.#.x_block.attn2.proj.*", &["transformer_blocks.#.attn2.to_out.0.*"], Same),
    ("joint_blocks.#.context_block.attn.proj.*", &["transformer_blocks.#.attn.to_add_out.*"], Same),
    ("joint_blocks.#.x_block.adaLN_modulation.1.*", &["transformer_blocks.#.norm1.linear.*"], Same),
    (
        "joint_blocks.#.context_block.adaLN_modulation.1.*",
        &["transformer_blocks.#.norm1_context.linear.*"],
        HalvesInLast,
    ),
    ("joint_blocks.#.x_block.mlp.fc1.*", &["transformer_blocks.#.ff.net.0.proj.*"], Same),
    ("joint_blocks.#.x_block.mlp.fc2.*", &["transformer_blocks.#.ff.net.2.*"], Same),
    ("joint_blocks.#.context_block.mlp.fc1.*", &["transformer_blocks.#.ff_context.net.0.proj.*"], Same),
    ("joint_blocks.#.context_block.mlp.fc2.*", &["transformer_blocks.#.ff_context.net.2.*"], Same),
    ("final_layer.linear.*", &["proj_out.*"], Same),
    ("final_layer.adaLN_modulation.1.*", &["norm_out.linear.*"], Halves),
];

/// Outside the blocks, whose numbers [`Names::unet`] counts.
#[rustfmt::skip]
const UNET: &[Row] = &[
    ("time_embed.0.*", &["time_embedding.linear_1.*"], Same),
    ("time_embed.2.*", &["time_embedding.linear_2.*"], Same),
    ("label_emb.0.0.*", &["add_embedding.linear_1.*"], Same),
    ("label_emb.0.2.*", &["add_embedding.linear_2.*"], Same),
    ("input_blocks.0.0.*", &["conv_in.*"], Same),
    ("out.0.*", &["conv_norm_out.*"], Same),
    ("out.2.*", &["conv_out.*"], Same),
];

/// A residual block of a U-Net.
#[rustfmt::skip]
const RESNET: &[Row] = &[
    ("in_layers.0.*", &["norm1.*"], Same),
    ("in_layers.2.*", &["conv1.*"], Same),
    ("emb_layers.1.*", &["time_emb_proj.*"], Same),
    ("out_layers.0.*", &["norm2.*"], Same),
    ("out_layers.3.*", &["conv2.*"], Same),
    ("skip_connection.*", &["conv_shortcut.*"], Same),
];

/// Either half of an autoencoder, below `encoder.` or `decoder.`.
#[rustfmt::skip]
const HALF_VAE: &[Row] = &[
    ("norm_out.*", &["conv_norm_out.*"], Same),
    ("mid.block_1.nin_shortcut.*", &["mid_block.resnets.0.conv_shortcut.*"], Same),
    ("mid.block_2.nin_shortcut.*", &["mid_block.resnets.1.conv_shortcut.*"], Same),
    ("mid.block_1.*.*", &["mid_block.resnets.0.*.*"], Same),
    ("mid.block_2.*.*", &["mid_block.resnets.1.*.*"], Same),
    ("mid.attn_1.norm.*", &["mid_block.attentions.0.group_norm.*"], Same),
    ("mid.attn_1.q.*", &["mid_block.attentions.0.to_q.*"], Flat),
    ("mid.attn_1.k.*", &["mid_block.attentions.0.to_k.*"], Flat),
    ("mid.attn_1.v.*", &["mid_block.attentions.0.to_v.*"], Flat),
    ("mid.attn_1.proj_out.*", &["mid_block.attentions.0.to_out.0.*"], Flat),
    ("down.#.block.#.nin_shortcut.*", &["down_blocks.#.resnets.#.conv_shortcut.*"], Same),
    ("down.#.block.#.*.*", &["down_blocks.#.resnets.#.*.*"], Same),
    ("down.#.downsample.conv.*", &["down_blocks.#.downsamplers.0.conv.*"], Same),
    ("up.#.block.#.nin_shortcut.*", &["up_blocks.~.resnets.#.conv_shortcut.*"], Same),
    ("up.#.block.#.*.*", &["up_blocks.~.resnets.#.*.*"], Same),
    ("up.#.upsample.conv.*", &["up_blocks.~.upsamplers.0.conv.*"], Same),
];

/// open_clip's names; files of transformers have ours.
#[rustfmt::skip]
const CLIP: &[Row] = &[
    ("token_embedding.weight", &["text_model.embeddings.token_embedding.weight"], Same),
    ("positional_embedding", &["text_model.embeddings.position_embedding.weight"], Same),
    ("ln_final.*", &["text_model.final_layer_norm.*"], Same),
    ("text_projection", &["text_projection.weight"], Turned),
    ("transformer.resblocks.#.ln_1.*", &["text_model.encoder.layers.#.layer_norm1.*"], Same),
    ("transformer.resblocks.#.ln_2.*", &["text_model.encoder.layers.#.layer_norm2.*"], Same),
    (
        "transformer.resblocks.#.attn.in_proj_weight",
        &[
            "text_model.encoder.layers.#.self_attn.q_proj.weight",
            "text_model.encoder.layers.#.self_attn.k_proj.weight",
            "text_model.encoder.layers.#.self_attn.v_proj.weight",
        ],
        Shares,
    ),
    (
        "transformer.resblocks.#.attn.in_proj_bias",
        &[
            "text_model.encoder.layers.#.self_attn.q_proj.bias",
            "text_model.encoder.layers.#.self_attn.k_proj.bias",
            "text_model.encoder.layers.#.self_attn.v_proj.bias",
        ],
        Shares,
    ),
    ("transformer.resblocks.#.attn.out_proj.*", &["text_model.encoder.layers.#.self_attn.out_proj.*"], Same),
    ("transformer.resblocks.#.mlp.c_fc.*", &["text_model.encoder.layers.#.mlp.fc1.*"], Same),
    ("transformer.resblocks.#.mlp.c_proj.*", &["text_model.encoder.layers.#.mlp.fc2.*"], Same),
];

/// llama.cpp's names; files of transformers have ours.
#[rustfmt::skip]
const T5: &[Row] = &[
    ("token_embd.*", &["shared.*"], Same),
    ("enc.output_norm.*", &["encoder.final_layer_norm.*"], Same),
    (
        "enc.blk.#.attn_rel_b.*",
        &["encoder.block.#.layer.0.SelfAttention.relative_attention_bias.*"],
        Same,
    ),
    ("enc.blk.#.attn_norm.*", &["encoder.block.#.layer.0.layer_norm.*"], Same),
    ("enc.blk.#.attn_q.*", &["encoder.block.#.layer.0.SelfAttention.q.*"], Same),
    ("enc.blk.#.attn_k.*", &["encoder.block.#.layer.0.SelfAttention.k.*"], Same),
    ("enc.blk.#.attn_v.*", &["encoder.block.#.layer.0.SelfAttention.v.*"], Same),
    ("enc.blk.#.attn_o.*", &["encoder.block.#.layer.0.SelfAttention.o.*"], Same),
    ("enc.blk.#.ffn_norm.*", &["encoder.block.#.layer.1.layer_norm.*"], Same),
    ("enc.blk.#.ffn_gate.*", &["encoder.block.#.layer.1.DenseReluDense.wi_0.*"], Same),
    ("enc.blk.#.ffn_up.*", &["encoder.block.#.layer.1.DenseReluDense.wi_1.*"], Same),
    ("enc.blk.#.ffn_down.*", &["encoder.block.#.layer.1.DenseReluDense.wo.*"], Same),
];

/// The names of one part in one file.
#[derive(Debug, Clone)]
pub struct Names {
    part: Part,
    prefix: String,
    /// Width of the residual streams of a transformer.
    width: usize,
    /// Residual blocks of a U-Net's level on the way down.
    layers: usize,
    /// Levels of an autoencoder.
    levels: usize,
}

impl Names {
    /// Those of `part` in a file with these `tensors`, whose names start with `prefix` for it.
    pub fn of(part: Part, prefix: &str, tensors: &[(String, Vec<usize>)]) -> Self {
        let within = |name: &str| name.strip_prefix(prefix).map(String::from);
        let rows = |wanted: &str| {
            let found = tensors
                .iter()
                .find(|(name, _)| within(name).as_deref() == Some(wanted));
            found.and_then(|(_, dims)| dims.first().copied())
        };
        let names = || tensors.iter().filter_map(|(name, _)| within(name));
        let numbers = |start: &'static str, end: &'static str| {
            names()
                .filter_map(move |name| name.strip_prefix(start)?.strip_suffix(end)?.parse().ok())
        };
        let levels = names().filter_map(|name| {
            let (level, _) = name.strip_prefix("decoder.up.")?.split_once('.')?;
            level.parse::<usize>().ok()
        });
        let halving: Option<usize> = numbers("input_blocks.", ".0.op.weight").min();
        Self {
            part,
            prefix: prefix.to_string(),
            width: rows("img_in.weight")
                .or(rows("x_embedder.proj.weight"))
                .unwrap_or(0),
            layers: halving.map_or(LAYERS_OF_SDXL, |block| block.saturating_sub(1)),
            levels: levels.max().map_or(0, |level| level.saturating_add(1)),
        }
    }

    /// Residual blocks of a U-Net's level on the way down.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// What the models here call the file's tensor `name` of shape `dims`; nothing where it belongs to another part. A
    /// name in no table stays as it is.
    pub fn ours(&self, name: &str, dims: &[usize]) -> Vec<(String, Cut)> {
        let Some(name) = name.strip_prefix(&self.prefix) else {
            return Vec::new();
        };
        let found = match self.part {
            Part::Denoiser(Network::Flux) => self.looked_up(FLUX, name, dims),
            Part::Denoiser(Network::Sd3) => self.looked_up(SD3, name, dims),
            Part::Denoiser(_) => self
                .looked_up(UNET, name, dims)
                .or_else(|| self.unet(name, dims)),
            Part::Vae => self.vae(name, dims),
            // Neither SD3 nor FLUX projects what CLIP-L says, whatever its file has.
            Part::ClipL if name.starts_with("text_projection") => Some(Vec::new()),
            Part::ClipL | Part::ClipG => self.looked_up(CLIP, name, dims),
            Part::T5 => self.looked_up(T5, name, dims),
        };
        found.unwrap_or_else(|| vec![(name.to_string(), Cut::default())])
    }

    fn vae(&self, name: &str, dims: &[usize]) -> Option<Vec<(String, Cut)>> {
        let (half, rest) = name.split_once('.')?;
        if !matches!(half, "encoder" | "decoder") {
            return None;
        }
        Some(below(half, self.looked_up(HALF_VAE, rest, dims)?))
    }

    /// A layer of a numbered block: each has a residual block, then a transformer where the level has them, and the last of
    /// a level a convolution to the next one's size.
    fn unet(&self, name: &str, dims: &[usize]) -> Option<Vec<(String, Cut)>> {
        let (way, rest) = name.split_once('.')?;
        let (number, rest) = rest.split_once('.')?;
        let number: usize = number.parse().ok()?;
        let same = |name: String| Some(vec![(name, Cut::default())]);
        let (place, at, rest) = match way {
            "input_blocks" => {
                let (level, at) = divided(number.checked_sub(1)?, self.layers + 1);
                if let Some(conv) = rest.strip_prefix("0.op.") {
                    return same(format!("down_blocks.{level}.downsamplers.0.conv.{conv}"));
                }
                (format!("down_blocks.{level}"), at, rest.to_string())
            }
            "output_blocks" => {
                let (level, at) = divided(number, self.layers + 1);
                let conv = ["1.conv.", "2.conv."]
                    .iter()
                    .find_map(|conv| rest.strip_prefix(conv));
                if let Some(conv) = conv {
                    return same(format!("up_blocks.{level}.upsamplers.0.conv.{conv}"));
                }
                (format!("up_blocks.{level}"), at, rest.to_string())
            }
            "middle_block" => {
                let kind = number % 2;
                (
                    "mid_block".to_string(),
                    number / 2,
                    format!("{kind}.{rest}"),
                )
            }
            _ => return None,
        };
        let (kind, rest) = rest.split_once('.')?;
        match kind {
            "0" => Some(below(
                &format!("{place}.resnets.{at}"),
                self.looked_up(RESNET, rest, dims)?,
            )),
            "1" => same(format!("{place}.attentions.{at}.{rest}")),
            _ => None,
        }
    }

    fn looked_up(&self, table: &[Row], name: &str, dims: &[usize]) -> Option<Vec<(String, Cut)>> {
        let (captured, (_, ours, change)) = table
            .iter()
            .find_map(|row| Some((captured(row.0, name)?, row)))?;
        let cuts = self.cuts(*change, dims, ours.len());
        let names = ours.iter().map(|pattern| self.filled(pattern, &captured));
        Some(names.zip(cuts).collect())
    }

    /// How a tensor of shape `dims` is cut into `count`.
    fn cuts(&self, change: Change, dims: &[usize], count: usize) -> Vec<Cut> {
        let rows = dims.first().copied().unwrap_or(0);
        let (share, half) = (rows / count, rows / 2);
        let rows_of = |rows| Cut {
            rows,
            form: Form::Same,
        };
        let form = |form| Cut {
            rows: Vec::new(),
            form,
        };
        // Where a part is not as wide as the model, names of all rows show the fault by their shapes.
        let whole = vec![Cut::default(); count];
        match change {
            Same => whole,
            Shares if rows.is_multiple_of(count) => {
                let share = |i| rows_of(std::iter::once(i * share..(i + 1) * share).collect());
                (0..count).map(share).collect()
            }
            WidthsAndRest if rows > (count - 1) * self.width => {
                let width = self.width;
                let part = |i: usize| {
                    let until = if i + 1 == count {
                        rows
                    } else {
                        (i + 1) * width
                    };
                    rows_of(std::iter::once(i * width..until).collect())
                };
                (0..count).map(part).collect()
            }
            HalvesInLast if rows != 2 * self.width => whole,
            Halves | HalvesInLast => vec![rows_of(vec![half..rows, 0..half])],
            Flat => vec![form(Form::Flat)],
            Turned => vec![form(Form::Turned)],
            Shares | WidthsAndRest => whole,
        }
    }

    fn filled(&self, pattern: &str, captured: &[&str]) -> String {
        let mut captured = captured.iter();
        let mut next = || captured.next().copied().unwrap_or_default();
        let parts = pattern.split('.').map(|part| match part {
            "#" | "*" => next().to_string(),
            "~" => {
                let number: Option<usize> = next().parse().ok();
                let other = number.and_then(|number| (self.levels).checked_sub(number + 1));
                other.map_or("?".to_string(), |number| number.to_string())
            }
            part => part.to_string(),
        });
        parts.collect::<Vec<_>>().join(".")
    }
}

/// What SDXL has where nothing is halved.
const LAYERS_OF_SDXL: usize = 2;

fn divided(number: usize, by: usize) -> (usize, usize) {
    (number / by, number % by)
}

fn below(place: &str, names: Vec<(String, Cut)>) -> Vec<(String, Cut)> {
    let names = names.into_iter();
    names
        .map(|(name, cut)| (format!("{place}.{name}"), cut))
        .collect()
}

/// What `#` and `*` of `pattern` stand for in `name`, if it fits.
fn captured<'a>(pattern: &str, name: &'a str) -> Option<Vec<&'a str>> {
    let (mut pattern, mut name) = (pattern.split('.'), name.split('.'));
    let mut found = Vec::new();
    loop {
        match (pattern.next(), name.next()) {
            (None, None) => return Some(found),
            (Some("#"), Some(part)) if part.bytes().all(|b| b.is_ascii_digit()) => found.push(part),
            (Some("*"), Some(part)) => found.push(part),
            (Some(expected), Some(part)) if expected == part => {}
            _ => return None,
        }
    }
}
