//! What to type where libvirt owns the machine: its own command for the same thing, with paths instead of indexes, because
//! libvirt numbers layers otherwise.

use std::fs;
use std::path::{self, Path, PathBuf};

use qmp_client::libvirt::{
    BlockCommit, Domain, DomainName, Recorded, Virsh, domain_of_arguments, domain_of_socket, is_encrypted,
};
use qmp_client::{Address, Disk};

use super::trouble::Session;
use crate::cli::{LiveCommitArgs, LiveVerb};
use crate::domains::{self, command};
use crate::hint::{Hint, HintKind};

/// What is known of a machine of libvirt's.
pub(super) struct Managed<'a> {
    virsh: Virsh,
    /// As its definition tells, where that may be read.
    domain: Option<Domain>,
    /// As QEMU tells, where it could be asked.
    disks: &'a [Disk],
}

impl<'a> Managed<'a> {
    /// Finds the domain by the process at the other end, by the monitor's place, or by its disks.
    pub(super) fn find(session: &Session<'_>, process: Option<u32>, disks: &'a [Disk]) -> Option<Self> {
        let definitions = domains::read();
        let by_process = process.and_then(of_process);
        let by_place = || match session.address {
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

    /// The command for this verb.
    pub(super) fn instead(&self, session: &Session<'_>) -> Hint {
        let (verb, virsh) = (session.verb, &self.virsh);
        if let Some((from, into)) = self.plaintext(verb) {
            let why = format!(
                "{} is encrypted, and {} would not be: what the guest wrote would lie there in plain text; if that is meant",
                from.display(),
                into.display()
            );
            return Hint::command(HintKind::AllowPlaintext, why, session.again_with(&["--allow-plaintext"]));
        }
        let target = |disk: &str| self.target(disk);
        let words = match verb {
            LiveVerb::Snapshot { overlays, .. } => return self.snapshot(overlays),
            LiveVerb::Commit(args) => match self.commit(args) {
                Some(words) => words,
                None => return self.name_by_path(),
            },
            LiveVerb::Pull(args) => {
                let base = args.base.as_ref().map(|base| self.layer(&args.disk, base));
                match base {
                    Some(None) => return self.name_by_path(),
                    base => virsh.block_pull(&target(&args.disk), base.flatten().as_deref()),
                }
            }
            LiveVerb::Pivot(args) => virsh.command("blockjob", &[&target(&args.disk), "--pivot"]),
            LiveVerb::Cancel { disk, .. } => virsh.command("blockjob", &[&target(disk), "--abort"]),
            LiveVerb::Speed { disk, rate } => {
                let rate = rate.to_string();
                virsh.command("blockjob", &[&target(disk), "--bandwidth", &rate, "--bytes"])
            }
            LiveVerb::Finish(args) => return self.no_command(&args.disk),
            LiveVerb::Pause { disk } | LiveVerb::Resume { disk } => return self.no_command(disk),
            LiveVerb::List | LiveVerb::Chain { .. } | LiveVerb::Jobs | LiveVerb::Recover(_) => {
                return self.look(verb);
            }
        };
        hint("", &words)
    }

    /// The command that shows what this verb would.
    pub(super) fn look(&self, verb: &LiveVerb) -> Hint {
        let shows = if matches!(verb, LiveVerb::List | LiveVerb::Jobs) { "domblklist" } else { "dumpxml" };
        hint("", &self.virsh.command(shows, &[]))
    }

    fn no_command(&self, disk: &str) -> Hint {
        let slow = self.virsh.command("blockjob", &[&self.target(disk), "--bandwidth", "1"]);
        hint("libvirt has no command for that; its jobs can be slowed", &slow)
    }

    fn name_by_path(&self) -> Hint {
        let why = "libvirt numbers the layers otherwise; name them by their paths, which this shows";
        hint(why, &self.virsh.command("dumpxml", &[]))
    }

    fn commit(&self, args: &LiveCommitArgs) -> Option<Vec<String>> {
        let named = |layer: &Option<String>| match layer {
            Some(layer) => self.layer(&args.disk, layer).map(Some),
            None => Some(None),
        };
        let (base, top) = (named(&args.base)?, named(&args.top)?);
        let ends =
            [(args.pivot, "--pivot"), (args.keep_overlay, "--keep-overlay"), (args.active, "--active")];
        let wanted = BlockCommit {
            base: base.as_deref(),
            top: top.as_deref(),
            shallow: args.shallow,
            end: ends.into_iter().find_map(|(given, option)| given.then_some(option)),
            bandwidth: args.job.bandwidth,
        };
        Some(self.virsh.block_commit(&self.target(&args.disk), &wanted))
    }

    fn snapshot(&self, overlays: &[crate::cli::Overlay]) -> Hint {
        let wanted: Vec<(String, PathBuf)> = overlays
            .iter()
            .map(|o| (self.target(&o.disk), path::absolute(&o.file).unwrap_or_else(|_| o.file.clone())))
            .collect();
        let pairs: Vec<(&str, &Path)> =
            wanted.iter().map(|(disk, file)| (disk.as_str(), file.as_path())).collect();
        let is_other = |target: &&str| !wanted.iter().any(|(disk, _)| disk == target);
        match &self.domain {
            Some(domain) => {
                let targets = domain.disks.iter().map(|disk| disk.target.as_str());
                let others: Vec<&str> = targets.filter(is_other).collect();
                hint("", &self.virsh.snapshot(&pairs, &others))
            }
            // Which other disks there are is then asked as it is typed.
            None => {
                let list = command(&self.virsh.command("domblklist", &["--details"]));
                let other =
                    wanted.iter().map(|(disk, _)| format!(" && $3 != \"{disk}\"")).collect::<String>();
                let specs = format!(
                    r#"$({list} | awk '$2 == "disk"{other} {{print "--diskspec " $3 ",snapshot=no"}}')"#
                );
                Hint::advice(format!("{} {specs}", command(&self.virsh.snapshot(&pairs, &[]))))
            }
        }
    }

    /// An encrypted image, and one that is not and would hold its data: what virsh does not ask about.
    fn plaintext(&self, verb: &LiveVerb) -> Option<(PathBuf, PathBuf)> {
        match verb {
            LiveVerb::Snapshot { overlays, allow_plaintext: false } => overlays.iter().find_map(|overlay| {
                let (active, _) =
                    self.chain(&overlay.disk).into_iter().next().filter(|(_, secret)| *secret)?;
                Some((active, overlay.file.clone()))
            }),
            LiveVerb::Commit(args) if !args.allow_plaintext => {
                let chain = self.chain(&args.disk);
                let at = |layer: &Option<String>| {
                    let path = self.layer(&args.disk, layer.as_ref()?)?;
                    chain.iter().position(|(file, _)| *file == path)
                };
                let top = at(&args.top).unwrap_or(0);
                let bottom = if args.shallow { top + 1 } else { chain.len().saturating_sub(1) };
                let base = at(&args.base).unwrap_or(bottom);
                into_plain(chain.get(top..base)?, chain.get(base)?)
            }
            LiveVerb::Pull(args) if !args.allow_plaintext => {
                let chain = self.chain(&args.disk);
                let base = args.base.as_ref().and_then(|base| self.layer(&args.disk, base));
                let end = base.and_then(|base| chain.iter().position(|(file, _)| *file == base));
                into_plain(chain.get(1..end.unwrap_or(chain.len()))?, chain.first()?)
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
        let is_this = of.is_empty() || of == target;
        let from_top = disk.images.len().checked_sub(index.parse().ok()?)?;
        let is_known = is_this && disk.recorded == Recorded::Whole;
        disk.images.get(from_top)?.clone().filter(|_| is_known)
    }
}

fn into_plain(from: &[(PathBuf, bool)], into: &(PathBuf, bool)) -> Option<(PathBuf, PathBuf)> {
    let (secret, _) = from.iter().find(|(_, is_encrypted)| *is_encrypted)?;
    (!into.1).then(|| (secret.clone(), into.0.clone()))
}

fn hint(why: &str, words: &[String]) -> Hint {
    Hint::command(HintKind::Virsh, why, command(words))
}

/// The domain that a process is, and whether it is one of a session.
fn of_process(process: u32) -> Option<(DomainName, bool)> {
    let arguments = fs::read(format!("/proc/{process}/cmdline")).ok()?;
    let text = String::from_utf8_lossy(&arguments);
    let words: Vec<&str> = text.split('\0').collect();
    Some((DomainName::Name(domain_of_arguments(&words)?), is_of_a_session(&text)))
}

/// Whether a path, or a command line with paths, is of a user's own libvirt, which keeps a folder more.
fn is_of_a_session(text: &str) -> bool {
    text.contains("/libvirt/qemu/lib/domain-")
}
