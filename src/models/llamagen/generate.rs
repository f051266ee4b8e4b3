//! Sampling of image tokens. Reference: `autoregressive/models/generate.py`.

use candle_core::{DType, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::gpt::Gpt;
pub use crate::config::AutoregressiveSampling as Sampling;
use crate::{Error, Result};

impl Gpt {
    /// Draws `count` tokens (at most `block_size`) for each caption, with a key and value cache.
    ///
    /// `caption_embeddings` (b, cls_token_num, caption_dim) and `caption_mask` (b, cls_token_num) as in
    /// [`Gpt::forward`]; row i is drawn by a generator seeded with `seeds[i]` alone, whatever else is in the batch.
    /// Under guidance the null condition shares the caption's mask.
    pub fn generate(
        &self,
        caption_embeddings: &Tensor,
        caption_mask: &Tensor,
        count: usize,
        sampling: &Sampling,
        seeds: &[u64],
    ) -> Result<Vec<Vec<u32>>> {
        let b = caption_embeddings.dim(0)?;
        if seeds.len() != b || count > self.config().block_size {
            return Err(Error::invalid(
                format!("{count} tokens for {b} captions with {} seeds", seeds.len()),
                format!(
                    "give one seed for each caption, and at most {} tokens",
                    self.config().block_size
                ),
            ));
        }
        let mut generators: Vec<ChaCha8Rng> = seeds
            .iter()
            .map(|&seed| ChaCha8Rng::seed_from_u64(seed))
            .collect();
        let mut rows: Vec<Vec<u32>> = vec![Vec::with_capacity(count); b];
        if count == 0 {
            return Ok(rows);
        }
        let guided = sampling.guidance_scale > 1.0;
        let mut cache = self.cache(if guided { 2 * b } else { b }, count)?;
        let mut logits = if guided {
            let null = self.drop_captions(caption_embeddings, &vec![true; b])?;
            self.prefill(
                &Tensor::cat(&[caption_embeddings, &null], 0)?,
                &Tensor::cat(&[caption_mask, caption_mask], 0)?,
                &mut cache,
            )?
        } else {
            self.prefill(caption_embeddings, caption_mask, &mut cache)?
        };
        for index in 0..count {
            if guided {
                let conditional = logits.narrow(0, 0, b)?;
                // The reference counts from the second token, and the interval's own step is still guided.
                let ended = sampling
                    .guidance_interval
                    .is_some_and(|interval| index > interval + 1);
                logits = if ended {
                    conditional
                } else {
                    let null = logits.narrow(0, b, b)?;
                    ((conditional - &null)? * sampling.guidance_scale)?.add(&null)?
                };
            }
            let logits_by_row = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            for ((row, values), generator) in
                rows.iter_mut().zip(logits_by_row).zip(&mut generators)
            {
                row.push(choose(&values, sampling, generator)?);
            }
            if index + 1 < count {
                let mut tokens: Vec<u32> = rows.iter().map(|row| row[index]).collect();
                if guided {
                    tokens.extend_from_within(..);
                }
                let tokens = Tensor::new(tokens, self.device())?;
                logits = self.step(&tokens, &mut cache)?;
            }
        }
        Ok(rows)
    }
}

/// One token from `logits`: temperature, then top-k (ties with the k-th stay), then top-p, then a draw.
/// At temperature 0, the largest, the first of equals, and `generator` is not used.
pub fn choose(logits: &[f32], sampling: &Sampling, generator: &mut ChaCha8Rng) -> Result<u32> {
    if logits.is_empty() || logits.iter().any(|x| x.is_nan()) {
        return Err(Error::invalid(
            "logits that are empty or not a number",
            "check the adapter and the checkpoint",
        ));
    }
    if sampling.temperature <= 0.0 {
        let best =
            (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
        return Ok(best as u32);
    }
    let temperature = sampling.temperature.max(1e-5) as f32;
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&i, &j| logits[j].total_cmp(&logits[i]).then(i.cmp(&j)));
    if sampling.top_k > 0 && sampling.top_k < order.len() {
        let smallest = logits[order[sampling.top_k - 1]];
        order.retain(|&i| logits[i] >= smallest);
    }
    let largest = logits[order[0]];
    let mut weights: Vec<f64> = order
        .iter()
        .map(|&i| f64::from((logits[i] - largest) / temperature).exp())
        .collect();
    if sampling.top_p < 1.0 {
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        // The token that crosses the threshold is still kept.
        let kept = weights
            .iter()
            .position(|weight| {
                reached += weight / total;
                reached > sampling.top_p
            })
            .map_or(weights.len(), |i| i + 1);
        weights.truncate(kept);
    }
    let total: f64 = weights.iter().sum();
    let mut remaining = generator.random::<f64>() * total;
    for (weight, &token) in weights.iter().zip(&order) {
        if remaining < *weight {
            return Ok(token as u32);
        }
        remaining -= weight;
    }
    // Rounding may leave a remainder beyond the last weight.
    Ok(order[weights.len() - 1] as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        let mut seen: Vec<u32> = (0..2000)
            .map(|_| choose(logits, sampling, &mut generator).unwrap())
            .collect();
        seen.sort_unstable();
        seen
    }

    fn sampling(top_k: usize, top_p: f64) -> Sampling {
        Sampling {
            top_k,
            top_p,
            ..Sampling::default()
        }
    }

    #[test]
    fn tokens_are_drawn_as_often_as_their_probability_says() {
        let logits = [0.0, 2f32.ln(), 5f32.ln(), f32::NEG_INFINITY];
        let seen = draw(&logits, &sampling(0, 1.0));
        for (token, share) in [(0, 0.125), (1, 0.25), (2, 0.625), (3, 0.0)] {
            let count = seen.iter().filter(|&&t| t == token).count() as f64;
            assert!((count / 2000.0 - share).abs() < 0.03, "{token}: {count}");
        }
    }

    #[test]
    fn top_k_keeps_ties_and_top_p_keeps_the_token_that_crosses() {
        let mut seen = draw(&[1.0, 3.0, 1.0, 0.0], &sampling(2, 1.0));
        seen.dedup();
        assert_eq!(seen, [0, 1, 2]);
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        let mut seen = draw(&logits, &sampling(0, 0.6));
        seen.dedup();
        assert_eq!(seen, [0, 1]);
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_largest() {
        let greedy = Sampling {
            temperature: 0.0,
            ..sampling(0, 1.0)
        };
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        assert_eq!(
            choose(&[1.0, 4.0, 4.0], &greedy, &mut generator).unwrap(),
            1
        );
    }
}
