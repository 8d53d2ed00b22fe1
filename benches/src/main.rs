//! Side-by-side benchmarks of `qmerge` and `qemu-img`.
fn main() {}
