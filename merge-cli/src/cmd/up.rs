//! What `pull` and `rebase` share: an image takes data in, and shows the same all the while.

use std::path::Path;

use qcow2::chain::OpenOptions;
use qcow2::merge::{self, CommitOptions, UpReport};
use qcow2::storage::OsHost;

use super::open;
use crate::call::Call;
use crate::failure::Failure;
use crate::output::{Console, size};

/// Makes headers of a chain whole that a power cut has torn.
pub(super) fn heal(
    active: &Path,
    open: &OpenOptions,
    journal_dir: Option<&Path>,
    call: &Call,
    console: &Console,
) -> Result<(), Failure> {
    let mut options = CommitOptions::new(open.clone());
    options.journal_dir = journal_dir.map(Path::to_owned);
    let healed = merge::heal(&OsHost, active, &options).map_err(|e| Failure::engine(&e, call))?;
    open::tell_healed(&healed, console);
    Ok(())
}

/// How it came out; `afterwards` says what lies below the image now.
pub(super) fn result(afterwards: &str, report: &UpReport) -> String {
    let mut lines = vec![format!(
        "{afterwards}: {} copied in {}",
        size::short(report.totals.bytes_to_copy),
        size::duration(report.elapsed.as_secs_f64())
    )];
    if let Some(digest) = report.digest {
        lines.push(format!("verified: the guest sees the same bytes, digest {digest:08x}"));
    }
    lines.join("\n")
}
