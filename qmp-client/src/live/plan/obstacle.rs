//! Finds out, before the job starts, why a merged layer cannot become an empty overlay on base: from QEMU's
//! nodes, and from the files on this host.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use qcow2::chain::{OpenOptions, Policy};
use qcow2::error::shown;
use qcow2::image::{ImageFormat, Qcow2};
use qcow2::retire::{EmptyOptions, can_be_emptied};
use qcow2::storage::{Access, Host, OsHost};

use super::data;
use crate::block::graph::{Disk, Layer};
use crate::live::discover::{Files, Place};
use crate::state::StateLayer;

/// Drivers whose nodes are files or devices of the host.
const LOCAL: [&str; 3] = ["file", "host_device", "host_cdrom"];

/// Why a layer cannot become an empty overlay on base.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// An image is reached over a protocol.
    Protocol {
        /// The image, as QEMU calls it.
        file: String,
        /// The protocol's driver.
        protocol: String,
    },
    /// An image is no file here: another host's, or another root's.
    Elsewhere {
        /// The image, as QEMU calls it.
        file: String,
    },
    /// An image has a format that the engine does not write.
    Format {
        /// The image.
        file: String,
        /// The format.
        format: String,
    },
    /// An image is encrypted.
    Encrypted {
        /// The image.
        file: String,
    },
    /// An image is a part of its file only, which a backing name cannot say.
    Part {
        /// The file.
        file: String,
    },
    /// An image's first bytes contradict the format that QEMU was told.
    Contradicted {
        /// The image.
        file: String,
        /// The format that QEMU was told.
        declared: String,
        /// The format that its first bytes say.
        found: String,
    },
    /// The image may not be written, or is damaged.
    Unwritable {
        /// Why, in the system's or the engine's words.
        why: String,
    },
    /// An image outside the chain reads through the layer.
    Shared {
        /// That image.
        user: PathBuf,
    },
}

impl Obstacle {
    /// Why no layer can become an empty overlay on this base of a merge that was begun.
    pub(crate) fn of_base(base: &StateLayer) -> Option<Self> {
        let part = base.part.then(|| Self::Part { file: base.file.clone() });
        part.or_else(|| Self::of_state(base))
    }

    /// Why this layer of a merge that was begun cannot become an empty overlay.
    pub(crate) fn of_overlay(layer: &StateLayer) -> Option<Self> {
        let format = || Self::Format { file: layer.file.clone(), format: layer.format.clone() };
        Self::of_state(layer).or_else(|| (layer.format != "qcow2").then(format))
    }

    fn of_state(layer: &StateLayer) -> Option<Self> {
        let nature = by_nature(&layer.file, layer.protocol.as_deref(), &layer.format, layer.encrypted);
        nature.or_else(|| {
            let elsewhere = layer.stamp.is_none();
            elsewhere.then(|| Self::Elsewhere { file: layer.file.clone() })
        })
    }

    /// Whether the file of this layer cannot even be removed, because it is none here.
    pub(crate) fn hides(&self, layer: &Layer) -> bool {
        matches!(self, Self::Protocol { file, .. } | Self::Elsewhere { file } if *file == layer.file)
    }
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Protocol { file, protocol } => {
                write!(f, "{} is reached over {}", shown(file), shown(protocol))
            }
            Self::Elsewhere { file } => write!(f, "{} is no file here", shown(file)),
            Self::Format { file, format } => {
                write!(f, "{} has the format {}, which is not supported", shown(file), shown(format))
            }
            Self::Encrypted { file } => write!(f, "{} is encrypted, which is not supported", shown(file)),
            Self::Part { file } => {
                write!(
                    f,
                    "QEMU was given an offset or a size in {}, which a backing name cannot say",
                    shown(file)
                )
            }
            Self::Contradicted { file, declared, found } => {
                write!(f, "QEMU takes {} for {declared}, and its first bytes say {found}", shown(file))
            }
            Self::Unwritable { why } => f.write_str(&shown(why)),
            Self::Shared { user } => {
                write!(f, "{} reads through it", shown(user))
            }
        }
    }
}

/// A layer that a merge leaves behind.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Leaves {
    /// The layer.
    pub layer: Layer,
    /// Why it keeps its data; none if it becomes an empty overlay on base.
    pub obstacle: Option<Obstacle>,
    /// Whether its external data file is emptied with it: its header names the one that QEMU has open.
    pub empties_data_file: bool,
}

/// What becomes of each merged layer, from the top. `users` are images outside the chain, each with the index of the layer
/// that it uses.
pub(crate) fn of_merged(
    files: &Files,
    disk: &Disk,
    base: &Layer,
    merged: &[Layer],
    users: &[(usize, PathBuf)],
    no_lock: bool,
) -> Vec<Leaves> {
    let of_base = disk.layers().iter().filter(|layer| layer.index <= base.index).find_map(|layer| {
        if layer.part && layer.index == base.index {
            return Some(Obstacle::Part { file: layer.file.clone() });
        }
        let obstacle = not_local(files, layer).or_else(|| contradicted(layer));
        // What lies below base is not read.
        obstacle.filter(|o| layer.index == base.index || !matches!(o, Obstacle::Format { .. }))
    });
    let mut shared = None;
    let leaves = merged.iter().map(|layer| {
        // The users of a layer read through those below it.
        shared = shared.take().or_else(|| users.iter().find(|(index, _)| *index == layer.index));
        let shared = shared.map(|(_, user)| Obstacle::Shared { user: user.clone() });
        let stays = || of_layer(files, layer, no_lock).or_else(|| unemptied(disk, layer, base));
        let obstacle = of_base.clone().or(shared).or_else(stays);
        Leaves { layer: layer.clone(), obstacle, empties_data_file: data::is_named(files, layer) }
    });
    leaves.collect()
}

fn of_layer(files: &Files, layer: &Layer, no_lock: bool) -> Option<Obstacle> {
    if layer.format != "qcow2" {
        return Some(Obstacle::Format { file: layer.file.clone(), format: layer.format.clone() });
    }
    not_local(files, layer).or_else(|| unwritable(Path::new(&layer.file), no_lock))
}

fn not_local(files: &Files, layer: &Layer) -> Option<Obstacle> {
    by_nature(&layer.file, layer.protocol.as_deref(), &layer.format, layer.encrypted).or_else(|| match files
        .place(layer)
    {
        Place::Here(..) => None,
        Place::Other | Place::Elsewhere => Some(Obstacle::Elsewhere { file: layer.file.clone() }),
    })
}

/// What QEMU itself says of an image that the engine cannot deal with.
fn by_nature(file: &str, protocol: Option<&str>, format: &str, encrypted: bool) -> Option<Obstacle> {
    let file = file.to_owned();
    if let Some(protocol) = protocol.filter(|p| !LOCAL.contains(p) && !is_filter(p)) {
        return Some(Obstacle::Protocol { file, protocol: protocol.to_owned() });
    }
    if encrypted {
        return Some(Obstacle::Encrypted { file });
    }
    let known = matches!(ImageFormat::from_name(format), Some(ImageFormat::Raw | ImageFormat::Qcow2));
    (!known).then(|| Obstacle::Format { file, format: format.to_owned() })
}

/// A filter between a format and its file passes everything on.
fn is_filter(driver: &str) -> bool {
    ["throttle", "blkdebug", "blklogwrites", "blkreplay", "preallocate"].contains(&driver)
}

fn contradicted(layer: &Layer) -> Option<Obstacle> {
    let path = Path::new(&layer.file);
    // If it cannot be read now, the error is reported when it matters.
    let file = OsHost.open(path, Access::Read).ok()?;
    let declared = ImageFormat::from_name(&layer.format)?;
    let found = ImageFormat::detect(path, &*file).ok()?;
    let (file, name) = (layer.file.clone(), layer.format.clone());
    (!declared.agrees_with(found)).then(|| Obstacle::Contradicted {
        file,
        declared: name,
        found: found.name().to_owned(),
    })
}

/// How layers are emptied: what is lost has been accepted before the merge began.
pub(crate) fn how_to_empty(no_locks: bool) -> EmptyOptions {
    let mut open = OpenOptions::new(Policy::local_files());
    open.no_locks = no_locks;
    let mut options = EmptyOptions::new(open);
    options.drop_bitmaps = true;
    options.allow_snapshot_change = true;
    options
}

/// Why the header or the tables of a layer forbid it; `None` if they do not. QEMU has the layer open.
fn unemptied(disk: &Disk, layer: &Layer, base: &Layer) -> Option<Obstacle> {
    let format = ImageFormat::from_name(&base.format)?;
    let is_active = layer.index == disk.active().index;
    let mut options = how_to_empty(false);
    options.size = disk.active().virtual_size;
    options.mark = !is_active;
    let (path, base) = (Path::new(&layer.file), Path::new(&base.file));
    let never = AtomicBool::new(false);
    let why = can_be_emptied(&OsHost, path, base, format, &options, true, &never).err()?;
    Some(Obstacle::Unwritable { why: why.to_string() })
}

fn unwritable(path: &Path, no_lock: bool) -> Option<Obstacle> {
    let opened = OsHost.open(path, Access::ReadWrite);
    let why = match opened {
        Err(error) => format!("{} cannot be written: {error}", path.display()),
        Ok(file) if !no_lock && file.used_by_others().is_ok() && !file.has_locks() => {
            format!("the file system of {} has no locks (--no-lock empties it all the same)", path.display())
        }
        Ok(file) => {
            let header = Qcow2::read_cluster0(path, &*file);
            let valid = header.and_then(|c| c.validate().map_err(|e| qcow2::Error::format(path, e)));
            valid.err()?.to_string()
        }
    };
    Some(Obstacle::Unwritable { why })
}
