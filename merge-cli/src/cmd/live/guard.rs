//! What manages a virtual machine is asked, not gone around.

use std::slice;

use qmp_client::{Connection, Disk, Graph, Machine, Owner};

use super::managed::Managed;
use super::trouble::Session;
use crate::cli::LiveVerb;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind};

/// Refuses to change anything through a socket that lies where a manager has its own.
pub(super) fn place(session: &Session<'_>) -> Result<(), Failure> {
    refuse(session, Owner::of(session.address, None), None, &[])
}

/// Refuses to change anything in a process that a manager started.
pub(super) fn process(session: &Session<'_>, monitor: &Connection) -> Result<(), Failure> {
    let owner = Owner::of(session.address, monitor.peer());
    if owner.is_none() || session.verb.only_looks() {
        return Ok(());
    }
    // Its disks tell what the layers are called that the user has named by their numbers.
    let machine = Machine::look(monitor, session.address).ok();
    let disks = machine.as_ref().map_or(&[][..], |machine| Graph::disks(machine.graph()));
    refuse(session, owner, monitor.peer(), disks)
}

/// Refuses to change a disk whose nodes a manager has named.
pub(super) fn disk(session: &Session<'_>, disk: &Disk) -> Result<(), Failure> {
    let by_libvirt = disk.layers().iter().any(|l| l.node.starts_with("libvirt-"));
    refuse(session, by_libvirt.then_some(Owner::Libvirt), None, slice::from_ref(disk))
}

fn refuse(
    session: &Session<'_>,
    owner: Option<Owner>,
    process: Option<u32>,
    disks: &[Disk],
) -> Result<(), Failure> {
    let Some(owner) = owner.filter(|_| !session.verb.only_looks()) else { return Ok(()) };
    let name = owner.name();
    let message = format!(
        "{}: this monitor belongs to {name}, which would lose track of the disks; nothing was changed",
        session.address
    );
    let hint = match owner {
        Owner::Libvirt => Managed::find(session, process, disks)
            .map_or_else(list_domains, |machine| machine.instead(session)),
        other => Hint::advice(instead(other, session.verb)),
    };
    Err(Report { kind: "managed", message, hint: hint.into(), exit: Exit::REFUSED }.into())
}

/// What to type where it is not known which domain is meant.
fn list_domains() -> Hint {
    Hint::command(HintKind::Virsh, "see which domain it is", Command::of("virsh").word("list").word("--all"))
}

/// What to type there, with placeholders in capitals.
fn instead(owner: Owner, verb: &LiveVerb) -> String {
    match (owner, verb) {
        (Owner::Libvirt, _) | (_, LiveVerb::Commit(_)) => owner.instead().into(),
        (Owner::Proxmox, LiveVerb::Snapshot { .. }) => "qm snapshot VMID NAME".into(),
        (Owner::Proxmox, LiveVerb::Cancel { .. }) => "pvesh delete /nodes/NODE/tasks/UPID".into(),
        (Owner::Proxmox, _) => {
            "Proxmox VE has no command for that; its jobs are tasks: pvenode task list".into()
        }
        (Owner::Incus, LiveVerb::Snapshot { .. }) => "incus snapshot create INSTANCE NAME".into(),
        (Owner::Incus, LiveVerb::Cancel { .. }) => "incus operation delete OPERATION".into(),
        (Owner::Incus, _) => {
            "Incus has no command for that; its jobs are operations: incus operation list".into()
        }
    }
}

/// What shows the same there.
pub(super) fn look_instead(session: &Session<'_>, owner: Owner) -> Hint {
    match owner {
        Owner::Libvirt => {
            Managed::find(session, None, &[]).map_or_else(list_domains, |machine| machine.look(session.verb))
        }
        Owner::Proxmox => Hint::advice("qm config VMID"),
        Owner::Incus => Hint::advice("incus config show --expanded INSTANCE"),
    }
}
