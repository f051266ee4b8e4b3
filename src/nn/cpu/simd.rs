//! What the kernels are made of: elementary functions without branches and sums in a fixed order, written so that
//! the compiler turns them into vector instructions. Everything here is inlined into a `multiversion` function, which
//! is where the instruction set is chosen.

/// Sums run in this many lanes, whatever the machine's vectors are, so that they are equal everywhere.
pub const LANES: usize = 32;

/// e^x, within 2 units in the last place; 0 below −87.3 and 2.4e38 above 88.4. NaN stays NaN.
///
/// Range reduction and polynomial as in Cephes' `expf` (Moshier 1989).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOW: f32 = -87.336_54;
    const HIGH: f32 = 88.376_26;
    // Adding 1.5·2²³ rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // Comparisons rather than `max` and `min`, which would turn NaN into a number.
    let bounded = if x < LOW { LOW } else { x };
    let bounded = if bounded > HIGH { HIGH } else { bounded };
    let rounded = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = bounded - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * (r * r) + r + 1.0;
    let exponent = (rounded.to_bits() as i32)
        .wrapping_sub(ROUND.to_bits() as i32)
        .wrapping_add(127);
    let y = p * f32::from_bits((exponent << 23) as u32);
    if x < LOW { 0.0 } else { y }
}

/// 1 / (1 + e^−x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The standard normal distribution function, relative error below 1e-6 where it is above 1e-9.
///
/// `erfcc` of Numerical Recipes (Press et al. 1992, section 6.2).
#[inline(always)]
pub fn normal_cdf(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * z);
    let p = 0.170_872_77;
    let p = p * t - 0.822_152_23;
    let p = p * t + 1.488_515_9;
    let p = p * t - 1.135_204;
    let p = p * t + 0.278_868_07;
    let p = p * t - 0.186_288_06;
    let p = p * t + 0.096_784_18;
    let p = p * t + 0.374_091_96;
    let p = p * t + 1.000_023_7;
    let p = p * t - 1.265_512_2;
    let tail = 0.5 * t * exp(p - z * z);
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// The lanes added in pairs.
#[inline(always)]
pub fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Σ f(x).
#[inline(always)]
pub fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (lane, v) in lanes.iter_mut().zip(block) {
            *lane += f(*v);
        }
    }
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane += f(*v);
    }
    fold(lanes)
}

/// Σ f(x, y) over two slices of one length.
#[inline(always)]
pub fn sum_pairs(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (x_blocks, x_rest) = x.as_chunks::<LANES>();
    let (y_blocks, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in x_blocks.iter().zip(y_blocks) {
        for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += f(*x, *y);
        }
    }
    for ((lane, x), y) in lanes.iter_mut().zip(x_rest).zip(y_rest) {
        *lane += f(*x, *y);
    }
    fold(lanes)
}

/// Σ x · value(w) over two slices of one length, to the bit as [`sum_pairs`] of the widened values.
#[inline(always)]
pub fn sum_widened(x: &[f32], w: &[u16], value: impl Fn(u16) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (x_blocks, x_rest) = x.as_chunks::<LANES>();
    let (w_blocks, w_rest) = w.as_chunks::<LANES>();
    for (x, w) in x_blocks.iter().zip(w_blocks) {
        for ((lane, x), w) in lanes.iter_mut().zip(x).zip(w) {
            *lane += *x * value(*w);
        }
    }
    for ((lane, x), w) in lanes.iter_mut().zip(x_rest).zip(w_rest) {
        *lane += *x * value(*w);
    }
    fold(lanes)
}

/// The bf16 with these bits.
#[inline(always)]
pub fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The f16 with these bits.
#[inline(always)]
pub fn from_f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // The exponents' biases differ by 112; as a product this is right for subnormal numbers too.
    let scaled = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let special = if bits & 0x7c00 == 0x7c00 {
        0x7f80_0000
    } else {
        0
    };
    f32::from_bits(scaled.to_bits() | special | (u32::from(bits & 0x8000) << 16))
}

/// The largest value; −∞ of nothing. NaN is passed over.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (lane, v) in lanes.iter_mut().zip(block) {
            *lane = if *v > *lane { *v } else { *lane };
        }
    }
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane = if *v > *lane { *v } else { *lane };
    }
    lanes
        .into_iter()
        .fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relative(found: f32, wanted: f64) -> f64 {
        ((found as f64 - wanted) / wanted).abs()
    }

    #[test]
    fn exp_is_within_three_units_in_the_last_place() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01 + 0.003;
            assert!(relative(exp(x), (x as f64).exp()) < 2e-7, "{x}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn the_normal_distribution_function_keeps_its_lower_tail() {
        // Φ(−1), Φ(−3), Φ(−5), Φ(0.5) to ten digits.
        for (x, wanted) in [
            (-1.0, 0.158_655_253_9),
            (-3.0, 1.349_898_032e-3),
            (-5.0, 2.866_515_719e-7),
            (0.5, 0.691_462_461_3),
            (0.0, 0.5),
        ] {
            assert!(relative(normal_cdf(x), wanted) < 2e-6, "{x}");
        }
    }

    #[test]
    fn every_half_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let same = |found: f32, wanted: f32| {
                found.to_bits() == wanted.to_bits() || (found.is_nan() && wanted.is_nan())
            };
            assert!(
                same(from_f16(bits), half::f16::from_bits(bits).to_f32()),
                "{bits:x}"
            );
            assert!(
                same(from_bf16(bits), half::bf16::from_bits(bits).to_f32()),
                "{bits:x}"
            );
        }
    }

    #[test]
    fn sums_and_maxima_cover_every_element() {
        for n in [0, 1, 31, 32, 33, 100] {
            let x: Vec<f32> = (1..=n).map(|i| i as f32).collect();
            assert_eq!(sum(&x, |v| v), (n * (n + 1) / 2) as f32);
            assert_eq!(sum_pairs(&x, &x, |a, b| a - b), 0.0);
            assert_eq!(max(&x), if n == 0 { f32::NEG_INFINITY } else { n as f32 });
        }
    }
}
