//! Has the persistent bitmaps of a qcow2 base record the merge (see [`crate::image::bitmaps`]).

use std::sync::atomic::AtomicBool;

use super::job::Job;
use crate::error::{Error, Result};
use crate::image::bitmaps::{BitmapGrowth, BitmapPlan, Marker};
use crate::image::refcounts::Refcounts;
use crate::image::{Image, Qcow2};

/// What the base's bitmaps need; `None` for a raw base, which has none.
///
/// # Errors
/// Bitmaps that are damaged, or cannot be as large as the new disk asks for; what
/// [`Job::for_each_change`] reports.
pub(crate) fn plan(job: &Job<'_>, cancel: &AtomicBool) -> Result<Option<BitmapPlan>> {
    let Some(Image::Qcow2(image)) = job.layers.get(job.base) else { return Ok(None) };
    let mut plan = BitmapPlan::new(image, job.new_size)?;
    if plan.wants_ranges() {
        job.for_each_change(cancel, |range| plan.add(image, range))?;
    }
    Ok(Some(plan))
}

/// Sets the bits of everything that the job will change, and makes them durable.
///
/// # Errors
/// An I/O error; what [`Job::for_each_change`] reports.
pub(crate) fn set_bits(
    plan: BitmapPlan,
    job: &Job<'_>,
    image: &Qcow2,
    refcounts: &Refcounts,
    cancel: &AtomicBool,
) -> Result<BitmapGrowth> {
    let wanted = plan.wants_ranges();
    let mut marker = Marker::start(image, refcounts, plan)?;
    let walked = if wanted { job.for_each_change(cancel, |range| marker.add(range)) } else { Ok(()) };
    match walked {
        Ok(()) => marker.finish(),
        Err(Error::Cancelled) => {
            marker.finish()?.abandon(image, refcounts)?;
            Err(Error::Cancelled)
        }
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use kit::ok;

    use super::*;
    use crate::chain::{OpenOptions, Policy};
    use crate::error::ErrorKind;
    use crate::image::bitmap_names;
    use crate::image::bitmaps::tests::{Fixture, only, qemu, union};
    use crate::merge::{Commit, CommitOptions, Prepared};
    use crate::storage::OsHost;
    use crate::testing::Silent;
    use crate::transfer::put;
    use crate::units::GuestOffset;

    const MIB: u64 = 1 << 20;

    /// An overlay of `size` on the fixture's image.
    fn overlay(base: &Fixture, size: u64) -> PathBuf {
        let path = base.path.with_file_name("top.qcow2");
        let args = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.name(), path.to_str().unwrap()];
        ok("qemu-img", &[&args[..], &[&size.to_string()]].concat());
        path
    }

    fn prepare(top: &Path, drop_bitmaps: bool) -> Result<Prepared> {
        let open = OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() };
        let options = CommitOptions { open, verify: true, drop_bitmaps, ..CommitOptions::default() };
        Commit::prepare(Arc::new(OsHost), top, &options, &AtomicBool::new(false))
    }

    fn write(image: &Path, at: u64, len: u64) {
        ok("qemu-io", &["-c", &format!("write {at} {len}"), image.to_str().unwrap()]);
    }

    #[test]
    fn a_merge_is_recorded_by_the_bitmaps_of_its_base() {
        if !qemu() {
            return;
        }
        for options in ["cluster_size=512", "cluster_size=64k"] {
            for new_size in [16 * MIB, 24 * MIB] {
                let base = Fixture::new(options, "16M");
                base.bitmap("daily", "4096").bitmap("idle", "4096").disable("idle");
                base.write(0, 4096);
                let top = overlay(&base, new_size);
                write(&top, MIB, MIB);
                ok("qemu-io", &["-c", "write -z 4M 1M", top.to_str().unwrap()]);
                write(&top, new_size - 3 * MIB, 65536);
                let commit = prepare(&top, false).unwrap();
                let planned = commit.plan().unwrap().totals;
                let report = commit.execute(&Silent, &AtomicBool::new(false)).unwrap();
                assert_eq!(report.totals.clusters_to_allocate, planned.clusters_to_allocate);
                assert_eq!(base.checked().virtual_size(), new_size);
                let changed =
                    [MIB..2 * MIB, 4 * MIB..5 * MIB, new_size - 3 * MIB..new_size - 3 * MIB + 65536];
                let expected = union([&only(0..4096)[..], &changed].concat());
                assert_eq!(base.dirty_by_qemu("daily"), expected, "{options}, {new_size}");
                assert!(base.dirty_by_qemu("idle").is_empty());
                ok("qemu-img", &["check", "-q", top.to_str().unwrap()]);
            }
        }
    }

    #[test]
    fn what_is_put_into_an_image_is_recorded() {
        if !qemu() {
            return;
        }
        let image = Fixture::new("cluster_size=4096", "16M");
        image.bitmap("daily", "512");
        let open = OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() };
        let writes = [9 * MIB, MIB - 1].map(|at| (GuestOffset::new(at), vec![1; 2]));
        put(&OsHost, &image.path, &open, &writes).unwrap();
        image.checked();
        let expected = [MIB - 512..MIB + 512, 9 * MIB..9 * MIB + 512];
        assert_eq!(image.dirty_by_qemu("daily"), expected);
    }

    #[test]
    fn bitmaps_of_an_emptied_layer_are_lost_only_on_request_and_those_of_the_active_image_stay() {
        if !qemu() {
            return;
        }
        let base = Fixture::new("cluster_size=64k", "16M");
        let top = overlay(&base, 16 * MIB);
        ok("qemu-img", &["bitmap", "--add", top.to_str().unwrap(), "weekly"]);
        write(&top, MIB, MIB);
        let above = top.with_file_name("above");
        let named = [top.to_str().unwrap(), above.to_str().unwrap()];
        ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", named[0], "-F", "qcow2", named[1]]);
        ok("qemu-img", &["bitmap", "--add", named[1], "daily"]);
        let error = prepare(&above, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("weekly"), "{error}");
        prepare(&above, true).unwrap().execute(&Silent, &AtomicBool::new(false)).unwrap();
        let names = |path: &Path| -> Vec<String> {
            ok("qemu-img", &["check", "-q", path.to_str().unwrap()]);
            let image = crate::image::bitmaps::tests::open(path);
            bitmap_names(&image).unwrap().into_iter().map(|bitmap| bitmap.name).collect()
        };
        assert_eq!((names(&top), names(&above)), (Vec::new(), vec!["daily".to_owned()]));
        base.checked();
    }

    #[test]
    fn a_merge_that_is_stopped_leaks_nothing() {
        if !qemu() {
            return;
        }
        let base = Fixture::new("cluster_size=512", "16M");
        base.bitmap("daily", "512").write(0, 4096);
        let top = overlay(&base, 40 * MIB);
        write(&top, 30 * MIB, MIB);
        let stopped = prepare(&top, false).unwrap().execute(&Silent, &AtomicBool::new(true));
        assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(base.checked().virtual_size(), 16 * MIB);
        assert_eq!(base.dirty_by_qemu("daily"), only(0..4096));
        prepare(&top, false).unwrap().execute(&Silent, &AtomicBool::new(false)).unwrap();
        assert_eq!(base.checked().virtual_size(), 40 * MIB);
        assert_eq!(base.dirty_by_qemu("daily"), [0..4096, 30 * MIB..31 * MIB]);
    }
}
