//! Chains with bad sectors in any place, salvaged: judged by what can be read of them block by block.

use kit::Random;

use super::*;
use crate::error::ErrorKind;
use crate::storage::MemHost;
use crate::testing::{Silent, local, random_chain};

const BLOCK: usize = 512;

#[test]
fn all_is_saved_that_can_be_read_and_nothing_else_is_called_lost() {
    let mut with_losses = 0;
    for seed in 0..40 {
        let host = MemHost::new();
        let mut dice = Random::new(seed);
        let layers = 1 + dice.below(3);
        let model = random_chain(&host, &mut dice, layers);
        let active = format!("/{}", layers - 1);
        let chain = Chain::open(&host, Path::new(&active), &local()).unwrap();
        for layer in chain.layers() {
            let size = layer.image.file().size().unwrap();
            // The header is needed in any case.
            let first = layer.image.as_qcow2().map_or(0, |q| q.geometry().cluster_size().max(4096));
            for _ in 0..1 + dice.below(6) {
                if size > first {
                    host.spoil(&layer.path, first + dice.below(size - first)).unwrap();
                }
            }
        }
        let never = AtomicBool::new(false);
        // Of a raw file the last bytes would be looked at, too, to know what it is.
        let format = chain.layers()[chain.active()].image.format();
        let open = OpenOptions { active_format: Some(format), ..local() };
        let make = |output: &str, to, salvage| {
            let options = FlattenOptions { salvage, ..FlattenOptions::new(open.clone(), output.into(), to) };
            let made = Flatten::prepare(Arc::new(host.clone()), Path::new(&active), &options, &never);
            made.and_then(|flatten| flatten.execute(&Silent, &never))
        };
        let mut expected = model.clone();
        let mut lost = Vec::new();
        let mut reader = chain.reader();
        for at in (0..model.len()).step_by(BLOCK) {
            if reader.read_at(at as u64, &mut [0; BLOCK]).is_err() {
                expected[at..at + BLOCK].fill(0);
                lost.push(at as u64);
            }
        }
        for to in [ImageFormat::Raw, ImageFormat::Qcow2] {
            assert_eq!(make("/without", to, false).is_err(), !lost.is_empty(), "seed {seed}");
            assert!(host.stat(Path::new("/without")).is_err() || lost.is_empty(), "seed {seed}");
            let _ = host.unlink(Path::new("/without"));
            let report = make("/new", to, true).unwrap();
            assert!(report.lists_all_lost);
            let ranges = report.lost.iter();
            let told: Vec<u64> =
                ranges.flat_map(|range| (range.start.get()..range.end().get()).step_by(BLOCK)).collect();
            assert_eq!(told, lost, "seed {seed} to {to:?}");
            let open = OpenOptions { active_format: Some(to), ..local() };
            let new = Chain::open(&host, Path::new("/new"), &open).unwrap();
            let mut found = vec![0; model.len()];
            new.reader().read_at(0, &mut found).unwrap();
            assert!(found == expected, "seed {seed} to {to:?}");
            host.unlink(Path::new("/new")).unwrap();
        }
        with_losses += usize::from(!lost.is_empty());
    }
    assert!(with_losses >= 10, "{with_losses}");
}

#[test]
fn a_header_that_cannot_be_read_stays_an_error() {
    let host = MemHost::new();
    random_chain(&host, &mut Random::new(1), 2);
    host.spoil("/1", 0).unwrap();
    let to = ImageFormat::Qcow2;
    let options = FlattenOptions { salvage: true, ..FlattenOptions::new(local(), "/new".into(), to) };
    let never = AtomicBool::new(false);
    let error = Flatten::prepare(Arc::new(host), Path::new("/1"), &options, &never).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
}
