//! `proxytune sample`: draws images with a model and, if given, an adapter.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use image::RgbImage;
use serde_json::{Map, Value};

use super::memory::{gibibytes, peak_memory};
use super::models::make_ready;
use super::unread::say_unread;
use super::{ComputeArgs, Ended, SampleArgs, SamplingArgs, block_on, output_failed};
use crate::config::Sampling;
use crate::console::{self, escaped, shown};
use crate::evaluation::captions::SAMPLES;
use crate::images::encode_png_with;
use crate::models::reading::Prompt;
use crate::models::{LearnerOptions, Request, open, sampling_file};
use crate::pipeline::{opening_for, use_threads};
use crate::plan::derive_seed;
use crate::stream::{Board, Worker};
use crate::training::restore;
use crate::{Error, Result, files};

pub(super) fn sample(args: &SampleArgs, out: &mut impl Write) -> Result<Ended> {
    let requests: Vec<Request> = args
        .prompts
        .iter()
        .flat_map(|prompt| {
            let seed = move |index| derive_seed(args.seed, &format!("sample/{prompt}"), index);
            (0..args.count).map(move |index| Request {
                prompt: prompt.clone(),
                seed: seed(index),
            })
        })
        .collect();
    let negative = args.sampling.negative_prompt.iter();
    let read: Vec<Prompt> = args
        .prompts
        .iter()
        .chain(negative)
        .map(|prompt| prompt.as_str().into())
        .collect();
    // Whoever typed the prompt is told what of it is not read; the pictures are what was asked for.
    say_unread(&args.model, &read)?;
    files::create_dir(&args.out)?;
    let mut album = Album::open(args)?;
    let mut told = Ok(());
    let costs = draw(
        &args.model,
        args.adapter.as_deref(),
        &requests,
        &args.compute,
        &args.sampling,
        |number, image, settings| {
            let path = album.add(number, &requests[number], &image, settings)?;
            if told.is_ok() {
                // Pictures go on being drawn when the list of them can no longer be written.
                told = writeln!(out, "{}", shown(&path)).map_err(output_failed);
            }
            Ok(())
        },
    )?;
    console::note(costs);
    told?;
    Ok(album.ended)
}

/// A folder that takes pictures, each as soon as it is drawn, and never in the place of another file.
struct Album<'a> {
    args: &'a SampleArgs,
    /// The number that the next picture's name begins with.
    next: usize,
    ended: Ended,
}

impl<'a> Album<'a> {
    /// Goes on counting after the pictures that are in the folder.
    fn open(args: &'a SampleArgs) -> Result<Self> {
        let number = |(name, _): (String, _)| {
            let digits = name.len() - name.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let own = (DIGITS..DIGITS + 6).contains(&digits) && name.ends_with(".png");
            name[..digits].parse::<usize>().ok().filter(|_| own)
        };
        let taken = files::list(&args.out)?.into_iter().filter_map(number);
        Ok(Self {
            args,
            next: taken.max().map_or(0, |last| last + 1),
            ended: Ended::Well,
        })
    }

    /// Writes the picture of request `number` and notes how it was drawn; returns its path.
    ///
    /// # Errors
    /// When it cannot be written under a name of digits alone either.
    fn add(
        &mut self,
        number: usize,
        request: &Request,
        image: &RgbImage,
        settings: &Map<String, Value>,
    ) -> Result<std::path::PathBuf> {
        let about = self.about(number, request, settings);
        let texts: Vec<(String, String)> = about
            .iter()
            .map(|(key, value)| {
                let text = value.as_str().map_or(value.to_string(), String::from);
                (key.clone(), text)
            })
            .collect();
        let png = encode_png_with(image, &texts)?;
        let mut name = file_name(self.next, &request.prompt);
        let path = loop {
            let path = self.args.out.join(&name);
            match files::write_new(&path, &png) {
                Ok(true) => break path,
                // Somebody else draws into the folder.
                Ok(false) => {
                    self.next += 1;
                    name = file_name(self.next, &request.prompt);
                }
                Err(error) => {
                    let plain = file_name(self.next, "");
                    if name == plain {
                        return Err(error);
                    }
                    console::note(format!("warning: {error}; the picture becomes {plain}"));
                    self.ended = Ended::WithWarnings;
                    name = plain;
                }
            }
        };
        self.next += 1;
        let mut line = Map::new();
        line.insert("file_name".into(), name.into());
        line.insert("text".into(), request.prompt.clone().into());
        line.extend(about.into_iter().filter(|(key, _)| key != "prompt"));
        if let Err(error) = files::append_line(
            &self.args.out.join(SAMPLES),
            &Value::Object(line).to_string(),
        ) {
            console::note(format!("warning: {error}"));
            self.ended = Ended::WithWarnings;
        }
        Ok(path)
    }

    /// How the picture of request `number` was made, by the same words as on the command line.
    fn about(
        &self,
        number: usize,
        request: &Request,
        settings: &Map<String, Value>,
    ) -> Map<String, Value> {
        let mut about = Map::new();
        let mut say = |key: &str, value: Value| drop(about.insert(key.into(), value));
        say("prompt", request.prompt.clone().into());
        say("seed", self.args.seed.into());
        say("image", (number % self.args.count + 1).into());
        say("model", self.args.model.clone().into());
        if let Some(adapter) = &self.args.adapter {
            say("adapter", adapter.to_string_lossy().into());
        }
        about.extend(settings.clone());
        let program = concat!("proxytune ", env!("CARGO_PKG_VERSION"));
        about.insert("Software".into(), program.into());
        about
    }
}

/// Digits of the number in a picture's name, at least.
const DIGITS: usize = 4;
/// Bytes of the prompt's words in a picture's name, at most. Names have 255 on most disks, on encrypted ones 143, and
/// files that are being written a few more than that.
const WORDS: usize = 100;

/// "0007-a-sks-dog.png": letters and digits of any script alone, which every disk takes.
fn file_name(number: usize, prompt: &str) -> String {
    let words: Vec<&str> = prompt
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect();
    let words = words.join("-");
    let words = words[..words.floor_char_boundary(WORDS)].trim_end_matches('-');
    let between = if words.is_empty() { "" } else { "-" };
    format!("{number:0DIGITS$}{between}{words}.png")
}

/// What drawing took.
pub(super) struct Costs {
    images: usize,
    /// Seconds until the model stood ready, and from then on.
    loading: f64,
    drawing: f64,
    tokens_per_image: Option<usize>,
}

impl std::fmt::Display for Costs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (n, s) = (self.images, if self.images == 1 { "" } else { "s" });
        write!(f, "{n} image{s} in {:.1} s", self.drawing)?;
        if let Some(tokens) = self.tokens_per_image {
            let each = self.drawing / (n * tokens).max(1) as f64;
            write!(f, " ({tokens} tokens each, {:.1} ms a token)", 1e3 * each)?;
        }
        write!(f, "; loaded in {:.1} s", self.loading)?;
        match peak_memory() {
            0 => Ok(()),
            bytes => write!(f, "; at most {:.2} GiB of memory", gibibytes(bytes)),
        }
    }
}

/// The sampling that was asked for; what was not is as the adapter was evaluated with, or the merged checkpoint, and
/// else by the family's defaults. Says which, and where the numbers come from.
fn sampling(
    opening: &LearnerOptions,
    adapter: Option<&Path>,
    args: &SamplingArgs,
) -> Result<Sampling> {
    let mut found = None;
    for place in adapter.into_iter().chain([opening.dir.as_path()]) {
        if found.is_none() {
            let noted = sampling_file::read(place, opening.family)?;
            found = noted.map(|noted| (noted, shown(place)));
        }
    }
    let (noted, source) = match found {
        Some((noted, place)) => (noted, format!("as noted in {place}")),
        None => (
            opening.family.sampling(),
            format!("the defaults of {}", opening.family),
        ),
    };
    for (option, is_given) in [
        ("num_inference_steps", args.num_inference_steps.is_some()),
        ("negative_prompt", args.negative_prompt.is_some()),
        ("guidance_start", args.guidance_start.is_some()),
        ("guidance_stop", args.guidance_stop.is_some()),
        ("top_k", args.top_k.is_some()),
        ("top_p", args.top_p.is_some()),
        ("temperature", args.temperature.is_some()),
        ("guidance_interval", args.guidance_interval.is_some()),
    ] {
        if is_given && !opening.family.draws_with(option) {
            return Err(Error::invalid(
                format!(
                    "--{} has no effect on a {} model",
                    option.replace('_', "-"),
                    opening.family
                ),
                "leave it out",
            ));
        }
    }
    let mut sampling = noted.clone();
    match &mut sampling {
        Sampling::Diffusion(settings) => {
            put(&mut settings.guidance_scale, args.guidance_scale);
            put(&mut settings.num_inference_steps, args.num_inference_steps);
            put(&mut settings.negative_prompt, args.negative_prompt.clone());
            settings.guidance_start = args.guidance_start.or(settings.guidance_start);
            settings.guidance_stop = args.guidance_stop.or(settings.guidance_stop);
            if settings.guidance_start.unwrap_or(0.0) >= settings.guidance_stop.unwrap_or(1.0) {
                return Err(Error::invalid(
                    "guidance ends before it has begun",
                    "give a --guidance-stop above --guidance-start",
                ));
            }
        }
        Sampling::Autoregressive(settings) => {
            put(&mut settings.guidance_scale, args.guidance_scale);
            put(&mut settings.top_k, args.top_k);
            put(&mut settings.top_p, args.top_p);
            put(&mut settings.temperature, args.temperature);
            settings.guidance_interval = args.guidance_interval.or(settings.guidance_interval);
        }
    }
    let before = settings(&noted);
    let used = settings(&sampling);
    let asked = used
        .iter()
        .any(|(key, value)| before.get(key) != Some(value));
    let told: Vec<String> = used
        .iter()
        .map(|(key, value)| format!("{key} {}", escaped(&value.to_string())))
        .collect();
    console::note(format!(
        "drawing with {} ({source}{})",
        told.join(", "),
        if asked {
            ", but for what the options say"
        } else {
            ""
        }
    ));
    Ok(sampling)
}

/// Takes what was given.
fn put<T>(field: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *field = given;
    }
}

/// `sampling` by the names of the options.
fn settings(sampling: &Sampling) -> Map<String, Value> {
    let mut settings = Map::new();
    let mut say = |key: &str, value: Value| drop(settings.insert(key.into(), value));
    match sampling {
        Sampling::Autoregressive(sampling) => {
            say("guidance_scale", sampling.guidance_scale.into());
            say("top_k", sampling.top_k.into());
            say("top_p", sampling.top_p.into());
            say("temperature", sampling.temperature.into());
            if let Some(tokens) = sampling.guidance_interval {
                say("guidance_interval", tokens.into());
            }
        }
        Sampling::Diffusion(sampling) => {
            say("guidance_scale", sampling.guidance_scale.into());
            say("num_inference_steps", sampling.num_inference_steps.into());
            if !sampling.negative_prompt.is_empty() {
                say("negative_prompt", sampling.negative_prompt.clone().into());
            }
            for (key, share) in [
                ("guidance_start", sampling.guidance_start),
                ("guidance_stop", sampling.guidance_stop),
            ] {
                if let Some(share) = share {
                    say(key, share.into());
                }
            }
        }
    }
    settings
}

/// Draws `requests` in batches, on the model's own thread. `take` is given each picture when its batch is drawn, by the
/// number of its request, with the settings that it was drawn with.
pub(super) fn draw(
    model: &str,
    adapter: Option<&Path>,
    requests: &[Request],
    compute: &ComputeArgs,
    asked: &SamplingArgs,
    mut take: impl FnMut(usize, RgbImage, &Map<String, Value>) -> Result<()>,
) -> Result<Costs> {
    if compute.threads > 0 {
        use_threads(compute.threads);
    }
    make_ready([model])?;
    let opening = LearnerOptions {
        dtype: compute.dtype,
        ..opening_for(model, adapter, compute.device)?
    };
    if !opening.family.kind().draws() {
        return Err(Error::invalid(
            format!("{model} does not draw"),
            "name a diffusion or an autoregressive model",
        ));
    }
    let sampling = sampling(&opening, adapter, asked)?;
    let settings = settings(&sampling);
    let adapter = adapter.map(Path::to_path_buf);
    block_on(async move {
        let board = Board::default();
        let meter = board.meter("sample", "images");
        let start = Instant::now();
        let mut prompts: Vec<String> = requests.iter().map(|one| one.prompt.clone()).collect();
        if let Sampling::Diffusion(sampling) = &sampling {
            prompts.push(sampling.negative_prompt.clone());
        }
        let worker = Worker::spawn("sample", move || {
            let mut learner = open(&opening)?;
            learner.foresee(&prompts)?;
            if let Some(dir) = &adapter {
                restore(&learner.variables(), &learner.read(dir)?, dir)?;
            }
            Ok(learner)
        })
        .await?;
        let loading = start.elapsed().as_secs_f64();
        let mut costs = Costs {
            images: 0,
            loading,
            drawing: 0.0,
            tokens_per_image: None,
        };
        for batch in requests.chunks(compute.batch_size) {
            let (batch, sampling) = (batch.to_vec(), sampling.clone());
            let (images, seconds, tokens) = worker
                .call(&meter, move |learner| {
                    let start = Instant::now();
                    let images = learner.generate(&batch, &sampling)?;
                    let seconds = start.elapsed().as_secs_f64();
                    Ok((images, seconds, learner.tokens_per_image()))
                })
                .await?;
            costs.drawing += seconds;
            costs.tokens_per_image = tokens;
            for image in images {
                take(costs.images, image, &settings)?;
                costs.images += 1;
            }
        }
        Ok(costs)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pictures_fit_every_disk_in_any_script() {
        assert_eq!(
            file_name(7, "a sks dog, on\u{1b}[2J the beach!"),
            "0007-a-sks-dog-on-2J-the-beach.png"
        );
        for prompt in ["", "../..", "🐶 \u{7}", "\n"] {
            assert_eq!(file_name(12, prompt), "0012.png");
        }
        assert_eq!(file_name(12_345, "CON"), "12345-CON.png");
        for letter in ["a", "ü", "猫", "𝕏"] {
            for lead in ["", "a", "aa", "aaa"] {
                let prompt = format!("{lead}{}", letter.repeat(300));
                let name = file_name(0, &prompt);
                let length = name.len();
                assert!(
                    (100..=DIGITS + 1 + WORDS + 4).contains(&length),
                    "{length}: {name}"
                );
            }
        }
    }
}
