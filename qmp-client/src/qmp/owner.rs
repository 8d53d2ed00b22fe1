//! Monitors that belong to somebody: what manages the virtual machine must be asked, not gone around.

use std::fs;
use std::path::Path;

use crate::qmp::address::Address;

/// Software that manages virtual machines and keeps its own record of their disks. A merge behind its back
/// leaves that record wrong, and the next start may use an image that is no longer valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// libvirt.
    Libvirt,
    /// Proxmox VE.
    Proxmox,
    /// Incus or LXD.
    Incus,
}

impl Owner {
    /// Who the monitor at this address belongs to, by where its socket lies, and by the command line of the
    /// process at its other end, if that is known and may be read.
    pub fn of(address: &Address, peer: Option<u32>) -> Option<Self> {
        let by_place = match address {
            Address::Unix(path) => {
                Self::by_path(path).or_else(|| Self::by_path(&fs::canonicalize(path).unwrap_or_default()))
            }
            Address::Tcp { .. } => None,
        };
        let arguments = || fs::read(format!("/proc/{}/cmdline", peer?)).ok();
        by_place.or_else(|| Self::by_arguments(&arguments()?))
    }

    fn by_path(path: &Path) -> Option<Self> {
        let path = path.to_str()?;
        let below = |folders: &[&str]| folders.iter().any(|folder| path.starts_with(folder));
        if path.contains("/libvirt/qemu/") {
            Some(Self::Libvirt)
        } else if below(&["/run/qemu-server/", "/var/run/qemu-server/"]) {
            Some(Self::Proxmox)
        } else if below(&["/run/incus/", "/var/log/incus/", "/run/lxd/", "/var/log/lxd/", "/var/snap/lxd/"]) {
            Some(Self::Incus)
        } else {
            None
        }
    }

    /// Who started a process with this command line.
    pub(crate) fn of_command_line(words: &[String]) -> Option<Self> {
        Self::by_arguments(words.join("\0").as_bytes())
    }

    /// By the arguments of a process, each ended by a zero byte.
    fn by_arguments(arguments: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(arguments);
        let mut arguments = text.split('\0');
        if text.contains("\"id\":\"masterKey0\"") || text.contains("id=masterKey0") {
            Some(Self::Libvirt)
        } else if arguments.any(|a| a.contains("/run/qemu-server/")) {
            Some(Self::Proxmox)
        } else if text.contains("/run/incus/") || text.contains("/run/lxd/") {
            Some(Self::Incus)
        } else {
            None
        }
    }

    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Libvirt => "libvirt",
            Self::Proxmox => "Proxmox VE",
            Self::Incus => "Incus",
        }
    }

    /// The command of the owner that merges a disk's layers, with placeholders in capitals; for libvirt, the one that shows which
    /// domains there are, as [`crate::libvirt::Virsh`] has the commands for one of them.
    pub fn instead(self) -> &'static str {
        match self {
            Self::Libvirt => "virsh list --all",
            Self::Proxmox => "qm delsnapshot VMID SNAPSHOT",
            Self::Incus => "incus snapshot delete INSTANCE SNAPSHOT",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_managers_are_known_by_their_place() {
        for (path, owner) in [
            ("/var/lib/libvirt/qemu/domain-3-vm/monitor.sock", Some(Owner::Libvirt)),
            ("/home/u/.config/libvirt/qemu/lib/domain-1-vm/monitor.sock", Some(Owner::Libvirt)),
            ("/var/run/qemu-server/100.qmp", Some(Owner::Proxmox)),
            ("/run/incus/vm/qemu.monitor", Some(Owner::Incus)),
            ("/run/vm1/qmp.sock", None),
            ("/tmp/libvirt.sock", None),
        ] {
            assert_eq!(Owner::of(&Address::Unix(path.into()), None), owner, "{path}");
        }
    }

    #[test]
    fn a_link_to_a_managers_socket_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().join("libvirt/qemu/domain-1-vm");
        fs::create_dir_all(&real).unwrap();
        fs::write(real.join("monitor.sock"), "").unwrap();
        let link = folder.path().join("mine.sock");
        std::os::unix::fs::symlink(real.join("monitor.sock"), &link).unwrap();
        assert_eq!(Owner::of(&Address::Unix(link), None), Some(Owner::Libvirt));
    }

    #[test]
    fn a_process_of_a_manager_is_known_by_its_arguments() {
        let libvirt = b"qemu-system-x86_64\0-name\0guest=vm\0-object\0{\"qom-type\":\"secret\",\"id\":\"masterKey0\"}\0";
        assert_eq!(Owner::by_arguments(libvirt), Some(Owner::Libvirt));
        let proxmox =
            b"/usr/bin/kvm\0-id\x00100\0-chardev\0socket,id=qmp,path=/var/run/qemu-server/100.qmp\0";
        assert_eq!(Owner::by_arguments(proxmox), Some(Owner::Proxmox));
        assert_eq!(Owner::by_arguments(b"qemu-system-x86_64\0-name\0guest=vm\0"), None);
        let own = Address::Unix("/run/vm1/qmp.sock".into());
        assert_eq!(Owner::of(&own, Some(std::process::id())), None);
    }
}
