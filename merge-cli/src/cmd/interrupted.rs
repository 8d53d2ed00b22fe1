//! Checks for an interrupted live merge before a verb writes.

use std::path::Path;

use qcow2::Error;
use qcow2::error::{Holder, shown};
use qmp_client::{Interrupted, unbelieved_states};

use super::live::recover::{damaged, tell};
use crate::call::Call;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind};
use crate::output::Console;

/// Refuses if a live merge of the image is unfinished: first it must be settled which image holds the disk. A
/// state file of a stranger does not count, and is named.
pub(super) fn refuse(image: &Path, call: &Call, console: &Console) -> Result<(), Failure> {
    refuse_with(image, call, console, |holders| {
        let error = Error::InUse { path: image.to_owned(), holders: holders.to_vec() };
        Failure::engine(&error, call)
    })
}

/// As [`refuse`]; `in_use` makes the failure if processes use the image.
pub(super) fn refuse_with(
    active: &Path,
    call: &Call,
    console: &Console,
    in_use: impl Fn(&[Holder]) -> Failure,
) -> Result<(), Failure> {
    for (file, user) in unbelieved_states(active) {
        console.warn(&format!(
            "warning: {} is not believed: it belongs to the user {user}, who may not write the image",
            shown(&file)
        ));
    }
    let merge = match Interrupted::of_image(active).map_err(|e| damaged(&e, call))? {
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
