//! Tidies up after a live merge: removes or empties its obsolete files, or keeps them for a reason.

mod layers;
mod reason;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use qcow2::stamp::Stamp;

use super::discover::Files;
use super::verdict::Switched;
use crate::state::Kind;

pub use layers::{Tidied, TidyOptions};
pub(crate) use layers::{Tidy, id};
pub use reason::StaysReason;

/// Removes or empties the obsolete layers of a merge, as far as QEMU has closed them. The merge must have
/// switched, and base must be durable.
pub(crate) fn after(switched: Switched<'_>, files: &Files, options: &TidyOptions) -> Tidied {
    let state = switched.state();
    let mut tidied = Tidied::default();
    let mut obsolete = Vec::new();
    for layer in state.merged() {
        let path = PathBuf::from(&layer.file);
        if state.kind == Kind::Pull {
            // A pull writes nothing to these layers, and other images may use them.
            tidied.obsolete.push(path);
        } else if !tidied.kept.is_empty() {
            // Whoever uses the layer that is kept reads through those below it.
            tidied.kept.push((path, StaysReason::BelowKept));
        } else if let Some(stamp) = &layer.stamp {
            if is_gone(&path) {
                // An earlier call has removed it, or the user.
                continue;
            }
            match id(layer) {
                None => tidied.kept.push((path, StaysReason::OtherFile)),
                Some(id) if files.has_open(id) => {
                    tidied.kept.push((path, StaysReason::OpenInQemu));
                }
                // The host may have restarted since, which can change the device number of a file system: take
                // the present id.
                Some(id) => obsolete.push((layer, Stamp { path, id, ..stamp.clone() })),
            }
        } else {
            tidied.stale.push((path, StaysReason::NotHere));
        }
    }
    // This is short work, so it cannot be cancelled.
    let cancel = AtomicBool::new(false);
    Tidy { switched, options, dry_run: false, cancel: &cancel }.run(&obsolete, &mut tidied);
    tidied
}

fn is_gone(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound)
}
