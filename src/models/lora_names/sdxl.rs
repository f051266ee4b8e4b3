//! The layers of SDXL's U-Net: a path with underscores for dots, in the names of the published single files
//! (`input_blocks_4_1_…`) or of diffusers (`down_blocks_1_attentions_0_…`).
//! Reference: `sdxl_model_util.py` of kohya-ss/sd-scripts and diffusers' `lora_conversion_utils.py`.

/// Residual blocks of a level on the way down; there is one more on the way up. SDXL's, which the numbers of the single
/// files count.
const RESNETS: usize = 2;

/// Layers outside all blocks: of the single file, and of diffusers.
const SINGLE: [(&str, &str); 8] = [
    ("input_blocks_0_0", "conv_in"),
    ("time_embed_0", "time_embedding.linear_1"),
    ("time_embed_2", "time_embedding.linear_2"),
    ("time_embedding_linear_1", "time_embedding.linear_1"),
    ("time_embedding_linear_2", "time_embedding.linear_2"),
    ("label_emb_0_0", "add_embedding.linear_1"),
    ("label_emb_0_2", "add_embedding.linear_2"),
    ("out_2", "conv_out"),
];

/// Layers of a residual block.
const RESNET: [(&str, &str); 8] = [
    ("in_layers_2", "conv1"),
    ("emb_layers_1", "time_emb_proj"),
    ("out_layers_3", "conv2"),
    ("skip_connection", "conv_shortcut"),
    ("conv1", "conv1"),
    ("time_emb_proj", "time_emb_proj"),
    ("conv2", "conv2"),
    ("conv_shortcut", "conv_shortcut"),
];

/// Layers of a block of a transformer.
const BLOCK: [(&str, &str); 10] = [
    ("attn1_to_q", "attn1.to_q"),
    ("attn1_to_k", "attn1.to_k"),
    ("attn1_to_v", "attn1.to_v"),
    ("attn1_to_out_0", "attn1.to_out.0"),
    ("attn2_to_q", "attn2.to_q"),
    ("attn2_to_k", "attn2.to_k"),
    ("attn2_to_v", "attn2.to_v"),
    ("attn2_to_out_0", "attn2.to_out.0"),
    ("ff_net_0_proj", "ff.net.0.proj"),
    ("ff_net_2", "ff.net.2"),
];

/// diffusers' path of the layer called `rest`; nothing where it is none of a U-Net's.
pub(super) fn layer(rest: &str) -> Option<String> {
    if let Some(found) = looked_up(&SINGLE, rest) {
        return Some(found.to_string());
    }
    if let Some(rest) = rest.strip_prefix("input_blocks_") {
        let (index, rest) = number(rest)?;
        let (level, at) = (
            index.checked_sub(1)? / (RESNETS + 1),
            (index - 1) % (RESNETS + 1),
        );
        if at == RESNETS {
            return (rest == "0_op").then(|| format!("down_blocks.{level}.downsamplers.0.conv"));
        }
        return part(&format!("down_blocks.{level}"), at, rest);
    }
    if let Some(rest) = rest.strip_prefix("output_blocks_") {
        let (index, rest) = number(rest)?;
        let (level, at) = (index / (RESNETS + 1), index % (RESNETS + 1));
        if matches!(rest, "1_conv" | "2_conv") {
            return Some(format!("up_blocks.{level}.upsamplers.0.conv"));
        }
        return part(&format!("up_blocks.{level}"), at, rest);
    }
    if let Some(rest) = rest.strip_prefix("middle_block_") {
        let (index, rest) = number(rest)?;
        return match index {
            0 | 2 => resnet(&format!("mid_block.resnets.{}", index / 2), rest),
            1 => transformer("mid_block.attentions.0", rest),
            _ => None,
        };
    }
    of_diffusers(rest)
}

/// A name of the single file below one block: `0_…` of its residual block, `1_…` of its transformer.
fn part(place: &str, at: usize, rest: &str) -> Option<String> {
    let (kind, rest) = number(rest)?;
    match kind {
        0 => resnet(&format!("{place}.resnets.{at}"), rest),
        1 => transformer(&format!("{place}.attentions.{at}"), rest),
        _ => None,
    }
}

/// A name of diffusers with underscores for dots.
fn of_diffusers(name: &str) -> Option<String> {
    let (place, rest) = match name.strip_prefix("mid_block_") {
        Some(rest) => ("mid_block".to_string(), rest),
        None => {
            let way = ["down_blocks_", "up_blocks_"];
            let (way, rest) = way
                .iter()
                .find_map(|way| Some((way.trim_end_matches('_'), name.strip_prefix(way)?)))?;
            let (level, rest) = number(rest)?;
            (format!("{way}.{level}"), rest)
        }
    };
    if let Some(rest) = rest.strip_prefix("resnets_") {
        let (at, rest) = number(rest)?;
        return resnet(&format!("{place}.resnets.{at}"), rest);
    }
    if let Some(rest) = rest.strip_prefix("attentions_") {
        let (at, rest) = number(rest)?;
        return transformer(&format!("{place}.attentions.{at}"), rest);
    }
    match rest {
        "downsamplers_0_conv" => Some(format!("{place}.downsamplers.0.conv")),
        "upsamplers_0_conv" => Some(format!("{place}.upsamplers.0.conv")),
        _ => None,
    }
}

fn resnet(place: &str, rest: &str) -> Option<String> {
    Some(format!("{place}.{}", looked_up(&RESNET, rest)?))
}

fn transformer(place: &str, rest: &str) -> Option<String> {
    if matches!(rest, "proj_in" | "proj_out") {
        return Some(format!("{place}.{rest}"));
    }
    let (block, rest) = number(rest.strip_prefix("transformer_blocks_")?)?;
    let layer = looked_up(&BLOCK, rest)?;
    Some(format!("{place}.transformer_blocks.{block}.{layer}"))
}

/// What the published single file calls diffusers' layer at `path`, with underscores for dots, where it has such a layer.
pub(super) fn of_authors(path: &str) -> Option<String> {
    if let Some((theirs, _)) = SINGLE.iter().find(|(_, ours)| *ours == path) {
        return Some(theirs.to_string());
    }
    let parts: Vec<&str> = path.splitn(5, '.').collect();
    let number = |text: &str| text.parse::<usize>().ok();
    match parts[..] {
        ["mid_block", "resnets", at, ..] => {
            let at = number(at).filter(|at| *at < 2)?;
            let (_, rest) = path.split_once(&format!("resnets.{at}."))?;
            Some(format!("middle_block_{}_{}", 2 * at, of_resnet(rest)?))
        }
        ["mid_block", "attentions", "0", ..] => {
            let (_, rest) = path.split_once("attentions.0.")?;
            Some(format!("middle_block_1_{}", of_transformer(rest)?))
        }
        ["down_blocks", level, "downsamplers", "0", "conv"] => {
            let index = (RESNETS + 1) * (number(level)? + 1);
            Some(format!("input_blocks_{index}_0_op"))
        }
        ["up_blocks", level, "upsamplers", "0", "conv"] => {
            let index = (RESNETS + 1) * number(level)? + RESNETS;
            Some(format!("output_blocks_{index}_2_conv"))
        }
        [way @ ("down_blocks" | "up_blocks"), level, kind, at, rest] => {
            let (level, at) = (number(level)?, number(at)?);
            let (way, first, most) = match way {
                "down_blocks" => ("input_blocks", 1, RESNETS),
                _ => ("output_blocks", 0, RESNETS + 1),
            };
            let index = first + (RESNETS + 1) * level + Some(at).filter(|at| *at < most)?;
            match kind {
                "resnets" => Some(format!("{way}_{index}_0_{}", of_resnet(rest)?)),
                "attentions" => Some(format!("{way}_{index}_1_{}", of_transformer(rest)?)),
                _ => None,
            }
        }
        _ => None,
    }
}

fn of_resnet(layer: &str) -> Option<String> {
    let found = RESNET.iter().find(|(_, ours)| *ours == layer);
    // The first four are the single file's.
    found.map(|(theirs, _)| theirs.to_string())
}

fn of_transformer(layer: &str) -> Option<String> {
    if matches!(layer, "proj_in" | "proj_out") {
        return Some(layer.to_string());
    }
    let (block, rest) = layer.strip_prefix("transformer_blocks.")?.split_once('.')?;
    block.parse::<usize>().ok()?;
    let known = BLOCK.iter().any(|(_, ours)| *ours == rest);
    known.then(|| layer.replace('.', "_"))
}

fn looked_up(table: &[(&str, &'static str)], name: &str) -> Option<&'static str> {
    let found = table.iter().find(|(theirs, _)| *theirs == name);
    found.map(|(_, ours)| *ours)
}

/// The number at the start of `text`, and what follows it after an underscore.
fn number(text: &str) -> Option<(usize, &str)> {
    let (digits, rest) = text.split_once('_')?;
    Some((digits.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_naming_come_to_diffusers_paths() {
        for (name, path) in [
            (
                "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
                "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            ),
            (
                "input_blocks_8_1_proj_in",
                "down_blocks.2.attentions.1.proj_in",
            ),
            (
                "input_blocks_7_0_in_layers_2",
                "down_blocks.2.resnets.0.conv1",
            ),
            ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
            (
                "middle_block_1_transformer_blocks_9_ff_net_0_proj",
                "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
            ),
            (
                "middle_block_2_emb_layers_1",
                "mid_block.resnets.1.time_emb_proj",
            ),
            (
                "output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
                "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0",
            ),
            ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
            (
                "output_blocks_8_0_skip_connection",
                "up_blocks.2.resnets.2.conv_shortcut",
            ),
            (
                "up_blocks_0_attentions_2_transformer_blocks_3_attn2_to_k",
                "up_blocks.0.attentions.2.transformer_blocks.3.attn2.to_k",
            ),
            ("mid_block_resnets_0_conv2", "mid_block.resnets.0.conv2"),
            (
                "down_blocks_1_downsamplers_0_conv",
                "down_blocks.1.downsamplers.0.conv",
            ),
            ("label_emb_0_2", "add_embedding.linear_2"),
        ] {
            assert_eq!(layer(name).as_deref(), Some(path));
            let theirs = of_authors(path).unwrap();
            // Back it is the single file's name.
            assert_eq!(layer(&theirs).as_deref(), Some(path));
            assert!(
                ["down_blocks", "up_blocks", "mid_block_", "resnets"]
                    .iter()
                    .all(|part| !theirs.contains(part)),
                "{theirs}"
            );
        }
        for name in [
            "te1_text_model_encoder_layers_0_mlp_fc1",
            "double_blocks_0_img_attn_qkv",
            "input_blocks_4_1_transformer_blocks_0_attn3_to_q",
            "down_blocks_0",
        ] {
            assert_eq!(layer(name), None, "{name}");
        }
    }
}
