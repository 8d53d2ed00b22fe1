//! `qmerge rebase`: an image gets another backing file, whatever that holds, or none.

use std::sync::Arc;

use qcow2::Error;
use qcow2::error::shown;
use qcow2::image::ImageFormat;
use qcow2::merge::{PreparedRebase, Rebase, RebaseOptions, RebasePlan};
use qcow2::storage::OsHost;

use super::{interrupted, open, stopped, up};
use crate::call::Call;
use crate::cli::RebaseArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::human::{Fields, plural};
use crate::output::json::{merged, value};
use crate::output::progress::Meter;
use crate::output::{Console, size};
use crate::signals::Stop;

/// Compares and plans, and carries the plan out unless it is a dry run.
pub(super) fn run(args: &RebaseArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    for image in [Some(&args.image), args.onto.as_ref()].into_iter().flatten() {
        interrupted::refuse(image, call, console, |holders| {
            let error = Error::InUse { path: image.clone(), holders: holders.to_vec() };
            Failure::engine(&error, call)
        })?;
    }
    let stop = Stop::on_signals(call)?;
    let options = options(args);
    if !args.dry_run {
        up::heal(&args.image, &options.open, options.journal_dir.as_deref(), call, console)?;
    }
    let meter = Meter::without_events(console, "comparing");
    let prepared = Rebase::prepare(Arc::new(OsHost), &args.image, &options, &meter, stop.flag());
    meter.clear();
    drop(meter);
    let prepared = prepared.map_err(|e| stopped::unchanged(&e, &stop, call))?;
    open::warn_unlocked(&prepared.unlocked(), console);
    let plan = prepared.plan().clone();
    let is_nothing = matches!(prepared, PreparedRebase::Nothing(_));
    console.event("plan", value(&plan))?;
    let words = if is_nothing { nothing(&plan) } else { plan_words(&plan) };
    if args.dry_run {
        console.result(&words)?;
        console.note("dry run: nothing was changed");
        return Ok(Exit::DONE);
    }
    if !is_nothing && !console.is_json() {
        console.note(&words);
    }
    let meter = Meter::new(console, "rebasing");
    let kept = "in the middle; what was taken in stays";
    let report =
        prepared.execute(&meter, stop.flag()).map_err(|e| stopped::halfway(&e, &stop, &meter, call, kept))?;
    drop(meter);
    let words = if is_nothing { words } else { up::result(&afterwards(&plan), &report) };
    let printed = console.event("result", merged(value(&plan), value(&report)));
    let printed = printed.and_then(|()| console.result(&words));
    printed.map(|()| Exit::DONE).map_err(|e| if is_nothing { e } else { e.behind("the rebase is done") })
}

fn options(args: &RebaseArgs) -> RebaseOptions {
    let mut options = RebaseOptions::new(open::options(&args.open));
    options.onto.clone_from(&args.onto);
    options.onto_format = args.onto_format.map(ImageFormat::from);
    options.verify = args.verify;
    options.allow_snapshot_change = args.allow_snapshot_change;
    options.journal_dir.clone_from(&args.journal_dir);
    options
}

/// The chain as it will be.
fn afterwards(plan: &RebasePlan) -> String {
    match (&plan.onto, plan.format) {
        (Some(onto), Some(format)) => {
            format!("{} reads through {} ({format})", shown(&plan.image), shown(onto))
        }
        _ => format!("{} has no backing file, and needs no other image", shown(&plan.image)),
    }
}

fn plan_words(plan: &RebasePlan) -> String {
    let mut fields = Fields::default();
    let onto = plan.onto.as_ref().map_or_else(|| "nothing".to_owned(), |onto| shown(onto).to_string());
    fields.add("rebase", format!("{} onto {onto}", shown(&plan.image)));
    if plan.is_resumed {
        fields.add("continues", "where a rebase or a pull was stopped");
    }
    fields.add("to copy", size::exact(plan.totals.bytes_to_copy));
    fields.add("to zero", size::exact(plan.totals.bytes_to_zero));
    if plan.totals.clusters_to_allocate > 0 {
        fields.add("to allocate", plural(plan.totals.clusters_to_allocate, "cluster", "clusters"));
    }
    fields.add("its file", format!("at most {} afterwards", size::exact(plan.file_size_after)));
    if plan.is_room_unknown {
        fields.add("not known", "whether there is room");
    }
    fields.add("afterwards", afterwards(plan));
    if plan.onto.is_some() {
        fields.add("from then on", format!("nobody may write to {onto}, or to what it reads through"));
    }
    let unneeded: Vec<_> = plan.unneeded.iter().map(shown).collect();
    if !unneeded.is_empty() {
        fields
            .add("not needed by it", format!("{}; other images may use what is there", unneeded.join(", ")));
    }
    fields.render()
}

fn nothing(plan: &RebasePlan) -> String {
    format!("nothing to do: {}", afterwards(plan))
}
