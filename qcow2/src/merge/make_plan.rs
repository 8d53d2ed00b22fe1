//! Makes the plan of a merge.

use super::options::CommitOptions;
use super::plan::{Afterwards, DataFileFate, Plan, PlannedDataFile};
use super::safety::{self, Searched};
use super::stack::Stack;
use crate::error::{Error, FileOp, Result};
use crate::image::{Image, grow};
use crate::storage::FileKind;
use crate::transfer::Totals;
use crate::units::GuestOffset;

/// What base needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needed {
    /// The size of its disk, in bytes.
    pub(super) size: u64,
    /// What is moved and taken.
    pub(super) totals: Totals,
    /// How many of the clusters lie in one run.
    pub(super) side_by_side: u64,
}

/// Whether there is nothing to merge: the active image is an empty overlay directly on base, and is not to be removed.
///
/// # Errors
/// A table that cannot be read.
pub(super) fn is_nothing(stack: &Stack<'_>, options: &CommitOptions, totals: Totals) -> Result<bool> {
    let is_direct = stack.has_active() && stack.merged.len() == 1;
    let is_removed = options.delete && !options.keep_active;
    let is_covered = stack.base.image.virtual_size() >= stack.top.image.virtual_size();
    let may_be = is_direct && !is_removed && is_covered && totals.is_empty();
    Ok(may_be && stack.active.image.next_allocated(GuestOffset::ZERO)?.is_none())
}

/// The plan of a merge, without the parts about earlier merges and about emptied layers.
///
/// # Errors
/// Bitmaps that cannot be read; the system's.
pub(super) fn make_plan(
    stack: &Stack<'_>,
    options: &CommitOptions,
    needed: Needed,
    afterwards: Afterwards,
    found: Searched,
) -> Result<Plan> {
    let (base, top) = (stack.base.image.virtual_size(), stack.top.image.virtual_size());
    let removed = options.delete && !options.keep_active;
    let merged = stack.merged.iter().map(|layer| layer.path.clone());
    // The active image stays in use as an empty overlay.
    let obsolete = match () {
        () if !stack.has_active() || removed => stack.merged.len(),
        // A kept active image still needs the layers below it.
        () if options.keep_active => 0,
        () => stack.merged.len() - 1,
    };
    let lost = stack.touched.iter().take(stack.merged.len());
    Ok(Plan {
        base: stack.base.path.clone(),
        top: stack.top.path.clone(),
        active: stack.active.path.clone(),
        totals: needed.totals,
        base_size_before: base,
        base_size_after: needed.size,
        base_file_size_after: file_size_after(&stack.base.image, needed)?,
        old_tail: if stack.has_active() { base.saturating_sub(top) } else { 0 },
        afterwards,
        obsolete: merged.take(obsolete).collect(),
        emptied: Vec::new(),
        kept: Vec::new(),
        removes: removed,
        bytes_freed: 0,
        unremoved: Vec::new(),
        restore_points_lost: lost.map(|layer| layer.path.clone()).collect(),
        data_files: data_files(stack, options),
        bitmaps_lost: safety::bitmaps(stack, options)?,
        searched: found.searched,
        signs: found.signs,
        unreadable: found.unreadable,
        room_unknown: Vec::new(),
        strangers: Vec::new(),
        resumed: None,
        begins_anew: None,
    })
}

/// What becomes of the external data files of base and of the merged layers.
fn data_files(stack: &Stack<'_>, options: &CommitOptions) -> Vec<PlannedDataFile> {
    // A kept active image keeps its own data file, and reads through the layers below it.
    let changed = if options.keep_active && stack.has_active() { 1 } else { stack.touched.len() };
    let planned = stack.touched.iter().take(changed).filter_map(|layer| {
        let data = layer.data_file.as_ref()?;
        let fate = match data.kept {
            _ if layer.id == stack.base.id => DataFileFate::Written,
            Some(why) => DataFileFate::Kept(why),
            None if options.delete => DataFileFate::Removed,
            None => DataFileFate::Emptied,
        };
        Some(PlannedDataFile { file: data.path.clone(), image: layer.path.clone(), fate })
    });
    planned.collect()
}

/// The length that base's file, or the block device that holds it, must have afterwards, at most.
fn file_size_after(image: &Image, Needed { size: new_size, totals, side_by_side }: Needed) -> Result<u64> {
    let stat = image.file().stat().map_err(|e| Error::io(image.path(), FileOp::Stat, None, e))?;
    let needed = match image {
        // A file of odd length is filled up to a sector when its end is written.
        Image::Raw(_) => new_size,
        Image::Foreign(foreign) => return Err(foreign.refuse()),
        Image::Qcow2(qcow2) => {
            let l1 = grow::l1_growth(qcow2, new_size)?.unwrap_or(0);
            grow::end_after(qcow2, totals.clusters_to_allocate + l1, side_by_side + l1)?
                << qcow2.geometry().cluster_bits()
        }
    };
    Ok(if stat.kind == FileKind::Block { needed } else { needed.max(stat.len) })
}
