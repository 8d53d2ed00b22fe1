//! The plan and the result of a commit in words.

use std::path::PathBuf;

use qcow2::error::shown;
use qcow2::merge::{Afterwards, DataFileFate, Kept, Plan, Report, Settled};

use crate::cli::CommitArgs;
use crate::output::human::{Fields, list, plural};
use crate::output::size;

/// The plan; `domains` are the fields that tell of libvirt.
pub(super) fn plan(plan: &Plan, args: &CommitArgs, domains: &[(&'static str, String)]) -> String {
    let mut fields = Fields::default();
    // All layers from base up to top stop being restore points, except top itself.
    let below = plan.restore_points_lost.iter().skip(1);
    fields.add("merge", format!("{} into {}", list(below.chain([&plan.top])), shown(&plan.base)));
    if let Some(resumed) = plan.resumed {
        let done = size::short(resumed.done);
        fields.add("continues", format!("at {} %: {done} are done already", resumed.percent));
    }
    if let Some(why) = plan.begins_anew {
        fields.add("begins anew", format!("{why}; the layers above it hold everything"));
    }
    fields.add("to copy", size::exact(plan.totals.bytes_to_copy));
    fields.add("to zero", size::exact(plan.totals.bytes_to_zero));
    if plan.totals.clusters_to_allocate > 0 {
        fields.add("to allocate", plural(plan.totals.clusters_to_allocate, "cluster", "clusters"));
    }
    fields.add("base's file", format!("at most {} afterwards", size::exact(plan.base_file_size_after)));
    if !plan.room_unknown.is_empty() {
        fields.add("not known", format!("whether there is room: {}", room_unknown(&plan.room_unknown)));
    }
    if plan.base_size_after > plan.base_size_before {
        let change = size::change(plan.base_size_before, plan.base_size_after);
        fields.add("base's disk", format!("grows {change}"));
    }
    fields.add("afterwards", afterwards(plan));
    fields.add("not needed then", obsolete(plan, args));
    for kept in &plan.kept {
        fields.add("keeps its data", keeps(kept));
    }
    if plan.bytes_freed > 0 {
        fields.add("to free", format!("at most {}", size::exact(plan.bytes_freed)));
    }
    if let Some(unremoved) = unremoved(&plan.unremoved, args) {
        fields.add("left over", format!("of a merge that was stopped: {unremoved}"));
    }
    let what = if plan.restore_points_lost.len() == 1 { "a restore point" } else { "restore points" };
    let lost = list(&plan.restore_points_lost);
    fields.add(
        "restore points",
        format!("{lost} will be {what} no more, as soon as the first byte is written"),
    );
    for stranger in &plan.strangers {
        let (file, user) = (shown(&stranger.file), stranger.user);
        fields.add(
            "not believed",
            format!("{file}: it belongs to the user {user}, who may not write the image beside it, and is left alone"),
        );
    }
    for data in &plan.data_files {
        let what = match data.fate {
            DataFileFate::Written => "it takes the data".to_owned(),
            DataFileFate::Emptied => "it is emptied".to_owned(),
            DataFileFate::Removed => "it is removed".to_owned(),
            DataFileFate::Kept(why) => format!("it stays as it is: {why}"),
            _ => continue,
        };
        fields.add("data file", format!("{} of {}: {what}", shown(&data.file), shown(&data.image)));
    }
    for lost in &plan.bitmaps_lost {
        fields.add("lost", format!("the persistent bitmap {} of {}", lost.name, shown(&lost.file)));
    }
    if plan.old_tail > 0 {
        fields.add("old tail", old_tail(plan));
    }
    others(plan, &mut fields);
    for (title, text) in domains {
        fields.add(title, text);
    }
    fields.render()
}

/// Where other users of base were searched, and what stays unknown.
fn others(plan: &Plan, fields: &mut Fields) {
    let signs = &plan.signs;
    if !plan.searched.is_empty() {
        let files = plural(signs.looked_at as u64, "file", "files");
        let mut text =
            format!("{}: {files}, for images that use base or a merged layer", list(&plan.searched));
        for folder in &signs.nearby {
            text += &format!("\nand the folders in {}, as far as they can be read", shown(folder));
        }
        fields.add("searched", text);
    }
    if signs.is_elsewhere {
        let what =
            "whether images elsewhere use base, which lies in another folder: --scan DIR searches there";
        fields.add("not known", what);
    }
    let unknown = [&plan.unreadable[..], &signs.left_out[..]].concat();
    if !unknown.is_empty() {
        let files = list(&unknown);
        fields.add("not known", format!("whether these use base, as they could not be read: {files}"));
    }
    if !signs.possible_users.is_empty() {
        let what = "perhaps used base or a merged layer before a move; their backing names lead nowhere";
        fields.add("take care", format!("{}: {what}", list(&signs.possible_users)));
    }
    if signs.links > 1 {
        let known = match signs.other_names.as_slice() {
            [] => String::new(),
            names => format!(" ({})", list(names)),
        };
        let others = plural(signs.links - 1, "other name", "other names");
        fields.add(
            "take care",
            format!("base has {others}, by a hard link{known}: what is read there changes too"),
        );
    }
    if !signs.linked.is_empty() {
        let what = "have other names, by hard links: who reads there may miss what is merged";
        fields.add("take care", format!("{}: {what}", list(&signs.linked)));
    }
    if signs.is_read_only {
        fields.add("take care", "nobody has the permission to write base: is it a template for others?");
    }
}

/// What to say if nothing is merged.
pub(super) fn settled(settled: &Settled, args: &CommitArgs) -> String {
    let reason = &settled.reason;
    match unremoved(&settled.unremoved, args) {
        None => format!("nothing to do: {reason}"),
        Some(unremoved) => format!("nothing to merge: {reason}\nleft over of that:  {unremoved}"),
    }
}

/// What came of that.
pub(super) fn settled_result(settled: &Settled, report: &Report) -> String {
    let layers = layers(report);
    let what = if layers.is_empty() { "do" } else { "merge" };
    [vec![format!("nothing to {what}: {}", settled.reason)], layers].concat().join("\n")
}

/// The result.
pub(super) fn result(plan: &Plan, report: &Report) -> String {
    let mut lines = vec![merged(plan, report)];
    if let Some(digest) = report.digest {
        lines
            .push(format!("verified: every merged range reads back; digest of the disk: crc32 {digest:08x}"));
    }
    match &plan.afterwards {
        Afterwards::Relink { overlay, name, .. } => {
            lines.push(format!("{} now has {} as its backing file", shown(overlay), shown(name)));
        }
        Afterwards::Empty { .. } => {
            lines.push(format!("{} is now an empty overlay on {}", shown(&plan.active), shown(&plan.base)));
        }
        Afterwards::Keep => {
            lines.push(format!("{} was left as it is; its data stands in base too", shown(&plan.active)));
        }
        Afterwards::Delete { .. } if report.kept.iter().any(|kept| kept.path == plan.active) => {
            lines.push(format!("{} is now an empty overlay on {}", shown(&plan.active), shown(&plan.base)));
        }
        Afterwards::Delete { .. } => {}
    }
    if plan.old_tail > 0 {
        lines.push(format!("note: {}", old_tail(plan)));
    }
    lines.extend(layers(report));
    lines.extend(plan.kept.iter().map(|kept| format!("keeps its data: {}", keeps(kept))));
    if report.freed > 0 {
        lines.push(format!("freed: {}", size::short(report.freed)));
    }
    lines.join("\n")
}

/// What was merged; with `--delete`, an overlay that holds nothing was merged before.
fn merged(plan: &Plan, report: &Report) -> String {
    let base = shown(&plan.base);
    if report.totals.is_empty() && matches!(plan.afterwards, Afterwards::Delete { .. }) {
        return format!("nothing was left to merge into {base}");
    }
    format!(
        "merged into {base}: {} copied, {} zeroed, in {}",
        size::short(report.totals.bytes_to_copy),
        size::short(report.totals.bytes_to_zero),
        size::duration(report.elapsed.as_secs_f64())
    )
}

/// What was done with the obsolete layers.
fn layers(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    if !report.deleted.is_empty() {
        lines.push(format!("removed: {}", list(&report.deleted)));
    }
    for kept in &report.kept {
        lines.push(format!("not removed: {}: {}", shown(&kept.path), kept.why));
    }
    let (emptied, full): (Vec<_>, Vec<_>) =
        report.marked.iter().cloned().partition(|file| report.emptied.contains(file));
    if !emptied.is_empty() {
        let files = list(&emptied);
        lines.push(format!("not needed any more, now empty overlays on base, and marked as merged: {files}"));
    }
    if !full.is_empty() {
        lines.push(format!("not needed any more, and marked as merged: {}", list(&full)));
    }
    if !report.unmarked.is_empty() {
        lines.push(format!(
            "not needed any more, without room for a mark (do not merge them again): {}",
            list(&report.unmarked)
        ));
    }
    lines
}

fn afterwards(plan: &Plan) -> String {
    match &plan.afterwards {
        Afterwards::Relink { overlay, name, atomic } => {
            format!("{} gets {} as its backing file{}", shown(overlay), shown(name), torn(*atomic))
        }
        Afterwards::Empty { atomic, .. } => {
            let active = shown(&plan.active);
            format!("{active} becomes an empty overlay on {}{}", shown(&plan.base), torn(*atomic))
        }
        Afterwards::Keep => format!("{} stays as it is", shown(&plan.active)),
        Afterwards::Delete { atomic, .. } => {
            let active = shown(&plan.active);
            format!("{active} is removed; boot from {}{}", shown(&plan.base), torn(*atomic))
        }
    }
}

/// A warning if the switch of the header takes more than one sector.
fn torn(atomic: bool) -> &'static str {
    let careful = "\n(its header takes more than one sector: after a power cut just then, the same command makes it whole)";
    if atomic { "" } else { careful }
}

fn obsolete(plan: &Plan, args: &CommitArgs) -> String {
    let what = match args.delete {
        true => "will be removed",
        false if plan.kept.is_empty() => "stay, as empty overlays on base, marked as merged",
        false => "stay, marked as merged",
    };
    if plan.obsolete.is_empty() { "no file".to_owned() } else { format!("{}: {what}", list(&plan.obsolete)) }
}

/// A layer that cannot be emptied, why, and what that means.
fn keeps(kept: &Kept) -> String {
    format!(
        "{}: {}; a configuration that recorded the chain layer by layer shows old data where it names this one",
        shown(&kept.path),
        kept.why
    )
}

/// The files that an unfinished merge still has to remove, if any.
fn unremoved(files: &[PathBuf], args: &CommitArgs) -> Option<String> {
    let what = if args.delete { "will be removed" } else { "stay, marked as merged" };
    (!files.is_empty()).then(|| format!("{}: {what}", list(files)))
}

fn old_tail(plan: &Plan) -> String {
    format!(
        "base is larger: behind the end of {} the machine will see {} of base's old content",
        shown(&plan.active),
        size::exact(plan.old_tail)
    )
}

fn room_unknown(files: &[PathBuf]) -> String {
    format!(
        "the file system of {} does not say how much is free; when it is full, nothing is lost",
        list(files)
    )
}
