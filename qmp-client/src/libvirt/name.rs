//! Which domain a QEMU is, without asking libvirt.

use std::path::Path;

/// libvirt cuts names of this length off in the names of its folders.
const CUT_AT: usize = 20;

/// How virsh can be told which domain is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainName {
    /// The name.
    Name(String),
    /// The number that the domain has as long as it runs, where the name is only known in part.
    Id(u32),
}

impl DomainName {
    /// The word for virsh.
    pub(crate) fn word(&self) -> String {
        match self {
            Self::Name(name) => name.clone(),
            Self::Id(id) => id.to_string(),
        }
    }
}

/// The domain whose monitor has this socket: libvirt keeps it in a folder `domain-ID-NAME`.
pub fn domain_of_socket(socket: &Path) -> Option<DomainName> {
    let folder = socket.parent()?.file_name()?.to_str()?;
    let (id, name) = folder.strip_prefix("domain-")?.split_once('-')?;
    let id = id.parse().ok()?;
    let is_whole = !name.is_empty() && name.chars().count() < CUT_AT;
    Some(if is_whole { DomainName::Name(name.to_owned()) } else { DomainName::Id(id) })
}

/// The domain that a QEMU was started for, from the words of its command line: `-name guest=NAME,…`.
pub fn domain_of_arguments(words: &[impl AsRef<str>]) -> Option<String> {
    let place = words.iter().position(|word| ["-name", "--name"].contains(&word.as_ref()))?;
    // Two commas are one of the name's; no argument of a process holds a zero byte.
    let value = words.get(place + 1)?.as_ref().replace(",,", "\0");
    let mut fields = value.split(',');
    let first = fields.clone().next().filter(|field| !field.contains('='));
    let name = fields.find_map(|field| field.strip_prefix("guest=")).or(first)?.replace('\0', ",");
    Some(name).filter(|name| !name.is_empty())
}
