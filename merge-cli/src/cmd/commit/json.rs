//! Plan and result of a commit as JSON.

use std::path::Path;

use qcow2::merge::{Afterwards, DataFileFate, Plan, Report, Settled, Signs, Totals};
use serde_json::{Value, json};

use crate::output::json::{path, paths};

/// The fields of the plan event.
pub(super) fn plan(plan: &Plan) -> Value {
    let mut fields = common(plan, &plan.totals, plan.base_file_size_after);
    fields["restore-points-lost"] = paths(&plan.restore_points_lost);
    fields["searched"] = paths(&plan.searched);
    fields["unreadable"] = paths(&plan.unreadable);
    fields["room-unknown"] = paths(&plan.room_unknown);
    fields["signs"] = signs(&plan.signs);
    fields["obsolete"] = paths(&plan.obsolete);
    let data_files = plan.data_files.iter().map(|data| {
        let (action, reason) = match data.fate {
            DataFileFate::Written => ("write", None),
            DataFileFate::Emptied => ("empty", None),
            DataFileFate::Removed => ("remove", None),
            DataFileFate::Kept(why) => ("keep", Some(why.to_string())),
            _ => ("unknown", None),
        };
        json!({ "file": path(&data.file), "image": path(&data.image), "action": action, "reason": reason })
    });
    let strangers = plan.strangers.iter();
    fields["strangers"] =
        strangers.map(|stranger| json!({ "file": path(&stranger.file), "user": stranger.user })).collect();
    fields["data-files"] = data_files.collect();
    fields["emptied"] = paths(&plan.emptied);
    fields["bytes-freed"] = plan.bytes_freed.into();
    fields["resumed"] = match plan.resumed {
        Some(resumed) => json!({ "bytes-done": resumed.done, "percent": resumed.percent }),
        None => Value::Null,
    };
    fields["begins-anew"] = plan.begins_anew.map(|why| why.to_string()).into();
    fields
}

/// The fields of the result event: what the plan had, as it came out.
pub(super) fn result(plan: &Plan, report: &Report) -> Value {
    let mut fields = common(plan, &report.totals, report.base_file_size);
    fields["obsolete"] = paths(&plan.obsolete);
    came_out(&mut fields, report);
    fields
}

fn came_out(fields: &mut Value, report: &Report) {
    fields["emptied"] = paths(&report.emptied);
    fields["bytes-freed"] = report.freed.into();
    fields["deleted"] = paths(&report.deleted);
    fields["marked"] = paths(&report.marked);
    fields["unmarked"] = paths(&report.unmarked);
    let kept = report.kept.iter().map(|(file, why)| json!({ "file": path(file), "reason": why }));
    fields["kept"] = kept.collect();
    fields["seconds"] = report.elapsed.as_secs_f64().into();
    if let Some(digest) = report.digest {
        fields["digest"] = format!("{digest:08x}").into();
    }
}

/// The fields of the plan event where nothing is merged: what a plan has, of nothing.
pub(super) fn settled(settled: &Settled) -> Value {
    let mut fields = nothing(settled, 0);
    for list in [
        "restore-points-lost",
        "searched",
        "unreadable",
        "room-unknown",
        "data-files",
        "strangers",
        "emptied",
    ] {
        fields[list] = json!([]);
    }
    fields["signs"] = signs(&Signs::default());
    fields["bytes-freed"] = 0.into();
    fields["resumed"] = Value::Null;
    fields["begins-anew"] = Value::Null;
    fields
}

/// The fields of the result event where nothing was merged.
pub(super) fn settled_result(settled: &Settled, report: &Report) -> Value {
    let mut fields = nothing(settled, report.base_file_size);
    came_out(&mut fields, report);
    fields
}

fn nothing(settled: &Settled, base_file_size: u64) -> Value {
    json!({
        "base": path(&settled.base),
        "top": path(&settled.top),
        "active": path(&settled.active),
        "bytes-to-copy": 0,
        "bytes-to-zero": 0,
        "bytes-to-write": 0,
        "clusters-to-allocate": 0,
        "base-file-size-after": base_file_size,
        "base-virtual-size-before": settled.base_size,
        "base-virtual-size-after": settled.base_size,
        "old-tail": 0,
        "bitmaps-lost": [],
        "left-over": paths(&settled.unremoved),
        "not-emptied": [],
        "afterwards": afterwards(&Afterwards::Keep),
        "obsolete": [],
        "nothing-to-do": settled.reason,
    })
}

fn common(plan: &Plan, totals: &Totals, base_file_size: u64) -> Value {
    let bitmaps = plan.bitmaps_lost.iter().map(|(file, name)| json!({ "file": path(file), "name": name }));
    let not_emptied = plan.kept.iter().map(|kept| json!({ "file": path(&kept.path), "reason": kept.why }));
    json!({
        "base": path(&plan.base),
        "top": path(&plan.top),
        "active": path(&plan.active),
        "bytes-to-copy": totals.bytes_to_copy,
        "bytes-to-zero": totals.bytes_to_zero,
        "bytes-to-write": totals.bytes_to_write,
        "clusters-to-allocate": totals.clusters_to_allocate,
        "base-file-size-after": base_file_size,
        "base-virtual-size-before": plan.base_size_before,
        "base-virtual-size-after": plan.base_size_after,
        "old-tail": plan.old_tail,
        "bitmaps-lost": bitmaps.collect::<Value>(),
        "left-over": paths(&plan.unremoved),
        "not-emptied": not_emptied.collect::<Value>(),
        "afterwards": afterwards(&plan.afterwards),
    })
}

fn signs(signs: &Signs) -> Value {
    json!({
        "looked-at": signs.looked_at,
        "searched-nearby": paths(&signs.nearby),
        "not-searched": paths(&signs.left_out),
        "base-links": signs.links,
        "base-other-names": paths(&signs.other_names),
        "linked-layers": paths(&signs.linked),
        "base-read-only": signs.is_read_only,
        "base-elsewhere": signs.is_elsewhere,
        "possible-users": paths(&signs.possible_users),
    })
}

fn afterwards(afterwards: &Afterwards) -> Value {
    match afterwards {
        Afterwards::Relink { overlay, name, atomic } => {
            json!({ "action": "relink", "overlay": path(overlay), "backing-filename": path(Path::new(name)), "atomic": atomic })
        }
        Afterwards::Empty { name, atomic } => {
            json!({ "action": "empty", "backing-filename": name.as_ref().map(|name| path(Path::new(name))), "atomic": atomic })
        }
        Afterwards::Keep => json!({ "action": "keep" }),
        Afterwards::Delete { .. } => json!({ "action": "delete" }),
    }
}
