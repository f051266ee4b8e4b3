//! What the diffusion models of the drawn world share: latents and captions to learn from, the text encoders, and the
//! folders around the network.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use super::context::Context;
use super::pool::Pool;
use super::scenes::{Scenes, normal};
use super::settings::Training;
use super::{files, frozen};
use crate::models::autoencoder::AutoencoderKl;
use crate::models::clip::{TextConfig, TextModel, TextOutput};
use crate::models::t5::T5Encoder;
use crate::models::tokenizer::TextTokenizer;
use crate::nano::captions::caption;
use crate::nn::no_grad;
use crate::{Error, Result};

/// What projects CLIP's pooled state.
const PROJECTION: &str = "text_projection.weight";

/// T5's padding.
const PADDING: u32 = 0;

/// One batch.
pub struct Lesson {
    /// (b, channels, side, side), scaled as the network sees them.
    pub latents: Tensor,
    /// Empty where a caption is dropped for guidance.
    pub captions: Vec<String>,
    /// For the noise.
    pub generator: ChaCha8Rng,
}

/// What the text encoders say of captions, one row for each.
pub struct Texts {
    pub clip: TextOutput,
    /// T5's states (b, n, its width), where there is a T5.
    pub t5: Option<Tensor>,
}

impl Texts {
    /// The token states that an MMDiT attends to, (b, n, width): CLIP's, then T5's.
    ///
    /// # Errors
    /// When the two are not equally wide.
    pub fn joint(&self) -> Result<Tensor> {
        match &self.t5 {
            None => Ok(self.clip.penultimate.clone()),
            Some(t5) => {
                let (clip, wide) = (self.clip.penultimate.dim(2)?, t5.dim(2)?);
                if clip != wide {
                    return Err(Error::invalid(
                        format!("a CLIP {clip} wide beside a T5 {wide} wide"),
                        "give clip.text.width and gpt.t5.d_model one width, and train both again",
                    ));
                }
                Ok(Tensor::cat(&[&self.clip.penultimate, t5], 1)?)
            }
        }
    }
}

/// The lessons of one model.
pub struct Lessons<'a> {
    device: &'a Device,
    training: &'a Training,
    vae: AutoencoderKl,
    clip: TextModel,
    pub text: TextConfig,
    tokenizer: TextTokenizer,
    t5: Option<(T5Encoder, TextTokenizer)>,
    /// Channels of the latents, and their side.
    pub channels: usize,
    pub side: usize,
    scenes: Scenes,
    pool: RefCell<Pool<Vec<f32>>>,
}

impl<'a> Lessons<'a> {
    /// Those of `name` in `folder`, which has its autoencoder and text encoders already (see [`furnish`]), with the CLIP
    /// of this `ending`. Up to `pool` scenes are encoded, the first of them number `first`. `t5` is T5's place among
    /// the text encoders, if there is one.
    ///
    /// # Errors
    /// When a component is missing or damaged.
    pub fn open(
        context: &'a Context,
        (name, ending): (&str, &str),
        folder: &Path,
        training: &'a Training,
        (pool, first): (usize, usize),
        t5: Option<usize>,
    ) -> Result<Self> {
        let device = &context.device;
        let vae = frozen::vae(&folder.join("vae"), device)?;
        let (clip, text) =
            frozen::clip_text(&folder.join(format!("text_encoder{ending}")), device)?;
        let t5 = t5
            .map(|place| -> Result<_> {
                let tokenizer = folder.join(format!("tokenizer_{place}/tokenizer.json"));
                Ok((
                    frozen::t5(&folder.join(format!("text_encoder_{place}")), device)?,
                    TextTokenizer::from_file(&tokenizer)?,
                ))
            })
            .transpose()?;
        Ok(Self {
            device,
            training,
            channels: vae.config().latent_channels,
            side: context.settings.side(training) / vae.config().downscale(),
            vae,
            clip,
            text,
            tokenizer: TextTokenizer::from_file(
                &folder.join(format!("tokenizer{ending}/tokenizer.json")),
            )?,
            t5,
            scenes: context.scenes(name, training),
            pool: RefCell::new(Pool::new(pool, first)),
        })
    }

    /// The batch after `seen` images, with the share `dropout` of its captions empty.
    ///
    /// # Errors
    /// When a scene cannot be encoded.
    pub fn lesson(&self, seen: usize, dropout: f64) -> Result<Lesson> {
        let mut generator = self.scenes.generator("step", seen);
        let count = self.training.batch_size;
        let chosen = self
            .pool
            .borrow_mut()
            .take(&self.scenes, count, &mut generator, |fresh| {
                let pixels = self.scenes.pixels(fresh, self.device)?;
                let (mean, logvar) = no_grad(|| self.vae.encode(&pixels))?;
                let deviation = (logvar * 0.5)?.exp()?;
                let own = &mut self.scenes.generator("latents", seen);
                let noise = normal(mean.dims(), own, self.device)?;
                let latents = self.vae.scale(&(mean + (deviation * noise)?)?)?;
                Ok(latents.flatten_from(1)?.to_vec2::<f32>()?)
            })?;
        let captions = chosen
            .iter()
            .map(|(scene, _)| match generator.random_bool(dropout) {
                true => String::new(),
                false => caption(scene, &mut generator),
            })
            .collect();
        let shape = (count, self.channels, self.side, self.side);
        let mut values = Vec::with_capacity(count * self.channels * self.side * self.side);
        for (_, latents) in &chosen {
            values.extend_from_slice(latents);
        }
        Ok(Lesson {
            latents: Tensor::from_vec(values, shape, self.device)?,
            captions,
            generator,
        })
    }

    /// What the text encoders say of `captions`, without a graph. T5 reads as many positions as CLIP, padding included,
    /// as the pipelines have it.
    ///
    /// # Errors
    /// When a caption cannot be tokenized.
    pub fn texts(&self, captions: &[String]) -> Result<Texts> {
        let (length, end) = (self.text.max_position_embeddings, self.text.eos_token_id);
        let (ids, _) = self
            .tokenizer
            .encode_batch(captions, length, end, self.device)?;
        no_grad(|| {
            let t5 = self.t5.as_ref().map(|(encoder, tokenizer)| -> Result<_> {
                let (ids, _) = tokenizer.encode_batch(captions, length, PADDING, self.device)?;
                encoder.forward(&ids, &ids.ones_like()?)
            });
            Ok(Texts {
                clip: self.clip.forward(&ids)?,
                t5: t5.transpose()?,
            })
        })
    }
}

/// Puts what a diffusion model stands on into its `folder`, where it is not there yet: nano SD3's autoencoder, for
/// images of `side` pixels, and its CLIP as each of `clips` (their endings, such as `_2`, and whether they project the
/// pooled state); LlamaGen's T5 at `t5`.
///
/// # Errors
/// When one of these has not been trained, or a file cannot be written.
pub fn furnish(
    context: &Context,
    folder: &Path,
    side: usize,
    clips: &[(&str, bool)],
    t5: Option<usize>,
) -> Result<()> {
    let sd3 = context.out.join("sd3");
    let weights = "diffusion_pytorch_model.safetensors";
    if !folder.join("vae").join(weights).is_file() {
        let mut config = read(&sd3.join("vae/config.json"))?;
        config["sample_size"] = json!(side);
        files::write_json(&folder.join("vae/config.json"), &config)?;
        copy(&sd3.join("vae"), &folder.join("vae"), weights)?;
    }
    for (ending, projected) in clips {
        let encoder = folder.join(format!("text_encoder{ending}"));
        if !encoder.join("model.safetensors").is_file() {
            let tokenizer = folder.join(format!("tokenizer{ending}"));
            let end = "<|endoftext|>";
            describe_tokenizer(&sd3, &tokenizer, [end, end, "<|unk|>"])?;
            copy(&sd3.join("tokenizer"), &tokenizer, "tokenizer.json")?;
            copy_clip(&sd3.join("text_encoder"), &encoder, *projected)?;
        }
    }
    let Some(place) = t5 else {
        return Ok(());
    };
    let encoder = folder.join(format!("text_encoder_{place}"));
    if !encoder.join("model.safetensors").is_file() {
        let (t5, tokenizer) = (
            context.out.join("llamagen/t5"),
            folder.join(format!("tokenizer_{place}")),
        );
        describe_tokenizer(&sd3, &tokenizer, ["<pad>", "</s>", "<unk>"])?;
        copy(&t5, &tokenizer, "tokenizer.json")?;
        copy(&t5, &encoder, "config.json")?;
        copy(&t5, &encoder, "model.safetensors")?;
    }
    Ok(())
}

/// Says beside the tokenizer in `folder` how long its texts are, as CLIP's in `sd3` are, so that pipelines neither fill
/// hundreds of positions with padding nor ask for more than there are; and which tokens pad, end and stand for others.
fn describe_tokenizer(sd3: &Path, folder: &Path, [pad, end, unknown]: [&str; 3]) -> Result<()> {
    let clip = read(&sd3.join("text_encoder/config.json"))?;
    let longest = &clip["max_position_embeddings"];
    let described = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        // What the pipelines' T5 is given, which else fills hundreds of positions with padding.
        "max_sequence_length": longest,
        "pad_token": pad,
        "eos_token": end,
        "unk_token": unknown,
    });
    files::write_json(&folder.join("tokenizer_config.json"), &described)
}

/// The projection of the pooled state is no part of a `CLIPTextModel`.
fn copy_clip(from: &Path, to: &Path, projected: bool) -> Result<()> {
    let (mut tensors, _) = crate::files::read_tensors(&from.join("model.safetensors"))?;
    let mut config = read(&from.join("config.json"))?;
    if !projected {
        tensors.remove(PROJECTION);
        config["architectures"] = json!(["CLIPTextModel"]);
    }
    files::write_json(&to.join("config.json"), &config)?;
    crate::files::write_tensors(&to.join("model.safetensors"), &tensors, &[])
}

/// The matrix (projection, width) that CLIP's pooled state is projected with, f32.
///
/// # Errors
/// When `sd3` has no CLIP.
pub fn projection(context: &Context) -> Result<Tensor> {
    let file = context.out.join("sd3/text_encoder/model.safetensors");
    absent(&file)?;
    let (mut tensors, _) = crate::files::read_tensors(&file)?;
    match tensors.remove(PROJECTION) {
        Some(tensor) => Ok(tensor.to_dtype(DType::F32)?.to_device(&context.device)?),
        None => Err(Error::Checkpoint {
            path: file,
            faults: vec![format!("{PROJECTION} is missing")],
        }),
    }
}

fn read(path: &Path) -> Result<Value> {
    absent(path)?;
    crate::files::read_json(path)
}

fn copy(from: &Path, to: &Path, name: &str) -> Result<()> {
    let from = from.join(name);
    absent(&from)?;
    let bytes = crate::files::read(&from, crate::files::LISTS).map_err(Error::io(&from))?;
    crate::files::write(&to.join(name), &bytes)
}

fn absent(path: &Path) -> Result<()> {
    match path.is_file() {
        true => Ok(()),
        false => Err(Error::invalid(
            format!("{} is not there", path.display()),
            "train the models that this one stands on first: clip and vae, then sd3, and gpt for its T5",
        )),
    }
}

/// `value` as the config of the diffusers class `name`.
///
/// # Errors
/// When it is no JSON object.
pub fn classed(name: &str, value: impl serde::Serialize) -> Result<Value> {
    let failed = |e: serde_json::Error| Error::Invalid {
        what: format!("the config of {name}: {e}"),
        hint: None,
    };
    let own: Map<String, Value> = serde_json::to_value(value)
        .and_then(serde_json::from_value)
        .map_err(failed)?;
    let mut all = Map::from_iter([("_class_name".to_string(), json!(name))]);
    all.extend(own);
    Ok(Value::Object(all))
}

/// The weights of the network in `folder`.
pub fn network_file(folder: &Path, component: &str) -> PathBuf {
    folder
        .join(component)
        .join("diffusion_pytorch_model.safetensors")
}
