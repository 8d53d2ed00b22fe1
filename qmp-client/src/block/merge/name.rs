//! Finds the backing name that the overlay above top gets.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::block::graph::{Disk, Layer, Range};
use crate::error::{Error, Result};

/// The name by which the overlay above top will name base.
///
/// The name keeps the overlay's style: relative stays relative if base lies in the same folder or below it. A
/// `json:` name is never written: QEMU opens it, but offline tools do not. If base has no path, the layer above
/// base supplies the name.
///
/// # Errors
/// [`Error::BackingName`] if there is no such name, or if it leads to another file here.
pub(super) fn backing_name(
    disk: &Disk,
    range: &Range<'_>,
    above: &Layer,
    given: Option<&str>,
) -> Result<String> {
    let name = match given {
        Some(name) => name.to_owned(),
        None => proposed(disk, range, above)?,
    };
    if name.is_empty() || name.starts_with("json:") {
        return Err(refused(format!(
            "'{name}' is no backing name that every tool can read; give another one"
        )));
    }
    if let (Some(resolved), Some(base)) = (resolve(&name, &above.file), file_id(Path::new(&range.base.file)))
        && file_id(&resolved) != Some(base)
    {
        let (resolved, base) = (resolved.display(), &range.base.file);
        return Err(refused(format!("the backing name '{name}' would lead to {resolved}, not to {base}")));
    }
    Ok(name)
}

fn proposed(disk: &Disk, range: &Range<'_>, above: &Layer) -> Result<String> {
    let base = &range.base.file;
    if !base.starts_with('/') {
        // An address, or a name that is relative to QEMU's folder: trust what the layer above base says.
        let lowest = disk.layers().iter().find(|l| l.index == range.base.index + 1);
        let known = lowest.and_then(|l| l.backing.as_ref()).filter(|b| !b.name.starts_with("json:"));
        let same_folder = |b: &str| {
            has_protocol(b) || b.starts_with('/') || lowest.is_some_and(|l| folder(l) == folder(above))
        };
        return match known {
            Some(backing) if same_folder(&backing.name) => Ok(backing.name.clone()),
            _ => Err(refused(format!("no backing name for {base} is known; give one"))),
        };
    }
    let was_relative =
        above.backing.as_ref().is_some_and(|b| !b.name.starts_with('/') && !has_protocol(&b.name));
    let relative = Path::new(base).strip_prefix(folder(above)).ok().and_then(Path::to_str);
    Ok(match relative {
        Some(relative) if was_relative && relative.contains(':') => format!("./{relative}"),
        Some(relative) if was_relative => relative.to_owned(),
        _ => base.clone(),
    })
}

fn folder(layer: &Layer) -> &Path {
    Path::new(&layer.file).parent().unwrap_or(Path::new(""))
}

/// Whether QEMU takes the beginning of the name for a protocol.
fn has_protocol(name: &str) -> bool {
    name.find(':').is_some_and(|colon| !name[..colon].contains('/'))
}

/// Where a name in the header of `overlay` leads; `None` if it is no file's.
fn resolve(name: &str, overlay: &str) -> Option<PathBuf> {
    if has_protocol(name) {
        return None;
    }
    Path::new(overlay).is_absolute().then(|| Path::new(overlay).parent().map(|folder| folder.join(name)))?
}

fn file_id(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

fn refused(why: String) -> Error {
    Error::BackingName { why, takes_another: true }
}
