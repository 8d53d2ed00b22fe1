//! A layer that a merge has emptied, and that lacks the name of base and the last mark: the merge was stopped behind the
//! switch of the chain.

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
use crate::merge::switch::mark::Known;
use crate::merge::switch::relink;
use crate::storage::{Access, FileKind, Host, LockMode, Storage};
use crate::units::GuestOffset;

/// Gives the image at `path` base as its backing file, and the last mark. Only an image that bears the first mark of this
/// merge and holds nothing is written: whatever it names then, it shows the same. `chain` has base, if there is one.
///
/// # Errors
/// [`Error::InUse`]; the system's.
pub(crate) fn finish(
    host: &dyn Host,
    path: &Path,
    base: &Path,
    chain: Option<&Chain>,
    options: &CommitOptions,
    report: &mut Report,
) -> Result<()> {
    let (stat, real) = match host.canonicalize(path).and_then(|real| Ok((host.stat(&real)?, real))) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(|e| Error::io(path, FileOp::Stat, None, e))?,
    };
    let is_file = matches!(stat.kind, FileKind::Regular | FileKind::Block);
    if real != path || !is_file || !options.open.policy.allows(host, path) {
        return Ok(());
    }
    let mut magic = [0; 4];
    let look = host.open(path, Access::Read).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
    look.read_exact_or_zero(&mut magic, 0).map_err(|e| Error::io(path, FileOp::Read, Some(0), e))?;
    if !is_qcow2(&magic) || !is_marked(&Qcow2::read_cluster0(path, &*look)?, base) {
        return Ok(());
    }
    drop(look);
    let known = Known { no_locks: options.open.no_locks, ..Known::now(host, path)? };
    let file = known.open(host, LockMode::Write)?;
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
    let planned = relink::plan_merged(&rewrite::read_cluster(&image)?, base, backing);
    let Some((switch, has_mark)) = planned else { return Ok(()) };
    let writes: Vec<_> = switch.writes.into_iter().map(|write| (write.offset, write.bytes)).collect();
    let edit = Edit { path, file: &**image.file(), writes, atomic: switch.atomic };
    if !edit.writes.is_empty() {
        edit_headers(host, &[edit], options.journal_dir.as_deref())?;
    }
    if has_mark { &mut report.marked } else { &mut report.unmarked }.push(path.to_owned());
    Ok(())
}

/// Whether there is a qcow2 image in `file`, at `path`, that holds nothing. What is damaged holds something.
///
/// # Errors
/// It cannot be read.
pub(crate) fn is_empty(path: &Path, file: Arc<dyn Storage>) -> Result<bool> {
    let mut magic = [0; 4];
    file.read_exact_or_zero(&mut magic, 0).map_err(|e| Error::io(path, FileOp::Read, Some(0), e))?;
    if !is_qcow2(&magic) {
        return Ok(false);
    }
    // Its tables tell: its data file need not be opened.
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
