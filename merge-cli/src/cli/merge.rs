//! Arguments of the verbs that merge.
#![allow(rustdoc::broken_intra_doc_links, reason = "the comments are help texts; [1] is an index, no link")]

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::{ChainArgs, ImageFormat};

/// `qmerge commit`
#[derive(Debug, Args)]
pub(crate) struct CommitArgs {
    /// The chain's top file, the one that the virtual machine uses
    pub(crate) active: PathBuf,

    /// Merge down into LAYER [default: the bottom of the chain]
    ///
    /// A layer is named by its path, or by its index: [1] is the bottom, the next overlay is [2], and so
    /// on up; a name before the bracket is accepted, as in vda[1].
    #[arg(long, value_name = "LAYER", conflicts_with = "shallow", help_heading = "What to merge")]
    pub(crate) base: Option<OsString>,

    /// Merge down into top's own backing file
    #[arg(long, help_heading = "What to merge")]
    pub(crate) shallow: bool,

    /// The highest layer that is merged [default: ACTIVE]
    ///
    /// With ACTIVE itself, ACTIVE becomes an empty overlay on base. With a lower layer, the overlay
    /// above it gets base as its backing file.
    #[arg(long, value_name = "LAYER", help_heading = "What to merge")]
    pub(crate) top: Option<OsString>,

    /// Print the plan and change nothing
    #[arg(short = 'n', long, help_heading = "How")]
    pub(crate) dry_run: bool,

    /// Read back and compare everything before anything is switched or deleted
    #[arg(long, help_heading = "How")]
    pub(crate) verify: bool,

    /// Remove the files that are no longer needed
    ///
    /// Without it they stay, as empty overlays on base, marked as merged. Files are removed from the top down,
    /// ACTIVE itself last, when everything is durable, and only if they are still the files of the plan and no
    /// other image uses them.
    #[arg(long, conflicts_with = "keep_active", help_heading = "How")]
    pub(crate) delete: bool,

    /// Leave ACTIVE as it is when it is merged
    ///
    /// Its data is then in base, too. Do not boot from base while somebody may still boot from ACTIVE.
    #[arg(long, help_heading = "How")]
    pub(crate) keep_active: bool,

    /// Begin again although others have written to base since this merge was stopped
    #[arg(long, help_heading = "How", hide_short_help = true)]
    pub(crate) restart: bool,

    /// Keep the journal in DIR, for block devices and folders that cannot be written
    ///
    /// An interrupted merge continues with the journal, so name the same DIR then. Without it, the journal lies
    /// beside base.
    #[arg(long, value_name = "DIR", help_heading = "How", hide_short_help = true)]
    pub(crate) journal_dir: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) safety: SafetyArgs,

    #[command(flatten)]
    pub(crate) open: ChainArgs,
}

/// What a merge down is allowed to break, running or not.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Safety")]
pub(crate) struct SafetyArgs {
    /// Also search DIR for images that use base or a merged layer (repeatable)
    ///
    /// The folders of the chain are always searched.
    #[arg(long, value_name = "DIR", help_heading = "Safety")]
    pub(crate) scan: Vec<PathBuf>,

    /// Merge although an image outside the chain uses base or a merged layer; that image breaks
    #[arg(long, help_heading = "Safety")]
    pub(crate) allow_shared_base: bool,

    /// Merge although internal snapshots of merged layers change
    #[arg(long, help_heading = "Safety")]
    pub(crate) allow_snapshot_change: bool,

    /// Merge although persistent bitmaps of merged layers are lost
    #[arg(long, help_heading = "Safety")]
    pub(crate) drop_bitmaps: bool,
}

/// What a pull and a rebase have in common
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Print the plan and change nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,

    /// Compare what the guest will see with what it sees, before the backing file changes
    #[arg(long)]
    pub(crate) verify: bool,

    /// Go on although internal snapshots of the image will show something else
    #[arg(long)]
    pub(crate) allow_snapshot_change: bool,

    /// Keep the journal in DIR, for block devices and folders that cannot be written
    #[arg(long, value_name = "DIR", hide_short_help = true)]
    pub(crate) journal_dir: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) open: ChainArgs,
}

/// `qmerge pull`
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// The image that takes the data, in most cases the chain's top file
    pub(crate) active: PathBuf,

    /// The layer that becomes the backing file [default: nothing]
    ///
    /// A layer is named by its path, or by its index: [1] is the bottom of the chain.
    #[arg(long, value_name = "LAYER")]
    pub(crate) base: Option<OsString>,

    #[command(flatten)]
    pub(crate) up: UpArgs,
}

/// `qmerge rebase`
#[derive(Debug, Args)]
pub(crate) struct RebaseArgs {
    /// The image that gets another backing file
    pub(crate) image: PathBuf,

    /// The new backing file
    ///
    /// It may be of any size and cluster size, related to IMAGE or not, and have a chain of its own. From then on nobody may
    /// write to it.
    #[arg(
        long,
        value_name = "NEW",
        required_unless_present = "onto_nothing",
        conflicts_with = "onto_nothing"
    )]
    pub(crate) onto: Option<PathBuf>,

    /// No backing file: IMAGE needs no other image then
    #[arg(long)]
    pub(crate) onto_nothing: bool,

    /// Format of NEW [default: what IMAGE's chain says of it, or else its first bytes]
    #[arg(short = 'F', long, value_name = "FMT", requires = "onto")]
    pub(crate) onto_format: Option<ImageFormat>,

    #[command(flatten)]
    pub(crate) up: UpArgs,
}

/// `qmerge abort`
#[derive(Debug, Args)]
pub(crate) struct AbortArgs {
    /// The image that the merge writes to
    pub(crate) base: PathBuf,

    /// Where the journal lies, if the merge was given such a DIR
    #[arg(long, value_name = "DIR")]
    pub(crate) journal_dir: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) open: ChainArgs,
}

/// `qmerge flatten`
#[derive(Debug, Args)]
pub(crate) struct FlattenArgs {
    /// The chain's top file
    pub(crate) active: PathBuf,

    /// The file to write; it must not exist, but for a block device with --onto-device
    #[arg(short, long, value_name = "NEW")]
    pub(crate) output: PathBuf,

    /// Format of NEW
    #[arg(long, value_name = "FMT", default_value = "qcow2")]
    pub(crate) to: ImageFormat,

    /// Leave out LAYER and those below it; NEW gets LAYER as its backing file
    ///
    /// A layer is named by its path, or by its index: [1] is the bottom of the chain.
    #[arg(long, value_name = "LAYER")]
    pub(crate) base: Option<OsString>,

    /// Write an internal snapshot of ACTIVE, by its name or id, instead of what ACTIVE holds now
    ///
    /// The disk of NEW is as large as it was when the snapshot was taken. What the snapshot does not hold comes from the
    /// layers below ACTIVE, as they are now.
    #[arg(long, value_name = "NAME|ID")]
    pub(crate) snapshot: Option<OsString>,

    /// Write zeros that lie among the data, too; without it, aligned runs of 4 KiB and more are left out
    #[arg(long)]
    pub(crate) keep_zeros: bool,

    /// Write onto the block device NEW, and over all that it holds
    ///
    /// Refused if the device is mounted, in use, or too small. A raw disk that is smaller than the device is followed by
    /// zeros. When the work is stopped, the device holds no disk: the same command begins again.
    #[arg(long)]
    pub(crate) onto_device: bool,

    /// Write whatever can be read, with zeros in the place of what cannot, and name those ranges; exits 9 then
    ///
    /// Unreadable are what bad sectors hold, what damaged tables do not tell, and damaged compressed clusters. Headers,
    /// and the backing files that they name, must be whole.
    #[arg(long)]
    pub(crate) salvage: bool,

    #[command(flatten)]
    pub(crate) open: ChainArgs,
}

pub(super) const COMMIT_EXAMPLES: &str = "\
Examples, for the chain base.raw <- a.qcow2 <- b.qcow2 <- c.qcow2:
  qmerge commit c.qcow2 --dry-run                 what would happen
  qmerge commit c.qcow2                           everything into base.raw
  qmerge commit c.qcow2 --top b.qcow2             base.raw <- c.qcow2 is left
  qmerge commit c.qcow2 --base '[2]' --top '[3]'  b.qcow2 into a.qcow2
  qmerge commit c.qcow2 --verify --delete         compare, then remove a, b and c";
