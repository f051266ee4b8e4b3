//! Blocks that run again in the backward pass: values and gradients are those of a step that keeps everything, dropout
//! included, and less is held.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use candle_core::{DType, Device, Tensor, Var};
use proxytune::Result;
use proxytune::models::llamagen::gpt::{Config, Gpt};
use proxytune::models::sd3::{self, Sd3Transformer};
use proxytune::models::sdxl::{self, UNet};
use proxytune::nn::{
    Adapter, Init, LoraConfig, Weights, backward, no_grad, ops, recompute, recomputing,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const CPU: Device = Device::Cpu;

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// The loss and the gradients of `variables`, as bits.
fn step(
    recompute: bool,
    variables: &[(String, Var)],
    loss: impl FnOnce() -> Result<Tensor>,
) -> (u32, HashMap<String, Vec<u32>>) {
    let loss = recomputing(recompute, loss).unwrap();
    let gradients = backward(&loss).unwrap();
    let of = |v: &Var| bits(gradients.get(v.as_tensor()).expect("a gradient"));
    let gradients = variables.iter().map(|(name, v)| (name.clone(), of(v)));
    (
        loss.to_scalar::<f32>().unwrap().to_bits(),
        gradients.collect(),
    )
}

fn randomise(variables: &[(String, Var)], weights: &Weights) {
    for (name, variable) in variables {
        let values = weights
            .pp("random")
            .buffer(variable.shape(), name, Init::Normal(0.1))
            .unwrap();
        variable.set(&values).unwrap();
    }
}

fn adapter(targets: &[&str]) -> Arc<Adapter> {
    let targets = targets.iter().map(|t| t.to_string()).collect();
    let config = LoraConfig {
        rank: 3,
        alpha: 3.0,
        targets,
    };
    Arc::new(Adapter::new(config, 1))
}

fn gpt_config() -> Config {
    Config {
        dim: 48,
        n_layer: 3,
        n_head: 3,
        multiple_of: 16,
        caption_dim: 20,
        vocab_size: 50,
        cls_token_num: 5,
        block_size: 16,
        ..Config::default()
    }
}

fn gpt_inputs() -> (Tensor, Tensor, Tensor) {
    let captions = Weights::drawn(3, DType::F32, &CPU);
    let captions = captions
        .buffer((2, 5, 20), "captions", Init::Normal(1.0))
        .unwrap();
    let mask = Tensor::new(&[[0u8, 0, 1, 1, 1], [1, 1, 1, 1, 1]], &CPU).unwrap();
    let tokens: Vec<u32> = (0..30).map(|i| i * 7 % 50).collect();
    (
        captions,
        mask,
        Tensor::from_vec(tokens, (2, 15), &CPU).unwrap(),
    )
}

fn gpt_step(gpt: &Gpt, variables: &[(String, Var)], fit: bool) -> (u32, HashMap<String, Vec<u32>>) {
    let (captions, mask, tokens) = gpt_inputs();
    step(fit, variables, || {
        let mut generator = ChaCha8Rng::seed_from_u64(9);
        let logits = gpt.forward(&captions, &mask, &tokens, Some(&mut generator))?;
        Ok(logits.sqr()?.mean_all()?)
    })
}

#[test]
fn a_gpt_with_an_adapter_and_dropout_has_equal_gradients_to_the_bit() {
    let adapter = adapter(&["wqkv", "wo", "w1", "w2", "w3"]);
    for dtype in [DType::F32, DType::BF16] {
        let weights = Weights::drawn(0, dtype, &CPU).with_adapter(adapter.clone());
        let gpt = Gpt::new(&gpt_config(), &weights).unwrap();
        let variables = adapter.variables();
        randomise(&variables, &Weights::drawn(1, DType::F32, &CPU));
        assert_eq!(
            gpt_step(&gpt, &variables, true),
            gpt_step(&gpt, &variables, false)
        );
    }
}

#[test]
fn a_gpt_of_which_all_weights_are_trained_has_equal_gradients_to_the_bit() {
    let weights = Weights::trainable(&[], 0, &CPU).unwrap();
    let gpt = Gpt::new(&gpt_config(), &weights).unwrap();
    let mut variables = weights.variables();
    variables.retain(|(name, _)| name != "cls_embedding.uncond_embedding");
    randomise(&variables, &Weights::drawn(1, DType::F32, &CPU));
    assert_eq!(
        gpt_step(&gpt, &variables, true),
        gpt_step(&gpt, &variables, false)
    );
}

fn sd3_config() -> sd3::Config {
    let text = r#"{"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
        "num_attention_heads": 4, "joint_attention_dim": 12, "caption_projection_dim": 32,
        "pooled_projection_dim": 10, "out_channels": 4, "pos_embed_max_size": 8, "dual_attention_layers": [0],
        "qk_norm": "rms_norm"}"#;
    serde_json::from_str(text).unwrap()
}

fn sd3_step(
    model: &Sd3Transformer,
    variables: &[(String, Var)],
    fit: bool,
) -> (u32, HashMap<String, Vec<u32>>) {
    let weights = Weights::drawn(5, DType::F32, &CPU);
    let input =
        |name: &str, shape: &[usize]| weights.buffer(shape, name, Init::Normal(1.0)).unwrap();
    let (latents, context) = (
        input("latents", &[2, 4, 8, 8]),
        input("context", &[2, 7, 12]),
    );
    let (pooled, time) = (
        input("pooled", &[2, 10]),
        Tensor::new(&[3f32, 700.0], &CPU).unwrap(),
    );
    step(fit, variables, || {
        let y = model.forward(&latents, &time, &context, &pooled)?;
        Ok(y.sqr()?.mean_all()?)
    })
}

#[test]
fn an_mmdit_with_an_adapter_has_equal_gradients_to_the_bit() {
    let adapter = adapter(&sd3::LORA_TARGETS);
    // Modulations and the last layer start at zero, where no gradient would get through.
    let trained = Weights::trainable(&[], 0, &CPU).unwrap();
    Sd3Transformer::new(sd3_config(), &trained).unwrap();
    randomise(&trained.variables(), &Weights::drawn(1, DType::F32, &CPU));
    let tensors: HashMap<String, Tensor> = trained
        .variables()
        .into_iter()
        .map(|(name, v)| (name, v.as_tensor().detach()))
        .collect();
    let weights = Weights::from_tensors(tensors, DType::F32, &CPU).with_adapter(adapter.clone());
    let model = Sd3Transformer::new(sd3_config(), &weights).unwrap();
    weights.finish().unwrap();
    let variables = adapter.variables();
    randomise(&variables, &Weights::drawn(2, DType::F32, &CPU));
    assert_eq!(
        sd3_step(&model, &variables, true),
        sd3_step(&model, &variables, false)
    );
}

#[test]
fn an_mmdit_of_which_all_weights_are_trained_has_equal_gradients_but_for_the_order_of_sums() {
    let weights = Weights::trainable(&[], 0, &CPU).unwrap();
    let model = Sd3Transformer::new(sd3_config(), &weights).unwrap();
    let mut variables = weights.variables();
    variables.retain(|(name, _)| name != "pos_embed.pos_embed");
    randomise(&variables, &Weights::drawn(1, DType::F32, &CPU));
    let (loss, fit) = sd3_step(&model, &variables, true);
    let (same, fast) = sd3_step(&model, &variables, false);
    assert_eq!(loss, same);
    for (name, fast) in fast {
        let values = |bits: &[u32]| {
            bits.iter()
                .map(|b| f32::from_bits(*b))
                .collect::<Vec<f32>>()
        };
        let (fit, fast) = (values(&fit[&name]), values(&fast));
        let largest = fast.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (one, two) in fit.iter().zip(&fast) {
            assert!((one - two).abs() <= 2e-6 * largest, "{name}: {one}, {two}");
        }
    }
}

/// A block that counts its runs.
fn counted(
    runs: &Arc<AtomicUsize>,
    w: &Var,
) -> impl Fn(&[Tensor], Option<&mut ChaCha8Rng>) -> Result<Tensor> + Send + Sync + use<> {
    let (runs, w) = (runs.clone(), w.clone());
    move |inputs, _| {
        runs.fetch_add(1, Relaxed);
        let y = ops::linear(&inputs[0], &w, None)?;
        Ok(inputs[1..].iter().try_fold(y, |y, x| &y + x)?)
    }
}

#[test]
fn a_block_runs_twice_in_a_step_and_once_without_gradients() {
    let runs = Arc::new(AtomicUsize::new(0));
    let count = || runs.swap(0, Relaxed);
    let w = Var::ones((3, 3), DType::F32, &CPU).unwrap();
    let x = Tensor::ones((2, 3), DType::F32, &CPU).unwrap();
    let run = || recompute(&[&x], None, counted(&runs, &w));
    let y = recomputing(true, || no_grad(run)).unwrap();
    assert!(!y.track_op());
    assert_eq!(count(), 1);
    let y = recomputing(true, run).unwrap();
    let gradients = backward(&y.sum_all().unwrap()).unwrap();
    assert_eq!(count(), 2);
    let gradient = gradients.get(&w).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(gradient, [[2.0; 3]; 3]);
    let y = run().unwrap();
    backward(&y.sum_all().unwrap()).unwrap();
    assert_eq!(count(), 1);
}

#[test]
fn a_block_has_up_to_six_tracked_inputs_and_a_variable_may_be_used_by_several_blocks() {
    let runs = Arc::default();
    let w = Var::ones((3, 3), DType::F32, &CPU).unwrap();
    let inputs: Vec<Var> = (1..=6)
        .map(|i| Var::from_tensor(&Tensor::full(i as f32, (2, 3), &CPU).unwrap()).unwrap())
        .collect();
    let gradients = |fit: bool| {
        let inputs: Vec<&Tensor> = inputs.iter().map(|v| v.as_tensor()).collect();
        let y = recomputing(fit, || {
            let y = recompute(&inputs, None, counted(&runs, &w))?;
            // Used outside of blocks, too.
            let y = ops::linear(&y, &w, None)?;
            recompute(&[&y], None, counted(&runs, &w))
        });
        let store = backward(&y.unwrap().sqr().unwrap().sum_all().unwrap()).unwrap();
        let mut all: Vec<Vec<u32>> = inputs.iter().map(|x| bits(store.get(x).unwrap())).collect();
        all.push(bits(store.get(&w).unwrap()));
        all
    };
    assert_eq!(gradients(true), gradients(false));
}

#[test]
fn the_plain_backward_of_a_recomputed_block_is_an_error_that_names_the_right_one() {
    let w = Var::ones((3, 3), DType::F32, &CPU).unwrap();
    let x = Tensor::ones((2, 3), DType::F32, &CPU).unwrap();
    let body = move |x: &[Tensor], _: Option<&mut ChaCha8Rng>| ops::linear(&x[0], &w, None);
    let y = recomputing(true, || recompute(&[&x], None, body)).unwrap();
    let text = y.sum_all().unwrap().backward().unwrap_err().to_string();
    assert!(
        text.contains("differentiated by candle's backward"),
        "{text}"
    );
}

#[test]
fn published_checkpoints_give_equal_gradients_too() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/nano/checkpoints/llamagen");
    let text = std::fs::read_to_string(case.join("config.json")).unwrap();
    let config: Config = serde_json::from_str(&text).unwrap();
    let adapter = adapter(&["wqkv", "wo", "w1", "w2", "w3"]);
    let weights = Weights::from_files(&[case.join("model.safetensors")], DType::F32, &CPU).unwrap();
    let gpt = Gpt::new(&config, &weights.with_adapter(adapter.clone())).unwrap();
    let variables = adapter.variables();
    randomise(&variables, &Weights::drawn(1, DType::F32, &CPU));
    let shape = (2, config.cls_token_num, config.caption_dim);
    let captions = Weights::drawn(3, DType::F32, &CPU);
    let captions = captions
        .buffer(shape, "captions", Init::Normal(0.3))
        .unwrap();
    let mask = Tensor::ones((2, config.cls_token_num), DType::U8, &CPU).unwrap();
    let tokens = Tensor::zeros((2, config.block_size - 1), DType::U32, &CPU).unwrap();
    let run = |fit| {
        step(fit, &variables, || {
            let mut generator = ChaCha8Rng::seed_from_u64(9);
            let logits = gpt.forward(&captions, &mask, &tokens, Some(&mut generator))?;
            Ok(logits.sqr()?.mean_all()?)
        })
    };
    let ((loss, fit), (same, fast)) = (run(true), run(false));
    assert_eq!(loss, same);
    // What is kept for the way up has three readers, whose gradients are added up in another order.
    for (name, fast) in fast {
        let values = |bits: &[u32]| bits.iter().map(|b| f32::from_bits(*b)).collect::<Vec<_>>();
        let (fit, fast) = (values(&fit[&name]), values(&fast));
        let largest = fast.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (one, two) in fit.iter().zip(&fast) {
            assert!((one - two).abs() <= 1e-5 * largest, "{name}: {one}, {two}");
        }
    }
}

#[test]
fn a_unet_with_an_adapter_has_equal_gradients_but_for_the_order_of_sums() {
    let config = r#"{"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4,
        "transformer_layers_per_block": [1, 2], "attention_head_dim": [1, 2], "cross_attention_dim": 12,
        "use_linear_projection": true, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 34}"#;
    let config: sdxl::Config = serde_json::from_str(config).unwrap();
    let adapter = adapter(&[
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ff.net.2",
        "time_emb_proj",
    ]);
    let weights = Weights::drawn(5, DType::F32, &CPU);
    let model = UNet::new(config, &weights.clone().with_adapter(adapter.clone())).unwrap();
    let variables = adapter.variables();
    randomise(&variables, &Weights::drawn(2, DType::F32, &CPU));
    let input =
        |name: &str, shape: &[usize]| weights.buffer(shape, name, Init::Normal(1.0)).unwrap();
    let (sample, context) = (
        input("sample", &[2, 4, 7, 6]),
        input("context", &[2, 5, 12]),
    );
    let (pooled, sizes) = (input("pooled", &[2, 10]), input("sizes", &[2, 6]));
    let time = Tensor::new(&[3f32, 700.0], &CPU).unwrap();
    let run = |fit| {
        step(fit, &variables, || {
            let y = model.forward(&sample, &time, &context, &pooled, &sizes)?;
            Ok(y.sqr()?.mean_all()?)
        })
    };
    let ((loss, fit), (same, fast)) = (run(true), run(false));
    assert_eq!(loss, same);
    // What is kept for the way up has three readers, whose gradients are added up in another order.
    for (name, fast) in fast {
        let values = |bits: &[u32]| bits.iter().map(|b| f32::from_bits(*b)).collect::<Vec<_>>();
        let (fit, fast) = (values(&fit[&name]), values(&fast));
        let largest = fast.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (one, two) in fit.iter().zip(&fast) {
            assert!((one - two).abs() <= 1e-5 * largest, "{name}: {one}, {two}");
        }
    }
}
