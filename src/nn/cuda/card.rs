//! The card itself: its memory, its kernels and its matrix products.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError, RwLock};

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, DevicePtr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::cuda_backend::{CudaStorageSlice, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Error, Result, Shape, Storage, Tensor};

use super::{Arg, Grid, Matrix, Product};

const SOURCE: &str = include_str!("kernels.cu");

/// A card, as the tensors on it know it.
#[derive(Clone, Copy)]
pub struct Card<'a>(&'a CudaDevice);

/// New memory on a card, whose values a kernel or a product is to write.
pub struct Buffer {
    storage: CudaStorage,
    at: u64,
    count: usize,
    dtype: DType,
}

impl Buffer {
    /// Where its first element is.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// How many elements it has room for.
    pub fn count(&self) -> usize {
        self.count
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// As the value of an operation.
    pub fn into_storage(self) -> CudaStorage {
        self.storage
    }

    /// As a tensor that is not tracked.
    pub fn tensor(self, shape: impl Into<Shape>) -> Tensor {
        tensor_of(self.storage, shape.into())
    }
}

/// A tensor with these values that is not tracked.
pub fn tensor_of(storage: CudaStorage, shape: Shape) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// Where the first element of `tensor` is. It must be held until the kernel that reads it has been launched; it may be
/// freed while that still runs, since that waits in the same stream.
pub fn at(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => {
            let offset = layout.start_offset() * tensor.dtype().size_in_bytes();
            Ok(address(storage)? + offset as u64)
        }
        _ => candle_core::bail!("a fused operation met a tensor that is not on a card"),
    }
}

fn address(storage: &CudaStorage) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    Ok(match &storage.slice {
        CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F64(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::U32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::I64(slice) => slice.device_ptr(&stream).0,
        _ => candle_core::bail!("a fused operation met a tensor of another type"),
    })
}

/// The number under which kernels.cu knows a type.
fn number(dtype: DType) -> Result<u8> {
    match dtype {
        DType::F32 => Ok(0),
        DType::BF16 => Ok(1),
        DType::F16 => Ok(2),
        other => candle_core::bail!("no kernel stores {other:?}"),
    }
}

impl<'a> Card<'a> {
    /// The card that `tensor` is on.
    pub fn of(tensor: &'a Tensor) -> Result<Self> {
        Self::new(tensor.device())
    }

    pub fn new(device: &'a Device) -> Result<Self> {
        match device {
            Device::Cuda(device) => Ok(Self(device)),
            _ => candle_core::bail!("a fused operation met a tensor that is not on a card"),
        }
    }

    /// Memory for `count` elements of any values: those that were there before.
    pub fn buffer(self, count: usize, dtype: DType) -> Result<Buffer> {
        if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16 | DType::F64) {
            candle_core::bail!("no kernel writes {dtype:?}");
        }
        // SAFETY: whatever bits the memory has, they are a number of one of these types.
        let storage = unsafe { self.0.alloc_uninit(&Shape::from(count), dtype)? };
        Self::held(storage, count, dtype)
    }

    fn held(storage: CudaStorage, count: usize, dtype: DType) -> Result<Buffer> {
        Ok(Buffer {
            at: address(&storage)?,
            storage,
            count,
            dtype,
        })
    }

    /// Memory for `count` elements, all zero.
    pub fn zeros(self, count: usize, dtype: DType) -> Result<Buffer> {
        let storage = self.0.zeros_impl(&Shape::from(count), dtype)?;
        Self::held(storage, count, dtype)
    }

    /// Runs the kernel `name` of kernels.cu for tensors of `dtype`.
    ///
    /// # Safety
    /// `args` must be the kernel's arguments in number, order and type, and each address among them must be of memory on
    /// this card that holds what the kernel reads or writes there by its counts, sizes and strides, until it is
    /// launched. No address that it writes may be read or written through another of its arguments, unless the kernel
    /// takes each element from the place where it leaves it.
    pub unsafe fn launch(
        self,
        name: &'static str,
        dtype: DType,
        grid: Grid,
        args: &[Arg],
    ) -> Result<()> {
        if grid.blocks.0 == 0 || grid.blocks.1 == 0 {
            return Ok(());
        }
        let function = self.function(name, dtype)?;
        let stream = self.0.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        for arg in args {
            match arg {
                Arg::At(v) => builder.arg(v),
                Arg::Int(v) => builder.arg(v),
                Arg::Bits(v) => builder.arg(v),
                Arg::Long(v) => builder.arg(v),
                Arg::Real(v) => builder.arg(v),
            };
        }
        let config = LaunchConfig {
            grid_dim: (grid.blocks.0, grid.blocks.1, 1),
            block_dim: (grid.threads.0, grid.threads.1, 1),
            shared_mem_bytes: grid.shared,
        };
        // SAFETY: this function's contract.
        unsafe { builder.launch(config) }.map_err(Error::wrap)?;
        Ok(())
    }

    fn function(self, name: &'static str, dtype: DType) -> Result<CudaFunction> {
        type Functions = HashMap<(DeviceId, u8, &'static str), CudaFunction>;
        static KNOWN: LazyLock<RwLock<Functions>> = LazyLock::new(RwLock::default);
        let key = (self.0.id(), number(dtype)?, name);
        let known = KNOWN.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = known.get(&key) {
            return Ok(function.clone());
        }
        drop(known);
        let module = ["proxytune-f32", "proxytune-bf16", "proxytune-f16"][usize::from(key.1)];
        let text = self.text(key.1)?;
        let function = self.0.get_or_load_custom_func(name, module, &text)?;
        let function = function.into_cuda_function();
        let mut known = KNOWN.write().unwrap_or_else(PoisonError::into_inner);
        known.insert(key, function.clone());
        Ok(function)
    }

    /// kernels.cu compiled for this card and one type.
    fn text(self, number: u8) -> Result<String> {
        type Texts = HashMap<(u8, (i32, i32)), String>;
        static KNOWN: LazyLock<Mutex<Texts>> = LazyLock::new(Mutex::default);
        let stream = self.0.cuda_stream();
        let (major, minor) = stream.context().compute_capability().map_err(Error::wrap)?;
        let mut known: MutexGuard<Texts> = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(text) = known.get(&(number, (major, minor))) {
            return Ok(text.clone());
        }
        let options = CompileOptions {
            name: Some("kernels.cu".into()),
            options: vec![
                format!("--gpu-architecture=compute_{major}{minor}"),
                format!("-DSTORAGE={number}"),
            ],
            ..CompileOptions::default()
        };
        let text = compile_ptx_with_opts(SOURCE, options)
            .map_err(Error::wrap)?
            .to_src();
        known.insert((number, (major, minor)), text.clone());
        Ok(text)
    }

    /// `result = scale · left · right`, or `+=`, in f32 arithmetic.
    ///
    /// # Errors
    /// When a matrix is larger than its memory, or of a type that cuBLAS does not multiply.
    pub fn multiply(self, product: &Product) -> Result<()> {
        let Product {
            rows,
            columns,
            depth,
            batch,
            left,
            right,
            result: out,
            scale,
            adds,
        } = *product;
        if rows == 0 || columns == 0 || batch == 0 {
            return Ok(());
        }
        for (matrix, size) in [
            (&left, (rows, depth)),
            (&right, (depth, columns)),
            (&out, (rows, columns)),
        ] {
            matrix.check(size, batch)?;
        }
        let stream = self.0.cuda_stream();
        stream.context().bind_to_thread().map_err(Error::wrap)?;
        let blas = self.0.cublas_handle();
        let size = |n: usize| i32::try_from(n).map_err(Error::wrap);
        let turned = |matrix: &Matrix| match matrix.turned {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        // What cuBLAS sees is transposed, since it counts by columns. A single row may have any stride.
        let line = |matrix: &Matrix, rows: usize, columns: usize| {
            size(
                matrix
                    .stride
                    .max(if matrix.turned { rows } else { columns }),
            )
        };
        let (alpha, beta) = (scale, if adds { 1f32 } else { 0f32 });
        // SAFETY: the matrices lie within memory that their tensors and buffers hold: that was checked.
        unsafe {
            result::gemm_strided_batched_ex(
                *blas.handle(),
                turned(&right),
                turned(&left),
                size(columns)?,
                size(rows)?,
                size(depth)?,
                std::ptr::from_ref(&alpha).cast(),
                right.at as *const _,
                kind(right.dtype)?,
                line(&right, depth, columns)?,
                right.apart as i64,
                left.at as *const _,
                kind(left.dtype)?,
                line(&left, rows, depth)?,
                left.apart as i64,
                std::ptr::from_ref(&beta).cast(),
                out.at as *mut _,
                kind(out.dtype)?,
                line(&out, rows, columns)?,
                out.apart as i64,
                size(batch)?,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(Error::wrap)
    }
}

fn kind(dtype: DType) -> Result<sys::cudaDataType> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        DType::F16 => Ok(sys::cudaDataType::CUDA_R_16F),
        other => candle_core::bail!("no matrix product of {other:?}"),
    }
}
