//! Commands of virsh, as words that are still to be quoted for a shell.

use std::path::Path;

use super::domain::Domain;
use super::name::DomainName;

/// virsh for one domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Virsh {
    connection: &'static str,
    domain: String,
}

/// What `virsh blockcommit` is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockCommit<'a> {
    /// The layer that takes the data; the bottom of the chain without it.
    pub base: Option<&'a Path>,
    /// The uppermost layer that is merged; the active one without it.
    pub top: Option<&'a Path>,
    /// Whether base is top's own backing file.
    pub shallow: bool,
    /// What becomes of the active layer: `--active`, `--pivot` or `--keep-overlay`.
    pub end: Option<&'static str>,
    /// Bytes per second.
    pub bandwidth: Option<u64>,
}

impl Virsh {
    /// For the domain of this name.
    pub(crate) fn new(domain: &DomainName, is_of_a_session: bool) -> Self {
        Self { connection: connection(is_of_a_session), domain: domain.word() }
    }

    /// For this domain.
    pub fn of(domain: &Domain) -> Self {
        Self { connection: connection(domain.is_of_a_session), domain: domain.name.clone() }
    }

    /// The domain, as virsh is told of it.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// `virsh COMMAND DOMAIN MORE`.
    pub fn command(&self, command: &str, more: &[&str]) -> Vec<String> {
        // What virsh takes for its default depends on the user.
        let words = ["virsh", "-c", self.connection, command, &self.domain];
        words.iter().chain(more).map(|&word| word.to_owned()).collect()
    }

    /// Layers merged down.
    pub(crate) fn block_commit(&self, target: &str, wanted: &BlockCommit<'_>) -> Vec<String> {
        let mut words = self.command("blockcommit", &[target]);
        for (option, layer) in [("--base", wanted.base), ("--top", wanted.top)] {
            words.extend(layer.into_iter().flat_map(|path| [option.to_owned(), path.display().to_string()]));
        }
        words.extend(wanted.shallow.then(|| "--shallow".to_owned()));
        words.extend(wanted.end.map(str::to_owned));
        if let Some(bytes) = wanted.bandwidth.filter(|bytes| *bytes > 0) {
            words.extend(["--bandwidth".to_owned(), bytes.to_string(), "--bytes".to_owned()]);
        }
        words.extend(["--wait", "--verbose"].map(str::to_owned));
        words
    }

    /// Layers merged up.
    pub(crate) fn block_pull(&self, target: &str, base: Option<&Path>) -> Vec<String> {
        let mut words = self.command("blockpull", &[target]);
        words.extend(base.into_iter().flat_map(|path| ["--base".to_owned(), path.display().to_string()]));
        words.extend(["--wait", "--verbose"].map(str::to_owned));
        words
    }

    /// New overlays on these disks, with absolute paths, and on no `others`. No record of a snapshot is made: a merge would leave it
    /// dangling.
    pub(crate) fn snapshot(&self, overlays: &[(&str, &Path)], others: &[&str]) -> Vec<String> {
        let mut words = self.command("snapshot-create-as", &["--no-metadata", "--disk-only", "--atomic"]);
        // virsh splits the value at commas.
        let of = |(target, file): &(&str, &Path)| {
            format!("{target},file={}", file.display().to_string().replace(',', ",,"))
        };
        let left_out = others.iter().map(|target| format!("{target},snapshot=no"));
        for spec in overlays.iter().map(of).chain(left_out) {
            words.extend(["--diskspec".to_owned(), spec]);
        }
        words
    }
}

fn connection(is_of_a_session: bool) -> &'static str {
    if is_of_a_session { "qemu:///session" } else { "qemu:///system" }
}
