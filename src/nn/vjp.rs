//! Operations that bring their own backward pass: a result computed elsewhere joins candle's graph together with a
//! closure that maps the result's gradient to those of the tracked inputs.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape,
    Tensor,
};

/// Gives one gradient per tracked input, in the order in which they were passed to [`record`].
type Backward = Box<dyn Fn(&Tensor, &Tensor) -> Result<Vec<Tensor>> + Send + Sync>;

/// An operation of one to three inputs with a backward pass of its own. candle asks for the same things once for each
/// number of inputs; [`Op`] answers.
trait Fused: Send + Sync {
    const NAME: &'static str;

    /// The result on the CPU; `first` is the first input.
    fn cpu(&self, first: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)>;

    /// The result on a card.
    fn cuda(&self, first: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)>;

    /// The gradients of the inputs, as many as there are.
    fn backward(&self, result: &Tensor, gradient: &Tensor) -> Result<[Option<Tensor>; GROUP]>;
}

struct Op<F>(F);

impl<F: Fused> CustomOp1 for Op<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout) -> Result<(CpuStorage, Shape)> {
        self.0.cpu(a, la)
    }

    fn cuda_fwd(&self, a: &CudaStorage, la: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.cuda(a, la)
    }

    fn bwd(&self, _: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let [one, _, _] = self.0.backward(result, gradient)?;
        Ok(one)
    }
}

#[rustfmt::skip]
impl<F: Fused> CustomOp2 for Op<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.0.cpu(a, la)
    }

    fn cuda_fwd(&self, a: &CudaStorage, la: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.cuda(a, la)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [one, two, _] = self.0.backward(result, gradient)?;
        Ok((one, two))
    }
}

#[rustfmt::skip]
impl<F: Fused> CustomOp3 for Op<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(
        &self, a: &CpuStorage, la: &Layout, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.cpu(a, la)
    }

    fn cuda_fwd(
        &self, a: &CudaStorage, la: &Layout, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.0.cuda(a, la)
    }

    fn bwd(
        &self, _: &Tensor, _: &Tensor, _: &Tensor, result: &Tensor, gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [one, two, three] = self.0.backward(result, gradient)?;
        Ok((one, two, three))
    }
}

/// A result that was computed before candle asks for it.
struct Recorded {
    value: Mutex<Option<Vec<f32>>>,
    shape: Shape,
    backward: Backward,
}

impl Fused for Recorded {
    const NAME: &'static str = "fused";

    fn cpu(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        match value.take() {
            Some(value) => Ok((CpuStorage::F32(value), self.shape.clone())),
            None => candle_core::bail!("the result of a fused operation was taken twice"),
        }
    }

    fn cuda(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        candle_core::bail!("a fused operation of the CPU was given a tensor on a card")
    }

    fn backward(&self, result: &Tensor, gradient: &Tensor) -> Result<[Option<Tensor>; GROUP]> {
        let mut gradients = (self.backward)(result, &gradient.contiguous()?)?.into_iter();
        Ok([gradients.next(), gradients.next(), gradients.next()])
    }
}

/// The most inputs of one operation that can be tracked.
pub(super) const MOST_TRACKED: usize = GROUP * GROUP;

/// The most inputs of candle's custom operations.
const GROUP: usize = 3;

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
    let recorded = |backward| {
        Op(Recorded {
            value: Mutex::new(Some(value)),
            shape,
            backward,
        })
    };
    match tracked.as_slice() {
        [one] => one.apply_op1(recorded(Box::new(backward))),
        [one, two] => one.apply_op2(two, recorded(Box::new(backward))),
        [one, two, three] => one.apply_op3(two, three, recorded(Box::new(backward))),
        more => {
            let (joints, stash) = join_all(more)?;
            let signals = joints.len();
            let backward: Backward = Box::new(move |result, gradient| {
                stash.fill(backward(result, gradient)?);
                (0..signals).map(|_| signal(&Device::Cpu)).collect()
            });
            let recorded = recorded(backward);
            match joints.as_slice() {
                [one, two] => one.apply_op2(two, recorded),
                [one, two, three] => one.apply_op3(two, three, recorded),
                _ => candle_core::bail!("{} tracked inputs in one operation", more.len()),
            }
        }
    }
}

/// `value`, which is not tracked, as a function of the tracked `inputs`, at least one of them: on any device and in any
/// type. `backward` as in [`record`].
pub(super) fn attach(
    value: &Tensor,
    inputs: &[&Tensor],
    backward: impl Fn(&Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let (joints, stash) = join_all(inputs)?;
    let device = value.device().clone();
    let attached = Op(Attached {
        backward: Box::new(move |_, gradient| {
            stash.fill(backward(gradient)?);
            Ok(Vec::new())
        }),
        device,
    });
    match joints.as_slice() {
        [one] => value.apply_op2(one, attached),
        [one, two] => value.apply_op3(one, two, attached),
        _ => candle_core::bail!("{} tracked inputs in one operation", inputs.len()),
    }
}

/// A scalar whose backward pass gives `output` this gradient.
pub(super) fn pull(output: &Tensor, gradient: Tensor) -> Result<Tensor> {
    let stash = Arc::new(Stash(Mutex::new(vec![Some(gradient)])));
    join(&[output], stash, 0)
}

/// Gradients on their way from an operation with many inputs to these.
struct Stash(Mutex<Vec<Option<Tensor>>>);

impl Stash {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Option<Tensor>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self, gradients: Vec<Tensor>) {
        *self.lock() = gradients.into_iter().map(Some).collect();
    }
}

/// A scalar that depends on up to three tensors: what it passes back to them lies in the stash, from `first` on, and
/// its own gradient is only a signal. So an operation can have more inputs than candle's custom operations.
struct Joint {
    stash: Arc<Stash>,
    first: usize,
}

fn join(tensors: &[&Tensor], stash: Arc<Stash>, first: usize) -> Result<Tensor> {
    let joint = Op(Joint { stash, first });
    match tensors {
        [one] => one.apply_op1(joint),
        [one, two] => one.apply_op2(two, joint),
        [one, two, three] => one.apply_op3(two, three, joint),
        _ => candle_core::bail!("{} tensors in one joint", tensors.len()),
    }
}

fn join_all(tensors: &[&Tensor]) -> Result<(Vec<Tensor>, Arc<Stash>)> {
    let stash = Arc::new(Stash(Mutex::default()));
    let joints = tensors
        .chunks(GROUP)
        .enumerate()
        .map(|(i, group)| join(group, stash.clone(), i * GROUP))
        .collect::<Result<_>>()?;
    Ok((joints, stash))
}

fn signal(device: &Device) -> Result<Tensor> {
    Tensor::zeros((), DType::F32, device)
}

impl Fused for Joint {
    const NAME: &'static str = "joint";

    fn cpu(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda(&self, first: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let shape = Shape::from(());
        let zero = first.device().zeros_impl(&shape, DType::F32)?;
        Ok((zero, shape))
    }

    fn backward(&self, _: &Tensor, _: &Tensor) -> Result<[Option<Tensor>; GROUP]> {
        let mut stash = self.stash.lock();
        let mut take = |i: usize| stash.get_mut(self.first + i).and_then(Option::take);
        Ok([take(0), take(1), take(2)])
    }
}

/// The first argument's values; its gradient goes to the joints that are the other arguments.
struct Attached {
    backward: Backward,
    device: Device,
}

impl Fused for Attached {
    const NAME: &'static str = "attached";

    fn cpu(&self, first: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((whole(first, layout)?, layout.shape().clone()))
    }

    fn cuda(&self, first: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((whole(first, layout)?, layout.shape().clone()))
    }

    fn backward(&self, result: &Tensor, gradient: &Tensor) -> Result<[Option<Tensor>; GROUP]> {
        (self.backward)(result, gradient)?;
        let signal = signal(&self.device)?;
        Ok([None, Some(signal.clone()), Some(signal)])
    }
}

/// A copy of a storage that holds one contiguous tensor and nothing else.
fn whole<S: BackendStorage>(storage: &S, layout: &Layout) -> Result<S> {
    if !layout.is_contiguous() || layout.start_offset() != 0 {
        candle_core::bail!("the value of a recomputed block is part of another tensor");
    }
    storage.try_clone(layout)
}
