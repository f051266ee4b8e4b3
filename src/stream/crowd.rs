//! How many models compute at the same time.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Models that compute at the same time.
static COMPUTING: AtomicUsize = AtomicUsize::new(0);

/// Runs `body` as one of those that compute at the same time. Where they are as many as the processors, each operation
/// stays on the thread that calls it: to cut it up would only make the models wait for one another. A result does not
/// depend on how many there are.
pub fn beside_others<T>(body: impl FnOnce() -> T) -> T {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            COMPUTING.fetch_sub(1, Relaxed);
        }
    }
    COMPUTING.fetch_add(1, Relaxed);
    let _leave = Leave;
    body()
}

/// How many do.
pub fn computing() -> usize {
    COMPUTING.load(Relaxed)
}
