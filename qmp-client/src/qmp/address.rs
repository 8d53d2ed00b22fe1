//! Where a monitor listens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::Error;

/// The address of a QMP monitor: a UNIX socket, or TCP only when asked for by name.
///
/// ```
/// use qmp_client::Address;
///
/// assert_eq!("/run/vm1/qmp.sock".parse::<Address>().unwrap(), Address::Unix("/run/vm1/qmp.sock".into()));
/// let tcp = "tcp:[::1]:4444".parse::<Address>().unwrap();
/// assert_eq!(tcp, Address::Tcp { host: "::1".into(), port: 4444 });
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// The path of a UNIX socket. Who may open it decides who may command QEMU.
    Unix(PathBuf),
    /// A TCP port. Nothing protects it: everybody who reaches it commands QEMU.
    Tcp {
        /// A host name, an IPv4 address, or an IPv6 address without its brackets.
        host: String,
        /// The port, not zero.
        port: u16,
    },
}

impl FromStr for Address {
    type Err = Error;

    /// Reads `PATH`, `unix:PATH` or `tcp:HOST:PORT`. A path that begins with one of the two words and a
    /// colon is written with `./` before it.
    ///
    /// # Errors
    /// An empty path or host, a port that is no number from 1 to 65535, and options behind a comma, as
    /// in QEMU's own `unix:PATH,server=on`: they are for the side that listens.
    fn from_str(address: &str) -> Result<Self, Error> {
        let bad = |why| Err(Error::Address { address: address.to_owned(), why });
        if let Some(rest) = address.strip_prefix("tcp:") {
            let Some((host, port)) = rest.rsplit_once(':') else { return bad("the port is missing") };
            let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
            if bare.is_none() && host.contains([':', '[', ']']) {
                return bad("an IPv6 address needs brackets");
            }
            let host = bare.unwrap_or(host);
            if host.is_empty() {
                return bad("the host is missing");
            }
            return match port.parse() {
                Ok(port) if port != 0 => Ok(Self::Tcp { host: host.to_owned(), port }),
                _ => bad("the port is no number from 1 to 65535"),
            };
        }
        let path = address.strip_prefix("unix:").unwrap_or(address);
        if path.is_empty() {
            return bad("the path is empty");
        }
        if path.contains(",server") {
            return bad("it holds options of the side that listens");
        }
        Ok(Self::Unix(path.into()))
    }
}

impl fmt::Display for Address {
    /// The form that [`FromStr`] reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => {
                let text = path.to_string_lossy();
                let dot = if text.starts_with("tcp:") || text.starts_with("unix:") { "./" } else { "" };
                write!(f, "{dot}{text}")
            }
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    #[test]
    fn paths_and_ports_are_told_apart() {
        for (text, address) in [
            ("/run/qmp.sock", Address::Unix("/run/qmp.sock".into())),
            ("qmp.sock", Address::Unix("qmp.sock".into())),
            ("unix:/run/qmp.sock", Address::Unix("/run/qmp.sock".into())),
            ("./tcp:odd", Address::Unix("./tcp:odd".into())),
            ("tcp:localhost:4444", tcp("localhost", 4444)),
            ("tcp:127.0.0.1:65535", tcp("127.0.0.1", 65535)),
            ("tcp:[::1]:1", tcp("::1", 1)),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), address, "{text}");
        }
    }

    #[test]
    fn what_is_displayed_is_read_again() {
        for text in ["/run/qmp.sock", "tcp:localhost:4444", "tcp:[::1]:1", "unix:tcp:odd", "./unix:odd"] {
            let address: Address = text.parse().unwrap();
            let again: Address = address.to_string().parse().unwrap();
            let same_file = |a: &Address| a.to_string().trim_start_matches("./").to_owned();
            assert_eq!(same_file(&again), same_file(&address), "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_form_that_is_expected() {
        for text in [
            "",
            "unix:",
            "tcp:",
            "tcp:localhost",
            "tcp::4444",
            "tcp:localhost:",
            "tcp:localhost:0",
            "tcp:localhost:65536",
            "tcp:localhost:http",
            "tcp:::1:4444",
            "tcp:[]:4444",
            "unix:/run/qmp.sock,server=on,wait=off",
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains("tcp:HOST:PORT") && error.contains(text), "{text}: {error}");
        }
    }
}
