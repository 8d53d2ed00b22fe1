//! Images as JSON, with the keys of `qemu-img info --output=json` and some of our own.

use qcow2::format::Cluster0;
use qcow2::image::ImageFormat;
use qcow2::storage::LockMode;
use serde_json::{Map, Value, json};

use super::Layer;
use super::facts::Facts;
use crate::output::json::path;

/// The array for a chain, the active image first.
pub(super) fn chain(layers: &[Layer]) -> Value {
    let layers = layers.iter().map(|layer| {
        let mut object = image(&layer.facts);
        object["index"] = layer.index.into();
        object["visible-data"] = layer.visible_data.into();
        object["visible-zeros"] = layer.visible_zeros.into();
        object
    });
    layers.collect()
}

/// The object for one image.
pub(super) fn image(facts: &Facts) -> Value {
    let mut out = Map::new();
    out.insert("filename".into(), path(&facts.path));
    out.insert("format".into(), facts.format.name().into());
    out.insert("virtual-size".into(), facts.virtual_size().into());
    out.insert("actual-size".into(), facts.stat.allocated.into());
    out.insert("file-length".into(), facts.stat.len.into());
    if let Some(cluster0) = &facts.cluster0 {
        qcow2_fields(facts, cluster0, &mut out);
    }
    out.insert("dirty-flag".into(), facts.cluster0.as_ref().is_some_and(|c| c.header.is_dirty()).into());
    let is_known = facts.has_locks || facts.used.is_some();
    out.insert("in-use".into(), is_known.then_some(facts.used.is_some()).into());
    if let Some(mode) = facts.used {
        out.insert("in-use-for".into(), if mode == LockMode::Write { "writing" } else { "reading" }.into());
        let holders = facts.holders.iter().map(|h| json!({ "pid": h.pid, "name": h.name }));
        out.insert("holders".into(), holders.collect());
    }
    if let Some(unfinished) = &facts.unfinished {
        let fields = json!({
            "base": path(&unfinished.base),
            "top": path(&unfinished.top),
            "active": path(&unfinished.active),
            "bytes-done": unfinished.done,
            "bytes-total": unfinished.total,
            "percent": unfinished.percent,
            "switching": unfinished.is_switching,
            "removing": unfinished.is_removing,
        });
        out.insert("merge-pending".into(), fields);
    }
    if !facts.strangers.is_empty() {
        let strangers = facts.strangers.iter();
        let strangers =
            strangers.map(|stranger| json!({ "file": path(&stranger.file), "user": stranger.user }));
        out.insert("strangers".into(), strangers.collect());
    }
    if let Some((file, state)) = &facts.live_merge {
        let state = state.as_ref();
        let live = json!({
            "state-file": path(file),
            "disk": state.map(|s| s.disk.as_str()),
            "kind": state.map(|s| s.kind),
            "phase": state.map(|s| s.phase),
            "valid-top": state.map(|s| s.valid_top.as_str()),
        });
        out.insert("live-merge".into(), live);
    }
    if let Some(problem) = &facts.problem {
        out.insert("problem".into(), problem.to_string().into());
    }
    Value::Object(out)
}

fn qcow2_fields(facts: &Facts, cluster0: &Cluster0, out: &mut Map<String, Value>) {
    let header = &cluster0.header;
    out.insert("cluster-size".into(), header.geometry().cluster_size().into());
    if header.crypt_method != 0 {
        out.insert("encrypted".into(), true.into());
    }
    if let Some((name, resolved)) = facts.backing() {
        out.insert("backing-filename".into(), name.into());
        if let Ok(resolved) = resolved {
            out.insert("full-backing-filename".into(), path(&resolved));
        }
    }
    if let Some(format) = cluster0.backing_format() {
        out.insert("backing-filename-format".into(), format.into());
    }
    if let Some(into) = cluster0.merged_into() {
        out.insert("merged-into".into(), path(&into));
    }
    if let Some(into) = cluster0.merging_into() {
        out.insert("merging-into".into(), path(&into));
    }
    if !facts.snapshots.is_empty() {
        let list = facts.snapshots.iter().map(|s| {
            json!({
                "id": String::from_utf8_lossy(&s.id),
                "name": String::from_utf8_lossy(&s.name),
                "vm-state-size": s.vm_state_size,
                "date-sec": s.date_sec,
                "date-nsec": s.date_nsec,
                "vm-clock-sec": s.vm_clock_nsec / 1_000_000_000,
                "vm-clock-nsec": s.vm_clock_nsec % 1_000_000_000,
                "icount": s.icount.unwrap_or_default(),
            })
        });
        out.insert("snapshots".into(), list.collect());
    }
    let data = specific(facts, cluster0);
    out.insert("format-specific".into(), json!({ "type": ImageFormat::Qcow2.name(), "data": data }));
}

/// `format-specific.data`; QEMU leaves out what version 2 cannot say.
fn specific(facts: &Facts, cluster0: &Cluster0) -> Value {
    let header = &cluster0.header;
    let mut data = Map::new();
    data.insert("compat".into(), if header.version < 3 { "0.10" } else { "1.1" }.into());
    data.insert("compression-type".into(), header.compression.name().into());
    data.insert("refcount-bits".into(), header.geometry().refcount_bits().into());
    if header.version < 3 {
        return data.into();
    }
    data.insert("lazy-refcounts".into(), header.lazy_refcounts().into());
    data.insert("corrupt".into(), header.is_corrupt().into());
    data.insert("extended-l2".into(), header.extended_l2().into());
    if header.has_data_file() {
        if let Some(name) = cluster0.data_file_name() {
            data.insert("data-file".into(), String::from_utf8_lossy(name).into());
        }
        data.insert("data-file-raw".into(), header.data_file_raw().into());
    }
    if !facts.bitmaps.is_empty() {
        let list = facts.bitmaps.iter().map(|b| {
            let flags = [(b.is_in_use(), "in-use"), (b.is_auto(), "auto")];
            let flags: Vec<_> = flags.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
            json!({ "name": b.display_name(), "granularity": b.granularity(), "flags": flags })
        });
        data.insert("bitmaps".into(), list.collect());
    }
    data.into()
}
