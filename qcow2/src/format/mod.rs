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
mod extensions;
pub mod features;
mod geometry;
mod header;
mod l1;
mod l2;
mod limits;
pub mod parts;
mod refcount;
mod rewrite;
#[cfg(test)]
mod rewrite_tests;
mod snapshot;
mod words;

pub use bitmap::{
    BITMAP_AUTO, BITMAP_EXTRA_COMPATIBLE, BITMAP_IN_USE, Bitmap, BitmapTableEntry, MAX_BITMAP_BYTES,
    MAX_BITMAP_NAME, MAX_BITMAP_TABLE_ENTRIES, decode_bitmap_directory, encode_bitmap_directory,
};
pub use build::RewriteError;
pub use cluster0::Cluster0;
pub use container::{CONTAINER_HEAD, CONTAINER_TAIL, Container};
pub use error::FormatError;
pub use extensions::{
    BitmapsExtension, EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_CRYPTO, EXT_DATA_FILE, EXT_EMPTIED_ONTO, EXT_END,
    EXT_FEATURE_NAMES, EXT_MERGED_INTO, EXT_MERGING_INTO, Extension, MAX_BACKING_FORMAT,
    MAX_BITMAP_DIRECTORY, MAX_BITMAPS,
};
pub use features::{FeatureKind, FeatureName};
pub use geometry::Geometry;
pub use header::{
    Compression, FULL_HEADER_LENGTH, Header, MAGIC, V2_HEADER_LENGTH, V3_HEADER_LENGTH, is_qcow2,
};
pub use l1::L1Entry;
pub use l2::{L2Entry, SubclusterState, Subclusters};
pub use limits::{MAX_BACKING_NAME, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS};
pub use refcount::{RefcountTableEntry, RefcountWidth, max_refcount};
pub use rewrite::{
    EmptyDisk, Mark, Switch, Write, plan_backing_removal, plan_backing_switch, plan_drop_bitmaps,
    plan_empty_switch, plan_feature_bits, plan_mark, plan_mark_and_backing,
};
pub use snapshot::{
    MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE, Snapshot, SnapshotLengths, decode_snapshots, snapshot_table_bound,
};
pub use words::{read_be_u64s, write_be_u64s};
