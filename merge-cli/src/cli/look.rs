//! Arguments of the verbs that only look.

use std::path::PathBuf;

use clap::Args;

use super::{ChainArgs, ImageArgs, ImageFormat};

/// `qmerge info`
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// The image
    pub(crate) image: PathBuf,

    /// Show every layer of the chain, and how much the guest sees through each
    #[arg(long)]
    pub(crate) chain: bool,

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

/// `qmerge check`
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The image
    pub(crate) image: PathBuf,

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
