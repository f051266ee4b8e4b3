//! An adapter as a library user loads it: opens the student, gives it what a run or `custom_source` has learnt, and
//! draws each prompt four times into one grid beside it.
//!
//! ```sh
//! cargo run --release --example sample_from_adapter -- datasets/runs/nano/student
//! ```

use std::path::PathBuf;

use proxytune::config::Device;
use proxytune::images::{encode_png, grid};
use proxytune::models::{Request, open, sampling_file};
use proxytune::{Error, Result, files, pipeline::opening_for, training::restore};

const PROMPTS: [&str; 3] = [
    "a sks dog in the snow",
    "a sks dog on the beach",
    "a red sks dog",
];
const SEEDS: [u64; 4] = [1, 2, 3, 4];

fn main() -> Result<()> {
    let adapter = std::env::args().nth(1).map(PathBuf::from).ok_or_else(|| {
        Error::invalid(
            "no adapter named",
            "give the folder that a run has published: RUN/student",
        )
    })?;
    // The opening takes rank and targets from the adapter's own files.
    let opening = opening_for("nano-llamagen", Some(&adapter), Device::Cpu)?;
    let mut student = open(&opening)?;
    restore(&student.variables(), &student.read(&adapter)?, &adapter)?;

    // As its run drew with it, where that is noted.
    let noted = sampling_file::read(&adapter, opening.family)?;
    let sampling = noted.unwrap_or(opening.family.sampling());
    let mut images = Vec::new();
    for prompt in PROMPTS {
        let requests = SEEDS.map(|seed| Request {
            prompt: prompt.to_string(),
            seed,
        });
        images.extend(student.generate(&requests, &sampling)?);
    }
    let picture = grid(&images, SEEDS.len() as u32, 2 * student.resolution(), 4);
    let file = adapter.with_file_name("samples.png");
    files::write(&file, &encode_png(&picture)?)?;
    println!("{}: a row for each prompt", file.display());
    Ok(())
}
