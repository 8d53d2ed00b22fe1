//! The connection to a monitor.

pub(crate) mod reader;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use qapi::qmp::QapiCapabilities;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::qmp::address::Address;
use crate::qmp::message::{Event, raw_request};
use crate::qmp::monitor::Monitor;
use reader::{Mailbox, Outcome};

/// How a connection is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// How long the greeting is waited for. A monitor serves one client: the second one can connect, but
    /// is not greeted before the first one leaves.
    pub greeting_timeout: Duration,
    /// How many bytes a line may have; the list of nodes of a long chain takes some hundred KiB.
    pub longest_line: usize,
    /// Whether TCP is allowed. Nothing protects such a monitor.
    pub allow_tcp: bool,
}

impl Default for Options {
    /// Three seconds for the greeting, lines of up to 16 MiB, no TCP.
    fn default() -> Self {
        Self { greeting_timeout: Duration::from_secs(3), longest_line: 16 << 20, allow_tcp: false }
    }
}

/// A connection to a QMP monitor, ready for commands.
///
/// Commands are numbered, and each reply is given to the command whose number it carries: one that comes
/// after its command's time was up is recognised and dropped. A thread reads what QEMU sends; it ends
/// with the connection.
pub struct Connection {
    greeting: Box<QapiCapabilities>,
    mailbox: Arc<Mailbox>,
    stream: Stream,
    /// Held while a line is written, so that lines do not mix.
    writing: Mutex<()>,
    next_id: AtomicU64,
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Connection {
    /// Connects, waits for the greeting, and leaves negotiation mode.
    ///
    /// # Errors
    /// [`Error::TcpNotAllowed`], [`Error::Connect`], [`Error::NoGreeting`], and those of the command
    /// `qmp_capabilities`.
    pub fn connect(address: &Address, options: &Options) -> Result<Self> {
        let stream = match address {
            Address::Unix(path) => connect_unix(path, options.greeting_timeout).map(Stream::Unix),
            Address::Tcp { .. } if !options.allow_tcp => {
                return Err(Error::TcpNotAllowed { address: address.to_string() });
            }
            Address::Tcp { host, port } => {
                connect_tcp(host, *port, options.greeting_timeout).map(Stream::Tcp)
            }
        };
        let stream = stream.map_err(|source| match source.kind() {
            // QEMU's queue of clients is full.
            io::ErrorKind::WouldBlock => {
                Error::NoGreeting { address: address.to_string(), waited: options.greeting_timeout }
            }
            _ => Error::Connect { address: address.to_string(), source },
        })?;
        Self::over(stream, &address.to_string(), options)
    }

    /// The same over a UNIX socket that is connected already. `name` stands for its address in messages.
    ///
    /// # Errors
    /// As [`Connection::connect`].
    pub fn over_stream(stream: UnixStream, name: &str, options: &Options) -> Result<Self> {
        Self::over(Stream::Unix(stream), name, options)
    }

    /// Connects again and again until it succeeds or `patience` is over, with growing pauses of 50 ms to
    /// 2 s: for a connection that was lost, where QEMU may be busy or another client may be leaving.
    ///
    /// No event of the time in between is repeated, so ask QEMU for the state of everything first.
    ///
    /// # Errors
    /// That of the last attempt.
    pub fn reconnect(address: &Address, options: &Options, patience: Duration) -> Result<Self> {
        let start = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            match Self::connect(address, options) {
                Ok(connection) => return Ok(connection),
                Err(error @ Error::TcpNotAllowed { .. }) => return Err(error),
                Err(error) if start.elapsed().saturating_add(pause) >= patience => return Err(error),
                Err(_) => thread::sleep(pause),
            }
            pause = (pause * 2).min(Duration::from_secs(2));
        }
    }

    fn over(stream: Stream, name: &str, options: &Options) -> Result<Self> {
        let failed = |source| Error::Connect { address: name.to_owned(), source };
        let mailbox = Arc::new(Mailbox::default());
        let (reading, filled) = (stream.try_clone().map_err(failed)?, Arc::clone(&mailbox));
        let longest_line = options.longest_line;
        thread::Builder::new()
            .name("qmp reader".into())
            .spawn(move || reader::read_lines(BufReader::new(reading), &filled, longest_line))
            .map_err(failed)?;
        let greeting = match mailbox.greeting(options.greeting_timeout) {
            Ok(greeting) => greeting,
            Err(closed) => {
                stream.shut_down();
                return Err(match closed {
                    Some(why) => Error::Disconnected { why },
                    None => Error::NoGreeting { address: name.to_owned(), waited: options.greeting_timeout },
                });
            }
        };
        let connection =
            Self { greeting, mailbox, stream, writing: Mutex::new(()), next_id: AtomicU64::new(1) };
        connection.execute_raw("qmp_capabilities", Value::Null, options.greeting_timeout)?;
        Ok(connection)
    }

    /// QEMU's version as major, minor and micro, from the greeting.
    pub fn version(&self) -> (i64, i64, i64) {
        let qemu = &self.greeting.QMP.version.qemu;
        (qemu.major, qemu.minor, qemu.micro)
    }

    /// The process that listens at the other end of a UNIX socket.
    pub fn peer(&self) -> Option<u32> {
        match &self.stream {
            Stream::Unix(stream) => {
                let credentials = sockopt::socket_peercred(stream).ok()?;
                u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()
            }
            Stream::Tcp(_) => None,
        }
    }

    fn write_line(&self, line: &str) -> io::Result<()> {
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        match &self.stream {
            Stream::Unix(stream) => (&mut &*stream).write_all(line.as_bytes()),
            Stream::Tcp(stream) => (&mut &*stream).write_all(line.as_bytes()),
        }
    }
}

/// Connects like the standard library, which would wait without end for a place in the queue of clients.
fn connect_unix(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // No time at all would mean no limit.
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(timeout.max(Duration::from_millis(1))))?;
    connect(&socket, &address)?;
    Ok(socket.into())
}

fn connect_tcp(host: &str, port: u16, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout.max(Duration::from_millis(1))) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl Monitor for Connection {
    fn execute_raw(&self, command: &str, arguments: Value, timeout: Duration) -> Result<Value> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        self.mailbox.expect(id);
        if let Err(error) = self.write_line(&raw_request(command, arguments, id)) {
            self.mailbox.forget(id);
            // Half a line may have gone out: nothing sent after it would be understood.
            self.mailbox.close(error.to_string());
            self.stream.shut_down();
            return Err(Error::Disconnected { why: error.to_string() });
        }
        match self.mailbox.outcome(id, timeout) {
            Ok(Outcome::Return(value)) => Ok(value),
            Ok(Outcome::Failure(failure)) => Err(Error::Command { command: command.to_owned(), failure }),
            Ok(Outcome::Unreadable(why)) => Err(Error::Unreadable { command: command.to_owned(), why }),
            Err(Some(why)) => Err(Error::Disconnected { why }),
            Err(None) => Err(Error::TimedOut { command: command.to_owned(), waited: timeout }),
        }
    }

    fn next_event(&self, timeout: Duration) -> Result<Option<Event>> {
        match self.mailbox.event(timeout) {
            Ok(event) => Ok(Some(event)),
            Err(None) => Ok(None),
            Err(Some(why)) => Err(Error::Disconnected { why }),
        }
    }

    fn peer(&self) -> Option<u32> {
        Self::peer(self)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.stream.shut_down();
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("version", &self.version()).finish_non_exhaustive()
    }
}

impl Stream {
    /// A write that QEMU does not take for this long is a failure: QEMU has stopped reading.
    const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

    fn try_clone(&self) -> io::Result<Box<dyn Read + Send>> {
        Ok(match self {
            Self::Unix(stream) => {
                stream.set_write_timeout(Some(Self::WRITE_TIMEOUT))?;
                Box::new(stream.try_clone()?)
            }
            Self::Tcp(stream) => {
                stream.set_write_timeout(Some(Self::WRITE_TIMEOUT))?;
                stream.set_nodelay(true)?;
                Box::new(stream.try_clone()?)
            }
        })
    }

    /// Ends both directions, and with them the reader; the other side may have done so before.
    fn shut_down(&self) {
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}
