use super::*;
use crate::chain::Chain;
use crate::chain::view::View;
use crate::check::{CheckOptions, check};
use crate::image::{ClusterCache, CreateOptions, create};
use crate::merge::crash_tests::{assert_sound, cuts, see};
use crate::retire::empty_onto::tests::{
    base_through, format_of, just_merged, merged, never, options, reason,
};
use crate::storage::sim::{SimHost, power_cuts};
use crate::storage::{Access, LockMode, MemHost};
use crate::testing::local;
use crate::transfer::put;
use crate::units::GuestOffset;

/// Layers of which the first is the active one.
fn merged_layers(layers: &[Stamp]) -> MergedLayers<'_> {
    MergedLayers { layers, active: layers.first().map(|layer| layer.id), chain: &[], scan: &[] }
}

/// What a recorded chain shows: each image over the one before, whatever the headers say.
fn recorded(host: &MemHost, paths: &[PathBuf]) -> Vec<u8> {
    let chains: Vec<Chain> = paths.iter().map(|path| Chain::open(host, path, &local()).unwrap()).collect();
    let images: Vec<_> = chains.iter().filter_map(|chain| chain.images().pop()).collect();
    let view = View::new(&images, 0, images.len() - 1);
    let mut bytes = vec![0; view.size() as usize];
    view.read(GuestOffset::ZERO, &mut bytes, &mut ClusterCache::new()).unwrap();
    bytes
}

fn all_stamps(host: &MemHost, paths: &[PathBuf]) -> Vec<Stamp> {
    paths.iter().rev().map(|path| Stamp::now(host, path).unwrap().unwrap()).collect()
}

#[test]
fn every_merged_layer_becomes_an_empty_overlay_as_large_as_asked() {
    let mut grown = 0;
    for seed in 200..240 {
        let (host, paths, _) = merged(seed);
        let (active, base) = (paths.last().unwrap(), &paths[0]);
        let expected = base_through(&host, active);
        let size = expected.len() as u64;
        let options = EmptyOptions { size, ..options() };
        let sizes: Vec<usize> = paths.iter().map(|path| see(&host, path).len()).collect();
        let layers = all_stamps(&host, &paths[1..]);
        let format = format_of(&host, base);
        let left = merged_layers(&layers);
        let all = empty_all_onto(&host, &left, base, format, &options, &never()).unwrap();
        assert_eq!(all.len(), layers.len());
        for (path, result) in all {
            assert!(result.is_ok(), "seed {seed}: {}: {result:?}", path.display());
        }
        assert!(recorded(&host, &paths) == expected, "seed {seed}: the recorded chain shows something else");
        for (path, was) in paths.iter().zip(sizes).skip(1) {
            let chain = Chain::open(&host, path, &local()).unwrap();
            let image = chain.layers().last().unwrap().image.as_qcow2().unwrap();
            assert_eq!(chain.layers().len(), 2, "seed {seed}");
            assert_eq!(image.virtual_size(), size.max(was as u64), "seed {seed}");
            assert_eq!(image.next_table(GuestOffset::ZERO).unwrap(), None, "seed {seed}");
            let mark = if path == active { None } else { Some(base.as_path()) };
            assert_eq!(image.cluster0().merged_into().as_deref(), mark, "seed {seed}");
            let report = check(path, &**image.file(), None, &CheckOptions::default()).unwrap();
            assert!(report.is_consistent() && report.leaks == 0, "seed {seed}: {report:#?}");
            grown += u32::from((was as u64) < size);
        }
        // The same call again finds nothing to do.
        let layers = all_stamps(&host, &paths[1..]);
        let left = merged_layers(&layers);
        let again = empty_all_onto(&host, &left, base, format, &options, &never()).unwrap();
        assert!(again.iter().all(|(_, result)| result.as_ref().unwrap().was_empty), "seed {seed}");
    }
    assert!(grown > 3, "{grown} images were too short");
}

/// A virtual machine that starts from either chain sees the same disk, as long as nothing was written to base.
#[test]
fn at_every_power_cut_the_headers_and_a_recorded_chain_show_the_disk() {
    let mut deep = 0;
    for seed in 400..406 {
        let (host, paths, _) = just_merged(seed);
        let (active, base) = (paths.last().unwrap(), &paths[0]);
        let expected = base_through(&host, active);
        // Base is larger than the disk in some of them: a recorded chain ends where the active image does.
        assert!(recorded(&host, &paths) == expected, "seed {seed}");
        let options = EmptyOptions { size: expected.len() as u64, ..options() };
        let layers = all_stamps(&host, &paths[1..]);
        let format = format_of(&host, base);
        deep += u32::from(layers.len() > 1);
        let disk = SimHost::over(&host);
        let all = empty_all_onto(&disk, &merged_layers(&layers), base, format, &options, &never()).unwrap();
        assert!(all.iter().all(|(_, result)| result.is_ok()), "seed {seed}: {all:?}");
        power_cuts(disk.start(), &disk.log(), &cuts(seed), |cut| {
            assert_sound(&cut.state, &format!("seed {seed}: {cut}"));
            let host = cut.state.host();
            assert!(see(&host, active) == expected, "seed {seed}: {cut}: by the headers");
            assert!(recorded(&host, &paths) == expected, "seed {seed}: {cut}: as it was recorded");
        });
    }
    assert!(deep > 1, "{deep} chains with more than one layer to empty");
}

/// A user of a layer reads through those below it.
#[test]
fn below_a_layer_that_somebody_holds_or_has_written_to_nothing_is_emptied() {
    for held in [true, false] {
        let (host, paths, _) = (400..).map(just_merged).find(|(_, paths, _)| paths.len() > 2).unwrap();
        let (base, middle) = (&paths[0], &paths[paths.len() - 2]);
        let layers = all_stamps(&host, &paths[1..]);
        let file = host.open(middle, Access::ReadWrite).unwrap();
        if held {
            file.lock(LockMode::Read).unwrap();
        } else {
            put(&host, middle, &local(), &[(GuestOffset::ZERO, vec![7; 512])]).unwrap();
        }
        let seen = see(&host, middle);
        let (left, format) = (merged_layers(&layers), format_of(&host, base));
        let all = empty_all_onto(&host, &left, base, format, &options(), &never()).unwrap();
        let mut results = all.into_iter().map(|(_, result)| result);
        assert!(results.next().unwrap().is_ok());
        match results.next().unwrap().unwrap_err() {
            Error::InUse { .. } => assert!(held),
            error => assert!(!held && matches!(reason(Err(error)), Refusal::NotAsKnown { .. })),
        }
        assert!(results.all(|result| reason(result).to_string().contains("reads through it")));
        drop(file);
        assert!(see(&host, middle) == seen);
    }
}

#[test]
fn what_an_image_outside_reads_through_keeps_its_data() {
    let host = MemHost::new();
    let on = |below: &str| Some((below.as_bytes().to_vec(), "qcow2".to_owned()));
    for (name, backing) in
        [("/0", None), ("/1", on("/0")), ("/2", on("/1")), ("/3", on("/2")), ("/other", on("/2"))]
    {
        create(&host, Path::new(name), &CreateOptions { backing, ..CreateOptions::new(1 << 20) }).unwrap();
        put(&host, Path::new(name), &local(), &[(GuestOffset::ZERO, vec![1; 512])]).unwrap();
    }
    let seen = see(&host, Path::new("/other"));
    let paths = ["/1", "/2", "/3"].map(PathBuf::from);
    let layers = all_stamps(&host, &paths);
    let base = Path::new("/0");
    let all = empty_all_onto(&host, &merged_layers(&layers), base, ImageFormat::Qcow2, &options(), &never());
    let all = all.unwrap();
    assert!(all[0].0 == Path::new("/3") && all[0].1.is_ok());
    let [_, (_, shared), (_, below)] = <[_; 3]>::try_from(all).unwrap();
    assert!(matches!(reason(shared), Refusal::SharedBase { users } if users == [Path::new("/other")]));
    assert!(reason(below).to_string().contains("reads through it"));
    assert!(see(&host, Path::new("/other")) == seen);
}

/// A call that was stopped at any moment is repeated with the first stamps. Its own writes must not keep a
/// layer from being emptied; somebody else's must.
#[test]
fn a_call_that_was_stopped_anywhere_is_made_again() {
    let (mut again, mut sealed) = (0, 0);
    for seed in 420..428 {
        let (host, paths, _) = just_merged(seed);
        let (active, base) = (paths.last().unwrap(), &paths[0]);
        let expected = base_through(&host, active);
        let options = EmptyOptions { size: expected.len() as u64, ..options() };
        let (layers, format) = (all_stamps(&host, &paths[1..]), format_of(&host, base));
        let disk = SimHost::over(&host);
        empty_all_onto(&disk, &merged_layers(&layers), base, format, &options, &never()).unwrap();
        power_cuts(disk.start(), &disk.log(), &cuts(seed), |cut| {
            let case = format!("seed {seed}: {cut}");
            let host = cut.state.host();
            let head = |path: &PathBuf| {
                Chain::open(&host, path, &local())
                    .unwrap()
                    .layers()
                    .last()
                    .unwrap()
                    .image
                    .as_qcow2()
                    .unwrap()
                    .header()
                    .clone()
            };
            let left = merged_layers(&layers);
            // Version 2 has no room for the bit: such a layer is not emptied again.
            if paths.iter().skip(1).any(|path| head(path).version < 3) {
                return;
            }
            let is_sealed = paths.iter().skip(1).find(|path| head(path).is_sealed());
            if let Some(path) = is_sealed.filter(|_| sealed % 2 == 0) {
                put(&host, path, &local(), &[(GuestOffset::ZERO, vec![9; 512])]).unwrap();
                let seen = see(&host, path);
                let all = empty_all_onto(&host, &left, base, format, &options, &never()).unwrap();
                let mine = all.into_iter().find(|(of, _)| of == path).unwrap().1;
                assert!(mine.is_err() && see(&host, path) == seen, "{case}: {mine:?}");
            } else {
                let all = empty_all_onto(&host, &left, base, format, &options, &never()).unwrap();
                for (path, result) in all {
                    assert!(result.is_ok(), "{case}: {}: {result:?}", path.display());
                }
                assert!(see(&host, active) == expected, "{case}");
                again += 1;
            }
            sealed += u32::from(is_sealed.is_some());
        });
    }
    assert!(again > 20 && sealed > 4, "{again} made again, {sealed} sealed");
}
