//! What a live merge will do: one value for people, for programs and for the checks before it starts.

mod bytes;
mod checks;
mod data;
mod make;
mod obstacle;
mod prepare;
mod range;
mod request;
mod same;
mod shape;

use std::path::PathBuf;

use serde_json::Value;

use super::discover::Searched;
use crate::block::graph::{Disk, Layer};
use crate::block::merge::Direction;
use crate::state::Kind;

pub use bytes::PlannedBytes;
pub(crate) use obstacle::how_to_empty;
pub use obstacle::{Leaves, Obstacle};
pub(crate) use prepare::recover_first;
pub use prepare::{Nothing, Planned, Prepared};
pub use request::Request;

/// What happens when all is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The header of an overlay is switched at once.
    Finish,
    /// The same, when `live finish` is called.
    WaitForFinish,
    /// The guest goes over to base.
    Pivot,
    /// The guest stays; the job ends.
    KeepOverlay,
    /// The guest stays; the job goes on, and the user decides.
    Ready,
}

/// Whether the file system that receives the data has room for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It has.
    Enough,
    /// It may have too little; the job stands still then, and waits for room.
    Scarce,
    /// It cannot be seen.
    Unknown,
}

/// What becomes of an external data file, which only its image names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DataFate {
    /// It takes the data.
    Written,
    /// Its image becomes an empty overlay: it is emptied too, if it lies beside its image and the image's owner may write it.
    /// That is the file that the image's header names.
    Emptied,
    /// It stays: its image is removed, or names another data file, which stays too.
    Stays,
}

/// A live merge before it starts.
#[derive(Debug)]
#[non_exhaustive]
pub struct Plan {
    /// The disk as it is.
    pub disk: Disk,
    /// The id that the job will have.
    pub job: String,
    /// Whether the data moves down into base, or up into the active layer.
    pub direction: Direction,
    /// The layer below those that go; none for a pull of everything.
    pub base: Option<Layer>,
    /// The layers that are no longer needed afterwards, from the top.
    pub merged: Vec<Layer>,
    /// The layer whose header is switched, and the backing name that it gets: none if it stands alone then.
    pub relink: Option<(Layer, Option<String>)>,
    /// What happens when all is copied.
    pub end: End,
    /// Whether the merged files are removed.
    pub delete: bool,
    /// What becomes of each merged layer that is not removed, from the top; empty for a pull, which changes none.
    pub leaves: Vec<Leaves>,
    /// How much is moved.
    pub bytes: PlannedBytes,
    /// The folder of the image that receives the data, and the free bytes of its file system.
    pub room: Option<(PathBuf, u64)>,
    /// Where other users of the files were looked for.
    pub searched: Searched,
    /// The commands for QEMU.
    pub commands: Vec<(&'static str, Value)>,
}

impl Plan {
    fn goes_down(&self) -> bool {
        self.direction == Direction::Down
    }

    /// What is merged which way.
    pub(crate) fn kind(&self) -> Kind {
        match self.direction {
            Direction::Up => Kind::Pull,
            Direction::Down if self.merges_active() => Kind::ActiveCommit,
            Direction::Down => Kind::Commit,
        }
    }

    /// Bytes of data that move, at most. A pull copies only what its receiver has no room for yet.
    pub fn bytes_to_copy(&self) -> u64 {
        let counts_new = self.direction == Direction::Up && self.bytes.counted;
        if counts_new { self.bytes.new } else { self.bytes.copy }
    }

    /// The layer that receives the data.
    pub fn receiver(&self) -> &Layer {
        match &self.base {
            Some(base) if self.goes_down() => base,
            _ => self.disk.active(),
        }
    }

    /// The layers that are no restore points any more as soon as the job starts: base, and all above it up to
    /// top, but not top itself. A pull changes none.
    pub fn restore_points_lost(&self) -> Vec<&Layer> {
        let below_top = self.merged.iter().skip(1).rev();
        self.base.iter().filter(|_| self.goes_down()).chain(below_top.filter(|_| self.goes_down())).collect()
    }

    /// Bytes that the file of the receiving layer grows by, at most. QEMU writes the zeros of merged layers as
    /// data, unless the active layer is merged.
    pub fn growth(&self) -> u64 {
        let zeros = if self.writes_zeros() { self.bytes.zero } else { 0 };
        let data = if self.bytes.counted { self.bytes.new } else { self.bytes.copy };
        data.saturating_add(zeros)
    }

    /// Whether the layer that the guest writes to is merged.
    pub fn merges_active(&self) -> bool {
        self.goes_down() && self.relink.is_none()
    }

    /// Whether QEMU writes zeros of merged layers as data.
    pub fn writes_zeros(&self) -> bool {
        self.goes_down() && self.relink.is_some()
    }

    /// The layers that become empty overlays on base.
    pub fn emptied(&self) -> impl Iterator<Item = &Layer> {
        let stays = !self.delete && self.end != End::KeepOverlay;
        self.leaves.iter().filter(move |left| stays && left.obstacle.is_none()).map(|left| &left.layer)
    }

    /// The external data files that the merge has to do with, by QEMU's names, each with its image and what becomes of it.
    pub fn data_files(&self) -> impl Iterator<Item = (&str, &Layer, DataFate)> {
        let written = [(self.receiver(), DataFate::Written)].into_iter();
        let fate = |layer: &Layer| {
            let left = self.leaves.iter().find(|left| left.layer.index == layer.index);
            if left.is_some_and(|left| left.empties_data_file) { DataFate::Emptied } else { DataFate::Stays }
        };
        let emptied = self.emptied().map(move |layer| (layer, fate(layer)));
        let goes = self.delete && self.end != End::KeepOverlay;
        let stays = self.merged.iter().filter(move |_| goes).map(|layer| (layer, DataFate::Stays));
        let all = written.chain(emptied).chain(stays);
        all.filter_map(|(layer, fate)| Some((layer.data_file.as_deref()?, layer, fate)))
    }

    /// The indexes of the layers whose external data file is emptied with them.
    pub(crate) fn data_files_emptied(&self) -> impl Iterator<Item = usize> {
        let emptied = self.data_files().filter(|(_, _, fate)| *fate == DataFate::Emptied);
        emptied.map(|(_, layer, _)| layer.index)
    }

    /// The layers that keep their data, each with the reason.
    pub fn stale(&self) -> impl Iterator<Item = (&Layer, &Obstacle)> {
        let stays = !self.delete && self.end != End::KeepOverlay;
        self.leaves
            .iter()
            .filter(move |_| stays)
            .filter_map(|left| Some((&left.layer, left.obstacle.as_ref()?)))
    }

    /// The persistent bitmaps that are lost, each with its layer.
    pub fn bitmaps_lost(&self) -> impl Iterator<Item = (&Layer, &String)> {
        self.merged.iter().flat_map(|layer| layer.bitmaps.iter().map(move |name| (layer, name)))
    }

    /// The layers whose internal snapshots change, because that was allowed.
    pub fn snapshots_changed(&self) -> impl Iterator<Item = &Layer> {
        let active = (!self.goes_down()).then(|| self.disk.active());
        let merged = self.merged.iter().filter(|_| self.goes_down());
        active.into_iter().chain(merged).filter(|layer| layer.snapshots > 0)
    }

    /// The sizes of base's disk before and after, where it grows.
    pub fn grows_disk_of_base(&self) -> Option<(u64, u64)> {
        let base = self.base.as_ref().filter(|_| self.goes_down())?;
        let top = self.merged.first()?;
        (top.virtual_size > base.virtual_size).then_some((base.virtual_size, top.virtual_size))
    }
}
