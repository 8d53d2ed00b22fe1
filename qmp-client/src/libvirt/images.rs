//! Which domains name the images of a merge of a stopped machine, what becomes of each image, and how libvirt does the same merge.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use qcow2::error::Holder;
use qcow2::merge::{Afterwards, BaseChoice, CommitOptions, Plan, Settled};

use super::after::{After, Fate};
use super::definitions::{Definitions, Mention};
use super::domain::DomainDisk;
use super::managed::{is_of_a_session, recorded_layer};
use super::name::{DomainName, domain_of_arguments};
use super::virsh::{BlockCommit, Virsh};
use crate::qmp::owner::Owner;

/// What an image is in a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageRole {
    /// The chain's active image.
    Active,
    /// The overlay that gets another backing file.
    Overlay,
    /// It is merged.
    Merged,
    /// It takes the data.
    Base,
}

/// The images of a merge, and what becomes of them.
#[derive(Clone, Debug, Default)]
pub struct Images<'p> {
    files: Vec<&'p Path>,
    roles: Vec<ImageRole>,
    fates: Vec<Fate>,
}

impl<'p> Images<'p> {
    /// Those of a plan.
    pub fn of(plan: &'p Plan) -> Self {
        let mut images = Self::default();
        let active =
            if matches!(plan.afterwards, Afterwards::Delete { .. }) { Fate::Removed } else { Fate::Right };
        images.add(&plan.active, ImageRole::Active, active);
        if let Afterwards::Relink { overlay, .. } = &plan.afterwards {
            images.add(overlay, ImageRole::Overlay, Fate::Right);
        }
        for file in plan.obsolete.iter().chain(&plan.unremoved) {
            let keeps_data = plan.kept.iter().any(|kept| kept.path == *file);
            let stays = if keeps_data { Fate::Stale } else { Fate::Changes };
            images.add(file, ImageRole::Merged, if plan.removes { Fate::Removed } else { stays });
        }
        for file in plan.restore_points_lost.iter().skip(1).chain([&plan.top]) {
            images.add(file, ImageRole::Merged, Fate::Changes);
        }
        images.add(&plan.base, ImageRole::Base, Fate::Changes);
        images
    }

    /// The images of a chain in which nothing is merged.
    pub fn settled(settled: &'p Settled) -> Self {
        let mut images = Self::default();
        images.add(&settled.active, ImageRole::Active, Fate::Right);
        for file in &settled.unremoved {
            images.add(file, ImageRole::Merged, Fate::Changes);
        }
        images.add(&settled.top, ImageRole::Merged, Fate::Changes);
        images.add(&settled.base, ImageRole::Base, Fate::Changes);
        images
    }

    fn add(&mut self, file: &'p Path, role: ImageRole, fate: Fate) {
        if !self.files.contains(&file) {
            self.files.push(file);
            self.roles.push(role);
            self.fates.push(fate);
        }
    }

    /// The disks of domains whose definitions name any of them.
    pub fn named_in<'d>(&self, definitions: &'d Definitions) -> Vec<Mention<'d>> {
        definitions.naming(&self.files)
    }

    /// Which of them a mention names, from the top, each with what it is.
    pub fn of_mention(&self, mention: &Mention<'_>) -> Vec<(&'p Path, ImageRole)> {
        let at = |place| Some((*self.files.get(place)?, *self.roles.get(place)?));
        mention.named().filter_map(at).collect()
    }

    /// What the domain boots afterwards that keeps its definition.
    pub fn after(&self, mention: &Mention<'_>) -> After {
        mention.after(&self.fates)
    }
}

/// A domain that runs, and has an image open.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunningDomain {
    /// Its name.
    pub name: String,
    /// What does the same merge as it runs, where that can be told.
    pub merge: Option<Vec<String>>,
    /// What shuts it down.
    pub shut_down: Vec<String>,
}

/// The domain that has `image` open, which `holders` hold, and what to do about it; `None` if it is none's that runs. `active` is
/// what was to be merged, with these options.
pub fn running_domain(
    definitions: &Definitions,
    image: &Path,
    holders: &[Holder],
    active: &Path,
    options: &CommitOptions,
) -> Option<RunningDomain> {
    let files = [active, image];
    let mentions = definitions.naming(&files);
    let by_holder = holders.iter().find_map(|holder| {
        let is_libvirts = Owner::of_command_line(&holder.command_line) == Some(Owner::Libvirt);
        let is_of_a_session = holder.command_line.iter().any(|word| is_of_a_session(word));
        let name = domain_of_arguments(&holder.command_line).filter(|_| is_libvirts)?;
        Some((name, is_of_a_session))
    });
    let mention = mentions.iter().find(|m| match &by_holder {
        Some((name, _)) => m.domain.name == *name,
        None => definitions.runs(m.domain),
    });
    let (name, virsh) = match (mention, by_holder) {
        (Some(mention), _) => (mention.domain.name.clone(), Virsh::of(mention.domain)),
        // It runs, and its definition may not be read.
        (None, Some((name, is_of_a_session))) => {
            (name.clone(), Virsh::new(&DomainName::Name(name), is_of_a_session))
        }
        (None, None) => return None,
    };
    let live = mention.and_then(|mention| {
        // What runs is recorded down to its end; what is defined need not be.
        let running = definitions.domain(&mention.domain.name)?;
        let disk = running.disks.iter().find(|disk| disk.target == mention.disk.target)?;
        // The place of the named image decides whether the guest writes to it.
        let is_active = mention.places.first() == Some(&Some(0));
        as_it_runs(&virsh, disk, active, is_active, options)
    });
    Some(RunningDomain { name, merge: live, shut_down: virsh.command("shutdown", &[]) })
}

/// The same merge, done by libvirt; `None` where a layer is meant whose path is not known.
fn as_it_runs(
    virsh: &Virsh,
    disk: &DomainDisk,
    active: &Path,
    is_active: bool,
    options: &CommitOptions,
) -> Option<Vec<String>> {
    let layer = |name: Option<&OsString>| match name {
        None => Some(None),
        Some(name) => of_layer(disk, name).map(Some),
    };
    let base = match &options.base {
        BaseChoice::Named(name) => Some(name),
        _ => None,
    };
    let (base, top) = (layer(base)?, layer(options.top.as_ref())?);
    let top = match top {
        None if !is_active => Some(std::path::absolute(active).ok()?),
        top => top,
    };
    let wanted = BlockCommit {
        base: base.as_deref(),
        top: top.as_deref(),
        shallow: options.base == BaseChoice::Shallow,
        end: match (top.is_some(), options.keep_active) {
            (true, _) => None,
            (false, true) => Some("--keep-overlay"),
            (false, false) => Some("--pivot"),
        },
        bandwidth: None,
    };
    Some(virsh.block_commit(&disk.target, &wanted))
}

fn of_layer(disk: &DomainDisk, name: &OsStr) -> Option<PathBuf> {
    let bracket = name.to_str().and_then(|name| name.strip_suffix(']')?.rsplit_once('['));
    let Some((_, index)) = bracket.filter(|_| !Path::new(name).exists()) else {
        return std::path::absolute(name).ok();
    };
    recorded_layer(disk, index)
}
