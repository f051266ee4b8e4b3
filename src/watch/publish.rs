//! What a run has made: whether it may take the place of what is published, and how it does so in one step.

use std::collections::BTreeMap;
use std::path::Path;

use super::state::{Home, Published, Run, State};
use crate::evaluation::metrics::{Scores, mean_cosine};
use crate::evaluation::report::{ModelScores, Report};
use crate::pipeline::{self, Outcome};
use crate::plan::reference_key;
use crate::stages::Method;
use crate::stages::report::label;
use crate::store::{Columns, Store};
use crate::{Error, Result, files};

/// The means of the student's scores over the samples of each subject.
pub fn scores(report: &Report) -> BTreeMap<String, Scores> {
    let student = label(Method::Student, crate::config::Source::Proxies);
    let images = report.models.iter().filter(|model| model.name == student);
    let mut by_subject: BTreeMap<String, ModelScores> = BTreeMap::new();
    for image in images.flat_map(|model| &model.images) {
        by_subject
            .entry(image.subject.clone())
            .or_default()
            .images
            .push(image.clone());
    }
    let mean = |(subject, model): (String, ModelScores)| {
        let images = &model.images;
        let mean = |score: fn(&Scores) -> f64| {
            let sum: f64 = images.iter().map(|image| score(&image.scores)).sum();
            // Six digits survive being written and read any number of times.
            (sum / images.len() as f64 * 1e6).round() / 1e6
        };
        let scores = Scores {
            clip_i: mean(|scores| scores.clip_i),
            clip_t: mean(|scores| scores.clip_t),
            dino: mean(|scores| scores.dino),
        };
        (subject, scores)
    };
    by_subject.into_iter().map(mean).collect()
}

/// Why a student that scores `after` must not follow one that scored `before` (DINO by subject): a subject that both
/// know has lost more than `margin`. `None`: it may.
pub fn refusal(
    before: &BTreeMap<String, f64>,
    after: &BTreeMap<String, f64>,
    margin: f64,
) -> Option<String> {
    let lost: Vec<String> = before
        .iter()
        .filter_map(|(subject, before)| {
            let after = after.get(subject)?;
            let loss = before - after;
            (loss > margin).then(|| {
                format!("{subject} would lose {loss:.3} in DINO ({before:.3} to {after:.3})")
            })
        })
        .collect();
    (!lost.is_empty()).then(|| {
        format!(
            "{}; the margin is {margin}: allow more with --margin, or forget less with a higher --replay",
            lost.join(", ")
        )
    })
}

/// DINO by subject of what is published, as `run` compares with it: against today's photos of the subject that it
/// learns, as scores against different photos cannot be compared.
///
/// # Errors
/// When the store cannot be read.
pub async fn dino_before(
    home: &Home,
    state: &State,
    run: &Run,
    store: &Store,
) -> Result<BTreeMap<String, f64>> {
    let Some(published) = &state.published else {
        return Ok(BTreeMap::new());
    };
    let mut before: BTreeMap<String, f64> = published
        .scores
        .iter()
        .map(|(subject, scores)| (subject.clone(), scores.dino))
        .collect();
    if !before.contains_key(&run.subject) {
        return Ok(before);
    }
    let resolved = crate::config::Document::parse(
        &run.pipeline,
        "pipeline.toml",
        &[],
        &crate::models::Registry,
    )
    .resolve()?;
    let table = pipeline::evaluations(&resolved, store).await?;
    let reference = |photo: &String| reference_key(&run.subject, photo);
    let references: Vec<String> = run.look.photos.iter().map(reference).collect();
    let references: Vec<Vec<f32>> = table
        .get(&references, Columns::WithoutPictures)
        .await?
        .into_iter()
        .filter_map(|row| row?.dino_embedding)
        .collect();
    let summary = pipeline::summary_in(&home.path().join(&published.run))?;
    let student = summary
        .evaluated
        .iter()
        .filter(|sampled| sampled.method == Method::Student);
    let last = student.max_by_key(|sampled| sampled.step);
    let keys: Vec<String> = last
        .iter()
        .flat_map(|sampled| &sampled.samples)
        .map(|(_, key)| key.clone())
        .collect();
    let mut cosines = Vec::new();
    for row in table
        .get(&keys, Columns::WithoutPictures)
        .await?
        .into_iter()
        .flatten()
    {
        if let (true, Some(embedding)) = (row.subject == run.subject, row.dino_embedding) {
            cosines.push(mean_cosine(&embedding, &references)?);
        }
    }
    if !cosines.is_empty() {
        let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
        before.insert(run.subject.clone(), mean);
    }
    Ok(before)
}

/// Puts what `run` made in the place of what is published. Whoever reads `published` finds the old adapter or the new
/// one, whole; doing it again is harmless.
///
/// # Errors
/// When the folders cannot be written.
pub fn publish(
    home: &Home,
    run: &Run,
    outcome: &Outcome,
    scores: &BTreeMap<String, Scores>,
) -> Result<Published> {
    let student = outcome.dir.join("student");
    let adapter = files::digest_dir(&student)?;
    let to = home.adapter(run.number);
    files::within(home.path(), &to)?;
    // A run of the same number that was dropped may have left another adapter there.
    if !to.is_dir() || files::digest_dir(&to)? != adapter {
        if let Some(parent) = to.parent() {
            files::create_dir(parent)?;
        }
        let table = serde_json::json!({ "run": run.number, "adapter": adapter, "scores": scores });
        let evaluation = outcome.dir.join("evaluation");
        files::write_dir(&evaluation, |dir| {
            for name in ["report.html", "report.json", "sheet.png"] {
                let from = outcome.dir.join(name);
                files::copy(&from, &dir.join(name)).map_err(Error::io(&from))?;
            }
            files::write(&dir.join("scores.json"), format!("{table:#}\n").as_bytes())
        })?;
        files::write_dir(&to, |dir| copy_adapter(&student, &evaluation, dir))?;
    }
    switch(&home.published(), &to)?;
    let run_dir = outcome
        .dir
        .strip_prefix(home.path())
        .unwrap_or(&outcome.dir);
    Ok(Published {
        number: run.number,
        run: run_dir.display().to_string(),
        adapter,
        scores: scores.clone(),
    })
}

/// Lets `link` lead to the folder `to`, in one step.
#[cfg(unix)]
pub(super) fn switch(link: &Path, to: &Path) -> Result<()> {
    let relative = to.strip_prefix(link.parent().unwrap_or(link)).unwrap_or(to);
    files::link(link, relative)
}

/// Lets `link` be a copy of the folder `to`, where links need rights of their own.
#[cfg(not(unix))]
pub(super) fn switch(link: &Path, to: &Path) -> Result<()> {
    files::write_dir(link, |dir| copy_adapter(to, &to.join("evaluation"), dir))
}

/// Copies the files of an adapter's folder, and its evaluation, into `dir`.
fn copy_adapter(adapter: &Path, evaluation: &Path, dir: &Path) -> Result<()> {
    files::copy_dir(evaluation, &dir.join("evaluation"))?;
    for entry in std::fs::read_dir(adapter).map_err(Error::io(adapter))? {
        let from = entry.map_err(Error::io(adapter))?.path();
        if from.is_file() {
            let to = dir.join(from.file_name().unwrap_or_default());
            files::copy(&from, &to).map_err(Error::io(&from))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dino(scores: &[(&str, f64)]) -> BTreeMap<String, f64> {
        scores
            .iter()
            .map(|(subject, dino)| (subject.to_string(), *dino))
            .collect()
    }

    #[test]
    fn a_student_is_refused_when_a_subject_loses_more_than_the_margin() {
        let before = dino(&[("rex", 0.5), ("mia", 0.4), ("retired", 0.9)]);
        assert_eq!(
            refusal(
                &before,
                &dino(&[("rex", 0.4), ("mia", 0.7), ("new", -0.2)]),
                0.1001
            ),
            None
        );
        let refused = refusal(&before, &dino(&[("rex", 0.38), ("mia", 0.7)]), 0.1).unwrap();
        assert_eq!(
            refused,
            "rex would lose 0.120 in DINO (0.500 to 0.380); the margin is 0.1: allow more with --margin, or forget less \
             with a higher --replay"
        );
        assert!(
            refusal(&before, &dino(&[("rex", 0.4), ("mia", 0.1)]), 0.05)
                .unwrap()
                .contains("mia would lose 0.300")
        );
        assert_eq!(
            refusal(&BTreeMap::new(), &dino(&[("rex", -1.0)]), 0.0),
            None
        );
    }

    #[cfg(unix)]
    #[test]
    fn the_published_folder_is_switched_and_never_missing() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("published");
        for name in ["one", "two"] {
            let folder = dir.path().join("adapters").join(name);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("name"), name).unwrap();
        }
        std::os::unix::fs::symlink("nowhere", files::aside(&link)).unwrap();
        switch(&link, &dir.path().join("adapters/one")).unwrap();
        let reader = std::thread::spawn({
            let file = link.join("name");
            move || {
                (0..2000)
                    .map(|_| std::fs::read_to_string(&file).unwrap())
                    .all(|name| name == "one" || name == "two")
            }
        });
        for name in ["two", "one"].iter().cycle().take(200) {
            switch(&link, &dir.path().join("adapters").join(name)).unwrap();
            assert_eq!(std::fs::read_to_string(link.join("name")).unwrap(), *name);
        }
        assert!(reader.join().unwrap(), "a reader saw something else");
    }
}
