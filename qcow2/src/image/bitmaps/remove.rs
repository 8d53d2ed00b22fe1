//! Removing all bitmaps of an image.

use super::load;
use super::table::BitmapTable;
use crate::error::{Error, Result};
use crate::format::{BitmapTableEntry, Cluster0, Switch, features, plan_drop_bitmaps, plan_feature_bits};
use crate::image::Qcow2;
use crate::image::edits::Batch;
use crate::image::refcounts::Refcounts;
use crate::image::rewrite::header_error;
use crate::units::HostOffset;

/// Removes all bitmaps, and frees their clusters. Where the extension cannot be taken out of the
/// header atomically it stays, without the autoclear bit that gives it a meaning; QEMU removes it when
/// it writes the header next. Bitmaps that mean nothing already (autoclear bit 0 is clear) are left.
///
/// # Errors
/// A directory or table that is broken: then nothing was changed. An I/O error: what was not given
/// back by then is leaked.
pub(crate) fn drop_all(image: &mut Qcow2, refcounts: &Refcounts) -> Result<()> {
    let extension = image.cluster0().bitmaps().map_err(|e| Error::format(image.path(), e))?;
    let Some(extension) = extension else { return Ok(()) };
    let bitmaps = load(image)?;
    for bitmap in &bitmaps {
        for_each_cluster(image, BitmapTable::of(bitmap), |_| {})?;
    }
    for write in plan(image)?.writes {
        image.write(HostOffset::new(write.offset), &write.bytes)?;
        image.barrier()?;
    }
    image.reload_header()?;
    // A bitmap at a time: its clusters are listed in memory.
    for bitmap in &bitmaps {
        let mut batch = Batch::default();
        let cluster = image.geometry().cluster_size();
        for_each_cluster(image, BitmapTable::of(bitmap), |host| batch.free(image, host, cluster))?;
        batch.free(image, bitmap.table_offset, bitmap.table_bytes());
        batch.settle(image, refcounts)?;
    }
    let mut batch = Batch::default();
    batch.free(image, extension.directory_offset, extension.directory_size);
    batch.settle(image, refcounts)
}

fn plan(image: &Qcow2) -> Result<Switch> {
    let failed = |e| header_error(image.path(), e);
    let mut cluster = vec![0; image.geometry().cluster_size() as usize];
    image.read_table(HostOffset::ZERO, &mut cluster)?;
    let whole = plan_drop_bitmaps(&cluster).map_err(failed)?;
    if whole.atomic {
        return Ok(whole);
    }
    let header = Cluster0::parse(&cluster).map_err(|e| Error::format(image.path(), e))?.header;
    plan_feature_bits(&cluster, header.incompatible, header.autoclear & !features::BITMAPS).map_err(failed)
}

/// Calls `f` with every cluster of bits of a table.
fn for_each_cluster(image: &Qcow2, mut table: BitmapTable, mut f: impl FnMut(HostOffset)) -> Result<()> {
    for index in 0..table.entries() {
        if let BitmapTableEntry::Data(host) = table.entry(image, index)? {
            f(host);
        }
    }
    Ok(())
}
