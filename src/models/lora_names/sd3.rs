//! SD3 and SD3.5 by the names of their authors (`mmditx.py` of Stability-AI/sd3.5), which kohya-like trainers and ComfyUI
//! use.

use super::{Blocks, Table};
use crate::models::sd3::FAMILY;

pub(super) static TABLE: Table = Table {
    family: FAMILY,
    outside: &[
        ("x_embedder.proj", "pos_embed.proj"),
        (
            "t_embedder.mlp.0",
            "time_text_embed.timestep_embedder.linear_1",
        ),
        (
            "t_embedder.mlp.2",
            "time_text_embed.timestep_embedder.linear_2",
        ),
        ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
        ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
        ("context_embedder", "context_embedder"),
        ("final_layer.linear", "proj_out"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ],
    blocks: &[Blocks {
        theirs: "joint_blocks",
        ours: "transformer_blocks",
        layers: &[
            ("x_block.attn.qkv", &["attn.to_q", "attn.to_k", "attn.to_v"]),
            ("x_block.attn.proj", &["attn.to_out.0"]),
            (
                "x_block.attn2.qkv",
                &["attn2.to_q", "attn2.to_k", "attn2.to_v"],
            ),
            ("x_block.attn2.proj", &["attn2.to_out.0"]),
            ("x_block.mlp.fc1", &["ff.net.0.proj"]),
            ("x_block.mlp.fc2", &["ff.net.2"]),
            ("x_block.adaLN_modulation.1", &["norm1.linear"]),
            (
                "context_block.attn.qkv",
                &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
            ),
            ("context_block.attn.proj", &["attn.to_add_out"]),
            ("context_block.mlp.fc1", &["ff_context.net.0.proj"]),
            ("context_block.mlp.fc2", &["ff_context.net.2"]),
            (
                "context_block.adaLN_modulation.1",
                &["norm1_context.linear"],
            ),
        ],
    }],
};
