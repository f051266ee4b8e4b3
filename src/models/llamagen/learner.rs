//! LlamaGen as a [`Learner`]: GPT, its T5 caption encoder and its VQ tokenizer, from one checkpoint folder.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use image::RgbImage;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::gpt::{Config, Gpt};
use super::{Files, vq};
use crate::models::checkpoint_files;
use crate::models::limits::read_config;
use crate::models::t5::T5Encoder;
use crate::models::tokenizer::TextTokenizer;
use crate::models::{
    Example, ImageTokenizer, Learner, LearnerOptions, Request, Sampling, TrainingExample, Tuning,
    adapters, finish_all,
};
use crate::nn::{Adapter, Weights, mean_over_parts, merged, no_grad, ops, recomputing};
use crate::{Error, Result, images};

/// Examples of a small model that are differentiated at once: about equal parts then have three or more, and what a part
/// costs whatever its size is little beside that.
const AT_ONCE: usize = 5;

/// The VQ tokenizer alone.
pub struct VqTokenizer {
    model: vq::VqModel,
    resolution: u32,
    /// Kept for others that are opened from the same files.
    _weights: Weights,
}

impl VqTokenizer {
    /// Opens the tokenizer of the LlamaGen checkpoint in `dir`; see [`Files::find`].
    pub fn open(dir: &Path, resolution: Option<u32>, device: &Device) -> Result<Self> {
        let (tokenizer, weights) = Self::build(&Files::find(dir, resolution)?, device)?;
        weights.finish()?;
        Ok(tokenizer)
    }

    /// The tokenizer with the weights it was built from, whose faults are still to be asked for.
    fn build(files: &Files, device: &Device) -> Result<(Self, Weights)> {
        let (config, weights) = files.open_vq(device)?;
        let resolution = (files.block_size()?.isqrt() * config.downsampling()) as u32;
        let model = vq::VqModel::new(&config, &weights)?;
        let tokenizer = Self {
            model,
            resolution,
            _weights: weights.clone(),
        };
        Ok((tokenizer, weights))
    }

    /// Side length of the images in pixels.
    pub fn resolution(&self) -> u32 {
        self.resolution
    }

    /// The images of tokens (b, n).
    pub fn decode(&self, tokens: &[Vec<u32>]) -> Result<Vec<RgbImage>> {
        let side = tokens.first().map_or(0, Vec::len);
        let flat: Vec<u32> = tokens.concat();
        let tokens = Tensor::from_vec(flat, (tokens.len(), side), self.model.device())?;
        images::from_tensor(&no_grad(|| self.model.decode(&tokens))?)
    }
}

impl ImageTokenizer for VqTokenizer {
    fn encode(&self, images: &[RgbImage]) -> Result<Vec<Vec<u32>>> {
        images::check_side(images, self.resolution, "LlamaGen's image tokenizer")?;
        let pixels = images::to_tensor(images, self.model.device())?;
        Ok(no_grad(|| self.model.encode(&pixels))?.to_vec2::<u32>()?)
    }
}

/// Where the image tokenizer of the checkpoint in `dir` lies, and how many tokens an image has.
pub fn tokenizer_files(dir: &Path, resolution: Option<u32>) -> Result<(PathBuf, usize)> {
    let files = Files::find(dir, resolution)?;
    Ok((files.tokenizer().to_path_buf(), files.block_size()?))
}

/// The folder of the caption encoder of the checkpoint in `dir`, and how many tokens of a caption it takes.
///
/// # Errors
/// When a part of the checkpoint is missing.
pub fn caption_encoder(dir: &Path, resolution: Option<u32>) -> Result<(PathBuf, usize)> {
    let files = Files::find(dir, resolution)?;
    Ok((files.t5().to_path_buf(), files.caption_length()?))
}

/// Side in pixels of the images of the checkpoint in `dir`.
///
/// # Errors
/// When a part of the checkpoint is missing.
pub fn resolution(dir: &Path, asked: Option<u32>) -> Result<u32> {
    Files::find(dir, asked)?.resolution()
}

/// The caption encoder with a memory of what it has encoded.
struct Captions {
    tokenizer: TextTokenizer,
    encoder: T5Encoder,
    /// Kept for others that are opened from the same files.
    _weights: Weights,
    known: HashMap<String, (Tensor, Vec<u8>)>,
    length: usize,
    device: Device,
}

impl Captions {
    /// Features (length, d) with the valid ones at the right end and zeros before, and the mask.
    fn encode(&mut self, prompt: &str) -> Result<(Tensor, Vec<u8>)> {
        if let Some(known) = self.known.get(prompt) {
            return Ok(known.clone());
        }
        // One caption at a time and without padding, so that a caption's features depend on nothing else.
        let ids = self.tokenizer.ids(prompt, self.length)?;
        let count = ids.len();
        let ids = Tensor::from_vec(ids, (1, count), &self.device)?;
        let mask = Tensor::ones((1, count), DType::U8, &self.device)?;
        let features = no_grad(|| self.encoder.forward(&ids, &mask))?.squeeze(0)?;
        let features = features.pad_with_zeros(0, self.length - count, 0)?.detach();
        let mut mask = vec![0; self.length - count];
        mask.resize(self.length, 1);
        self.known
            .insert(prompt.to_string(), (features.clone(), mask.clone()));
        Ok((features, mask))
    }

    fn batch<'a>(&mut self, prompts: impl Iterator<Item = &'a str>) -> Result<(Tensor, Tensor)> {
        let encoded = prompts
            .map(|prompt| self.encode(prompt))
            .collect::<Result<Vec<_>>>()?;
        let features = Tensor::stack(
            &encoded.iter().map(|(f, _)| f.clone()).collect::<Vec<_>>(),
            0,
        )?;
        let mask: Vec<u8> = encoded
            .iter()
            .flat_map(|(_, mask)| mask.iter().copied())
            .collect();
        let mask = Tensor::from_vec(mask, (encoded.len(), self.length), &self.device)?;
        Ok((features, mask))
    }
}

/// LlamaGen, ready to learn and to draw.
pub struct LlamaGen {
    gpt: Gpt,
    captions: Captions,
    tokenizer: VqTokenizer,
    weights: Weights,
    adapter: Option<Arc<Adapter>>,
    config_text: String,
    base: String,
    condition_dropout: f64,
    recomputes: bool,
    at_once: usize,
    device: Device,
}

impl LlamaGen {
    /// Opens the checkpoint in `opening.dir`, in proxytune's layout or as it is published; see [`Files::find`].
    /// Everything that is missing, misshapen or unknown in any part is reported at once.
    pub fn open(opening: &LearnerOptions) -> Result<Self> {
        let device = &opening.device;
        let files = Files::find(&opening.dir, opening.resolution)?;
        let seed = match opening.tuning {
            Tuning::Full => Some(opening.seed),
            Tuning::Lora(_) | Tuning::Given(_) | Tuning::Frozen => None,
        };
        let (published, weights) = files.open_gpt(opening.dtype, seed, device)?;
        let config = Config {
            token_dropout_p: opening.dropout,
            resid_dropout_p: opening.dropout,
            ffn_dropout_p: opening.dropout,
            ..published.clone()
        };
        let (weights, adapter) = opening.attach(weights);
        let gpt = Gpt::new(&config, &weights)?;
        weights.expect_no_others();
        let t5 = files.t5();
        let t5_weights = checkpoint_files::open(t5, "model", weights.precision(), device)?;
        let encoder = T5Encoder::new(&read_config(&t5.join("config.json"))?, &t5_weights)?;
        let (tokenizer, vq_weights) = VqTokenizer::build(&files, device)?;
        if opening
            .resolution
            .is_some_and(|asked| asked != tokenizer.resolution())
        {
            return Err(Error::invalid(
                format!(
                    "{} draws images of {} pixels",
                    opening.name,
                    tokenizer.resolution()
                ),
                "leave resolution out, or name the checkpoint for another size",
            ));
        }
        finish_all(&opening.dir, [&weights, &t5_weights, &vq_weights])?;
        let captions = Captions {
            tokenizer: TextTokenizer::from_folder(t5)?,
            encoder,
            _weights: t5_weights,
            known: HashMap::new(),
            length: config.cls_token_num,
            device: device.clone(),
        };
        let config_text = serde_json::to_string_pretty(&published).map_err(|e| Error::Invalid {
            what: format!("the config of {} cannot be written: {e}", opening.name),
            hint: None,
        })?;
        Ok(Self {
            gpt,
            captions,
            tokenizer,
            adapter,
            config_text: config_text + "\n",
            base: opening.name.clone(),
            condition_dropout: opening.condition_dropout,
            recomputes: opening.recomputes(&weights),
            at_once: opening.at_once(&weights, AT_ONCE),
            weights,
            device: device.clone(),
        })
    }
}

/// Equal ones of `items` once, and how many there are of each.
fn counted<T: PartialEq>(items: Vec<T>) -> (Vec<T>, Vec<usize>) {
    let (mut kinds, mut counts) = (Vec::<T>::new(), Vec::<usize>::new());
    for item in items {
        match kinds.iter().position(|kind| *kind == item) {
            Some(kind) => counts[kind] += 1,
            None => {
                kinds.push(item);
                counts.push(1);
            }
        }
    }
    (kinds, counts)
}

/// The mean of `losses`, equally many of each pair, if pair i counts `counts[i]` times.
fn mean(losses: &Tensor, counts: &[usize]) -> Result<Tensor> {
    if counts.iter().all(|count| *count == 1) {
        return Ok(losses.mean_all()?);
    }
    let of_each = losses.elem_count() / counts.len();
    let total = (counts.iter().sum::<usize>() * of_each) as f64;
    let weights: Vec<f32> = counts
        .iter()
        .flat_map(|count| std::iter::repeat_n((*count as f64 / total) as f32, of_each))
        .collect();
    let weights = Tensor::from_vec(weights, losses.shape(), losses.device())?;
    Ok((losses * weights)?.sum_all()?)
}

impl Learner for LlamaGen {
    fn resolution(&self) -> u32 {
        self.tokenizer.resolution()
    }

    fn tokens_per_image(&self) -> Option<usize> {
        Some(self.gpt.config().block_size)
    }

    fn encode(&mut self, images: &[RgbImage]) -> Result<Vec<Example>> {
        Ok(self
            .tokenizer
            .encode(images)?
            .into_iter()
            .map(Example::Tokens)
            .collect())
    }

    fn loss(&mut self, batch: &[TrainingExample], generator: &mut ChaCha8Rng) -> Result<Tensor> {
        let tokens = batch
            .iter()
            .map(|pair| match &pair.example {
                Example::Tokens(tokens) => Ok(tokens.as_slice()),
                Example::Latents { .. } => Err(Error::Invalid {
                    what: "an autoregressive model was given latents to learn".into(),
                    hint: None,
                }),
            })
            .collect::<Result<Vec<_>>>()?;
        let n = tokens.first().map_or(0, |tokens| tokens.len());
        let pairs: Vec<_> = tokens
            .into_iter()
            .zip(batch)
            .map(|(tokens, pair)| {
                let drops = generator.random::<f64>() < self.condition_dropout;
                (tokens, pair.prompt.as_str(), drops)
            })
            .collect();
        // A few photos make many batches, with the same pair more than once.
        let (pairs, counts) = match self.gpt.config().drops_out() {
            true => (pairs, vec![1; batch.len()]),
            false => counted(pairs),
        };
        let b = pairs.len();
        let prompts = pairs.iter().map(|(_, prompt, _)| *prompt);
        let (captions, mask) = self.captions.batch(prompts)?;
        let drop: Vec<bool> = pairs.iter().map(|(_, _, drops)| *drops).collect();
        let captions = self.gpt.drop_captions(&captions, &drop)?;
        let targets: Vec<u32> = pairs
            .iter()
            .flat_map(|(tokens, ..)| *tokens)
            .copied()
            .collect();
        let targets = Tensor::from_vec(targets, (b, n), &self.device)?;
        let variables = self.variables();
        let (gpt, recomputes) = (&self.gpt, self.recomputes);
        mean_over_parts(
            &counts,
            self.at_once,
            &variables,
            generator,
            |part, generator| {
                let rows = |x: &Tensor| x.narrow(0, part.start, part.len());
                let (captions, mask, targets) = (rows(&captions)?, rows(&mask)?, rows(&targets)?);
                let inputs = targets.narrow(1, 0, n - 1)?.contiguous()?;
                let logits = recomputing(recomputes, || {
                    gpt.forward(&captions, &mask, &inputs, Some(generator))
                })?;
                let logits = logits.reshape((part.len() * n, logits.dim(2)?))?;
                let losses = ops::cross_entropy(&logits, &targets.flatten_all()?)?;
                mean(&losses, &counts[part])
            },
        )
    }

    fn generate(&mut self, requests: &[Request], sampling: &Sampling) -> Result<Vec<RgbImage>> {
        let (captions, mask) = self
            .captions
            .batch(requests.iter().map(|request| request.prompt.as_str()))?;
        let seeds: Vec<u64> = requests.iter().map(|request| request.seed).collect();
        let settings = sampling.autoregressive()?;
        let count = self.gpt.config().block_size;
        let tokens =
            merged(|| no_grad(|| self.gpt.generate(&captions, &mask, count, settings, &seeds)))?;
        self.tokenizer.decode(&tokens)
    }

    fn variables(&self) -> Vec<(String, Var)> {
        match &self.adapter {
            Some(adapter) => adapter.variables(),
            // The null condition is a buffer: nothing is learnt there.
            None => {
                let trained = |(name, _): &(String, Var)| name != "cls_embedding.uncond_embedding";
                self.weights
                    .variables()
                    .into_iter()
                    .filter(trained)
                    .collect()
            }
        }
    }

    fn save(&self, dir: &Path, values: &BTreeMap<String, Tensor>) -> Result<()> {
        match &self.adapter {
            Some(adapter) => adapters::write_peft(dir, values, adapter.config(), &self.base),
            None => adapters::write_whole(dir, &self.weights, values, &self.config_text),
        }
    }

    fn read(&self, dir: &Path) -> Result<BTreeMap<String, Tensor>> {
        adapters::read_trained(dir, self.adapter.as_deref(), &self.weights)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_lessons_count_as_often_as_they_occur() {
        let batch = vec!["a", "b", "a", "c", "b", "a"];
        assert_eq!(counted(batch), (vec!["a", "b", "c"], vec![3, 2, 1]));
        let of = |values: &[f32], counts: &[usize]| {
            let losses = Tensor::new(values, &Device::Cpu).unwrap();
            mean(&losses, counts).unwrap().to_scalar::<f32>().unwrap()
        };
        // Two pairs of two tokens, once as a batch of four and once by their counts.
        let whole = of(&[1.0, 2.0, 5.0, 6.0, 5.0, 6.0, 5.0, 6.0], &[1; 4]);
        assert!((of(&[1.0, 2.0, 5.0, 6.0], &[1, 3]) - whole).abs() < 1e-6);
    }
}
