//! Handles unfinished snapshots, whose client was killed before the switch.

use std::path::PathBuf;

use qmp_client::{Connection, Error, Undone, UnfinishedSnapshot, unfinished_snapshots};

use super::trouble::Session;
use crate::failure::Failure;
use crate::output::Console;

/// Undoes it, and says so. New files are about to be made in `folders`.
pub(super) fn undo(
    session: &Session<'_>,
    monitor: &Connection,
    folders: &[PathBuf],
    console: &Console,
) -> Result<(), Failure> {
    undo_all(monitor, folders, console).map_err(|e| session.failure(&e))
}

/// The same, where there is no session.
pub(super) fn undo_all(monitor: &Connection, folders: &[PathBuf], console: &Console) -> Result<(), Error> {
    for left in unfinished_snapshots(monitor)? {
        let file = left.file.display();
        let what = "a snapshot was stopped before any disk wrote there";
        match left.undo(monitor, folders)? {
            Undone::Removed => console.note(&format!("removed {file}: {what}")),
            Undone::FileStays => console.note(&format!(
                "closed {file} in QEMU: {what}; the file stays, as nothing shows that this QEMU made it, or as it is not empty"
            )),
            Undone::UnderWay => console.note(&format!("left {file} alone: its snapshot is being taken")),
            _ => console.note(&format!("closed {file} in QEMU: {what}")),
        }
    }
    Ok(())
}

/// Reports unfinished snapshots, and changes nothing.
pub(super) fn tell(session: &Session<'_>, monitor: &Connection, console: &Console) -> Result<(), Failure> {
    let left = unfinished_snapshots(monitor).map_err(|e| session.failure(&e))?;
    for UnfinishedSnapshot { file, .. } in left {
        console.note(&format!(
            "a snapshot into {} was stopped before any disk wrote there; to undo it: {}",
            file.display(),
            session.other(&["recover"])
        ));
    }
    Ok(())
}
