//! Contrastive losses with several right answers per row.

use candle_core::{D, Device, Tensor};

use crate::Result;

/// Rows of `x` (…, d) scaled to length 1.
pub fn unit(x: &Tensor) -> Result<Tensor> {
    let norm = (x.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
    Ok(x.broadcast_div(&norm)?)
}

/// For labels l: a row i whose mass lies evenly on the columns j with l(j) = l(i), i itself included if `own`;
/// (n, n). Equal captions in a batch are thus no wrong answers to one another.
pub fn targets<T: PartialEq>(labels: &[T], own: bool, device: &Device) -> Result<Tensor> {
    let n = labels.len();
    let mut values = Vec::with_capacity(n * n);
    for (i, label) in labels.iter().enumerate() {
        let right: Vec<bool> = labels
            .iter()
            .enumerate()
            .map(|(j, other)| label == other && (own || i != j))
            .collect();
        let count = right.iter().filter(|r| **r).count().max(1);
        values.extend(
            right
                .iter()
                .map(|&r| if r { 1.0 / count as f32 } else { 0.0 }),
        );
    }
    Ok(Tensor::from_vec(values, (n, n), device)?)
}

/// Mean over the rows of −Σ targets · log softmax(logits); both (n, m).
fn soft_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let log_probabilities = candle_nn::ops::log_softmax(logits, D::Minus1)?;
    Ok((log_probabilities * targets)?
        .sum(D::Minus1)?
        .mean_all()?
        .neg()?)
}

/// CLIP's loss (Radford et al. 2021, arXiv 2103.00020): `images` and `texts` (n, d) of length 1, the logarithm of the
/// scale, and who belongs to whom.
pub fn clip(
    images: &Tensor,
    texts: &Tensor,
    logit_scale: &Tensor,
    targets: &Tensor,
) -> Result<Tensor> {
    let logits = images.matmul(&texts.t()?.contiguous()?)?;
    let logits = logits.broadcast_mul(&logit_scale.exp()?)?;
    let by_image = soft_cross_entropy(&logits, targets)?;
    let by_text = soft_cross_entropy(&logits.t()?.contiguous()?, targets)?;
    Ok(((by_image + by_text)? * 0.5)?)
}

/// Supervised contrast (Khosla et al. 2020, arXiv 2004.11362) of `views` (n, d) of length 1 with labels as in
/// [`targets`], a view not being compared with itself.
pub fn views(views: &Tensor, targets: &Tensor, temperature: f64) -> Result<Tensor> {
    let n = views.dim(0)?;
    let logits = (views.matmul(&views.t()?.contiguous()?)? / temperature)?;
    let own = (Tensor::eye(n, logits.dtype(), logits.device())? * -1e4)?;
    soft_cross_entropy(&(logits + own)?, targets)
}

/// The area under the curve that tells `positives` from `negatives` by a threshold: the share of pairs in the right
/// order, ties counted half.
pub fn area_under_curve(positives: &[f32], negatives: &[f32]) -> f64 {
    let mut sorted = negatives.to_vec();
    sorted.sort_by(f32::total_cmp);
    let sum: f64 = positives
        .iter()
        .map(|p| {
            let below = sorted.partition_point(|n| n < p);
            let not_above = sorted.partition_point(|n| n <= p);
            (below + not_above) as f64 / 2.0
        })
        .sum();
    sum / (positives.len() * negatives.len()).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_captions_share_the_target() {
        let targets = targets(&["a", "b", "a"], true, &Device::Cpu).unwrap();
        let expected = [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]];
        assert_eq!(targets.to_vec2::<f32>().unwrap(), expected);
    }

    #[test]
    fn the_area_is_one_for_separated_and_half_for_equal_scores() {
        assert_eq!(area_under_curve(&[0.9, 0.8], &[0.1, 0.7]), 1.0);
        assert_eq!(area_under_curve(&[0.5, 0.5], &[0.5]), 0.5);
        assert_eq!(area_under_curve(&[0.2, 0.9], &[0.5]), 0.5);
    }

    #[test]
    fn views_of_one_label_that_agree_have_a_lower_loss() {
        let device = Device::Cpu;
        let targets = targets(&[0, 0, 1, 1], false, &device).unwrap();
        let loss = |rows: [[f32; 2]; 4]| {
            let rows = Tensor::new(&rows, &device).unwrap();
            views(&rows, &targets, 0.1)
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
        };
        let right = loss([[1., 0.], [1., 0.], [0., 1.], [0., 1.]]);
        let wrong = loss([[1., 0.], [0., 1.], [1., 0.], [0., 1.]]);
        assert!(right < 1e-3 && wrong > 5.0, "{right} {wrong}");
    }
}
