//! Names inside images: whatever they say, nothing is opened but what the policy allows.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::sample::{Sample, extension, field, incompatible};
use crate::chain::{BackingName, Chain, OpenOptions, Policy, find_users, new_backing_name};
use crate::error::Holder;
use crate::format::{Cluster0, EXT_BACKING_FORMAT};
use crate::storage::{Access, FileId, FileStat, Host, MemHost, Storage};

const IMAGE: &str = "/vm/image.qcow2";
/// The only folder from which files may be opened.
const ALLOWED: &str = "/vm";

/// The first byte says where the name stands, the rest is the name: of the backing file, of the data file,
/// or a backing format. Reading it ends; an error about it is short; with the default policy nothing is opened
/// but the image; with a folder that is allowed, nothing outside it; a search for other users of a file
/// opens nothing that a name leads to.
pub fn name(bytes: &[u8]) {
    let Some((place, name)) = bytes.split_first() else { return };
    assert_name_is_understood(name);
    let place = [NamePlace::Backing, NamePlace::DataFile, NamePlace::Format][usize::from(place % 3)];
    let image = place.image(name);
    let host = Watched::new(&image);
    for policy in [Policy::deny(), Policy::local_files().allow_dir(ALLOWED), Policy::local_files()] {
        let is_default = policy == Policy::deny();
        let anywhere = policy == Policy::local_files();
        let options = OpenOptions { policy, ..OpenOptions::default() };
        let outcome = Chain::open(&host, Path::new(IMAGE), &options);
        if let Err(error) = &outcome {
            assert_short(&error.to_string());
        }
        for opened in host.take_opened() {
            let inside = opened.starts_with(ALLOWED) && !is_default;
            assert!(opened == Path::new(IMAGE) || inside || anywhere, "{} was opened", opened.display());
        }
    }
    let base = host.inner.stat(Path::new("/vm/base")).map(|stat| stat.id);
    let users = base.map(|id| find_users(&host, &[ALLOWED.into()], &[id], &[]));
    assert!(users.is_ok_and(|users| users.is_ok()), "the folder can be searched");
    for opened in host.take_opened() {
        assert!(opened.parent() == Some(Path::new(ALLOWED)), "{} was opened", opened.display());
    }
}

/// Gives the image whose cluster 0 this is a backing name and format; no format if it is empty.
#[allow(clippy::unwrap_used, reason = "what cannot be done fails the test")]
pub fn set_backing(cluster: &mut [u8], name: &[u8], format: &str) {
    let mut cluster0 = Cluster0::parse(cluster).unwrap();
    cluster0.set_backing(name, if format.is_empty() { "none" } else { format }).unwrap();
    if format.is_empty() {
        cluster0.remove_extension(EXT_BACKING_FORMAT);
    }
    put(&cluster0, cluster);
}

/// Gives the image whose cluster 0 this is the name of a data file.
#[allow(clippy::unwrap_used, reason = "what cannot be done fails the test")]
pub fn set_data_file(cluster: &mut [u8], name: &[u8]) {
    let mut cluster0 = Cluster0::parse(cluster).unwrap();
    cluster0.set_data_file(name, false);
    put(&cluster0, cluster);
}

#[allow(clippy::unwrap_used, reason = "what cannot be done fails the test")]
fn put(cluster0: &Cluster0, cluster: &mut [u8]) {
    let mut head = cluster0.encode().unwrap();
    head.resize(cluster.len(), 0);
    cluster.copy_from_slice(&head);
}

#[derive(Clone, Copy)]
enum NamePlace {
    Backing,
    DataFile,
    Format,
}

impl NamePlace {
    /// An image of 4 KiB clusters that holds the name, as much of it as fits.
    fn image(self, name: &[u8]) -> Vec<u8> {
        let name = name.get(..name.len().min(3000)).unwrap_or_default();
        let sample = Sample::new(0).with_clusters(12, 10);
        let sample = match self {
            Self::Backing => sample.over("", "raw"),
            Self::DataFile => {
                let extensions = vec![(extension::DATA_FILE, name.to_vec())];
                Sample { extensions, ..sample }
            }
            Self::Format => {
                let extensions = vec![(extension::BACKING_FORMAT, name.to_vec())];
                Sample { extensions, backing: Some(("base".into(), None)), ..sample }
            }
        };
        let mut image = sample.build();
        match self {
            Self::Backing => {
                image.put(image.at.backing_name, name);
                image.put_u32(field::BACKING_SIZE, name.len() as u32);
            }
            Self::DataFile => image.put_u64(field::INCOMPATIBLE, incompatible::DATA_FILE),
            Self::Format => {}
        }
        image.bytes
    }
}

/// A name by itself: understood or refused in few words, and what it leads to can be written down again.
fn assert_name_is_understood(name: &[u8]) {
    for parsed in [BackingName::parse(name), BackingName::parse_data_file(name)] {
        match parsed {
            Ok(parsed) => {
                let resolved = parsed.resolve(Path::new(IMAGE));
                assert!(!resolved.as_os_str().is_empty(), "a name that leads nowhere");
                assert!(parsed.resolve_beside(Path::new(IMAGE)).is_absolute());
                assert!(parsed.format().is_none_or(|format| format.len() <= name.len()));
            }
            Err(why) => assert_short(&why),
        }
    }
    let host = MemHost::new();
    let base = Path::new("/vm/base");
    assert!(host.add(base, &[0; 512]).is_ok(), "files in memory can be added");
    match new_backing_name(&host, name, Path::new(IMAGE), base) {
        Ok(new) => {
            assert_eq!(BackingName::parse(&new).map(|new| new.resolve(Path::new(IMAGE))).as_deref(), Ok(base))
        }
        Err(error) => unreachable!("a name for a file beside it: {error}"),
    }
}

/// A name has 1023 bytes, and may stand in a message twice, each byte as a replacement character or an escape.
fn assert_short(message: &str) {
    assert!(
        message.len() < 16 << 10,
        "a message of {} bytes: {}",
        message.len(),
        message.chars().take(300).collect::<String>()
    );
}

/// Files in memory, and which of them are opened.
#[derive(Debug)]
struct Watched {
    inner: MemHost,
    opened: Mutex<BTreeSet<PathBuf>>,
}

impl Watched {
    fn new(image: &[u8]) -> Self {
        let inner = MemHost::new();
        let overlay = Sample::new(8).over("base", "raw").build().bytes;
        for (path, content) in [
            (IMAGE, image),
            ("/vm/base", &[1; 4096]),
            ("/vm/other.qcow2", &overlay),
            ("/vm/below/base", &[2; 4096]),
            ("/base", &[3; 4096]),
            ("/etc/shadow", &[4; 512]),
        ] {
            assert!(inner.add(path, content).is_ok(), "files in memory can be added");
        }
        Self { inner, opened: Mutex::default() }
    }

    fn take_opened(&self) -> BTreeSet<PathBuf> {
        std::mem::take(&mut *self.opened.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Host for Watched {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn Storage>> {
        let file = self.inner.canonicalize(path).unwrap_or_else(|_| path.to_owned());
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).insert(file);
        assert_eq!(access, Access::Read, "{} is opened for writing", path.display());
        self.inner.open(path, access)
    }

    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn Storage>> {
        unreachable!("{} is created", path.display())
    }

    fn stat(&self, path: &Path) -> io::Result<FileStat> {
        self.inner.stat(path)
    }

    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        self.inner.canonicalize(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.inner.list(dir)
    }

    fn rename(&self, from: &Path, _: &Path) -> io::Result<()> {
        unreachable!("{} is renamed", from.display())
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        unreachable!("{} is removed", path.display())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.inner.sync_dir(dir)
    }

    fn free_space(&self, path: &Path) -> io::Result<Option<u64>> {
        self.inner.free_space(path)
    }

    fn holders(&self, id: FileId) -> Vec<Holder> {
        self.inner.holders(id)
    }
}

/// Names of every spelling that QEMU has, good and bad.
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let names: [(&str, u8, &str); 20] = [
        ("relative", 0, "base"),
        ("absolute", 0, "/vm/base"),
        ("below", 0, "below/base"),
        ("above", 0, "../base"),
        ("far-above", 0, "../../../../etc/shadow"),
        ("secret", 0, "/etc/shadow"),
        ("itself", 0, "image.qcow2"),
        ("protocol", 0, "nbd://host:10809/export"),
        ("file-prefix", 0, "file:base"),
        ("device-prefix", 0, "host_device:/dev/vda"),
        ("fd", 0, "fd:3"),
        ("json-bare", 0, r#"json:{"driver":"file","filename":"/vm/base"}"#),
        ("json-nested", 0, r#"json:{"driver":"raw","file":{"driver":"file","filename":"/etc/shadow"}}"#),
        ("json-dotted", 0, "json:{'driver':'qcow2','file.driver':'nbd','file.host':'h','file.port':'1'}"),
        (
            "json-blkdebug",
            0,
            r#"json:{"driver":"blkdebug","image":{"driver":"file","filename":"/etc/shadow"}}"#,
        ),
        ("json-in-json", 0, r#"json:{"driver":"raw","file.filename":"json:{\"driver\":\"file\"}"}"#),
        ("data-file", 1, "base"),
        ("data-file-json", 1, r#"json:{"driver":"file","filename":"/etc/shadow"}"#),
        ("format", 2, "qcow2"),
        ("format-unknown", 2, "vmdk"),
    ];
    let mut seeds: Vec<_> =
        names.iter().map(|(seed, place, name)| (*seed, [&[*place], name.as_bytes()].concat())).collect();
    seeds.push(("json-deep", [&b"\0json:"[..], &br#"{"a":"#.repeat(200)].concat()));
    seeds.push(("long", [&[0][..], &[b'a'; 1023]].concat()));
    seeds.push(("too-long", [&[0][..], &[b'a'; 1024]].concat()));
    seeds
}
