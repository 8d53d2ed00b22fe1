//! Arguments of the live verbs that merge.
#![allow(rustdoc::broken_intra_doc_links, reason = "the comments are help texts; [1] is an index, no link")]

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use qmp_client::Request;

use crate::cli::SafetyArgs;
use crate::output::size;

/// Examples of `live commit`.
pub(super) const COMMIT_EXAMPLES: &str = "\
Examples:
  qmerge live commit vda --top '[3]' --dry-run --qmp /run/vm1/qmp.sock        what would be done
  qmerge live commit vda --base '[1]' --top '[3]' --qmp /run/vm1/qmp.sock     the layers below the active one
  qmerge live commit vda --active --pivot --delete --qmp /run/vm1/qmp.sock    everything into the bottom layer";

/// Examples of `live pull`.
pub(super) const PULL_EXAMPLES: &str = "\
Examples:
  qmerge live pull vda --qmp /run/vm1/qmp.sock                the active image stands alone afterwards
  qmerge live pull vda --base '[1]' --qmp /run/vm1/qmp.sock   it has [1] as its backing file afterwards";

/// `qmerge live commit`
#[derive(Debug, Args)]
pub(crate) struct LiveCommitArgs {
    /// The disk, as `live list` prints it
    pub(crate) disk: String,

    /// Merge down into LAYER [default: the bottom of the chain]
    ///
    /// A layer is named by its path, its node name, or its index: [1] is the bottom, the next overlay is [2],
    /// and so on up; the disk's name before the bracket is accepted, as in vda[1].
    #[arg(long, value_name = "LAYER", conflicts_with = "shallow", help_heading = "What to merge")]
    pub(crate) base: Option<String>,

    /// Merge down into top's own backing file
    #[arg(long, help_heading = "What to merge")]
    pub(crate) shallow: bool,

    /// The highest layer that is merged [default: the active one]
    #[arg(long, value_name = "LAYER", help_heading = "What to merge")]
    pub(crate) top: Option<String>,

    /// Merge the layer that the guest writes to, too
    ///
    /// Everything is copied while the guest goes on writing. Then the job is ready, and stays so until `live
    /// pivot` lets the guest write to base, or `live cancel` leaves it where it is.
    #[arg(long, help_heading = "What to merge")]
    pub(crate) active: bool,

    /// As --active; let the guest write to base as soon as that is possible
    #[arg(long, conflicts_with_all = ["keep_overlay", "async_"], help_heading = "What to merge")]
    pub(crate) pivot: bool,

    /// As --active; but leave the guest on the active image, and base with the disk as it was at that moment
    #[arg(long, conflicts_with_all = ["delete", "async_"], help_heading = "What to merge")]
    pub(crate) keep_overlay: bool,

    /// Slow the guest's writes down, within limits, if an active merge cannot catch up with them
    #[arg(long, conflicts_with = "async_", help_heading = "How")]
    pub(crate) converge: bool,

    /// Remove the files that are no longer needed
    ///
    /// Without it they stay, as empty overlays on base. Files are removed from the top down when base is
    /// durable and QEMU has closed them, and only if they are still the files of the plan and no other image
    /// uses them.
    #[arg(long, help_heading = "How")]
    pub(crate) delete: bool,

    /// The name of base that is written into the overlay above top
    ///
    /// Without it, base's name in the style that the overlay's backing name had.
    #[arg(long, value_name = "NAME", help_heading = "How")]
    pub(crate) backing_file: Option<String>,

    #[command(flatten)]
    pub(crate) job: JobArgs,

    #[command(flatten)]
    pub(crate) safety: SafetyArgs,

    /// Merge although the old active image cannot become an empty overlay on base
    ///
    /// This happens if base is reached over NBD or another protocol, has a format that this engine does not
    /// write (VMDK, VDI, LUKS), or if the old image cannot be written. The old image stays bootable then, with
    /// old data: make sure that nothing starts from it again.
    #[arg(long, help_heading = "Safety")]
    pub(crate) allow_stale: bool,

    /// Empty or remove merged layers although their file system has no locks, so that nobody can tell whether another process uses them
    #[arg(long, help_heading = "Safety")]
    pub(crate) no_lock: bool,

    /// Merge although an encrypted layer's data goes into a base that is not encrypted
    #[arg(long, help_heading = "Safety")]
    pub(crate) allow_plaintext: bool,
}

impl LiveCommitArgs {
    /// What is asked for.
    pub(crate) fn request(&self) -> Request {
        let mut request = self.job.request(Request::commit());
        request.base.clone_from(&self.base);
        request.top.clone_from(&self.top);
        request.shallow = self.shallow;
        request.active = self.active;
        request.pivot = self.pivot;
        request.keep_overlay = self.keep_overlay;
        request.converge = self.converge;
        request.delete = self.delete;
        request.backing_file.clone_from(&self.backing_file);
        request.scan.clone_from(&self.safety.scan);
        request.allow_shared_base = self.safety.allow_shared_base;
        request.allow_stale = self.allow_stale;
        request.allow_plaintext = self.allow_plaintext;
        request.drop_bitmaps = self.safety.drop_bitmaps;
        request.allow_snapshot_change = self.safety.allow_snapshot_change;
        request.no_lock = self.no_lock;
        request
    }
}

/// `qmerge live pull`
#[derive(Debug, Args)]
pub(crate) struct LivePullArgs {
    /// The disk, as `live list` prints it
    pub(crate) disk: String,

    /// Leave LAYER and those below it [default: pull everything]
    ///
    /// A layer is named by its path, its node name, or its index: [1] is the bottom of the chain.
    #[arg(long, value_name = "LAYER", help_heading = "What to merge")]
    pub(crate) base: Option<String>,

    /// The name of LAYER that is written into the active image
    ///
    /// Without it, its name in the style that the active image's backing name had.
    #[arg(long, value_name = "NAME", requires = "base", help_heading = "How")]
    pub(crate) backing_file: Option<String>,

    #[command(flatten)]
    pub(crate) job: JobArgs,

    /// Pull although persistent bitmaps of the layers below are lost to the disk
    #[arg(long, help_heading = "Safety")]
    pub(crate) drop_bitmaps: bool,

    /// Pull although internal snapshots of the active image change: they read through the layers that it leaves
    #[arg(long, help_heading = "Safety")]
    pub(crate) allow_snapshot_change: bool,

    /// Pull although an encrypted layer's data goes into an active image that is not encrypted
    #[arg(long, help_heading = "Safety")]
    pub(crate) allow_plaintext: bool,
}

impl LivePullArgs {
    /// What is asked for.
    pub(crate) fn request(&self) -> Request {
        let mut request = self.job.request(Request::pull());
        request.base.clone_from(&self.base);
        request.backing_file.clone_from(&self.backing_file);
        request.allow_plaintext = self.allow_plaintext;
        request.drop_bitmaps = self.drop_bitmaps;
        request.allow_snapshot_change = self.allow_snapshot_change;
        request
    }
}

/// What both directions have in common.
#[derive(Debug, Args)]
pub(crate) struct JobArgs {
    /// Copy at most this many bytes per second, with K, M, G or T
    #[arg(long, value_name = "RATE", value_parser = size::parse, help_heading = "How")]
    pub(crate) bandwidth: Option<u64>,

    /// Give up after this many seconds: the job is cancelled, the chain stays as it was
    #[arg(long, value_name = "SECONDS", conflicts_with = "async_", value_parser = seconds, help_heading = "How")]
    pub(crate) timeout: Option<Duration>,

    /// Return as soon as the job has started; `live finish` or the same command ends it
    #[arg(long = "async", id = "async_", help_heading = "How")]
    pub(crate) async_: bool,

    /// Folder of the file that notes the progress of the merge [default: the active image's folder]
    #[arg(long, value_name = "DIR", help_heading = "How")]
    pub(crate) state_dir: Option<PathBuf>,

    /// Socket of the NBD server that QEMU runs [default: found automatically if the process may be looked at]
    #[arg(long, value_name = "PATH", help_heading = "How")]
    pub(crate) nbd_socket: Option<PathBuf>,

    /// Print the plan and the commands for QEMU, and change nothing
    #[arg(short = 'n', long, help_heading = "How")]
    pub(crate) dry_run: bool,
}

impl JobArgs {
    fn request(&self, mut request: Request) -> Request {
        request.speed = self.bandwidth.unwrap_or(0);
        request.wait = self.async_;
        request.nbd_socket.clone_from(&self.nbd_socket);
        request.state_dir.clone_from(&self.state_dir);
        request.dry_run = self.dry_run;
        request
    }
}

/// `qmerge live finish` and `qmerge live pivot`
#[derive(Debug, Args)]
pub(crate) struct EndArgs {
    /// The disk, as `live list` prints it
    pub(crate) disk: String,

    /// Wait at most this many seconds until everything is copied; if that is not enough, the job goes on
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: Option<Duration>,

    /// Remove the files that are no longer needed, as `live commit --delete` does
    #[arg(long)]
    pub(crate) delete: bool,

    /// Also search DIR for images that use those files, besides the folders that `live commit` searched
    /// (repeatable)
    #[arg(long, value_name = "DIR")]
    pub(crate) scan: Vec<PathBuf>,

    /// Empty or remove those files although their file system has no locks, so that nobody can tell whether another process uses them
    #[arg(long)]
    pub(crate) no_lock: bool,

    /// Pivot although the old active image cannot become an empty overlay: it stays bootable, with old data
    #[arg(long)]
    pub(crate) allow_stale: bool,

    /// Look also in DIR, where the merge keeps its state
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let bad = || format!("'{text}' is not a time: write seconds, as in 600 or 0.5");
    let seconds: f64 = text.parse().map_err(|_| bad())?;
    Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero()).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_seconds() {
        assert_eq!(seconds("600"), Ok(Duration::from_secs(600)));
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["", "0", "-1", "5m", "inf", "nan", "1e300"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
