//! Each component as a function from the inputs of a reference file to named outputs.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use super::Precision;
use super::reference::Inputs;
use crate::files::read_json;
use crate::models::autoencoder::AutoencoderKl;
use crate::models::chameleon::files::build_image_tokenizer;
use crate::models::chameleon::{Backbone, VqGan};
use crate::models::checkpoint_files::WeightFiles;
use crate::models::clip::{self, Clip, TextModel};
use crate::models::flux::{self, FluxTransformer};
use crate::models::limits::{Limited, read_config};
use crate::models::llamagen::{Gpt, VqModel};
use crate::models::pickle::Pickle;
use crate::models::sd3::Sd3Transformer;
use crate::models::sdxl::UNet;
use crate::models::t5::T5Encoder;
use crate::models::vit::{self, Vit};
use crate::models::vqgan::Compared;
use crate::nn::{Adapter, Weights};
use crate::{Error, Result};

/// What a component gives.
pub(super) struct Output {
    /// What the reference file may call it; the empty name is that of `output` itself.
    pub names: Vec<String>,
    pub value: Value,
}

/// The values of an output.
pub(super) enum Value {
    Numbers {
        tensor: Tensor,
        /// Where the output means something, (b, n) of its first two dimensions; everywhere if absent.
        valid: Option<Tensor>,
    },
    Tokens {
        /// (b, n) of u32.
        tokens: Tensor,
        /// What they were chosen by.
        compared: Compared,
    },
}

impl Output {
    pub fn numbers(names: &[&str], tensor: Tensor) -> Self {
        let value = Value::Numbers {
            tensor,
            valid: None,
        };
        let names = names.iter().map(|name| name.to_string()).collect();
        Self { names, value }
    }
}

/// A component with its weights.
pub(super) trait Runner {
    /// What it gives for `inputs`, with a graph where an adapter is attached.
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>>;
}

/// Where a component comes from and how it is opened.
pub(super) struct Place {
    pub folder: PathBuf,
    pub adapter: Option<Arc<Adapter>>,
    pub device: Device,
    pub precision: Precision,
}

impl Place {
    pub fn config<T: DeserializeOwned + Limited>(&self) -> Result<T> {
        read_config(&self.folder.join("config.json"))
    }

    /// What `config.json` says, of something whose numbers size no tensor.
    pub fn settings<T: DeserializeOwned>(&self) -> Result<T> {
        read_json(&self.folder.join("config.json"))
    }

    /// The weights called `stem`, with the adapter attached.
    fn weights(&self, stem: &str) -> Result<Weights> {
        self.open(WeightFiles::find(&self.folder, stem)?)
    }

    /// The weights in `files`, with the adapter attached.
    pub fn open(&self, files: WeightFiles) -> Result<Weights> {
        let weights = match self.precision {
            Precision::F32 => files.open(DType::F32, &self.device)?,
            Precision::Bf16 => {
                // Vectors too, which weights kept in half precision would otherwise leave as they are.
                let tensors = read_all(&files)?
                    .into_iter()
                    .map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::BF16)?)))
                    .collect::<Result<_>>()?;
                Weights::from_tensors(tensors, DType::BF16, &self.device)
            }
        };
        Ok(match &self.adapter {
            Some(adapter) => weights.with_adapter(adapter.clone()),
            None => weights,
        })
    }

    /// `error` with this folder in place of one that weights in memory do not know.
    pub fn name(&self, error: Error) -> Error {
        match error {
            Error::Checkpoint { path, faults } if !path.exists() => Error::Checkpoint {
                path: self.folder.clone(),
                faults,
            },
            other => other,
        }
    }
}

/// All tensors of `files` that hold numbers which can be rounded.
fn read_all(files: &WeightFiles) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    if let WeightFiles::Pickles(paths) = files {
        for path in paths {
            tensors.extend(Pickle::open(path)?.read_all()?);
        }
    } else {
        let weights = files.clone().open(DType::F32, &Device::Cpu)?;
        for name in weights.names() {
            tensors.extend(weights.stored(&name)?.map(|tensor| (name, tensor)));
        }
    }
    tensors.retain(|_, tensor| tensor.dtype().is_float());
    Ok(tensors)
}

pub(super) type Opened = Result<(Box<dyn Runner>, Weights)>;

pub(super) fn llamagen_gpt(place: &Place) -> Opened {
    let weights = place.weights("model")?;
    let gpt = Gpt::new(&place.config()?, &weights)?;
    Ok((Box::new(gpt), weights))
}

impl Runner for Gpt {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        let captions = inputs.numbers("caption_embeddings")?;
        let (b, n, _) = captions.dims3().map_err(|_| {
            Error::invalid(
                format!("input.caption_embeddings has shape {:?}", captions.dims()),
                "(b, cls_token_num, caption_dim) is expected",
            )
        })?;
        let mask = inputs.mask("caption_mask", (b, n))?;
        let tokens = inputs.ids("tokens", self.config().vocab_size)?;
        let logits = self.forward(&captions, &mask, &tokens, None)?;
        Ok(vec![Output::numbers(&["", "logits"], logits)])
    }
}

pub(super) fn llamagen_vq(place: &Place) -> Opened {
    let weights = place.weights("model")?;
    let vq = VqModel::new(&place.config()?, &weights)?;
    Ok((Box::new(vq), weights))
}

impl Runner for VqModel {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        image_tokens(
            inputs,
            self.config().codebook_size,
            |image| {
                let z = self.encode_continuous(image)?;
                Ok((self.quantize(&z)?, self.compared(&z)?))
            },
            |tokens| self.decode(tokens),
        )
    }
}

/// An image's tokens, or the image of tokens that are below `codes`, or both.
fn image_tokens(
    inputs: &Inputs<'_>,
    codes: usize,
    encode: impl Fn(&Tensor) -> Result<(Tensor, Compared)>,
    decode: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Vec<Output>> {
    let mut outputs = Vec::new();
    if inputs.has("image") {
        let (tokens, compared) = encode(&inputs.numbers("image")?)?;
        outputs.push(Output {
            names: vec!["tokens".into()],
            value: Value::Tokens { tokens, compared },
        });
    }
    if inputs.has("tokens") {
        let tokens = inputs.ids("tokens", codes)?;
        outputs.push(Output::numbers(&["image"], decode(&tokens)?));
    }
    some_of(outputs, "image, or input.tokens")
}

/// `outputs`, of which there must be one.
fn some_of(outputs: Vec<Output>, inputs: &str) -> Result<Vec<Output>> {
    if outputs.is_empty() {
        return Err(Error::invalid(
            "the reference file has none of the inputs that this component takes",
            format!("give input.{inputs}"),
        ));
    }
    Ok(outputs)
}

pub(super) fn chameleon(place: &Place) -> Opened {
    let weights = place.weights("model")?;
    let backbone = Backbone::new(&place.config()?, &weights)?;
    Ok((Box::new(backbone), weights))
}

impl Runner for Backbone {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        let ids = inputs.ids("input_ids", self.config().vocab_size)?;
        Ok(vec![Output::numbers(&["", "logits"], self.forward(&ids)?)])
    }
}

pub(super) fn chameleon_vq(place: &Place) -> Opened {
    let (vq, weights) = build_image_tokenizer(&place.folder, |files| place.open(files))?;
    Ok((Box::new(vq), weights))
}

impl Runner for VqGan {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        image_tokens(
            inputs,
            self.config().n_embed,
            |image| {
                let z = self.encode_continuous(image)?;
                Ok((self.quantize(&z)?, self.compared(&z)?))
            },
            |tokens| self.decode(tokens),
        )
    }
}

struct ClipTowers {
    model: Clip,
    vocabulary: usize,
}

pub(super) fn clip(place: &Place) -> Opened {
    let weights = place.weights("model")?;
    let config: clip::Config = place.config()?;
    let runner = ClipTowers {
        model: Clip::new(&config, &weights)?,
        vocabulary: config.text_config.vocab_size,
    };
    Ok((Box::new(runner), weights))
}

impl Runner for ClipTowers {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        let mut outputs = Vec::new();
        if inputs.has("pixel_values") {
            let images = self.model.encode_image(&inputs.numbers("pixel_values")?)?;
            outputs.push(Output::numbers(&["image_embeds"], images));
        }
        if inputs.has("input_ids") {
            let ids = inputs.ids("input_ids", self.vocabulary)?;
            let texts = self.model.encode_text(&ids)?;
            outputs.push(Output::numbers(&["text_embeds"], texts));
        }
        some_of(outputs, "pixel_values, or input.input_ids")
    }
}

struct ClipText {
    model: TextModel,
    vocabulary: usize,
}

pub(super) fn clip_text(place: &Place) -> Opened {
    let weights = place.weights("model")?;
    let path = place.folder.join("config.json");
    let config: Json = read_json(&path)?;
    // A whole CLIPModel has the text tower's part of the config inside its own.
    let config = config.get("text_config").unwrap_or(&config).clone();
    let config: clip::TextConfig =
        serde_json::from_value(config).map_err(|e| Error::Checkpoint {
            path: path.clone(),
            faults: vec![e.to_string()],
        })?;
    let config = config.limited(&path)?;
    let runner = ClipText {
        model: TextModel::new(&config, &weights)?,
        vocabulary: config.vocab_size,
    };
    Ok((Box::new(runner), weights))
}

impl Runner for ClipText {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        let ids = inputs.ids("input_ids", self.vocabulary)?;
        let output = self.model.forward(&ids)?;
        Ok(vec![
            Output::numbers(&["", "hidden_states"], output.penultimate),
            Output::numbers(&["pooled", "text_embeds", "pooler_output"], output.pooled),
        ])
    }
}

pub(super) fn t5(place: &Place) -> Opened {
    let weights = place.weights("model")?;
    let encoder = T5Encoder::new(&place.config()?, &weights)?;
    Ok((Box::new(encoder), weights))
}

impl Runner for T5Encoder {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        let ids = inputs.ids("input_ids", self.config().vocab_size)?;
        let mask = inputs.mask("attention_mask", ids.dims2()?)?;
        let tensor = self.forward(&ids, &mask)?;
        Ok(vec![Output {
            names: vec![String::new(), "last_hidden_state".into()],
            value: Value::Numbers {
                tensor,
                valid: Some(mask),
            },
        }])
    }
}

pub(super) fn dino(place: &Place) -> Opened {
    let weights = place.weights("model")?;
    let vit = Vit::new(&vit::Config::read(&place.folder)?, &weights)?;
    Ok((Box::new(vit), weights))
}

impl Runner for Vit {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        let class = self.forward(&inputs.numbers("pixel_values")?)?;
        Ok(vec![Output::numbers(&["", "cls_token"], class)])
    }
}

pub(super) fn sd3_transformer(place: &Place) -> Opened {
    let weights = place.weights("diffusion_pytorch_model")?;
    let transformer = Sd3Transformer::new(place.config()?, &weights)?;
    Ok((Box::new(transformer), weights))
}

/// `input.timestep` (b), of which one may stand for all rows of `latents`.
fn timestep(inputs: &Inputs<'_>, latents: &Tensor) -> Result<Tensor> {
    one_each(
        inputs,
        "timestep",
        latents.dims().first().copied().unwrap_or(0),
    )
}

impl Runner for Sd3Transformer {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        let latents = inputs.numbers("hidden_states")?;
        let velocity = self.forward(
            &latents,
            &timestep(inputs, &latents)?,
            &inputs.numbers("encoder_hidden_states")?,
            &inputs.numbers("pooled_projections")?,
        )?;
        Ok(vec![Output::numbers(&["", "sample"], velocity)])
    }
}

pub(super) fn flux_transformer(place: &Place) -> Opened {
    let weights = place.weights("diffusion_pytorch_model")?;
    let transformer = FluxTransformer::new(place.config()?, &weights)?;
    Ok((Box::new(transformer), weights))
}

impl Runner for FluxTransformer {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        let latents = inputs.numbers("hidden_states")?;
        let b = latents.dims().first().copied().unwrap_or(0);
        let guidance = match inputs.has("guidance") {
            true => Some(one_each(inputs, "guidance", b)?),
            false => None,
        };
        // Older pipelines give every image of a batch the same positions.
        let positions = |name: &str| {
            let ids = inputs.exact(name)?;
            Ok::<_, Error>(match ids.rank() {
                3 => ids.get(0)?,
                _ => ids,
            })
        };
        let condition = flux::Condition {
            timestep: &timestep(inputs, &latents)?,
            guidance: guidance.as_ref(),
            encoder_hidden_states: &inputs.numbers("encoder_hidden_states")?,
            pooled_projections: &inputs.numbers("pooled_projections")?,
            txt_ids: &positions("txt_ids")?,
            img_ids: &positions("img_ids")?,
        };
        let velocity = self.forward(&latents, &condition)?;
        Ok(vec![Output::numbers(&["", "sample"], velocity)])
    }
}

/// The input `name` (b); one number may stand for all.
fn one_each(inputs: &Inputs<'_>, name: &str, b: usize) -> Result<Tensor> {
    let numbers = inputs.exact(name)?.flatten_all()?;
    Ok(match numbers.elem_count() {
        1 => numbers.broadcast_as(b)?.contiguous()?,
        _ => numbers,
    })
}

pub(super) fn sdxl_unet(place: &Place) -> Opened {
    let weights = place.weights("diffusion_pytorch_model")?;
    let unet = UNet::new(place.config()?, &weights)?;
    Ok((Box::new(unet), weights))
}

impl Runner for UNet {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        let sample = inputs.numbers("sample")?;
        let output = self.forward(
            &sample,
            &timestep(inputs, &sample)?,
            &inputs.numbers("encoder_hidden_states")?,
            &inputs.numbers("text_embeds")?,
            &inputs.exact("time_ids")?,
        )?;
        Ok(vec![Output::numbers(&["", "sample"], output)])
    }
}

pub(super) fn vae(place: &Place) -> Opened {
    let weights = place.weights("diffusion_pytorch_model")?;
    let vae = AutoencoderKl::new(place.config()?, &weights)?;
    Ok((Box::new(vae), weights))
}

impl Runner for AutoencoderKl {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        let mut outputs = Vec::new();
        if inputs.has("sample") {
            let (mean, _) = self.encode(&inputs.numbers("sample")?)?;
            outputs.push(Output::numbers(&["mean", "latents"], mean));
        }
        if inputs.has("latents") {
            let image = self.decode(&inputs.numbers("latents")?)?;
            outputs.push(Output::numbers(&["image", "sample"], image));
        }
        some_of(outputs, "sample, or input.latents")
    }
}
