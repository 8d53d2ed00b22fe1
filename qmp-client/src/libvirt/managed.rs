//! What to type where libvirt owns the machine: its own command for the same thing, with paths instead of indexes, because
//! libvirt numbers layers otherwise.

use std::fs;
use std::path::{self, Path, PathBuf};

use super::definitions::Definitions;
use super::domain::{Domain, DomainDisk, Recorded};
use super::encrypted::is_encrypted;
use super::name::{DomainName, domain_of_arguments, domain_of_socket};
use super::virsh::{BlockCommit, Virsh};
use crate::block::graph::Disk;
use crate::block::merge::Direction;
use crate::live::plan::Request;
use crate::qmp::address::Address;

/// What somebody asks of a machine.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Asked<'a> {
    /// New overlays, each for a disk.
    Snapshot {
        /// The disks, and the files to make for them.
        overlays: Vec<(&'a str, &'a Path)>,
        /// Overlays of encrypted images may be made that are not encrypted.
        allow_plaintext: bool,
    },
    /// Layers of a disk merged.
    Merge {
        /// The disk.
        disk: &'a str,
        /// How.
        request: &'a Request,
    },
    /// The guest moved to base, where all is copied.
    Pivot(&'a str),
    /// The job of a disk ended without its effect.
    Cancel(&'a str),
    /// The job of a disk limited.
    Speed {
        /// The disk.
        disk: &'a str,
        /// Bytes per second.
        rate: u64,
    },
    /// The job of a disk steered in a way that libvirt has no command for.
    Steer(&'a str),
    /// The disks, and what works on them.
    Disks,
    /// The layers of a disk.
    Layers,
}

/// What libvirt has in its place. Commands are words of virsh's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Instead {
    /// This does the same.
    Command(Vec<String>),
    /// Nothing, before it is allowed that encrypted data is written in plain text.
    Plaintext {
        /// An encrypted image.
        from: PathBuf,
        /// The one that would hold its data, and is not encrypted.
        into: PathBuf,
    },
    /// The layers must be named by their paths first, which this shows.
    NameByPath(Vec<String>),
    /// There is no command for it; this slows the job down.
    OnlySlower(Vec<String>),
    /// A snapshot of some of the domain's disks, where it is not known which others there are: libvirt takes them in, too, unless it
    /// is told not to.
    SnapshotOfSome {
        /// The command, but for the disks that are left out.
        snapshot: Vec<String>,
        /// What lists the domain's disks.
        list: Vec<String>,
        /// Those that the snapshot is of.
        disks: Vec<String>,
    },
}

/// What is known of a machine of libvirt's.
#[derive(Debug)]
pub struct Managed<'a> {
    virsh: Virsh,
    /// As its definition tells, where that may be read.
    domain: Option<Domain>,
    /// As QEMU tells, where it could be asked.
    disks: &'a [Disk],
}

impl<'a> Managed<'a> {
    /// Finds the domain by the process at the other end, by the monitor's place, or by its disks.
    pub fn find(
        definitions: &Definitions,
        address: &Address,
        process: Option<u32>,
        disks: &'a [Disk],
    ) -> Option<Self> {
        let by_process = process.and_then(of_process);
        let by_place = || match address {
            Address::Unix(path) => {
                domain_of_socket(path).map(|name| (name, is_of_a_session(&path.to_string_lossy())))
            }
            Address::Tcp { .. } => None,
        };
        if let Some((name, is_of_a_session)) = by_process.or_else(by_place) {
            let domain = match &name {
                DomainName::Name(name) => definitions.domain(name).cloned(),
                DomainName::Id(_) => None,
            };
            return Some(Self { virsh: Virsh::new(&name, is_of_a_session), domain, disks });
        }
        let files: Vec<&Path> = disks.iter().map(|disk| Path::new(&disk.active().file)).collect();
        let domain = definitions.naming(&files).iter().find(|m| m.is_by_source())?.domain.clone();
        Some(Self { virsh: Virsh::of(&domain), domain: Some(domain), disks })
    }

    /// What libvirt has for this.
    pub fn instead(&self, asked: &Asked<'_>) -> Instead {
        if let Some((from, into)) = self.plaintext(asked) {
            return Instead::Plaintext { from, into };
        }
        let virsh = &self.virsh;
        let job = |disk: &str, more: &[&str]| {
            let target = self.target(disk);
            Instead::Command(virsh.command("blockjob", &[&[target.as_str()], more].concat()))
        };
        match asked {
            Asked::Snapshot { overlays, .. } => self.snapshot(overlays),
            Asked::Merge { disk, request } => match self.merge(disk, request) {
                Some(words) => Instead::Command(words),
                None => Instead::NameByPath(virsh.command("dumpxml", &[])),
            },
            Asked::Pivot(disk) => job(disk, &["--pivot"]),
            Asked::Cancel(disk) => job(disk, &["--abort"]),
            Asked::Speed { disk, rate } => job(disk, &["--bandwidth", &rate.to_string(), "--bytes"]),
            Asked::Steer(disk) => {
                Instead::OnlySlower(virsh.command("blockjob", &[&self.target(disk), "--bandwidth", "1"]))
            }
            Asked::Disks | Asked::Layers => Instead::Command(self.look(asked)),
        }
    }

    /// The command that shows what this would.
    pub fn look(&self, asked: &Asked<'_>) -> Vec<String> {
        let shows = if matches!(asked, Asked::Disks) { "domblklist" } else { "dumpxml" };
        self.virsh.command(shows, &[])
    }

    /// The merge as virsh does it; none where a layer is meant whose path is not known.
    fn merge(&self, disk: &str, request: &Request) -> Option<Vec<String>> {
        let named = |layer: &Option<String>| match layer {
            Some(layer) => self.layer(disk, layer).map(Some),
            None => Some(None),
        };
        let (base, top, target) = (named(&request.base)?, named(&request.top)?, self.target(disk));
        if request.direction == Direction::Up {
            return Some(self.virsh.block_pull(&target, base.as_deref()));
        }
        let ends = [
            (request.pivot, "--pivot"),
            (request.keep_overlay, "--keep-overlay"),
            (request.active, "--active"),
        ];
        let wanted = BlockCommit {
            base: base.as_deref(),
            top: top.as_deref(),
            shallow: request.shallow,
            end: ends.into_iter().find_map(|(given, option)| given.then_some(option)),
            bandwidth: Some(request.speed),
        };
        Some(self.virsh.block_commit(&target, &wanted))
    }

    fn snapshot(&self, overlays: &[(&str, &Path)]) -> Instead {
        let wanted: Vec<(String, PathBuf)> = overlays
            .iter()
            .map(|(disk, file)| {
                (self.target(disk), path::absolute(file).unwrap_or_else(|_| (*file).to_owned()))
            })
            .collect();
        let pairs: Vec<(&str, &Path)> =
            wanted.iter().map(|(disk, file)| (disk.as_str(), file.as_path())).collect();
        let is_other = |target: &&str| !wanted.iter().any(|(disk, _)| disk == target);
        match &self.domain {
            Some(domain) => {
                let targets = domain.disks.iter().map(|disk| disk.target.as_str());
                let others: Vec<&str> = targets.filter(is_other).collect();
                Instead::Command(self.virsh.snapshot(&pairs, &others))
            }
            None => Instead::SnapshotOfSome {
                snapshot: self.virsh.snapshot(&pairs, &[]),
                list: self.virsh.command("domblklist", &["--details"]),
                disks: wanted.into_iter().map(|(disk, _)| disk).collect(),
            },
        }
    }

    /// An encrypted image, and one that is not and would hold its data: what virsh does not ask about.
    fn plaintext(&self, asked: &Asked<'_>) -> Option<(PathBuf, PathBuf)> {
        match asked {
            Asked::Snapshot { overlays, allow_plaintext: false } => {
                overlays.iter().find_map(|(disk, file)| {
                    let (active, _) = self.chain(disk).into_iter().next().filter(|(_, secret)| *secret)?;
                    Some((active, (*file).to_owned()))
                })
            }
            Asked::Merge { disk, request } if !request.allow_plaintext => {
                let chain = self.chain(disk);
                let at = |layer: &Option<String>| {
                    let path = self.layer(disk, layer.as_ref()?)?;
                    chain.iter().position(|(file, _)| *file == path)
                };
                if request.direction == Direction::Up {
                    return into_plain(
                        chain.get(1..at(&request.base).unwrap_or(chain.len()))?,
                        chain.first()?,
                    );
                }
                let top = at(&request.top).unwrap_or(0);
                let bottom = if request.shallow { top + 1 } else { chain.len().saturating_sub(1) };
                let base = at(&request.base).unwrap_or(bottom);
                into_plain(chain.get(top..base)?, chain.get(base)?)
            }
            _ => None,
        }
    }

    /// The layers of a disk from the top, as far as they are known, each with whether it is encrypted.
    fn chain(&self, name: &str) -> Vec<(PathBuf, bool)> {
        if let Some(disk) = self.disk(name) {
            let layers = disk.layers().iter();
            return layers.map(|layer| (PathBuf::from(&layer.file), layer.encrypted)).collect();
        }
        let target = self.target(name);
        let disks = self.domain.as_ref().map_or(&[][..], |domain| &domain.disks);
        let images =
            disks.iter().find(|disk| disk.target == target).into_iter().flat_map(|disk| &disk.images);
        images.flatten().map(|image| (image.clone(), is_encrypted(image))).collect()
    }

    /// The disk as libvirt names it, from what the user or QEMU calls it.
    fn target(&self, name: &str) -> String {
        let Some(domain) = &self.domain else { return name.to_owned() };
        if domain.disks.iter().any(|disk| disk.target == name) {
            return name.to_owned();
        }
        let by_alias = domain.disks.iter().find(|disk| disk.alias.as_deref() == Some(name));
        let by_file = || {
            let active = Path::new(&self.disk(name)?.active().file).canonicalize().ok()?;
            let is_it = |image: &PathBuf| image.canonicalize().is_ok_and(|path| path == active);
            domain
                .disks
                .iter()
                .find(|disk| disk.images.first().is_some_and(|i| i.as_ref().is_some_and(is_it)))
        };
        by_alias.or_else(by_file).map_or_else(|| name.to_owned(), |disk| disk.target.clone())
    }

    fn disk(&self, name: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| [disk.name(), disk.active().node.as_str()].contains(&name))
    }

    /// The path of a layer that the user named; `None` where it is not known.
    fn layer(&self, disk: &str, layer: &str) -> Option<PathBuf> {
        if let Some(known) = self.disk(disk) {
            let file = PathBuf::from(&known.layer(layer).ok()?.file);
            return Some(file).filter(|file| file.is_absolute());
        }
        let Some((of, index)) = layer.strip_suffix(']').and_then(|name| name.rsplit_once('[')) else {
            let path = path::absolute(layer).ok()?;
            return (layer.contains('/') || path.exists()).then_some(path);
        };
        let target = self.target(disk);
        let disk = self.domain.as_ref()?.disks.iter().find(|disk| disk.target == target)?;
        recorded_layer(disk, index).filter(|_| of.is_empty() || of == target)
    }
}

/// The path of the layer with this index, which counts from the bottom: so the whole chain must be recorded.
pub(super) fn recorded_layer(disk: &DomainDisk, index: &str) -> Option<PathBuf> {
    let from_top = disk.images.len().checked_sub(index.parse().ok()?)?;
    disk.images.get(from_top)?.clone().filter(|_| disk.recorded == Recorded::Whole)
}

fn into_plain(from: &[(PathBuf, bool)], into: &(PathBuf, bool)) -> Option<(PathBuf, PathBuf)> {
    let (secret, _) = from.iter().find(|(_, is_encrypted)| *is_encrypted)?;
    (!into.1).then(|| (secret.clone(), into.0.clone()))
}

/// The domain that a process is, and whether it is one of a session.
fn of_process(process: u32) -> Option<(DomainName, bool)> {
    let arguments = fs::read(format!("/proc/{process}/cmdline")).ok()?;
    let text = String::from_utf8_lossy(&arguments);
    let words: Vec<&str> = text.split('\0').collect();
    Some((DomainName::Name(domain_of_arguments(&words)?), is_of_a_session(&text)))
}

/// Whether a path, or a command line with paths, is of a user's own libvirt, which keeps a folder more.
pub(super) fn is_of_a_session(text: &str) -> bool {
    text.contains("/libvirt/qemu/lib/domain-")
}
