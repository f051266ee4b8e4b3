//! `proxytune convert`: LoRA adapters from one program's layout to another's.

use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::DType;
use clap::{Args, ValueEnum};

use super::{FloatType, output_failed};
use crate::config::Family;
use crate::console::{self, shown};
use crate::models::lora_file::LoraFile;
use crate::models::lora_write::{Layout, Written, fuse};
use crate::models::{self, known, layers, locate, sampling_file};
use crate::{Error, Result};

/// `proxytune convert`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Examples:\n  proxytune convert theirs.safetensors ours --to diffusers\n  \
                        proxytune convert datasets/runs/nano/supervisor/dog1 dog1.safetensors --to kohya --model nano-sd3\n  \
                        proxytune convert dog.safetensors both.safetensors --to kohya --weight 0.8 --fuse style.safetensors=0.5"
)]
pub struct ConvertArgs {
    /// The adapter: a file or a folder, of diffusers, peft, kohya's scripts or ComfyUI
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// The new adapter: a file that ends in .safetensors or, always for peft, a folder; nothing is replaced
    pub out: PathBuf,
    /// Whose layout to write
    #[arg(long, value_enum)]
    pub to: Target,
    /// The model that it was trained with, where names do not tell; if it is here, shapes are compared with it
    #[arg(long, value_name = "NAME|DIR|OWNER/NAME")]
    pub model: Option<String>,
    /// Type of the factors
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: FloatType,
    /// Multiply what the adapter does
    #[arg(long, value_name = "W", default_value_t = 1.0, value_parser = weight)]
    pub weight: f64,
    /// Add another adapter, times W (1 if it is left out); may be given several times. Ranks add up
    #[arg(long, value_name = "FILE[=W]", value_parser = addition)]
    pub fuse: Vec<(PathBuf, f64)>,
}

/// Whose layout to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// What load_lora_weights reads
    Diffusers,
    /// Names and header of kohya's scripts, which ComfyUI and Forge read, too (comfyui means the same)
    #[value(alias = "comfyui")]
    Kohya,
    /// A folder for PeftModel.from_pretrained
    Peft,
}

impl From<Target> for Layout {
    fn from(target: Target) -> Self {
        match target {
            Target::Diffusers => Self::Diffusers,
            Target::Kohya => Self::Kohya,
            Target::Peft => Self::Peft,
        }
    }
}

fn weight(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(weight) if weight.is_finite() && weight != 0.0 => Ok(weight),
        _ => Err("a number other than 0 is wanted".into()),
    }
}

fn addition(text: &str) -> std::result::Result<(PathBuf, f64), String> {
    match text.rsplit_once('=') {
        // A path may have one of its own.
        Some((path, number)) if !Path::new(text).exists() => Ok((path.into(), weight(number)?)),
        _ => Ok((text.into(), 1.0)),
    }
}

pub(super) fn convert(args: &ConvertArgs, out: &mut impl Write) -> Result<()> {
    let mut files = vec![(read(&args.input)?, args.weight)];
    for (path, weight) in &args.fuse {
        files.push((read(path)?, *weight));
    }
    let family = match &args.model {
        Some(model) => models::family(model)?,
        None => told(&files)?,
    };
    if let Some(model) = &args.model {
        for (file, _) in &files {
            compare(file, family, model)?;
        }
    }
    let all: Vec<(&LoraFile, f64)> = files.iter().map(|(file, weight)| (file, *weight)).collect();
    let layers = match &all[..] {
        [(file, weight)] if *weight == 1.0 => file.layers.clone(),
        all => fuse(all)?,
    };
    let written = Written {
        layers: &layers,
        family,
        base: args.model.as_deref(),
        dtype: DType::from(args.dtype),
    };
    let file = written.write(args.to.into(), &args.out)?;
    if args.out.is_dir()
        && let Some(sampling) = sampling_file::read(&args.input, family)?
    {
        sampling_file::write(&args.out, &sampling)?;
    }
    let ranks = layers.values().map(|factors| factors.a.dims()[0]);
    let (least, most) = ranks.fold((usize::MAX, 0), |(least, most), rank| {
        (least.min(rank), most.max(rank))
    });
    let ranks = match least == most {
        true => format!("rank {most}"),
        false => format!("ranks {least} to {most}"),
    };
    let (file, count) = (shown(&file), layers.len());
    writeln!(out, "{file}: {count} layers of {family}, {ranks}").map_err(output_failed)
}

/// The adapter at `path`, all of whose parts can be written elsewhere.
fn read(path: &Path) -> Result<LoraFile> {
    let file = LoraFile::read(path)?;
    file.check_alone()?;
    Ok(file)
}

/// The family that the names of all `files` tell.
fn told(files: &[(LoraFile, f64)]) -> Result<Family> {
    let mut found: Option<Family> = None;
    for (file, _) in files {
        match (found, file.family) {
            (Some(one), Some(other)) if one != other => {
                return Err(Error::invalid(
                    format!("{} is of {other}, the first of {one}", shown(&file.path)),
                    "fuse adapters of one model",
                ));
            }
            (None, own) => found = own,
            _ => {}
        }
    }
    found.ok_or_else(|| {
        let layer = files.iter().find_map(|(file, _)| file.layers.keys().next());
        let layer = layer.map_or("", String::as_str);
        Error::invalid(
            format!(
                "{}: its names, such as {}, are those of more than one model",
                shown(&files[0].0.path),
                console::escaped(layer)
            ),
            "name the model that it was trained with by --model, such as --model sd3-medium",
        )
    })
}

/// Fails where the checkpoint of `model` is here and the adapter does not fit it.
fn compare(file: &LoraFile, family: Family, model: &str) -> Result<()> {
    let Ok(folder) = locate(model) else {
        console::note(format!(
            "{model} is not here: shapes are not compared with it"
        ));
        return Ok(());
    };
    let side = known(model).and_then(|model| model.resolution);
    match layers(family, &folder, side.map(|side| side as u32))? {
        Some(places) => file.check_fit(&places),
        None => Ok(()),
    }
}
