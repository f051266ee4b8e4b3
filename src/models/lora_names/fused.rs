//! Layers that other programs keep in one: queries, keys and values on top of each other, in FLUX.1's single blocks with
//! the first layer of the MLP below them. Cutting and joining leave scale·B·A what it is, to the last bit where scales
//! agree.

use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::nn::Factors;

/// The rows of each of `count` layers in one of `rows` rows that reads `inputs` values: as many as inputs for queries, keys
/// and values, and what is left for a fourth. `None` where that is not what such a layer has.
fn heights(count: usize, inputs: usize, rows: usize) -> Option<Vec<usize>> {
    let mut heights = vec![inputs; 3];
    match count {
        3 => (rows == 3 * inputs).then_some(heights),
        4 => {
            heights.push(rows.checked_sub(3 * inputs).filter(|rest| *rest > 0)?);
            Some(heights)
        }
        _ => None,
    }
}

/// The factors of `count` layers that lie in one, from the top. Where B has nothing outside of as many blocks along its
/// diagonal, each layer has the ranks of its own block, and one whose block has nothing but zeros is `None`; else all have
/// A in common. `None` where such a layer has other shapes.
pub fn split(factors: &Factors, count: usize) -> Result<Option<Vec<Option<Factors>>>> {
    let Factors { a, b, scale } = factors;
    let (&[rank, inputs], &[rows, _]) = (a.dims(), b.dims()) else {
        return Ok(None);
    };
    let Some(heights) = heights(count, inputs, rows) else {
        return Ok(None);
    };
    let own = rank / count;
    let mut top = 0;
    let mut parts = Vec::with_capacity(count);
    for height in heights {
        parts.push(b.narrow(0, top, height)?.contiguous()?);
        top += height;
    }
    let mut blocks = rank.is_multiple_of(count);
    for (i, part) in parts.iter().enumerate() {
        let beside = [(0, i * own), ((i + 1) * own, rank - (i + 1) * own)];
        for (first, columns) in beside {
            blocks = blocks && (columns == 0 || is_zero(&part.narrow(1, first, columns)?)?);
        }
    }
    let mut split = Vec::with_capacity(count);
    for (i, part) in parts.into_iter().enumerate() {
        let (a, b) = match blocks {
            true => (
                a.narrow(0, i * own, own)?.contiguous()?,
                part.narrow(1, i * own, own)?.contiguous()?,
            ),
            false => (a.clone(), part),
        };
        let empty = blocks && is_zero(&a)? && is_zero(&b)?;
        let scale = *scale;
        split.push((!empty).then_some(Factors { a, b, scale }));
    }
    Ok(Some(split))
}

fn is_zero(tensor: &Tensor) -> Result<bool> {
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().all(|value| *value == 0.0))
}

/// One layer of those in `parts`, from the top; at least one is there. With A and scale in common it has their rank, else a
/// block along the diagonal of B for each.
pub fn join(parts: &[Option<&Factors>]) -> Result<Factors> {
    let there: Vec<&Factors> = parts.iter().flatten().copied().collect();
    let Some(first) = there.first() else {
        return Err(crate::Error::Invalid {
            what: "a layer that is joined of none".into(),
            hint: None,
        });
    };
    let alike = there.iter().all(|part| part.scale == first.scale);
    if alike && there.len() == parts.len() {
        let mut shared = true;
        for part in &there {
            shared = shared && values(&part.a)? == values(&first.a)?;
        }
        if shared {
            let b: Vec<&Tensor> = there.iter().map(|part| &part.b).collect();
            return Ok(Factors {
                a: first.a.clone(),
                b: Tensor::cat(&b, 0)?,
                scale: first.scale,
            });
        }
    }
    let inputs = first.a.dim(1)?;
    let ranks = there.iter().map(|part| part.a.dims()[0]);
    let rank = ranks.max().unwrap_or(0);
    let zeros =
        |rows: usize, columns: usize| Tensor::zeros((rows, columns), DType::F32, &Device::Cpu);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for (i, part) in parts.iter().enumerate() {
        // Queries, keys and values have as many rows as inputs; an MLP of FLUX.1 has four times as many.
        let missing = if i < 3 { inputs } else { 4 * inputs };
        let rows = part.map_or(missing, |part| part.b.dims()[0]);
        let own = part.map_or(0, |part| part.a.dims()[0]);
        if let Some(part) = part {
            a.push(part.a.clone());
        }
        a.push(zeros(rank - own, inputs)?);
        let mut across = vec![zeros(rows, i * rank)?];
        if let Some(part) = part {
            across.push(match alike {
                true => part.b.clone(),
                false => (&part.b * part.scale)?,
            });
        }
        across.push(zeros(rows, (parts.len() - i) * rank - own)?);
        b.push(Tensor::cat(&filled(across), 1)?);
    }
    Ok(Factors {
        a: Tensor::cat(&filled(a), 0)?,
        b: Tensor::cat(&b, 0)?,
        scale: if alike { first.scale } else { 1.0 },
    })
}

/// Those that have any values.
fn filled(tensors: Vec<Tensor>) -> Vec<Tensor> {
    let filled = tensors.into_iter().filter(|t| t.elem_count() > 0);
    filled.collect()
}

fn values(tensor: &Tensor) -> Result<(Vec<usize>, Vec<f32>)> {
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    Ok((tensor.dims().to_vec(), values))
}

/// Whether the authors of SD3 and FLUX.1 have the rows of diffusers' layer at `path` the other way round: the last
/// modulation, and that of SD3's last context, whose shift comes first with them and whose scale with diffusers.
pub fn is_turned(path: &str, factors: &Factors) -> bool {
    let (inputs, rows) = (factors.a.dims().get(1), factors.b.dims().first());
    let two = inputs
        .zip(rows)
        .is_some_and(|(inputs, rows)| *rows == 2 * inputs);
    two && (path == "norm_out.linear" || path.ends_with(".norm1_context.linear"))
}

/// The factors of a layer whose upper and lower rows have changed places.
pub fn halves_exchanged(factors: &Factors) -> Result<Factors> {
    let rows = factors.b.dim(0)?;
    let upper = factors.b.narrow(0, 0, rows / 2)?;
    let lower = factors.b.narrow(0, rows / 2, rows - rows / 2)?;
    Ok(Factors {
        b: Tensor::cat(&[lower, upper], 0)?,
        ..factors.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Factors of a layer (`rows`, 4) of this rank with numbers that depend on `from`.
    fn factors(from: f32, rank: usize, rows: usize, scale: f64) -> Factors {
        let numbers = |shape: (usize, usize), from: f32| {
            let count = (shape.0 * shape.1) as f32;
            let numbers = Tensor::arange(from, from + count, &Device::Cpu).unwrap();
            numbers.reshape(shape).unwrap()
        };
        Factors {
            a: numbers((rank, 4), from),
            b: numbers((rows, rank), from + 0.5),
            scale,
        }
    }

    fn change(factors: &Factors) -> (Vec<usize>, Vec<f32>) {
        let product = factors.b.matmul(&factors.a).unwrap();
        values(&(product * factors.scale).unwrap()).unwrap()
    }

    fn of(part: &Option<Factors>) -> Option<(Vec<usize>, Vec<f32>)> {
        part.as_ref().map(change)
    }

    #[test]
    fn layers_of_their_own_ranks_and_scales_are_joined_and_cut_without_loss() {
        let layers = [
            factors(1.0, 2, 4, 0.5),
            factors(3.0, 3, 4, 0.5),
            factors(7.0, 2, 4, 0.25),
            factors(9.0, 1, 9, 0.5),
        ];
        for (present, count) in [
            ([true; 4], 3),
            ([true; 4], 4),
            ([true, false, true, false], 3),
        ] {
            let parts: Vec<Option<&Factors>> = layers
                .iter()
                .zip(present)
                .take(count)
                .map(|(layer, present)| present.then_some(layer))
                .collect();
            let joined = join(&parts).unwrap();
            assert_eq!(joined.a.dims()[0], count * if present[1] { 3 } else { 2 });
            let cut = split(&joined, count).unwrap().unwrap();
            for (part, cut) in parts.iter().zip(&cut) {
                assert_eq!(part.map(change), of(cut));
            }
        }
    }

    #[test]
    fn a_common_a_stays_one_and_is_everyones() {
        let one = factors(1.0, 2, 4, 0.5);
        let other = Factors {
            b: factors(5.0, 2, 4, 1.0).b,
            ..one.clone()
        };
        let joined = join(&[Some(&one), Some(&other), Some(&one)]).unwrap();
        assert_eq!(joined.a.dims(), [2, 4]);
        let cut = split(&joined, 3).unwrap().unwrap();
        let cut: Vec<_> = cut.iter().map(of).collect();
        assert_eq!(cut, [&one, &other, &one].map(|part| Some(change(part))));
    }

    #[test]
    fn other_shapes_are_not_cut() {
        assert!(split(&factors(1.0, 2, 13, 1.0), 3).unwrap().is_none());
        assert!(split(&factors(1.0, 2, 12, 1.0), 4).unwrap().is_none());
    }
}
