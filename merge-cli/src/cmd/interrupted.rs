//! Checks for an interrupted live merge before a verb writes.

use std::path::Path;

use qcow2::error::{Holder, shown};
use qmp_client::Interrupted;

use super::live::recover::{damaged, tell};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind};

/// Refuses if a live merge of the image is unfinished: first it must be settled which image holds the disk.
/// `in_use` makes the failure if processes use the image.
pub(super) fn refuse(active: &Path, in_use: impl Fn(&[Holder]) -> Failure) -> Result<(), Failure> {
    let merge = match Interrupted::of_image(active).map_err(|e| damaged(&e))? {
        Interrupted::No => return Ok(()),
        Interrupted::InUse(holders) => return Err(in_use(&holders)),
        Interrupted::Yes(merge) => merge,
    };
    Err(Report {
        kind: "recover-first",
        message: format!(
            "{}: {} was interrupted, as {} says; nothing was changed",
            shown(active),
            tell::what(&merge),
            shown(merge.state_file())
        ),
        hint: Hint::command(HintKind::Recover, "", Command::qmerge(["live", "recover"]).file(active)).into(),
        exit: Exit::REFUSED,
    }
    .into())
}
