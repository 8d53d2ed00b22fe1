//! Opening what the user names, as the options say.

use std::path::{Path, PathBuf};

use qcow2::chain::{Chain, OpenOptions, Policy};
use qcow2::error::shown;
use qcow2::image::ImageFormat;
use qcow2::merge;
use qcow2::storage::OsHost;

use crate::call::Call;
use crate::cli::{ChainArgs, ImageArgs};
use crate::failure::Failure;
use crate::output::Console;

/// How an image is opened for `args`: names inside images lead to local files anywhere, or only to the
/// folders that the user allows.
pub(super) fn image_options(args: &ImageArgs) -> OpenOptions {
    let policy = match args.allow_dir.as_slice() {
        [] => Policy::local_files(),
        dirs => dirs.iter().fold(Policy::deny(), |policy, dir| policy.allow_dir(dir)),
    };
    let active_format = args.format.map(ImageFormat::from);
    let mut options = OpenOptions::new(policy).with_format(active_format);
    options.no_locks = args.no_lock;
    options
}

/// How a chain is opened for `args`.
pub(super) fn options(args: &ChainArgs) -> OpenOptions {
    let formats = args.backing_format.iter().map(|given| (PathBuf::from(&given.layer), given.format.into()));
    image_options(&args.image).with_backing_formats(formats)
}

/// Says which images were made whole.
pub(super) fn tell_healed(images: &[PathBuf], console: &Console) {
    for image in images {
        console.note(&format!("{}: a power cut had torn its header; it is whole again", shown(image)));
    }
}

/// Warns about layers that are not locked because their file systems have no locks.
pub(super) fn warn_unlocked(layers: &[PathBuf], console: &Console) {
    for layer in layers {
        console.warn(&format!(
            "warning: {}: its file system has no locks: nothing keeps another process from writing it meanwhile",
            layer.display()
        ));
    }
}

/// Opens a chain for reading without locks, so that verbs that only read work beside a running QEMU.
pub(super) fn chain(active: &Path, options: &OpenOptions, call: &Call) -> Result<Chain, Failure> {
    Chain::open(&OsHost, active, options).map_err(|e| Failure::engine(&e, call))
}

/// Opens a chain to read its data. An image that a power cut has torn in the middle of a merge is refused.
pub(super) fn whole_chain(active: &Path, options: &OpenOptions, call: &Call) -> Result<Chain, Failure> {
    merge::open_whole(&OsHost, active, options, None).map_err(|e| Failure::engine(&e, call))
}
