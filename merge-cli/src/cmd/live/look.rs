//! The verbs that only look at disks.

use qmp_client::{Disk, Graph, Layer};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::output::Console;
use crate::output::human::{Table, printable};
use crate::output::size;

/// Prints the disks.
pub(super) fn list(graph: &Graph, console: &Console) -> Result<(), Failure> {
    if console.is_json() {
        return console.document(&graph.disks().iter().map(in_list).collect());
    }
    if graph.disks().is_empty() {
        console.note("there is no disk: no device has a medium, and nothing is exported");
        return Ok(());
    }
    let mut table = Table::new(&["DISK", "FORMAT", ">VIRTUAL SIZE", "NODE", "FILE"]);
    for disk in graph.disks() {
        let active = disk.active();
        let size = size::short(active.virtual_size);
        table.row([disk.name(), &active.format, &size, &active.node, &active.file].map(printable).into());
    }
    console.result(&table.render())
}

/// A disk as `live list --json` has it.
pub(super) fn in_list(disk: &Disk) -> Value {
    let active = disk.active();
    json!({
        "disk": disk.name(),
        "node": active.node,
        "file": active.file,
        "format": active.format,
        "virtual-size": active.virtual_size,
    })
}

/// Prints the layers of a disk, from the active one down.
pub(super) fn chain(disk: &Disk, console: &Console) -> Result<(), Failure> {
    if console.is_json() {
        return console.document(&disk.layers().iter().map(layer).collect());
    }
    let head = ["LAYER", "FORMAT", ">VIRTUAL SIZE", ">ON DISK", "NODE", "PROTOCOL", "FILE"];
    let mut table = Table::new(&head);
    for layer in disk.layers() {
        let cells = [
            &format!("[{}]", layer.index),
            &layer.format,
            &size::short(layer.virtual_size),
            &layer.actual_size.map_or("?".to_owned(), size::short),
            &layer.node,
            layer.protocol.as_ref().unwrap_or(&layer.format),
            &layer.file,
        ];
        table.row(cells.map(|cell| printable(cell)).into());
    }
    console.result(&table.render())
}

/// A layer, with QEMU's own names for what QEMU tells.
fn layer(layer: &Layer) -> Value {
    let mut out = json!({
        "index": layer.index,
        "node": layer.node,
        "filename": layer.file,
        "format": layer.format,
        "virtual-size": layer.virtual_size,
        "ro": layer.read_only,
        "bitmaps": layer.bitmaps,
    });
    let backing = layer.backing.as_ref();
    let known: [(&str, Option<Value>); 6] = [
        ("actual-size", layer.actual_size.map(Value::from)),
        ("protocol", layer.protocol.clone().map(Value::from)),
        ("protocol-node", layer.protocol_node.clone().map(Value::from)),
        ("backing-filename", backing.map(|b| b.name.clone().into())),
        ("backing-filename-format", backing.and_then(|b| b.format.clone()).map(Value::from)),
        ("full-backing-filename", backing.and_then(|b| b.resolved.clone()).map(Value::from)),
    ];
    for (key, value) in known {
        if let Some(value) = value {
            out[key] = value;
        }
    }
    out
}
