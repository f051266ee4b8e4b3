//! `proxytune bench table`: the operations and nano's steps, beside torch's times where a Python with torch is given.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use image::{Rgb, RgbImage};

use super::instructions::Instructions;
use super::operations::{Operation, operations};
use super::torch::{Torch, median, threads};
use crate::config;
use crate::config::Sampling;
use crate::console;
use crate::models::{self, Learner, LearnerOptions, Request, TrainingExample};
use crate::training::{Trainer, tuning};
use crate::{Error, Result, pipeline};

/// Both sides rest this long before they are timed, so that neither's idle threads disturb the other.
const REST: Duration = Duration::from_millis(30);

/// A row is repeated within a round until it takes about this long.
const SPAN: f64 = 0.05;

/// `proxytune bench table`
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  proxytune bench table --torch python3")]
pub struct TableArgs {
    /// A Python with torch, diffusers and peft: its times stand beside ours, taken in turns
    #[arg(long, value_name = "PYTHON")]
    pub torch: Option<PathBuf>,
    /// The program that makes torch's side
    #[arg(
        long,
        value_name = "FILE",
        default_value = "tests/golden/bench_torch.py"
    )]
    pub program: PathBuf,
    /// How often each row is measured; the table has the medians
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = super::super::at_least_one)]
    pub rounds: usize,
    /// Threads, on both sides; 0 is all cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// Only the rows whose names contain this
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
}

/// One row's times.
struct Row {
    operation: Operation,
    repeats: usize,
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

/// Measures and prints the table.
///
/// # Errors
/// When a nano checkpoint is missing, or torch's side cannot be run or does not have the same rows.
pub(super) fn run(args: &TableArgs, instructions: Instructions) -> Result<()> {
    let threads = threads(args.threads);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|e| {
            Error::invalid(format!("no {threads} threads: {e}"), "give fewer --threads")
        })?;
    let mut torch = match &args.torch {
        Some(python) => {
            let serve = ["--serve".into(), threads.to_string().into()];
            let variables = instructions.variables();
            Some(Torch::start(python, &args.program, serve, variables)?)
        }
        None => None,
    };
    let mut rows = pool.install(|| -> Result<Vec<Row>> {
        let mut all = operations()?;
        all.extend(nano()?);
        all.into_iter()
            .filter(|row| {
                args.only
                    .as_ref()
                    .is_none_or(|part| row.name.contains(part))
            })
            .map(|mut operation| {
                (operation.body)()?;
                let once = time(&mut operation, 1)?;
                let repeats = (SPAN / once.max(1e-9)).ceil().clamp(1.0, 100.0) as usize;
                Ok(Row {
                    operation,
                    repeats,
                    ours: Vec::new(),
                    theirs: Vec::new(),
                })
            })
            .collect()
    })?;
    if let Some(torch) = &mut torch {
        for row in &rows {
            torch.ask(&format!("1 {}", row.operation.name))?;
        }
    }
    for _ in 0..args.rounds {
        for row in &mut rows {
            std::thread::sleep(REST);
            let ours = pool.install(|| time(&mut row.operation, row.repeats))?;
            row.ours.push(ours);
            if let Some(torch) = &mut torch {
                std::thread::sleep(REST);
                let line = format!("{} {}", row.repeats, row.operation.name);
                row.theirs.push(torch.ask(&line)?);
            }
        }
    }
    console::print(format!(
        "{threads} threads, medians of {} rounds",
        args.rounds
    ))?;
    print(&rows)
}

fn print(rows: &[Row]) -> Result<()> {
    let width = rows
        .iter()
        .map(|row| row.operation.name.len())
        .max()
        .unwrap_or(0);
    let mut ratios = Vec::new();
    console::print(format!(
        "{:width$}  {:>10}  {:>10}  ratio",
        "", "ours, ms", "torch, ms"
    ))?;
    for row in rows {
        let ours = median(&row.ours) * 1e3;
        if row.theirs.is_empty() {
            console::print(format!(
                "{:width$}  {ours:>10.2}  {:>10}",
                row.operation.name, "-"
            ))?;
            continue;
        }
        let theirs = median(&row.theirs) * 1e3;
        // Each round's two sides ran one after the other, so slow moments of the machine cancel in their ratio.
        let each: Vec<f64> = row
            .ours
            .iter()
            .zip(&row.theirs)
            .map(|(a, b)| a / b)
            .collect();
        let ratio = median(&each);
        ratios.push(ratio);
        console::print(format!(
            "{:width$}  {ours:>10.2}  {theirs:>10.2}  {ratio:>5.2}",
            row.operation.name
        ))?;
    }
    if !ratios.is_empty() {
        let mean = (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / ratios.len() as f64).exp();
        console::print(format!(
            "{:width$}  {:>10}  {:>10}  {mean:>5.2}",
            "geometric mean", "", ""
        ))?;
    }
    Ok(())
}

/// Seconds per call.
fn time(operation: &mut Operation, repeats: usize) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..repeats {
        (operation.body)()?;
    }
    Ok(start.elapsed().as_secs_f64() / repeats as f64)
}

/// Steps and sampling as `pipelines/nano.toml` does them, on noise for images.
fn nano() -> Result<Vec<Operation>> {
    let text = include_str!("../../../pipelines/nano.toml");
    let resolved =
        config::Document::parse(text, "pipelines/nano.toml", &[], &crate::models::Registry)
            .resolve()?;
    let mut rows = Vec::new();
    let Some((supervisor, proxies, drawn)) = resolved.teacher() else {
        return Ok(rows);
    };
    let mut opening = pipeline::opening_for(&supervisor.model, None, config::Device::Cpu)?;
    opening.tuning = tuning(&supervisor.training);
    rows.push(step(
        "nano supervisor step",
        &opening,
        &supervisor.training,
    )?);
    rows.push(sampling(
        "nano proxies",
        &opening,
        proxies.batch_size,
        Sampling::Diffusion(drawn.clone()),
    )?);
    let student = &resolved.student;
    let mut opening = pipeline::opening_for(&student.model, None, config::Device::Cpu)?;
    opening.tuning = tuning(&student.training);
    rows.push(step(
        "nano student step",
        &LearnerOptions {
            condition_dropout: student.condition_dropout,
            ..opening.clone()
        },
        &student.training,
    )?);
    rows.push(sampling(
        "nano student's images",
        &opening,
        resolved.evaluation.batch_size,
        student.sampling.clone(),
    )?);
    Ok(rows)
}

fn step(name: &str, opening: &LearnerOptions, settings: &config::Training) -> Result<Operation> {
    let mut trainer = Trainer::new(models::open(opening)?, settings)?;
    let batch = examples(trainer.learner(), settings.batch_size)?;
    let batches = vec![(1.0, batch)];
    let mut taken = 0;
    let name = format!("{name}, {} images", settings.batch_size);
    Ok(Operation::new(name, move || {
        trainer.step(taken, &batches, taken as u64)?;
        taken += 1;
        Ok(())
    }))
}

fn sampling(
    name: &str,
    opening: &LearnerOptions,
    count: usize,
    sampling: Sampling,
) -> Result<Operation> {
    let mut learner = models::open(opening)?;
    let requests: Vec<Request> = (0..count as u64)
        .map(|seed| Request {
            prompt: "a sks dog in the snow".into(),
            seed,
        })
        .collect();
    Ok(Operation::new(
        format!("{name}, {count} at once"),
        move || learner.generate(&requests, &sampling).map(drop),
    ))
}

fn examples(learner: &mut dyn Learner, count: usize) -> Result<Vec<TrainingExample>> {
    let side = learner.resolution();
    let images: Vec<RgbImage> = (0..count as u32)
        .map(|i| {
            RgbImage::from_fn(side, side, |x, y| {
                let value = (x * 7 + y * 13 + i * 29) % 256;
                Rgb([value as u8, (255 - value) as u8, (x * 8 % 256) as u8])
            })
        })
        .collect();
    let pair = |example| TrainingExample {
        example,
        prompt: "a sks dog".into(),
    };
    Ok(learner.encode(&images)?.into_iter().map(pair).collect())
}
