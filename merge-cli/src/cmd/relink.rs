//! `qmerge relink`: other names in the headers of images, after files were moved.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2::chain::Chain;
use qcow2::error::shown;
use qcow2::merge;
use qcow2::relink::{NameChange, PreparedRelink, Relink, RelinkOptions, RelinkPlan, Vouched};
use qcow2::storage::OsHost;
use qcow2::{Error, ErrorKind};
use serde_json::json;

use self::moved::run as run_moved;
use super::shown_plan::ShownPlan;
use super::{interrupted, open, stopped};
use crate::call::Call;
use crate::cli::{GivenFormat, RelinkArgs};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::output::Console;
use crate::output::human::Fields;
use crate::output::json::value;
use crate::output::progress::Meter;
use crate::signals::Stop;

mod moved;

/// Proves that the new names lead to the right files, and changes them unless it is a dry run.
pub(super) fn run(args: &RelinkArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    let stop = Stop::on_signals(call)?;
    if let Some(moved) = &args.moved {
        return run_moved(args, moved, &stop, call, console);
    }
    let [image] = args.paths.as_slice() else {
        return Err(Report {
            kind: "usage",
            message: "name one image; only --moved takes several folders".to_owned(),
            hint: crate::hint::Hint::command(crate::hint::HintKind::Help, "", call.help()).into(),
            exit: Exit::USAGE,
        }
        .into());
    };
    let options = options(args);
    let prepared = prepare(image, &options, args.dry_run, &stop, call, console)?;
    open::warn_unlocked(&prepared.chain().map(Chain::unlocked).unwrap_or_default(), console);
    let plan = prepared.plan().clone();
    let is_nothing = matches!(prepared, PreparedRelink::Nothing(_));
    let words = if is_nothing { nothing(image) } else { plan_words(&plan) };
    let planned = ShownPlan { plan: value(&plan), words, is_nothing };
    if !planned.tell(args.dry_run, console)? {
        return Ok(Exit::DONE);
    }
    prepared.execute().map_err(|e| halfway(&e, call))?;
    let report = json!({ "relinked": !is_nothing });
    planned.tell_result(report, result_words(&plan), "the names are changed", console)
}

fn options(args: &RelinkArgs) -> RelinkOptions {
    let mut open = open::image_options(&args.image);
    let mut backing_format = None;
    for given in &args.backing_format {
        match given {
            GivenFormat::Backing(format) => backing_format = Some(*format),
            GivenFormat::Layer(given) => {
                open.backing_formats.insert(PathBuf::from(&given.layer), given.format.into());
            }
        }
    }
    let mut options = RelinkOptions::new(open);
    options.backing.clone_from(&args.backing);
    options.backing_format = backing_format;
    options.data_file.clone_from(&args.data_file);
    options.vouched = if args.trust { Vouched::Files } else { Vouched::Nothing };
    options.journal_dir.clone_from(&args.journal_dir);
    options
}

/// Makes the header whole if a power cut has torn it, unless it is a dry run, and prepares.
fn prepare(
    image: &Path,
    options: &RelinkOptions,
    dry_run: bool,
    stop: &Stop,
    call: &Call,
    console: &Console,
) -> Result<PreparedRelink, Failure> {
    interrupted::refuse(image, call, console)?;
    if !dry_run {
        let healed = merge::heal_image(&OsHost, image, &options.open, options.journal_dir.as_deref());
        if healed.map_err(|e| Failure::engine(&e, call))? {
            open::tell_healed(&[image.to_owned()], console);
        }
    }
    let meter = Meter::new(console, "comparing");
    Relink::prepare(Arc::new(OsHost), image, options, &meter, stop.flag()).map_err(|e| {
        meter.clear();
        stopped::unchanged(&e, stop, call)
    })
}

/// A failure while the header was written: it says the old names or the new ones, or a record makes it whole.
fn halfway(error: &Error, call: &Call) -> Failure {
    let failure = Failure::engine(error, call);
    if error.kind() != ErrorKind::Io {
        return failure;
    }
    let Failure(report) = failure;
    let message = format!("{}\nstopped while the header changed; nothing is lost", report.message);
    Report { exit: Exit::HALFWAY, message, ..report }.into()
}

fn nothing(image: &Path) -> String {
    format!("nothing to do: the header of {} says that already", shown(image))
}

fn plan_words(plan: &RelinkPlan) -> String {
    let mut fields = Fields::default();
    fields.add("relink", shown(&plan.image));
    for (role, change) in plan.changes() {
        fields.add(
            &role.to_string(),
            format!("'{}' instead of '{}'", shown(&change.after), shown(&change.before)),
        );
        let format = change.format.map_or(String::new(), |format| format!(", {}", format.name()));
        fields.add("leads to", format!("{}{format}", shown(&change.file)));
        fields.add("proof", proof(change));
        if let Some(base) = &change.merged_into {
            let base = shown(base);
            fields.add("old data", format!("it was merged into {base}, and holds what it held then"));
        }
    }
    if let Some(missing) = &plan.missing_below {
        fields.add("missing", format!("{}, further below", shown(missing)));
    }
    let how = if plan.atomic { "one sector of the header" } else { "the header, under a record beside it" };
    fields.add("written", how);
    fields.render()
}

fn proof(change: &NameChange) -> String {
    match &change.proved {
        Ok(proof) => proof.to_string(),
        Err(doubt) => format!(
            "none; taken on your word: {doubt}\nif it is another file, the guest sees wrong data, and spoils it by writing"
        ),
    }
}

fn result_words(plan: &RelinkPlan) -> String {
    let names = plan.changes().map(|(role, change)| {
        let trusted = if change.proved.is_err() { ", on your word" } else { "" };
        format!("{} as its {role}{trusted}", shown(&change.after))
    });
    format!("{} names {}", shown(&plan.image), names.collect::<Vec<_>>().join(", and "))
}
