//! What the parity tests share: reading the cases of `tests/golden` and comparing with them.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use proxytune::nn::Weights;

pub const CPU: Device = Device::Cpu;

/// Largest relative L2 difference of outputs and of gradients.
pub const OUTPUT: f64 = 1e-4;
pub const GRADIENT: f64 = 1e-3;

pub type Tensors = HashMap<String, Tensor>;

pub fn case(component: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(component)
        .join(name)
}

pub fn load(path: PathBuf) -> Tensors {
    candle_core::safetensors::load(&path, &CPU).unwrap_or_else(|e| panic!("{path:?}: {e}"))
}

pub fn config<T: serde::de::DeserializeOwned>(case: &Path) -> T {
    let text = std::fs::read_to_string(case.join("model/config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

pub fn frozen(case: &Path) -> Weights {
    Weights::from_files(&[case.join("model/model.safetensors")], DType::F32, &CPU).unwrap()
}

pub fn trainable(case: &Path) -> Weights {
    Weights::trainable(&[case.join("model/model.safetensors")], 0, &CPU).unwrap()
}

pub fn ids(tensors: &Tensors, name: &str) -> Tensor {
    tensors[name].to_dtype(DType::U32).unwrap()
}

pub fn values(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    x.to_vec1().unwrap()
}

/// |ours − theirs| / |theirs|, which is at least 1e-30.
pub fn difference(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.dims(), theirs.dims());
    let (ours, theirs) = (values(ours), values(theirs));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let apart = norm(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b));
    apart / norm(&mut theirs.iter().copied()).max(1e-30)
}

pub fn assert_close(what: &str, ours: &Tensor, theirs: &Tensor) {
    let apart = difference(ours, theirs);
    assert!(apart < OUTPUT, "{what} differs by {apart:.1e}");
}

/// Every `grad.NAME` of the reference has a gradient of ours next to it, and every variable that gets none here gets
/// none there. Gradients below a millionth of the largest are compared with that.
pub fn assert_gradients(variables: &[(String, Var)], loss: &Tensor, reference: &Tensors) {
    let gradients = loss.backward().unwrap();
    let theirs: BTreeMap<&str, &Tensor> = reference
        .iter()
        .filter_map(|(key, tensor)| Some((key.strip_prefix("grad.")?, tensor)))
        .collect();
    let largest = theirs
        .values()
        .flat_map(|gradient| values(gradient))
        .fold(0f64, |largest, x| largest.max(x.abs()));
    let mut compared = 0;
    for (name, variable) in variables {
        let ours = gradients.get(variable.as_tensor());
        let key = name.as_str();
        let Some(theirs) = theirs
            .get(key)
            .or_else(|| theirs.get(format!("base_model.model.{key}").as_str()))
        else {
            assert!(
                ours.is_none_or(|g| values(g).iter().all(|x| x.abs() < 1e-6 * largest)),
                "{name}"
            );
            continue;
        };
        compared += 1;
        if values(theirs).iter().all(|x| x.abs() < 1e-6 * largest) {
            let is_small = |g: &Tensor| values(g).iter().all(|x| x.abs() < 1e-5 * largest);
            assert!(
                ours.is_none_or(is_small),
                "the gradient of {name} is not about 0"
            );
            continue;
        }
        let ours = ours.unwrap_or_else(|| panic!("{name} has no gradient"));
        let apart = difference(ours, theirs);
        assert!(
            apart < GRADIENT,
            "the gradient of {name} differs by {apart:.1e}"
        );
    }
    assert_eq!(compared, theirs.len(), "gradients without a variable");
}

pub fn dot(output: &Tensor, cotangent: &Tensor) -> Tensor {
    (output * cotangent).unwrap().sum_all().unwrap()
}
