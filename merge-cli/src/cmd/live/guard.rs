//! Refuses to change a virtual machine behind the back of its manager (libvirt, for example).

use std::slice;

use qmp_client::libvirt::{Asked, Instead, Managed};
use qmp_client::{Connection, Disk, Graph, Machine, Owner, Request};

use super::trouble::Session;
use crate::cli::LiveVerb;
use crate::domains::{self, command};
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
    // The disks are needed to turn the user's layer numbers into paths.
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
        Owner::Libvirt => instead_of_libvirt(session, process, disks),
        other => Hint::advice(instead(other, session.verb)),
    };
    Err(Report { kind: "managed", message, hint: hint.into(), exit: Exit::REFUSED }.into())
}

/// What to type where it is not known which domain is meant.
fn list_domains() -> Hint {
    Hint::command(HintKind::Virsh, "see which domain it is", Command::of("virsh").word("list").word("--all"))
}

fn instead_of_libvirt(session: &Session<'_>, process: Option<u32>, disks: &[Disk]) -> Hint {
    let virsh = |why: &str, words: &[String]| Hint::command(HintKind::Virsh, why, command(words));
    let machine = Managed::find(&domains::read(), session.address, process, disks);
    let Some(machine) = machine else { return list_domains() };
    let request = match session.verb {
        LiveVerb::Commit(args) => args.request(),
        LiveVerb::Pull(args) => args.request(),
        _ => Request::default(),
    };
    match machine.instead(&asked(session.verb, &request)) {
        Instead::Command(words) => virsh("", &words),
        Instead::Plaintext { from, into } => {
            let why = format!(
                "{} is encrypted, and {} would not be: what the guest wrote would lie there in plain text; if that is meant",
                from.display(),
                into.display()
            );
            Hint::command(HintKind::AllowPlaintext, why, session.again_with(&["--allow-plaintext"]))
        }
        Instead::NameByPath(words) => {
            virsh("libvirt numbers the layers otherwise; name them by their paths, which this shows", &words)
        }
        Instead::OnlySlower(words) => {
            virsh("libvirt has no command for that; its jobs can be slowed", &words)
        }
        Instead::SnapshotOfSome { snapshot, list, disks } => {
            // The command itself asks for the other disks when it is typed.
            let other = disks.iter().map(|disk| format!(" && $3 != \"{disk}\"")).collect::<String>();
            let (snapshot, list) = (command(&snapshot), command(&list));
            Hint::advice(format!(
                r#"{snapshot} $({list} | awk '$2 == "disk"{other} {{print "--diskspec " $3 ",snapshot=no"}}')"#
            ))
        }
        _ => list_domains(),
    }
}

fn asked<'a>(verb: &'a LiveVerb, request: &'a Request) -> Asked<'a> {
    match verb {
        LiveVerb::Snapshot { overlays, allow_plaintext } => {
            let overlays = overlays.iter().map(|o| (o.disk.as_str(), o.file.as_path())).collect();
            Asked::Snapshot { overlays, allow_plaintext: *allow_plaintext }
        }
        LiveVerb::Commit(args) => Asked::Merge { disk: &args.disk, request },
        LiveVerb::Pull(args) => Asked::Merge { disk: &args.disk, request },
        LiveVerb::Pivot(args) => Asked::Pivot(&args.disk),
        LiveVerb::Cancel { disk, .. } => Asked::Cancel(disk),
        LiveVerb::Speed { disk, rate } => Asked::Speed { disk, rate: *rate },
        LiveVerb::Finish(args) => Asked::Steer(&args.disk),
        LiveVerb::Pause { disk } | LiveVerb::Resume { disk } => Asked::Steer(disk),
        LiveVerb::List | LiveVerb::Jobs => Asked::Disks,
        LiveVerb::Chain { .. } | LiveVerb::Recover(_) => Asked::Layers,
    }
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
            let machine = Managed::find(&domains::read(), session.address, None, &[]);
            let shows = |machine: Managed<'_>| machine.look(&asked(session.verb, &Request::default()));
            let hint = |words: Vec<String>| Hint::command(HintKind::Virsh, "", command(&words));
            machine.map(shows).map_or_else(list_domains, hint)
        }
        Owner::Proxmox => Hint::advice("qm config VMID"),
        Owner::Incus => Hint::advice("incus config show --expanded INSTANCE"),
    }
}
