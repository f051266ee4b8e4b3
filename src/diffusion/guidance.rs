use candle_core::Tensor;

use crate::Result;

/// Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, equation 6 in the form `u + s · (c − u)`).
/// `both` (2b, …) holds the b predictions without the text first, then the b with it; the result is (b, …). Scale 1
/// gives the prediction with the text.
pub fn guide(both: &Tensor, guidance_scale: f64) -> Result<Tensor> {
    let b = both.dim(0)? / 2;
    let without = both.narrow(0, 0, b)?;
    let with = both.narrow(0, b, b)?;
    Ok((&without + ((with - &without)? * guidance_scale)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn guidance_moves_from_the_first_half_towards_the_second() -> Result<()> {
        let both = Tensor::from_vec(vec![1f32, 2.0, 3.0, 6.0], (2, 2), &Device::Cpu)?;
        let guided = guide(&both, 2.5)?.to_vec2::<f32>()?;
        assert_eq!(guided, [[6.0, 12.0]]);
        Ok(())
    }
}
