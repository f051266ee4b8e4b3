//! A sum over many rows is differentiated slice by slice, with the value and the gradients of the whole.

use candle_core::{DType, Device, Tensor, Var};
use proxytune::nn::sum_over_rows;

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn slices_give_the_sum_and_the_gradients_of_the_whole() {
    let device = Device::Cpu;
    let random = |shape: &[usize]| Var::randn(0f32, 1f32, shape, &device).unwrap();
    let (x, a, b, c) = (random(&[7, 3]), random(&[3]), random(&[3]), random(&[3]));
    let run = |at_once: usize, parameters: &[&Tensor]| {
        let input = (x.as_tensor() * 2.0).unwrap();
        let body = |x: &Tensor, _| {
            let y = parameters
                .iter()
                .try_fold(x.sqr()?, |y, p| y.broadcast_mul(p))?;
            Ok(y.sum_all()?)
        };
        let sum = (sum_over_rows(&input, parameters, at_once, body).unwrap() * 3.0).unwrap();
        let gradients = sum.backward().unwrap();
        let mut all = vec![sum.to_scalar::<f32>().unwrap()];
        for v in std::iter::once(x.as_tensor()).chain(parameters.iter().copied()) {
            all.extend(values(gradients.get(v).unwrap()));
        }
        all
    };
    let two: [&Tensor; 2] = [&a, &b];
    let three: [&Tensor; 3] = [&a, &b, &c];
    for parameters in [&two[..], &three[..]] {
        let whole = run(7, parameters);
        for at_once in [1, 3, 100] {
            for (one, other) in run(at_once, parameters).iter().zip(&whole) {
                assert!(
                    (one - other).abs() < 1e-4 * (1.0 + other.abs()),
                    "{at_once}"
                );
            }
        }
    }
    let body = |x: &Tensor, _| {
        Ok(x.detach()
            .broadcast_mul(&proxytune::nn::parameter(&a))?
            .sum_all()?)
    };
    let quiet = proxytune::nn::no_grad(|| sum_over_rows(&x, &[&a], 2, body).unwrap());
    assert!(!quiet.track_op());
    let none = x.as_tensor().detach();
    assert!(sum_over_rows(&none, &[], 2, |x, _| Ok(x.sum_all()?)).is_ok());
    let empty = none.narrow(0, 0, 0).unwrap();
    assert!(sum_over_rows(&empty, &[], 2, |x, _| Ok(x.sum_all()?)).is_err());
}

#[test]
fn each_slice_is_told_its_first_row() {
    let x = Var::zeros((5, 1), DType::F32, &Device::Cpu).unwrap();
    let targets = Tensor::new(&[1f32, 2.0, 3.0, 4.0, 5.0], &Device::Cpu).unwrap();
    let sum = sum_over_rows(x.as_tensor(), &[], 2, |x, first| {
        let targets = targets.narrow(0, first, x.dim(0)?)?.unsqueeze(1)?;
        Ok((x - targets)?.sqr()?.sum_all()?)
    })
    .unwrap();
    assert_eq!(sum.to_scalar::<f32>().unwrap(), 55.0);
    let gradients = sum.backward().unwrap();
    let gradient = values(gradients.get(x.as_tensor()).unwrap());
    assert_eq!(gradient, [-2.0, -4.0, -6.0, -8.0, -10.0]);
}
