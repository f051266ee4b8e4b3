//! `proxytune bench denoiser`: a forward pass or LoRA steps of a diffusion model's network at its published size with
//! random weights, and the memory that they take.

use std::sync::Arc;
use std::time::Instant;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor, Var};
use clap::{Args, ValueEnum};
use serde_json::json;

use super::torch::{median, threads};
use crate::cli::memory::{gibibytes, peak_memory};
use crate::config::{Dtype, Family};
use crate::console;
use crate::models::flux::{self, FluxTransformer};
use crate::models::sd3::{self, Sd3Transformer};
use crate::models::sdxl::{self, UNet};
use crate::nn::{Adapter, LoraConfig, Weights, no_grad, recomputing};
use crate::pipeline::use_threads;
use crate::training::TrainingLoop;
use crate::training::optimizer::OptimizerConfig;
use crate::{Error, Result};

/// `proxytune bench denoiser`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  proxytune bench denoiser --model sdxl --what step --size 512\n  \
                        proxytune bench denoiser --model flux.1-dev --weights q8_0 --size 256"
)]
pub struct DenoiserArgs {
    /// Which model
    #[arg(long, default_value = "sdxl")]
    pub model: Model,
    /// A forward pass, or a LoRA step with recompute
    #[arg(long, default_value = "forward")]
    pub what: What,
    /// How the frozen weights are kept
    #[arg(long, default_value = "bf16")]
    pub weights: Kept,
    /// Side of the images in pixels, a multiple of 16
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub size: usize,
    /// Images at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = super::super::at_least_one)]
    pub batch_size: usize,
    /// Repetitions that are timed
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = super::super::at_least_one)]
    pub repetitions: usize,
    /// Threads; 0 is all cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

/// Published networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Model {
    /// 2.6 billion weights
    Sdxl,
    /// 2.0 billion
    Sd3Medium,
    /// 8.1 billion
    #[value(name = "sd3.5-large")]
    Sd35Large,
    /// 11.9 billion
    #[value(name = "flux.1-dev")]
    Flux1Dev,
}

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum What {
    Forward,
    Step,
}

/// How weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kept {
    F32,
    Bf16,
    /// In blocks of 8 bits, as GGUF files have them
    #[value(name = "q8_0")]
    Q8_0,
    /// In blocks of 4.5 bits
    #[value(name = "q4_k")]
    Q4K,
}

enum Network {
    Sdxl(Box<UNet>),
    Sd3(Box<Sd3Transformer>),
    Flux(Box<FluxTransformer>),
}

impl Model {
    fn family(self) -> Family {
        match self {
            Model::Sdxl => sdxl::FAMILY,
            Model::Sd3Medium | Model::Sd35Large => sd3::FAMILY,
            Model::Flux1Dev => flux::FAMILY,
        }
    }

    fn open(self, weights: &Weights) -> Result<Network> {
        let sd3 = |config| Sd3Transformer::new(config, weights);
        Ok(match self {
            Model::Sdxl => Network::Sdxl(Box::new(UNet::new(sdxl_config()?, weights)?)),
            Model::Sd3Medium => Network::Sd3(Box::new(sd3(sd3_config(24, None))?)),
            Model::Sd35Large => {
                let norm = Some(sd3::QkNorm::RmsNorm);
                Network::Sd3(Box::new(sd3(sd3_config(38, norm))?))
            }
            Model::Flux1Dev => {
                let config = flux::Config {
                    guidance_embeds: true,
                    ..flux::Config::default()
                };
                Network::Flux(Box::new(FluxTransformer::new(config, weights)?))
            }
        })
    }
}

fn sdxl_config() -> Result<sdxl::Config> {
    let published = json!({
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": true,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    });
    serde_json::from_value(published).map_err(|e| Error::Invalid {
        what: format!("SDXL's config: {e}"),
        hint: None,
    })
}

/// Of Stable Diffusion 3 and 3.5 with so many layers, of which the width is a multiple.
fn sd3_config(layers: usize, qk_norm: Option<sd3::QkNorm>) -> sd3::Config {
    sd3::Config {
        num_layers: layers,
        num_attention_heads: layers,
        caption_projection_dim: 64 * layers,
        pos_embed_max_size: 192,
        qk_norm,
        ..sd3::Config::default()
    }
}

impl Network {
    /// The prediction for a random picture of `side` latents and a random prompt.
    fn forward(&self, b: usize, side: usize) -> Result<Tensor> {
        let random = |dims: &[usize]| Tensor::randn(0f32, 1f32, dims, &Device::Cpu);
        let timestep = Tensor::full(500f32, b, &Device::Cpu)?;
        match self {
            Network::Sdxl(unet) => {
                let sides = [side as f32 * 8.0, side as f32 * 8.0, 0.0, 0.0];
                let sides = [sides.as_slice(), &sides[..2]].concat().repeat(b);
                unet.forward(
                    &random(&[b, 4, side, side])?,
                    &timestep,
                    &random(&[b, 77, 2048])?,
                    &random(&[b, 1280])?,
                    &Tensor::from_vec(sides, (b, 6), &Device::Cpu)?,
                )
            }
            Network::Sd3(transformer) => transformer.forward(
                &random(&[b, 16, side, side])?,
                &timestep,
                &random(&[b, 77 + 256, 4096])?,
                &random(&[b, 2048])?,
            ),
            Network::Flux(transformer) => {
                let (rows, text) = (side / 2, 512);
                let position = |i| [0.0, (i / rows) as f32, (i % rows) as f32];
                let positions: Vec<f32> = (0..rows * rows).flat_map(position).collect();
                let ones = Tensor::ones(b, DType::F32, &Device::Cpu)?;
                let condition = flux::Condition {
                    timestep: &(&ones * 0.5)?,
                    guidance: Some(&ones),
                    encoder_hidden_states: &random(&[b, text, 4096])?,
                    pooled_projections: &random(&[b, 768])?,
                    txt_ids: &Tensor::zeros((text, 3), DType::F32, &Device::Cpu)?,
                    img_ids: &Tensor::from_vec(positions, (rows * rows, 3), &Device::Cpu)?,
                };
                transformer.forward(&random(&[b, rows * rows, 64])?, &condition)
            }
        }
    }
}

/// Measures and prints.
///
/// # Errors
/// When the size is none that all of the models have.
pub(super) fn run(args: &DenoiserArgs) -> Result<()> {
    if args.size == 0 || !args.size.is_multiple_of(16) {
        return Err(Error::invalid(
            format!("images of {} pixels", args.size),
            "use a multiple of 16, such as 512",
        ));
    }
    use_threads(threads(args.threads));
    let (b, side) = (args.batch_size, args.size / 8);
    let settings = args.model.family().training();
    let adapter = Arc::new(Adapter::new(
        LoraConfig {
            rank: settings.rank,
            alpha: settings.alpha,
            targets: settings.targets.clone(),
        },
        0,
    ));
    let weights = match args.weights {
        Kept::F32 => Weights::drawn(0, Dtype::F32, &Device::Cpu),
        Kept::Bf16 => Weights::drawn(0, Dtype::Bf16, &Device::Cpu),
        Kept::Q8_0 => Weights::drawn_in_blocks(0, GgmlDType::Q8_0),
        Kept::Q4K => Weights::drawn_in_blocks(0, GgmlDType::Q4K),
    };
    let weights = match args.what {
        What::Forward => weights,
        What::Step => weights.with_adapter(adapter.clone()),
    };
    let network = args.model.open(&weights)?;
    let loaded = peak_memory();
    let variables: Vec<(String, Var)> = adapter.variables();
    let optimizer = OptimizerConfig::new(&settings);
    let mut training = TrainingLoop::new(variables, &optimizer, Some(settings.max_grad_norm))?;
    let mut seconds = Vec::new();
    for _ in 0..args.repetitions {
        let start = Instant::now();
        match args.what {
            What::Forward => {
                no_grad(|| network.forward(b, side))?;
            }
            What::Step => {
                training.step(0, settings.learning_rate, 1, |_| {
                    let prediction = recomputing(true, || network.forward(b, side))?;
                    Ok(prediction.sqr()?.mean_all()?)
                })?;
            }
        }
        seconds.push(start.elapsed().as_secs_f64());
    }
    let model = args.model.to_possible_value();
    let model = model.as_ref().map_or("", |model| model.get_name());
    console::print(format!(
        "{model}: {:.2} billion weights, {} px, batch of {b}: {:.1} s; {:.2} GiB with the weights drawn, {:.2} GiB at most",
        weights.elements() as f64 / 1e9,
        args.size,
        median(&seconds),
        gibibytes(loaded),
        gibibytes(peak_memory()),
    ))
}
