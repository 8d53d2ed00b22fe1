//! Which domains of libvirt name the images of a merge, and what they boot afterwards.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use qcow2::error::Holder;
use qcow2::merge::{Afterwards, Plan, Settled};
use qmp_client::Owner;
use qmp_client::libvirt::{
    After, BlockCommit, Definitions, DomainDisk, DomainName, Fate, Mention, Recorded, Virsh,
    domain_of_arguments,
};
use serde_json::{Value, json};

use crate::call::Call;
use crate::cli::CommitArgs;
use crate::domains::{self, command};
use crate::hint::{Command, Hint, HintKind, Hints};
use crate::output::human::{printable, shell_word};
use crate::output::json::path;

/// The images of a plan, and what becomes of them.
pub(super) struct Images<'p> {
    files: Vec<&'p Path>,
    roles: Vec<&'static str>,
    fates: Vec<Fate>,
}

impl<'p> Images<'p> {
    pub(super) fn of(plan: &'p Plan, args: &CommitArgs) -> Self {
        let mut images = Self { files: Vec::new(), roles: Vec::new(), fates: Vec::new() };
        let active =
            if matches!(plan.afterwards, Afterwards::Delete { .. }) { Fate::Removed } else { Fate::Right };
        images.add(&plan.active, "active", active);
        if let Afterwards::Relink { overlay, .. } = &plan.afterwards {
            images.add(overlay, "overlay", Fate::Right);
        }
        for file in plan.obsolete.iter().chain(&plan.remains) {
            let keeps_data = plan.kept.iter().any(|kept| kept.path == *file);
            let stays = if keeps_data { Fate::Stale } else { Fate::Changes };
            images.add(file, "merged", if args.delete { Fate::Removed } else { stays });
        }
        for file in plan.restore_points_lost.iter().skip(1).chain([&plan.top]) {
            images.add(file, "merged", Fate::Changes);
        }
        images.add(&plan.base, "base", Fate::Changes);
        images
    }

    /// The images of a chain in which nothing is merged.
    pub(super) fn settled(settled: &'p Settled) -> Self {
        let mut images = Self { files: Vec::new(), roles: Vec::new(), fates: Vec::new() };
        images.add(&settled.active, "active", Fate::Right);
        for file in &settled.remains {
            images.add(file, "merged", Fate::Changes);
        }
        images.add(&settled.top, "merged", Fate::Changes);
        images.add(&settled.base, "base", Fate::Changes);
        images
    }

    fn add(&mut self, file: &'p Path, role: &'static str, fate: Fate) {
        if !self.files.contains(&file) {
            self.files.push(file);
            self.roles.push(role);
            self.fates.push(fate);
        }
    }
}

/// The fields of the plan in words: each a title and its text.
pub(super) fn text(definitions: &Definitions, images: &Images<'_>) -> Vec<(&'static str, String)> {
    let mentions = definitions.naming(&images.files);
    let mut fields: Vec<_> = mentions.iter().map(|mention| ("libvirt", told(mention, images))).collect();
    if let Some((file, why)) = definitions.unread.first() {
        let more = match definitions.unread.len() - 1 {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        fields.push((
            "not known",
            format!(
                "whether a domain of libvirt names these images, as this could not be read: {} ({}){more}",
                printable(&file.display().to_string()),
                printable(why)
            ),
        ));
    }
    fields
}

fn told(mention: &Mention<'_>, images: &Images<'_>) -> String {
    let (domain, disk) = (mention.domain, mention.disk);
    let mut named = mention.named().filter_map(|place| images.files.get(place));
    let show = |file: &Path| printable(&file.display().to_string());
    let first = named.next().map_or(String::new(), |file| show(file));
    let rest: Vec<String> = named.map(|file| show(file)).collect();
    let mut text =
        format!("the domain {} names {first} as {}", printable(&domain.name), printable(&disk.target));
    if !rest.is_empty() {
        text += &format!(", and records {}", rest.join(", "));
    }
    text += &format!(" ({})", show(&domain.definition));
    let list = |files: &[PathBuf]| files.iter().map(|file| show(file)).collect::<Vec<_>>().join(", ");
    let edit = command(&Virsh::of(domain).command("edit", &[]));
    let warning = match mention.after(&images.fates) {
        After::Right if disk.recorded == Recorded::ActiveOnly => return text,
        After::Right => "it boots the right disk afterwards, with the chain that it records".to_owned(),
        After::OtherDisk(file) => format!("afterwards {} shows it what the merged chain shows", show(&file)),
        After::Stale(files) => format!(
            "STALE: afterwards it would boot old data, as it records {}; take them out of its definition first: {edit}",
            list(&files)
        ),
        After::Missing(files) => format!(
            "afterwards it does not start until {} are taken out of its definition: {edit}",
            list(&files)
        ),
    };
    text + "\n" + &warning
}

/// The same for programs.
pub(super) fn json(definitions: &Definitions, images: &Images<'_>) -> (Value, Value) {
    let one = |mention: &Mention<'_>| {
        let named = mention.named().filter_map(|place| {
            Some(json!({ "file": path(images.files.get(place)?), "role": images.roles.get(place)? }))
        });
        let (after, files) = match mention.after(&images.fates) {
            After::Right => ("right", Vec::new()),
            After::OtherDisk(file) => ("other-disk", vec![file]),
            After::Stale(files) => ("stale", files),
            After::Missing(files) => ("missing-files", files),
        };
        json!({
            "domain": mention.domain.name,
            "definition": path(&mention.domain.definition),
            "disk": mention.disk.target,
            "images": named.collect::<Value>(),
            "records": match mention.disk.recorded {
                Recorded::ActiveOnly => "active-image",
                Recorded::Part => "part-of-chain",
                Recorded::Whole => "chain",
            },
            "afterwards": after,
            "files": files.iter().map(|file| path(file)).collect::<Value>(),
        })
    };
    let unread = definitions.unread.iter().map(|(file, why)| json!({ "file": path(file), "reason": why }));
    (definitions.naming(&images.files).iter().map(one).collect(), unread.collect())
}

/// What to do about an image that is in use and is a domain's: its name, and the commands. `None` if it is none's that runs.
pub(super) fn in_use(
    image: &Path,
    holders: &[Holder],
    args: &CommitArgs,
    call: &Call,
) -> Option<(String, Hints)> {
    let definitions = domains::read();
    let files = [args.active.as_path(), image];
    let mentions = definitions.naming(&files);
    let by_holder = holders.iter().find_map(|holder| {
        let is_libvirts = Owner::of_command_line(&holder.command_line) == Some(Owner::Libvirt);
        let is_of_a_session = holder.command_line.iter().any(|word| word.contains("/libvirt/qemu/lib/"));
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
        as_it_runs(&virsh, disk, mention.places.first() == Some(&Some(0)), args)
    });
    let live = live.map(|command| Hint::command(HintKind::LiveMerge, "merge it as it runs", command));
    let shut_down = command(&virsh.command("shutdown", &[]));
    let hints = Hints::default()
        .or(live)
        .or(Hint::command(HintKind::Virsh, "or shut it down", shut_down))
        .or(Hint::command(HintKind::Again, "when it has ended, again", call.again()));
    Some((name, hints))
}

/// The same merge, done by libvirt; `None` where a layer is meant whose path is not known.
fn as_it_runs(virsh: &Virsh, disk: &DomainDisk, is_active: bool, args: &CommitArgs) -> Option<Command> {
    let layer = |name: &Option<OsString>| match name {
        None => Some(None),
        Some(name) => of_layer(disk, name).map(Some),
    };
    let (base, top) = (layer(&args.base)?, layer(&args.top)?);
    let top = match top {
        None if !is_active => Some(std::path::absolute(&args.active).ok()?),
        top => top,
    };
    let wanted = BlockCommit {
        base: base.as_deref(),
        top: top.as_deref(),
        shallow: args.shallow,
        end: match (top.is_some(), args.keep_active) {
            (true, _) => None,
            (false, true) => Some("--keep-overlay"),
            (false, false) => Some("--pivot"),
        },
        bandwidth: None,
    };
    Some(command(&virsh.block_commit(&disk.target, &wanted)))
}

fn of_layer(disk: &DomainDisk, name: &OsStr) -> Option<PathBuf> {
    let bracket = name.to_str().and_then(|name| name.strip_suffix(']')?.rsplit_once('['));
    let Some((_, index)) = bracket.filter(|_| !Path::new(name).exists()) else {
        return std::path::absolute(name).ok();
    };
    // Indexes count from the bottom, so the whole chain must be known.
    let from_top = disk.images.len().checked_sub(index.parse().ok()?)?;
    disk.images.get(from_top)?.clone().filter(|_| disk.recorded == Recorded::Whole)
}

/// The domain that names an image which somebody else holds, as a remark.
pub(super) fn belongs_to(name: &str) -> String {
    format!("it is the disk of libvirt's domain {}", shell_word(&printable(name)))
}
