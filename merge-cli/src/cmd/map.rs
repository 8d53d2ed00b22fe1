//! `qmerge map`: which layer supplies each range of the disk.

use std::io::{self, Write};

use qcow2::chain::Chain;
use qcow2::chain::view::{Supplied, Supply};
use qcow2::image::Mapping;

use super::open;
use super::walk::walk;
use crate::call::Call;
use crate::cli::MapArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;

/// Prints the map, range by range as it is found: its length does not matter for memory.
pub(super) fn run(args: &MapArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    let chain = open::chain(&args.image, &open::options(&args.open), call)?;
    let printer = Printer { chain: &chain, json: console.is_json(), begun: false };
    if console.is_quiet() && !console.is_json() {
        walk(&chain, call, |_| Ok(()))?;
        return Ok(Exit::DONE);
    }
    let mut out = console.stream();
    printer.print(&mut out, call)?;
    out.flush().map_err(Failure::stdout)?;
    Ok(Exit::DONE)
}

struct Printer<'a> {
    chain: &'a Chain,
    json: bool,
    begun: bool,
}

impl Printer<'_> {
    fn print(mut self, out: &mut impl Write, call: &Call) -> Result<(), Failure> {
        if !self.json {
            writeln!(out, "{:<16}  {:<16}  {:<10}  {:<16}  LAYER", "START", "LENGTH", "WHAT", "AT")
                .map_err(Failure::stdout)?;
        }
        let chain = self.chain;
        walk(chain, call, |part| if self.json { self.json(out, part) } else { self.line(out, part) })?;
        if self.json {
            out.write_all(if self.begun { b"]\n" } else { b"[]\n" }).map_err(Failure::stdout)?;
        }
        Ok(())
    }

    /// An entry with the fields of `qemu-img map --output=json`.
    fn json(&mut self, out: &mut impl Write, part: &Supplied) -> io::Result<()> {
        let active = self.chain.active();
        let (layer, mapping) = match part.supply {
            Supply::Layer { layer, mapping } => (layer, mapping),
            // QEMU sees the end of a short layer from the layer above.
            Supply::PastEnd { layer } => (layer + 1, Mapping::Unallocated),
            Supply::Nothing => (0, Mapping::Unallocated),
        };
        let depth = active.saturating_sub(layer);
        let present = mapping != Mapping::Unallocated;
        let zero = matches!(mapping, Mapping::Zero { .. } | Mapping::Unallocated);
        let compressed = matches!(mapping, Mapping::Compressed(_));
        let host = match mapping {
            Mapping::Data { host } | Mapping::Zero { host: Some(host) } => Some(host.get()),
            _ => None,
        };
        write!(
            out,
            "{}{{ \"start\": {}, \"length\": {}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \
             \"data\": {}, \"compressed\": {compressed}",
            if self.begun { ",\n" } else { "[" },
            part.range.start.get(),
            part.range.len,
            !zero,
        )?;
        self.begun = true;
        match host {
            Some(host) => write!(out, ", \"offset\": {host}}}"),
            None => out.write_all(b"}"),
        }
    }

    /// A line for people.
    fn line(&self, out: &mut impl Write, part: &Supplied) -> io::Result<()> {
        let (what, at, layer) = match part.supply {
            Supply::Layer { layer, mapping } => {
                let (what, host) = match mapping {
                    Mapping::Data { host } => ("data", Some(host)),
                    Mapping::Compressed(_) => ("compressed", None),
                    Mapping::Zero { host } => ("zeros", host),
                    Mapping::Unallocated => ("nothing", None),
                };
                (what, host, Some(layer))
            }
            Supply::PastEnd { layer } => ("past end", None, Some(layer)),
            Supply::Nothing => ("nothing", None, None),
        };
        let at = at.map(|host| host.to_string()).unwrap_or_default();
        let layer = layer.and_then(|layer| self.chain.layers().get(layer));
        let layer = layer.map(|l| format!("[{}] {}", l.index, l.path.display())).unwrap_or_default();
        let len = format!("{:#x}", part.range.len);
        let start = part.range.start.to_string();
        let line = format!("{start:<16}  {len:<16}  {what:<10}  {at:<16}  {layer}");
        writeln!(out, "{}", line.trim_end())
    }
}
