//! Handles obsolete layers that QEMU has merged. Each is removed, becomes an empty overlay on base, or keeps
//! its data for a reason that is reported. Both the end of a merge and its recovery use this.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use qcow2::chain::{Chain, OpenOptions};
use qcow2::image::ImageFormat;
use qcow2::retire::{MergedLayers, can_be_emptied, empty_all_onto, mark_merged, remove, unused};
use qcow2::stamp::Stamp;
use qcow2::storage::{FileId, OsHost};
use qcow2::{Error, Refusal};
use serde::Serialize;

use super::reason::StaysReason;
use crate::live::plan::{Obstacle, how_to_empty};
use crate::live::verdict::Switched;
use crate::serial;
use crate::state::{Kind, State, StateLayer, stamp_of};

/// What to do with obsolete files.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct TidyOptions {
    /// Remove them.
    pub delete: bool,
    /// Folders to search for images that use the files, besides those that the merge noted.
    pub scan: Vec<PathBuf>,
    /// Change files even if the file system has no locks.
    pub no_lock: bool,
}

impl TidyOptions {
    /// Options to remove the files if `delete` is set. Images that use them are also searched in `scan`.
    pub fn new(delete: bool, scan: &[PathBuf]) -> Self {
        Self { delete, scan: scan.to_vec(), no_lock: false }
    }
}

/// What was done with the obsolete files.
#[derive(Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Tidied {
    /// Files that were removed.
    #[serde(serialize_with = "serial::names")]
    pub deleted: Vec<PathBuf>,
    /// Files that are empty overlays on base now, from the top.
    #[serde(serialize_with = "serial::names")]
    pub emptied: Vec<PathBuf>,
    /// Files that the disk no longer needs, and that stay unchanged.
    #[serde(rename = "unneeded", serialize_with = "serial::names")]
    pub obsolete: Vec<PathBuf>,
    /// Files that keep their data for good, each with the reason.
    #[serde(serialize_with = "serial::reasons")]
    pub stale: Vec<(PathBuf, StaysReason)>,
    /// Files that could not be treated now, each with the reason.
    #[serde(serialize_with = "serial::reasons")]
    pub kept: Vec<(PathBuf, StaysReason)>,
    /// The first error for which a file was kept.
    #[serde(skip)]
    pub error: Option<Error>,
    /// Whether the old active image cannot be emptied, though that was planned. It and every layer below it
    /// keep their data, and the user must decide what becomes of them.
    #[serde(skip)]
    pub is_stuck: bool,
}

/// Tidies up after a merge that has switched. Base must be durable.
pub(crate) struct Tidy<'a> {
    pub(crate) switched: Switched<'a>,
    pub(crate) options: &'a TidyOptions,
    /// Only say what would be done.
    pub(crate) dry_run: bool,
    pub(crate) cancel: &'a AtomicBool,
}

impl Tidy<'_> {
    fn state(&self) -> &State {
        self.switched.state()
    }

    /// Handles the obsolete layers, from the top. Each must still have its stamp.
    pub(crate) fn run(&self, obsolete: &[(&StateLayer, Stamp)], tidied: &mut Tidied) {
        let stamps: Vec<Stamp> = obsolete.iter().map(|(_, stamp)| stamp.clone()).collect();
        let scan = [&self.state().scan[..], &self.options.scan[..]].concat();
        let ids: Vec<FileId> = self.state().layers.iter().filter_map(id).collect();
        if self.options.delete {
            self.delete(&stamps, &ids, &scan, tidied);
        } else {
            self.empty(obsolete, &ids, &scan, tidied);
        }
        tidied.is_stuck |= self.is_doubtful(tidied);
    }

    /// Whether the old active image is kept because it changed since it was noted: QEMU may have written its tables when
    /// it closed the image, or a guest was started from it. It shows the old disk, so the merge is not done.
    fn is_doubtful(&self, tidied: &Tidied) -> bool {
        let state = self.state();
        let active = state.active().filter(|_| state.kind == Kind::ActiveCommit && !state.allow_stale);
        let changed =
            matches!(&tidied.error, Some(Error::Refused { reason: Refusal::NotAsKnown { .. }, .. }));
        changed && active.is_some_and(|a| tidied.kept.iter().any(|(kept, _)| kept == Path::new(&a.file)))
    }

    /// Removes the layers, the uppermost first, down to the first one that another image uses.
    fn delete(&self, stamp: &[Stamp], ids: &[FileId], scan: &[PathBuf], tidied: &mut Tidied) {
        let (free, users) = match unused(&OsHost, stamp, ids, scan) {
            Ok(found) => found,
            Err(error) => return keep(tidied, stamp, error),
        };
        let (going, staying) = stamp.split_at(free);
        for (at, image) in going.iter().enumerate() {
            if self.dry_run {
                tidied.deleted.push(image.path.clone());
                continue;
            }
            match remove(&OsHost, std::slice::from_ref(image), ids, scan, self.options.no_lock) {
                Ok(removed) => tidied.deleted.extend(removed.deleted),
                // The users of the kept layer read through those below it.
                Err(error) => return keep(tidied, going.get(at..).unwrap_or_default(), error),
            }
        }
        for (at, image) in staying.iter().enumerate() {
            let why = StaysReason::used_by(users.first().filter(|_| at == 0));
            self.leave(image, why, tidied);
        }
    }

    fn empty(
        &self,
        obsolete: &[(&StateLayer, Stamp)],
        ids: &[FileId],
        scan: &[PathBuf],
        tidied: &mut Tidied,
    ) {
        let Some(base) = self.state().layer(self.state().base) else { return };
        let of_base = Obstacle::of_base(base);
        let is_active = |layer: &StateLayer| {
            self.state().kind == Kind::ActiveCommit
                && self.state().active().is_some_and(|a| a.index == layer.index)
        };
        let mut all_stay = of_base.map(StaysReason::Obstacle);
        let mut going = Vec::new();
        for (layer, stamp) in obsolete {
            let own = Obstacle::of_overlay(layer).map(StaysReason::Obstacle);
            if let Some(why) = all_stay.clone().or_else(|| own.clone()) {
                self.leave(stamp, why, tidied);
            } else {
                going.push(stamp.clone());
            }
            if own.is_some() && is_active(layer) {
                // The user has accepted that the old active image stays, and it must go on showing its disk.
                all_stay.get_or_insert(StaysReason::BelowKept);
            }
        }
        if going.is_empty() {
            return;
        }
        let Some(format) = id(base).and(ImageFormat::from_name(&base.format)) else {
            let what = "it is another file by now".to_owned();
            let error = Error::refused(Path::new(&base.file), Refusal::NotAsKnown { what });
            return keep(tidied, &going, error);
        };
        if self.dry_run {
            return self.would_empty(&going, ids, scan, tidied);
        }
        let mut options = how_to_empty(self.options.no_lock);
        options.data_files = Some(self.state().merged().filter_map(data_id).collect());
        options.size = self.size(base, format, &options.open);
        let active = obsolete.iter().find(|(layer, _)| is_active(layer)).map(|(_, stamp)| stamp);
        let must_go = active.filter(|stamp| going.contains(stamp));
        let refused = must_go.and_then(|stamp| {
            let (path, base) = (&stamp.path, Path::new(&base.file));
            can_be_emptied(&OsHost, path, base, format, &options, false, self.cancel).err()
        });
        if let (Some(stamp), Some(error)) = (must_go, refused) {
            // As long as it shows the old disk, nothing below it may change.
            return self.old_stays(stamp, &going, error, tidied);
        }
        let must_go = must_go.filter(|_| !self.state().allow_stale);
        let active = active.map(|stamp| stamp.id);
        let behind = MergedLayers { layers: &going, active, chain: ids, scan };
        let done = empty_all_onto(&OsHost, &behind, Path::new(&base.file), format, &options, self.cancel);
        let results = match done {
            Ok(results) => results,
            Err(error) => return keep(tidied, &going, error),
        };
        let is_stuck = |(image, (_, result)): (&Stamp, &(PathBuf, qcow2::Result<_>))| {
            must_go == Some(image) && result.as_ref().is_err_and(|error| !may_pass(error))
        };
        tidied.is_stuck = going.iter().zip(&results).any(is_stuck);
        for (image, (path, result)) in going.iter().zip(results) {
            match result {
                Ok(_) => tidied.emptied.push(path),
                Err(error) if tidied.is_stuck || may_pass(&error) => {
                    tidied.kept.push((path, StaysReason::failed(&error)));
                    tidied.error.get_or_insert(error);
                }
                Err(error) => self.leave(image, StaysReason::of(&error), tidied),
            }
        }
    }

    /// The least size of an empty overlay, in bytes: the disk's size when the merge began, or base's size now,
    /// whichever is larger. If the disk has grown since, a smaller overlay would cut off its end.
    fn size(&self, base: &StateLayer, format: ImageFormat, open: &OpenOptions) -> u64 {
        let then = self.state().active().map_or(0, |active| active.virtual_size);
        let open = open.clone().with_format(Some(format));
        // If base cannot be opened, emptying a layer onto it will fail, and report that.
        let now = Chain::open(&OsHost, Path::new(&base.file), &open)
            .ok()
            .and_then(|chain| chain.images().last().map(|image| image.virtual_size()));
        then.max(now.unwrap_or(0))
    }

    /// Handles an old active image that cannot be emptied: it and all layers below it stay as they are. If the
    /// user has accepted that, it is reported; otherwise the merge stays unfinished.
    fn old_stays(&self, active: &Stamp, going: &[Stamp], error: Error, tidied: &mut Tidied) {
        if may_pass(&error) || !self.state().allow_stale {
            tidied.is_stuck = !may_pass(&error);
            return keep(tidied, going, error);
        }
        for image in going {
            let why = if image == active { StaysReason::of(&error) } else { StaysReason::BelowKept };
            self.leave(image, why, tidied);
        }
    }

    fn would_empty(&self, going: &[Stamp], ids: &[FileId], scan: &[PathBuf], tidied: &mut Tidied) {
        let (free, users) = match unused(&OsHost, going, ids, scan) {
            Ok(found) => found,
            Err(error) => return keep(tidied, going, error),
        };
        let (free, staying) = going.split_at(free);
        tidied.emptied.extend(free.iter().map(|image| image.path.clone()));
        for (at, image) in staying.iter().enumerate() {
            let why = StaysReason::used_by(users.first().filter(|_| at == 0));
            self.leave(image, why, tidied);
        }
    }

    /// Leaves an image as it is, for good. If its header has room, a mark keeps it from being merged again.
    fn leave(&self, image: &Stamp, why: StaysReason, tidied: &mut Tidied) {
        let base = self.state().layer(self.state().base).map_or(Path::new(""), |base| Path::new(&base.file));
        if !self.dry_run {
            // An image without a mark is reported all the same.
            let _ = mark_merged(&OsHost, std::slice::from_ref(image), base, self.options.no_lock);
        }
        tidied.stale.push((image.path.clone(), why));
    }
}

/// The file of a layer, if its name leads to it still, for certain.
pub(crate) fn id(layer: &StateLayer) -> Option<FileId> {
    still(Path::new(&layer.file), layer.stamp.as_ref()?)
}

/// The same for its external data file, if that is to be emptied.
fn data_id(layer: &StateLayer) -> Option<FileId> {
    still(Path::new(layer.data_file.as_ref()?), layer.data_file_stamp.as_ref()?)
}

/// The file of this name, if it is still the one that it was.
fn still(path: &Path, before: &Stamp) -> Option<FileId> {
    let now = stamp_of(path).ok()??;
    before.is_same_file(&now).then_some(now.id)
}

/// Keeps all images because of an error about the first one: it reads through the others.
fn keep(tidied: &mut Tidied, images: &[Stamp], error: Error) {
    for (at, image) in images.iter().enumerate() {
        let why = if at == 0 { StaysReason::failed(&error) } else { StaysReason::BelowKept };
        tidied.kept.push((image.path.clone(), why));
    }
    tidied.error.get_or_insert(error);
}

/// Whether the same call may succeed later.
fn may_pass(error: &Error) -> bool {
    match error {
        Error::InUse { .. } | Error::Cancelled => true,
        Error::Io { source, .. } | Error::Barrier { source, .. } => {
            !matches!(source.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem)
        }
        Error::Refused { reason, .. } => matches!(reason, Refusal::NotAsKnown { .. }),
        _ => false,
    }
}
