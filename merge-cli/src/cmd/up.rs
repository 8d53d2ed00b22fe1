//! What `pull` and `rebase` share: an image takes data in, and shows the same all the while.

use std::path::Path;

use qcow2::merge::{self, CommitOptions, Totals, UpOptions, UpReport};
use qcow2::storage::OsHost;

use super::open;
use crate::call::Call;
use crate::cli::UpArgs;
use crate::failure::Failure;
use crate::output::human::{Fields, plural};
use crate::output::{Console, size};

pub(super) fn options(args: &UpArgs) -> UpOptions {
    let mut options = UpOptions::new(open::options(&args.open));
    options.verify = args.verify;
    options.allow_snapshot_change = args.allow_snapshot_change;
    options.journal_dir.clone_from(&args.journal_dir);
    options
}

/// Makes headers of a chain whole that a power cut has torn.
pub(super) fn heal(
    active: &Path,
    options: &UpOptions,
    call: &Call,
    console: &Console,
) -> Result<(), Failure> {
    let mut as_commit = CommitOptions::new(options.open.clone());
    as_commit.journal_dir.clone_from(&options.journal_dir);
    let healed = merge::heal(&OsHost, active, &as_commit).map_err(|e| Failure::engine(&e, call))?;
    open::tell_healed(&healed, console);
    Ok(())
}

/// Adds to a plan what is moved, and what that takes.
pub(super) fn add_cost(fields: &mut Fields, totals: Totals, file_size_after: u64, is_room_unknown: bool) {
    fields.add("to copy", size::exact(totals.bytes_to_copy));
    fields.add("to zero", size::exact(totals.bytes_to_zero));
    if totals.clusters_to_allocate > 0 {
        fields.add("to allocate", plural(totals.clusters_to_allocate, "cluster", "clusters"));
    }
    fields.add("its file", format!("at most {} afterwards", size::exact(file_size_after)));
    if is_room_unknown {
        fields.add("not known", "whether there is room");
    }
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
