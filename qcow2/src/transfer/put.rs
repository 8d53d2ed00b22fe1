//! Writing a few byte ranges into an image, as a guest would: a merge of them from memory.

use crate::error::shown;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::cluster::{Base, WholeClusters};
use super::job::{Source, bring_to_disk, for_each_cluster};
use super::needs::Need;
use super::ops::{Ops, Run, Silent, Target};
use super::origin::Origin;
use super::target::prepare;
use crate::chain::view::View;
use crate::chain::{Chain, OpenOptions};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::image::alloc::Allocator;
use crate::image::bitmaps;
use crate::image::edits::{Batch, ClusterSource};
use crate::image::{Image, Qcow2, Raw};
use crate::storage::{Access, Host, MemFile, Storage};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Writes bytes into the disk of the image `path`, which is locked for it; the images below it are locked
/// for reading and not changed. When it returns, everything is durable. All bytes are held in memory,
/// and one batch takes them, so this is for small amounts.
///
/// # Errors
/// What [`Chain::open`] reports; [`Error::Usage`] for ranges that overlap or reach past the disk's end;
/// [`Error::Refused`] for an image that is dirty or corrupt; an I/O error.
pub fn put(
    host: &dyn Host,
    path: &Path,
    options: &OpenOptions,
    writes: &[(GuestOffset, Vec<u8>)],
) -> Result<()> {
    let id = host.stat(path).map_err(|e| Error::io(path, FileOp::Open, None, e))?.id;
    let open = OpenOptions { lock: true, access: [(id, Access::ReadWrite)].into(), ..options.clone() };
    let mut chain = Chain::open(host, path, &open)?;
    let active = chain.active();
    let size = chain.layer(active)?.image.virtual_size();
    let (memory, needs) = in_memory(path, size, writes, active + 1)?;
    let (clusters, bitmaps) = match &chain.layer(active)?.image {
        Image::Raw(raw) => return put_raw(raw, writes),
        Image::Foreign(foreign) => return Err(foreign.refuse()),
        Image::Qcow2(image) => {
            writable(image)?;
            let mut counter = Counter::default();
            let own = chain.images();
            steps(&base_of(image, &own), &needs, &mut counter)?;
            let mut bitmaps = bitmaps::BitmapPlan::new(image, size)?;
            needs.iter().try_for_each(|need| bitmaps.add(image, need.range))?;
            (counter.0 + bitmaps.clusters(), bitmaps)
        }
    };
    let Image::Qcow2(image) = chain.image_at(active)? else { return Ok(()) };
    let refcounts = prepare(image, clusters, bitmaps.side_by_side(), size)?;
    let mut marker = bitmaps::Marker::start(image, &refcounts, bitmaps)?;
    needs.iter().try_for_each(|need| marker.add(need.range))?;
    marker.finish()?;
    let mut images = chain.images();
    let Some(Image::Qcow2(image)) = images.last().copied() else { return Ok(()) };
    let own = images.clone();
    images.push(&memory);
    let mut source = Source { image, refcounts: &refcounts, allocator: &mut Allocator::new(&refcounts) };
    let (batch, ops) = steps(&base_of(image, &own), &needs, &mut source)?;
    let target = Target { path: image.path(), file: &**image.data_file() };
    let cancel = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    let run = Run { progress: &Silent, total: ops.bytes(), done, cancel: &cancel, journal: None };
    ops.run(&images, &target, &run)?;
    bring_to_disk(batch, image, &refcounts)
}

/// The writes as an image in memory, one behind the other, and as what the disk needs of it.
fn in_memory(
    path: &Path,
    size: u64,
    writes: &[(GuestOffset, Vec<u8>)],
    layer: usize,
) -> Result<(Image, Vec<Need>)> {
    let usage = |what: String| Error::Usage(format!("{}: {what}", shown(path)));
    let file = MemFile::new();
    let mut needs = Vec::new();
    let mut at = 0;
    for (start, bytes) in writes.iter().filter(|(_, bytes)| !bytes.is_empty()) {
        let range = GuestRange { start: *start, len: bytes.len() as u64 };
        if range.end().get() > size {
            return Err(usage(format!("{range} lies behind the end of the disk of {size} bytes")));
        }
        file.write_all_at(bytes, at).map_err(|e| Error::io(path, FileOp::WriteInMemory, Some(at), e))?;
        needs.push(Need { range, origin: Origin::Plain { layer, host: HostOffset::new(at) } });
        at += range.len;
    }
    needs.sort_by_key(|need| need.range.start);
    if let Some(both) = needs.windows(2).find(|two| two[0].range.end() > two[1].range.start) {
        return Err(usage(format!("{} is written twice", both[1].range.start)));
    }
    Ok((Image::Raw(Raw::open(path, Arc::new(file))?), needs))
}

fn put_raw(raw: &Raw, writes: &[(GuestOffset, Vec<u8>)]) -> Result<()> {
    for (start, bytes) in writes {
        let at = start.get();
        raw.file().write_all_at(bytes, at).map_err(|e| Error::io(raw.path(), FileOp::Write, Some(at), e))?;
    }
    raw.file().sync().map_err(|e| Error::barrier(raw.path(), e))
}

fn writable(image: &Qcow2) -> Result<()> {
    let reason = match (image.header().is_corrupt(), image.header().is_dirty()) {
        (true, _) => Refusal::CorruptBit,
        (_, true) => Refusal::Dirty,
        _ => return Ok(()),
    };
    Err(Error::refused(image.path(), reason))
}

/// The active image as the cluster steps see it; `chain` ends with it.
fn base_of<'a>(image: &'a Qcow2, chain: &'a [&'a Image]) -> Base<'a> {
    let layer = chain.len().saturating_sub(1);
    let below = layer.checked_sub(1).map(|top| View::new(chain, 0, top));
    Base {
        image,
        layer,
        below,
        below_size: below.map_or(0, |below| below.size()),
        size: image.virtual_size(),
        // Nothing is taken for blank: there is too little to save.
        blank_from: u64::MAX,
    }
}

/// What the needs become: changes of the metadata, and operations.
fn steps(base: &Base<'_>, needs: &[Need], source: &mut dyn ClusterSource) -> Result<(Batch, Ops)> {
    let (mut batch, mut ops, mut whole) = (Batch::default(), Ops::default(), WholeClusters::default());
    for_each_cluster(needs, base.image.geometry().cluster_size(), |start, parts| {
        base.take(start, parts, &mut whole, &mut batch, &mut ops, source).map(drop)
    })?;
    whole.place(base, &mut batch, &mut ops, source)?;
    Ok((batch, ops))
}

/// Counts the clusters that are needed, before there is room for them.
#[derive(Debug, Default)]
struct Counter(u64);

impl ClusterSource for Counter {
    fn take(&mut self) -> Result<u64> {
        self.0 += 1;
        Ok(self.0)
    }
}

#[cfg(test)]
mod tests {
    use kit::Random;

    use super::*;
    use crate::chain::digest;
    use crate::check::{CheckOptions, check};
    use crate::error::ErrorKind;
    use crate::image::{ClusterCache, CreateOptions, create};
    use crate::storage::MemHost;
    use crate::testing::{local, random_chain};

    #[test]
    fn what_was_put_is_what_is_read() {
        for seed in 0..40 {
            let host = MemHost::new();
            let mut dice = Random::new(seed);
            let layers = 1 + dice.below(4);
            let model = random_chain(&host, &mut dice, layers);
            let active = format!("/{}", layers - 1);
            let chain = Chain::open(&host, Path::new(&active), &local()).unwrap();
            let images = chain.images();
            let view = View::new(&images, 0, chain.active());
            let mut read = vec![0xee; model.len() + 1000];
            view.read(GuestOffset::ZERO, &mut read, &mut ClusterCache::new()).unwrap();
            assert!(read[..model.len()] == model, "seed {seed}");
            assert_eq!(read[model.len()..], [0; 1000]);
            let (from, to) = (model.len() / 3, model.len() / 2);
            read.truncate(to - from);
            view.read(GuestOffset::new(from as u64), &mut read, &mut ClusterCache::new()).unwrap();
            assert!(read == model[from..to], "seed {seed}");
            let crc = digest(view, model.len() as u64, &AtomicBool::new(false)).unwrap();
            assert_eq!(crc, crc32fast::hash(&model), "seed {seed}");
            for layer in chain.layers().iter().filter(|l| l.image.as_qcow2().is_some()) {
                let found =
                    check(&layer.path, &**layer.image.file(), None, &CheckOptions::default()).unwrap();
                assert!(found.is_consistent(), "seed {seed}: {:?}", found.first_corruption());
            }
        }
    }

    #[test]
    fn what_cannot_be_put_is_refused() {
        let host = MemHost::new();
        create(&host, Path::new("/a"), &CreateOptions::new(1 << 20)).unwrap();
        let put = |writes: &[(u64, usize)]| {
            let writes: Vec<_> =
                writes.iter().map(|&(at, len)| (GuestOffset::new(at), vec![1; len])).collect();
            put(&host, Path::new("/a"), &local(), &writes)
        };
        assert_eq!(put(&[(1 << 20, 1)]).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(put(&[(u64::MAX, 2)]).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(put(&[(100, 10), (50, 51)]).unwrap_err().kind(), ErrorKind::Usage);
        put(&[(100, 10), (50, 50), (7, 0), ((1 << 20) - 1, 1)]).unwrap();
        let user = host.open(Path::new("/a"), Access::Read).unwrap();
        user.lock(crate::storage::LockMode::Read).unwrap();
        assert_eq!(put(&[(0, 1)]).unwrap_err().kind(), ErrorKind::InUse);
    }
}
