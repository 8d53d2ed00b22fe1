//! The arguments of the verbs that talk to a running QEMU.

mod merge;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Subcommand};
use qmp_client::Address;

use self::merge::{COMMIT_EXAMPLES, PULL_EXAMPLES};
pub(crate) use self::merge::{EndArgs, JobArgs, LiveCommitArgs, LivePullArgs};
use crate::output::size;

/// `qmerge live`
#[derive(Debug, Args)]
#[command(subcommand_value_name = "VERB", subcommand_help_heading = "Verbs", disable_help_subcommand = true)]
pub(crate) struct LiveArgs {
    /// The monitor: path of a UNIX socket, or tcp:HOST:PORT
    ///
    /// QEMU opens one with -qmp unix:PATH,server=on,wait=off. A monitor serves one client at a time.
    /// Nothing protects one that is reached over TCP.
    #[arg(long, value_name = "ADDRESS", global = true, value_parser = address)]
    pub(crate) qmp: Option<Address>,

    #[command(subcommand)]
    pub(crate) verb: LiveVerb,
}

/// What to do with a running QEMU.
#[derive(Debug, Subcommand)]
pub(crate) enum LiveVerb {
    /// List the disks and their active images
    #[command(after_long_help = "Example:\n  qmerge live list --qmp /run/vm1/qmp.sock")]
    List,

    /// Show a disk's chain, with the layers counted from the bottom
    #[command(after_long_help = "Example:\n  qmerge live chain vda --qmp /run/vm1/qmp.sock")]
    Chain {
        /// The disk, as `live list` prints it
        disk: String,
    },

    /// Put new overlays on disks, all at one moment
    ///
    /// The active image becomes the backing file of the new one, and is no longer written. The configuration of
    /// the virtual machine must name the new image at the next start.
    #[command(
        after_long_help = "Example:\n  qmerge live snapshot vda=/vm/a.qcow2 vdb=/vm/data-a.qcow2 --qmp /run/vm1/qmp.sock"
    )]
    Snapshot {
        /// A disk, and the overlay to make for it; the file must not exist
        #[arg(required = true, value_name = "DISK=FILE", value_parser = OsStringValueParser::new().try_map(overlay))]
        overlays: Vec<Overlay>,

        /// Make unencrypted overlays on encrypted disks
        #[arg(long)]
        allow_plaintext: bool,
    },

    /// Merge layers of a disk down into a base, while the guest runs
    ///
    /// Moves the data of the layers above base, up to and including top, down into base. Below the active layer,
    /// the overlay above top then gets base as its backing file; with the active layer, which needs --active, the
    /// guest goes on writing to base after the pivot. What it sees does not change. Ctrl-C cancels the job, unless
    /// --async.
    #[command(after_long_help = COMMIT_EXAMPLES)]
    Commit(LiveCommitArgs),

    /// Merge layers of a disk up into the active one, while the guest runs
    ///
    /// No layer below is written, so other users of these layers see no change.
    #[command(after_long_help = PULL_EXAMPLES)]
    Pull(LivePullArgs),

    /// Switch a merge that was started with --async, as soon as everything is copied
    #[command(after_long_help = "Example:\n  qmerge live finish vda --qmp /run/vm1/qmp.sock")]
    Finish(EndArgs),

    /// Let the guest of an active merge write to base, as soon as everything is copied
    #[command(after_long_help = "Example:\n  qmerge live pivot vda --qmp /run/vm1/qmp.sock")]
    Pivot(EndArgs),

    /// List the jobs, also those that another client started
    Jobs,

    /// Pause the job of a disk; its progress is kept
    Pause {
        /// The disk, as `live list` prints it
        disk: String,
    },

    /// Resume the job of a disk, even one that stopped because of an error
    Resume {
        /// The disk, as `live list` prints it
        disk: String,
    },

    /// End the job of a disk without its effect
    ///
    /// The chain stays as it is, and the guest sees the same bytes. The data that a merge has copied into its
    /// base stays there: base and the layers between base and top stop being restore points.
    Cancel {
        /// The disk, as `live list` prints it
        disk: String,

        /// Look also in DIR, where the merge keeps its state
        #[arg(long, value_name = "DIR")]
        state_dir: Option<PathBuf>,
    },

    /// Limit the speed of the job of a disk
    #[command(
        after_long_help = "Examples:\n  qmerge live speed vda 50M --qmp /run/vm1/qmp.sock\n  qmerge live speed vda 0 --qmp /run/vm1/qmp.sock"
    )]
    Speed {
        /// The disk, as `live list` prints it
        disk: String,

        /// Bytes per second, with K, M, G or T; 0 lifts the limit
        #[arg(value_parser = size::parse)]
        rate: u64,
    },

    /// Recover from an interrupted merge
    ///
    /// After QEMU, this command or the host died in the middle of a merge: says which image holds the disk, and
    /// does the remaining work. If somebody has written to an image that the merge left behind, it changes
    /// nothing and says what can be done. Needs no QEMU; with --qmp it also looks beside that socket.
    #[command(
        after_long_help = "Examples:\n  qmerge live recover /vm/a.qcow2\n  qmerge live recover --qmp /run/vm1/qmp.sock\n  qmerge live recover /vm --dry-run"
    )]
    Recover(RecoverArgs),
}

/// `qmerge live recover`
#[derive(Clone, Debug, Args)]
pub(crate) struct RecoverArgs {
    /// An image of the chain, a folder, or a disk; without it, the current folder
    pub(crate) what: Option<String>,

    /// Say what would be done, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Look also in DIR, where the merge kept its state
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,

    /// Change images although their file system has no locks, so that nobody can tell whether another process uses them
    #[arg(long)]
    pub(crate) no_lock: bool,
}

/// `DISK=FILE` of `snapshot`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Overlay {
    /// The disk, as the user names it.
    pub(crate) disk: String,
    /// The file to make.
    pub(crate) file: PathBuf,
}

impl LiveVerb {
    /// The word on the command line.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::List => "list",
            Self::Chain { .. } => "chain",
            Self::Snapshot { .. } => "snapshot",
            Self::Commit(_) => "commit",
            Self::Pull(_) => "pull",
            Self::Finish(_) => "finish",
            Self::Pivot(_) => "pivot",
            Self::Jobs => "jobs",
            Self::Pause { .. } => "pause",
            Self::Resume { .. } => "resume",
            Self::Cancel { .. } => "cancel",
            Self::Speed { .. } => "speed",
            Self::Recover(_) => "recover",
        }
    }

    /// The folder that was named for the merge's state.
    pub(crate) fn state_dir(&self) -> Option<&Path> {
        match self {
            Self::Commit(args) => args.job.state_dir.as_deref(),
            Self::Pull(args) => args.job.state_dir.as_deref(),
            Self::Finish(args) | Self::Pivot(args) => args.state_dir.as_deref(),
            Self::Cancel { state_dir, .. } => state_dir.as_deref(),
            Self::Recover(args) => args.state_dir.as_deref(),
            _ => None,
        }
    }

    /// Whether it only reads.
    pub(crate) fn only_looks(&self) -> bool {
        match self {
            Self::List | Self::Chain { .. } | Self::Jobs => true,
            Self::Commit(args) => args.job.dry_run,
            Self::Pull(args) => args.job.dry_run,
            _ => false,
        }
    }
}

fn address(text: &str) -> Result<Address, String> {
    text.parse().map_err(|error: qmp_client::Error| error.to_string())
}

fn overlay(text: OsString) -> Result<Overlay, &'static str> {
    let bytes = text.as_bytes();
    let sign = bytes.iter().position(|byte| *byte == b'=').filter(|at| (1..bytes.len() - 1).contains(at));
    let (disk, file) = sign.and_then(|at| bytes.split_at_checked(at)).ok_or(FORM)?;
    let disk = str::from_utf8(disk).map_err(|_| "no disk has such a name: QEMU's are UTF-8")?;
    // A file may have any name. Whether QEMU can be given that name is checked later.
    let file = OsStr::from_bytes(file.strip_prefix(b"=").unwrap_or_default());
    Ok(Overlay { disk: disk.to_owned(), file: file.into() })
}

const FORM: &str = "write DISK=FILE, as in vda=/vm/new.qcow2";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlays_split_at_the_first_sign() {
        let overlay = |text: &[u8]| overlay(OsStr::from_bytes(text).to_owned());
        assert_eq!(overlay(b"vda=/a=b"), Ok(Overlay { disk: "vda".into(), file: "/a=b".into() }));
        let latin1 = PathBuf::from(OsStr::from_bytes(b"\xe4.img"));
        assert_eq!(overlay(b"vda=\xe4.img"), Ok(Overlay { disk: "vda".into(), file: latin1 }));
        for bad in [&b"vda"[..], b"=/a", b"vda=", b"", b"=", b"\xe4=/a"] {
            assert!(overlay(bad).is_err(), "{bad:?}");
        }
    }
}
