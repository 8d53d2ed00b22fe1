//! What manages a virtual machine is asked, not gone around.

use qmp_client::{Connection, Disk, Owner};

use super::trouble::Session;
use crate::cli::{LiveCommitArgs, LiveVerb};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::output::human::shell_word;

/// Refuses to change anything through a socket that lies where a manager has its own.
pub(super) fn place(session: &Session<'_>) -> Result<(), Failure> {
    refuse(session, Owner::of(session.address, None))
}

/// Refuses to change anything in a process that a manager started.
pub(super) fn process(session: &Session<'_>, monitor: &Connection) -> Result<(), Failure> {
    refuse(session, Owner::of(session.address, monitor.peer()))
}

/// Refuses to change a disk whose nodes a manager has named.
pub(super) fn disk(session: &Session<'_>, disk: &Disk) -> Result<(), Failure> {
    let by_libvirt = disk.layers().iter().any(|l| l.node.starts_with("libvirt-"));
    refuse(session, by_libvirt.then_some(Owner::Libvirt))
}

fn refuse(session: &Session<'_>, owner: Option<Owner>) -> Result<(), Failure> {
    let Some(owner) = owner.filter(|_| !session.verb.only_looks()) else { return Ok(()) };
    let name = owner.name();
    let message = format!(
        "{}: this monitor belongs to {name}, which would lose track of the disks; nothing was changed",
        session.address
    );
    let hint = instead(owner, session.verb);
    Err(Report { kind: "managed", message, hint: hint.into(), exit: Exit::REFUSED }.into())
}

/// What to type there, with placeholders in capitals.
fn instead(owner: Owner, verb: &LiveVerb) -> String {
    match (owner, verb) {
        (Owner::Libvirt, LiveVerb::Snapshot { overlays }) => {
            let specs = overlays.iter().map(|o| {
                let spec = format!("{},file={}", o.disk, o.file.display());
                format!(" --diskspec {}", shell_word(&spec))
            });
            format!("virsh snapshot-create-as DOMAIN --disk-only --atomic{}", specs.collect::<String>())
        }
        (Owner::Libvirt, LiveVerb::Commit(args)) => blockcommit(args),
        (Owner::Libvirt, LiveVerb::Pull(args)) => {
            let base = option("base", args.base.as_deref());
            format!("virsh blockpull DOMAIN {}{base} --wait --verbose", shell_word(&args.disk))
        }
        (Owner::Libvirt, LiveVerb::Pivot(args)) => format!("virsh blockjob DOMAIN {} --pivot", shell_word(&args.disk)),
        (Owner::Libvirt, LiveVerb::Cancel { disk }) => format!("virsh blockjob DOMAIN {disk} --abort"),
        (Owner::Libvirt, LiveVerb::Speed { disk, rate }) => {
            format!("virsh blockjob DOMAIN {disk} --bandwidth {rate} --bytes")
        }
        (Owner::Libvirt, _) => {
            "libvirt has no command for that; its jobs can be slowed: virsh blockjob DOMAIN DISK --bandwidth MIB".into()
        }
        (Owner::Proxmox | Owner::Incus, LiveVerb::Commit(_)) => owner.instead().into(),
        (Owner::Proxmox, LiveVerb::Snapshot { .. }) => "qm snapshot VMID NAME".into(),
        (Owner::Proxmox, LiveVerb::Cancel { .. }) => "pvesh delete /nodes/NODE/tasks/UPID".into(),
        (Owner::Proxmox, _) => "Proxmox VE has no command for that; its jobs are tasks: pvenode task list".into(),
        (Owner::Incus, LiveVerb::Snapshot { .. }) => "incus snapshot create INSTANCE NAME".into(),
        (Owner::Incus, LiveVerb::Cancel { .. }) => "incus operation delete OPERATION".into(),
        (Owner::Incus, _) => "Incus has no command for that; its jobs are operations: incus operation list".into(),
    }
}

fn blockcommit(args: &LiveCommitArgs) -> String {
    let layers = option("base", args.base.as_deref()) + &option("top", args.top.as_deref());
    let flags = [
        (args.shallow, " --shallow"),
        (args.active && !args.pivot && !args.keep_overlay, " --active"),
        (args.pivot, " --pivot"),
        (args.keep_overlay, " --keep-overlay"),
        (args.delete, " --delete"),
    ];
    let flags: String = flags.into_iter().filter_map(|(given, flag)| given.then_some(flag)).collect();
    format!("virsh blockcommit DOMAIN {}{layers}{flags} --wait --verbose", shell_word(&args.disk))
}

fn option(name: &str, value: Option<&str>) -> String {
    value.map_or(String::new(), |value| format!(" --{name} {}", shell_word(value)))
}

/// What shows the disks there.
pub(super) fn look_instead(owner: Owner) -> &'static str {
    match owner {
        Owner::Libvirt => "virsh domblklist DOMAIN",
        Owner::Proxmox => "qm config VMID",
        Owner::Incus => "incus config show --expanded INSTANCE",
    }
}
