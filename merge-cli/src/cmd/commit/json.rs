//! Plan and result of a commit as JSON: the engine's own, the result with what stays true of the plan.

use qcow2::merge::{Plan, Report, Settled, Signs};
use serde_json::{Value, json};

use crate::output::json::{merged, value};

/// What a plan says that a result does not.
const OF_PLANS: [&str; 9] = [
    "restore-points-lost",
    "searched",
    "unreadable",
    "room-unknown",
    "signs",
    "data-files",
    "strangers",
    "resumed",
    "begins-anew",
];

/// The fields of the plan event.
pub(super) fn plan(plan: &Plan) -> Value {
    value(plan)
}

/// The fields of the result event: what the plan had, as it came out.
pub(super) fn result(plan: &Plan, report: &Report) -> Value {
    came_out(value(plan), report)
}

/// The fields of the plan event where nothing is merged: what a plan has, of nothing.
pub(super) fn settled(settled: &Settled) -> Value {
    let mut fields = value(settled);
    for list in [
        "restore-points-lost",
        "searched",
        "unreadable",
        "room-unknown",
        "data-files",
        "strangers",
        "emptied",
        "bitmaps-lost",
        "not-emptied",
        "obsolete",
    ] {
        fields[list] = json!([]);
    }
    for number in [
        "bytes-to-copy",
        "bytes-to-zero",
        "bytes-to-write",
        "clusters-to-allocate",
        "base-file-size-after",
        "old-tail",
        "bytes-freed",
    ] {
        fields[number] = 0.into();
    }
    for size in ["base-virtual-size-before", "base-virtual-size-after"] {
        fields[size] = settled.base_size.into();
    }
    fields["afterwards"] = json!({ "action": "keep" });
    fields["signs"] = value(&Signs::default());
    fields["resumed"] = Value::Null;
    fields["begins-anew"] = Value::Null;
    fields
}

/// The fields of the result event where nothing was merged.
pub(super) fn settled_result(settled: &Settled, report: &Report) -> Value {
    came_out(self::settled(settled), report)
}

fn came_out(mut plan: Value, report: &Report) -> Value {
    if let Value::Object(fields) = &mut plan {
        fields.retain(|key, _| !OF_PLANS.contains(&key.as_str()));
    }
    merged(plan, value(report))
}
