//! `qmerge relink --moved`: all images of folders that name files by a place that they had.

use qcow2::error::shown;
use qcow2::relink::{MovedFolder, PreparedRelink, RelinkPlan, RenamedImage, Vouched};
use qcow2::relink::{RenamedImages, find_renamed};
use qcow2::storage::OsHost;
use serde_json::{Value, json};

use super::{options, prepare};
use crate::call::Call;
use crate::cli::{MovedPair, RelinkArgs};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::output::Console;
use crate::output::human::plural;
use crate::output::json::{error, merged, path, paths, value};
use crate::signals::Stop;

/// Corrects one image after the other; what is not proved, or fails, is told and left as it is.
pub(super) fn run(
    args: &RelinkArgs,
    moved: &MovedPair,
    stop: &Stop,
    call: &Call,
    console: &Console,
) -> Result<Exit, Failure> {
    let failed = |e| Failure::engine(&e, call);
    let folder = MovedFolder::new(&OsHost, &moved.old, &moved.new).map_err(failed)?;
    let found = find_renamed(&OsHost, &folder, &args.paths).map_err(failed)?;
    console.event("plan", plan(moved, &found))?;
    tell_unread(&found, console);
    let (mut done, mut left, mut exit) = (0, 0, Exit::DONE);
    for image in &found.images {
        match one(image, args, stop, call, console) {
            Ok(plan) => {
                done += 1;
                console.event("image", merged(value(&plan), json!({ "relinked": !args.dry_run })))?;
                console.result(&words(&plan))?;
            }
            Err(Failure(report)) => {
                left += 1;
                if exit == Exit::DONE {
                    exit = report.exit;
                }
                if stop.exit().is_some() {
                    return Err(report.into());
                }
                tell_left(image, &report, console)?;
            }
        }
    }
    if exit == Exit::DONE && !(found.unreadable.is_empty() && found.left_out.is_empty()) {
        exit = Exit::FAILED;
    }
    let unread = found.unreadable.len() + found.left_out.len();
    let key = if args.dry_run { "to-relink" } else { "relinked" };
    console.event("result", json!({ key: done, "left": left, "unread": unread }))?;
    console.result(&summary(done, left, args.dry_run))?;
    if args.dry_run {
        console.note("dry run: nothing was changed");
    }
    Ok(exit)
}

/// Proves and changes the names of one image.
fn one(
    image: &RenamedImage,
    args: &RelinkArgs,
    stop: &Stop,
    call: &Call,
    console: &Console,
) -> Result<RelinkPlan, Failure> {
    let mut options = options(args);
    options.backing.clone_from(&image.backing);
    options.data_file.clone_from(&image.data_file);
    options.vouched = Vouched::Folder;
    let call = call.of_image(&image.image, &image_words(image));
    let prepared = prepare(&image.image, &options, args.dry_run, stop, &call, console)?;
    let plan = prepared.plan().clone();
    if !args.dry_run && matches!(prepared, PreparedRelink::Ready(_)) {
        prepared.execute().map_err(|e| super::halfway(&e, &call))?;
    }
    Ok(plan)
}

/// The call that corrects one image, for hints.
fn image_words(image: &RenamedImage) -> Vec<std::ffi::OsString> {
    let mut words: Vec<std::ffi::OsString> = vec!["relink".into(), crate::hint::file_word(&image.image)];
    for (option, name) in [("--backing", &image.backing), ("--data-file", &image.data_file)] {
        words.extend(name.iter().flat_map(|name| [option.into(), name.clone()]));
    }
    words
}

fn plan(moved: &MovedPair, found: &RenamedImages) -> Value {
    let images = found.images.iter().map(|image| {
        json!({
            "image": path(&image.image),
            "backing": image.backing.as_deref().map(|name| path(name.as_ref())),
            "data-file": image.data_file.as_deref().map(|name| path(name.as_ref())),
        })
    });
    let unreadable: Vec<_> = found.unreadable.iter().map(|(path, _)| path).collect();
    json!({
        "old": path(&moved.old),
        "new": path(&moved.new),
        "images": images.collect::<Vec<_>>(),
        "unreadable": paths(&unreadable),
        "left-out": paths(&found.left_out),
    })
}

fn tell_unread(found: &RenamedImages, console: &Console) {
    for (file, error) in &found.unreadable {
        console
            .warn(&format!("warning: {} cannot be read: {error}; what it names is not known", shown(file)));
    }
    for folder in &found.left_out {
        console
            .warn(&format!("warning: {} was left out: there is too much below the folders", shown(folder)));
    }
}

/// An image that keeps its names, why, and what to do.
fn tell_left(image: &RenamedImage, report: &Report, console: &Console) -> Result<(), Failure> {
    let left = json!({ "image": path(&image.image), "relinked": false, "left": error(report) });
    console.event("image", left)?;
    console.warn(&format!("left: {}", report.message));
    for hint in report.hint.lines() {
        console.warn(&format!("hint: {hint}"));
    }
    Ok(())
}

fn words(plan: &RelinkPlan) -> String {
    let names = plan.changes().map(|(role, change)| {
        let proof = change.proved.as_ref().map(ToString::to_string).unwrap_or_default();
        format!("{}: {role} '{}': {proof}", shown(&plan.image), shown(&change.after))
    });
    names.collect::<Vec<_>>().join("\n")
}

fn summary(done: u64, left: u64, dry_run: bool) -> String {
    let images = |count| plural(count, "image", "images");
    let what = match (done, left) {
        (0, 0) => return "nothing to do: no image names the old place".to_owned(),
        (done, 0) => images(done),
        (done, left) => format!("{}; {} left as before", images(done), images(left)),
    };
    format!("{}: {what}", if dry_run { "to relink" } else { "relinked" })
}
