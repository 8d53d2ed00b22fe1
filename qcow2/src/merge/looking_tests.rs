//! Opening, checking, looking for unfinished merges and planning write nothing, in whatever state a power cut has left a
//! merge.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kit::Random;

use super::crash_tests::cuts;
use super::{BaseChoice, Commit, CommitOptions, unfinished_merge};
use crate::chain::{Chain, digest, view::View};
use crate::check::{CheckOptions, check};
use crate::error::{Error, Refusal};
use crate::repair::{self, RepairMode};
use crate::storage::sim::{SimHost, power_cuts};
use crate::storage::{Access, Host, MemHost};
use crate::testing::{Silent, local, random_chain};

/// Looks at all that is there, in every way; gives what a plan comes to.
fn look(host: &SimHost, paths: &[PathBuf], options: &CommitOptions) -> Result<(), Error> {
    let (active, never) = (&paths[paths.len() - 1], AtomicBool::new(false));
    for path in paths {
        let _ = unfinished_merge(host, path, None);
        let Ok(file) = host.open(path, Access::Read) else { continue };
        let _ = check(path, &*file, None, &CheckOptions::default());
        let _ = repair::plan(path, &*file, None, RepairMode::All, &CheckOptions::default());
    }
    if let Ok(chain) = Chain::open(host, active, &local()) {
        let images = chain.images();
        let view = View::new(&images, 0, chain.active());
        let _ = digest(view, view.size(), &never);
    }
    Commit::prepare(Arc::new(host.clone()), active, options, &never).map(drop)
}

#[test]
fn nothing_is_written_by_looking() {
    let (mut planned, mut torn) = (0, 0);
    for seed in 0..6 {
        let host = MemHost::new();
        let mut dice = Random::new(seed);
        random_chain(&host, &mut dice, 3);
        let paths: Vec<PathBuf> = (0..3).map(|n| PathBuf::from(format!("/{n}"))).collect();
        let options = CommitOptions {
            open: local(),
            base: if seed % 2 == 0 { BaseChoice::Bottom } else { BaseChoice::Shallow },
            top: (seed % 3 == 0).then(|| "/1".into()),
            ..CommitOptions::default()
        };
        let disk = SimHost::over(&host);
        let never = AtomicBool::new(false);
        let commit = Commit::prepare(Arc::new(disk.clone()), Path::new("/2"), &options, &never);
        let Ok(commit) = commit else { continue };
        commit.execute(&Silent, &never).unwrap();
        power_cuts(disk.start(), &disk.log(), &cuts(seed), |cut| {
            if dice.below(8) > 0 {
                return;
            }
            let disk = SimHost::over(&cut.state.host());
            match look(&disk, &paths, &options) {
                Ok(()) => planned += 1,
                Err(Error::Refused { reason: Refusal::TornHeader, .. }) => torn += 1,
                Err(e) => panic!("seed {seed}: {cut}: {e}"),
            }
            assert!(disk.log().is_empty(), "seed {seed}: {cut}: {:?}", disk.log());
        });
    }
    assert!(planned > 20, "only {planned} plans, and {torn} torn headers");
}
