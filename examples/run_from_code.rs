//! A pipeline without a file: TOML text and overrides go in, scores come out as values. So few steps take seconds
//! and teach nothing; `pipelines/nano.toml` has enough.
//!
//! ```sh
//! cargo run --release --example run_from_code
//! ```

use proxytune::pipeline::{self, Options};
use proxytune::{Result, stream::Stop};

const PIPELINE: &str = r#"
[subject.dog1]
images = "datasets/nano/subjects/dog1"
class = "dog"

[supervisor]
model = "nano-sd3"
steps = 3

[proxies]
count = 8
num_inference_steps = 2

[student]
model = "nano-llamagen"
steps = 50

[direct]
enabled = false

[evaluation]
prompts = ["a {token} {class} in the snow", "a {token} {class} on the beach"]
images_per_prompt = 1
"#;

#[tokio::main]
async fn main() -> Result<()> {
    // What `--set` does on the command line.
    let overrides = ["student.steps=6", "student.batch_size=2"].map(String::from);
    let options = Options::new("from-code.toml", PIPELINE, &overrides)?;
    let outcome = pipeline::run(&options, Stop::default()).await?;

    for model in &outcome.report.models {
        if let Some(scores) = model.summary() {
            let [dino, clip_i, clip_t] =
                [scores.dino, scores.clip_i, scores.clip_t].map(|s| s.mean);
            println!(
                "{:<24} DINO {dino:.3}  CLIP-I {clip_i:.3}  CLIP-T {clip_t:.3}",
                model.name
            );
        }
    }
    println!(
        "the whole report: {}",
        outcome.dir.join("report.html").display()
    );
    Ok(())
}
