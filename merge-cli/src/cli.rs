//! The command line.

mod demo;
mod live;
mod look;
mod merge;
mod relink;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use self::demo::DemoArgs;
pub(crate) use self::live::{
    EndArgs, JobArgs, LiveArgs, LiveCommitArgs, LivePullArgs, LiveVerb, Overlay, RecoverArgs,
};
pub(crate) use self::look::{CheckArgs, CompareArgs, InfoArgs, MapArgs, RepairWhat};
use self::merge::COMMIT_EXAMPLES;
pub(crate) use self::merge::{AbortArgs, CommitArgs, FlattenArgs, PullArgs, RebaseArgs, SafetyArgs, UpArgs};
use self::relink::EXAMPLES as RELINK_EXAMPLES;
pub(crate) use self::relink::{GivenFormat, MovedPair, RelinkArgs};
use crate::exit;

/// Merges QEMU disk image chains: safely, fast, and without QEMU.
///
/// A chain is one disk in several files: `base.raw <- a.qcow2 <- b.qcow2 (active)`. The guest writes to the
/// active image; data that it does not hold is read from its backing file, and so on down. `qmerge commit`
/// moves the data of overlays down into a base, so that fewer files are left, and the guest sees the same
/// bytes.
#[derive(Debug, Parser)]
#[command(
    name = "qmerge",
    version,
    max_term_width = 100,
    help_expected = true,
    infer_long_args = false,
    disable_help_subcommand = true,
    subcommand_value_name = "VERB",
    subcommand_help_heading = "Verbs",
    after_help = "qmerge VERB -h lists a verb's options, qmerge VERB --help explains them.",
    after_long_help = long_help()
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) output: OutputArgs,

    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// How to answer.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// Print JSON on standard output
    ///
    /// info, map, check, compare and most verbs of live print one document; commit, pull, rebase, relink, flatten, demo, and live
    /// commit, pull, finish and pivot print lines of events: plan, progress, result or error. Keys are kebab-case.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Print nothing but errors, and the JSON that --json asks for
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Show what an image, or each layer of its chain, is
    #[command(
        after_long_help = "Examples:\n  qmerge info vm.qcow2\n  qmerge info vm.qcow2 --chain\n  qmerge info vm.qcow2 --chain --json"
    )]
    Info(InfoArgs),

    /// Show which layer supplies each range of the disk
    #[command(after_long_help = "Examples:\n  qmerge map vm.qcow2\n  qmerge map vm.qcow2 --json")]
    Map(MapArgs),

    /// Check the consistency of an image
    ///
    /// Exits as qemu-img check: 0 clean, 1 could not check, 2 corruption, 3 leaks only, 63 nothing to check (raw);
    /// with --restore as the other verbs.
    #[command(
        after_long_help = "Examples:\n  qmerge check vm.qcow2\n  qmerge check -q vm.qcow2 && echo clean\n  qmerge check --repair all --dry-run vm.qcow2\n  qmerge check --repair all --backup vm.metadata vm.qcow2\n  qmerge check --restore vm.metadata vm.qcow2"
    )]
    Check(CheckArgs),

    /// Compare what the guest would see in two images or chains
    ///
    /// Exits as qemu-img compare: 0 same, 1 different, 2 failed.
    #[command(
        after_long_help = "Examples:\n  qmerge compare vm.qcow2 copy.raw\n  qmerge compare -f qcow2 -F raw vm.qcow2 copy.img"
    )]
    Compare(CompareArgs),

    /// Merge layers of a chain down into a base
    ///
    /// Moves the data of the layers above base, up to and including top, down into base. The virtual
    /// machine must be shut down. What the guest sees through ACTIVE does not change, at no instant.
    #[command(after_long_help = COMMIT_EXAMPLES)]
    Commit(CommitArgs),

    /// Move data of the layers below up into an image
    ///
    /// The image takes in the data of the layers above base that it does not hold; then base is its backing
    /// file. No other file is written: so it works with a base that others use, and is cheap if the layers
    /// below hold little. The virtual machine must be shut down.
    #[command(
        after_long_help = "Examples, for the chain base.raw <- a.qcow2 <- b.qcow2 <- c.qcow2:\n  qmerge pull c.qcow2 --base base.raw    base.raw <- c.qcow2 is left\n  qmerge pull c.qcow2                    c.qcow2 needs no other file then"
    )]
    Pull(PullArgs),

    /// Correct names in headers after files were moved
    ///
    /// Changes the name of IMAGE's backing file, or of its external data file, and nothing else. Before that it proves that
    /// the new name leads to the file that IMAGE was made with: the same file, or one that shows the same bytes as the old
    /// one. What cannot be proved needs --trust.
    #[command(after_long_help = RELINK_EXAMPLES)]
    Relink(RelinkArgs),
    /// Give an image another backing file, whatever that holds, or none
    ///
    /// Where the guest would see something else, IMAGE takes in what it shows now; nothing else is copied, and no other file
    /// is written. Safe at every instant: killed or without power in the middle, IMAGE shows the same, and the same command
    /// goes on. The virtual machine must be shut down.
    #[command(
        after_long_help = "Examples, for the chain old.qcow2 <- vm.qcow2:\n  qmerge rebase vm.qcow2 --onto new.qcow2 --dry-run    what would be copied\n  qmerge rebase vm.qcow2 --onto new.qcow2              new.qcow2 <- vm.qcow2 is left\n  qmerge rebase vm.qcow2 --onto new.img -F raw         onto a plain disk\n  qmerge rebase vm.qcow2 --onto-nothing                vm.qcow2 needs no other file then"
    )]
    Rebase(RebaseArgs),

    /// Give up a merge that was stopped
    ///
    /// Leaves BASE consistent; the overlays keep all their data. To finish the merge instead, run the same
    /// qmerge commit again.
    #[command(
        after_long_help = "Examples:\n  qmerge info base.qcow2       whether a merge is pending\n  qmerge abort base.qcow2"
    )]
    Abort(AbortArgs),

    /// Write a chain, or its upper part, into one new file
    ///
    /// Reads the chain and writes none of its files. NEW gets its name when it is complete and durable.
    #[command(
        after_long_help = "Examples:\n  qmerge flatten vm.qcow2 -o whole.qcow2\n  qmerge flatten vm.qcow2 -o whole.raw --to raw\n  qmerge flatten vm.qcow2 -o upper.qcow2 --base base.qcow2"
    )]
    Flatten(FlattenArgs),

    /// Make a chain in a temporary folder, merge it, and prove that nothing changed
    #[command(after_long_help = "Examples:\n  qmerge demo\n  qmerge demo --size 1G")]
    Demo(DemoArgs),

    /// Look at, snapshot and merge the disks of a running QEMU
    #[command(after_long_help = LIVE_EXAMPLES)]
    Live(LiveArgs),
}

/// How one image is opened.
#[derive(Clone, Debug, Args)]
pub(crate) struct ImageArgs {
    /// Format of the named image; without it, its first bytes tell
    #[arg(short, long, value_name = "FMT", help_heading = "Opening")]
    pub(crate) format: Option<ImageFormat>,

    /// Only follow names inside images to files in DIR (repeatable)
    ///
    /// Without it, backing and data files may be regular files or block devices anywhere.
    #[arg(long, value_name = "DIR", help_heading = "Opening")]
    pub(crate) allow_dir: Vec<PathBuf>,

    /// Write images on a file system without locks
    ///
    /// Some network and FUSE file systems have none. Then nothing keeps a virtual machine from using the images
    /// meanwhile: be certain that none does. Existing locks are respected as always.
    #[arg(long, help_heading = "Opening", hide_short_help = true)]
    pub(crate) no_lock: bool,
}

/// How a chain is opened.
#[derive(Clone, Debug, Args)]
pub(crate) struct ChainArgs {
    #[command(flatten)]
    pub(crate) image: ImageArgs,

    /// Format of a backing file whose overlay does not state it; LAYER is its name
    ///
    /// Formats of backing files are never guessed: a guest that writes to a raw disk could make it look
    /// like anything. Repeatable.
    #[arg(long, value_name = "LAYER=FMT", help_heading = "Opening", value_parser = layer_format())]
    pub(crate) backing_format: Vec<LayerFormat>,
}

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImageFormat {
    /// Plain bytes, as the guest sees them
    Raw,
    /// QEMU's copy-on-write format
    Qcow2,
}

impl From<ImageFormat> for qcow2::image::ImageFormat {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Raw => Self::Raw,
            ImageFormat::Qcow2 => Self::Qcow2,
        }
    }
}

/// `LAYER=FMT` of `--backing-format`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerFormat {
    /// The layer, as the user names it.
    pub(crate) layer: OsString,
    /// Its format.
    pub(crate) format: ImageFormat,
}

const EXAMPLES: &str = "\
Examples:
  qmerge demo                        see it work
  qmerge info vm.qcow2               what an image is
  qmerge info --chain vm.qcow2       its chain
  qmerge map vm.qcow2                which layer holds what
  qmerge commit vm.qcow2 --dry-run   what a merge would do
  qmerge commit vm.qcow2             merge it";

const LIVE_EXAMPLES: &str = "\
Examples:
  qmerge live list --qmp /run/vm1/qmp.sock                          the disks
  qmerge live chain vda --qmp /run/vm1/qmp.sock                     the chain of one
  qmerge live snapshot vda=/vm/a.qcow2 --qmp /run/vm1/qmp.sock      a new overlay
  qmerge live commit vda --active --pivot --qmp /run/vm1/qmp.sock   merge them all again
  qmerge live jobs --qmp /run/vm1/qmp.sock                          what is at work";

fn long_help() -> String {
    format!("{EXAMPLES}\n\n{}", exit::TABLE)
}

fn layer_format() -> impl TypedValueParser<Value = LayerFormat> {
    OsStringValueParser::new().try_map(|text| parse_layer_format(&text))
}

fn parse_layer_format(text: &OsStr) -> Result<LayerFormat, String> {
    let bytes = text.as_bytes();
    let at = bytes.iter().rposition(|&b| b == b'=').ok_or("write LAYER=FMT, as in base.img=raw")?;
    let (layer, format) = bytes.split_at(at);
    let format = String::from_utf8_lossy(format.get(1..).unwrap_or_default());
    if layer.is_empty() {
        return Err("the layer is missing: write LAYER=FMT, as in base.img=raw".to_owned());
    }
    let format = ImageFormat::from_str(&format, false)
        .map_err(|_| format!("'{format}' is no format: raw or qcow2"))?;
    Ok(LayerFormat { layer: OsStr::from_bytes(layer).to_owned(), format })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn short_help_fits_one_screen() {
        let mut cli = Cli::command();
        cli.build();
        for verb in cli.get_subcommands_mut() {
            let lines = verb.render_help().to_string().lines().count();
            assert!(lines <= 40, "{}: {lines} lines", verb.get_name());
        }
        assert!(cli.render_help().to_string().lines().count() <= 30);
    }

    #[test]
    fn layer_formats_split_at_the_last_sign() {
        let expected = LayerFormat { layer: "a=b.img".into(), format: ImageFormat::Raw };
        assert_eq!(parse_layer_format("a=b.img=raw".as_ref()), Ok(expected));
        let latin1 = LayerFormat { layer: OsStr::from_bytes(b"b\xe9").into(), format: ImageFormat::Raw };
        assert_eq!(parse_layer_format(OsStr::from_bytes(b"b\xe9=raw")), Ok(latin1));
        for bad in ["base.raw", "=raw", "base.raw=vmdk"] {
            assert!(parse_layer_format(bad.as_ref()).is_err(), "{bad}");
        }
    }
}
