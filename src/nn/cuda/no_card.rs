//! What stands for a card where the program is built without support for one: no tensor is on it.

use std::marker::PhantomData;

use candle_core::{CudaStorage, DType, Device, Result, Shape, Tensor};

use super::{Arg, Grid, Product};

/// See `card.rs`. There is none.
#[derive(Clone, Copy)]
pub struct Card<'a>(PhantomData<&'a Device>);

/// See `card.rs`. There is none.
pub struct Buffer(CudaStorage, DType);

const ABSENT: &str = "this program was built without support for cards";

impl Buffer {
    pub fn at(&self) -> u64 {
        0
    }

    pub fn count(&self) -> usize {
        0
    }

    pub fn dtype(&self) -> DType {
        self.1
    }

    pub fn into_storage(self) -> CudaStorage {
        self.0
    }

    pub fn tensor(self, shape: impl Into<Shape>) -> Tensor {
        tensor_of(self.0, shape.into())
    }
}

pub fn tensor_of(storage: CudaStorage, shape: Shape) -> Tensor {
    use candle_core::op::BackpropOp;
    let storage = candle_core::Storage::Cuda(storage);
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

pub fn at(_: &Tensor) -> Result<u64> {
    candle_core::bail!("{ABSENT}")
}

impl<'a> Card<'a> {
    pub fn of(tensor: &'a Tensor) -> Result<Self> {
        Self::new(tensor.device())
    }

    pub fn new(_: &'a Device) -> Result<Self> {
        candle_core::bail!("{ABSENT}")
    }

    pub fn buffer(self, _: usize, _: DType) -> Result<Buffer> {
        candle_core::bail!("{ABSENT}")
    }

    pub fn zeros(self, _: usize, _: DType) -> Result<Buffer> {
        candle_core::bail!("{ABSENT}")
    }

    /// # Safety
    /// None here.
    pub unsafe fn launch(self, _: &'static str, _: DType, _: Grid, _: &[Arg]) -> Result<()> {
        candle_core::bail!("{ABSENT}")
    }

    pub fn multiply(self, _: &Product) -> Result<()> {
        candle_core::bail!("{ABSENT}")
    }
}
