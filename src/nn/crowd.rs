//! How many models compute at the same time. Where there are as many as processors, each operation stays on the thread
//! that calls it: to cut it up would only make the models wait for one another.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::with_graph;

static COMPUTING: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `body` as one of those that compute at the same time. A result does not depend on how many there are.
pub fn beside_others<T>(body: impl FnOnce() -> T) -> T {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            COMPUTING.fetch_sub(1, Ordering::Relaxed);
        }
    }
    COMPUTING.fetch_add(1, Ordering::Relaxed);
    let _leave = Leave;
    body()
}

/// Runs `body`, which has its own thread's share of the work: its operations stay on the thread. A graph is recorded.
pub(super) fn on_one_thread<T>(body: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            ALONE.set(self.0);
        }
    }
    let _restore = Restore(ALONE.replace(true));
    with_graph(body)
}

/// Whether an operation had better stay on its thread.
pub(crate) fn is_crowded() -> bool {
    ALONE.get() || COMPUTING.load(Ordering::Relaxed) >= rayon::current_num_threads()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{is_no_grad, no_grad};

    #[test]
    fn as_many_as_there_are_threads_are_a_crowd() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build();
        let pool = pool.unwrap();
        // Other tests compute too: that two are one too few cannot be told here.
        assert!(pool.install(|| beside_others(|| beside_others(is_crowded))));
    }

    #[test]
    fn what_has_one_thread_stays_on_it_and_records_a_graph() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(64).build();
        pool.unwrap().install(|| {
            assert!(!is_crowded());
            assert!(on_one_thread(is_crowded));
            assert!(no_grad(|| on_one_thread(|| !is_no_grad())));
            assert!(!is_crowded());
        });
    }
}
