//! Pictures and texts to embeddings, and embeddings to scores.

use image::RgbImage;

use super::metrics::{Scores, cosine, mean_cosine};
use crate::{Error, Result};

/// A model that gives pictures embeddings.
pub trait ImageEmbedder {
    /// A picture of any size at the size of the model's input.
    fn prepare(&self, image: &RgbImage) -> Result<RgbImage>;

    /// One embedding for each of `prepared` pictures, in their order.
    fn prepared(&self, prepared: &[RgbImage]) -> Result<Vec<Vec<f32>>>;

    /// One embedding for each picture, in their order; the pictures may have any sizes.
    fn images(&self, images: &[RgbImage]) -> Result<Vec<Vec<f32>>> {
        let prepared = images.iter().map(|image| self.prepare(image));
        self.prepared(&prepared.collect::<Result<Vec<_>>>()?)
    }

    /// What the report says about it: the checkpoint and how pictures are prepared.
    fn description(&self) -> String;
}

/// A model that gives texts embeddings in the space of its pictures.
pub trait TextEmbedder {
    /// One embedding for each text, in their order.
    fn texts(&self, texts: &[String]) -> Result<Vec<Vec<f32>>>;
}

/// Embeddings of pictures: what the store keeps beside the scores.
#[derive(Debug, Clone, PartialEq)]
pub struct Embeddings {
    pub clip: Vec<Vec<f32>>,
    pub dino: Vec<Vec<f32>>,
}

/// A picture at the sizes that the two models take it in: photos are kept like this and not at full size.
#[derive(Debug, Clone)]
pub struct Prepared {
    pub clip: RgbImage,
    pub dino: RgbImage,
}

/// The two models that score, CLIP for CLIP-I and CLIP-T and DINO for DINO.
pub struct Evaluator<C, D> {
    pub clip: C,
    pub dino: D,
}

impl<C: ImageEmbedder + TextEmbedder, D: ImageEmbedder> Evaluator<C, D> {
    /// Embeddings of `prepared` pictures by both models.
    pub fn embed_prepared(&self, prepared: Vec<Prepared>) -> Result<Embeddings> {
        let (clip, dino): (Vec<_>, Vec<_>) = prepared
            .into_iter()
            .map(|picture| (picture.clip, picture.dino))
            .unzip();
        Ok(Embeddings {
            clip: self.clip.prepared(&clip)?,
            dino: self.dino.prepared(&dino)?,
        })
    }

    /// Embeddings of `images` by both models.
    pub fn embed(&self, images: &[RgbImage]) -> Result<Embeddings> {
        Ok(Embeddings {
            clip: self.clip.images(images)?,
            dino: self.dino.images(images)?,
        })
    }

    /// Scores of generated images against the `references` of their subject. `texts` are their prompts without the
    /// subject's token ([`fill_without_token`](crate::config::prompts::fill_without_token)), one for each. Fails when the counts differ.
    pub fn score(
        &self,
        references: &Embeddings,
        generated: &Embeddings,
        texts: &[String],
    ) -> Result<Vec<Scores>> {
        if generated.clip.len() != texts.len() || generated.dino.len() != texts.len() {
            return Err(Error::invalid(
                format!(
                    "{} images to score with {} texts",
                    generated.clip.len(),
                    texts.len()
                ),
                "give one text for each image",
            ));
        }
        let text_embeddings = self.clip.texts(texts)?;
        let embeddings = generated.clip.iter().zip(&generated.dino);
        embeddings
            .zip(&text_embeddings)
            .map(|((clip, dino), text)| {
                Ok(Scores {
                    clip_i: mean_cosine(clip, &references.clip)?,
                    clip_t: cosine(clip, text)?,
                    dino: mean_cosine(dino, &references.dino)?,
                })
            })
            .collect()
    }
}

/// What embeds and scores images, whatever models it does that with.
pub trait ImageScorer: Send {
    /// Embeddings of `images` by both models.
    fn embed(&self, images: &[RgbImage]) -> Result<Embeddings>;

    /// Scores of generated images, as [`Evaluator::score`] gives them.
    fn score(
        &self,
        references: &Embeddings,
        generated: &Embeddings,
        texts: &[String],
    ) -> Result<Vec<Scores>>;

    /// What the report says about it: a sentence for each model.
    fn protocol(&self) -> Vec<String>;
}

impl<C, D> ImageScorer for Evaluator<C, D>
where
    C: ImageEmbedder + TextEmbedder + Send,
    D: ImageEmbedder + Send,
{
    fn embed(&self, images: &[RgbImage]) -> Result<Embeddings> {
        Evaluator::embed(self, images)
    }

    fn score(
        &self,
        references: &Embeddings,
        generated: &Embeddings,
        texts: &[String],
    ) -> Result<Vec<Scores>> {
        Evaluator::score(self, references, generated, texts)
    }

    fn protocol(&self) -> Vec<String> {
        vec![self.clip.description(), self.dino.description()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    /// Pictures by their first pixel; texts by whether they speak of red.
    struct Colours;

    impl ImageEmbedder for Colours {
        fn prepare(&self, image: &RgbImage) -> Result<RgbImage> {
            Ok(image.clone())
        }

        fn prepared(&self, prepared: &[RgbImage]) -> Result<Vec<Vec<f32>>> {
            let first = |image: &RgbImage| image.get_pixel(0, 0).0.map(f32::from).to_vec();
            Ok(prepared.iter().map(first).collect())
        }

        fn description(&self) -> String {
            "colours".into()
        }
    }

    impl TextEmbedder for Colours {
        fn texts(&self, texts: &[String]) -> Result<Vec<Vec<f32>>> {
            let red = |text: &String| f32::from(u8::from(text.contains("red")));
            Ok(texts
                .iter()
                .map(|t| vec![red(t), 1.0 - red(t), 0.0])
                .collect())
        }
    }

    #[test]
    fn likeness_and_prompt_are_scored_apart() {
        let evaluator = Evaluator {
            clip: Colours,
            dino: Colours,
        };
        let red = RgbImage::from_pixel(2, 2, Rgb([200, 0, 0]));
        let green = RgbImage::from_pixel(2, 2, Rgb([0, 9, 0]));
        let references = evaluator.embed(std::slice::from_ref(&red)).unwrap();
        let generated = evaluator.embed(&[red, green]).unwrap();
        let texts = ["a red dog".to_string(), "a red dog".to_string()];
        let scores = evaluator.score(&references, &generated, &texts).unwrap();
        assert_eq!(
            scores[0],
            Scores {
                clip_i: 1.0,
                clip_t: 1.0,
                dino: 1.0
            }
        );
        assert_eq!(
            scores[1],
            Scores {
                clip_i: 0.0,
                clip_t: 0.0,
                dino: 0.0
            }
        );
        assert!(
            evaluator
                .score(&references, &generated, &texts[..1])
                .is_err()
        );
    }
}
