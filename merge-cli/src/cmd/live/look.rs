//! The verbs that only look at disks.

use qmp_client::{Disk, Graph};

use crate::failure::Failure;
use crate::output::Console;
use crate::output::human::{Table, printable};
use crate::output::json::value;
use crate::output::size;

/// Prints the disks.
pub(super) fn list(graph: &Graph, console: &Console) -> Result<(), Failure> {
    if console.is_json() {
        return console.document(&value(&graph.disks()));
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

/// Prints the layers of a disk, from the active one down.
pub(super) fn chain(disk: &Disk, console: &Console) -> Result<(), Failure> {
    if console.is_json() {
        return console.document(&value(&disk.layers()));
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
