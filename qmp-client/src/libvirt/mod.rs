//! libvirt's domains as its files tell of them, and the commands of virsh that do what this crate must not do behind its back.
//!
//! No daemon is asked: the definitions of domains lie in a folder, one XML file each.

mod after;
mod definitions;
mod domain;
mod encrypted;
mod images;
mod managed;
mod name;
mod naming;
#[cfg(test)]
mod tests;
mod virsh;

pub use after::{After, Fate};
pub use definitions::{Definitions, Folders, Mention};
pub use domain::{Domain, DomainDisk, Recorded};
pub use encrypted::is_encrypted;
pub use images::{ImageRole, Images, RunningDomain, running_domain};
pub use managed::{Asked, Instead, Managed};
pub use name::{DomainName, domain_of_arguments, domain_of_socket};
pub use naming::Naming;
pub use virsh::{BlockCommit, Virsh};
