//! Small chains against a byte array: what the engine reads through a chain, and what it makes of it.

use std::path::Path;

use super::model::{Input, ModelLayer, chain as layers, guest};
use crate::chain::view::{Supplied, Supply, View};
use crate::chain::{Chain, OpenOptions, Policy};
use crate::image::{ClusterCache, Extent, Image};
use crate::storage::MemHost;
use crate::units::{GuestOffset, GuestRange};

/// A chain made from the input, read through each of its layers: the bytes must be the model's.
pub fn chain(bytes: &[u8]) {
    let layers = layers(&mut Input::new(bytes));
    let host = host_with(&layers);
    for (top, layer) in layers.iter().enumerate() {
        match view(&host, &layer.path) {
            Ok(bytes) => assert_same(&bytes, &guest(&layers, top), &layer.path),
            Err(error) => unreachable!("a sound chain is refused: {error}"),
        }
    }
}

/// The files of a chain.
pub(super) fn host_with(layers: &[ModelLayer]) -> MemHost {
    let host = MemHost::new();
    for layer in layers {
        let data_file = layer.data_file.iter().map(|(path, bytes)| (path, bytes));
        for (path, bytes) in data_file.chain([(&layer.path, &layer.file)]) {
            assert!(host.add(path, bytes).is_ok(), "files in memory can be added");
        }
    }
    host
}

pub(super) fn options() -> OpenOptions {
    OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() }
}

/// The guest's bytes through `active`, as the engine reads them.
pub(super) fn view(host: &MemHost, active: &Path) -> crate::Result<Vec<u8>> {
    let chain = Chain::open(host, active, &options())?;
    let images = chain.images();
    let view = View::new(&images, 0, chain.active());
    let mut guest = vec![0xee; view.size() as usize];
    let mut supplied = Vec::new();
    view.resolve(GuestRange { start: GuestOffset::ZERO, len: view.size() }, &mut supplied)?;
    let mut cache = ClusterCache::new();
    for part in supplied {
        let start = part.range.start.get() as usize;
        read(&images, part, &mut guest[start..start + part.range.len as usize], &mut cache)?;
    }
    Ok(guest)
}

fn read(images: &[&Image], part: Supplied, buf: &mut [u8], cache: &mut ClusterCache) -> crate::Result<()> {
    let Supply::Layer { layer, mapping } = part.supply else {
        buf.fill(0);
        return Ok(());
    };
    images[layer].read_extent(&Extent { range: part.range, mapping }, buf, cache, layer)
}

pub(super) fn assert_same(found: &[u8], expected: &[u8], path: &Path) {
    assert_eq!(found.len(), expected.len(), "{}: the size", path.display());
    let differs = found.iter().zip(expected).position(|(f, e)| f != e);
    assert_eq!(differs, None, "{}: the guest's bytes differ", path.display());
}
