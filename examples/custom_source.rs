//! A source of your own: the student learns images that this program makes, while they are made. Here they are drawn; a
//! camera, a folder that fills or another model would be another `images`. A full channel makes the source wait, and
//! a second call finds in the store what the first has made.
//!
//! ```sh
//! cargo run --release --example custom_source -- [FOLDER]
//! ```

use std::path::PathBuf;
use std::sync::Arc;

use futures::stream::{self, BoxStream, StreamExt};
use proxytune::nano::{subjects::SUBJECTS, world};
use proxytune::pipeline::{self, Options, Outcome};
use proxytune::stages::Subject;
use proxytune::stages::source::{ImageSource, SourceImage, WantedBatch, WantedImage};
use proxytune::stream::{Meter, Stop};
use proxytune::{Error, Result};
use rand::{SeedableRng, rngs::StdRng};

const PIPELINE: &str = r#"
[subject.dog1]
images = "datasets/nano/subjects/dog1"
class = "dog"

[proxies]
count = 16

[student]
model = "nano-llamagen"
source = "custom"
steps = 20
batch_size = 4

[evaluation]
prompts = ["a {token} {class} in the snow", "a {token} {class} on the beach"]
images_per_prompt = 1
"#;

/// Draws the subject in one setting after another.
struct Drawn;

impl ImageSource for Drawn {
    fn key(&self, subject: &Subject) -> String {
        format!("drawn 1: {}", subject.name)
    }

    fn images<'a>(
        &'a self,
        wanted: &'a WantedBatch,
        _: &'a Meter,
    ) -> BoxStream<'a, Result<SourceImage>> {
        let draw = |image: &WantedImage| draw(&wanted.subject, image);
        stream::iter(wanted.images.iter().map(draw)).boxed()
    }
}

fn draw(subject: &Subject, wanted: &WantedImage) -> Result<SourceImage> {
    let known = SUBJECTS.iter().find(|known| known.name == subject.name);
    let known = known.ok_or_else(|| {
        let names = SUBJECTS.map(|known| known.name).join(", ");
        Error::invalid(format!("nobody can draw {}", subject.name), names)
    })?;
    let setting = world::Setting::ALL[wanted.index % world::Setting::ALL.len()];
    let mut generator = StdRng::seed_from_u64(wanted.seed);
    let scene = world::Scene::of(known.identity, Some(setting), None, None, &mut generator);
    Ok(SourceImage {
        image: world::render(&scene, 32),
        prompt: format!("{} {}", wanted.prompt, setting.phrase()),
        settings: format!(r#"{{"setting":"{}"}}"#, setting.phrase()),
    })
}

/// Runs the pipeline, or continues it; in `folder`, where one is named, and else where runs are made by default.
pub async fn learn(folder: Option<PathBuf>) -> Result<Outcome> {
    let mut options = Options::new("custom-source.toml", PIPELINE, &[])?;
    if let Some(folder) = folder {
        options.store = Some(folder.join("store"));
        options.out = folder.join("runs");
    }
    pipeline::run_with_source(&options, Arc::new(Drawn), Stop::default()).await
}

#[tokio::main]
async fn main() -> Result<()> {
    let outcome = learn(std::env::args().nth(1).map(PathBuf::from)).await?;
    println!("{}", outcome.report.text());
    println!("the student: {}", outcome.dir.join("student").display());
    Ok(())
}
