//! The files in which libvirt keeps its domains, and which of them name an image.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::domain::{Domain, DomainDisk, pool_folder};

/// A definition is some thousand bytes long; with hundreds of disks and layers, some hundred thousand.
const LONGEST: u64 = 8 << 20;
/// More files than a host has domains.
const MOST_FILES: usize = 10_000;

/// Where the files lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folders(Vec<Folder>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Folder {
    path: PathBuf,
    is_of_a_session: bool,
}

/// All that is known of libvirt's domains.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Definitions {
    /// The domains, those that are defined before those that run.
    pub domains: Vec<Domain>,
    /// Files and folders that could not be read, with the reason.
    pub unread: Vec<(PathBuf, String)>,
}

/// A disk of a domain whose definition names images that were asked about.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Mention<'a> {
    /// The domain.
    pub domain: &'a Domain,
    /// Its disk.
    pub disk: &'a DomainDisk,
    /// Which of the images asked about each of its images is, by the place in that list.
    pub places: Vec<Option<usize>>,
}

impl Mention<'_> {
    /// Which of the images asked about it names, from the top, by their places in that list.
    pub(crate) fn named(&self) -> impl Iterator<Item = usize> {
        self.places.iter().copied().flatten()
    }

    /// Whether its active image is one of them.
    pub(crate) fn is_by_source(&self) -> bool {
        self.places.first().is_some_and(Option::is_some)
    }
}

impl Folders {
    /// libvirt's own: those of the system, and those of this user.
    pub fn usual() -> Self {
        let mut folders = vec![
            Folder { path: "/etc/libvirt/qemu".into(), is_of_a_session: false },
            Folder { path: "/run/libvirt/qemu".into(), is_of_a_session: false },
        ];
        let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let config = absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config")));
        let mut session = |path: PathBuf| folders.push(Folder { path, is_of_a_session: true });
        if let Some(config) = config {
            session(config.join("libvirt/qemu"));
        }
        if let Some(runtime) = absolute("XDG_RUNTIME_DIR") {
            session(runtime.join("libvirt/qemu/run"));
        }
        Self(folders)
    }

    /// These, as those of the system.
    pub fn of(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        Self(paths.into_iter().map(|path| Folder { path, is_of_a_session: false }).collect())
    }
}

impl Definitions {
    /// Reads them. What cannot be read is told, and is no error: a host without libvirt has none, and who may not read them is
    /// to be warned.
    pub fn read(folders: &Folders) -> Self {
        let mut read = Self::default();
        for folder in &folders.0 {
            read.folder(folder);
        }
        read.domains.sort_by_key(|domain| domain.is_live);
        read
    }

    fn folder(&mut self, folder: &Folder) {
        let entries = match fs::read_dir(&folder.path) {
            Ok(entries) => entries,
            Err(error) if is_absent(&error) => return,
            Err(error) => return self.unread.push((folder.path.clone(), error.to_string())),
        };
        // Pools are defined beside the folder of the domains.
        let pools = folder.path.parent().map(|parent| parent.join("storage")).unwrap_or_default();
        let pool = |name: &str| {
            let is_plain = !name.is_empty() && !name.contains('/');
            pool_folder(&text(pools.join(format!("{name}.xml")).as_path()).ok().filter(|_| is_plain)?)
        };
        let files = entries.flatten().map(|entry| entry.path());
        let mut files: Vec<PathBuf> =
            files.filter(|path| path.extension().is_some_and(|e| e == "xml")).take(MOST_FILES + 1).collect();
        if files.len() > MOST_FILES {
            self.unread.push((folder.path.clone(), format!("it has more than {MOST_FILES} definitions")));
            files.truncate(MOST_FILES);
        }
        files.sort();
        for path in files {
            let domain = text(&path)
                .map_err(|error| (error.kind() != io::ErrorKind::NotFound).then(|| error.to_string()))
                .and_then(|text| Domain::parse(&text, &path, folder.is_of_a_session, &pool).map_err(Some));
            match domain {
                Ok(domain) => self.domains.extend(domain),
                Err(Some(why)) => self.unread.push((path, why)),
                // It has gone in the meantime.
                Err(None) => {}
            }
        }
    }

    /// The disks whose definitions name any of these images, which a name or the same file tells. A domain that is defined and
    /// runs is told once, as it is defined, unless only the other file names one.
    pub(crate) fn naming(&self, images: &[&Path]) -> Vec<Mention<'_>> {
        let wanted: Vec<_> = images.iter().map(|path| (*path, file_id(path))).collect();
        let place = |image: &Path| {
            let id = file_id(image);
            wanted.iter().position(|(path, other)| *path == image || (id.is_some() && *other == id))
        };
        let mut mentions: Vec<Mention<'_>> = Vec::new();
        for domain in &self.domains {
            for disk in &domain.disks {
                let places: Vec<_> = disk.images.iter().map(|image| place(image.as_deref()?)).collect();
                let is_told = |m: &Mention<'_>| {
                    m.domain.name == domain.name
                        && m.domain.is_of_a_session == domain.is_of_a_session
                        && m.disk.target == disk.target
                };
                if places.iter().any(Option::is_some) && !mentions.iter().any(is_told) {
                    mentions.push(Mention { domain, disk, places });
                }
            }
        }
        mentions
    }

    /// The domain of this name, as it runs if that is known.
    pub(crate) fn domain(&self, name: &str) -> Option<&Domain> {
        self.domains.iter().rfind(|domain| domain.name == name)
    }

    /// Whether a domain runs, as far as files tell.
    pub(crate) fn runs(&self, domain: &Domain) -> bool {
        let is_it = |other: &&Domain| {
            other.is_live && other.name == domain.name && other.is_of_a_session == domain.is_of_a_session
        };
        self.domains.iter().any(|other| is_it(&other))
    }
}

/// A whole file, if it is a plain one that is not too long.
fn text(path: &Path) -> io::Result<String> {
    let odd = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
    // A pipe of that name must not make this wait.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(odd("it is no plain file"));
    }
    let mut bytes = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > LONGEST) {
        return Err(odd("it is too long"));
    }
    String::from_utf8(bytes).map_err(|_| odd("it is not UTF-8"))
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn file_id(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}
