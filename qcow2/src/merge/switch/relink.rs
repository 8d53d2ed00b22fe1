//! Edits of headers once base holds the data: the overlay above top is relinked to base, and merged layers get their marks.
//!
//! Every edit is planned before the merge copies anything, because a header may have no room for the new name. The marks go
//! in two steps: `Merging` before the switch, `Merged` behind it. So a layer that a power cut leaves in between is told from
//! one that is obsolete.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::chain::{BackingName, Layer, new_backing_name};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::{Cluster0, Mark, Switch, plan_backing_switch, plan_mark, plan_mark_and_backing};
use crate::image::Qcow2;
use crate::image::rewrite::{apply, read_cluster, rewrite_error};
use crate::journal::{Edit, edit_headers};
use crate::merge::options::CommitOptions;
use crate::merge::plan::Afterwards;
use crate::merge::stack::Stack;
use crate::merge::switch::mark::mark_of;
use crate::storage::{Access, Host};

/// Decides what happens above base, and whether it fits into the headers; nothing is written.
pub(crate) fn plan(host: &dyn Host, stack: &Stack<'_>, options: &CommitOptions) -> Result<Afterwards> {
    if let Some(overlay) = stack.overlay {
        let (name, atomic) = switch(host, stack.base, overlay)?;
        return Ok(Afterwards::Relink { overlay: overlay.path.clone(), name, atomic });
    }
    if options.keep_active {
        return Ok(Afterwards::Keep);
    }
    let (name, atomic) = if stack.merged.len() == 1 {
        (None, true)
    } else {
        let (name, atomic) = switch(host, stack.base, stack.active)?;
        (Some(name), atomic)
    };
    Ok(if options.delete { Afterwards::Delete { name, atomic } } else { Afterwards::Empty { name, atomic } })
}

fn qcow2(layer: &Layer) -> Result<&Qcow2> {
    let not = || Error::refused(&layer.path, Refusal::Raw);
    layer.image.as_qcow2().ok_or_else(not)
}

/// The name that an overlay will use for base, and whether writing it is atomic.
fn switch(host: &dyn Host, base: &Layer, overlay: &Layer) -> Result<(OsString, bool)> {
    let old = qcow2(overlay)?.cluster0().backing_name.clone().unwrap_or_default();
    let name = OsString::from_vec(new_backing_name(host, &old, &overlay.path, &base.path)?);
    let switch = plan_switch(overlay, &name, base.image.format().name())?;
    Ok((name, switch.atomic))
}

fn plan_switch(overlay: &Layer, name: &OsStr, format: &str) -> Result<Switch> {
    let cluster = read_cluster(qcow2(overlay)?)?;
    plan_backing_switch(&cluster, name.as_bytes(), format).map_err(|e| rewrite_error(&overlay.path, name, e))
}

/// Relinks an overlay to base. Meanwhile a record of the edit lies beside it or in `dir`.
pub(crate) fn relink(
    host: &dyn Host,
    base: &Layer,
    overlay: &Layer,
    name: &OsStr,
    dir: Option<&Path>,
) -> Result<()> {
    let format = base.image.format().name();
    let switch = plan_switch(overlay, name, format)?;
    edit_headers(host, &edit(overlay, switch).into_iter().collect::<Vec<_>>(), dir)
}

/// Relinks an image that is written under a journal: the journal heals the edit if a power cut tears it.
pub(crate) fn relink_journaled(image: &Qcow2, name: &OsStr, format: &str) -> Result<()> {
    let cluster = read_cluster(image)?;
    let switch = plan_backing_switch(&cluster, name.as_bytes(), format)
        .map_err(|e| rewrite_error(image.path(), name, e))?;
    apply(image, &switch)
}

/// Marks layers as being merged, in parallel, and returns for each whether its header had room for the mark. A
/// layer without room, or one that cannot be written, stays as it is.
pub(crate) fn mark_merging(
    host: &dyn Host,
    layers: &[&Layer],
    base: &Path,
    dir: Option<&Path>,
) -> Result<Vec<(PathBuf, bool)>> {
    let (mut edits, mut marked) = (Vec::new(), Vec::new());
    for layer in layers {
        let switch = match is_written(layer) {
            true => plan_mark(&read_cluster(qcow2(layer)?)?, base.as_os_str().as_bytes(), Mark::Merging).ok(),
            false => None,
        };
        marked.push((layer.path.clone(), switch.is_some()));
        edits.extend(switch.and_then(|switch| edit(layer, switch)));
    }
    edit_headers(host, &edits, dir)?;
    Ok(marked)
}

/// Marks layers as merged, as [`mark_merging`] does. A layer that comes with a name for base and base's format
/// is relinked to base; if the name does not fit, it stays an empty overlay on the layer below.
pub(crate) fn mark_merged(
    host: &dyn Host,
    layers: &[(&Layer, Option<(OsString, &str)>)],
    base: &Path,
    dir: Option<&Path>,
) -> Result<Vec<(PathBuf, bool)>> {
    let (mut edits, mut marked) = (Vec::new(), Vec::new());
    for (layer, backing) in layers {
        if !is_written(layer) {
            marked.push((layer.path.clone(), false));
            continue;
        }
        let cluster = read_cluster(qcow2(layer)?)?;
        let backing = backing.as_ref().map(|(name, format)| (name.as_os_str(), *format));
        let switch = plan_merged(&cluster, (mark_of(qcow2(layer)?)?, base), backing);
        let has_mark = switch.as_ref().is_some_and(|(_, has_mark)| *has_mark);
        marked.push((layer.path.clone(), has_mark));
        edits.extend(switch.and_then(|(switch, _)| edit(layer, switch)));
    }
    edit_headers(host, &edits, dir)?;
    Ok(marked)
}

/// The edit that marks an image as merged into base and relinks it to base, and whether there is room for the
/// mark. If there is no room for the name, the image gets only the mark.
pub(crate) fn plan_merged(
    cluster: &[u8],
    (mark, base): (Mark, &Path),
    backing: Option<(&OsStr, &str)>,
) -> Option<(Switch, bool)> {
    let base = base.as_os_str().as_bytes();
    let relinked = backing.and_then(|(name, format)| {
        plan_mark_and_backing(cluster, (mark, base), name.as_bytes(), format).ok()
    });
    let Some(switch) = relinked else {
        return Some((plan_mark(cluster, base, mark).ok()?, true));
    };
    let after = switch.applied_to(cluster);
    let has_mark = Cluster0::decode(&after).is_ok_and(|cluster0| cluster0.merged_into().is_some());
    Some((switch, has_mark))
}

fn is_written(layer: &Layer) -> bool {
    layer.access == Access::ReadWrite
}

/// The name by which an overlay will name base, and base's format; `None` if the header has them already, or no
/// name leads to base.
///
/// # Errors
/// The system's.
pub(crate) fn name_of_base(
    host: &dyn Host,
    (path, cluster0): (&Path, &Cluster0),
    base: &Layer,
) -> Result<Option<(OsString, &'static str)>> {
    let Some(old) = &cluster0.backing_name else { return Ok(None) };
    let Ok(named) = BackingName::parse(old).map(|name| name.resolve(path)) else { return Ok(None) };
    match host.stat(&named) {
        Ok(stat) if stat.id == base.id => return Ok(None),
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(Error::io(&named, FileOp::Stat, None, e));
        }
        _ => {}
    }
    let name = match new_backing_name(host, old, path, &base.path) {
        Err(Error::Refused { .. }) => return Ok(None),
        name => name?,
    };
    Ok(Some((OsString::from_vec(name), base.image.format().name())))
}

/// Marks an active image that is being emptied, and is written under a journal; with another backing file, if one is given.
pub(crate) fn mark_emptied(image: &Qcow2, base: &Path, backing: Option<(&OsStr, &str)>) -> Result<()> {
    let cluster = read_cluster(image)?;
    let base = base.as_os_str().as_bytes();
    let switch = match backing {
        Some((name, format)) => {
            plan_mark_and_backing(&cluster, (Mark::Emptied, base), name.as_bytes(), format)
                .map_err(|e| rewrite_error(image.path(), name, e))?
        }
        // The mark may be missing: then the next merge into base counts this image as a user of base, and
        // refuses.
        None => match plan_mark(&cluster, base, Mark::Emptied) {
            Ok(switch) => switch,
            Err(_) => return Ok(()),
        },
    };
    apply(image, &switch)
}

/// The edit of a layer's header, if there is anything to write.
fn edit(layer: &Layer, switch: Switch) -> Option<Edit<'_>> {
    let writes: Vec<_> = switch.writes.into_iter().map(|write| (write.offset, write.bytes)).collect();
    let file = &**layer.image.file();
    (!writes.is_empty()).then_some(Edit { path: &layer.path, file, writes, atomic: switch.atomic })
}
