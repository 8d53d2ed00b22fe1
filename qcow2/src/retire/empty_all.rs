//! Empties all layers that somebody else's merge has left above base. A configuration may have recorded the
//! whole chain; then QEMU is given every layer of it, whatever the headers say.
//!
//! The lowest layer goes first. As long as nobody has written to base since the merge, the recorded chain and
//! the chain of the headers then show the same disk at every instant: data that a layer above still shows
//! equals base's, and data that an emptied layer held is seen in base. From the top down, an old layer would
//! show through the emptied one above it. If the guest has written to base meanwhile, both chains are right
//! when the last layer is empty, in either order.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::empty_onto::{Emptied, EmptyOptions, empty_onto, is_empty_on};
use super::mark::unused;
use crate::error::{Error, FileOp, Refusal, Result};
use crate::image::ImageFormat;
use crate::merge::switch::mark::require_unchanged;
use crate::stamp::Stamp;
use crate::storage::{Access, FileId, Host};

/// Layers that QEMU has merged into base and that still lie above it.
#[derive(Clone, Copy, Debug)]
pub struct MergedLayers<'a> {
    /// The layers, the uppermost first.
    pub layers: &'a [Stamp],
    /// The old active image, which a configuration names by itself: it is not marked as merged.
    pub active: Option<FileId>,
    /// Images that may use the layers: what they show does not depend on the layers any more.
    pub chain: &'a [FileId],
    /// Where else to look for images that use the layers.
    pub scan: &'a [PathBuf],
}

/// Turns several images into empty overlays directly on `base`, each as `empty_onto` does. Returns the result
/// for each, the uppermost first. All but the active one are marked as merged.
///
/// An image that another one in the same folders or in `scan` uses keeps its data, and so do all images below
/// it: its user reads through them. The same holds for an image that somebody holds, or has written to since
/// its stamp was taken. If an image cannot be emptied for another reason, the others are emptied all the same.
///
/// # Errors
/// The search for users fails, or base does not exist. Nothing was changed then.
pub fn empty_all_onto(
    host: &dyn Host,
    left: &MergedLayers<'_>,
    base: &Path,
    format: ImageFormat,
    options: &EmptyOptions,
    cancel: &AtomicBool,
) -> Result<Vec<(PathBuf, Result<Emptied>)>> {
    let base_id = host.stat(base).map_err(|e| Error::io(base, FileOp::Open, None, e))?.id;
    let (mut free, users) = unused(host, left.layers, left.chain, left.scan)?;
    let mut needed =
        left.layers.get(free).map(|layer| Error::refused(&layer.path, Refusal::SharedBase { users }));
    for (at, layer) in left.layers.iter().enumerate().take(free) {
        if let Err(error) = is_left_alone(host, layer, base_id, options) {
            (free, needed) = (at, Some(error));
            break;
        }
    }
    let (to_empty, below) = left.layers.split_at(free);
    let emptied = to_empty.iter().rev().map(|layer| {
        let options = EmptyOptions { mark: left.active != Some(layer.id), ..options.clone() };
        empty_onto(host, layer, base, format, &options, cancel)
    });
    let emptied: Vec<_> = emptied.collect();
    let kept = below
        .iter()
        .map(|layer| Err(needed.take().unwrap_or_else(|| Error::refused(&layer.path, Refusal::ReadThrough))));
    let kept: Vec<_> = kept.collect();
    let paths = left.layers.iter().map(|layer| layer.path.clone());
    Ok(paths.zip(emptied.into_iter().rev().chain(kept)).collect())
}

/// Checks that nobody holds the layer, and that nobody but an earlier call has written to it since its stamp
/// was taken.
fn is_left_alone(host: &dyn Host, layer: &Stamp, base: FileId, options: &EmptyOptions) -> Result<()> {
    match is_empty_on(host, layer, base, &options.open) {
        Ok(true) => return Ok(()),
        Err(
            error @ (Error::InUse { .. }
            | Error::Io { .. }
            | Error::Refused { reason: Refusal::NotAsKnown { .. }, .. }),
        ) => return Err(error),
        // Any other trouble is this layer's own, and is reported when it is emptied.
        Ok(false) | Err(_) => {}
    }
    let file = host.open(&layer.path, Access::Read);
    let file = file.map_err(|e| Error::io(&layer.path, FileOp::Open, None, e))?;
    require_unchanged(host, layer, &*file)
}

#[cfg(test)]
#[path = "empty_all_tests.rs"]
mod tests;
