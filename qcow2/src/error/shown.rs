//! Names that somebody else chose, as they may be shown.

use std::ffi::OsStr;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;

/// How many bytes of a name are shown: as many as a backing name may have (specification, "Backing file name").
const LONGEST: usize = 1023;

/// A name in one line that a terminal shows as it is: control characters, marks that turn the direction of writing,
/// and bytes that are no UTF-8 are escaped as `\n`, `\x1b`, `\u{202e}`, `\xff`. Of a name with more than 1023 bytes, which no
/// backing name has, the beginning is shown: an image's author chooses how long the name of its data file is.
pub fn shown(name: impl AsRef<OsStr>) -> String {
    let bytes = name.as_ref().as_bytes();
    let mut out = String::new();
    for chunk in bytes.get(..LONGEST).unwrap_or(bytes).utf8_chunks() {
        for c in chunk.valid().chars() {
            push_escaped(&mut out, c);
        }
        for byte in chunk.invalid() {
            // Writing to a string cannot fail.
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    if bytes.len() > LONGEST {
        let _ = write!(out, "... ({} bytes)", bytes.len());
    }
    out
}

/// Appends a character, escaped if it is harmful.
fn push_escaped(out: &mut String, c: char) {
    // Writing to a string cannot fail.
    let _ = match c {
        '\n' => write!(out, "\\n"),
        '\r' => write!(out, "\\r"),
        '\t' => write!(out, "\\t"),
        c if !is_harmful(c) => write!(out, "{c}"),
        c if c.is_ascii() => write!(out, "\\x{:02x}", c as u32),
        c => write!(out, "\\u{{{:x}}}", c as u32),
    };
}

/// Whether a character may change what a terminal shows of the text around it: control characters, the marks and
/// overrides of bidirectional text (Unicode Standard Annex 9), separators of lines, characters without a width.
pub fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        for (name, expected) in [
            (&b"a b.qcow2"[..], "a b.qcow2"),
            ("K\u{f6}ln \u{1f600}.qcow2".as_bytes(), "K\u{f6}ln \u{1f600}.qcow2"),
            (b"a\nb\tc\rd", r"a\nb\tc\rd"),
            (b"\x1b[31m\x7f", r"\x1b[31m\x7f"),
            ("txt.\u{202e}2wocq".as_bytes(), r"txt.\u{202e}2wocq"),
            ("\u{85}\u{2066}".as_bytes(), r"\u{85}\u{2066}"),
            (b"d\xefsk", r"d\xefsk"),
        ] {
            assert_eq!(shown(OsStr::from_bytes(name)), expected);
        }
        let long = shown("n".repeat(LONGEST + 1));
        assert!(long.ends_with("nnn... (1024 bytes)"), "{long}");
    }
}
