//! Names that images hold for other files, read as QEMU reads them.
//!
//! QEMU reads two kinds of names. A *backing name* is a path or a protocol name (`bdrv_open`): the part before
//! the first colon is a protocol unless a slash comes earlier, so `./a:b` is a path and `a:b` is not. A
//! relative path starts at the overlay's directory as the overlay was named: symbolic links in that name are
//! not resolved first. A relative path behind `file:` or inside `json:` starts at the working directory of the
//! process. A *data file name* is always a literal path, and a relative one starts at the working directory.
//! Each rule was tried with QEMU 10.0.2, and the tests try it again.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::json::{self, OptionValue};
use crate::storage::FileKind;

/// The most bytes of a backing name (specification: "backing_file_size").
const MAX_NAME: usize = 1023;

/// Options that change how a file is accessed, but not what is read from it.
const HARMLESS_OPTIONS: &[&str] = &[
    "aio",
    "auto-read-only",
    "cache.direct",
    "cache.no-flush",
    "detect-zeroes",
    "discard",
    "locking",
    "aio-max-batch",
    "cache-clean-interval",
    "cache-size",
    "drop-cache",
    "force-share",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "node-name",
    "pass-discard-other",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pr-manager",
    "read-only",
    "refcount-cache-size",
];

/// Filter drivers, which show the bytes of the node below unchanged, each with its own options.
const FILTERS: &[(&str, &[&str])] =
    &[("throttle", &["throttle-group"]), ("copy-on-read", &["bottom"]), ("compress", &[])];

/// How a name is spelt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// A path.
    Path,
    /// `file:` and a path: a regular file.
    FilePrefix,
    /// `host_device:` and a path: a block device.
    DevicePrefix,
    /// `json:` and options.
    Json,
}

/// The name by which an image calls another file: parsed, but not yet looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    spelling: Spelling,
    path: PathBuf,
    from_working_dir: bool,
    driver: FileDriver,
    format: Option<String>,
    backing: Option<Stated>,
    data_file: Option<Box<BackingName>>,
}

/// What a `json:` name states about the next file down: the backing file of the image that the name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stated {
    /// It has none.
    Nothing,
    /// This one.
    File(Box<BackingName>),
}

/// The QEMU driver that would open the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileDriver {
    /// QEMU chooses by the kind of file.
    Any,
    File,
    HostDevice,
}

impl BackingName {
    /// Reads a backing name as it stands in the image.
    ///
    /// # Errors
    /// Why the name does not lead to a local file, in words: a protocol, driver or option that is not
    /// understood, or a name that is empty or too long.
    pub fn parse(raw: &[u8]) -> Result<Self, String> {
        if raw.len() > MAX_NAME {
            return Err(format!("it is {} bytes long, more than {MAX_NAME}", raw.len()));
        }
        let name = without_trailing_nul(raw)?;
        match protocol(name) {
            None => Self::path(Spelling::Path, name, false, FileDriver::Any),
            Some((b"file", rest)) => Self::path(Spelling::FilePrefix, rest, true, FileDriver::File),
            Some((b"host_device", rest)) => {
                Self::path(Spelling::DevicePrefix, rest, true, FileDriver::HostDevice)
            }
            Some((b"json", rest)) => Self::from_json(rest),
            // QEMU on Windows writes such names.
            Some(([letter], [b'\\' | b'/', ..])) if letter.is_ascii_alphabetic() => {
                Err("a path of Windows".to_owned())
            }
            Some((other, _)) => Err(format!("protocol '{}'", String::from_utf8_lossy(other))),
        }
    }

    /// Reads the name of an external data file as it stands in the image: a literal path.
    ///
    /// # Errors
    /// Why it is not a path, in words.
    pub fn parse_data_file(raw: &[u8]) -> Result<Self, String> {
        let name = without_trailing_nul(raw)?;
        Self::path(Spelling::Path, name, true, FileDriver::Any)
    }

    fn path(
        spelling: Spelling,
        name: &[u8],
        from_working_dir: bool,
        driver: FileDriver,
    ) -> Result<Self, String> {
        if name.is_empty() {
            return Err("the name is empty".to_owned());
        }
        let path = PathBuf::from(OsStr::from_bytes(name));
        Ok(Self { spelling, path, from_working_dir, driver, format: None, backing: None, data_file: None })
    }

    fn from_json(text: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(text).map_err(|_| "json that is not UTF-8".to_owned())?;
        Self::from_options(json::flatten(text)?)
    }

    /// Reads the options of a node as QEMU writes them: a format node over a file node, or a file node alone,
    /// with any filters between.
    fn from_options(mut options: BTreeMap<String, OptionValue>) -> Result<Self, String> {
        let format_at = below_filters(&mut options, String::new())?;
        let top = take(&mut options, &format!("{format_at}driver"))?;
        // A file driver without a format driver on top shows the file's bytes as they are.
        let bare = matches!(top.as_deref(), Some("file" | "host_device"));
        let (file_at, driver, format) = if bare {
            (format_at.clone(), top, Some("raw".to_owned()))
        } else {
            let file_at = below_filters(&mut options, format!("{format_at}file."))?;
            let driver = take(&mut options, &format!("{file_at}driver"))?;
            (file_at, driver, top)
        };
        let driver = match driver.as_deref() {
            None => FileDriver::Any,
            Some("file") => FileDriver::File,
            Some("host_device") => FileDriver::HostDevice,
            Some(other) => return Err(format!("driver '{other}'")),
        };
        let filename = take(&mut options, &format!("{file_at}filename"))?;
        let backing = match (options.remove(&format!("{format_at}backing")), bare) {
            (Some(OptionValue::Other(null)), false) if null == "null" => Some(Stated::Nothing),
            (Some(_), _) => return Err("json option 'backing' is the name of a node".to_owned()),
            (None, true) => None,
            (None, false) => child(&mut options, &format!("{format_at}backing."))?.map(Stated::File),
        };
        let data_file = if bare { None } else { child(&mut options, &format!("{format_at}data-file."))? };
        let understood = |key: &str| HARMLESS_OPTIONS.contains(&key.trim_start_matches("file."));
        if let Some(key) = options.keys().find(|key| !understood(key)) {
            return Err(format!("json option '{key}' is not supported"));
        }
        let filename = filename.ok_or("json without a file name")?;
        if filename.contains('\0') {
            return Err("the file name holds a zero byte".to_owned());
        }
        let name = Self::path(Spelling::Json, filename.as_bytes(), true, driver)?;
        Ok(Self { format, backing, data_file, ..name })
    }

    /// What the name states about the backing file of the image that it leads to. That image names its backing
    /// file itself: the two must agree.
    pub(super) fn backing(&self) -> Option<&Stated> {
        self.backing.as_ref()
    }

    /// What the name states about the data file of the image that it leads to; it must agree as well.
    pub(super) fn data_file(&self) -> Option<&Self> {
        self.data_file.as_deref()
    }

    /// Whether the name also states what lies below the image that it leads to.
    pub(crate) fn states_backing(&self) -> bool {
        self.backing.is_some()
    }

    /// How the name is spelt.
    pub(crate) fn spelling(&self) -> Spelling {
        self.spelling
    }

    /// The format that a `json:` name gives. A format in the overlay's header takes precedence.
    pub fn format(&self) -> Option<&str> {
        self.format.as_deref()
    }

    /// Whether the name is a relative path.
    pub fn is_relative(&self) -> bool {
        self.path.is_relative()
    }

    /// Whether the name leads to different files for processes with different working directories.
    pub(crate) fn depends_on_working_dir(&self) -> bool {
        self.from_working_dir && self.is_relative()
    }

    /// The path to which this name leads from the image `overlay`, spelt as QEMU spells it (nothing is
    /// normalised).
    pub fn resolve(&self, overlay: &Path) -> PathBuf {
        if self.from_working_dir { self.path.clone() } else { beside(overlay, &self.path) }
    }

    /// The path that the name would lead to if it started at the directory of `overlay`.
    pub(crate) fn resolve_beside(&self, overlay: &Path) -> PathBuf {
        beside(overlay, &self.path)
    }

    /// Checks that the file is of the kind that QEMU's driver demands.
    ///
    /// # Errors
    /// What it is instead, in words.
    pub(crate) fn check_kind(&self, kind: FileKind) -> Result<(), String> {
        let what = match (self.driver, kind) {
            (_, FileKind::Other(what)) => what.to_owned(),
            (FileDriver::File, FileKind::Block) => "a block device opened by the driver 'file'".to_owned(),
            (FileDriver::HostDevice, FileKind::Regular) => {
                "a regular file opened by the driver 'host_device'".to_owned()
            }
            _ => return Ok(()),
        };
        Err(what)
    }
}

/// Takes a string out of the options.
fn take(options: &mut BTreeMap<String, OptionValue>, key: &str) -> Result<Option<String>, String> {
    match options.remove(key) {
        None => Ok(None),
        Some(OptionValue::Text(text)) => Ok(Some(text)),
        Some(OptionValue::Other(found)) => Err(format!("json option '{key}' is {found}, not a string")),
    }
}

/// Takes the options of the filters at `at` away; returns the prefix of the first node below them.
fn below_filters(options: &mut BTreeMap<String, OptionValue>, mut at: String) -> Result<String, String> {
    loop {
        let key = format!("{at}driver");
        let Some(OptionValue::Text(driver)) = options.get(&key) else { return Ok(at) };
        let Some((_, own)) = FILTERS.iter().find(|(filter, _)| filter == driver) else { return Ok(at) };
        options.remove(&key);
        for option in *own {
            take(options, &format!("{at}{option}"))?;
        }
        at += "file.";
    }
}

/// Takes the options that begin with `prefix` away; returns the node that they describe, if there are any.
fn child(
    options: &mut BTreeMap<String, OptionValue>,
    prefix: &str,
) -> Result<Option<Box<BackingName>>, String> {
    let mut own = BTreeMap::new();
    options.retain(|key, value| match key.strip_prefix(prefix) {
        Some(key) => own.insert(key.to_owned(), value.clone()).is_some(),
        None => true,
    });
    if own.is_empty() { Ok(None) } else { BackingName::from_options(own).map(|name| Some(Box::new(name))) }
}

/// Every path that a backing name may lead to, for a search that must not overlook a user of a file. Names that
/// [`BackingName::parse`] refuses count, too. For names that depend on the working directory of another
/// process, the directory of `overlay` is tried as well.
pub(super) fn possible_paths(raw: &[u8], overlay: &Path) -> Vec<PathBuf> {
    let name = raw.split(|&b| b == 0).next().unwrap_or(raw);
    let as_path = |name: &[u8]| PathBuf::from(OsStr::from_bytes(name));
    let names = match protocol(name) {
        None => return vec![beside(overlay, &as_path(name))],
        Some((b"json", text)) => file_names_in_json(text),
        // `file:x`, but also `blkdebug::x`; and the whole as a path, as a program without protocols would read
        // it.
        Some((_, rest)) => {
            vec![as_path(rest), as_path(rest.strip_prefix(b":").unwrap_or(rest)), as_path(name)]
        }
    };
    names.iter().flat_map(|name| [name.clone(), beside(overlay, name)]).collect()
}

/// Every path that a data file name may lead to, as in [`possible_paths`].
pub(super) fn possible_data_file_paths(raw: &[u8], image: &Path) -> Vec<PathBuf> {
    let name = PathBuf::from(OsStr::from_bytes(raw.split(|&b| b == 0).next().unwrap_or(raw)));
    vec![beside(image, &name), name]
}

fn file_names_in_json(text: &[u8]) -> Vec<PathBuf> {
    let options = std::str::from_utf8(text).ok().and_then(|text| json::flatten(text).ok());
    let is_name = |key: &str| key == "filename" || key.ends_with(".filename");
    options
        .into_iter()
        .flatten()
        .filter(|(key, _)| is_name(key))
        .filter_map(|(_, value)| match value {
            OptionValue::Text(text) => Some(PathBuf::from(text)),
            OptionValue::Other(_) => None,
        })
        .collect()
}

/// The protocol and what follows it, if `name` is not a path (QEMU: `path_has_protocol`).
pub(super) fn protocol(name: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = name.iter().position(|&b| b == b':' || b == b'/')?;
    let (protocol, rest) = name.split_at(at);
    rest.strip_prefix(b":").map(|rest| (protocol, rest))
}

/// `path` started at the directory of `overlay` (QEMU: `path_combine`): the bytes up to the last
/// slash are kept as they are.
pub(super) fn beside(overlay: &Path, path: &Path) -> PathBuf {
    if path.is_absolute() {
        return path.to_owned();
    }
    let overlay = overlay.as_os_str().as_bytes();
    let dir_len = overlay.iter().rposition(|&b| b == b'/').map_or(0, |at| at + 1);
    let dir = overlay.get(..dir_len).unwrap_or_default();
    PathBuf::from(OsStr::from_bytes(&[dir, path.as_os_str().as_bytes()].concat()))
}

/// The name without trailing zero bytes. A zero byte inside is refused: QEMU ends the name there, other
/// programs may not, and the two would open different files.
fn without_trailing_nul(raw: &[u8]) -> Result<&[u8], String> {
    let end = raw.iter().rposition(|&b| b != 0).map_or(0, |at| at + 1);
    let name = raw.get(..end).unwrap_or_default();
    if name.contains(&0) { Err("the name holds a zero byte".to_owned()) } else { Ok(name) }
}

#[cfg(test)]
#[path = "name_tests.rs"]
mod tests;
