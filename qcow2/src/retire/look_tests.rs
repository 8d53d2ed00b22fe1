//! Every look at a file or a name fails once while a merge is judged. The failure must become an error, or be
//! named in the plan; it must never count as "not there".

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::{EmptyOptions, MergedLayers, empty_all_onto};
use crate::chain::OpenOptions;
use crate::error::{Error, ErrorKind, Refusal, Result};
use crate::image::{CreateOptions, ImageFormat, create};
use crate::merge::{Commit, CommitOptions, Plan};
use crate::stamp::Stamp;
use crate::storage::sim::{Fault, FaultKind, SimHost};
use crate::storage::{Host, MemHost};
use crate::testing::local;
use crate::transfer::put;
use crate::units::GuestOffset;

const SIZE: u64 = 1 << 20;

fn image(host: &MemHost, path: &str, backing: &str) {
    let backing = (!backing.is_empty()).then(|| (backing.as_bytes().to_vec(), "qcow2".to_owned()));
    create(host, Path::new(path), &CreateOptions { backing, ..CreateOptions::new(SIZE) }).unwrap();
}

fn prepare(disk: &SimHost, active: &str, options: &CommitOptions) -> Result<Plan> {
    let host: Arc<dyn Host> = Arc::new(disk.clone());
    Ok(Commit::prepare(host, Path::new(active), options, &AtomicBool::new(false))?.plan().unwrap().clone())
}

/// Lets each operation fail once, and judges the result; returns how many operations there are.
fn each_fails(host: &MemHost, mut look: impl FnMut(&SimHost, &str)) -> u64 {
    for nth in 1.. {
        let disk = SimHost::over(host);
        disk.fail(Some(Fault { kind: FaultKind::Io, nth, for_ever: false }));
        look(&disk, &format!("operation {nth}"));
        if disk.failed() == 0 {
            return nth;
        }
    }
    0
}

fn is_io(error: &Error) -> bool {
    error.kind() == ErrorKind::Io || matches!(error, Error::MissingLayer { .. })
}

#[test]
fn a_user_of_base_that_cannot_be_looked_at_is_not_missed() {
    let options = CommitOptions { open: local(), scan: vec!["/scan".into()], ..CommitOptions::default() };
    for (user, name) in [
        ("/vms/1/user", "/lib/base"),
        ("/scan/deep/down/user", "/lib/base"),
        ("/vms/2/user", "/lib/base"),
        ("/vms/1/moved", "before/base"),
    ] {
        let host = MemHost::new();
        image(&host, "/lib/base", "");
        image(&host, "/vms/1/top", "/lib/base");
        // There is something to merge.
        put(&host, Path::new("/vms/1/top"), &local(), &[(GuestOffset::ZERO, vec![1; 512])]).unwrap();
        image(&host, "/scan/other", "");
        image(&host, user, name);
        let operations = each_fails(&host, |disk, what| match prepare(disk, "/vms/1/top", &options) {
            Err(Error::Refused {
                reason: Refusal::SharedBase { .. } | Refusal::PossiblyShared { .. },
                ..
            }) => {}
            Err(error) => assert!(is_io(&error), "{user}, {what}: {error}"),
            Ok(plan) => assert!(!plan.unreadable.is_empty(), "{user}, {what}: nobody said a word"),
        });
        assert!(operations > 40, "{operations}");
    }
}

#[test]
fn what_cannot_be_looked_at_is_no_reason_to_refuse() {
    let host = MemHost::new();
    image(&host, "/vm/base", "");
    image(&host, "/vm/a", "base");
    let file = |name: &str| format!(r#""driver":"qcow2","file":{{"driver":"file","filename":"{name}"}}"#);
    image(&host, "/vm/top", &format!("json:{{{},\"backing\":{{{}}}}}", file("/vm/a"), file("/vm/base")));
    let mut open = local();
    // By another name than the image's, so that the file must be looked at.
    open.backing_formats.insert("/vm/x/../a".into(), ImageFormat::Qcow2);
    let options = CommitOptions { open, ..CommitOptions::default() };
    let whole = prepare(&SimHost::over(&host), "/vm/top", &options).unwrap();
    each_fails(&host, |disk, what| match prepare(disk, "/vm/top", &options) {
        Err(error) => assert!(is_io(&error), "{what}: {error}"),
        Ok(plan) => {
            let plan = Plan { unreadable: Vec::new(), signs: whole.signs.clone(), ..plan };
            assert_eq!(format!("{plan:?}"), format!("{whole:?}"), "{what}");
        }
    });
}

#[test]
fn a_layer_that_cannot_be_looked_at_is_not_another_one() {
    let host = MemHost::new();
    image(&host, "/vm/base", "");
    image(&host, "/vm/a", "base");
    image(&host, "/vm/b", "a");
    let paths = ["/vm/b", "/vm/a"].map(PathBuf::from);
    let layers = paths.each_ref().map(|path| Stamp::now(&host, path).unwrap().unwrap());
    let left = MergedLayers { layers: &layers, active: None, chain: &[], scan: &[] };
    let options =
        EmptyOptions { open: OpenOptions { lock: true, ..local() }, mark: true, ..EmptyOptions::default() };
    let empty = |host: &dyn Host| {
        let base = Path::new("/vm/base");
        empty_all_onto(host, &left, base, ImageFormat::Qcow2, &options, &AtomicBool::new(false))
    };
    each_fails(&host, |disk, what| {
        let results = match empty(disk) {
            Ok(results) => results,
            Err(error) => return assert!(is_io(&error), "{what}: {error}"),
        };
        for (path, result) in results {
            let kept = |error: &Error| matches!(error, Error::Refused { reason: Refusal::ReadThrough, .. });
            let told = result.as_ref().map_or_else(|error| is_io(error) || kept(error), |_| true);
            assert!(told, "{what}: {}: {result:?}", path.display());
        }
        // The same call finishes it.
        disk.fail(None);
        for (path, result) in empty(disk).unwrap() {
            result.unwrap_or_else(|e| panic!("{what}, again: {}: {e}", path.display()));
        }
    });
}
