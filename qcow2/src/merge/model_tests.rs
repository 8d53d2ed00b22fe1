//! Random chains in memory, written, merged and read back against plain byte arrays.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use kit::Random;

use super::{BaseChoice, Commit, CommitOptions, Prepared};
use crate::chain::view::View;
use crate::chain::{Chain, OpenOptions, Policy};
use crate::check::{CheckOptions, check};
use crate::image::alloc::Allocator;
use crate::image::edits::Batch;
use crate::image::refcounts::Refcounts;
use crate::image::{ClusterCache, CreateOptions, Image, ImageFormat, create, create_raw, grow};
use crate::storage::{Access, Host, MemHost};
use crate::transfer::cluster::{Base, WholeClusters};
use crate::transfer::job::{Source, bring_to_disk, for_each_cluster};
use crate::transfer::needs::Need;
use crate::transfer::ops::{Ops, Run, Silent, Target};
use crate::transfer::origin::Origin;
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// A chain in memory, and what each layer's guest would see.
struct World {
    host: MemHost,
    paths: Vec<PathBuf>,
    views: Vec<Vec<u8>>,
}

fn options() -> OpenOptions {
    OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() }
}

impl World {
    fn new(random: &mut Random) -> Self {
        let mut world = Self { host: MemHost::new(), paths: Vec::new(), views: Vec::new() };
        let layers = 2 + random.below(3);
        for n in 0..layers {
            world.add_layer(random, n);
        }
        world
    }

    fn add_layer(&mut self, random: &mut Random, n: u64) {
        let path = PathBuf::from(format!("/vm/{n}"));
        let size = random.pick(&[0u64, 1, 512, 4096, 40_000, 65536, 100_000, 262_144]).next_multiple_of(512)
            + random.below(200) * 512;
        let raw = n == 0 && random.below(3) == 0;
        if raw {
            create_raw(&self.host, &path, size).unwrap();
        } else {
            let mut how = CreateOptions::new(size);
            how.version = random.pick(&[2, 3, 3, 3]);
            how.cluster_bits = random.pick(&[9, 9, 10, 12, 14, 16]);
            how.extended_l2 = how.version == 3 && how.cluster_bits >= 14 && random.below(2) == 0;
            how.refcount_order = if how.version == 3 { random.pick(&[0, 1, 2, 3, 4, 5, 6]) } else { 4 };
            if let Some(below) = self.paths.last() {
                let format =
                    if self.format(self.paths.len() - 1) == ImageFormat::Raw { "raw" } else { "qcow2" };
                how.backing = Some((below.as_os_str().as_encoded_bytes().to_vec(), format.into()));
            }
            create(&self.host, &path, &how).unwrap();
        }
        let mut view = vec![0; size as usize];
        if let Some(below) = self.views.last() {
            let n = view.len().min(below.len());
            view[..n].copy_from_slice(&below[..n]);
        }
        self.paths.push(path);
        self.views.push(view);
        for _ in 0..random.below(12) {
            self.write(random, n as usize);
        }
    }

    fn format(&self, at: usize) -> ImageFormat {
        let file = self.host.open(&self.paths[at], Access::Read).unwrap();
        ImageFormat::detect(&self.paths[at], &*file).unwrap()
    }

    /// Writes random bytes, or zeros, to the uppermost layer.
    fn write(&mut self, random: &mut Random, at: usize) {
        let size = self.views[at].len() as u64;
        if size == 0 {
            return;
        }
        let start = random.below(size);
        let unit = random.pick(&[1, 512, 4096]);
        let len = (1 + random.below(8) * unit + random.below(unit)).min(size - start);
        let (zeros, key) = (random.one_in(4), random.next() as u8);
        let bytes: Vec<u8> = (0..len).map(|i| if zeros { 0 } else { (start + i) as u8 ^ key }).collect();
        self.views[at][start as usize..][..len as usize].copy_from_slice(&bytes);
        let range = GuestRange { start: GuestOffset::new(start), len };
        self.put(at, range, &bytes, zeros);
    }

    /// Writes to a layer as a guest would.
    fn put(&self, at: usize, range: GuestRange, bytes: &[u8], zeros: bool) {
        let mut open = options();
        let id = self.host.stat(&self.paths[at]).unwrap().id;
        open.access.insert(id, Access::ReadWrite);
        let chain = Chain::open(&self.host, &self.paths[at], &open).unwrap();
        let at = chain.active();
        let data = self.host.create_new(Path::new("/data")).unwrap();
        data.write_all_at(bytes, 0).unwrap();
        let source = Image::open(Path::new("/data"), data, ImageFormat::Raw, None).unwrap();
        let mut images = chain.images();
        images.push(&source);
        let layer = images.len() - 1;
        let origin = if zeros { Origin::Zeros } else { Origin::Plain { layer, host: HostOffset::ZERO } };
        let need = Need { range, origin };
        match images[at] {
            Image::Raw(raw) => raw.file().write_all_at(bytes, range.start.get()).unwrap(),
            Image::Foreign(_) => panic!("the test has no such layers"),
            Image::Qcow2(image) => {
                let mut refcounts = Refcounts::load(image).unwrap();
                let most = range.len / image.geometry().cluster_size() * 2 + 8;
                // Room that needs a new table is made by the merge itself, which may change the header.
                if grow::make_room(image, &mut refcounts, most, 0).unwrap().is_some() {
                    panic!("the test's images have room in their refcount table");
                }
                let mut allocator = Allocator::new(&refcounts);
                let mut source = Source { image, refcounts: &refcounts, allocator: &mut allocator };
                let below = (at > 0).then(|| View::new(&images, 0, at - 1));
                let below_size = below.map_or(0, |below| below.size());
                let base = Base {
                    image,
                    layer: at,
                    below,
                    below_size,
                    size: image.virtual_size(),
                    blank_from: u64::MAX,
                };
                let (mut batch, mut ops) = (Batch::default(), Ops::default());
                let mut whole = WholeClusters::default();
                for_each_cluster(&[need], image.geometry().cluster_size(), |start, needs| {
                    base.take(start, needs, &mut whole, &mut batch, &mut ops, &mut source).map(drop)
                })
                .unwrap();
                whole.place(&base, &mut batch, &mut ops, &mut source).unwrap();
                let cancel = AtomicBool::new(false);
                let done = AtomicU64::new(0);
                let run = Run { progress: &Silent, total: 0, done, cancel: &cancel, journal: None };
                let target = Target { path: image.path(), file: &**image.data_file() };
                ops.run(&images, &target, &run).unwrap();
                bring_to_disk(batch, image, &refcounts).unwrap();
            }
        }
        self.host.unlink(Path::new("/data")).unwrap();
    }

    fn read(&self, path: &Path) -> Vec<u8> {
        let chain = Chain::open(&self.host, path, &options()).unwrap();
        let images = chain.images();
        let view = View::new(&images, 0, images.len() - 1);
        let mut bytes = vec![0; view.size() as usize];
        view.read(GuestOffset::ZERO, &mut bytes, &mut ClusterCache::new()).unwrap();
        bytes
    }

    fn assert_sound(&self, path: &Path, seed: u64) {
        let file = self.host.open(path, Access::Read).unwrap();
        if ImageFormat::detect(path, &*file).unwrap() == ImageFormat::Qcow2 {
            let report = check(path, &*file, None, &CheckOptions::default()).unwrap();
            assert!(report.corruptions + report.leaks + report.check_errors == 0, "seed {seed}: {report:#?}");
        }
    }

    fn assert_view(&self, at: usize, seed: u64) {
        self.assert_sound(&self.paths[at], seed);
        assert!(self.read(&self.paths[at]) == self.views[at], "seed {seed}: layer {at} shows other bytes");
    }

    fn commit(&self, active: usize, base: usize, top: usize, seed: u64) -> super::Report {
        let options = CommitOptions {
            open: options(),
            base: BaseChoice::Named(format!("[{}]", base + 1).into()),
            top: Some(format!("[{}]", top + 1).into()),
            ..CommitOptions::default()
        };
        let cancel = AtomicBool::new(false);
        let host: Arc<dyn Host> = Arc::new(self.host.clone());
        let commit = Commit::prepare(host, &self.paths[active], &options, &cancel)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let planned = commit.plan().cloned();
        let report = commit.execute(&Silent, &cancel).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let Some(planned) = planned else {
            assert!(report.totals.is_empty(), "seed {seed}: {report:?}");
            return report;
        };
        assert_eq!(report.totals.bytes_to_copy, planned.totals.bytes_to_copy, "seed {seed}");
        assert_eq!(report.totals.bytes_to_zero, planned.totals.bytes_to_zero, "seed {seed}");
        assert_eq!(report.totals.clusters_to_allocate, planned.totals.clusters_to_allocate, "seed {seed}");
        assert!(report.base_file_size <= planned.base_file_size_after, "seed {seed}: {report:?} {planned:?}");
        report
    }
}

fn one_chain(seed: u64) {
    let mut random = Random::new(seed);
    let mut world = World::new(&mut random);
    let active = world.paths.len() - 1;
    for at in 0..=active {
        world.assert_view(at, seed);
    }
    let top = 1 + random.below(active as u64) as usize;
    let base = random.below(top as u64) as usize;
    world.commit(active, base, top, seed);
    // Everything above top, and the active image, shows what it showed.
    for at in top..=active {
        if at > top || top == active {
            world.assert_view(at, seed);
        }
    }
    // Base shows what top showed, and behind top's end what the overlay above it may see as zeros.
    let shown = world.read(&world.paths[base]);
    let expected = &world.views[top];
    assert!(shown[..expected.len()] == expected[..], "seed {seed}: base does not show what top showed");
    world.assert_sound(&world.paths[base], seed);

    // A guest goes on writing to the active image, and everything is merged down.
    for _ in 0..4 {
        world.write(&mut random, active);
    }
    world.assert_view(active, seed);
    let layers = Chain::open(&world.host, &world.paths[active], &options()).unwrap().layers().len();
    if layers > 1 {
        world.commit(active, 0, layers - 1, seed);
        world.assert_view(active, seed);
        let shown = world.read(&world.paths[0]);
        assert!(shown[..world.views[active].len()] == world.views[active][..], "seed {seed}: consolidated");
        world.assert_sound(&world.paths[0], seed);
    }
}

/// Small clusters with wide refcounts: the refcount table has no room for the blocks that the merge
/// needs, and the disk grows far beyond what the L1 table covers.
#[test]
fn tables_grow_in_the_middle_of_a_merge() {
    for (order, size) in [(6, 6 << 20), (6, 3 << 20), (5, 9 << 20), (0, 5 << 20)] {
        let mut world = World { host: MemHost::new(), paths: Vec::new(), views: Vec::new() };
        let sizes = [100 << 10, size];
        for (n, size) in sizes.into_iter().enumerate() {
            let path = PathBuf::from(format!("/vm/{n}"));
            let mut how = CreateOptions::new(size);
            how.cluster_bits = if n == 0 { 9 } else { 16 };
            how.refcount_order = if n == 0 { order } else { 4 };
            how.backing = (n > 0).then(|| (b"/vm/0".to_vec(), "qcow2".into()));
            create(&world.host, &path, &how).unwrap();
            world.paths.push(path);
            world.views.push(vec![0; size as usize]);
        }
        let bytes: Vec<u8> = (0..size - 4096).map(|i| (i / 512) as u8 | 1).collect();
        world.views[1][4096..].copy_from_slice(&bytes);
        world.put(1, GuestRange { start: GuestOffset::new(4096), len: size - 4096 }, &bytes, false);
        world.commit(1, 0, 1, order.into());
        world.assert_view(1, order.into());
        world.views[0] = world.views[1].clone();
        world.assert_view(0, order.into());
    }
}

#[test]
fn random_chains_merge_as_byte_arrays_do() {
    let first = std::env::var("QMERGE_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let cases = std::env::var("QMERGE_TEST_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(600);
    for seed in first..first + cases {
        one_chain(seed);
    }
}

/// A qcow2 image at `path`, on another qcow2 image if one is named.
fn image(host: &MemHost, path: &str, size: u64, cluster_bits: u32, below: Option<&str>) {
    let backing = below.map(|below| (below.as_bytes().to_vec(), "qcow2".to_owned()));
    create(host, Path::new(path), &CreateOptions { cluster_bits, backing, ..CreateOptions::new(size) })
        .unwrap();
}

fn prepare(host: &MemHost, active: &str) -> crate::error::Result<Prepared> {
    let options = CommitOptions { open: options(), ..CommitOptions::default() };
    Commit::prepare(Arc::new(host.clone()), Path::new(active), &options, &AtomicBool::new(false))
}

fn write(host: &MemHost, path: &str, at: u64, bytes: &[u8]) {
    crate::transfer::put(host, Path::new(path), &options(), &[(GuestOffset::new(at), bytes.to_vec())])
        .unwrap();
}

#[test]
fn time_depends_on_what_layers_hold_and_not_on_the_size_of_the_disk() {
    let huge = 64 << 40;
    for sizes in [[1 << 20, huge, huge], [huge, 1 << 20, huge], [huge, huge, 1 << 20]] {
        let host = MemHost::new();
        for (n, size) in sizes.into_iter().enumerate() {
            let below = n.checked_sub(1).map(|below| format!("/{below}"));
            image(&host, &format!("/{n}"), size, 16, below.as_deref());
            write(&host, &format!("/{n}"), size - 4096, &[n as u8 + 1; 4096]);
        }
        let commit = prepare(&host, "/2").unwrap();
        let windows = crate::transfer::ask::down(
            &commit.merge().unwrap().chain().images(),
            commit.merge().unwrap().span(),
        )
        .unwrap()
        .question
        .windows(GuestOffset::ZERO)
        .collect::<crate::error::Result<Vec<_>>>()
        .unwrap();
        assert!(windows.len() <= 4, "{sizes:?}: {windows:?}");
        commit.execute(&Silent, &AtomicBool::new(false)).unwrap();
        let chain = Chain::open(&host, Path::new("/2"), &options()).unwrap();
        let images = chain.images();
        let view = View::new(&images, 0, images.len() - 1);
        let mut bytes = [0; 8192];
        let mut last = |end: u64| {
            view.read(GuestOffset::new(end - 8192), &mut bytes, &mut ClusterCache::new()).unwrap();
            bytes[4096]
        };
        assert_eq!(last(sizes[2]), 3);
        // What the first layer had at its end is hidden by a short layer, or still there.
        let hidden = sizes[1] < sizes[0];
        assert_eq!(
            last(sizes[0].min(sizes[2])),
            if sizes[0] > sizes[2] || hidden { 3 } else { 1 },
            "{sizes:?}"
        );
    }
}

#[test]
fn a_base_that_grows_does_not_show_what_its_long_l1_table_still_holds() {
    let host = MemHost::new();
    image(&host, "/0", 3 << 20, 12, None);
    write(&host, "/0", 0, &[7; 3 << 20]);
    let base = host.open(Path::new("/0"), Access::ReadWrite).unwrap();
    base.write_all_at(&((1u64 << 20) + 512).to_be_bytes(), 24).unwrap();
    drop(base);
    image(&host, "/1", 3 << 20, 16, Some("/0"));
    prepare(&host, "/1").unwrap().execute(&Silent, &AtomicBool::new(false)).unwrap();
    let world = World { host, paths: vec!["/0".into()], views: Vec::new() };
    let shown = world.read(Path::new("/0"));
    assert!(shown[..(1 << 20) + 512].iter().all(|&b| b == 7));
    assert_eq!(shown.len(), 3 << 20);
    assert!(shown[(1 << 20) + 512..].iter().all(|&b| b == 0));
    world.assert_sound(Path::new("/0"), 0);
}

#[test]
fn a_disk_that_base_cannot_hold_is_refused_before_anything_is_written() {
    let host = MemHost::new();
    image(&host, "/0", 1 << 20, 9, None);
    image(&host, "/1", 1 << 40, 16, Some("/0"));
    let before = host.content("/0").unwrap();
    let error = prepare(&host, "/1").unwrap_err();
    assert_eq!(error.kind(), crate::error::ErrorKind::Unsupported, "{error}");
    assert!(host.content("/0").unwrap() == before);
}

#[test]
fn a_version_2_base_with_snapshots_does_not_grow() {
    let host = MemHost::new();
    create(&host, Path::new("/0"), &CreateOptions { version: 2, ..CreateOptions::new(1 << 20) }).unwrap();
    let base = host.open(Path::new("/0"), Access::ReadWrite).unwrap();
    base.write_all_at(&1u32.to_be_bytes(), 60).unwrap();
    base.write_all_at(&(1u64 << 16).to_be_bytes(), 64).unwrap();
    drop(base);
    image(&host, "/1", 2 << 20, 16, Some("/0"));
    let error = prepare(&host, "/1").unwrap_err().to_string();
    assert!(error.contains("version 2"), "{error}");
}
