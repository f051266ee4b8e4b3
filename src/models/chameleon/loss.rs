//! What Lumina-mGPT learns. Reference: `modeling_xllmx_chameleon.py` and `exps/7B.sh` in its repository.

use candle_core::Tensor;

use super::backbone::{Backbone, Dropout};
use crate::nn::{ops, sum_over_rows};
use crate::{Error, Result};

/// Weight of the squared log-sum-exp of the logits beside the cross-entropy (`z_loss_weight`).
const Z_LOSS: f64 = 1e-5;
/// Logits that exist at once.
const LOGITS_AT_ONCE: usize = 1 << 24;
/// Stands where a shorter sequence has ended; nothing before it sees it.
const PADDING: u32 = 0;

/// A sequence to learn: the tokens from `labelled` on are predicted, each from all before it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    pub tokens: Vec<u32>,
    /// At least 1: nothing predicts the first token.
    pub labelled: usize,
}

impl Backbone {
    /// Cross-entropy plus 1e-5 times the squared log-sum-exp of the logits, a scalar: the mean over all labelled tokens
    /// of `batch`. Logits are computed for these alone, some at a time.
    ///
    /// # Errors
    /// When a sequence is longer than the model was made for, or nothing of it is labelled.
    pub fn loss(&self, batch: &[Sequence], dropout: Option<Dropout>) -> Result<Tensor> {
        let n = batch.iter().map(|s| s.tokens.len()).max().unwrap_or(0);
        let n = n.saturating_sub(1);
        self.check_length(n)?;
        let (mut ids, mut rows) = (Vec::<u32>::new(), Vec::<u32>::new());
        let mut targets = Vec::<u32>::new();
        for (index, sequence) in batch.iter().enumerate() {
            let (tokens, first) = (&sequence.tokens, sequence.labelled);
            if first == 0 || first >= tokens.len() {
                return Err(Error::Invalid {
                    what: format!(
                        "a sequence of {} tokens labelled from {first}",
                        tokens.len()
                    ),
                    hint: None,
                });
            }
            let given = tokens.len() - 1;
            ids.extend(&tokens[..given]);
            ids.resize((index + 1) * n, PADDING);
            rows.extend((first - 1..given).map(|place| (index * n + place) as u32));
            targets.extend(&tokens[first..]);
        }
        let (device, count) = (self.device(), targets.len());
        let ids = Tensor::from_vec(ids, (batch.len(), n), device)?;
        let rows = Tensor::from_vec(rows, count, device)?;
        let targets = Tensor::from_vec(targets, count, device)?;
        let hidden = self
            .hidden(&ids, dropout)?
            .flatten_to(1)?
            .index_select(&rows, 0)?;
        let parameters = self.head().parameters();
        let at_once = (LOGITS_AT_ONCE / self.config().vocab_size.max(1)).max(1);
        let sum = sum_over_rows(&hidden, &parameters, at_once, |hidden, first| {
            let targets = targets.narrow(0, first, hidden.dim(0)?)?;
            let logits = self.logits(hidden)?;
            let losses = ops::cross_entropy(&logits, &targets)?;
            // The loss is the log-sum-exp less the target's logit.
            let wanted = logits.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?;
            let squares = (&losses + wanted)?.sqr()?;
            Ok((losses + (squares * Z_LOSS)?)?.sum_all()?)
        })?;
        Ok((sum / count as f64)?)
    }
}
