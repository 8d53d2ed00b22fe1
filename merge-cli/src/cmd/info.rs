//! `qmerge info`: what an image, or each layer of its chain, is.

mod facts;
mod human;
mod json;

use std::path::Path;

use qcow2::ErrorKind;
use qcow2::chain::view::Supply;
use qcow2::chain::{self, Chain};
use qcow2::image::{Image, Mapping};
use qcow2::storage::OsHost;

use self::facts::Facts;
use super::{open, walk};
use crate::call::Call;
use crate::cli::InfoArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;

/// Prints what the image is. Without `--chain` no other file is opened.
pub(super) fn run(args: &InfoArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    if args.chain {
        return chain(args, call, console);
    }
    let (format, dir) = (args.open.image.format.map(Into::into), args.journal_dir.as_deref());
    let facts = Facts::read(&OsHost, &args.image, format, dir).map_err(|e| Failure::engine(&e, call))?;
    if console.is_json() {
        console.document(&json::image(&facts))?;
    } else {
        console.result(&human::image(&facts))?;
    }
    match &facts.problem {
        // A sound image that is not for this engine has been shown like any other.
        Some(problem) if problem.kind() != ErrorKind::Unsupported => Err(Failure::engine(problem, call)),
        _ => Ok(Exit::DONE),
    }
}

/// A layer of a chain: what it is, and what the guest still sees through it.
#[derive(Debug)]
struct Layer {
    index: usize,
    facts: Facts,
    /// Bytes of data that the guest reads from this layer.
    visible_data: u64,
    /// Bytes that the guest reads as zeros because this layer says so.
    visible_zeros: u64,
}

/// Prints every layer, from the active image down.
fn chain(args: &InfoArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    let chain = open::chain(&args.image, &open::options(&args.open), call)?;
    let mut layers = read_layers(&chain, args.journal_dir.as_deref(), call)?;
    count_visible(&chain, &mut layers, call)?;
    layers.reverse();
    if console.is_json() {
        console.document(&json::chain(&layers))?;
    } else {
        console.result(&human::chain(&layers))?;
    }
    Ok(Exit::DONE)
}

fn read_layers(chain: &Chain, dir: Option<&Path>, call: &Call) -> Result<Vec<Layer>, Failure> {
    let layers = chain.layers().iter().map(|layer| {
        let facts = Facts::read(&OsHost, &layer.path, Some(layer.image.format()), dir)?;
        Ok(Layer { index: layer.index, facts, visible_data: 0, visible_zeros: 0 })
    });
    layers.collect::<Result<_, _>>().map_err(|e| Failure::engine(&e, call))
}

/// What the guest sees through a layer of a format that is not read here is what no layer above it holds; that is not
/// counted.
fn count_visible(chain: &Chain, layers: &mut [Layer], call: &Call) -> Result<(), Failure> {
    let is_foreign = |layer: &chain::Layer| matches!(layer.image, Image::Foreign(_));
    let from = usize::from(chain.layers().first().is_some_and(is_foreign));
    walk::walk_above(chain, from, call, |part| {
        let (layer, zeros) = match part.supply {
            Supply::Layer { layer, mapping } => (layer, matches!(mapping, Mapping::Zero { .. })),
            Supply::PastEnd { layer } => (layer, true),
            Supply::Nothing => return Ok(()),
        };
        if let Some(layer) = layers.get_mut(layer) {
            let count = if zeros { &mut layer.visible_zeros } else { &mut layer.visible_data };
            *count = count.saturating_add(part.range.len);
        }
        Ok(())
    })
}
