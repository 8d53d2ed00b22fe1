//! Which domains name the images of a merge, and what they boot afterwards, for programs.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::after::After;
use super::definitions::{Definitions, Mention};
use super::domain::Recorded;
use super::images::{ImageRole, Images};
use crate::serial;

/// What libvirt's files say about the images of a merge.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Naming<'a> {
    libvirt: Vec<NamingDisk<'a>>,
    #[serde(serialize_with = "serial::reasons")]
    libvirt_unread: &'a [(PathBuf, String)],
}

/// A disk of a domain that names some.
#[derive(Debug, Serialize)]
struct NamingDisk<'a> {
    domain: &'a str,
    #[serde(serialize_with = "serial::name")]
    definition: &'a Path,
    disk: &'a str,
    images: Vec<NamedImage<'a>>,
    records: &'static str,
    afterwards: &'static str,
    #[serde(serialize_with = "serial::names")]
    files: Vec<PathBuf>,
}

#[derive(Debug, Serialize)]
struct NamedImage<'a> {
    #[serde(serialize_with = "serial::name")]
    file: &'a Path,
    role: &'static str,
}

impl<'a> Naming<'a> {
    /// What is said about these images.
    pub fn of(images: &Images<'a>, definitions: &'a Definitions) -> Self {
        let disks = images.named_in(definitions);
        let libvirt = disks.iter().map(|mention| NamingDisk::of(images, mention)).collect();
        Self { libvirt, libvirt_unread: &definitions.unread }
    }
}

impl<'a> NamingDisk<'a> {
    fn of(images: &Images<'a>, mention: &Mention<'a>) -> Self {
        let named = images.of_mention(mention).into_iter();
        let (afterwards, files) = match images.after(mention) {
            After::Right => ("right", Vec::new()),
            After::OtherDisk(file) => ("other-disk", vec![file]),
            After::Stale(files) => ("stale", files),
            After::Missing(files) => ("missing-files", files),
        };
        Self {
            domain: &mention.domain.name,
            definition: &mention.domain.definition,
            disk: &mention.disk.target,
            images: named.map(|(file, role)| NamedImage { file, role: self::role(role) }).collect(),
            records: match mention.disk.recorded {
                Recorded::ActiveOnly => "active-image",
                Recorded::Part => "part-of-chain",
                Recorded::Whole => "chain",
            },
            afterwards,
            files,
        }
    }
}

fn role(role: ImageRole) -> &'static str {
    match role {
        ImageRole::Active => "active",
        ImageRole::Overlay => "overlay",
        ImageRole::Merged => "merged",
        ImageRole::Base => "base",
    }
}
