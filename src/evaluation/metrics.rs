//! Scores of subject-driven generation, by the protocol of DreamBooth (Ruiz et al. 2023, section 4) that the
//! Proxy-Tuning paper follows: CLIP-I and DINO are the mean cosine over all pairs of a real and a generated image of a
//! subject, CLIP-T is the mean cosine of an image and its prompt; all are averaged over subjects. Cosines are as they
//! are, neither multiplied by 100 nor by 2.5.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The scores of one generated image.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Mean cosine of its CLIP embedding and those of the subject's references, in [-1, 1].
    pub clip_i: f64,
    /// Cosine of its CLIP embedding and that of its prompt without the subject's token, in [-1, 1].
    pub clip_t: f64,
    /// Mean cosine of its DINO embedding and those of the subject's references, in [-1, 1].
    pub dino: f64,
}

/// The scores of one generated image, with what it shows and what made it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoredImage {
    /// Name of the subject.
    pub subject: String,
    /// The prompt as it was given to the model.
    pub prompt: String,
    /// Seed of the run that trained the model: images of one subject and one run share an adapter.
    pub run_seed: u64,
    pub scores: Scores,
}

/// What a standard error was taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// The images of the one subject and run there is.
    Images,
    /// Independently trained adapters: pairs of subject and run seed.
    Adapters,
}

/// A mean with its standard error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    pub mean: f64,
    /// Absent when there is a single value.
    pub standard_error: Option<f64>,
}

/// The line of one model in the table.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub clip_i: Estimate,
    pub clip_t: Estimate,
    pub dino: Estimate,
    /// Number of generated images.
    pub images: usize,
    pub basis: Basis,
}

/// Cosine of two embeddings, summed in f64 from the first component to the last. Fails when the lengths differ, or one
/// is zero or not finite.
pub fn cosine(a: &[f32], b: &[f32]) -> Result<f64> {
    if a.len() != b.len() {
        return Err(Error::invalid(
            format!("embeddings of {} and {} components", a.len(), b.len()),
            "compare embeddings of one model",
        ));
    }
    let (mut dot, mut aa, mut bb) = (0f64, 0f64, 0f64);
    for (&a, &b) in a.iter().zip(b) {
        let (a, b) = (f64::from(a), f64::from(b));
        dot += a * b;
        aa += a * a;
        bb += b * b;
    }
    let norm = (aa * bb).sqrt();
    if !norm.is_finite() || norm == 0.0 {
        return Err(Error::invalid(
            "an embedding is zero or not finite",
            "look at the checkpoint of the evaluator: it may be damaged",
        ));
    }
    Ok((dot / norm).clamp(-1.0, 1.0))
}

/// Mean cosine of `embedding` and each of `references`. Fails when there is no reference, or as [`cosine`] does.
pub fn mean_cosine(embedding: &[f32], references: &[Vec<f32>]) -> Result<f64> {
    if references.is_empty() {
        return Err(Error::invalid(
            "no reference image to compare with",
            "give the subject at least one",
        ));
    }
    let mut sum = 0.0;
    for reference in references {
        sum += cosine(embedding, reference)?;
    }
    Ok(sum / references.len() as f64)
}

/// Averages `images`: within each pair of subject and run seed, then over the seeds of a subject, then over subjects.
/// The standard error is that of the mean of the pairs when there are several, because the images of one adapter are
/// not independent of each other; otherwise it is that of the mean of the images. `None` when there is no image.
pub fn summarise(images: &[ScoredImage]) -> Option<Summary> {
    let mut groups: BTreeMap<(&str, u64), Vec<Scores>> = BTreeMap::new();
    for image in images {
        groups
            .entry((&image.subject, image.run_seed))
            .or_default()
            .push(image.scores);
    }
    let basis = match groups.len() {
        0 => return None,
        1 => Basis::Images,
        _ => Basis::Adapters,
    };
    let estimate = |score: fn(&Scores) -> f64| {
        let means: Vec<(&str, f64)> = groups
            .iter()
            .map(|((subject, _), scores)| {
                let values: Vec<f64> = scores.iter().map(score).collect();
                (*subject, mean(&values))
            })
            .collect();
        let mut subjects: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for (subject, value) in &means {
            subjects.entry(subject).or_default().push(*value);
        }
        let by_subject: Vec<f64> = subjects.values().map(|values| mean(values)).collect();
        let independent: Vec<f64> = match basis {
            Basis::Images => images.iter().map(|image| score(&image.scores)).collect(),
            Basis::Adapters => means.iter().map(|(_, value)| *value).collect(),
        };
        Estimate {
            mean: mean(&by_subject),
            standard_error: standard_error(&independent),
        }
    };
    Some(Summary {
        clip_i: estimate(|s| s.clip_i),
        clip_t: estimate(|s| s.clip_t),
        dino: estimate(|s| s.dino),
        images: images.len(),
        basis,
    })
}

/// The mean of at least one value.
pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Sample standard deviation over the root of the count; `None` for fewer than two values.
pub(crate) fn standard_error(values: &[f64]) -> Option<f64> {
    if values.len() < 2 {
        return None;
    }
    let mean = mean(values);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let count = values.len() as f64;
    Some((squares / (count - 1.0) / count).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(subject: &str, run_seed: u64, value: f64) -> ScoredImage {
        ScoredImage {
            subject: subject.into(),
            prompt: "a sks dog".into(),
            run_seed,
            scores: Scores {
                clip_i: value,
                clip_t: value / 2.0,
                dino: -value,
            },
        }
    }

    #[test]
    fn cosine_ignores_length_and_refuses_nothing_to_compare() {
        assert!((cosine(&[3.0, 0.0], &[0.5, 0.0]).unwrap() - 1.0).abs() < 1e-12);
        assert!(cosine(&[1.0, 0.0], &[0.0, 2.0]).unwrap().abs() < 1e-12);
        assert!(cosine(&[0.0, 0.0], &[0.0, 2.0]).is_err());
        assert!(cosine(&[f32::NAN, 0.0], &[0.0, 2.0]).is_err());
        assert!(cosine(&[1.0], &[0.0, 2.0]).is_err());
    }

    #[test]
    fn an_image_is_compared_with_every_reference() {
        let real = vec![vec![1.0, 0.0], vec![0.0, 1.0]];
        let root = 0.5f64.sqrt();
        for (generated, expected) in [([1.0, 0.0], 0.5), ([1.0, 1.0], root)] {
            assert!((mean_cosine(&generated, &real).unwrap() - expected).abs() < 1e-7);
        }
        assert!(mean_cosine(&[1.0, 0.0], &[]).is_err());
    }

    #[test]
    fn every_subject_counts_once_whatever_its_number_of_images() {
        let images = [image("a", 1, 0.2), image("a", 1, 0.4), image("b", 1, 0.9)];
        let summary = summarise(&images).unwrap();
        assert!((summary.clip_i.mean - 0.6).abs() < 1e-12);
        assert!((summary.dino.mean + 0.6).abs() < 1e-12);
        assert_eq!(summary.basis, Basis::Adapters);
        // Group means 0.3 and 0.9: deviation 0.6/√2, over √2.
        assert!((summary.clip_i.standard_error.unwrap() - 0.3).abs() < 1e-12);
    }

    #[test]
    fn one_adapter_has_the_standard_error_of_its_images() {
        let images = [image("a", 1, 0.2), image("a", 1, 0.4)];
        let summary = summarise(&images).unwrap();
        assert_eq!(summary.basis, Basis::Images);
        assert!((summary.clip_i.standard_error.unwrap() - 0.1).abs() < 1e-12);
        let single = summarise(&images[..1]).unwrap();
        assert_eq!(single.clip_i.standard_error, None);
        assert_eq!(summarise(&[]), None);
    }
}
