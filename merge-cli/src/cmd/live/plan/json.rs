//! Plan and result of a live merge as JSON.

use qmp_client::{DataFate, End, Layer, Plan};
use serde_json::{Value, json};

use crate::output::json::paths;

/// The fields of the plan event.
pub(in crate::cmd::live) fn fields(plan: &Plan) -> Value {
    let commands =
        plan.commands.iter().map(|(name, arguments)| json!({"execute": name, "arguments": arguments}));
    let bitmaps =
        plan.bitmaps_lost().map(|(layer, name)| json!({"file": layer.file, "name": name})).collect::<Value>();
    let data_files = plan.data_files().map(|(file, image, fate)| {
        let action = match fate {
            DataFate::Written => "write",
            DataFate::Emptied => "empty",
            DataFate::Stays => "keep",
            _ => "unknown",
        };
        json!({"file": file, "image": image.file, "action": action})
    });
    let mut out = json!({
        "disk": plan.disk.name(),
        "kind": plan.kind(),
        "job": plan.job,
        "base": plan.base.as_ref().map(|base| &base.file),
        "top": plan.merged.first().map(|top| &top.file),
        "active": plan.disk.active().file,
        "bytes-to-copy": plan.bytes_to_copy(),
        "bytes-to-zero": plan.bytes.zero,
        // QEMU decides, and does not tell.
        "clusters-to-allocate": null,
        "base-file-size-after": plan.receiver().actual_size.map(|size| size.saturating_add(plan.growth())),
        "counted": plan.bytes.counted,
        "obsolete": if plan.end == End::KeepOverlay { json!([]) } else { files(&plan.merged) },
        "becomes-empty": plan.emptied().map(|layer| layer.file.as_str()).collect::<Value>(),
        "stale": plan.stale().map(|(layer, why)| json!({"file": layer.file, "reason": why.to_string()})).collect::<Value>(),
        "restore-points-lost": plan.restore_points_lost().iter().map(|layer| layer.file.as_str()).collect::<Value>(),
        "bitmaps-lost": bitmaps,
        "snapshots-changed": plan.snapshots_changed().map(|layer| layer.file.as_str()).collect::<Value>(),
        "data-files": data_files.collect::<Value>(),
        "searched": paths(&plan.searched.folders),
        "unreadable": paths(&plan.searched.unreadable),
        "broken": paths(&plan.searched.broken),
        "afterwards": afterwards(plan),
        "commands": commands.collect::<Value>(),
    });
    if let Some((_, free)) = &plan.room {
        out["free-space"] = (*free).into();
    }
    if let Some((before, after)) = plan.grows_disk_of_base() {
        out["base-virtual-size-before"] = before.into();
        out["base-virtual-size-after"] = after.into();
    }
    out
}

fn files(layers: &[Layer]) -> Value {
    layers.iter().map(|layer| layer.file.as_str()).collect()
}

fn afterwards(plan: &Plan) -> Value {
    if let Some((overlay, name)) = &plan.relink {
        let waits = plan.end == End::WaitForFinish;
        return json!({"action": "relink", "overlay": overlay.file, "backing-filename": name, "waits": waits});
    }
    let action = match plan.end {
        End::Pivot => "pivot",
        End::KeepOverlay => "keep-overlay",
        End::Ready | End::Finish | End::WaitForFinish => "ready",
    };
    json!({ "action": action })
}
