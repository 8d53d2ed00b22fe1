//! Shows an image as one of its internal snapshots holds it.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{Qcow2, read_snapshots};
use crate::error::{Error, Result, shown};
use crate::format::{FormatError, Snapshot};

impl Qcow2 {
    /// Lets the image show its internal snapshot `name`: from now on its map is that of the snapshot's L1
    /// table, and its disk has the snapshot's size. `name` is an id or a name, tried in this order, as in QEMU.
    /// The image must not be written any more.
    ///
    /// # Errors
    /// [`Error::Usage`] with the snapshots that there are, if none fits; a snapshot table or an entry that is broken.
    pub(crate) fn show_snapshot(&mut self, name: &[u8]) -> Result<()> {
        let snapshots = read_snapshots(self.path(), &**self.file(), self.header())?;
        let by_id = snapshots.iter().find(|snapshot| snapshot.id == name);
        let Some(snapshot) = by_id.or_else(|| snapshots.iter().find(|snapshot| snapshot.name == name)) else {
            return Err(unknown(self.path(), name, &snapshots));
        };
        snapshot.validate(self.header()).map_err(|e| Error::format(self.path(), e))?;
        let end = snapshot.l1_offset.get().saturating_add(snapshot.l1_bytes());
        if end > self.file_size()? {
            let (at, found) = (snapshot.offset, snapshot.l1_offset);
            let expected = format!("a table of {} bytes inside the file", snapshot.l1_bytes());
            let e = FormatError::malformed("snapshot table entry: L1 table offset", at, found, expected);
            return Err(Error::format(self.path(), e));
        }
        self.show_tables_of(snapshot);
        self.check_number_of_tables()
    }
}

/// No snapshot has this id or name.
fn unknown(image: &Path, name: &[u8], snapshots: &[Snapshot]) -> Error {
    let text = |bytes: &[u8]| shown(OsStr::from_bytes(bytes));
    let mut said = format!("{}: no internal snapshot '{}'", shown(image), text(name));
    said.push_str(if snapshots.is_empty() { "; the image has none" } else { "; its snapshots are:" });
    for snapshot in snapshots {
        // Writing to a string cannot fail.
        let _ = write!(said, "\n  {} {}", text(&snapshot.id), text(&snapshot.name));
    }
    Error::Usage(said)
}
