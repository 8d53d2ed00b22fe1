//! The state of a merge that must survive its client, QEMU and the host: above all which image is the valid
//! top.
//!
//! A small file beside the active image holds it. It is written before the job starts, and at every change. It
//! is replaced as a whole and synced, so a crash leaves the old content or the new one.

mod file;
mod folder;
mod litter;
mod pointer;
mod shown;
mod stamp;
#[cfg(test)]
pub(crate) mod tests;

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use qcow2::stamp::Stamp;
use serde::{Deserialize, Serialize};

use crate::block::graph::Layer;
use crate::error::{Error, Result, StateFault};

pub use file::{StateFile, find_states, states_in};
pub(crate) use file::{states_beside, strangers_in};
pub use litter::sweep;
pub(crate) use pointer::Pointer;
pub use pointer::states_of;
pub use shown::Qemu;
pub(crate) use stamp::{boot, stamp_of};

/// The version of the file's content that is written, and the only one that is read.
pub(crate) const VERSION: u32 = 2;

/// A merge as its state file describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct State {
    /// The version of this description.
    pub version: u32,
    /// When the merge began, in nanoseconds since 1970.
    pub created_ns: u64,
    /// When this was written last, in nanoseconds since 1970.
    pub changed_ns: u64,
    /// When this program saw that QEMU was gone, in nanoseconds since 1970: either before everything was
    /// copied; or after QEMU was told to switch, and before it answered. Earlier writes to the disk's files are
    /// that QEMU's.
    pub gone_ns: Option<u64>,
    /// The run of the host's kernel in which this was written. Times of files are evidence only within one run:
    /// a power cut may lose a file's new time even though its data was synced.
    pub boot: Option<String>,
    /// The monitor's address, as [`crate::Address`] reads it; the path of a socket is absolute.
    pub address: String,
    /// The disk's name.
    pub disk: String,
    /// The job's id.
    pub job: String,
    /// What is merged which way.
    pub kind: Kind,
    /// How far the merge is.
    pub phase: Phase,
    /// The valid top: the image that, with those below it, holds the guest's disk. QEMU must be started with
    /// it.
    pub valid_top: String,
    /// The whole chain as it was when the merge began, from the active layer down.
    pub layers: Vec<StateLayer>,
    /// The index of the base, counted from the bottom; 0 for a pull of everything.
    pub base: usize,
    /// The index of the uppermost obsolete layer: top for a commit, the one below the active layer for a pull.
    pub top: usize,
    /// The header that the switch changes; `None` for an active commit.
    pub backing: Option<RecordedRelink>,
    /// Whether the merged files are to be deleted afterwards.
    pub delete: bool,
    /// Folders to search for other users of the merged files before these are deleted, besides the folders of
    /// the chain.
    #[serde(default)]
    pub scan: Vec<std::path::PathBuf>,
    /// Whether the user accepts that merged layers keep old data if they cannot become empty overlays on base.
    #[serde(default)]
    pub allow_stale: bool,
    /// Whether an active commit is to pivot as soon as it is ready.
    pub pivot: bool,
    /// Whether an active commit is to end without a pivot.
    pub keep_overlay: bool,
    /// The socket of QEMU's own NBD server, through which base is flushed.
    pub nbd_socket: Option<std::path::PathBuf>,
    /// The limits that the disk had before it was throttled, while it is.
    pub throttled: Option<Throttled>,
    /// Whether this client has paused the guest for a moment, or may have. A client that finds it still paused
    /// resumes it.
    #[serde(default)]
    pub paused: bool,
}

/// What is merged which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Layers below the active one are merged into a base below them.
    Commit,
    /// All layers above base are merged, including the active one; the guest moves to base at the end.
    ActiveCommit,
    /// The active layer takes in layers below it.
    Pull,
}

/// The progress of a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Data is copied; nothing is switched. This is written before the job starts.
    Copying,
    /// QEMU is about to be told to switch, or was told. The copied data is durable.
    Switching,
    /// QEMU has reported a successful switch. Merged files may still have to be cleaned up.
    Switched,
}

/// A layer of the chain, as it was when the merge began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StateLayer {
    /// The place in the chain, counted from the bottom, which is `1`.
    pub index: usize,
    /// The node's name, in the QEMU that ran the merge.
    pub node: String,
    /// The node that held the file.
    pub protocol_node: Option<String>,
    /// The node that held the external data file.
    #[serde(default)]
    pub data_file_node: Option<String>,
    /// The name of that file as QEMU had it.
    #[serde(default)]
    pub data_file: Option<String>,
    /// The stamp of the external data file, if it will be emptied with its image.
    #[serde(with = "stamp")]
    pub data_file_stamp: Option<Stamp>,
    /// The file's name as QEMU had it, or the address of what is no file.
    pub file: String,
    /// The driver of that node, such as `file` or `nbd`.
    #[serde(default)]
    pub protocol: Option<String>,
    /// The format.
    pub format: String,
    /// Whether it is encrypted.
    #[serde(default)]
    pub encrypted: bool,
    /// Whether it is only a part of its file.
    #[serde(default)]
    pub part: bool,
    /// The size that a guest sees, in bytes.
    pub virtual_size: u64,
    /// The stamp of the file, if it is a file on this host. For base, top and the active layer it is taken
    /// again at the switch and after it.
    #[serde(with = "stamp")]
    pub stamp: Option<Stamp>,
}

/// A backing name that the switch changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RecordedRelink {
    /// The file of the overlay whose header it is.
    pub overlay: String,
    /// The overlay's index in the chain.
    pub index: usize,
    /// The name before.
    pub old: String,
    /// The format before, where the header named one.
    pub old_format: Option<String>,
    /// The name after; none after a pull of everything.
    pub new: Option<String>,
}

/// The former limits of a disk that is throttled for the merge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Throttled {
    /// The device's path in QEMU's tree of objects.
    pub qdev: String,
    /// The arguments of `block_set_io_throttle` that put the former limits back.
    pub former: serde_json::Map<String, serde_json::Value>,
}

impl State {
    /// The layer of this index, counted from the bottom.
    pub fn layer(&self, index: usize) -> Option<&StateLayer> {
        self.layers.iter().find(|layer| layer.index == index)
    }

    /// The layer that was active when the merge began.
    pub fn active(&self) -> Option<&StateLayer> {
        self.layers.first()
    }

    /// The layers that the disk no longer needs once the merge is switched, from the top.
    pub fn merged(&self) -> impl Iterator<Item = &StateLayer> {
        self.layers.iter().filter(|layer| layer.index > self.base && layer.index <= self.top)
    }

    /// The layers that the disk has once the merge is switched, from the top.
    pub fn layers_after(&self) -> impl Iterator<Item = &StateLayer> {
        self.layers.iter().filter(|layer| layer.index <= self.base || layer.index > self.top)
    }

    /// The layer that the copy went to, whose stamp tells what happened to the disk; `None` if the state names
    /// no such layer.
    pub fn target(&self) -> Option<&StateLayer> {
        match self.kind {
            Kind::Pull => self.active(),
            Kind::Commit | Kind::ActiveCommit => self.layer(self.base),
        }
    }

    /// Whether the state was written in the present run of the host.
    pub(crate) fn is_of_this_boot(&self) -> bool {
        self.boot.is_some() && self.boot == boot()
    }

    /// Sets the phase, and the file that is the valid top in it.
    pub(crate) fn enter(&mut self, phase: Phase, valid_top: String) {
        self.phase = phase;
        self.valid_top = valid_top;
        self.gone_ns = None;
        self.boot = boot();
        self.layers.iter_mut().for_each(StateLayer::look_again);
    }

    /// The file that is the valid top as long as nothing is switched.
    pub(crate) fn top_before(&self) -> String {
        self.active().map(|layer| layer.file.clone()).unwrap_or_default()
    }

    /// The file that is the valid top once the merge is switched.
    pub(crate) fn top_after(&self) -> String {
        self.layers_after().next().map(|layer| layer.file.clone()).unwrap_or_default()
    }

    /// Reads a file's text.
    pub(crate) fn parse(text: &[u8]) -> std::result::Result<Self, StateFault> {
        /// What every version has.
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }
        let no_state = |error: serde_json::Error| StateFault::NoState(error.to_string());
        // Read the version first: other versions may have other fields.
        let Versioned { version: found } = serde_json::from_slice(text).map_err(no_state)?;
        if found != u64::from(VERSION) {
            return Err(StateFault::OtherVersion { found, expected: VERSION });
        }
        let state: Self = serde_json::from_slice(text).map_err(no_state)?;
        state.check().map_err(StateFault::NoState)?;
        Ok(state)
    }

    /// The conditions that a state must meet before its numbers are used.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let depth = self.layers.len();
        if !self.layers.iter().enumerate().all(|(place, layer)| layer.index == depth - place) {
            return Err("its layers are not numbered from the active one down to 1".into());
        }
        let lowest = usize::from(self.kind != Kind::Pull);
        if self.base < lowest || self.base >= self.top || self.top > depth {
            return Err(format!("it merges layers {} to {} of {depth}", self.base, self.top));
        }
        if (self.kind == Kind::ActiveCommit) != (self.top == depth) {
            return Err(format!("its kind does not fit the top {} of {depth} layers", self.top));
        }
        let renamed = self.backing.as_ref().map(|relink| relink.index);
        let expected = (self.kind != Kind::ActiveCommit).then_some(self.top + 1);
        if renamed != expected {
            return Err("it names the wrong overlay for the switch".into());
        }
        Ok(())
    }
}

impl StateLayer {
    /// The layer as it is now, with the stamp of its file if it is `here`.
    ///
    /// # Errors
    /// [`Error::File`] if that cannot be looked at.
    pub(crate) fn of(layer: &Layer, here: bool) -> Result<Self> {
        let path = std::path::Path::new(&layer.file);
        let stamp = if here { stamp_of(path).map_err(|e| unreadable(path, e))? } else { None };
        Ok(Self {
            index: layer.index,
            node: layer.node.clone(),
            protocol_node: layer.protocol_node.clone(),
            data_file_node: layer.data_file_node.clone(),
            data_file: layer.data_file.clone(),
            data_file_stamp: None,
            file: layer.file.clone(),
            protocol: layer.protocol.clone(),
            format: layer.format.clone(),
            encrypted: layer.encrypted,
            part: layer.part,
            virtual_size: layer.virtual_size,
            stamp,
        })
    }

    /// Takes the stamp of the external data file, so that it can be emptied with its image.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be looked at.
    pub(crate) fn note_data_file(&mut self) -> Result<()> {
        if let Some(path) = self.data_file.as_deref().map(std::path::Path::new) {
            self.data_file_stamp = stamp_of(path).map_err(|e| unreadable(path, e))?;
        }
        Ok(())
    }

    /// Takes the file's stamp again if it is still the same file. If that cannot be told, the old stamp stays.
    /// Then the file looks as if somebody had written to it, which leads to a doubt later, and to no harm.
    pub(crate) fn look_again(&mut self) {
        let now = stamp_of(std::path::Path::new(&self.file)).ok().flatten();
        if let (Some(before), Some(now)) = (&mut self.stamp, now)
            && before.is_same_file(&now)
        {
            *before = now;
        }
    }

    /// The layer as far as QEMU's answer describes it.
    pub(crate) fn recall(&self) -> Layer {
        Layer {
            index: self.index,
            node: self.node.clone(),
            protocol_node: self.protocol_node.clone(),
            data_file_node: self.data_file_node.clone(),
            data_file: self.data_file.clone(),
            protocol: self.protocol.clone(),
            file: self.file.clone(),
            format: self.format.clone(),
            virtual_size: self.virtual_size,
            actual_size: None,
            read_only: true,
            encrypted: self.encrypted,
            part: self.part,
            backing: None,
            bitmaps: Vec::new(),
            snapshots: 0,
        }
    }
}

/// The time, in nanoseconds since 1970.
pub(crate) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The error for a file or a folder that the system does not let be looked at, read or written.
fn unreadable(path: &std::path::Path, source: std::io::Error) -> Error {
    Error::File { file: path.to_owned(), source }
}

/// Why a state file cannot be used.
#[derive(Debug)]
enum StateTrouble {
    /// The system refused.
    Io(io::Error),
    /// It is not believed, or holds no state.
    Fault(StateFault),
}

impl From<io::Error> for StateTrouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<StateFault> for StateTrouble {
    fn from(fault: StateFault) -> Self {
        Self::Fault(fault)
    }
}

/// The error about the state file at `path`.
fn failed(path: &std::path::Path, trouble: StateTrouble) -> Error {
    match trouble {
        StateTrouble::Io(source) => unreadable(path, source),
        StateTrouble::Fault(why) => Error::State { path: path.to_owned(), why },
    }
}
