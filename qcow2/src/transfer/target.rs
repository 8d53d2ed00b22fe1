//! Prepares an image to take data: makes room in its metadata, sets feature bits, frees leaked clusters.

use std::sync::atomic::AtomicBool;

use crate::check::CheckOptions;
use crate::error::{Error, FileOp, Result};
use crate::format::plan_feature_bits;
use crate::image::refcounts::Refcounts;
use crate::image::rewrite::{apply, header_error};
use crate::image::{Image, Qcow2, Raw, grow};
use crate::repair::{self, RepairMode};
use crate::units::HostOffset;

/// Grows a raw base; the new part reads as zeros.
pub(crate) fn grow_raw(raw: &mut Raw, size: u64) -> Result<()> {
    raw.file().set_len(size).map_err(|e| Error::io(raw.path(), FileOp::Grow, Some(size), e))?;
    raw.file().sync().map_err(|e| Error::barrier(raw.path(), e))
}

/// Prepares a qcow2 base: autoclear bits that are not known are cleared, as the specification asks of
/// every writer; room is made in refcounts and in the L1 table. `side_by_side` of the clusters lie in
/// one run.
pub(crate) fn prepare(image: &mut Qcow2, clusters: u64, side_by_side: u64, size: u64) -> Result<Refcounts> {
    clear_autoclear(image)?;
    let mut refcounts = Refcounts::load(image)?;
    let l1 = grow::l1_growth(image, size)?.unwrap_or(0);
    if let Some(switch) = grow::make_room(image, &mut refcounts, clusters + l1, side_by_side + l1)? {
        switch.publish(image, &mut refcounts)?;
    }
    grow::grow_l1(image, &refcounts, size)?;
    if image.has_data_file() && image.header().data_file_raw() && size > image.virtual_size() {
        // A raw data file is the disk, byte for byte.
        let io = |e| Error::io(image.path(), FileOp::GrowDataFile, Some(size), e);
        let data = image.data_file();
        if data.size().map_err(io)? < size {
            data.set_len(size).map_err(io)?;
        }
    }
    Ok(refcounts)
}

/// Frees the clusters that a merge leaked when it was stopped.
pub(crate) fn give_leaks_back(image: &mut Image, cancel: &AtomicBool) -> Result<()> {
    let Image::Qcow2(qcow2) = image else { return Ok(()) };
    let data = qcow2.has_data_file().then(|| &**qcow2.data_file());
    let options = CheckOptions { cancel: Some(cancel) };
    repair::repair(qcow2.path(), &**qcow2.file(), data, RepairMode::Leaks, &options)?;
    qcow2.barrier()?;
    qcow2.refresh_lengths()
}

pub(crate) fn clear_autoclear(image: &Qcow2) -> Result<()> {
    if image.header().version < 3 || image.header().unknown_autoclear() == 0 {
        return Ok(());
    }
    let mut cluster = vec![0; image.geometry().cluster_size() as usize];
    image.read_table(HostOffset::ZERO, &mut cluster)?;
    let header = image.header();
    let switch = plan_feature_bits(&cluster, header.incompatible, header.autoclear)
        .map_err(|e| header_error(image.path(), e))?;
    apply(image, &switch)
}
