//! Completes a layer that a merge has emptied, but that lacks the name of base and the last mark, because the
//! merge was stopped behind the switch of the chain.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::chain::Chain;
use crate::error::{Error, FileOp, Result};
use crate::format::{Cluster0, is_qcow2};
use crate::image::Qcow2;
use crate::image::rewrite;
use crate::journal::{Edit, edit_headers};
use crate::merge::options::CommitOptions;
use crate::merge::report::Report;
use crate::merge::switch::mark::mark_of;
use crate::merge::switch::relink;
use crate::storage::{
    Access, FileKind, Host, LockMode, Owner, Place, Storage, leads_nowhere, lock, may_be_unlocked,
};
use crate::units::GuestOffset;

/// Relinks the image at `path` to base, and sets the last mark. The image must have the first mark of this
/// merge and be empty, so that it shows the same disk whatever it names; and the journal's `owner` must be able
/// to write it. `chain` has base, if there is a chain.
///
/// # Errors
/// [`Error::InUse`]; the system's.
pub(crate) fn finish(
    host: &dyn Host,
    path: &Path,
    owner: &Owner,
    base: &Path,
    chain: Option<&Chain>,
    options: &CommitOptions,
    report: &mut Report,
) -> Result<()> {
    let failed = |op| move |e| Error::io(path, op, None, e);
    // The journal noted a path without links.
    let place = match Place::at(host, path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) if leads_nowhere(&e) && host.canonicalize(path).is_ok() => return Ok(()),
        place => place.map_err(failed(FileOp::Resolve))?,
    };
    let stat = match place.stat(host) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        stat => stat.map_err(failed(FileOp::Stat))?,
    };
    let is_file = matches!(stat.kind, FileKind::Regular | FileKind::Block);
    let is_believed = owner.may_speak_for(&stat.owner, host.user());
    if !is_file || !is_believed || !options.open.policy.allows(host, path) {
        return Ok(());
    }
    let mut magic = [0; 4];
    let look = place.open(host, Access::Read).map_err(failed(FileOp::Open))?;
    look.read_exact_or_zero(&mut magic, 0).map_err(failed(FileOp::Read))?;
    if !is_qcow2(&magic) || !is_marked(&Qcow2::read_cluster0(path, &*look)?, base) {
        return Ok(());
    }
    drop(look);
    let file = place.open(host, Access::ReadWrite).map_err(failed(FileOp::Open))?;
    if file.stat().map_err(failed(FileOp::Stat))?.id != stat.id {
        return Ok(());
    }
    lock(host, path, &*file, LockMode::Write)?;
    may_be_unlocked(host, path, stat.id, &*file, Access::ReadWrite, options.open.no_locks)?;
    // Its tables tell whether it is empty: its data file need not be opened.
    let image = Qcow2::open(path, file.clone(), Some(file))?;
    if image.header().is_dirty()
        || !is_marked(image.cluster0(), base)
        || image.next_allocated(GuestOffset::ZERO)?.is_some()
    {
        return Ok(());
    }
    let base_id = host.stat(base).map_err(|e| Error::io(base, FileOp::Stat, None, e))?.id;
    let mut layers = chain.iter().flat_map(|chain| chain.layers());
    let layer = layers.find(|layer| layer.id == base_id);
    let name = match layer {
        Some(layer) => relink::name_of_base(host, (path, image.cluster0()), layer)?,
        None => None,
    };
    let backing = name.as_ref().map(|(name, format)| (name.as_os_str(), *format));
    let planned = relink::plan_merged(&rewrite::read_cluster(&image)?, (mark_of(&image)?, base), backing);
    let Some((switch, has_mark)) = planned else { return Ok(()) };
    let writes: Vec<_> = switch.writes.into_iter().map(|write| (write.offset, write.bytes)).collect();
    let edit = Edit { path, file: &**image.file(), writes, atomic: switch.atomic };
    if !edit.writes.is_empty() {
        edit_headers(host, &[edit], options.journal_dir.as_deref())?;
    }
    if has_mark { &mut report.marked } else { &mut report.unmarked }.push(path.to_owned());
    Ok(())
}

/// Whether `file`, at `path`, is an empty qcow2 image. A damaged image counts as not empty.
///
/// # Errors
/// It cannot be read.
pub(crate) fn is_empty(path: &Path, file: Arc<dyn Storage>) -> Result<bool> {
    let mut magic = [0; 4];
    file.read_exact_or_zero(&mut magic, 0).map_err(|e| Error::io(path, FileOp::Read, Some(0), e))?;
    if !is_qcow2(&magic) {
        return Ok(false);
    }
    // The tables tell this, so its data file need not be opened.
    let image = Qcow2::open(path, file.clone(), Some(file));
    match image.and_then(|image| image.next_allocated(GuestOffset::ZERO)) {
        Err(e @ Error::Io { .. }) => Err(e),
        next => Ok(matches!(next, Ok(None))),
    }
}

/// Whether an image bears the mark of a merge into base. Where there was no room for a name, it has none.
pub(crate) fn is_marked(cluster0: &Cluster0, base: &Path) -> bool {
    let into = cluster0.merged_into().or_else(|| cluster0.merging_into());
    into.is_some_and(|into| into.as_os_str().is_empty() || into == base)
}
