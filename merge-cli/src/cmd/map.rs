//! `qmerge map`: which layer supplies each range of the disk.

use std::io::{self, Write};

use qcow2::chain::view::{Supplied, Supply, View};
use qcow2::chain::{Chain, Mapper};
use qcow2::error::{Error, shown};
use qcow2::image::Mapping;
use qcow2::storage::{Host, LockMode, OsHost};

use super::open;
use crate::call::Call;
use crate::cli::MapArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::harmless;

/// Prints the map range by range, so that memory does not depend on its length.
pub(super) fn run(args: &MapArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    let chain = open::chain(&args.image, &open::options(&args.open), call)?;
    warn_if_written(&chain, console);
    let images = chain.images();
    let view = View::new(&images, 0, chain.active());
    let done = if console.is_json() {
        json(&chain, view, &mut console.stream())
    } else if console.is_quiet() {
        view.walk(|_| Ok(()))
    } else {
        text(&chain, view, &mut console.stream())
    };
    match done {
        Ok(()) => Ok(Exit::DONE),
        // The reader has what it wanted (`| head`), and nothing else was to be done.
        Err(Stopped::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::DONE),
        Err(Stopped::Output(error)) => Err(Failure::stdout(&error)),
        Err(Stopped::Engine(error)) => Err(Failure::engine(&error, call)),
    }
}

/// Warns that the map may be out of date soon, if a program writes to the chain meanwhile.
fn warn_if_written(chain: &Chain, console: &Console) {
    for layer in chain.layers() {
        // If locks cannot be read, this is unknown.
        if let Ok(Some(LockMode::Write)) = layer.image.file().used_by_others() {
            let error = Error::InUse { path: layer.path.clone(), holders: OsHost.holders(layer.id) };
            console.warn(&format!("warning: {error}, for writing: this map may be out of date already"));
        }
    }
}

/// A map as one JSON document, an entry a line.
fn json(chain: &Chain, view: View<'_>, out: &mut impl Write) -> Result<(), Stopped> {
    let mut mapper = Mapper::new(chain)?;
    let mut before: &[u8] = b"[";
    view.walk(|part| -> Result<(), Stopped> {
        mapper.entries(part, &mut |entry| {
            out.write_all(before)?;
            before = b",\n";
            Ok(serde_json::to_writer(&mut *out, &entry).map_err(io::Error::from)?)
        })
    })?;
    out.write_all(if before == b"[" { b"[]\n" } else { b"]\n" })?;
    Ok(out.flush()?)
}

/// What ends a map early.
enum Stopped {
    Engine(Error),
    Output(io::Error),
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Engine(error)
    }
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// A map for people.
fn text(chain: &Chain, view: View<'_>, out: &mut impl Write) -> Result<(), Stopped> {
    print_line(out, "START", "LENGTH", "WHAT", "AT", "LAYER")?;
    view.walk(|part| Ok::<_, Stopped>(line(out, chain, part)?))?;
    Ok(out.flush()?)
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
