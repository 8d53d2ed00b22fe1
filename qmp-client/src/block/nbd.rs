//! An NBD client that can do one thing: a flush.
//!
//! QMP has no command that flushes a node. A read-only export of the node has one: NBD's flush goes
//! through to the image file, its metadata included, and the guest does not stop. The protocol's numbers
//! are those of the NBD project's doc/proto.md.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The first word of every server: `NBDMAGIC`.
pub(crate) const GREETING: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const FIXED_NEWSTYLE: u16 = 1;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const HAS_FLAGS_AND_FLUSH: u16 = 1 | 4;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_FLUSH: u16 = 3;
/// The longest reply to an option that is accepted. QEMU's are much shorter.
const LONGEST_REPLY: u32 = 64 << 10;

/// Flushes the export of this name on the server at the other end of `stream`, which is then used up.
/// Each step is given `timeout`.
///
/// # Errors
/// Those of the stream; `InvalidData` if the server does not speak the protocol, or has no such export;
/// `Unsupported` if the export has no flush; the server's error, if the flush fails.
pub(crate) fn flush(stream: UnixStream, export: &str, timeout: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    talk(stream, export)
}

fn talk(mut stream: impl Read + Write, export: &str) -> io::Result<()> {
    if u64_of(&mut stream)? != GREETING || u64_of(&mut stream)? != OPTION_MAGIC {
        return Err(invalid("it is no NBD server of the new style"));
    }
    if u16_of(&mut stream)? & FIXED_NEWSTYLE == 0 {
        return Err(invalid("the NBD server is older than the fixed new style"));
    }
    let name = u32::try_from(export.len()).map_err(|_| invalid("the export's name is too long"))?;
    let length = name.checked_add(6).ok_or_else(|| invalid("the export's name is too long"))?;
    let mut hello = u32::from(FIXED_NEWSTYLE).to_be_bytes().to_vec();
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(OPTION_GO.to_be_bytes());
    hello.extend(length.to_be_bytes());
    hello.extend(name.to_be_bytes());
    hello.extend(export.as_bytes());
    hello.extend(0u16.to_be_bytes());
    stream.write_all(&hello)?;

    let mut can_flush = false;
    loop {
        if u64_of(&mut stream)? != OPTION_REPLY_MAGIC || u32_of(&mut stream)? != OPTION_GO {
            return Err(invalid("the NBD server's reply is none to the option sent"));
        }
        let kind = u32_of(&mut stream)?;
        let length = u32_of(&mut stream)?;
        if length > LONGEST_REPLY {
            return Err(invalid("the NBD server's reply is too long"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        match (kind, data.as_slice()) {
            (REPLY_ACK, _) => break,
            // A kind of information, the size in eight bytes, the flags in two.
            (REPLY_INFO, &[k0, k1, _, _, _, _, _, _, _, _, f0, f1]) => {
                if u16::from_be_bytes([k0, k1]) == INFO_EXPORT {
                    let flags = u16::from_be_bytes([f0, f1]);
                    can_flush = flags & HAS_FLAGS_AND_FLUSH == HAS_FLAGS_AND_FLUSH;
                }
            }
            (REPLY_INFO, _) => {}
            _ => return Err(invalid("the NBD server refuses the export")),
        }
    }
    if !can_flush {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the NBD export has no flush"));
    }

    let cookie = 1;
    stream.write_all(&request(COMMAND_FLUSH, cookie))?;
    if u32_of(&mut stream)? != REPLY_MAGIC {
        return Err(invalid("the NBD server's reply is none"));
    }
    let error = u32_of(&mut stream)?;
    if u64_of(&mut stream)? != cookie {
        return Err(invalid("the NBD server's reply is to another request"));
    }
    // The flush is done, so an error of the farewell does not matter.
    let _ = stream.write_all(&request(COMMAND_DISCONNECT, 0));
    match i32::try_from(error) {
        Ok(0) => Ok(()),
        // NBD's numbers are those of Linux.
        Ok(error) => Err(io::Error::from_raw_os_error(error)),
        Err(_) => Err(invalid("the flush failed without a number")),
    }
}

fn request(command: u16, cookie: u64) -> Vec<u8> {
    let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
    request.extend(0u16.to_be_bytes());
    request.extend(command.to_be_bytes());
    request.extend(cookie.to_be_bytes());
    request.extend([0; 12]);
    request
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn bytes<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn u16_of(stream: &mut impl Read) -> io::Result<u16> {
    bytes(stream).map(u16::from_be_bytes)
}

fn u32_of(stream: &mut impl Read) -> io::Result<u32> {
    bytes(stream).map(u32::from_be_bytes)
}

fn u64_of(stream: &mut impl Read) -> io::Result<u64> {
    bytes(stream).map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a server says, and what it was told.
    struct Script {
        says: io::Cursor<Vec<u8>>,
        told: Vec<u8>,
    }

    impl Read for Script {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.says.read(buffer)
        }
    }

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.told.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn server(flags: u16, error: u32) -> Vec<u8> {
        let mut says = [GREETING.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat();
        says.extend([0, 3]);
        let reply = |kind: u32, data: &[u8]| {
            let mut reply = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            for number in [OPTION_GO, kind, data.len() as u32] {
                reply.extend(number.to_be_bytes());
            }
            reply.extend(data);
            reply
        };
        let mut info = vec![0; 10];
        info.extend(flags.to_be_bytes());
        says.extend(reply(REPLY_INFO, &info));
        says.extend(reply(REPLY_ACK, &[]));
        says.extend(REPLY_MAGIC.to_be_bytes());
        says.extend(error.to_be_bytes());
        says.extend(1u64.to_be_bytes());
        says
    }

    fn told(says: Vec<u8>) -> (io::Result<()>, Vec<u8>) {
        let mut script = Script { says: io::Cursor::new(says), told: Vec::new() };
        (talk(&mut script, "base"), script.told)
    }

    #[test]
    fn a_flush_is_asked_for_and_its_answer_is_read() {
        let (result, told) = told(server(HAS_FLAGS_AND_FLUSH, 0));
        result.unwrap();
        let position = |what: &[u8]| told.windows(what.len()).position(|w| w == what).unwrap();
        assert!(position(b"base") < position(&request(COMMAND_FLUSH, 1)));
    }

    #[test]
    fn a_failed_flush_is_an_error() {
        assert_eq!(told(server(HAS_FLAGS_AND_FLUSH, 28)).0.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(told(server(HAS_FLAGS_AND_FLUSH, u32::MAX)).0.is_err());
    }

    #[test]
    fn an_export_without_flush_is_refused_before_it_is_asked() {
        assert_eq!(told(server(1, 0)).0.unwrap_err().kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    fn a_server_that_breaks_off_or_talks_nonsense_is_an_error() {
        let whole = server(HAS_FLAGS_AND_FLUSH, 0);
        for end in 0..whole.len() {
            assert!(told(whole[..end].to_vec()).0.is_err(), "cut after {end}");
        }
        // Not the server's flags beside the one looked at, and not the size and the unused flags of the export.
        for place in (0..16).chain(18..38).chain(60..80) {
            let mut broken = whole.clone();
            broken[place] ^= 0x80;
            assert!(told(broken).0.is_err(), "byte {place}");
        }
    }
}
