//! Where the parts of a LlamaGen checkpoint lie: as proxytune keeps them (`config.json` with the GPT's weights, `vq/`,
//! `t5/`), or as they are published (`t2i_XL_stage2_512.pt`, `vq_ds16_t2i.pt`), without a config.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use super::{gpt, vq};
use crate::models::checkpoint_files::WeightFiles;
use crate::models::limits::{Limited, read_config};
use crate::nn::{Precision, Weights};
use crate::{Error, Result};

/// Pixels on a side of what one token stands for, in all published tokenizers for text to image.
const DOWNSAMPLING: usize = 16;

/// The weights of a part, and its config where there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    /// A folder with weights of any kind, or a single file.
    weights: PathBuf,
    config: Option<PathBuf>,
}

impl Part {
    fn folder(folder: &Path) -> Option<Self> {
        let config = folder.join("config.json");
        config.is_file().then(|| Self {
            weights: folder.to_path_buf(),
            config: Some(config),
        })
    }

    fn files(&self) -> Result<WeightFiles> {
        if self.weights.is_dir() {
            WeightFiles::find(&self.weights, "model")
        } else {
            Ok(WeightFiles::single(&self.weights))
        }
    }
}

/// The parts of one checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    gpt: Part,
    vq: Part,
    t5: PathBuf,
    /// Tokens per image that the published file's name or the asked resolution tells.
    block_size: Option<usize>,
}

impl Files {
    /// Finds the parts in `dir`. Where several published GPTs lie there, `resolution` says which one is meant.
    ///
    /// # Errors
    /// When a part is missing, or it cannot be told which file is meant: everything at once.
    pub fn find(dir: &Path, resolution: Option<u32>) -> Result<Self> {
        let mut faults = Vec::new();
        let mut block_size = None;
        let gpt = Part::folder(dir).or_else(|| match published_gpt(dir, resolution) {
            Ok((weights, side)) => {
                block_size = Some((side as usize / DOWNSAMPLING).pow(2));
                Some(Part {
                    weights,
                    config: None,
                })
            }
            Err(fault) => {
                faults.push(fault);
                None
            }
        });
        let vq = Part::folder(&tokenizer_dir(dir)).or_else(|| match published_vq(dir) {
            Ok(weights) => Some(Part {
                weights,
                config: None,
            }),
            Err(fault) => {
                faults.push(fault);
                None
            }
        });
        let t5 = ["t5", "flan-t5-xl", "t5-ckpt/flan-t5-xl"]
            .map(|name| dir.join(name))
            .into_iter()
            .find(|folder| folder.join("config.json").is_file());
        if t5.is_none() {
            faults.push("t5/config.json is missing: the caption encoder, flan-t5-xl".into());
        }
        match (gpt, vq, t5) {
            (Some(gpt), Some(vq), Some(t5)) => Ok(Self {
                gpt,
                vq,
                t5,
                block_size,
            }),
            _ => Err(Error::Checkpoint {
                path: dir.to_path_buf(),
                faults,
            }),
        }
    }

    /// Tokens per image.
    pub fn block_size(&self) -> Result<usize> {
        match (&self.gpt.config, self.block_size) {
            (Some(config), _) => Ok(read_config::<gpt::Config>(config)?.block_size),
            (None, block_size) => Ok(block_size.unwrap_or(0)),
        }
    }

    /// The GPT's weights; those of the image tokenizer and of the caption encoder are there too.
    ///
    /// # Errors
    /// When any are missing.
    pub fn backbone(&self) -> Result<WeightFiles> {
        self.vq.files()?;
        WeightFiles::find(&self.t5, "model")?;
        self.gpt.files()
    }

    /// Caption positions: what the config says, or else the published number.
    pub fn caption_length(&self) -> Result<usize> {
        let config = match &self.gpt.config {
            Some(config) => read_config(config)?,
            None => gpt::Config::default(),
        };
        Ok(config.cls_token_num)
    }

    /// Side in pixels of the images.
    pub fn resolution(&self) -> Result<u32> {
        let downsampling = match &self.vq.config {
            Some(config) => read_config::<vq::Config>(config)?.downsampling(),
            None => DOWNSAMPLING,
        };
        Ok((self.block_size()?.isqrt() * downsampling) as u32)
    }

    /// The folder or file with the image tokenizer.
    pub fn tokenizer(&self) -> &Path {
        &self.vq.weights
    }

    /// The caption encoder's folder.
    pub fn t5(&self) -> &Path {
        &self.t5
    }

    /// The GPT's weights, frozen in `precision`, or f32 and trainable where a `seed` is given; and its config.
    pub fn open_gpt(
        &self,
        precision: impl Into<Precision>,
        seed: Option<u64>,
        device: &Device,
    ) -> Result<(gpt::Config, Weights)> {
        let files = self.gpt.files()?;
        let weights = match seed {
            Some(seed) => Weights::trainable(&files.into_safetensors()?, seed, device)?,
            None => files.open(precision, device)?,
        };
        let config = match &self.gpt.config {
            Some(config) => read_config(config)?,
            None => gpt_config(&weights, self.block_size()?)?.limited(&self.gpt.weights)?,
        };
        Ok((config, weights))
    }

    /// The GPT's config as proxytune's layout has it.
    pub fn gpt_config_text(&self) -> Result<String> {
        let config = match &self.gpt.config {
            Some(config) => read_config(config)?,
            None => {
                let files = self.gpt.files()?.into_safetensors()?;
                let weights = Weights::from_files(&files, DType::F32, &Device::Cpu)?;
                gpt_config(&weights, self.block_size()?)?.limited(&self.gpt.weights)?
            }
        };
        let text = serde_json::to_string_pretty(&config).map_err(|e| Error::Invalid {
            what: format!("the GPT's config cannot be written: {e}"),
            hint: None,
        })?;
        Ok(text + "\n")
    }

    /// The image tokenizer's weights, frozen in f32, and its config.
    pub fn open_vq(&self, device: &Device) -> Result<(vq::Config, Weights)> {
        let weights = self.vq.files()?.open(DType::F32, device)?;
        let config = match &self.vq.config {
            Some(config) => read_config(config)?,
            None => vq_config(&weights)?.limited(&self.vq.weights)?,
        };
        Ok((config, weights))
    }
}

/// Where the tokenizer of the checkpoint in `dir` lies in proxytune's own layout.
pub fn tokenizer_dir(dir: &Path) -> PathBuf {
    dir.join("vq")
}

fn files_like(dir: &Path, start: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let ends = [".pt", ".pth", ".safetensors"];
            name.starts_with(start) && ends.iter().any(|end| name.ends_with(end))
        })
        .collect();
    found.sort();
    found
}

/// The published GPT in `dir` and the side of its images in pixels, which its name ends with.
fn published_gpt(dir: &Path, resolution: Option<u32>) -> Result<(PathBuf, u32), String> {
    let all: Vec<(PathBuf, Option<u32>)> = files_like(dir, "t2i_")
        .into_iter()
        .map(|path| {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let side = stem.rsplit('_').next().and_then(|end| end.parse().ok());
            (path, side)
        })
        .collect();
    let fits = |(_, side): &&(PathBuf, Option<u32>)| {
        resolution.is_none() || side.is_none() || *side == resolution
    };
    let fitting: Vec<&(PathBuf, Option<u32>)> = all.iter().filter(fits).collect();
    match (all.len(), fitting.as_slice()) {
        (0, _) => Err("neither config.json nor a published t2i_*.pt is there".to_string()),
        (_, []) => Err(format!(
            "no t2i_*.pt there is for images of {} pixels",
            resolution.unwrap_or(0)
        )),
        (_, [(path, side)]) => match side.or(resolution) {
            Some(side) => Ok((path.clone(), side)),
            None => Err(format!(
                "{} does not tell the size of its images: set resolution",
                path.display()
            )),
        },
        (_, several) => Err(format!(
            "{} published GPTs are there: set resolution to say which is meant",
            several.len()
        )),
    }
}

/// The published image tokenizer in `dir`: the one for text to image, else the only one.
fn published_vq(dir: &Path) -> Result<PathBuf, String> {
    let all = files_like(dir, "vq_");
    let name = |path: &Path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    };
    let of_text: Vec<&PathBuf> = all.iter().filter(|p| name(p).contains("t2i")).collect();
    match (of_text.as_slice(), all.as_slice()) {
        ([one], _) => Ok(one.to_path_buf()),
        ([], [one]) => Ok(one.clone()),
        ([], []) => Err("neither vq/config.json nor vq_ds16_t2i.pt is there".to_string()),
        _ => {
            let names: Vec<String> = all.iter().map(|path| name(path)).collect();
            Err(format!(
                "several image tokenizers are there: {}; leave the one of the GPT",
                names.join(", ")
            ))
        }
    }
}

/// What the shapes of a published GPT tell of its config. The number of heads is that of LlamaGen's table of sizes:
/// heads are 64 wide but in the 3B and 7B models, which have 32.
fn gpt_config(weights: &Weights, block_size: usize) -> Result<gpt::Config> {
    let dims = |name: &str| weights.dims(name).unwrap_or_default();
    let (Some(table), Some(null), Some(projection)) = (
        weights.dims("tok_embeddings.weight"),
        weights.dims("cls_embedding.uncond_embedding"),
        weights.dims("cls_embedding.cap_proj.fc1.weight"),
    ) else {
        let class_conditional = weights.contains("cls_embedding.embedding_table.weight");
        return Err(Error::invalid(
            if class_conditional {
                "a LlamaGen GPT that draws classes, not captions"
            } else {
                "the file holds no LlamaGen GPT"
            },
            "use a text-to-image checkpoint: t2i_XL_stage1_256.pt or t2i_XL_stage2_512.pt",
        ));
    };
    let (vocab_size, dim) = (at(&table, 0), at(&table, 1));
    let n_layer = (0..)
        .take_while(|i| weights.contains(&format!("layers.{i}.attention_norm.weight")))
        .count();
    let n_head = match dim {
        3200 | 4096 => 32,
        _ => (dim / 64).max(1),
    };
    // Rows are those of the queries, then as many of keys and of values.
    let rows = at(&dims("layers.0.attention.wqkv.weight"), 0);
    let n_kv_head = (rows.saturating_sub(dim) / 2 * n_head) / dim.max(1);
    Ok(gpt::Config {
        dim,
        n_layer,
        n_head,
        n_kv_head: (n_kv_head != n_head && n_kv_head > 0).then_some(n_kv_head),
        caption_dim: at(&projection, 1),
        vocab_size,
        cls_token_num: at(&null, 0),
        block_size,
        ..gpt::Config::default()
    })
}

/// What the shapes of a published image tokenizer tell of its config.
fn vq_config(weights: &Weights) -> Result<vq::Config> {
    let dims = |name: &str| weights.dims(name).unwrap_or_default();
    let ch = at(&dims("encoder.conv_in.weight"), 0);
    let codes = dims("quantize.embedding.weight");
    if ch == 0 || codes.len() != 2 {
        return Err(Error::invalid(
            "the file holds no LlamaGen image tokenizer",
            "use vq_ds16_t2i.pt",
        ));
    }
    let factors = |part: &str| -> Vec<usize> {
        (0..)
            .map(|i| dims(&format!("{part}.conv_blocks.{i}.res.0.conv1.weight")))
            .take_while(|dims| !dims.is_empty())
            .map(|dims| at(&dims, 0) / ch)
            .collect()
    };
    let mut decoder = factors("decoder");
    // There the lowest resolution comes first.
    decoder.reverse();
    Ok(vq::Config {
        codebook_size: codes[0],
        codebook_embed_dim: codes[1],
        encoder_ch_mult: factors("encoder"),
        decoder_ch_mult: decoder,
        z_channels: at(&dims("encoder.conv_out.weight"), 0),
        ch,
        ..vq::Config::default()
    })
}

fn at(dims: &[usize], place: usize) -> usize {
    dims.get(place).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Tensor;
    use std::collections::HashMap;

    fn place(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        }
        folder
    }

    fn name(path: &Path) -> String {
        path.file_name().unwrap().to_string_lossy().into_owned()
    }

    #[test]
    fn the_resolution_says_which_of_the_published_stages_is_meant() {
        let both = place(&[
            "t2i_XL_stage1_256.pt",
            "t2i_XL_stage2_512.pt",
            "vq_ds16_t2i.pt",
            "t5/config.json",
        ]);
        for (side, file, tokens) in [
            (256, "t2i_XL_stage1_256.pt", 256),
            (512, "t2i_XL_stage2_512.pt", 1024),
        ] {
            let files = Files::find(both.path(), Some(side)).unwrap();
            assert_eq!(name(&files.gpt.weights), file);
            assert_eq!(files.block_size().unwrap(), tokens);
            assert_eq!(name(files.tokenizer()), "vq_ds16_t2i.pt");
        }
        let error = Files::find(both.path(), None).unwrap_err().to_string();
        assert!(error.contains("set resolution"), "{error}");
        let error = Files::find(both.path(), Some(384)).unwrap_err().to_string();
        assert!(error.contains("384"), "{error}");
    }

    #[test]
    fn of_several_image_tokenizers_the_one_for_text_is_taken_or_none() {
        let found = |tokenizers: &[&str]| {
            let parts = ["t2i_XL_stage1_256.pt", "t5/config.json"];
            let folder = place(&[&parts, tokenizers].concat());
            let files = Files::find(folder.path(), None);
            files.map(|files| name(files.tokenizer()))
        };
        let classes = "vq_ds16_c2i.pt";
        assert_eq!(
            found(&[classes, "vq_ds16_t2i.pt"]).unwrap(),
            "vq_ds16_t2i.pt"
        );
        assert_eq!(found(&[classes]).unwrap(), classes);
        for several in [
            [classes, "vq_ds8_c2i.pt"],
            ["vq_ds16_t2i.pt", "vq_ds16_t2i.safetensors"],
        ] {
            let error = found(&several).unwrap_err().to_string();
            assert!(several.iter().all(|name| error.contains(name)), "{error}");
        }
    }

    #[test]
    fn everything_that_is_missing_is_named_at_once() {
        let empty = place(&["t2i_XL.pt"]);
        let error = Files::find(empty.path(), None).unwrap_err().to_string();
        for part in ["t2i_XL.pt", "vq_ds16_t2i.pt", "t5/config.json"] {
            assert!(error.contains(part), "{part} in {error}");
        }
    }

    #[test]
    fn every_size_of_the_table_is_told_by_its_shapes() {
        let sizes = [
            (768, 12, 12),
            (1024, 24, 16),
            (1280, 36, 20),
            (1536, 48, 24),
            (2560, 48, 40),
            (2048, 22, 32),
            (3200, 24, 32),
            (4096, 32, 32),
        ];
        for (dim, n_layer, n_head) in sizes {
            // A broadcast tensor has the shape without the memory.
            let tensor = |shape: &[usize]| {
                let zero = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
                zero.broadcast_as(shape).unwrap()
            };
            let mut tensors = HashMap::from([
                ("tok_embeddings.weight".into(), tensor(&[16384, dim])),
                (
                    "cls_embedding.uncond_embedding".into(),
                    tensor(&[120, 2048]),
                ),
                (
                    "cls_embedding.cap_proj.fc1.weight".into(),
                    tensor(&[dim, 2048]),
                ),
            ]);
            for i in 0..n_layer {
                tensors.insert(format!("layers.{i}.attention_norm.weight"), tensor(&[dim]));
                tensors.insert(
                    format!("layers.{i}.attention.wqkv.weight"),
                    tensor(&[3 * dim, dim]),
                );
            }
            let weights = Weights::from_tensors(tensors, DType::F32, &Device::Cpu);
            let config = gpt_config(&weights, 1024).unwrap();
            assert_eq!(
                (config.dim, config.n_layer, config.n_head, config.n_kv_head),
                (dim, n_layer, n_head, None)
            );
            assert_eq!((config.cls_token_num, config.caption_dim), (120, 2048));
            assert_eq!((config.vocab_size, config.block_size), (16384, 1024));
        }
    }
}
