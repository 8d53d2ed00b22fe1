//! `qmerge compare`: would a guest see the same bytes?

use qcow2::ErrorKind;
use qcow2::chain::view::View;
use qcow2::compare::{self, Comparison};
use qcow2::error::shown;
use qcow2::image::ImageFormat;
use serde_json::{Value, json};

use super::open;
use crate::call::Call;
use crate::cli::CompareArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::json::path;
use crate::output::progress::Meter;
use crate::output::size;
use crate::signals::Stop;

/// Compares under readers' locks, so that nothing changes meanwhile.
pub(super) fn run(args: &CompareArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    let first_options = open::options(&args.open).locked();
    let second_format = args.second_format.map(ImageFormat::from);
    let second_options = first_options.clone().with_format(second_format);
    let first = open::whole_chain(&args.first, &first_options, call)?;
    let second = open::whole_chain(&args.second, &second_options, call)?;
    open::warn_unlocked(&[first.unlocked(), second.unlocked()].concat(), console);
    let (a, b) = (first.images(), second.images());
    let stop = Stop::on_signals(call)?;
    let meter = Meter::without_events(console, "comparing");
    let (a, b) = (View::new(&a, 0, first.active()), View::new(&b, 0, second.active()));
    let found = compare::compare(a, b, &meter, stop.flag()).map_err(|e| match (e.kind(), stop.exit()) {
        (ErrorKind::Cancelled, Some(exit)) => {
            meter.clear();
            Failure::interrupted(&format!("at {:.0} %", meter.percent()), exit, call)
        }
        _ => {
            meter.clear();
            Failure::engine(&e, call)
        }
    })?;
    drop(meter);
    let printed = if console.is_json() {
        console.document(&json(args, &found))
    } else {
        console.result(&human(args, &found))
    };
    // The usual code of this failure says here that the images differ.
    printed.map_err(|e| e.with_exit(Exit::COMPARE_FAILED))?;
    Ok(if found.same { Exit::DONE } else { Exit::COMPARE_DIFFERENT })
}

fn human(args: &CompareArgs, found: &Comparison) -> String {
    let (a, b) = (shown(&args.first), shown(&args.second));
    let sizes = if found.size_a == found.size_b {
        String::new()
    } else {
        let (a_size, b_size) = (size::exact(found.size_a), size::exact(found.size_b));
        format!(
            "\n{a} is a disk of {a_size}, {b} of {b_size}; what one has more counts as zeros in the other."
        )
    };
    match found.first_difference {
        _ if found.same => format!("{a} and {b} show the same bytes.{sizes}"),
        Some(at) => format!("{a} and {b} differ, first at guest offset {at} (byte {}).{sizes}", at.get()),
        None => format!("{a} and {b} differ.{sizes}"),
    }
}

fn json(args: &CompareArgs, found: &Comparison) -> Value {
    let mut out = json!({
        "same": found.same,
        "a": { "filename": path(&args.first), "virtual-size": found.size_a },
        "b": { "filename": path(&args.second), "virtual-size": found.size_b },
    });
    if let Some(at) = found.first_difference {
        out["first-difference"] = at.get().into();
    }
    out
}
