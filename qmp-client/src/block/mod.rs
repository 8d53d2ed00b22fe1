//! The block layer of a running QEMU: its disks and jobs, flushing nodes, and the single steps that change a
//! chain.

pub(crate) mod flush;
pub(crate) mod foreign;
pub(crate) mod graph;
pub(crate) mod ids;
pub(crate) mod jobs;
pub(crate) mod merge;
pub(crate) mod nbd;
pub(crate) mod servers;
pub(crate) mod snapshot;
pub(crate) mod version;
