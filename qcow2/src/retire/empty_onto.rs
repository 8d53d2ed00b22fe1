//! Turns images into empty overlays directly on base, after somebody else (QEMU) has merged them while the
//! virtual machine ran: the former active image, and the layers below it, which a recorded chain still puts
//! over base. Base is in use, and is only read.
//!
//! An offline merge relinks the overlay first and then empties it cluster by cluster: the clusters that remain
//! hide equal bytes of base, so every state in between shows the same disk. Here the guest may have written to
//! base since, and an overlay that is half empty, or relinked and still full, would show a mixture of old and
//! new. So there must be no state in between: backing name, backing format, an empty L1 table and the size of
//! the disk take effect with one write inside the header's first sector. Before that write the image shows what
//! it showed, after it it shows base. The clusters of the old table are freed when the write is durable.

use crate::error::shown;
use crate::image::rewrite;
use crate::merge::switch::empty::may_grow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::chain::{BackingName, Chain, OpenOptions, new_backing_name, open_data_file};
use crate::check::{CheckOptions, check_consistent};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::{EmptyDisk, FormatError, Mark, Switch, features, parts, plan_empty_switch};
use crate::image::alloc::Allocator;
use crate::image::refcounts::Refcounts;
use crate::image::{ImageFormat, Qcow2, bitmap_names, bitmaps, grow};
use crate::merge::switch::empty;
use crate::merge::switch::mark::{self, require_unchanged};
use crate::stamp::Stamp;
use crate::storage::{Access, FileId, Host, LockMode, Storage, if_there};
use crate::units::{GuestOffset, HostOffset};

/// What a caller may choose when an image is emptied.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct EmptyOptions {
    /// The policy and the formats for the images below base, and for external data files.
    pub open: OpenOptions,
    /// Empty an image even if its bitmaps are lost.
    pub drop_bitmaps: bool,
    /// Empty an image even if its internal snapshots change.
    pub allow_snapshot_change: bool,
    /// The least size of the image's disk, in bytes: that of the active image, because in a recorded chain a
    /// smaller layer would cut the disk off. A disk never shrinks.
    pub size: u64,
    /// Mark the image as merged into base, if its header has room: it is obsolete. Otherwise it is marked as an
    /// active image that was emptied, to which a guest may go on writing.
    pub mark: bool,
    /// The external data files that may be emptied with their image, if the caller knows them; a data file that
    /// is none of them stays as it is. `None` allows any that an image names.
    pub data_files: Option<Vec<FileId>>,
}

impl EmptyOptions {
    /// What lies below base, and external data files, are opened like this.
    pub fn new(open: OpenOptions) -> Self {
        Self { open, ..Self::default() }
    }
}

/// The result for an image that was emptied.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Emptied {
    /// The name by which it calls base.
    pub name: OsString,
    /// Whether it already was an empty overlay on base.
    pub was_empty: bool,
    /// Bytes on disk that were freed, including those of its external data file.
    pub freed: u64,
}

/// Turns `overlay` into an empty overlay directly on `base`, an image of `format`. The overlay is locked, and
/// must be the file of the stamp. Base is neither locked nor written: a running virtual machine may hold it.
/// The content of base is not compared with the overlay: the caller must know that the merge is complete.
///
/// # Errors
/// [`Error::InUse`]; [`Refusal::NotAsKnown`]; [`Error::Refused`] for an overlay that is raw, has no backing
/// file, is larger than base (unless `mark` is set), is dirty, corrupt or inconsistent, cannot become as large
/// as the options ask, or has snapshots or bitmaps that the options do not give up; and for a base of another
/// format, or one that is based on the overlay. Nothing was changed then. After an I/O error the overlay shows
/// what it showed, or base.
pub(crate) fn empty_onto(
    host: &dyn Host,
    overlay: &Stamp,
    base: &Path,
    format: ImageFormat,
    options: &EmptyOptions,
    cancel: &AtomicBool,
) -> Result<Emptied> {
    let mut image = open(host, overlay, &options.open)?;
    if let Some(known) = options.data_files.as_ref().filter(|_| image.has_data_file()) {
        let stat = image.data_file().stat().map_err(|e| Error::io(image.path(), FileOp::Stat, None, e))?;
        if !known.contains(&stat.id) {
            image.own_data_file(false);
        }
    }
    let base_id = look_at_base(host, &image, overlay.id, base, format, options)?;
    let (name, stands) = backing_name(host, &image, base, base_id)?;
    let wanted = Wanted::of(host, &image, &name, base, format, options);
    let empty = image.next_table(GuestOffset::ZERO)?.is_none();
    let cluster0 = image.cluster0();
    let same_format = cluster0.backing_format().as_deref() == Some(format.name());
    let bitmaps = cluster0.bitmaps().map_err(|e| Error::format(image.path(), e))?.is_some();
    let same_size = wanted.size == image.virtual_size();
    let mark = if options.mark { cluster0.merged_into() } else { cluster0.emptied_onto() };
    let was_empty = stands && same_format && same_size && empty && !bitmaps;
    if !was_empty && !image.header().is_sealed() {
        // An unfinished call has changed the file since its stamp was taken. Its seal says that nobody else
        // has.
        require_unchanged(host, overlay, &**image.file())?;
    }
    judge_header(&image, options, &wanted)?;
    if image.header().is_dirty() {
        return Err(Error::refused(image.path(), Refusal::Dirty));
    }
    judge_tables(&image, false, cancel)?;
    let entries = l1_entries(&image, wanted.size)?;
    plan(&image, &wanted, image.header().l1_offset, entries)?;
    let held = held(&image)?;
    let mut refcounts = Refcounts::load(&image)?;
    let moves = !empty || entries > image.header().l1_entries;
    seal(&mut image, moves)?;
    // A bitmap describes changes to data that goes away here. If it stayed, the next backup would miss changes.
    bitmaps::drop_all(&mut image, &refcounts)?;
    // Dropping the bitmaps may have cleared the seal.
    seal(&mut image, moves)?;
    if moves {
        switch(&mut image, &mut refcounts, &wanted, entries)?;
        give_back_left(&mut image, &refcounts)?;
        move_down(&mut image, &refcounts)?;
    } else if !was_empty || mark.is_none() {
        let switch = plan(&image, &wanted, image.header().l1_offset, image.header().l1_entries)?;
        rewrite::apply(&image, &switch)?;
        image.reload_header()?;
    }
    empty::finish(&mut image, &mut refcounts)?;
    let freed = held.saturating_sub(self::held(&image)?);
    Ok(Emptied { name, was_empty, freed })
}

/// Checks whether `empty_onto` could turn an image into an empty overlay on `base`, as far as its header and
/// tables tell. Nothing is locked or written. With `in_use`, a virtual machine may write to the image
/// meanwhile, and base need not hold the data yet. So trouble that QEMU mends when it closes the image is no
/// obstacle then, nor damage that is seen at another place on every look.
///
/// # Errors
/// Those of `empty_onto` that do not pass by themselves; an I/O error.
pub fn can_be_emptied(
    host: &dyn Host,
    overlay: &Path,
    base: &Path,
    format: ImageFormat,
    options: &EmptyOptions,
    in_use: bool,
    cancel: &AtomicBool,
) -> Result<()> {
    let io = |op| move |e| Error::io(overlay, op, None, e);
    let file = host.open(overlay, Access::Read).map_err(io(FileOp::Open))?;
    let id = file.stat().map_err(io(FileOp::Stat))?.id;
    let image = image_of(host, overlay, file, &OpenOptions { lock: false, ..options.open.clone() })?;
    // QEMU's job enlarges a base that is too small.
    let any_size = EmptyOptions { mark: true, ..options.clone() };
    let below = if in_use { &any_size } else { options };
    let base_id = look_at_base(host, &image, id, base, format, below)?;
    let (name, _) = backing_name(host, &image, base, base_id)?;
    let wanted = Wanted::of(host, &image, &name, base, format, options);
    judge_header(&image, options, &wanted)?;
    if !(in_use && image.header().is_dirty()) {
        judge_tables(&image, in_use, cancel)?;
    }
    let entries = l1_entries(&image, wanted.size)?;
    plan(&image, &wanted, image.header().l1_offset, entries).map(drop)
}

/// Sets a bit in the image which says that all writes from here on are ours, so that a call that was stopped
/// before the switch can be repeated. Any other writer clears the bit, as it does every autoclear bit that it
/// does not know; the switch clears it, too. Version 2 has no such bits.
fn seal(image: &mut Qcow2, moves: bool) -> Result<()> {
    if !moves || image.header().version < 3 || image.header().is_sealed() {
        return Ok(());
    }
    image.switch_header(parts::AUTOCLEAR, |header| header.autoclear |= features::SEALED)?;
    image.barrier()
}

/// What the image is to become.
struct Wanted<'a> {
    name: &'a OsStr,
    format: ImageFormat,
    size: u64,
    mark: Mark,
    /// The path of base.
    base: PathBuf,
}

impl<'a> Wanted<'a> {
    fn of(
        host: &dyn Host,
        image: &Qcow2,
        name: &'a OsStr,
        base: &Path,
        format: ImageFormat,
        options: &EmptyOptions,
    ) -> Self {
        Self {
            name,
            format,
            size: options.size.max(image.virtual_size()),
            mark: match options.mark {
                // The internal snapshots keep their data, so the image is not empty.
                true if image.header().snapshots > 0 => Mark::Merged,
                true => Mark::MergedEmpty,
                false => Mark::Emptied,
            },
            base: host.canonicalize(base).unwrap_or_else(|_| base.to_owned()),
        }
    }
}

/// The bytes that the image holds on disk, with its data file.
fn held(image: &Qcow2) -> Result<u64> {
    let io = |e| Error::io(image.path(), FileOp::Stat, None, e);
    let mut bytes = image.file().stat().map_err(io)?.allocated;
    if image.has_data_file() {
        bytes += image.data_file().stat().map_err(io)?.allocated;
    }
    Ok(bytes)
}

/// How many entries the L1 table needs for a disk of `size` bytes; at least as many as it has.
fn l1_entries(image: &Qcow2, size: u64) -> Result<u32> {
    grow::l1_growth(image, size)?;
    let needed = u32::try_from(image.geometry().l1_entries_for(size)).unwrap_or(u32::MAX);
    Ok(needed.max(image.header().l1_entries))
}

/// Whether an image is an empty overlay directly on the file `base`, or is becoming one: an unfinished call has
/// begun to empty it, and nobody else has written to it since. It is locked for writing while this is found
/// out.
///
/// # Errors
/// [`Error::InUse`]; an image that is another file now, is not qcow2, or is damaged.
pub(super) fn is_empty_on(
    host: &dyn Host,
    overlay: &Stamp,
    base: FileId,
    options: &OpenOptions,
) -> Result<bool> {
    let image = open(host, overlay, options)?;
    if image.header().is_sealed() {
        return Ok(true);
    }
    let name = image.cluster0().backing_name.as_deref().and_then(|name| BackingName::parse(name).ok());
    let is_on_base = name.map(|name| leads_to(host, &name, &image, base)).transpose()?.unwrap_or(false);
    Ok(is_on_base && image.next_table(GuestOffset::ZERO)?.is_none())
}

/// Whether a backing name of an image leads to the file `base`.
fn leads_to(host: &dyn Host, name: &BackingName, image: &Qcow2, base: FileId) -> Result<bool> {
    let path = name.resolve(image.path());
    let stat = if_there(host.stat(&path)).map_err(|e| Error::io(&path, FileOp::Stat, None, e))?;
    Ok(stat.is_some_and(|stat| stat.id == base))
}

fn open(host: &dyn Host, overlay: &Stamp, options: &OpenOptions) -> Result<Qcow2> {
    let file = mark::open(host, overlay, LockMode::Write, options.no_locks)?;
    let options =
        OpenOptions { lock: true, access: [(overlay.id, Access::ReadWrite)].into(), ..options.clone() };
    image_of(host, &overlay.path, file, &options)
}

fn image_of(host: &dyn Host, path: &Path, file: Arc<dyn Storage>, options: &OpenOptions) -> Result<Qcow2> {
    if ImageFormat::detect(path, &*file)? != ImageFormat::Qcow2 {
        return Err(Error::refused(path, Refusal::Raw));
    }
    let cluster0 = Qcow2::read_cluster0(path, &*file)?;
    cluster0.validate().map_err(|e| Error::format(path, e))?;
    let data_file = open_data_file(host, path, &*file, &cluster0, options)?;
    let owns = data_file.as_ref().is_some_and(|(data, _)| data.kept.is_none());
    let mut image = Qcow2::open(path, file, data_file.map(|(_, file)| file))?;
    image.own_data_file(owns);
    Ok(image)
}

/// Checks the rules for the overlay that its header alone decides.
fn judge_header(image: &Qcow2, options: &EmptyOptions, wanted: &Wanted<'_>) -> Result<()> {
    let header = image.header();
    let refuse = |reason| Err(Error::refused(image.path(), reason));
    if header.is_corrupt() {
        return refuse(Refusal::CorruptBit);
    }
    if header.snapshots > 0 && !options.allow_snapshot_change {
        return refuse(Refusal::Snapshots { count: header.snapshots as usize });
    }
    if header.snapshots > 0 && image.has_data_file() {
        return refuse(Refusal::SnapshotsInDataFile);
    }
    if !may_grow(image, wanted.size) {
        return refuse(Refusal::SnapshotsWithoutSize);
    }
    let names: Vec<String> = bitmap_names(image)?.into_iter().map(|bitmap| bitmap.name).collect();
    if !names.is_empty() && !options.drop_bitmaps {
        return refuse(Refusal::Bitmaps { names });
    }
    Ok(())
}

/// How often damage must be seen in tables that a guest may be changing, before it is believed.
const LOOKS: usize = 3;

/// Checks that the tables are consistent. The tables of an image in use may change while they are read, so that
/// sound ones look damaged. Real damage is found at the same place again.
fn judge_tables(image: &Qcow2, in_use: bool, cancel: &AtomicBool) -> Result<()> {
    let mut first = check_tables(image, cancel);
    for _ in 1..if in_use { LOOKS } else { 1 } {
        let Err(Error::Refused { reason: Refusal::Inconsistent { first: before, .. }, .. }) = &first else {
            break;
        };
        let again = check_tables(image, cancel);
        let is_same = matches!(
            &again,
            Err(Error::Refused { reason: Refusal::Inconsistent { first, .. }, .. }) if first == before
        );
        if !is_same {
            return Ok(());
        }
        first = again;
    }
    first
}

fn check_tables(image: &Qcow2, cancel: &AtomicBool) -> Result<()> {
    let data_file = image.has_data_file().then(|| &**image.data_file());
    let options = CheckOptions { cancel: Some(cancel) };
    check_consistent(image.path(), &**image.file(), data_file, &options).map(drop)
}

/// Looks at base without a lock. Only the headers of base and of the images below it are read.
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
    let layer = chain.layers().last().ok_or(Error::Broken { invariant: "a merge has all its layers" })?;
    let found = ImageFormat::detect(base, &**layer.image.file())?;
    if !format.agrees_with(found) {
        let name = shown(base);
        let found = (found != ImageFormat::Raw).then(|| found.name());
        let reason = Refusal::FormatMismatch { name, declared: format.name(), found };
        return Err(Error::refused(overlay.path(), reason));
    }
    let (size, needed) = (layer.image.virtual_size(), overlay.virtual_size());
    // A layer below the active image may be larger than the active image, and so than base.
    if size < needed && !options.mark {
        return Err(Error::refused(overlay.path(), Refusal::LargerThanBase { size: needed, base: size }));
    }
    Ok(layer.id)
}

/// The name by which the overlay calls base or will call it, and whether the header has it already.
fn backing_name(host: &dyn Host, image: &Qcow2, base: &Path, base_id: FileId) -> Result<(OsString, bool)> {
    let old = image.cluster0().backing_name.clone();
    let old = old.ok_or_else(|| Error::refused(image.path(), Refusal::NoBackingFile))?;
    // A name that is not a path leads to no file.
    let stands = match BackingName::parse(&old) {
        Ok(name) => leads_to(host, &name, image, base_id)?,
        Err(_) => false,
    };
    let name = if stands { old } else { new_backing_name(host, &old, image.path(), base)? };
    Ok((OsString::from_vec(name), stands))
}

/// Points the header at base and at an empty L1 table, with one write. `image` keeps the old header in memory:
/// the clusters that it refers to are still to be freed.
fn switch(image: &mut Qcow2, refcounts: &mut Refcounts, wanted: &Wanted<'_>, entries: u32) -> Result<()> {
    let clusters = image.geometry().clusters_for(u64::from(entries) * 8);
    if let Some(table) = grow::make_room(image, refcounts, clusters, clusters)? {
        table.publish(image, refcounts)?;
    }
    let table = new_table(image, refcounts, clusters)?;
    let switch = plan(image, wanted, table, entries)?;
    rewrite::apply(image, &switch)
}

/// Plans the edit of the header, and refuses one that does not take effect in one sector.
fn plan(image: &Qcow2, wanted: &Wanted<'_>, l1_offset: HostOffset, l1_entries: u32) -> Result<Switch> {
    let cluster = rewrite::read_cluster(image)?;
    let disk = EmptyDisk {
        name: wanted.name.as_bytes(),
        format: wanted.format.name(),
        l1_offset,
        l1_entries,
        size: wanted.size,
        mark: (wanted.mark, wanted.base.as_os_str().as_bytes()),
    };
    let switch = plan_empty_switch(&cluster, &disk)
        .map_err(|e| rewrite::rewrite_error(image.path(), wanted.name, e))?;
    if !switch.atomic {
        return Err(Error::refused(image.path(), Refusal::HeaderRoom { name: wanted.name.to_owned() }));
    }
    Ok(switch)
}

/// Writes an empty L1 table into the first free clusters. It is durable and has its refcounts; nothing refers
/// to it yet.
fn new_table(image: &Qcow2, refcounts: &Refcounts, clusters: u64) -> Result<HostOffset> {
    let geometry = image.geometry();
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

/// Frees the clusters that the old L1 table refers to, then the table itself.
fn give_back_left(image: &mut Qcow2, refcounts: &Refcounts) -> Result<()> {
    empty::free_clusters(image, refcounts, empty::FreedTable::Obsolete)?;
    let (old, bytes) = (image.header().l1_offset, image.header().l1_bytes());
    image.reload_header()?;
    free_table(image, refcounts, old, bytes)
}

fn free_table(image: &Qcow2, refcounts: &Refcounts, at: HostOffset, bytes: u64) -> Result<()> {
    let geometry = image.geometry();
    let first = at.get() >> geometry.cluster_bits();
    let clusters: Vec<_> = (first..first + geometry.clusters_for(bytes)).collect();
    refcounts.lower(image, &clusters)?;
    image.barrier()
}

/// Moves the L1 table towards the start of the file, so that the file can be cut behind it. When the table was
/// written, all the old data was still in the way.
fn move_down(image: &mut Qcow2, refcounts: &Refcounts) -> Result<()> {
    let (present, bytes) = (image.header().l1_offset, image.header().l1_bytes());
    let clusters = image.geometry().clusters_for(bytes);
    let lower = Allocator::find_run(image, refcounts, clusters)?
        .is_some_and(|run| run.start << image.geometry().cluster_bits() < present.get());
    if !lower {
        return Ok(());
    }
    let table = new_table(image, refcounts, clusters)?;
    image.switch_header(parts::L1_OFFSET, |header| header.l1_offset = table)?;
    image.barrier()?;
    free_table(image, refcounts, present, bytes)
}

#[cfg(test)]
#[path = "empty_onto_tests.rs"]
pub(super) mod tests;
