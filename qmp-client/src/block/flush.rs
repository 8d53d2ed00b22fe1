//! Makes a node durable while a job waits at PENDING.
//!
//! QEMU relinks an overlay before it writes the tables of the image that has received the data. If it is killed
//! in between, the chain has lost the merged data, and a check finds no error. So that image is flushed first.

use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::block::ids::{FLUSH_ALONE as OWN, FLUSH_BESIDE as THEIRS, unique};
use crate::block::nbd;
use crate::block::version::exports_are_safe;
use crate::error::{Error, Result};
use crate::qmp::monitor::{Execute, Monitor};

/// How a node of this QEMU can be flushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Means {
    /// Through an NBD server that is started for the flush.
    OwnServer,
    /// Through the NBD server that QEMU runs already, at this socket.
    Server(PathBuf),
    /// By pausing the guest for a moment: QEMU flushes every node then.
    StopAndCont,
    /// By a command of QEMU's human monitor, which does not tell whether the flush has failed. It serves for a
    /// paused guest, and needs no NBD server.
    Command,
}

const TIMEOUT: Duration = Duration::from_secs(600);

impl Means {
    /// Finds the first means that works, by flushing `node` with it. The guest is not paused for that.
    ///
    /// # Errors
    /// [`Error::NotFlushed`] if there is none.
    pub(crate) fn find(monitor: &(impl Monitor + ?Sized), node: &str, server: Option<&Path>) -> Result<Self> {
        let exports = exports_are_safe(monitor)?;
        let mut why = Vec::new();
        let mut served = Vec::new();
        if exports {
            sweep(monitor)?;
            served.extend(server.map(|path| Self::Server(path.to_owned())));
            served.push(Self::OwnServer);
        } else {
            why.push("a QEMU before 9.0 with an iothread would end at an NBD export of it".to_owned());
        }
        for means in served {
            match means.flush(monitor, node) {
                Ok(()) => return Ok(means),
                Err(error @ Error::Disconnected { .. }) => return Err(error),
                Err(error) => why.push(error.to_string()),
            }
        }
        // Only a running guest can be paused; a storage daemon has none.
        match runs(monitor) {
            Ok(true) => return Ok(Self::StopAndCont),
            Ok(false) => match Self::Command.flush(monitor, node) {
                Ok(()) => return Ok(Self::Command),
                Err(error) => why.push(error.to_string()),
            },
            Err(error) => why.push(error.to_string()),
        }
        Err(Error::NotFlushed { node: node.to_owned(), why: why.join("; "), exports })
    }

    pub(crate) fn flush(&self, monitor: &(impl Monitor + ?Sized), node: &str) -> Result<()> {
        match self {
            Self::OwnServer => {
                let folder = tempfile::Builder::new().prefix("qmp-flush").tempdir().map_err(local(node))?;
                // A QEMU of another user must be able to make its socket there. Only root can give the folder
                // away; for others QEMU's refusal leads to the next means.
                if let Some(user) = monitor.peer().and_then(user_of) {
                    let _ = chown(folder.path(), Some(user), None);
                }
                let socket = folder.path().join("nbd.sock");
                let address = json!({"type": "unix", "data": {"path": socket}});
                monitor.query("nbd-server-start", json!({"addr": address, "max-connections": 1}))?;
                let flushed = flush_export(monitor, node, &socket, OWN);
                let stopped = monitor.query("nbd-server-stop", json!({}));
                flushed.and(stopped.map(drop))
            }
            Self::Server(socket) => flush_export(monitor, node, socket, THEIRS),
            // Somebody else has paused the guest meanwhile, and wants it to stay paused.
            Self::StopAndCont if !runs(monitor)? => Self::Command.flush(monitor, node),
            Self::StopAndCont => {
                monitor.query("stop", json!({}))?;
                monitor.query("cont", json!({})).map(drop)
            }
            Self::Command => {
                let line = json!({"command-line": format!("qemu-io {node} flush")});
                match monitor.query("human-monitor-command", line)?.as_str() {
                    Some("") => Ok(()),
                    said => {
                        let said = said.unwrap_or_default().trim();
                        Err(failed(node, format!("qemu-io said: {said}")))
                    }
                }
            }
        }
    }
}

/// Makes `node` durable by the first means that works.
///
/// # Errors
/// [`Error::NotFlushed`] if there is none; those of the flush.
pub(crate) fn flush(monitor: &(impl Monitor + ?Sized), node: &str, server: Option<&Path>) -> Result<()> {
    match Means::find(monitor, node, server)? {
        // For this means there was no trial: the flush itself shows whether it works.
        Means::OwnServer | Means::Server(_) | Means::Command => Ok(()),
        means @ Means::StopAndCont => means.flush(monitor, node),
    }
}

/// Whether a guest runs.
fn runs(monitor: &(impl Monitor + ?Sized)) -> Result<bool> {
    Ok(monitor.query("query-status", json!({}))?["running"] == true)
}

/// The user as whom a process acts now. A QEMU may have given up the rights with which it opened its monitor.
pub(crate) fn user_of(process: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    // The fields are the real, effective, saved and file system user ids.
    users.split_whitespace().nth(1)?.parse().ok()
}

fn flush_export(monitor: &(impl Monitor + ?Sized), node: &str, socket: &Path, prefix: &str) -> Result<()> {
    let id = format!("{prefix}{}", unique());
    let options = json!({"type": "nbd", "id": id, "node-name": node, "name": id, "writable": false});
    monitor.query("block-export-add", options)?;
    let flushed =
        UnixStream::connect(socket).and_then(|stream| nbd::flush(stream, &id, TIMEOUT)).map_err(local(node));
    match remove(monitor, &id) {
        // QEMU has gone, which is why the flush has failed.
        Err(gone @ Error::Disconnected { .. }) => Err(gone),
        removed => flushed.and(removed),
    }
}

/// Removes what a client that was killed during a flush has left: its export, and the server that it started.
/// They would stand in the way of the next flush.
fn sweep(monitor: &(impl Monitor + ?Sized)) -> Result<()> {
    let all = match monitor.query("query-block-exports", json!({})) {
        Ok(all) => all,
        // A QEMU that does not know the query cannot export anything either.
        Err(Error::Command { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    let nbd = all.as_array().into_iter().flatten().filter(|export| export["type"] == "nbd");
    let (left, others): (Vec<&str>, Vec<&str>) = nbd
        .filter_map(|export| export["id"].as_str())
        .partition(|id| [OWN, THEIRS].iter().any(|p| id.starts_with(p)));
    for id in &left {
        remove(monitor, id)?;
    }
    if others.is_empty() && left.iter().any(|id| id.starts_with(OWN)) {
        monitor.query("nbd-server-stop", json!({}))?;
    }
    Ok(())
}

/// Removes an export, and waits until it is gone. As long as it exists, it uses the node.
fn remove(monitor: &(impl Monitor + ?Sized), id: &str) -> Result<()> {
    monitor.query("block-export-del", json!({"id": id, "mode": "hard"}))?;
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let exports = monitor.query("query-block-exports", json!({}))?;
        if !exports.as_array().is_some_and(|all| all.iter().any(|export| export["id"] == id)) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(failed(id, "its export does not go away".into()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn local(node: &str) -> impl Fn(io::Error) -> Error {
    move |error| failed(node, format!("the flush through NBD failed: {error}"))
}

fn failed(node: &str, why: String) -> Error {
    Error::Flush { node: node.to_owned(), why }
}
