//! How operations compute, in one value for each thread: [`Context::run`] is the only door through which it changes, for
//! as long as a closure runs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use candle_core::{Tensor, TensorId};

use super::Weight;
use crate::stream::computing;

thread_local! {
    static CONTEXT: RefCell<Context> = RefCell::default();
}

/// What a thread's operations go by.
#[derive(Clone, Default)]
pub(super) struct Context {
    /// Whether no graph is recorded: every parameter is taken detached.
    pub no_grad: bool,
    /// Whether blocks keep their inputs alone, and run again in the backward pass.
    pub recomputes: bool,
    /// Whether each operation stays on this thread, which has its share of some larger work.
    pub alone: bool,
    /// Weights with their adapters, by the identity of A, where adapters are to be merged.
    pub merged: Option<Gathered<Weight>>,
    /// Gradients of variables inside blocks, while a backward pass runs.
    pub collected: Option<Gathered<Tensor>>,
}

/// What belongs to tensors, on one thread.
pub(super) type Gathered<T> = Rc<RefCell<HashMap<TensorId, T>>>;

impl Context {
    /// That of this thread.
    pub fn current() -> Self {
        CONTEXT.with_borrow(Self::clone)
    }

    /// Runs `body` on this thread with this context.
    pub fn run<T>(self, body: impl FnOnce() -> T) -> T {
        struct Restore(Context);
        impl Drop for Restore {
            fn drop(&mut self) {
                CONTEXT.set(std::mem::take(&mut self.0));
            }
        }
        let _restore = Restore(CONTEXT.replace(self));
        body()
    }
}

/// Runs `body` on this thread without recording a graph: every parameter is taken detached.
pub fn no_grad<T>(body: impl FnOnce() -> T) -> T {
    let context = Context {
        no_grad: true,
        ..Context::current()
    };
    context.run(body)
}

/// Whether [`no_grad`] is running on this thread.
pub(super) fn is_no_grad() -> bool {
    CONTEXT.with_borrow(|context| context.no_grad)
}

/// Runs `body` on this thread; where `yes`, the blocks in it that go through [`super::recompute`] keep their inputs
/// alone. The result's gradients are then [`super::backward`]'s to compute.
pub fn recomputing<T>(yes: bool, body: impl FnOnce() -> T) -> T {
    let context = Context {
        recomputes: yes,
        ..Context::current()
    };
    context.run(body)
}

/// Whether blocks on this thread are to keep their inputs alone.
pub fn is_recomputing() -> bool {
    CONTEXT.with_borrow(|context| context.recomputes && !context.no_grad)
}

/// Runs `body`, in which adapters must not change. A layer that runs inside [`no_grad`] merges its adapter into a copy
/// of its weight at its first call, if the adapter's share of the work is worth that; the copies go with the end of
/// `body`.
pub fn merged<T>(body: impl FnOnce() -> T) -> T {
    let context = Context {
        merged: Some(Rc::default()),
        ..Context::current()
    };
    context.run(body)
}

/// Whether an operation had better stay on its thread.
pub(super) fn is_crowded() -> bool {
    CONTEXT.with_borrow(|context| context.alone) || computing() >= rayon::current_num_threads()
}

/// What computes the operations of layers in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operations {
    /// Those of this module, each with its gradient.
    Fused,
    /// candle's own, to compare results and times with. Half-precision weights and the optimizer stay as they are.
    Candle,
}

static ONLY_CANDLES: AtomicBool = AtomicBool::new(false);

/// Settles for the whole process what computes: to be called before the first model is made.
pub fn use_operations(operations: Operations) {
    ONLY_CANDLES.store(operations == Operations::Candle, Relaxed);
}

/// Whether the operations of this module are not to be used.
pub(super) fn only_candles() -> bool {
    ONLY_CANDLES.load(Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::beside_others;

    #[test]
    fn as_many_as_there_are_threads_are_a_crowd() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build();
        let pool = pool.unwrap();
        // Other tests compute too: that two are one too few cannot be told here.
        assert!(pool.install(|| beside_others(|| beside_others(is_crowded))));
    }

    #[test]
    fn a_context_ends_with_what_runs_in_it_even_by_a_panic() {
        let flags = || (is_no_grad(), is_recomputing(), is_crowded());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(64).build();
        pool.unwrap().install(|| {
            let alone = Context {
                alone: true,
                ..Context::default()
            };
            no_grad(|| {
                assert_eq!(alone.run(flags), (false, false, true));
                assert_eq!(recomputing(true, flags), (true, false, false));
                let end = std::panic::catch_unwind(|| recomputing(true, || panic!("on purpose")));
                assert!(end.is_err());
                assert_eq!(flags(), (true, false, false));
            });
            assert_eq!(recomputing(true, flags), (false, true, false));
            assert_eq!(flags(), (false, false, false));
        });
    }
}
