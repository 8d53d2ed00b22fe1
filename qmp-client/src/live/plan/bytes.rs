//! Estimates from the images how much a live merge will move.

use std::path::PathBuf;

use crate::block::graph::{Disk, Layer};
use crate::live::discover::{Files, Place};
use qcow2::chain::view::{Supplied, Supply, View};
use qcow2::chain::{Chain, OpenOptions, Policy};
use qcow2::image::{Image, ImageFormat, Mapping};
use qcow2::storage::OsHost;
use qcow2::units::{GuestOffset, GuestRange};

/// Bytes that a merge moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlannedBytes {
    /// Bytes of data.
    pub copy: u64,
    /// Bytes that the merged layers show as zeros.
    pub zero: u64,
    /// Bytes of data for which the layer that receives them has no room allocated yet.
    pub new: u64,
    /// Whether this was counted in the images' maps; otherwise `copy` is what the layers hold on disk, at most.
    pub counted: bool,
}

/// The bytes that `from` (the layers that are given up) supply to what lies above, seen from `top`, the highest
/// of them, and that `into` does not hold yet.
pub(crate) fn planned_bytes(disk: &Disk, files: &Files, from: &[Layer], into: &Layer) -> PlannedBytes {
    counted(disk, files, from, into).unwrap_or_else(|| {
        let held = from.iter().filter_map(|layer| layer.actual_size).fold(0, u64::saturating_add);
        PlannedBytes { copy: held, ..PlannedBytes::default() }
    })
}

/// `None` where a layer cannot be read here; an unknown number of bytes is no reason to fail.
fn counted(disk: &Disk, files: &Files, from: &[Layer], into: &Layer) -> Option<PlannedBytes> {
    let highest = from.first()?.index.max(into.index);
    let highest = disk.layers().iter().find(|layer| layer.index == highest)?;
    let chain = open(files, highest)?;
    let images = chain.images();
    // If the chain here is not QEMU's, the count would be wrong.
    if images.len() != highest.index {
        return None;
    }
    let position = |layer: &Layer| layer.index.checked_sub(1).filter(|at| *at < images.len());
    let (first, last, into) = (position(from.last()?)?, position(from.first()?)?, position(into)?);
    count(&images, first, last, into)
}

/// Opens for reading, without locks, as `info` does. The layers below the active one do not change.
fn open(files: &Files, layer: &Layer) -> Option<Chain> {
    let Place::Here(path, _) = files.place(layer) else { return None };
    let active_format = match layer.format.as_str() {
        "qcow2" => ImageFormat::Qcow2,
        "raw" => ImageFormat::Raw,
        _ => return None,
    };
    let options = OpenOptions::new(Policy::local_files()).with_format(Some(active_format));
    Chain::open(&OsHost, &path, &options).ok()
}

fn count(images: &[&Image], first: usize, last: usize, into: usize) -> Option<PlannedBytes> {
    let merged = View::new(images, first, last);
    let receiver = View::new(images, into, into);
    let mut bytes = PlannedBytes { counted: true, ..PlannedBytes::default() };
    let (mut parts, mut held) = (Vec::new(), Vec::new());
    let window = merged.window();
    let mut at = GuestOffset::new(0);
    while let Some(next) = merged.next_supplied(at).ok()? {
        let start = next.get() / window * window;
        let range = GuestRange { start: GuestOffset::new(start), len: window.min(merged.size() - start) };
        parts.clear();
        merged.resolve(range, &mut parts).ok()?;
        held.clear();
        if start < receiver.size() {
            receiver.resolve(range, &mut held).ok()?;
        }
        for part in &parts {
            match part.supply {
                Supply::Layer { mapping: Mapping::Zero { .. }, .. } | Supply::PastEnd { .. } => {
                    bytes.zero = bytes.zero.saturating_add(part.range.len);
                }
                Supply::Layer { .. } => {
                    bytes.copy = bytes.copy.saturating_add(part.range.len);
                    let there: u64 = held.iter().filter_map(|h| data_in(h, &part.range)).sum();
                    bytes.new = bytes.new.saturating_add(part.range.len.saturating_sub(there));
                }
                Supply::Nothing => {}
            }
        }
        at = range.end();
    }
    Some(bytes)
}

/// How many bytes of `range` a part of the receiving layer has allocated.
fn data_in(held: &Supplied, range: &GuestRange) -> Option<u64> {
    let both = held.clip(range)?;
    match both.supply {
        Supply::Layer { mapping: Mapping::Zero { .. } | Mapping::Compressed(_), .. } => None,
        Supply::Layer { .. } => Some(both.range.len),
        Supply::PastEnd { .. } | Supply::Nothing => None,
    }
}

/// Bytes that may still be written to the file system of a layer, where that is known.
pub(crate) fn free_space(files: &Files, layer: &Layer) -> Option<(PathBuf, u64)> {
    use qcow2::storage::{FileKind, Host};
    let Place::Here(path, _) = files.place(layer) else { return None };
    // A block device has the room that it has.
    OsHost.stat(&path).ok().filter(|stat| stat.kind == FileKind::Regular)?;
    let folder = path.parent()?.to_owned();
    let free = OsHost.free_space(&path).ok()??;
    Some((folder, free))
}
