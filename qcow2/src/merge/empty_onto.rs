//! Turning the active image of before into an empty overlay directly on the base, after a merge that
//! somebody else has done while the virtual machine ran. The base is in use, and only looked at.
//!
//! The merge of a stopped machine first re-points the overlay and then empties it: what is left of its
//! clusters hides equal bytes of the base, so every state in between shows the same disk. Here the base
//! may have been written to since, and an overlay that is half emptied, or re-pointed and still full, would
//! show a mixture of old and new. So there is no state in between: backing name, backing format and an
//! empty L1 table take effect in one write inside the header's first sector. Before it the image is
//! what it was, behind it it is the base; what the old table led to is given back when that is durable.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use super::retire::Known;
use super::{empty, link};
use crate::chain::{BackingName, Chain, OpenOptions, new_backing_name, open_data_file};
use crate::check::{CheckOptions, check};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::{FormatError, Switch, plan_backing_and_l1_switch};
use crate::image::alloc::Allocator;
use crate::image::refcounts::Refcounts;
use crate::image::{ImageFormat, Qcow2, bitmap_names, bitmaps, grow};
use crate::storage::{Access, FileId, Host, LockMode};
use crate::units::{GuestOffset, HostOffset};

/// What a caller may ask when an image is emptied.
#[derive(Clone, Debug, Default)]
pub struct EmptyOptions {
    /// Policy and formats for the images below base, and for external data files.
    pub open: OpenOptions,
    /// Empty an image whose bitmaps will be lost.
    pub drop_bitmaps: bool,
    /// Empty an image whose internal snapshots will change.
    pub allow_snapshot_change: bool,
}

/// What became of an image that was emptied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emptied {
    /// The name by which it calls base.
    pub name: String,
    /// Whether it was an empty overlay on base before.
    pub was_empty: bool,
}

/// Makes `overlay` an empty overlay directly on `base`, an image of `format`. The overlay is locked for
/// it and then must be the known file. The base is neither locked nor written: a running virtual machine
/// may hold it. What base holds is not compared with the overlay: the caller knows that the merge is done.
///
/// # Errors
/// [`Error::InUse`]; [`Refusal::NotAsKnown`]; [`Error::Refused`] for an overlay that is raw, has no
/// backing file, is larger than base, dirty, corrupt or inconsistent, or has snapshots or bitmaps that the
/// options do not give up; for a base of another format, or one that is based on the overlay. Then nothing was
/// changed. An I/O error: the overlay is what it was, or shows base.
pub fn empty_onto(
    host: &dyn Host,
    overlay: &Known,
    base: &Path,
    format: ImageFormat,
    options: &EmptyOptions,
    cancel: &AtomicBool,
) -> Result<Emptied> {
    let mut image = open(host, overlay, &options.open)?;
    let base_id = look_at_base(host, &image, overlay.id, base, format, options)?;
    let (name, stands) = backing_name(host, &image, base, base_id)?;
    let empty = image.next_table(GuestOffset::ZERO)?.is_none();
    let same_format = image.cluster0().backing_format().as_deref() == Some(format.name());
    let bitmaps = image.cluster0().bitmaps().map_err(|e| Error::format(image.path(), e))?.is_some();
    let was_empty = stands && same_format && empty && !bitmaps;
    if !was_empty {
        // What was emptied by a call that did not come to its end has changed, and holds nothing.
        let stat = image.file().stat().map_err(|e| Error::io(image.path(), FileOp::Stat, None, e))?;
        overlay.judge(&stat)?;
    }
    judge(&image, options, cancel)?;
    plan(&image, &name, format, image.header().l1_offset)?;
    let mut refcounts = Refcounts::load(&image)?;
    // A bitmap that outlives what it speaks of would lie to the next backup.
    bitmaps::drop_all(&mut image, &refcounts)?;
    if empty {
        let switch = plan(&image, &name, format, image.header().l1_offset)?;
        link::apply(&image, &switch)?;
        image.reload_header()?;
    } else {
        switch(&mut image, &mut refcounts, &name, format)?;
        give_back_left(&mut image, &refcounts)?;
        move_down(&mut image, &refcounts)?;
    }
    empty::finish(&mut image, &mut refcounts)?;
    Ok(Emptied { name, was_empty })
}

fn open(host: &dyn Host, overlay: &Known, options: &OpenOptions) -> Result<Qcow2> {
    let any = Known { len: None, modified_ns: None, ..overlay.clone() };
    let file = any.open(host, LockMode::Write)?;
    if ImageFormat::detect(&overlay.path, &*file)? != ImageFormat::Qcow2 {
        let what = "it is raw, and has no backing name to change".to_owned();
        return Err(Error::refused(&overlay.path, Refusal::Other(what)));
    }
    let cluster0 = Qcow2::read_cluster0(&overlay.path, &*file)?;
    cluster0.validate().map_err(|e| Error::format(&overlay.path, e))?;
    let options =
        OpenOptions { lock: true, access: [(overlay.id, Access::ReadWrite)].into(), ..options.clone() };
    let data_file = open_data_file(host, &overlay.path, overlay.id, &cluster0, &options)?;
    Qcow2::open(&overlay.path, file, data_file.map(|(_, file)| file))
}

/// The rules for the overlay.
fn judge(image: &Qcow2, options: &EmptyOptions, cancel: &AtomicBool) -> Result<()> {
    let header = image.header();
    let refuse = |reason| Err(Error::refused(image.path(), reason));
    if header.is_corrupt() {
        return refuse(Refusal::CorruptBit);
    }
    if header.is_dirty() {
        return refuse(Refusal::Dirty);
    }
    if header.snapshots > 0 && !options.allow_snapshot_change {
        return refuse(Refusal::Snapshots { count: header.snapshots as usize });
    }
    if header.snapshots > 0 && image.has_data_file() {
        return refuse(Refusal::Other("its internal snapshots share its data file".into()));
    }
    let names: Vec<String> = bitmap_names(image)?.into_iter().map(|bitmap| bitmap.name).collect();
    if !names.is_empty() && !options.drop_bitmaps {
        return refuse(Refusal::Bitmaps { names });
    }
    let data_file = image.has_data_file().then(|| &**image.data_file());
    let report = check(image.path(), &**image.file(), data_file, &CheckOptions { cancel: Some(cancel) })?;
    if !report.is_consistent() {
        let first = report.first_corruption().map(ToString::to_string).unwrap_or_default();
        return refuse(Refusal::Inconsistent {
            corruptions: report.corruptions + report.check_errors,
            first,
        });
    }
    Ok(())
}

/// Looks at the base without a lock; only headers are read, of it and of what lies below it.
fn look_at_base(
    host: &dyn Host,
    overlay: &Qcow2,
    overlay_id: FileId,
    base: &Path,
    format: ImageFormat,
    options: &EmptyOptions,
) -> Result<FileId> {
    let below = OpenOptions {
        active_format: Some(format),
        lock: false,
        access: Default::default(),
        ..options.open.clone()
    };
    let chain = Chain::open(host, base, &below)?;
    if chain.files().contains(&overlay_id) {
        return Err(Error::refused(overlay.path(), Refusal::Loop { file: base.to_owned() }));
    }
    let layer = chain.layers().last().ok_or_else(|| Error::Usage("the chain has no such layer".into()))?;
    let found = ImageFormat::detect(base, &**layer.image.file())?;
    if found != format {
        let name = base.display().to_string();
        let (declared, found) = (format.name().to_owned(), found.name().to_owned());
        return Err(Error::refused(overlay.path(), Refusal::FormatMismatch { name, declared, found }));
    }
    let (size, needed) = (layer.image.virtual_size(), overlay.virtual_size());
    if size < needed {
        let what = format!("its disk of {needed} bytes cannot have been merged into one of {size} bytes");
        return Err(Error::refused(overlay.path(), Refusal::Other(what)));
    }
    Ok(layer.id)
}

/// The name by which the overlay calls, or will call, base; and whether it stands there already.
fn backing_name(host: &dyn Host, image: &Qcow2, base: &Path, base_id: FileId) -> Result<(String, bool)> {
    let refuse = |what: &str| Error::refused(image.path(), Refusal::Other(what.to_owned()));
    let old = image.cluster0().backing_name.clone().ok_or_else(|| refuse("it has no backing file"))?;
    let stands = BackingName::parse(&old)
        .is_ok_and(|name| host.stat(&name.resolve(image.path())).is_ok_and(|stat| stat.id == base_id));
    let name = if stands { old } else { new_backing_name(host, &old, image.path(), base)? };
    let utf8 = |_| refuse("the path of its new backing file is not valid UTF-8");
    Ok((String::from_utf8(name).map_err(utf8)?, stands))
}

/// Points the header at base and at an empty L1 table, in one write. The image does not know its new
/// header yet: what the old one leads to is to be given back.
fn switch(image: &mut Qcow2, refcounts: &mut Refcounts, name: &str, format: ImageFormat) -> Result<()> {
    let clusters = image.geometry().clusters_for(image.header().l1_bytes());
    if let Some(table) = grow::make_room(image, refcounts, clusters, clusters)? {
        table.publish(image, refcounts)?;
    }
    let table = new_table(image, refcounts)?;
    let switch = plan(image, name, format, table)?;
    link::apply(image, &switch)
}

/// An edit that takes effect in one sector.
fn plan(image: &Qcow2, name: &str, format: ImageFormat, l1_offset: HostOffset) -> Result<Switch> {
    let cluster = link::read_cluster(image)?;
    let switch = plan_backing_and_l1_switch(&cluster, name, format.name(), l1_offset)
        .map_err(|e| link::rewrite_error(image.path(), name, e))?;
    if !switch.atomic {
        return Err(Error::refused(image.path(), Refusal::HeaderRoom { name: name.to_owned() }));
    }
    Ok(switch)
}

/// Writes an empty L1 table as large as the present one into the first free room; it is durable, and
/// counted, and nothing refers to it.
fn new_table(image: &Qcow2, refcounts: &Refcounts) -> Result<HostOffset> {
    let geometry = image.geometry();
    let clusters = geometry.clusters_for(image.header().l1_bytes());
    let run = Allocator::find_run(image, refcounts, clusters)?.ok_or_else(|| {
        let expected = format!("{clusters} free clusters side by side");
        Error::format(image.path(), FormatError::malformed("refcount table", 48, "no room", expected))
    })?;
    let at = HostOffset::new(run.start << geometry.cluster_bits());
    image.write(at, &vec![0; (clusters * geometry.cluster_size()) as usize])?;
    refcounts.raise(image, &[run])?;
    image.barrier()?;
    Ok(at)
}

/// Gives back what the old L1 table led to, and the table.
fn give_back_left(image: &mut Qcow2, refcounts: &Refcounts) -> Result<()> {
    empty::give_back(image, refcounts, empty::Table::Left)?;
    let old = image.header().l1_offset;
    image.reload_header()?;
    free_table(image, refcounts, old)
}

fn free_table(image: &Qcow2, refcounts: &Refcounts, at: HostOffset) -> Result<()> {
    let geometry = image.geometry();
    let first = at.get() >> geometry.cluster_bits();
    let clusters: Vec<_> = (first..first + geometry.clusters_for(image.header().l1_bytes())).collect();
    refcounts.lower(image, &clusters)?;
    image.barrier()
}

/// Moves the L1 table towards the start of the file, so that the file can be cut behind it. The new
/// table had to lie where there was room beside all the old data.
fn move_down(image: &mut Qcow2, refcounts: &Refcounts) -> Result<()> {
    let present = image.header().l1_offset;
    let clusters = image.geometry().clusters_for(image.header().l1_bytes());
    let lower = Allocator::find_run(image, refcounts, clusters)?
        .is_some_and(|run| run.start << image.geometry().cluster_bits() < present.get());
    if !lower {
        return Ok(());
    }
    let table = new_table(image, refcounts)?;
    image.switch_header(40..48, |header| header.l1_offset = table)?;
    image.barrier()?;
    free_table(image, refcounts, present)
}

#[cfg(test)]
#[path = "empty_onto_tests.rs"]
mod tests;
