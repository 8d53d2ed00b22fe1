//! Power cuts at every point of a repair with a backup, and of a restore: the image comes back byte for byte.

use super::restore::{IMAGE, put_back};
use super::{damaged_images, repaired};
use crate::error::{Error, Refusal};
use crate::format::parts;
use crate::repair::RepairMode;
use crate::storage::MemHost;
use crate::storage::sim::{Cuts, Garbage, SimHost, Tear, power_cuts};

fn cuts(garbage: Garbage) -> Cuts {
    Cuts { seed: 1, tear: Tear::Sector, exhaustive: 5, listed: 3, random: 6, garbage, damaged: 12 }
}

fn holding(image: &[u8]) -> MemHost {
    let host = MemHost::new();
    host.add(IMAGE, image).unwrap();
    host
}

#[test]
fn a_power_cut_in_a_repair_can_be_undone() {
    let (mut states, mut without) = (0, 0);
    for (name, image) in damaged_images() {
        let disk = SimHost::over(&holding(&image));
        repaired(&disk, RepairMode::All);
        states += power_cuts(disk.start(), &disk.log(), &cuts(Garbage::None), |cut| {
            let host = cut.state.host();
            match put_back(&host, IMAGE) {
                Ok(_) => {}
                Err(Error::Io { .. } | Error::Refused { reason: Refusal::BackupDamaged { .. }, .. }) => {
                    without += 1;
                }
                Err(error) => panic!("{name}: {cut}: {error}"),
            }
            // Where there is no backup yet, nothing was repaired.
            assert!(host.content(IMAGE).unwrap() == image, "{name}: {cut}");
        });
    }
    println!("{states} states");
    assert!(states > 250 && without < states, "{states} {without}");
}

/// Restores with power cuts; returns how many states were tried, and how many of them nobody else could have
/// written to.
fn cut_restores(images: Vec<(&'static str, Vec<u8>)>, garbage: Garbage) -> (u64, u64) {
    let (mut states, mut marked) = (0, 0);
    for (name, image) in images {
        let host = holding(&image);
        repaired(&host, RepairMode::All);
        let after = host.content(IMAGE).unwrap();
        let disk = SimHost::over(&host);
        assert!(!put_back(&disk, IMAGE).unwrap().is_empty() || after == image, "{name}");
        states += power_cuts(disk.start(), &disk.log(), &cuts(garbage), |cut| {
            let host = cut.state.host();
            let torn = host.content(IMAGE).unwrap();
            let is_open = torn.starts_with(b"QFI\xfb") && torn[parts::DIRTY_AND_CORRUPT] & 2 == 0;
            let is_half = torn[512..] != image[512..] && torn[512..] != after[512..];
            assert!(!is_half || !is_open || image[7] == 2, "{name}: {cut}: others may write to it");
            marked += u64::from(is_half);
            put_back(&host, IMAGE).unwrap_or_else(|e| panic!("{name}: {cut}: {e}"));
            assert!(host.content(IMAGE).unwrap() == image, "{name}: {cut}");
            assert!(put_back(&host, IMAGE).unwrap().is_empty(), "{name}: {cut}");
        });
    }
    (states, marked)
}

#[test]
fn a_restore_that_a_power_cut_tears_goes_on() {
    let (states, marked) = cut_restores(damaged_images(), Garbage::Sectors);
    println!("{states} states");
    assert!(states > 300 && marked > 50, "{states} {marked}");
}

#[test]
fn a_restore_of_version_2_goes_on() {
    let old = damaged_images().into_iter().filter(|(_, image)| image[parts::DIRTY_AND_CORRUPT] == 0).map(
        |(name, mut image)| {
            // Of version 2 the header ends where that of version 3 has its features.
            image[4..8].copy_from_slice(&[0, 0, 0, 2]);
            let tail = image[104..512].to_vec();
            image[72..72 + tail.len()].copy_from_slice(&tail);
            (name, image)
        },
    );
    let (states, _) = cut_restores(old.collect(), Garbage::None);
    println!("{states} states");
    assert!(states >= 40, "{states}");
}

#[test]
fn a_second_power_cut_changes_nothing() {
    let mut states = 0;
    for (name, image) in damaged_images().into_iter().filter(|(name, _)| name.starts_with("no-refcount")) {
        let host = holding(&image);
        repaired(&host, RepairMode::All);
        let disk = SimHost::over(&host);
        put_back(&disk, IMAGE).unwrap();
        power_cuts(disk.start(), &disk.log(), &cuts(Garbage::Sectors), |cut| {
            let again = SimHost::new(&cut.state);
            put_back(&again, IMAGE).unwrap();
            let few = Cuts { exhaustive: 2, listed: 1, random: 1, damaged: 2, ..cuts(Garbage::Sectors) };
            states += power_cuts(again.start(), &again.log(), &few, |second| {
                let host = second.state.host();
                put_back(&host, IMAGE).unwrap_or_else(|e| panic!("{name}: {cut}, then {second}: {e}"));
                assert!(host.content(IMAGE).unwrap() == image, "{name}: {cut}, then {second}");
            });
        });
    }
    println!("{states} states");
    assert!(states > 300, "{states}");
}
