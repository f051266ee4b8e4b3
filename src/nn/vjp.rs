//! Operations that bring their own backward pass: a result computed elsewhere joins candle's graph together with a
//! closure that maps the result's gradient to those of the tracked inputs.

use std::sync::{Mutex, PoisonError};

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Device, Layout, Result, Shape, Tensor,
};

/// Gives one gradient per tracked input, in the order in which they were passed to [`record`].
type Backward = Box<dyn Fn(&Tensor, &Tensor) -> Result<Vec<Tensor>> + Send + Sync>;

struct Recorded {
    value: Mutex<Option<Vec<f32>>>,
    shape: Shape,
    backward: Backward,
}

impl Recorded {
    fn take(&self) -> Result<(CpuStorage, Shape)> {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        match value.take() {
            Some(value) => Ok((CpuStorage::F32(value), self.shape.clone())),
            None => candle_core::bail!("the result of a fused operation was taken twice"),
        }
    }

    fn gradients(&self, result: &Tensor, gradient: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let mut gradients = (self.backward)(result, &gradient.contiguous()?)?.into_iter();
        Ok([gradients.next(), gradients.next(), gradients.next()])
    }
}

impl CustomOp1 for Recorded {
    fn name(&self) -> &'static str {
        "fused"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take()
    }

    fn bwd(&self, _: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let [one, _, _] = self.gradients(result, gradient)?;
        Ok(one)
    }
}

impl CustomOp2 for Recorded {
    fn name(&self) -> &'static str {
        "fused"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [one, two, _] = self.gradients(result, gradient)?;
        Ok((one, two))
    }
}

impl CustomOp3 for Recorded {
    fn name(&self) -> &'static str {
        "fused"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [one, two, three] = self.gradients(result, gradient)?;
        Ok((one, two, three))
    }
}

/// The most inputs of one operation that can be tracked.
pub(super) const MOST_TRACKED: usize = 3;

/// The tensor of `shape` with these values, recorded as a function of those `inputs` that are tracked, at most
/// [`MOST_TRACKED`] of them. `backward(result, gradient)` returns their gradients (contiguous or not, of the inputs'
/// shapes) in the same order, leaving out inputs that are not tracked. With no tracked input there is no graph and
/// `backward` is dropped.
pub(super) fn record(
    inputs: &[&Tensor],
    value: Vec<f32>,
    shape: impl Into<Shape>,
    backward: impl Fn(&Tensor, &Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let shape = shape.into();
    let tracked: Vec<&Tensor> = inputs.iter().copied().filter(|t| t.track_op()).collect();
    if tracked.is_empty() {
        return Tensor::from_vec(value, shape, &Device::Cpu);
    }
    let recorded = Recorded {
        value: Mutex::new(Some(value)),
        shape,
        backward: Box::new(backward),
    };
    match tracked.as_slice() {
        [one] => one.apply_op1(recorded),
        [one, two] => one.apply_op2(two, recorded),
        [one, two, three] => one.apply_op3(two, three, recorded),
        more => candle_core::bail!("{} tracked inputs in one fused operation", more.len()),
    }
}
