//! Translates a live merge into an offline one and back: the same layers, with the names of the other side.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use qcow2::merge::{BaseChoice, CommitOptions};
use qcow2::storage::{FileId, Host, OsHost};

use super::machine::Machine;
use super::outline::Outline;
use super::plan::Request;
use crate::block::graph::{Disk, Layer};
use crate::block::merge::Direction;
use crate::qmp::address::Address;
use crate::qmp::connection::{Connection, Options};

/// How long to wait for a monitor that another client may hold.
const PATIENCE: Duration = Duration::from_secs(1);

/// A commit of layers of the stopped machine, by the names of their files.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoppedMerge {
    /// The chain's active image.
    pub active: String,
    /// The layer that takes the data.
    pub base: String,
    /// The uppermost layer that is merged, if it is not the active one.
    pub top: Option<String>,
    /// Whether the merged files are removed.
    pub delete: bool,
}

impl StoppedMerge {
    /// The merge that is asked for; none where the layers are not known, or the data would go up.
    pub(crate) fn of_request(disk: &Disk, request: &Request) -> Option<Self> {
        if request.direction == Direction::Up {
            return None;
        }
        let layer = |name: &Option<String>| name.as_ref().map(|name| disk.layer(name)).transpose().ok();
        let (top, base) = (layer(&request.top)?.unwrap_or(disk.active()), layer(&request.base)?);
        let base = match base {
            Some(base) => base,
            None if request.shallow => disk.below(top)?,
            None => disk.layers().last()?,
        };
        let is_below = top.index < disk.active().index;
        Some(Self {
            active: disk.active().file.clone(),
            base: base.file.clone(),
            top: is_below.then(|| top.file.clone()),
            delete: false,
        })
    }

    /// A merge that was begun, with this image as the active one now.
    pub fn of_outline(merge: &Outline, active: &str) -> Self {
        let file = |index| merge.layer(index).map_or("", |layer| layer.file.as_str()).to_owned();
        Self {
            active: active.to_owned(),
            base: file(merge.base),
            top: Some(file(merge.top)).filter(|top| top != active),
            delete: merge.delete,
        }
    }
}

/// A commit of layers of a disk of the QEMU that has their chain open. Layers are named by their indexes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunningMerge {
    /// The disk.
    pub disk: String,
    /// The layer that takes the data, where one was named.
    pub base: Option<usize>,
    /// The uppermost layer that is merged, if it is not the active one.
    pub top: Option<usize>,
}

impl RunningMerge {
    /// The live form of an offline merge with this active image and these options, in the QEMU that listens
    /// there. QEMU is only asked for its disks. `None` if it does not answer, or does not have the layers.
    pub fn find(address: &Address, active: &Path, options: &CommitOptions) -> Option<Self> {
        let how = Options { allow_tcp: true, greeting_timeout: PATIENCE, ..Options::default() };
        let monitor = Connection::connect(address, &how).ok()?;
        let machine = Machine::look(&monitor, address).ok()?;
        let named = id(active)?;
        let disks = machine.graph().disks().iter();
        let (disk, layer) = disks.filter_map(|disk| Some((disk, find(disk, named)?))).next()?;
        let base = match &options.base {
            BaseChoice::Named(base) => Some(place(disk, base)?),
            BaseChoice::Bottom | BaseChoice::Shallow => None,
        };
        let top = match &options.top {
            Some(top) => Some(place(disk, top)?),
            None => Some(layer.index).filter(|index| *index < disk.active().index),
        };
        Some(Self { disk: disk.name().to_owned(), base, top })
    }
}

/// The index of a layer that the user named for the stopped chain.
fn place(disk: &Disk, name: &OsStr) -> Option<usize> {
    if let Some(layer) = id(Path::new(name)).and_then(|id| find(disk, id)) {
        return Some(layer.index);
    }
    // Indexes are counted alike: from the bottom.
    name.to_str()?.strip_suffix(']').and_then(|rest| rest.split_once('['))?.1.parse().ok()
}

fn find(disk: &Disk, file: FileId) -> Option<&Layer> {
    disk.layers().iter().find(|layer| id(Path::new(&layer.file)) == Some(file))
}

fn id(path: &Path) -> Option<FileId> {
    OsHost.stat(path).ok().map(|stat| stat.id)
}
