//! Bytes to values and back, and nothing else: no I/O, no `unsafe`, no panic on any input.
//!
//! Everything here follows the qcow2 specification (QEMU's `docs/interop/qcow2.txt`); section names
//! in the documentation are that document's. Integers on disk are big-endian; `byteorder` is used in
//! this module and nowhere else. Limits that the specification leaves open are QEMU's.

mod bitmap;
mod build;
mod cluster0;
mod container;
mod error;
pub(crate) mod extensions;
pub(crate) mod features;
mod geometry;
mod header;
mod l1;
mod l2;
mod limits;
pub(crate) mod parts;
mod refcount;
mod rewrite;
#[cfg(test)]
mod rewrite_tests;
mod snapshot;
mod words;

pub use bitmap::Bitmap;
pub(crate) use bitmap::{
    BitmapTableEntry, MAX_BITMAP_BYTES, MAX_BITMAP_TABLE_ENTRIES, decode_bitmap_directory,
    encode_bitmap_directory,
};
pub use build::RewriteError;
pub use cluster0::Cluster0;
pub use container::Container;
pub(crate) use container::{CONTAINER_HEAD, CONTAINER_TAIL};
pub use error::FormatError;
pub(crate) use extensions::{
    BitmapsExtension, EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_CRYPTO, EXT_DATA_FILE, Extension,
};
pub use geometry::Geometry;
pub use header::{Compression, Header};
pub(crate) use header::{FULL_HEADER_LENGTH, V2_HEADER_LENGTH, is_qcow2};
pub(crate) use l1::L1Entry;
pub(crate) use l2::{L2Entry, SubclusterState, Subclusters};
pub(crate) use limits::{MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
pub(crate) use refcount::{RefcountTableEntry, RefcountWidth};
pub(crate) use rewrite::{
    EmptyDisk, Mark, NewNames, Switch, plan_backing_removal, plan_backing_switch, plan_drop_bitmaps,
    plan_empty_switch, plan_feature_bits, plan_mark, plan_mark_and_backing, plan_names,
};
pub use snapshot::Snapshot;
pub(crate) use snapshot::{MAX_SNAPSHOT_TABLE, SnapshotLengths, decode_snapshots, snapshot_table_bound};
pub(crate) use words::{read_be_u64s, write_be_u64s};
