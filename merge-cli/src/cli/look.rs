//! The arguments of the verbs that only read, and of `check`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{ChainArgs, ImageArgs, ImageFormat};

/// `qmerge info`
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// The image
    pub(crate) image: PathBuf,

    /// Show every layer of the chain, and how much the guest sees through each
    #[arg(long)]
    pub(crate) chain: bool,

    /// Where the journal of an unfinished merge is, if the merge was given such a DIR
    #[arg(long, value_name = "DIR")]
    pub(crate) journal_dir: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) open: ChainArgs,
}

/// `qmerge map`
#[derive(Debug, Args)]
pub(crate) struct MapArgs {
    /// The image, the top of the chain to map
    pub(crate) image: PathBuf,

    #[command(flatten)]
    pub(crate) open: ChainArgs,
}

/// What `qmerge check` repairs
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RepairWhat {
    /// Free leaked clusters, and nothing else
    Leaks,
    /// Correct everything that follows from the references: refcounts, COPIED flags, the refcount table
    All,
}

/// `qmerge check`
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The image
    pub(crate) image: PathBuf,

    /// Repair the image, then report what remains
    ///
    /// The image must not be in use. The guest's data is not touched; nothing is guessed: damage without a
    /// certain repair stays, and is reported.
    #[arg(long, value_name = "WHAT", group = "work", help_heading = "Repair")]
    pub(crate) repair: Option<RepairWhat>,

    /// Read all data, too: every cluster that the image or an internal snapshot holds; name the guest ranges that cannot be read
    ///
    /// Compressed clusters are inflated. Data that cannot be read counts as corruption. Layers below are not looked at.
    #[arg(long, conflicts_with = "work")]
    pub(crate) data: bool,

    /// Show what the repair or the restore would do, and change nothing; a repair exits as the check without it
    #[arg(long, requires = "work", help_heading = "Repair")]
    pub(crate) dry_run: bool,

    /// Copy the metadata to a new FILE before the first write, for --restore
    ///
    /// Every change of the repair is noted there before it is made. Freed clusters stay allocated in the file
    /// system then, so that they can be taken back.
    #[arg(
        long,
        value_name = "FILE",
        requires = "repair",
        conflicts_with_all = ["dry_run", "restore"],
        help_heading = "Repair"
    )]
    pub(crate) backup: Option<PathBuf>,

    /// Put the metadata back as it was before the repair whose --backup is FILE
    ///
    /// Refuses if anything but that repair has changed the metadata since. If it is stopped, the same command
    /// continues. Exits 0 when everything is as it was before, else as the other verbs: 4 half-way, 5 in use, 6
    /// refused.
    #[arg(long, value_name = "FILE", group = "work", help_heading = "Repair")]
    pub(crate) restore: Option<PathBuf>,

    /// Restore although the image is a copy of the one that was repaired
    #[arg(long, requires = "restore", help_heading = "Repair")]
    pub(crate) allow_copy: bool,

    #[command(flatten)]
    pub(crate) open: ImageArgs,
}

/// `qmerge compare`
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// One image
    #[arg(value_name = "A")]
    pub(crate) first: PathBuf,

    /// The other image
    #[arg(value_name = "B")]
    pub(crate) second: PathBuf,

    #[command(flatten)]
    pub(crate) open: ChainArgs,

    /// Format of B, where --format is that of A
    #[arg(short = 'F', long, value_name = "FMT", help_heading = "Opening")]
    pub(crate) second_format: Option<ImageFormat>,
}
