//! What can be seen from this host before a live merge starts, and would make it harmful or futile.

use qmp_client::{Disk, JobState, Layer};

use super::files::Files;
use super::obstacle::{Leaves, Obstacle};
use super::plan::{Plan, show};
use super::trouble::Session;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::word;
use crate::output::human::{printable, shell_word};
use crate::output::size;

/// Refuses to lose the persistent bitmaps of layers that are given up.
pub(super) fn bitmaps(session: &Session<'_>, merged: &[Layer], drop: bool) -> Result<(), Failure> {
    let names: Vec<_> = merged.iter().flat_map(|layer| &layer.bitmaps).map(|name| printable(name)).collect();
    if drop || names.is_empty() {
        return Ok(());
    }
    let names = names.join(", ");
    refuse(
        "bitmaps",
        format!("persistent bitmaps of the merged layers would be lost: {names}"),
        format!("if no backup needs them: {}", session.again_with("--drop-bitmaps")),
    )
}

/// Refuses to write the data of an encrypted layer to an image that is not encrypted.
pub(super) fn plaintext(
    session: &Session<'_>,
    from: &[Layer],
    into: &Layer,
    allowed: bool,
) -> Result<(), Failure> {
    let Some(layer) = from.iter().find(|layer| layer.encrypted && !into.encrypted && !allowed) else {
        return Ok(());
    };
    refuse(
        "plaintext",
        format!(
            "{} is encrypted, and {} is not: what it holds would lie there in plain text",
            show(layer),
            show(into)
        ),
        format!("if that is meant: {}", session.again_with("--allow-plaintext")),
    )
}

/// Refuses a pivot after which the old active image would stay as it is: bootable, with old data.
pub(super) fn old_active(session: &Session<'_>, leaves: &[Leaves], delete: bool) -> Result<(), Failure> {
    let Some(active) = leaves.first() else { return Ok(()) };
    let stays = |obstacle: &&Obstacle| {
        // What is removed need not be understood.
        !delete || matches!(obstacle, Obstacle::Shared { .. }) || obstacle.hides(&active.layer)
    };
    let Some(obstacle) = active.obstacle.as_ref().filter(stays) else { return Ok(()) };
    let file = show(&active.layer);
    let delete = if delete {
        String::new()
    } else {
        format!("; or have it removed: {}", session.again_with("--delete"))
    };
    Err(Report {
        kind: "stale-image",
        message: format!(
            "{file} could not become an empty overlay on base after the pivot: {obstacle}; it would stay bootable, with old data"
        ),
        hint: format!(
            "if nothing will start from {file} again: {}{delete}",
            session.again_with("--allow-stale")
        )
        .into(),
        exit: obstacle.exit(),
    }
    .into())
}

/// Refuses a chain whose names lead to other files here than in QEMU, unless the name to be written is given.
pub(super) fn same_files(
    session: &Session<'_>,
    files: &Files,
    disk: &Disk,
    named: bool,
) -> Result<(), Failure> {
    let strangers = files.strangers(disk);
    let Some(first) = strangers.first().filter(|_| !named) else { return Ok(()) };
    let message = format!(
        "QEMU has another file open than the {} that lies here: it runs in a container or in another root, perhaps",
        show(first)
    );
    let hint = format!(
        "run qmerge where QEMU runs (nsenter -t PID -m); or, if the files cannot be looked at, say what base is called \
         there: {}",
        session.again_with_values(&[("--backing-file", "NAME"), ("--state-dir", "DIR")])
    );
    refuse("not-here", message, hint)
}

/// Refuses while another job works on the disk.
pub(super) fn no_other_job(
    session: &Session<'_>,
    disk: &Disk,
    jobs: &[(JobState, Option<&Disk>)],
) -> Result<(), Failure> {
    let mut theirs = jobs.iter().filter(|(_, of)| of.is_some_and(|of| of.name() == disk.name()));
    let Some((job, _)) = theirs.next() else { return Ok(()) };
    let name = shell_word(disk.name());
    let (id, kind) = (printable(&job.id), printable(&job.kind));
    refuse(
        "job-exists",
        format!(
            "the job {id} ({kind}) works on the disk {} already; QEMU runs one at a time",
            printable(disk.name())
        ),
        format!(
            "let it end ({}), or end it without its effect: {}",
            session.other("jobs"),
            session.other(&format!("cancel {name}"))
        ),
    )
}

/// Refuses where the receiving file system has surely too little room, and warns where it may.
pub(super) fn room(session: &Session<'_>, plan: &Plan) -> Result<Option<String>, Failure> {
    let Some((folder, free)) = &plan.room else { return Ok(None) };
    // What has no place yet in the receiving image needs one; zeros may be found there already.
    let sure = if plan.amounts.counted { plan.amounts.new } else { 0 };
    let (file, free_text) = (show(plan.receiver()), size::exact(*free));
    if sure > *free {
        let missing = size::exact(sure - free);
        let message = format!(
            "{file} will grow by {}, and {free_text} are free in {}: {missing} are missing",
            size::exact(sure),
            folder.display()
        );
        let hint = format!("make room there (df -h {}), then again: {}", word(folder), session.again());
        return Err(Report { kind: "no-space", message, hint: hint.into(), exit: Exit::NO_SPACE }.into());
    }
    let warning = (plan.growth() > *free).then(|| {
        format!(
            "the room may not be enough: {file} grows by up to {}, and {free_text} are free in {}; if it is full, the \
             job waits for room",
            size::exact(plan.growth()),
            folder.display()
        )
    });
    Ok(warning)
}

fn refuse<T>(kind: &'static str, message: String, hint: String) -> Result<T, Failure> {
    Err(Report { kind, message, hint: hint.into(), exit: Exit::REFUSED }.into())
}
