//! Opens a chain, shows its layers, reads some bytes of the disk, and merges the chain into its bottom layer:
//!
//! ```console
//! $ cargo run -p qcow2 --example merge -- vm.qcow2 1048576
//! ```

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use qcow2::Result;
use qcow2::chain::{Chain, OpenOptions, Policy};
use qcow2::error::shown;
use qcow2::merge::{Commit, CommitOptions, Prepared, Silent, heal};
use qcow2::storage::OsHost;

/// Shows and merges the chain of `active`, and prints 16 bytes of its disk from `offset` on.
pub(crate) fn merge_chain(active: &Path, offset: u64, out: &mut dyn Write) -> Result<()> {
    // Images may name other files of this system, but only in the folder where the active image lies.
    let folder = active.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let open = OpenOptions::new(Policy::deny().allow_dir(folder));
    let mut say = |line: String| writeln!(out, "{line}").map_err(|e| said(active, e));

    let chain = Chain::open(&OsHost, active, &open)?;
    for (layer, bytes) in chain.layers().iter().zip(chain.supplied()?) {
        say(format!("[{}] {}: supplies {bytes} bytes", layer.index, shown(&layer.path)))?;
    }
    let mut bytes = [0; 16];
    let len = chain.reader().read_at(offset, &mut bytes)?;
    say(format!("at {offset}: {:02x?}", &bytes[..len]))?;
    drop(chain);

    let (options, never) = (CommitOptions::new(open).verified(), AtomicBool::new(false));
    for image in heal(&OsHost, active, &options)? {
        say(format!("{}: a power cut had torn its header; it is whole again", shown(&image)))?;
    }
    let prepared = Commit::prepare(Arc::new(OsHost), active, &options, &never)?;
    match &prepared {
        Prepared::Merge(commit) => say(commit.plan().to_string())?,
        Prepared::Finish(unfinished) => say(format!("to finish: {}", unfinished.settled().reason))?,
        Prepared::Nothing(nothing) => say(format!("nothing to do: {}", nothing.settled().reason))?,
    }
    let report = prepared.execute(&Silent, &never)?;
    say(format!("{} bytes were copied", report.totals.bytes_to_copy))
}

/// What is said cannot be written.
fn said(active: &Path, error: io::Error) -> qcow2::Error {
    qcow2::Error::io(active, qcow2::FileOp::Write, None, error)
}

#[allow(dead_code, reason = "the test calls what it calls")]
fn main() -> Result<()> {
    let mut words = std::env::args_os().skip(1);
    let active = words.next().unwrap_or_else(|| "vm.qcow2".into());
    let offset = words.next().and_then(|word| word.to_str()?.parse().ok()).unwrap_or(0);
    merge_chain(Path::new(&active), offset, &mut io::stdout())
}
