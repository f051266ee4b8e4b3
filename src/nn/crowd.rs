//! How many models compute at the same time. Where there are as many as processors, each operation stays on the thread
//! that calls it: to cut it up would only make the models wait for one another.

use std::sync::atomic::{AtomicUsize, Ordering};

static COMPUTING: AtomicUsize = AtomicUsize::new(0);

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

/// Whether an operation had better stay on its thread.
pub(crate) fn is_crowded() -> bool {
    COMPUTING.load(Ordering::Relaxed) >= rayon::current_num_threads()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_as_there_are_threads_are_a_crowd() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build();
        let pool = pool.unwrap();
        // Other tests compute too: that two are one too few cannot be told here.
        assert!(pool.install(|| beside_others(|| beside_others(is_crowded))));
    }
}
