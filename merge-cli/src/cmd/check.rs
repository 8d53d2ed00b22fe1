//! `qmerge check`: is an image consistent?

use std::path::Path;

use qcow2::Error;
use qcow2::chain::{OpenOptions, open_data_file};
use qcow2::check::{self, CheckOptions, CheckReport, Severity, Verdict};
use qcow2::image::{ImageFormat, Qcow2};
use qcow2::storage::{Access, Host, LockError, LockMode, OsHost, Storage};
use serde_json::{Map, Value, json};

use super::open;
use crate::call::Call;
use crate::cli::CheckArgs;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hints::word;
use crate::output::Console;
use crate::output::human::plural;
use crate::output::json::path;
use crate::output::size;

/// Checks the image and its external data file; other files are not opened.
pub(super) fn run(args: &CheckArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    let options = OpenOptions { lock: true, ..open::image_options(&args.open) };
    let report = check(&args.image, &options).map_err(|e| Failure::engine(&e, call))?;
    let Some(report) = report else { return Err(nothing_to_check(&args.image)) };
    if console.is_json() {
        console.document(&json(&args.image, &report))?;
    } else {
        console.result(&human(&args.image, &report))?;
    }
    Ok(match report.verdict() {
        Verdict::Clean => Exit::DONE,
        Verdict::Failed => Exit::CHECK_FAILED,
        Verdict::Corrupt => Exit::CHECK_CORRUPT,
        Verdict::Leaks => Exit::CHECK_LEAKS,
    })
}

/// Checks under a reader's lock; `None` for raw images.
fn check(image: &Path, options: &OpenOptions) -> qcow2::Result<Option<CheckReport>> {
    let file = OsHost.open(image, Access::Read).map_err(|e| Error::io(image, "open", None, e))?;
    let id = file.stat().map_err(|e| Error::io(image, "read the state of", None, e))?.id;
    file.lock(LockMode::Read).map_err(|e| match e {
        LockError::Held { .. } => Error::InUse { path: image.to_owned(), holders: OsHost.holders(id) },
        LockError::Io(e) => Error::io(image, "lock", None, e),
    })?;
    let format = match options.active_format {
        Some(format) => format,
        None => ImageFormat::detect(image, &*file)?,
    };
    if format == ImageFormat::Raw {
        return Ok(None);
    }
    let cluster0 = Qcow2::read_cluster0(image, &*file)?;
    let data = open_data_file(&OsHost, image, id, &cluster0, options)?;
    let data = data.as_ref().map(|(_, storage)| &**storage as &dyn Storage);
    check::check(image, &*file, data, &CheckOptions::default()).map(Some)
}

fn nothing_to_check(image: &Path) -> Failure {
    Report {
        kind: "unsupported",
        message: format!("{}: a raw image has no structure that could be checked", image.display()),
        hint: format!("if it is qcow2: qmerge check -f qcow2 {}", word(image)),
        exit: Exit::CHECK_UNSUPPORTED,
    }
    .into()
}

/// What was found, worst first, and what it means.
fn human(image: &Path, report: &CheckReport) -> String {
    let mut lines: Vec<String> = Vec::new();
    for finding in &report.findings {
        lines.push(format!("{}: {finding}", name(finding.severity)));
    }
    let counted = report.corruptions + report.check_errors + report.leaks;
    let told: u64 = report.findings.iter().map(|finding| finding.clusters).sum();
    if counted > told {
        lines.push(format!("... and {} more", counted - told));
    }
    if report.marked_corrupt {
        lines.push("The image is marked corrupt.".to_owned());
    }
    if report.dirty {
        lines.push("The image is marked dirty: it was not closed cleanly.".to_owned());
    }
    let file = word(image);
    lines.push(match report.verdict() {
        Verdict::Clean => "No errors were found.".to_owned(),
        Verdict::Failed => {
            format!("{} could not be read.", plural(report.check_errors, "structure", "structures"))
        }
        Verdict::Corrupt => format!(
            "{} and {} were found. Do not write to the image. To repair it: qemu-img check -r all {file}",
            plural(report.corruptions, "corruption", "corruptions"),
            plural(report.leaks, "leaked cluster", "leaked clusters"),
        ),
        Verdict::Leaks => format!(
            "{}: space is lost, the data is sound. To give it back: qemu-img check -r leaks {file}",
            plural(report.leaks, "leaked cluster", "leaked clusters"),
        ),
    });
    lines.push(format!(
        "{} of {} clusters are allocated, {} of them compressed, {} fragmented; the image ends at {}.",
        report.allocated_clusters,
        report.total_clusters,
        report.compressed_clusters,
        report.fragmented_clusters,
        size::exact(report.image_end_offset),
    ));
    lines.join("\n")
}

fn name(severity: Severity) -> &'static str {
    match severity {
        Severity::Corruption => "corruption",
        Severity::Error => "error",
        Severity::Leak => "leak",
    }
}

/// The object of `qemu-img check --output=json`, which leaves zeros out, and the findings.
fn json(image: &Path, report: &CheckReport) -> Value {
    let mut out = Map::new();
    out.insert("filename".into(), path(image));
    out.insert("format".into(), ImageFormat::Qcow2.name().into());
    out.insert("check-errors".into(), report.check_errors.into());
    out.insert("image-end-offset".into(), report.image_end_offset.into());
    out.insert("total-clusters".into(), report.total_clusters.into());
    for (key, number) in [
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
    ] {
        if number > 0 {
            out.insert(key.into(), number.into());
        }
    }
    let findings = report.findings.iter().map(|finding| {
        let mut object = json!({
            "severity": name(finding.severity),
            "host-offset": finding.host.get(),
            "clusters": finding.clusters,
            "message": finding.to_string(),
        });
        if let Some(guest) = finding.guest {
            object["guest-offset"] = guest.get().into();
        }
        object
    });
    out.insert("findings".into(), findings.collect());
    Value::Object(out)
}
