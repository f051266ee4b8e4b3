//! A source of your own: the student learns pairs of image and prompt from a stream, while they are made. Here they
//! are drawn; a camera or a folder that fills would be another `pairs`. A full channel makes the source wait.
//!
//! ```sh
//! cargo run --release --example custom_source
//! ```

use async_stream::stream;
use futures::{Stream, StreamExt};
use proxytune::models::{Lesson, open};
use proxytune::nano::{subjects::SUBJECTS, world};
use proxytune::stream::{Board, Stages, Worker, channel};
use proxytune::training::{Trainer, tuning};
use proxytune::{Result, config, pipeline::opening_for};
use rand::{SeedableRng, rngs::StdRng};

/// The first subject in one setting after another, without end.
fn pairs() -> impl Stream<Item = Result<(image::RgbImage, String)>> + Send {
    stream! {
        let mut generator = StdRng::seed_from_u64(1);
        for setting in world::Setting::ALL.into_iter().cycle() {
            let identity = SUBJECTS[0].identity;
            let scene = world::Scene::of(identity, Some(setting), None, None, &mut generator);
            yield Ok((world::render(&scene, 32), format!("a sks dog {}", setting.phrase())));
        }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut opening = opening_for("nano-llamagen", None, config::Device::Cpu)?;
    let mut settings = opening.family.training();
    settings.learning_rate = 1e-3;
    opening.tuning = tuning(&settings);
    // A model lives on a thread of its own and is spoken to with closures.
    let build = move || Trainer::new(open(&opening)?, &settings);
    let student = Worker::spawn("student", build).await?;

    let (board, mut stages) = (Board::default(), Stages::default());
    let (draw, train) = (board.meter("draw", "images"), board.meter("train", "steps"));
    let (outlet, inlet) = channel(&board, "pairs", 8, &draw, &train);
    stages.spawn(&draw, pairs(), outlet);
    let mut batches = inlet.chunks(4).take(50).enumerate();
    while let Some((step, batch)) = batches.next().await {
        let (images, prompts): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        let learn = move |trainer: &mut Trainer| {
            let examples = trainer.learner().encode(&images)?;
            let pairs = examples.into_iter().zip(prompts);
            let lessons = pairs.map(|(example, prompt)| Lesson { example, prompt });
            trainer.step(step, &[(1.0, lessons.collect())], step as u64)
        };
        println!("step {step}: {:?}", student.call(&train, learn).await?);
    }
    // Nobody reads any more, so the source has ended; if it failed, this is its error.
    drop(batches);
    stages.join().await?;
    let folder = std::path::Path::new("datasets/runs/custom-source/student");
    student
        .call(&train, |t| t.publish(folder, None).map(drop))
        .await
}
