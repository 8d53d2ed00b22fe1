//! The names of our jobs, nodes and exports, by which they can be recognised later.

use std::collections::hash_map::RandomState;
use std::fmt::Write as _;
use std::hash::BuildHasher;

/// How the ids of merge jobs begin: one for data that moves down, one for up.
pub(crate) const MERGES: [&str; 2] = ["merge", "pull"];

/// How the ids of exports for a flush begin, on a server that was started for the flush.
pub(crate) const FLUSH_ALONE: &str = "flush-alone-";
/// The same, on a server that runs anyway.
pub(crate) const FLUSH_BESIDE: &str = "flush-beside-";

/// Eight random hexadecimal digits. If they ever make a name that is in use, QEMU refuses it.
pub(crate) fn unique() -> String {
    // The standard library's only source of randomness.
    let bits = RandomState::new().hash_one(std::process::id());
    format!("{:08x}", bits & 0xffff_ffff)
}

/// How the ids of all jobs of this kind on this disk begin, and of no other disk.
pub(crate) fn job_prefix(kind: &str, disk: &str) -> String {
    format!("{kind}.{}.", escaped(disk))
}

/// Whether a job's id has the form of those that merges of this library get.
pub(crate) fn is_of_merge(id: &str) -> bool {
    let unique = |end: &str| end.len() == 8 && end.bytes().all(|byte| byte.is_ascii_hexdigit());
    let mut parts = id.split('.');
    let kind = parts.next().is_some_and(|kind| MERGES.contains(&kind));
    let disk = parts.next().is_some_and(|disk| unescaped(disk).is_some());
    let mut index = || parts.next().is_some_and(|index| index.parse::<usize>().is_ok());
    let span = index() && index();
    kind && disk && span && parts.next().is_some_and(unique) && parts.next().is_none()
}

/// Any text in the characters that an id may have. Each other byte becomes `_` and two hexadecimal digits.
pub(crate) fn escaped(text: &str) -> String {
    let mut written = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' {
            written.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(written, "_{byte:02x}");
        }
    }
    written
}

/// The text from which [`escaped`] made this one; `None` if it did not make it.
pub(crate) fn unescaped(written: &str) -> Option<String> {
    let mut parts = written.split('_');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merge_is_known_by_the_id_of_its_job() {
        for kind in MERGES {
            for disk in ["vda", "a.b", "/a/b"] {
                assert!(is_of_merge(&format!("{}1.3.{}", job_prefix(kind, disk), unique())));
            }
        }
        for id in
            ["merge.vda", "merge.vda.1.3.", "commit.vda.1.3.01234567", "merge.vda.1.x.01234567", "theirs"]
        {
            assert!(!is_of_merge(id), "{id}");
        }
    }

    #[test]
    fn prefixes_of_different_disks_never_meet() {
        assert_eq!(job_prefix("merge", "vda"), "merge.vda.");
        let disks = ["a.b", "a-b", "a_b", "a", "a.", "a_2eb", "/a/b", "\u{e4}"];
        for one in disks {
            let prefix = job_prefix("merge", one);
            assert!(prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)), "{prefix}");
            for other in disks.into_iter().filter(|other| *other != one) {
                assert!(!job_prefix("merge", other).starts_with(&prefix), "{one} {other}");
            }
        }
    }
}
