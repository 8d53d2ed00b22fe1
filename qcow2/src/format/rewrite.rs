//! Edits of cluster 0 of an existing image, planned as writes: pure, so that whether an edit fits,
//! and whether it is atomic, is known before anything is touched.
//!
//! A sector of 512 bytes is written wholly or not at all; more is not promised by any disk. So an
//! edit first puts new bytes where the old header does not look (behind its extensions and beside its
//! backing name), and then changes everything that the old header does look at by one write inside
//! one sector: backing name and format switch together, or not at all. The feature name table, which
//! only serves messages and which QEMU writes anew with every header, is given up where that makes
//! the edit atomic or makes it fit. Everything else is kept verbatim.

use std::ops::Range;

use super::build::check_backing;
use super::cluster0::{Cluster0, extension_space_end, pad};
use super::extensions::{
    EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_DATA_FILE, EXT_EMPTIED_ONTO, EXT_END, EXT_FEATURE_NAMES,
    EXT_MERGED_INTO, EXT_MERGING_INTO, EXTENSION_HEAD, Extension,
};
use super::header::at;
use super::words::{PutWords, u64_at};
use super::{RewriteError, features};
use crate::units::HostOffset;

/// What a disk writes wholly or not at all, in bytes.
const SECTOR: usize = 512;

/// Bytes to be written at an offset in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Write {
    /// The host offset, in bytes.
    pub offset: u64,
    /// What to write.
    pub bytes: Vec<u8>,
}

/// The writes of an edit, in order; each must be durable before the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Switch {
    /// The writes; none if the image is as asked already.
    pub writes: Vec<Write>,
    /// Whether a crash at any instant leaves the image before or after the edit. If not, there is one
    /// write that spans sectors, and it must be journaled to survive a power cut.
    pub atomic: bool,
}

impl Switch {
    /// The first cluster of the image after the edit.
    pub(crate) fn applied_to(&self, cluster0: &[u8]) -> Vec<u8> {
        let mut after = cluster0.to_vec();
        self.writes.iter().for_each(|write| write.apply_to(&mut after));
        after
    }
}

/// Plans to change the backing file to `name` of the format `format`; `cluster0` is the image's first
/// cluster.
///
/// # Errors
/// No room, a name or format that is empty or too long, or a cluster 0 that must not be edited.
pub(crate) fn plan_backing_switch(
    cluster0: &[u8],
    name: impl AsRef<[u8]>,
    format: &str,
) -> Result<Switch, RewriteError> {
    check_backing(name.as_ref(), format)?;
    let old = OldCluster0::read(cluster0)?;
    old.choose(&[old.with_backing_format(format)], name.as_ref())
}

/// Names that an image gets for its other files; what is `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NewNames<'a> {
    /// The backing file, and its format.
    pub(crate) backing: Option<(&'a [u8], &'a str)>,
    /// The external data file.
    pub(crate) data_file: Option<&'a [u8]>,
}

/// Plans to change the names of the backing file and of the external data file together.
///
/// # Errors
/// As [`plan_backing_switch`].
pub(crate) fn plan_names(cluster0: &[u8], names: &NewNames<'_>) -> Result<Switch, RewriteError> {
    let old = OldCluster0::read(cluster0)?;
    let mut list = old.cluster0.extensions.clone();
    let mut name = old.name();
    if let Some((backing, format)) = names.backing {
        check_backing(backing, format)?;
        list = old.with_backing_format(format);
        name = backing;
    }
    if let Some(data_file) = names.data_file
        && let Some(extension) = list.iter_mut().find(|e| e.magic == EXT_DATA_FILE)
    {
        extension.data = data_file.to_vec();
    }
    old.choose(&[list], name)
}

/// Plans to remove the name of the backing file, and its format.
///
/// # Errors
/// A cluster 0 that must not be edited.
pub(crate) fn plan_backing_removal(cluster0: &[u8]) -> Result<Switch, RewriteError> {
    let old = OldCluster0::read(cluster0)?;
    let mut list = old.cluster0.extensions.clone();
    list.retain(|e| e.magic != EXT_BACKING_FORMAT);
    old.choose(&[list], b"")
}

/// What an image becomes that is emptied by one write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EmptyDisk<'a> {
    /// The name of the new backing file.
    pub name: &'a [u8],
    /// The format of the new backing file.
    pub format: &'a str,
    /// An L1 table that leads to nothing.
    pub l1_offset: HostOffset,
    /// How many entries it has.
    pub l1_entries: u32,
    /// The size of the disk, in bytes.
    pub size: u64,
    /// The mark that the image gets, and the path of base for it.
    pub mark: (Mark, &'a [u8]),
}

/// Plans to change the backing file as [`plan_backing_switch`] does, and in the same write to take another L1 table
/// and another size. Marks of merged images that are there are removed: they speak of what the old table led to. The new
/// one is empty, or left out, where there is no room for it.
///
/// # Errors
/// As [`plan_backing_switch`].
pub(crate) fn plan_empty_switch(cluster0: &[u8], disk: &EmptyDisk<'_>) -> Result<Switch, RewriteError> {
    check_backing(disk.name, disk.format)?;
    let old = OldCluster0::read(cluster0)?;
    let new = NewDisk { l1_offset: disk.l1_offset, l1_entries: disk.l1_entries, size: disk.size };
    let old = OldCluster0 { disk: Some(new), ..old };
    old.choose(&marked(old.with_backing_format(disk.format), disk.mark), disk.name)
}

/// Plans to mark an image, as [`plan_mark`] does, and in the same write to change the backing file as
/// [`plan_backing_switch`] does. The mark is empty, or left out, where there is no room for it.
///
/// # Errors
/// As [`plan_backing_switch`].
pub(crate) fn plan_mark_and_backing(
    cluster0: &[u8],
    mark: (Mark, &[u8]),
    name: &[u8],
    format: &str,
) -> Result<Switch, RewriteError> {
    check_backing(name, format)?;
    let old = OldCluster0::read(cluster0)?;
    old.choose(&marked(old.with_backing_format(format), mark), name)
}

/// A list of extensions with a mark for `base`, with an empty one, and without one.
fn marked(mut list: Vec<Extension>, (mark, base): (Mark, &[u8])) -> [Vec<Extension>; 3] {
    list.retain(|e| !Mark::is_mark(e));
    let with = |data: Vec<u8>| [list.clone(), vec![Extension::new(mark.magic(), data)]].concat();
    [with(mark.payload(base)), with(mark.payload(b"")), list]
}

/// Plans to mark the image as merged into `base` (see [`Cluster0::merged_into`]), or as being merged
/// into it (see [`Cluster0::merging_into`]), or as emptied; each mark takes the place of another. The mark is empty
/// if the path cannot be written atomically, or does not fit.
///
/// # Errors
/// No room even for an empty mark, or a cluster 0 that must not be edited.
pub(crate) fn plan_mark(cluster0: &[u8], base: impl AsRef<[u8]>, mark: Mark) -> Result<Switch, RewriteError> {
    let old = OldCluster0::read(cluster0)?;
    let with = |base: &[u8]| {
        let mut list = old.cluster0.extensions.clone();
        let mark = Extension::new(mark.magic(), mark.payload(base));
        match list.iter().position(Mark::is_mark) {
            Some(place) => {
                list.remove(place);
                list.insert(place, mark);
            }
            None => list.push(mark),
        }
        list
    };
    old.choose(&[with(base.as_ref()), with(b"")], old.name())
}

/// Which of our marks a layer gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// The layer is being merged, and is still needed until the chain has been changed.
    Merging,
    /// The layer was merged, and is not needed any more. It keeps its data.
    Merged,
    /// The layer was merged, is not needed any more, and holds nothing: what it holds later, somebody has written since.
    MergedEmpty,
    /// The active image was merged, and is an empty overlay on base (see [`Cluster0::emptied_onto`]).
    Emptied,
}

impl Mark {
    fn magic(self) -> u32 {
        match self {
            Self::Merging => EXT_MERGING_INTO,
            Self::Merged | Self::MergedEmpty => EXT_MERGED_INTO,
            Self::Emptied => EXT_EMPTIED_ONTO,
        }
    }

    /// What the mark says. No path holds a zero byte.
    fn payload(self, base: &[u8]) -> Vec<u8> {
        match self {
            Self::MergedEmpty => [base, b"\0"].concat(),
            Self::Merging | Self::Merged | Self::Emptied => base.to_vec(),
        }
    }

    fn is_mark(extension: &Extension) -> bool {
        matches!(extension.magic, EXT_MERGED_INTO | EXT_MERGING_INTO | EXT_EMPTIED_ONTO)
    }
}

/// Plans to remove the bitmaps extension and its autoclear bit. Directory, tables and bitmap data are
/// no longer referred to afterwards.
///
/// # Errors
/// A cluster 0 that must not be edited.
pub(crate) fn plan_drop_bitmaps(cluster0: &[u8]) -> Result<Switch, RewriteError> {
    let mut old = OldCluster0::read(cluster0)?;
    let mut list = old.cluster0.extensions.clone();
    list.retain(|e| e.magic != EXT_BITMAPS);
    let (incompatible, autoclear) = (old.cluster0.header.incompatible, old.cluster0.header.autoclear);
    // First the bit: without it the extension means nothing, so a crash between the two is harmless.
    let mut switch = plan_feature_bits(&old.bytes, incompatible, autoclear & !features::BITMAPS)?;
    if list.len() == old.cluster0.extensions.len() {
        // Nothing is removed, so nothing need be laid out again: that may take room for an END where there is none.
        return Ok(switch);
    }
    for write in &switch.writes {
        write.apply_to(&mut old.bytes);
    }
    let rest = OldCluster0::read(&old.bytes)?;
    let rest = rest.choose(&[list], rest.name())?;
    switch.atomic &= rest.atomic;
    switch.writes.extend(rest.writes);
    Ok(switch)
}

/// Plans to set the incompatible and autoclear feature bits of a version 3 image. Autoclear bits that
/// are not known are cleared, as for every writer. In version 2, which has no such bits, there is
/// nothing to write.
///
/// # Errors
/// A cluster 0 that must not be edited.
pub(crate) fn plan_feature_bits(
    cluster0: &[u8],
    incompatible: u64,
    autoclear: u64,
) -> Result<Switch, RewriteError> {
    let old = OldCluster0::read(cluster0)?;
    let mut new = old.bytes.clone();
    if old.cluster0.header.version >= 3 {
        put(&mut new, at::INCOMPATIBLE, &incompatible.to_be_bytes());
        put(&mut new, at::AUTOCLEAR, &(autoclear & features::KNOWN_AUTOCLEAR).to_be_bytes());
    }
    Ok(old.switch_to(&new))
}

impl Write {
    /// Does the write in memory; bytes behind the end of `file` are left out.
    pub(super) fn apply_to(&self, file: &mut [u8]) {
        if let Ok(offset) = usize::try_from(self.offset) {
            put(file, offset, &self.bytes);
        }
    }
}

/// Overwrites the bytes at `at`; nothing if they do not fit.
fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..new.len())) {
        place.copy_from_slice(new);
    }
}

/// Cluster 0 before the edit.
struct OldCluster0 {
    bytes: Vec<u8>,
    cluster0: Cluster0,
    /// Header and extensions up to their END mark.
    list: Range<usize>,
    /// The backing name.
    name: Range<usize>,
    /// The disk after the edit, where it is another one.
    disk: Option<NewDisk>,
}

/// Another L1 table, and another size in bytes. All fields lie in the header's first sector.
struct NewDisk {
    l1_offset: HostOffset,
    l1_entries: u32,
    size: u64,
}

impl OldCluster0 {
    fn read(bytes: &[u8]) -> Result<Self, RewriteError> {
        let cluster0 = Cluster0::parse(bytes)?;
        let header = &cluster0.header;
        let bytes = pad(bytes, header.geometry().cluster_size() as usize).into_owned();
        // A list without END reaches up to the name: no reader sees where else it would stop.
        let list_end = if cluster0.extensions_closed {
            cluster0.extensions_end as usize
        } else {
            extension_space_end(header, bytes.len())
        };
        let name_at = header.backing_offset as usize;
        let name_len = cluster0.backing_name.as_ref().map_or(0, Vec::len);
        Ok(Self { list: 0..list_end, name: name_at..name_at + name_len, bytes, cluster0, disk: None })
    }

    fn name(&self) -> &[u8] {
        self.cluster0.backing_name.as_deref().unwrap_or_default()
    }

    /// The extensions with another backing format, which stands where the old one stood, else first.
    fn with_backing_format(&self, format: &str) -> Vec<Extension> {
        let mut list = self.cluster0.extensions.clone();
        let place = match list.iter().position(|e| e.magic == EXT_BACKING_FORMAT) {
            Some(place) => {
                list.remove(place);
                place
            }
            None => 0,
        };
        list.insert(place, Extension::new(EXT_BACKING_FORMAT, format));
        list
    }

    /// Whether the old header looks at the byte `at`.
    fn uses(&self, at: usize) -> bool {
        self.list.contains(&at) || self.name.contains(&at)
    }

    /// The first atomic edit that gives one of `lists` with `name`; else the first that fits.
    fn choose(&self, lists: &[Vec<Extension>], name: &[u8]) -> Result<Switch, RewriteError> {
        let mut fallback = None;
        let mut needed = usize::MAX;
        for list in lists {
            let mut short = list.clone();
            short.retain(|e| e.magic != EXT_FEATURE_NAMES);
            for list in [list, &short] {
                let list = encode_list(list);
                let list_end = self.cluster0.header.header_length as usize + list.len();
                needed = needed.min(list_end + name.len());
                for name_at in self.places(list_end, name) {
                    let switch = self.switch_to(&self.edited(&list, name_at, name));
                    if switch.atomic {
                        return Ok(switch);
                    }
                    fallback.get_or_insert(switch);
                }
            }
        }
        fallback.ok_or(RewriteError::NoRoom { needed, room: self.bytes.len() })
    }

    /// Where `name` can stand behind a list that ends at `list_end`, the best places first.
    fn places(&self, list_end: usize, name: &[u8]) -> Vec<usize> {
        let room = self.bytes.len();
        let mut places = Vec::new();
        if name == self.name() {
            places.push(self.name.start);
        }
        // Right behind the list, as QEMU has it; else in the gaps that the old header leaves.
        places.extend([list_end, self.list.end.max(list_end), self.name.end, SECTOR]);
        places.push(room.saturating_sub(name.len()));
        places.retain(|&at| at >= list_end && at + name.len() <= room);
        places
    }

    /// The whole cluster after the edit. Bytes that the new header does not look at stay.
    fn edited(&self, list: &[u8], name_at: usize, name: &[u8]) -> Vec<u8> {
        let mut new = self.bytes.clone();
        let header = &self.cluster0.header;
        let offset = if name.is_empty() { 0 } else { name_at as u64 };
        put(&mut new, at::BACKING_OFFSET, &offset.to_be_bytes());
        put(&mut new, at::BACKING_LEN, &(name.len() as u32).to_be_bytes());
        if header.version >= 3 {
            let known = u64_at(&new, at::AUTOCLEAR) & features::KNOWN_AUTOCLEAR;
            put(&mut new, at::AUTOCLEAR, &known.to_be_bytes());
        }
        if let Some(disk) = &self.disk {
            put(&mut new, at::SIZE, &disk.size.to_be_bytes());
            put(&mut new, at::L1_ENTRIES, &disk.l1_entries.to_be_bytes());
            put(&mut new, at::L1_OFFSET, &disk.l1_offset.get().to_be_bytes());
        }
        put(&mut new, header.header_length as usize, list);
        put(&mut new, name_at, name);
        new
    }

    /// The writes that turn the old cluster into `new`.
    fn switch_to(&self, new: &[u8]) -> Switch {
        let changed: Vec<usize> =
            self.bytes.iter().zip(new).enumerate().filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect();
        let span = |of: &mut dyn Iterator<Item = usize>| -> Option<Write> {
            let first = of.next()?;
            let last = of.last().unwrap_or(first);
            let bytes = new.get(first..=last).unwrap_or_default().to_vec();
            Some(Write { offset: first as u64, bytes })
        };
        let mut used = changed.iter().copied().filter(|&i| self.uses(i));
        let first_used = used.next();
        let sector = first_used.unwrap_or_default() / SECTOR;
        let atomic = used.next_back().is_none_or(|last| last / SECTOR == sector);
        if !atomic {
            let whole = span(&mut changed.iter().copied());
            return Switch { writes: whole.into_iter().collect(), atomic };
        }
        // The gaps of the old header, without the sector that switches.
        let (low, high) = if self.name.is_empty() || self.name.start < self.list.end {
            (self.list.end..self.list.end, self.list.end)
        } else {
            (self.list.end..self.name.start, self.name.end)
        };
        let aside = |i: &usize| *i / SECTOR != sector;
        let mut writes = Vec::new();
        writes.extend(span(&mut changed.iter().copied().filter(|i| low.contains(i) && *i / SECTOR < sector)));
        writes.extend(span(&mut changed.iter().copied().filter(|i| low.contains(i) && *i / SECTOR > sector)));
        writes.extend(span(&mut changed.iter().copied().filter(|i| *i >= high && aside(i))));
        writes.extend(span(&mut changed.iter().copied().filter(|i| !aside(i))));
        Switch { writes, atomic }
    }
}

/// The extensions and their END mark as they stand on disk.
fn encode_list(list: &[Extension]) -> Vec<u8> {
    let mut out = Vec::with_capacity(list.iter().map(Extension::encoded_len).sum::<usize>() + EXTENSION_HEAD);
    list.iter().for_each(|e| e.encode_into(&mut out));
    out.put_u32(EXT_END);
    out.put_u32(0);
    out
}
