//! Sampling of an image's codes. Reference: `inference_solver.py` of Lumina-mGPT: guidance on raw logits, then only
//! codes where a code must stand, then top-k, temperature and a draw. The frame of an image (start, height, width, new
//! lines, end) is no choice, so it is given instead of sampled.

use candle_core::{DType, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::backbone::Backbone;
use super::grammar::Format;
use crate::models::llamagen::generate::{Sampling, choose};
use crate::{Error, Result};

impl Backbone {
    /// Draws the first `count` codes of one image for each of `prompts` (token ids, see [`Format::prompt`]), with a key
    /// and value cache; [`Format::count`] of them are a whole image. Image i is drawn by a generator seeded with
    /// `seeds[i]` alone, whatever else is in the batch.
    ///
    /// Guidance s takes `u + s·(c − u)` of the logits c given the prompt and u given the image alone, whose positions
    /// then start at 0; 1 samples without it.
    pub fn draw(
        &self,
        prompts: &[Vec<u32>],
        format: &Format,
        count: usize,
        sampling: &Sampling,
        seeds: &[u64],
    ) -> Result<Vec<Vec<u32>>> {
        let b = prompts.len();
        if seeds.len() != b || count > format.count() {
            return Err(Error::invalid(
                format!("{count} codes for {b} prompts with {} seeds", seeds.len()),
                format!(
                    "give one seed for each prompt, and draw at most {} codes",
                    format.count()
                ),
            ));
        }
        let mut rows: Vec<Vec<u32>> = vec![Vec::with_capacity(count); b];
        if b == 0 || count == 0 {
            return Ok(rows);
        }
        let mut generators: Vec<ChaCha8Rng> = seeds
            .iter()
            .map(|&seed| ChaCha8Rng::seed_from_u64(seed))
            .collect();
        let guided = sampling.guidance_scale != 1.0;
        let opening = format.opening();
        let mut tokens: Vec<Vec<u32>> = prompts
            .iter()
            .map(|prompt| [prompt, opening.as_slice()].concat())
            .collect();
        let longest = tokens.iter().map(Vec::len).max().unwrap_or(0);
        if guided {
            tokens.extend(vec![opening.to_vec(); b]);
        }
        // The last code is drawn, not fed.
        let fed = format.tokens_of(count - 1);
        let mut cache = self.cache(tokens.len(), longest + fed)?;
        let codes = Tensor::new(format.code_ids(), self.device())?;
        for index in 0..count {
            let logits = self.extend(&tokens, &mut cache)?.index_select(&codes, 1)?;
            let logits = if guided {
                let (conditional, null) = (logits.narrow(0, 0, b)?, logits.narrow(0, b, b)?);
                ((conditional - &null)? * sampling.guidance_scale)?.add(&null)?
            } else {
                logits
            };
            let values = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            let mut chosen = Vec::with_capacity(b);
            for ((row, values), generator) in rows.iter_mut().zip(&values).zip(&mut generators) {
                let code = choose(values, sampling, generator)?;
                row.push(code);
                chosen.push(format.after(index, code)?);
            }
            tokens = if guided {
                [chosen.clone(), chosen].concat()
            } else {
                chosen
            };
        }
        Ok(rows)
    }
}
