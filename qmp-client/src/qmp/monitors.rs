//! Where the process that holds an image listens for commands, as its command line tells.

use std::fs;
use std::path::Path;

use qcow2::error::Holder;

use crate::qmp::address::Address;
use crate::qmp::owner::Owner;

/// The address of a QMP monitor of a process that holds an image, if its command line shows one that belongs to nobody else.
pub fn monitor_of(holder: &Holder) -> Option<Address> {
    let folder = fs::read_link(format!("/proc/{}/cwd", holder.pid)).ok();
    let address = match shown(&holder.command_line)? {
        Address::Unix(path) => Address::Unix(folder.unwrap_or_default().join(path)),
        tcp @ Address::Tcp { .. } => tcp,
    };
    Owner::of(&address, Some(holder.pid)).is_none().then_some(address)
}

/// Whether a process runs a virtual machine, as its program's name tells.
pub fn is_machine(holder: &Holder) -> bool {
    let name = holder.name.rsplit('/').next().unwrap_or_default();
    name.starts_with("qemu-system") || name == "kvm" || name == "qemu-kvm"
}

/// The first monitor on a command line, its path as it stands there.
fn shown(words: &[String]) -> Option<Address> {
    let options = options(words);
    options.iter().find_map(|(name, value)| match *name {
        "qmp" | "qmp-pretty" => device(value),
        "mon" | "monitor" => {
            let fields = fields(value);
            let field = |key: &str| fields.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
            // QEMU's -mon is for people unless it says otherwise; the storage daemon has only this one.
            let control = field("mode").map_or(*name == "monitor", |mode| mode == "control");
            let id = field("chardev").filter(|_| control)?;
            options.iter().filter(|(name, _)| *name == "chardev").find_map(|(_, value)| socket(value, id))
        }
        _ => None,
    })
}

/// Options with their values: `-name value`, `--name value`, `--name=value`.
fn options(words: &[String]) -> Vec<(&str, &str)> {
    let mut options = Vec::new();
    for (place, word) in words.iter().enumerate() {
        let Some(name) = word.strip_prefix('-') else { continue };
        let name = name.strip_prefix('-').unwrap_or(name);
        match (name.split_once('='), words.get(place + 1)) {
            (Some(pair), _) => options.push(pair),
            (None, Some(value)) => options.push((name, value)),
            (None, None) => {}
        }
    }
    options
}

/// `unix:PATH,server=on` and `tcp:HOST:PORT,server=on`, as after `-qmp`.
fn device(value: &str) -> Option<Address> {
    let address = fields(value).into_iter().next().map(|(_, v)| v)?;
    if address.starts_with("unix:") {
        return address.parse().ok();
    }
    // Without a host, QEMU listens on all of them.
    let tcp = address.strip_prefix("tcp:")?;
    let local = tcp.strip_prefix(':').map(|port| format!("localhost:{port}"));
    format!("tcp:{}", local.as_deref().unwrap_or(tcp)).parse().ok()
}

/// The socket of `-chardev socket,id=ID,path=PATH`.
fn socket(value: &str, id: &str) -> Option<Address> {
    let fields = fields(value);
    let field = |key: &str| fields.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
    let is_meant = fields.first().is_some_and(|(_, v)| v == "socket") && field("id").as_deref() == Some(id);
    if !is_meant {
        return None;
    }
    field("path").filter(|path| !path.is_empty()).map(|path| Address::Unix(Path::new(&path).to_owned()))
}

/// `key=value` fields between commas, of which a doubled one is itself; a first field without a key has the
/// key that monitors imply.
fn fields(value: &str) -> Vec<(String, String)> {
    // No argument of a process holds a zero byte.
    value
        .replace(",,", "\0")
        .split(',')
        .map(|field| field.replace('\0', ","))
        .map(|field| match field.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None => ("chardev".to_owned(), field),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(line: &str) -> Option<String> {
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        shown(&words).map(|address| address.to_string())
    }

    #[test]
    fn monitors_are_found_however_they_are_written() {
        for (line, address) in [
            ("qemu-system-x86_64 -qmp unix:/run/a.sock,server=on,wait=off", Some("/run/a.sock")),
            ("kvm --qmp unix:a,,b.sock,server", Some("a,b.sock")),
            ("kvm -qmp tcp:127.0.0.1:4444,server=on", Some("tcp:127.0.0.1:4444")),
            ("kvm -qmp-pretty tcp::4444,server", Some("tcp:localhost:4444")),
            (
                "kvm -chardev socket,id=q,path=/run/q.sock,server=on -mon chardev=q,mode=control",
                Some("/run/q.sock"),
            ),
            ("kvm -mon q,mode=control -chardev socket,path=/run/q.sock,id=q", Some("/run/q.sock")),
            ("qemu-storage-daemon --chardev socket,id=c0,path=s --monitor chardev=c0", Some("s")),
            ("qemu-storage-daemon --chardev=socket,id=c0,path=s --monitor=c0", Some("s")),
            // A monitor for people, one over standard output, one whose socket was passed open, none.
            ("kvm -chardev socket,id=q,path=/run/q.sock -mon chardev=q", None),
            ("kvm -monitor unix:/run/hmp.sock,server=on", None),
            ("kvm -qmp stdio", None),
            ("kvm -chardev socket,id=charmonitor,fd=31 -mon chardev=charmonitor,mode=control", None),
            ("kvm -chardev socket,id=other,path=/run/q.sock -mon chardev=q,mode=control", None),
            ("kvm -drive file=a.qcow2 -qmp", None),
        ] {
            assert_eq!(found(line).as_deref(), address, "{line}");
        }
    }

    #[test]
    fn a_managers_monitor_is_not_for_us() {
        let line = ["kvm", "-qmp", "unix:/var/run/qemu-server/100.qmp,server=on"].map(str::to_owned);
        assert_eq!(
            monitor_of(&Holder { pid: std::process::id(), name: "kvm".into(), command_line: line.to_vec() }),
            None
        );
    }
}
