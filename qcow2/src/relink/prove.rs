//! Whether the file of a new name is the file that an image was made with.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use super::plan::{Proof, RelinkOptions, Vouched};
use super::unfinished::refuse_unfinished;
use crate::chain::view::View;
use crate::chain::{BackingName, Chain, DataFile, Layer, OpenOptions};
use crate::compare::compare;
use crate::error::{Doubt, Error, FileOp, Result};
use crate::format::Cluster0;
use crate::image::{Image, ImageFormat};
use crate::journal;
use crate::storage::{Access, FileId, FileKind, Host, LockMode, if_there};
use crate::transfer::Progress;

/// What there is to judge by.
#[derive(Clone, Copy)]
pub(super) struct Evidence<'a> {
    pub(super) host: &'a dyn Host,
    /// The chain with the new names.
    pub(super) chain: &'a Chain,
    /// What the header says now.
    pub(super) old: &'a Cluster0,
    pub(super) options: &'a RelinkOptions,
    pub(super) progress: &'a dyn Progress,
    pub(super) cancel: &'a AtomicBool,
}

/// A proof, or why there is none.
type Proved = std::result::Result<Proof, Doubt>;

/// Whether `below` is the backing file that the image at `image` was made with.
///
/// # Errors
/// [`Error::Cancelled`]; the system's, where it concerns what is not compared alone.
pub(super) fn backing(evidence: &Evidence<'_>, image: &Path, below: &Layer) -> Result<Proved> {
    let Evidence { host, old, options, .. } = *evidence;
    let written = old.backing_name.as_deref().unwrap_or_default();
    let name = match BackingName::parse(written) {
        Ok(name) => name,
        Err(why) => return Ok(Err(not_local(written, why))),
    };
    let path = name.resolve(image);
    let declared = old.backing_format().or_else(|| name.format().map(str::to_owned));
    let format = below.image.format();
    let same_format = declared.as_deref().is_none_or(|declared| is_format(declared, format));
    let stat = match if_there(host.stat(&path)) {
        Ok(Some(stat)) => stat,
        Ok(None) => return gone(evidence, &path, below, same_format && declared.is_some()),
        Err(e) => return Ok(Err(unreadable(&Error::io(&path, FileOp::Stat, None, e)))),
    };
    if stat.id == below.id {
        return Ok(match declared {
            Some(declared) if !same_format => Err(Doubt::Format { old: declared, new: format.name() }),
            _ => Ok(Proof::SameFile),
        });
    }
    let Some(declared) = declared else { return Ok(Err(Doubt::NoFormat { old: path })) };
    if let Err(what) = name.check_kind(stat.kind) {
        return Ok(Err(Doubt::Unreadable { why: format!("{} is {what}", crate::error::shown(&path)) }));
    }
    let open = OpenOptions {
        lock: true,
        access: Default::default(),
        active_format: ImageFormat::from_name(&declared).or(Some(ImageFormat::Raw)),
        ..options.open.clone()
    };
    let chain = match allowed(evidence, &path).and_then(|()| Chain::open(host, &path, &open)) {
        Ok(chain) => chain,
        Err(e) => return Ok(Err(unreadable(&e))),
    };
    refuse_unfinished(host, &chain, options.journal_dir.as_deref())?;
    or_doubt(same_bytes(evidence, (&path, stat.id, &chain), below))
}

/// Whether a header's word for a format means `format`.
fn is_format(declared: &str, format: ImageFormat) -> bool {
    match declared {
        "file" | "host_device" => format == ImageFormat::Raw,
        other => ImageFormat::from_name(other) == Some(format),
    }
}

/// Whether the caller's policy allows a file that only the old header names.
fn allowed(evidence: &Evidence<'_>, path: &Path) -> Result<()> {
    let Evidence { host, options, .. } = *evidence;
    let real = host.canonicalize(path).map_err(|e| Error::io(path, FileOp::Resolve, None, e))?;
    match options.open.policy.allows(host, &real) {
        true => Ok(()),
        false => Err(Error::refused(path, crate::Refusal::OutsideAllowed { file: real })),
    }
}

/// Compares what the old file and the new one show.
fn same_bytes(
    evidence: &Evidence<'_>,
    (path, id, old): (&Path, FileId, &Chain),
    below: &Layer,
) -> Result<Proved> {
    if old.layer(old.active())?.id != id {
        return Err(Error::refused(path, crate::Refusal::NameMoved));
    }
    // The chain that ends above a missing file would show zeros in its place.
    let lowest = evidence.chain.layer(0)?;
    if lowest.image.as_qcow2().is_some_and(|image| image.cluster0().backing_name.is_some()) {
        let missing = format!("the backing file of {} is missing", crate::error::shown(&lowest.path));
        return Ok(Err(Doubt::Unreadable { why: missing }));
    }
    let (was, now) = (old.layer(old.active())?.image.virtual_size(), below.image.virtual_size());
    if was != now {
        return Ok(Err(Doubt::Size { old: path.to_owned(), size: was, new: now }));
    }
    let (was, now) = (old.images(), evidence.chain.images());
    let top = evidence.chain.active().saturating_sub(1);
    views_are_same(evidence, path, View::new(&was, 0, old.active()), View::new(&now, 0, top))
}

fn views_are_same(evidence: &Evidence<'_>, path: &Path, was: View<'_>, now: View<'_>) -> Result<Proved> {
    let found = compare(was, now, evidence.progress, evidence.cancel)?;
    Ok(match found.first_difference {
        None => Ok(Proof::SameContent),
        Some(at) => Err(Doubt::Content { old: path.to_owned(), at }),
    })
}

/// What fails where something is only compared is a doubt, and no error.
fn or_doubt(compared: Result<Proved>) -> Result<Proved> {
    match compared {
        Err(Error::Cancelled) => Err(Error::Cancelled),
        Err(e) => Ok(Err(unreadable(&e))),
        proved => proved,
    }
}

fn unreadable(error: &Error) -> Doubt {
    Doubt::Unreadable { why: error.to_string() }
}

fn not_local(written: &[u8], why: String) -> Doubt {
    use std::os::unix::ffi::OsStringExt;
    Doubt::NotLocal { old: std::ffi::OsString::from_vec(written.to_vec()), why }
}

/// What the new file, a journal beside it or a mark in the image says, where nothing is left at the old name.
fn gone(evidence: &Evidence<'_>, old: &Path, below: &Layer, is_as_declared: bool) -> Result<Proved> {
    let Evidence { host, chain, options, .. } = *evidence;
    if is_recorded(evidence, old, below)? {
        return Ok(Ok(Proof::Recorded));
    }
    let header = evidence.old;
    let mark = header.emptied_onto().or_else(|| header.merged_into()).filter(|base| base.is_absolute());
    if let Some(base) = mark
        && is_as_declared
        && if_there(host.stat(&base)).is_ok_and(|stat| stat.is_some_and(|stat| stat.id == below.id))
    {
        return Ok(Ok(Proof::Marked));
    }
    if options.vouched == Vouched::Folder && is_as_declared {
        let (size, above) = (below.image.virtual_size(), chain.layer(chain.active())?.image.virtual_size());
        // Overlays are often made larger than their base. The size of a format that is not read here is not known.
        let is_known = !matches!(below.image, Image::Foreign(_));
        return Ok(match is_known && (size == 0 || size > above) {
            true => Err(Doubt::Fit { size, above }),
            false => Ok(Proof::MovedFolder),
        });
    }
    Ok(Err(Doubt::Gone { old: old.to_owned() }))
}

/// Whether a journal beside the new file, of a merge that is done but for removing files, stamps it under the old name.
fn is_recorded(evidence: &Evidence<'_>, old: &Path, below: &Layer) -> Result<bool> {
    let (host, dir) = (evidence.host, evidence.options.journal_dir.as_deref());
    let file = &**below.image.file();
    let found = journal::find(host, &below.path, file, dir, Access::Read, journal::JOURNAL)?;
    Ok(found.is_some_and(|found| {
        let target = found.journal.header().targets.first();
        found.is_same_file() && target.is_some_and(|target| target.path == old)
    }))
}

/// Whether `data` is the external data file that the image at `image` was made with.
///
/// # Errors
/// [`Error::Cancelled`].
pub(super) fn data_file(
    evidence: &Evidence<'_>,
    image: &Path,
    layer: &Layer,
    data: &DataFile,
) -> Result<Proved> {
    let Evidence { host, old, options, .. } = *evidence;
    let written = old.data_file_name().unwrap_or_default();
    let name = match BackingName::parse_data_file(written) {
        Ok(name) => name,
        Err(why) => return Ok(Err(not_local(written, why))),
    };
    let path = name.resolve(image);
    let now = || Image::open(&data.path, layer.image.data_file().clone(), ImageFormat::Raw, None);
    let stat = match if_there(host.stat(&path)) {
        Ok(Some(stat)) => stat,
        Ok(None) if options.vouched == Vouched::Folder => {
            let (size, above) = (now()?.virtual_size(), layer.image.virtual_size());
            // A raw data file is as long as the disk; another one holds clusters wherever it has room.
            let is_short = size == 0 || (old.header.data_file_raw() && size < above);
            return Ok(if is_short { Err(Doubt::Fit { size, above }) } else { Ok(Proof::MovedFolder) });
        }
        Ok(None) => return Ok(Err(Doubt::Gone { old: path })),
        Err(e) => return Ok(Err(unreadable(&Error::io(&path, FileOp::Stat, None, e)))),
    };
    if stat.id == data.id {
        return Ok(Ok(Proof::SameFile));
    }
    if !matches!(stat.kind, FileKind::Regular | FileKind::Block) {
        return Ok(Err(Doubt::Unreadable { why: format!("{} is no file", crate::error::shown(&path)) }));
    }
    let same = || {
        allowed(evidence, &path)?;
        let file = host.open(&path, Access::Read).map_err(|e| Error::io(&path, FileOp::Open, None, e))?;
        let opened = file.stat().map_err(|e| Error::io(&path, FileOp::Stat, None, e))?;
        if opened.id != stat.id {
            return Err(Error::refused(&path, crate::Refusal::NameMoved));
        }
        if file.lock(LockMode::Read).is_err() {
            return Err(Error::InUse { path: path.clone(), holders: host.holders(stat.id) });
        }
        let (was, now) = (Image::open(&path, file, ImageFormat::Raw, None)?, now()?);
        if was.virtual_size() != now.virtual_size() {
            let (size, new) = (was.virtual_size(), now.virtual_size());
            return Ok(Err(Doubt::Size { old: path.clone(), size, new }));
        }
        views_are_same(evidence, &path, View::new(&[&was], 0, 0), View::new(&[&now], 0, 0))
    };
    or_doubt(same())
}
