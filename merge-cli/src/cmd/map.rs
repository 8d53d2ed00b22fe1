//! `qmerge map`: which layer supplies each range of the disk.

use std::io::{self, Write};
use std::ops::Range;

use qcow2::chain::Chain;
use qcow2::chain::view::{Supplied, Supply};
use qcow2::error::{Error, shown};
use qcow2::image::Mapping;
use qcow2::storage::{Host, LockMode, OsHost};

use super::open;
use super::walk::walk;
use crate::call::Call;
use crate::cli::MapArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::harmless;

/// Prints the map, range by range as it is found: its length does not matter for memory.
pub(super) fn run(args: &MapArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    let chain = open::chain(&args.image, &open::options(&args.open), call)?;
    warn_if_written(&chain, console);
    if console.is_json() {
        let mut printer = Json::new(&chain, console.stream()).map_err(|e| Failure::engine(&e, call))?;
        walk(&chain, call, |part| printer.part(part))?;
        printer.end().map_err(Failure::stdout)?;
    } else if console.is_quiet() {
        walk(&chain, call, |_| Ok(()))?;
    } else {
        let mut out = console.stream();
        print_line(&mut out, "START", "LENGTH", "WHAT", "AT", "LAYER").map_err(Failure::stdout)?;
        walk(&chain, call, |part| line(&mut out, &chain, part))?;
        out.flush().map_err(Failure::stdout)?;
    }
    Ok(Exit::DONE)
}

/// Tells that the map may be out of date before it is read: it is made beside a program that writes.
fn warn_if_written(chain: &Chain, console: &Console) {
    for layer in chain.layers() {
        // Where locks cannot be read, nobody can say.
        if let Ok(Some(LockMode::Write)) = layer.image.file().used_by_others() {
            let error = Error::InUse { path: layer.path.clone(), holders: OsHost.holders(layer.id) };
            console.warn(&format!("warning: {error}, for writing: this map may be out of date already"));
        }
    }
}

/// The entries of `qemu-img map --output=json`.
struct Json<'a, W> {
    chain: &'a Chain,
    /// For each layer, whether its clusters were allocated ahead.
    preallocated: Vec<bool>,
    /// What was asked last: the layer, from where on, and the data found there.
    known: Option<(usize, u64, Range<u64>)>,
    out: W,
    line: Vec<u8>,
    begun: bool,
}

/// What an entry says of its range.
#[derive(Clone, Copy)]
struct Entry {
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
}

impl<'a, W: Write> Json<'a, W> {
    fn new(chain: &'a Chain, out: W) -> qcow2::Result<Self> {
        let layers = chain
            .layers()
            .iter()
            .map(|layer| layer.image.as_qcow2().map_or(Ok(false), |q| q.is_preallocated()));
        Ok(Self {
            chain,
            preallocated: layers.collect::<qcow2::Result<_>>()?,
            known: None,
            out,
            line: Vec::new(),
            begun: false,
        })
    }

    fn part(&mut self, part: &Supplied) -> io::Result<()> {
        let (layer, mapping) = match part.supply {
            Supply::Layer { layer, mapping } => (layer, mapping),
            // QEMU sees the end of a short layer from the layer above.
            Supply::PastEnd { layer } => (layer + 1, Mapping::Unallocated),
            Supply::Nothing => (0, Mapping::Unallocated),
        };
        let zero = matches!(mapping, Mapping::Zero { .. } | Mapping::Unallocated);
        let entry = Entry {
            depth: self.chain.active().saturating_sub(layer),
            present: mapping != Mapping::Unallocated,
            zero,
            data: !zero,
            compressed: matches!(mapping, Mapping::Compressed(_)),
            offset: match mapping {
                Mapping::Data { host } | Mapping::Zero { host: Some(host) } => Some(host.get()),
                _ => None,
            },
        };
        let (start, len) = (part.range.start.get(), part.range.len);
        match (mapping, self.preallocated.get(layer)) {
            (Mapping::Data { host }, Some(true)) => self.holes(layer, entry, start, host.get(), len),
            _ => self.entry(entry, start, len),
        }
    }

    /// Data in clusters that were allocated ahead is zero where the file has holes.
    fn holes(&mut self, layer: usize, entry: Entry, start: u64, host: u64, len: u64) -> io::Result<()> {
        let end = host + len;
        let mut at = host;
        while at < end {
            let data = self.next_data(layer, at);
            for (until, zero) in [(data.start.clamp(at, end), true), (data.end.clamp(at, end), false)] {
                if until > at {
                    let entry = Entry { zero, offset: Some(at), ..entry };
                    self.entry(entry, start + (at - host), until - at)?;
                    at = until;
                }
            }
        }
        Ok(())
    }

    /// The next range at or behind `at` where a layer's file holds data. The file is asked once for
    /// many extents: there may be millions of them in one hole.
    fn next_data(&mut self, layer: usize, at: u64) -> Range<u64> {
        if let Some((known, from, data)) = &self.known
            && *known == layer
            && (*from..data.end).contains(&at)
        {
            return data.clone();
        }
        let file = self.chain.layers().get(layer).map(|layer| layer.image.data_file());
        let data = match file.map(|file| file.next_data(at)) {
            Some(Ok(data)) => data.unwrap_or(u64::MAX..u64::MAX),
            // Holes are a mere help: what cannot be told is data.
            _ => at..u64::MAX,
        };
        self.known = Some((layer, at, data.clone()));
        data
    }

    fn entry(&mut self, entry: Entry, start: u64, len: u64) -> io::Result<()> {
        let Entry { depth, present, zero, data, compressed, offset } = entry;
        // Put together by hand: formatting would take most of the time of a long map.
        self.line.clear();
        self.line.extend_from_slice(if self.begun { b",\n{ \"start\": " } else { b"[{ \"start\": " });
        self.begun = true;
        self.number(start);
        self.line.extend_from_slice(b", \"length\": ");
        self.number(len);
        self.line.extend_from_slice(b", \"depth\": ");
        self.number(depth as u64);
        for (name, value) in
            [("present", present), ("zero", zero), ("data", data), ("compressed", compressed)]
        {
            self.line.extend_from_slice(b", \"");
            self.line.extend_from_slice(name.as_bytes());
            self.line.extend_from_slice(if value { b"\": true" } else { b"\": false" });
        }
        if let Some(offset) = offset {
            self.line.extend_from_slice(b", \"offset\": ");
            self.number(offset);
        }
        self.line.push(b'}');
        self.out.write_all(&self.line)
    }

    fn number(&mut self, value: u64) {
        let begin = self.line.len();
        let mut rest = value;
        loop {
            self.line.push(b'0' + (rest % 10) as u8);
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        if let Some(digits) = self.line.get_mut(begin..) {
            digits.reverse();
        }
    }

    fn end(&mut self) -> io::Result<()> {
        self.out.write_all(if self.begun { b"]\n" } else { b"[]\n" })?;
        self.out.flush()
    }
}

/// A line for people.
fn line(out: &mut impl Write, chain: &Chain, part: &Supplied) -> io::Result<()> {
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
    let layer = layer.and_then(|layer| chain.layers().get(layer));
    let layer = layer.map(|l| format!("[{}] {}", l.index, shown(&l.path))).unwrap_or_default();
    print_line(out, &part.range.start.to_string(), &format!("{:#x}", part.range.len), what, &at, &layer)
}

fn print_line(
    out: &mut impl Write,
    start: &str,
    len: &str,
    what: &str,
    at: &str,
    layer: &str,
) -> io::Result<()> {
    let line = format!("{start:<16}  {len:<16}  {what:<10}  {at:<16}  {layer}");
    writeln!(out, "{}", harmless(line.trim_end()))
}
