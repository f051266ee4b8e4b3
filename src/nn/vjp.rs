//! Operations that bring their own backward pass: a result computed elsewhere joins candle's graph together with a
//! closure that maps the result's gradient to those of the tracked inputs.
//!
//! candle's backward pass starts every gradient as a tensor of zeros and adds to it. Between the operations of this
//! module gradients therefore go another way: each result has a [`Slot`] in which they gather without a copy, and the
//! graph has a scalar, its *signal*, in the result's place, so that candle only says when. A result is also a tensor of
//! candle's graph like any other: whatever of candle's own takes it finds the usual way to the same slot.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape,
    Tensor, TensorId,
};

use super::recompute::collect_variable;
use super::slot::{Place, Slot};
use super::{cpu, cuda};

/// Gives one gradient per tracked input, in the order in which they were passed.
type Backward = Box<dyn Fn(&Tensor) -> Result<Vec<Tensor>> + Send + Sync>;

/// The most inputs of one operation that can be tracked.
pub(super) const MOST_TRACKED: usize = GROUP * GROUP;

/// The most inputs of candle's custom operations.
const GROUP: usize = 3;

/// The values of a result, one after the other.
pub(super) enum Value {
    Cpu(Vec<f32>),
    Card(CudaStorage),
}

impl From<Vec<f32>> for Value {
    fn from(values: Vec<f32>) -> Self {
        Value::Cpu(values)
    }
}

impl From<CudaStorage> for Value {
    fn from(values: CudaStorage) -> Self {
        Value::Card(values)
    }
}

/// The tensor of `shape` with these values, recorded as a function of those `inputs` that are tracked, at most
/// [`MOST_TRACKED`] of them. `backward(gradient)` takes the result's gradient, contiguous, and returns theirs (contiguous
/// or not, of the inputs' shapes) in the same order, leaving out inputs that are not tracked. With no tracked input
/// there is no graph and `backward` is dropped.
pub(super) fn record(
    inputs: &[&Tensor],
    value: impl Into<Value>,
    shape: impl Into<Shape>,
    backward: impl Fn(&Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let (value, shape) = (value.into(), shape.into());
    let tracked: Vec<&Tensor> = inputs.iter().copied().filter(|t| t.track_op()).collect();
    if tracked.is_empty() {
        return match value {
            Value::Cpu(value) => Tensor::from_vec(value, shape, &Device::Cpu),
            Value::Card(value) => Ok(cuda::tensor_of(value, shape)),
        };
    }
    let node = Node::new(&tracked, &shape, Box::new(backward))?;
    let recorded = Op(Recorded {
        value: Mutex::new(Some(value)),
        shape,
        node: node.clone(),
    });
    let result = node.signal.apply_op1(recorded)?;
    Node::register(&node, &result, Place::Whole);
    Ok(result)
}

/// [`record`] with a backward pass that also takes the result.
pub(super) fn record_with_result(
    inputs: &[&Tensor],
    value: impl Into<Value>,
    shape: impl Into<Shape>,
    backward: impl Fn(&Tensor, &Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let kept = Arc::new(OnceLock::<Tensor>::new());
    let result = kept.clone();
    let recorded = record(inputs, value, shape, move |gradient| match result.get() {
        Some(result) => backward(result, gradient),
        None => candle_core::bail!("a fused operation lost its result"),
    })?;
    let _ = kept.set(recorded.detach());
    Ok(recorded)
}

/// `value`, which is not tracked, as a function of the tracked `inputs`, at least one of them: on any device and in any
/// type. `backward` as in [`record`].
pub(super) fn attach(
    value: &Tensor,
    inputs: &[&Tensor],
    backward: impl Fn(&Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let node = Node::new(inputs, value.shape(), Box::new(backward))?;
    let result = value.apply_op2(&node.signal, Op(Attached { node: node.clone() }))?;
    Node::register(&node, &result, Place::Whole);
    Ok(result)
}

/// A scalar whose backward pass gives `output` this gradient.
pub(super) fn pull(output: &Tensor, gradient: Tensor) -> Result<Tensor> {
    let backward = Box::new(move |_: &Tensor| Ok(vec![gradient.clone()]));
    connect(&[output], None, backward)
}

/// Says that `view` shows a part of `whole`: what our operations find as its gradient goes straight to that part. `view`
/// must be made of `whole` by candle's own operations, which remain the way for everybody else. Nothing happens where
/// `whole` is not the result of one of our operations.
pub(super) fn show(whole: &Tensor, view: &Tensor, place: Place) {
    if !cpu::takes([whole]) && !cuda::takes([whole]) {
        return;
    }
    let node = match registry().get(&whole.id()) {
        Some((node, Place::Whole)) => node.upgrade(),
        _ => None,
    };
    if let Some(node) = node {
        Node::register(&node, view, place);
    }
}

/// The result of an operation, as a place that gradients are brought to.
struct Node {
    /// The scalar that stands in candle's graph for the result.
    signal: Tensor,
    slot: Arc<Slot>,
    /// The tensors that are known by this node: the result and views of it.
    known: Mutex<Vec<TensorId>>,
}

type Registry = HashMap<TensorId, (Weak<Node>, Place)>;

/// The nodes of all results that are alive, and of views of them.
fn registry() -> MutexGuard<'static, Registry> {
    static REGISTRY: LazyLock<Mutex<Registry>> = LazyLock::new(Mutex::default);
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    fn new(inputs: &[&Tensor], shape: &Shape, backward: Backward) -> Result<Arc<Self>> {
        let slot = Arc::new(Slot::new(shape));
        Ok(Arc::new(Self {
            signal: connect(inputs, Some(slot.clone()), backward)?,
            slot,
            known: Mutex::default(),
        }))
    }

    fn register(node: &Arc<Self>, tensor: &Tensor, place: Place) {
        let mut known = node.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.push(tensor.id());
        registry().insert(tensor.id(), (Arc::downgrade(node), place));
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let known = self.known.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut registry = registry();
        for id in known {
            registry.remove(id);
        }
    }
}

/// How the gradient of an input leaves an operation.
enum Route {
    /// To the slot of the operation that the input came from; candle gets the signal.
    Slot(Arc<Slot>, Place),
    /// As candle's: the input came from an operation of candle's own.
    Candle,
    /// To those who collect the gradients of variables, if anybody does; else as candle's.
    Variable(TensorId),
}

/// A scalar that depends on `inputs`. When its gradient comes, `backward` gets what `slot` holds (the scalar's gradient
/// if there is none), and what it returns goes its ways.
fn connect(inputs: &[&Tensor], slot: Option<Arc<Slot>>, backward: Backward) -> Result<Tensor> {
    let (mut edges, mut routes) = (Vec::new(), Vec::new());
    for &input in inputs {
        let node = registry().get(&input.id()).cloned();
        let node = node.and_then(|(node, place)| Some((node.upgrade()?, place)));
        match node {
            Some((node, place)) => {
                routes.push(Route::Slot(node.slot.clone(), place));
                edges.push(node.signal.clone());
            }
            None => {
                routes.push(match input.is_variable() {
                    true => Route::Variable(input.id()),
                    false => Route::Candle,
                });
                edges.push(input.clone());
            }
        }
    }
    let Some(device) = inputs.first().map(|input| input.device().clone()) else {
        candle_core::bail!("an operation without tracked inputs");
    };
    let gate = |stash| {
        Op(Gate {
            slot,
            backward,
            routes,
            device,
            stash,
        })
    };
    match edges.as_slice() {
        [one] => one.apply_op1(gate(None)),
        [one, two] => one.apply_op2(two, gate(None)),
        [one, two, three] => one.apply_op3(two, three, gate(None)),
        more => {
            let stash = Arc::new(Stash(Mutex::default()));
            let joints = more
                .chunks(GROUP)
                .enumerate()
                .map(|(i, group)| join(group, stash.clone(), i * GROUP))
                .collect::<Result<Vec<_>>>()?;
            match joints.as_slice() {
                [one, two] => one.apply_op2(two, gate(Some(stash))),
                [one, two, three] => one.apply_op3(two, three, gate(Some(stash))),
                _ => candle_core::bail!("{} tracked inputs in one operation", more.len()),
            }
        }
    }
}

/// The gradient of a signal. On a card signals have no elements: candle then adds them up without memory or a launch.
fn signal(device: &Device) -> Result<Tensor> {
    match device.is_cuda() {
        true => Tensor::zeros(0, DType::F32, device),
        false => Tensor::zeros((), DType::F32, device),
    }
}

/// An operation of one to three inputs with a backward pass of its own. candle asks for the same things once for each
/// number of inputs; [`Op`] answers.
trait Fused: Send + Sync {
    const NAME: &'static str;

    /// The result on the CPU; `first` is the first input.
    fn cpu(&self, first: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)>;

    /// The result on a card.
    fn cuda(&self, first: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)>;

    /// The gradients of the inputs, as many as there are.
    fn backward(&self, gradient: &Tensor) -> Result<[Option<Tensor>; GROUP]>;
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

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let [one, _, _] = self.0.backward(gradient)?;
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

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [one, two, _] = self.0.backward(gradient)?;
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
        &self, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor, gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [one, two, three] = self.0.backward(gradient)?;
        Ok((one, two, three))
    }
}

/// A scalar zero, the value of what only says when.
fn nothing_on_cpu() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.0]), Shape::from(()))
}

/// See [`signal`]; a scalar where the backward pass starts from it.
fn nothing_on_cuda(like: &CudaStorage, is_end: bool) -> Result<(CudaStorage, Shape)> {
    let shape = if is_end {
        Shape::from(())
    } else {
        Shape::from(0)
    };
    Ok((like.device().zeros_impl(&shape, DType::F32)?, shape))
}

/// The signal of an operation.
struct Gate {
    slot: Option<Arc<Slot>>,
    backward: Backward,
    routes: Vec<Route>,
    device: Device,
    /// What more than [`GROUP`] inputs get.
    stash: Option<Arc<Stash>>,
}

impl Gate {
    /// What candle is to add to the gradient of each input, or of the signal that stands for it.
    fn send(&self, gradient: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let gradients = match &self.slot {
            Some(slot) => (self.backward)(&slot.take()?)?,
            None => (self.backward)(gradient)?,
        };
        if gradients.len() != self.routes.len() {
            candle_core::bail!(
                "{} gradients for {} inputs",
                gradients.len(),
                self.routes.len()
            );
        }
        gradients
            .into_iter()
            .zip(&self.routes)
            .map(|(gradient, route)| match route {
                Route::Slot(slot, place) => {
                    slot.add(&gradient, *place)?;
                    Ok(Some(signal(&self.device)?))
                }
                Route::Variable(id) => collect_variable(*id, gradient),
                Route::Candle => Ok(Some(gradient)),
            })
            .collect()
    }
}

impl Fused for Gate {
    const NAME: &'static str = "fused";

    fn cpu(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(nothing_on_cpu())
    }

    fn cuda(&self, first: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        nothing_on_cuda(first, self.slot.is_none())
    }

    fn backward(&self, gradient: &Tensor) -> Result<[Option<Tensor>; GROUP]> {
        let sent = self.send(gradient)?;
        let Some(stash) = &self.stash else {
            let mut sent = sent.into_iter();
            let mut next = || sent.next().flatten();
            return Ok([next(), next(), next()]);
        };
        *stash.lock() = sent;
        let signal = signal(&self.device)?;
        Ok([Some(signal.clone()), Some(signal.clone()), Some(signal)])
    }
}

/// Gradients on their way from an operation with many inputs to these.
struct Stash(Mutex<Vec<Option<Tensor>>>);

impl Stash {
    fn lock(&self) -> MutexGuard<'_, Vec<Option<Tensor>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A scalar that depends on up to three tensors: what it passes back to them lies in the stash, from `first` on, and
/// its own gradient is only a signal. So an operation can have more inputs than candle's custom operations.
struct Joint {
    stash: Arc<Stash>,
    first: usize,
}

fn join(tensors: &[Tensor], stash: Arc<Stash>, first: usize) -> Result<Tensor> {
    let joint = Op(Joint { stash, first });
    match tensors {
        [one] => one.apply_op1(joint),
        [one, two] => one.apply_op2(two, joint),
        [one, two, three] => one.apply_op3(two, three, joint),
        _ => candle_core::bail!("{} tensors in one joint", tensors.len()),
    }
}

impl Fused for Joint {
    const NAME: &'static str = "joint";

    fn cpu(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(nothing_on_cpu())
    }

    fn cuda(&self, first: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        nothing_on_cuda(first, false)
    }

    fn backward(&self, _: &Tensor) -> Result<[Option<Tensor>; GROUP]> {
        let mut stash = self.stash.lock();
        let mut take = |i: usize| stash.get_mut(self.first + i).and_then(Option::take);
        Ok([take(0), take(1), take(2)])
    }
}

/// A result that was computed before candle asks for it, in place of its signal.
struct Recorded {
    value: Mutex<Option<Value>>,
    shape: Shape,
    node: Arc<Node>,
}

impl Recorded {
    fn take(&self) -> Result<Value> {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        match value.take() {
            Some(value) => Ok(value),
            None => candle_core::bail!("the result of a fused operation was taken twice"),
        }
    }
}

impl Fused for Recorded {
    const NAME: &'static str = "result";

    fn cpu(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            Value::Cpu(value) => Ok((CpuStorage::F32(value), self.shape.clone())),
            Value::Card(_) => {
                candle_core::bail!("a fused operation of a card was given a tensor on the CPU")
            }
        }
    }

    fn cuda(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            Value::Card(value) => Ok((value, self.shape.clone())),
            Value::Cpu(_) => {
                candle_core::bail!("a fused operation of the CPU was given a tensor on a card")
            }
        }
    }

    fn backward(&self, gradient: &Tensor) -> Result<[Option<Tensor>; GROUP]> {
        self.node.slot.add(gradient, Place::Whole)?;
        Ok([Some(signal(gradient.device())?), None, None])
    }
}

/// The first argument's values as the result; the second is the signal.
struct Attached {
    node: Arc<Node>,
}

impl Fused for Attached {
    const NAME: &'static str = "attached";

    fn cpu(&self, first: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((whole(first, layout)?, layout.shape().clone()))
    }

    fn cuda(&self, first: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((whole(first, layout)?, layout.shape().clone()))
    }

    fn backward(&self, gradient: &Tensor) -> Result<[Option<Tensor>; GROUP]> {
        self.node.slot.add(gradient, Place::Whole)?;
        Ok([None, Some(signal(gradient.device())?), None])
    }
}

/// A copy of a storage that holds one contiguous tensor and nothing else.
fn whole<S: BackendStorage>(storage: &S, layout: &Layout) -> Result<S> {
    if !layout.is_contiguous() || layout.start_offset() != 0 {
        candle_core::bail!("the value of a recomputed block is part of another tensor");
    }
    storage.try_clone(layout)
}
