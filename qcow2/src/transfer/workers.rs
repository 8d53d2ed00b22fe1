//! The threads that a merge runs on.

use crate::error::Result;

/// The least number of threads.
const WORKERS: usize = 8;

/// Runs `f` on threads of its own: more than there are cores, since most of them wait for the disk. A caller
/// that is itself on a pool of threads has chosen how many there are.
pub(crate) fn on_workers<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    if rayon::current_thread_index().is_some() {
        return f();
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    match rayon::ThreadPoolBuilder::new().num_threads((cores * 2).max(WORKERS)).build() {
        Ok(pool) => pool.install(f),
        // No threads to be had: the caller's own are slower, but right.
        Err(_) => f(),
    }
}
