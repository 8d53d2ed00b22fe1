//! Cluster 0 of an opened image, rewritten as [`crate::format`] has planned it.

use std::ffi::OsStr;
use std::path::Path;

use super::Qcow2;
use crate::error::{Error, Refusal, Result};
use crate::format::{RewriteError, Switch};
use crate::units::HostOffset;

/// Cluster 0 of an opened image, as bytes.
pub(crate) fn read_cluster(image: &Qcow2) -> Result<Vec<u8>> {
    let mut cluster = vec![0; image.geometry().cluster_size() as usize];
    image.read_table(HostOffset::ZERO, &mut cluster)?;
    Ok(cluster)
}

/// Carries an edit of cluster 0 out, with a barrier behind each write, which the journal makes whole.
pub(crate) fn apply(image: &Qcow2, switch: &Switch) -> Result<()> {
    for write in &switch.writes {
        image.write(HostOffset::new(write.offset), &write.bytes)?;
        image.barrier()?;
    }
    Ok(())
}

/// An edit of cluster 0 that cannot be planned.
pub(crate) fn rewrite_error(path: &Path, name: &OsStr, error: RewriteError) -> Error {
    match error {
        RewriteError::Format(source) => Error::format(path, source),
        _ => Error::refused(path, Refusal::HeaderRoom { name: name.to_owned() }),
    }
}

/// An edit of feature bits that cannot be planned.
pub(crate) fn header_error(path: &Path, error: RewriteError) -> Error {
    match error {
        RewriteError::Format(source) => Error::format(path, source),
        why => Error::refused(path, Refusal::Header { why }),
    }
}
