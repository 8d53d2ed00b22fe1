//! The traces of a live merge that was interrupted, met by a verb that writes.

use std::path::Path;

use qcow2::error::{Holder, shown};
use qmp_client::Interrupted;

use super::live::recover::{damaged, tell};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind};

/// Refuses where a live merge of the image has not come to its end: which image is the right one is to be
/// settled first. `in_use` makes the failure where processes hold the image.
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
