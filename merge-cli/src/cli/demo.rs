//! Arguments of the demonstration.

use clap::Args;

use crate::output::size;

/// `qmerge demo`
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Size of the disk, with K, M, G or T
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size::parse)]
    pub(crate) size: u64,

    /// Keep the folder, so that you can look at it
    #[arg(long)]
    pub(crate) keep: bool,
}
