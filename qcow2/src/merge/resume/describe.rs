//! Describes the layers of a merge for its journal: their present stamps, and which of their files become
//! obsolete.

use crate::chain::{Chain, Layer};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::journal;
use crate::journal::record::{BLOCK, Guard, Header, MAX_BLOCKS, ObsoleteFile, ObsoleteKind, Purpose};
use crate::stamp::Stamp;
use crate::storage::Host;
use crate::transfer::ask::Span;

/// The header of a journal for work on the layer at `at`, without the parts that only the plan knows.
///
/// # Errors
/// The system's.
pub(crate) fn describe(host: &dyn Host, chain: &Chain, span: Span, at: usize) -> Result<Header> {
    let layer =
        |at: usize| chain.layers().get(at).ok_or(Error::Broken { invariant: "a merge has all its layers" });
    let written = layer(at)?;
    let guard = match &written.image {
        Image::Qcow2(image) if image.header().version >= 3 => {
            Guard::DirtyBit { lazy: image.header().lazy_refcounts() }
        }
        _ => Guard::Stamp,
    };
    let mut layers = Vec::new();
    for layer in chain.layers().get(at + 1..=span.top).unwrap_or_default() {
        layers.extend(stamps(host, layer)?);
    }
    let real = |at: usize| Ok(stamp(host, layer(at)?)?.path);
    Ok(Header {
        nonce: journal::nonce(),
        max_blocks: max_blocks(chain, span),
        purpose: if at == span.base { Purpose::Merge } else { Purpose::Empty },
        guard,
        boot: host.boot(),
        targets: stamps(host, written)?,
        layers,
        base: real(span.base)?,
        top: real(span.top)?,
        top_index: u32::try_from(span.top + 1).unwrap_or(u32::MAX),
        active: real(span.active)?,
        new_size: 0,
        zero_until: 0,
        total: 0,
        restore_points_lost: Vec::new(),
        has_emptied: false,
        samples: Vec::new(),
    })
}

/// How many blocks are kept in memory: few if there is little to merge.
fn max_blocks(chain: &Chain, span: Span) -> u32 {
    let lens = chain.layers().get(span.base..=span.top).unwrap_or_default();
    let bytes = lens.iter().map(|layer| layer.image.file().size().unwrap_or(u64::MAX)).max();
    (bytes.unwrap_or(0) / BLOCK / 8).clamp(32, MAX_BLOCKS as u64) as u32
}

/// The image file of a layer, and its data file if it has one.
pub(crate) fn stamps(host: &dyn Host, layer: &Layer) -> Result<Vec<Stamp>> {
    let mut all = vec![stamp(host, layer)?];
    if let (Some(data), Some(image)) = (&layer.data_file, layer.image.as_qcow2()) {
        all.push(Stamp::of(host, &data.path, &**image.data_file())?);
    }
    Ok(all)
}

pub(crate) fn stamp(host: &dyn Host, layer: &Layer) -> Result<Stamp> {
    Stamp::of(host, &layer.path, &**layer.image.file())
}

/// Whether a layer has a data file that goes with it.
fn owns_data_file(layer: &Layer) -> bool {
    layer.data_file.as_ref().is_some_and(|data| data.kept.is_none())
}

/// The files that are obsolete when the work is done, with their stamps now: `layers` with their own data files, in this
/// order. Each layer comes with whether its header has the mark of the merge.
///
/// # Errors
/// The system's.
pub(crate) fn obsolete(host: &dyn Host, layers: &[(&Layer, bool)]) -> Result<Vec<ObsoleteFile>> {
    let mut all = Vec::new();
    for (layer, is_marked) in layers {
        let mut kind = if *is_marked { ObsoleteKind::Marked } else { ObsoleteKind::Unmarked };
        for file in stamps(host, layer)?.into_iter().take(if owns_data_file(layer) { 2 } else { 1 }) {
            all.push(ObsoleteFile { file, kind });
            kind = ObsoleteKind::DataFile;
        }
    }
    Ok(all)
}

/// The present stamp of a layer's external data file, if it has one of its own.
///
/// # Errors
/// The system's.
pub(crate) fn data_file(host: &dyn Host, layer: &Layer) -> Result<Vec<ObsoleteFile>> {
    let files = stamps(host, layer)?.into_iter().skip(1).filter(|_| owns_data_file(layer));
    Ok(files.map(|file| ObsoleteFile { file, kind: ObsoleteKind::DataFile }).collect())
}
