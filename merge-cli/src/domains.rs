//! libvirt's domains, as this command finds and shows them.

use std::env;

use qmp_client::libvirt::{Definitions, Folders};

use crate::hint::Command;

/// Names other folders than libvirt's own, between colons; for tests, and for a libvirt that was built with others.
const FOLDERS: &str = "QMERGE_LIBVIRT_DIR";

/// Everything that libvirt's files tell.
pub(crate) fn read() -> Definitions {
    let folders = match env::var_os(FOLDERS) {
        Some(paths) => Folders::of(env::split_paths(&paths).filter(|path| !path.as_os_str().is_empty())),
        None => Folders::usual(),
    };
    Definitions::read(&folders)
}

/// A command of virsh's, as it is typed.
pub(crate) fn command(words: &[String]) -> Command {
    let (program, rest) =
        words.split_first().map_or(("virsh", &[][..]), |(first, rest)| (first.as_str(), rest));
    rest.iter().fold(Command::of(program), Command::word)
}
