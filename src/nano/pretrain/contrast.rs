//! Contrastive losses with several right answers per row.

use candle_core::{D, Device, Tensor};

use crate::Result;

/// Rows of `x` (…, d) scaled to length 1.
pub fn unit(x: &Tensor) -> Result<Tensor> {
    let norm = (x.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
    Ok(x.broadcast_div(&norm)?)
}

/// For labels l: a row i whose mass lies evenly on the columns j other than i with l(j) = l(i); (n, n). The row of a
/// label that stands alone is empty.
pub fn targets<T: PartialEq>(labels: &[T], device: &Device) -> Result<Tensor> {
    let n = labels.len();
    let mut values = Vec::with_capacity(n * n);
    for (i, label) in labels.iter().enumerate() {
        let right: Vec<bool> = labels
            .iter()
            .enumerate()
            .map(|(j, other)| label == other && i != j)
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

/// CLIP's loss (Radford et al. 2021, arXiv 2103.00020) of `images` (n, d) against distinct `texts` (m, d), all of
/// length 1, with the logarithm of the scale; `texts[of[i]]` belongs to image i. Images with one caption share it,
/// and none of them is a wrong answer to it.
pub fn clip(images: &Tensor, texts: &Tensor, logit_scale: &Tensor, of: &[usize]) -> Result<Tensor> {
    let (n, m) = (of.len(), texts.dim(0)?);
    let mut by_image = vec![0f32; n * m];
    let mut by_text = vec![0f32; m * n];
    for (i, &text) in of.iter().enumerate() {
        let sharing = of.iter().filter(|&&other| other == text).count();
        by_image[i * m + text] = 1.0;
        by_text[text * n + i] = 1.0 / sharing as f32;
    }
    let device = images.device();
    let by_image = Tensor::from_vec(by_image, (n, m), device)?;
    let by_text = Tensor::from_vec(by_text, (m, n), device)?;
    let logits = images.matmul(&texts.t()?.contiguous()?)?;
    let logits = logits.broadcast_mul(&logit_scale.exp()?)?;
    let by_image = soft_cross_entropy(&logits, &by_image)?;
    let by_text = soft_cross_entropy(&logits.t()?.contiguous()?, &by_text)?;
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
    fn a_view_is_compared_with_the_others_of_its_label() {
        let targets = targets(&["a", "b", "a", "a"], &Device::Cpu).unwrap();
        let expected = [
            [0.0, 0.0, 0.5, 0.5],
            [0.0; 4],
            [0.5, 0.0, 0.0, 0.5],
            [0.5, 0.0, 0.5, 0.0],
        ];
        assert_eq!(targets.to_vec2::<f32>().unwrap(), expected);
    }

    #[test]
    fn images_that_share_a_caption_do_not_compete_for_it() {
        let device = &Device::Cpu;
        let images = Tensor::new(&[[1f32, 0.0], [0.0, 1.0], [1.0, 0.0]], device).unwrap();
        let texts = Tensor::new(&[[1f32, 0.0], [0.0, 1.0]], device).unwrap();
        let scale = Tensor::new(&[50f32.ln()], device).unwrap();
        let loss = |of: &[usize]| clip(&images, &texts, &scale, of).unwrap();
        let right = loss(&[0, 1, 0]).to_scalar::<f32>().unwrap();
        // Only the choice between two equal images is left: half of ln 2, over two texts.
        let expected = 0.5 * 0.5 * 2f32.ln();
        assert!((right - expected).abs() < 1e-4, "{right}");
        assert!(loss(&[1, 0, 1]).to_scalar::<f32>().unwrap() > 10.0);
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
        let targets = targets(&[0, 0, 1, 1], &device).unwrap();
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
