//! FLUX.1 by the names of its authors (`model.py` of black-forest-labs/flux), which kohya-like trainers and ComfyUI use.

use super::{Blocks, Table};
use crate::models::flux::FAMILY;

pub(super) static TABLE: Table = Table {
    family: FAMILY,
    outside: &[
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        (
            "time_in.in_layer",
            "time_text_embed.timestep_embedder.linear_1",
        ),
        (
            "time_in.out_layer",
            "time_text_embed.timestep_embedder.linear_2",
        ),
        (
            "vector_in.in_layer",
            "time_text_embed.text_embedder.linear_1",
        ),
        (
            "vector_in.out_layer",
            "time_text_embed.text_embedder.linear_2",
        ),
        (
            "guidance_in.in_layer",
            "time_text_embed.guidance_embedder.linear_1",
        ),
        (
            "guidance_in.out_layer",
            "time_text_embed.guidance_embedder.linear_2",
        ),
        ("final_layer.linear", "proj_out"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ],
    blocks: &[
        Blocks {
            theirs: "double_blocks",
            ours: "transformer_blocks",
            layers: &[
                ("img_attn.qkv", &["attn.to_q", "attn.to_k", "attn.to_v"]),
                ("img_attn.proj", &["attn.to_out.0"]),
                ("img_mlp.0", &["ff.net.0.proj"]),
                ("img_mlp.2", &["ff.net.2"]),
                ("img_mod.lin", &["norm1.linear"]),
                (
                    "txt_attn.qkv",
                    &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
                ),
                ("txt_attn.proj", &["attn.to_add_out"]),
                ("txt_mlp.0", &["ff_context.net.0.proj"]),
                ("txt_mlp.2", &["ff_context.net.2"]),
                ("txt_mod.lin", &["norm1_context.linear"]),
            ],
        },
        Blocks {
            theirs: "single_blocks",
            ours: "single_transformer_blocks",
            layers: &[
                (
                    "linear1",
                    &["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
                ),
                ("linear2", &["proj_out"]),
                ("modulation.lin", &["norm.linear"]),
            ],
        },
    ],
};
