//! LlamaGen's GPT with the T5 encoder of its captions, which learns along with it.

use std::cell::RefCell;

use candle_core::Tensor;
use rand::Rng;
use serde_json::json;

use super::context::Context;
use super::course::Step;
use super::pool::Pool;
use super::{files, frozen};
use crate::Result;
use crate::models::llamagen::gpt::{Config, Gpt};
use crate::models::t5::{self, T5Encoder};
use crate::nano::captions::caption;
use crate::nano::vocabulary::t5_tokenizer;
use crate::nn::{no_grad, ops};

/// T5's padding.
const PADDING: u32 = 0;

/// Trains, or goes on training, `llamagen` and `llamagen/t5`. Needs `llamagen/vq`.
pub fn train(context: &Context) -> Result<()> {
    let settings = &context.settings.gpt;
    let folder = context.out.join("llamagen");
    let device = &context.device;
    let vocabulary = t5_tokenizer();
    let tokenizer = files::tokenizer(&folder.join("t5"), &vocabulary)?;
    let vq = frozen::vq(&folder.join("vq"), device)?;
    let grid = context.settings.side(&settings.training) / vq.config().downsampling();
    let config = Config {
        dim: settings.width,
        n_layer: settings.layers,
        n_head: settings.heads,
        multiple_of: settings.multiple_of,
        token_dropout_p: settings.dropout,
        resid_dropout_p: settings.dropout,
        ffn_dropout_p: settings.dropout,
        caption_dim: settings.t5.d_model,
        class_dropout_prob: settings.condition_dropout,
        vocab_size: vq.config().codebook_size,
        cls_token_num: settings.caption_positions,
        block_size: grid * grid,
        ..Config::default()
    };
    let t5_config = t5::Config {
        vocab_size: tokenizer.vocab_size(),
        d_model: settings.t5.d_model,
        d_kv: settings.t5.d_kv,
        d_ff: settings.t5.d_ff,
        num_layers: settings.t5.layers,
        num_heads: settings.t5.heads,
        feed_forward_proj: t5::FeedForwardKind::Gated(crate::models::encoder::Activation::GeluNew),
        ..t5::Config::default()
    };
    let file = folder.join("model.safetensors");
    let opened = context.open("gpt", &file, |weights| Gpt::new(&config, weights))?;
    let (weights, gpt) = (opened.weights, opened.model);
    let t5_file = folder.join("t5/model.safetensors");
    let opened = context.open("t5", &t5_file, |weights| {
        T5Encoder::new(&t5_config, weights)
    })?;
    let (t5_weights, encoder) = (opened.weights, opened.model);

    let trained = weights
        .variables()
        .into_iter()
        .filter(|(name, _)| name != "cls_embedding.uncond_embedding")
        .chain(
            t5_weights
                .variables()
                .into_iter()
                .map(|(name, v)| (format!("t5.{name}"), v)),
        )
        .collect();
    let course = context.course("gpt", &settings.training, &folder, trained);
    let scenes = context.scenes("gpt", &settings.training);
    let first = course.notes()?.images;
    let pool = RefCell::new(Pool::new(settings.pool, first));
    let count = settings.training.batch_size;
    let step = |seen: usize, _spent: f64| {
        let generator = &mut scenes.generator("step", seen);
        let mut pool = pool.borrow_mut();
        let chosen = pool.take(&scenes, count, generator, |fresh| {
            let pixels = scenes.pixels(fresh, device)?;
            Ok(no_grad(|| vq.encode(&pixels))?.to_vec2::<u32>()?)
        })?;
        let captions: Vec<String> = chosen
            .iter()
            .map(|(scene, _)| caption(scene, generator))
            .collect();
        let (ids, mask) =
            tokenizer.encode_batch(&captions, settings.caption_positions, PADDING, device)?;
        let features = encoder.forward(&ids, &mask)?;
        let (features, mask) = right_aligned(&features, &mask)?;
        let drop: Vec<bool> = (0..count)
            .map(|_| generator.random_bool(settings.condition_dropout))
            .collect();
        let features = gpt.drop_captions(&features, &drop)?;
        let tokens: Vec<u32> = chosen
            .iter()
            .flat_map(|(_, tokens)| tokens.iter().copied())
            .collect();
        let tokens = Tensor::from_vec(tokens, (count, config.block_size), device)?;
        let given = tokens.narrow(1, 0, config.block_size - 1)?.contiguous()?;
        let logits = gpt.forward(&features, &mask, &given, Some(generator))?;
        let losses = ops::cross_entropy(&logits.flatten_to(1)?, &tokens.flatten_all()?)?;
        Ok(Step {
            loss: losses.mean_all()?,
            figures: Vec::new(),
        })
    };
    let save = || {
        files::write_json(&folder.join("t5/tokenizer.json"), &vocabulary)?;
        write_configs(context, &config, &t5_config)?;
        files::write_weights(&file, &weights.variables())?;
        files::write_weights(&t5_file, &t5_weights.variables())
    };
    course.run(step, save)
}

/// Caption features (b, n, d), valid ones first, as LlamaGen takes them: the valid ones in order at the right end,
/// zeros before; and the mask moved likewise.
fn right_aligned(features: &Tensor, mask: &Tensor) -> Result<(Tensor, Tensor)> {
    let (b, n, d) = features.dims3()?;
    let mut places = Vec::with_capacity(b * n);
    let mut moved = Vec::with_capacity(b * n);
    for (row, mask) in mask.to_vec2::<u32>()?.into_iter().enumerate() {
        let valid = mask.iter().filter(|&&m| m != 0).count();
        for place in 0..n {
            let is_valid = place >= n - valid;
            let source = if is_valid { place + valid - n } else { 0 };
            places.push((row * n + source) as u32);
            moved.push(u32::from(is_valid));
        }
    }
    let device = features.device();
    let places = Tensor::from_vec(places, b * n, device)?;
    let moved = Tensor::from_vec(moved, (b, n), device)?;
    let rows = features
        .reshape((b * n, d))?
        .index_select(&places, 0)?
        .reshape((b, n, d))?;
    let keep = moved.to_dtype(features.dtype())?.unsqueeze(2)?;
    Ok((rows.broadcast_mul(&keep)?, moved))
}

fn write_configs(context: &Context, config: &Config, t5: &t5::Config) -> Result<()> {
    let folder = context.out.join("llamagen");
    files::write_json(
        &folder.join("config.json"),
        &json!({
            "dim": config.dim,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "multiple_of": config.multiple_of,
            "rope_base": config.rope_base,
            "norm_eps": config.norm_eps,
            "token_dropout_p": config.token_dropout_p,
            "attn_dropout_p": config.attn_dropout_p,
            "resid_dropout_p": config.resid_dropout_p,
            "ffn_dropout_p": config.ffn_dropout_p,
            "caption_dim": config.caption_dim,
            "class_dropout_prob": config.class_dropout_prob,
            "model_type": "t2i",
            "vocab_size": config.vocab_size,
            "cls_token_num": config.cls_token_num,
            "block_size": config.block_size,
        }),
    )?;
    files::write_json(
        &folder.join("t5/config.json"),
        &json!({
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "vocab_size": t5.vocab_size,
            "d_model": t5.d_model,
            "d_kv": t5.d_kv,
            "d_ff": t5.d_ff,
            "num_layers": t5.num_layers,
            "num_heads": t5.num_heads,
            "relative_attention_num_buckets": t5.relative_attention_num_buckets,
            "relative_attention_max_distance": t5.relative_attention_max_distance,
            "layer_norm_epsilon": t5.layer_norm_epsilon,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": false,
            "pad_token_id": PADDING,
            "eos_token_id": 1,
            "tie_word_embeddings": false,
        }),
    )
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn captions_move_to_the_right_in_order() {
        let features = Tensor::arange(1f32, 9f32, &Device::Cpu)
            .unwrap()
            .reshape((2, 4, 1))
            .unwrap();
        let mask = Tensor::new(&[[1u32, 1, 0, 0], [1, 1, 1, 1]], &Device::Cpu).unwrap();
        let (features, mask) = right_aligned(&features, &mask).unwrap();
        let features = features.squeeze(2).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(features, [[0., 0., 1., 2.], [5., 6., 7., 8.]]);
        assert_eq!(mask.to_vec2::<u32>().unwrap(), [[0, 0, 1, 1], [1, 1, 1, 1]]);
    }
}
