//! What would succeed next, as the files tell: whether a repair or a flatten would, where a backing file that is missing may be,
//! which names are free. [`after`] makes values of it: what leads on after an error, for whoever says what to do about one.

mod after;
mod system;
mod way;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{IFlags, ioctl_getflags};

use crate::chain::view::View;
use crate::chain::{BackingName, Chain, OpenOptions, Policy, open_data_file};
use crate::check::CheckOptions;
use crate::error::{Error, FileOp, Result};
use crate::image::{ImageFormat, Qcow2};
use crate::repair::{self, RepairMode};
use crate::storage::{Access, Host, OsHost, Storage};
use crate::units::{GuestOffset, GuestRange};

pub use self::after::after;
pub use self::system::limit;
pub use self::way::{Act, Allow, Asked, Task, Way, Why};

/// The folder that a file lies in, as one can type it.
pub fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => ".".into(),
        Some(parent) => parent.to_owned(),
        None => path.to_owned(),
    }
}

/// A name beside `image` that no file has: `vm-2.qcow2` for `vm.qcow2`; none for a device, beside which no image
/// should lie.
pub fn free_name(image: &Path) -> Option<PathBuf> {
    if fs::metadata(image).is_ok_and(|meta| !meta.is_file()) {
        return None;
    }
    let stem = image.file_stem()?;
    let extension = image.extension();
    (2..100).find_map(|n| {
        let mut name = stem.to_owned();
        name.push(format!("-{n}"));
        if let Some(extension) = extension {
            name.push(".");
            name.push(extension);
        }
        let path = image.with_file_name(name);
        fs::symlink_metadata(&path).is_err().then_some(path)
    })
}

/// A name for `file` when it is moved away: its own with a number behind it, which nothing has.
pub fn free_name_behind(file: &Path) -> Option<PathBuf> {
    (1..100).find_map(|n| {
        let mut name = file.file_name()?.to_owned();
        name.push(format!(".{n}"));
        let path = file.with_file_name(name);
        fs::symlink_metadata(&path).is_err().then_some(path)
    })
}

/// Whether a file is marked so that even root cannot change it.
pub fn is_immutable(path: &Path) -> bool {
    let flags = File::open(path).ok().and_then(|file| ioctl_getflags(&file).ok());
    flags.is_some_and(|flags| flags.intersects(IFlags::IMMUTABLE | IFlags::APPEND))
}

/// The backing file that an image names.
#[derive(Debug)]
#[non_exhaustive]
pub struct NamedBacking {
    /// Its name as it stands in the image.
    pub written: OsString,
    /// The name as resolved.
    pub path: PathBuf,
    /// Its format, if the image states it.
    pub declared: Option<String>,
}

/// A file that may be a backing file that was moved.
#[derive(Debug)]
#[non_exhaustive]
pub struct MovedBacking {
    /// The file.
    pub path: PathBuf,
    /// Its name for the header of the overlay.
    pub name: OsString,
    /// Its format.
    pub format: ImageFormat,
}

impl NamedBacking {
    /// What the header of `image` says; nothing if it cannot be read.
    pub fn of(image: &Path) -> Option<Self> {
        let file = OsHost.open(image, Access::Read).ok()?;
        let cluster0 = Qcow2::read_cluster0(image, &*file).ok()?;
        let written = cluster0.backing_name.clone()?;
        let path = BackingName::parse(&written).ok()?.resolve(image);
        Some(Self {
            written: OsStr::from_bytes(&written).to_owned(),
            path,
            declared: cluster0.backing_format(),
        })
    }

    /// Whether the name says what lies below the backing file, too, as a `json:` name may: that is wrong once it changes.
    pub fn states_more(&self) -> bool {
        BackingName::parse(self.written.as_bytes()).is_ok_and(|name| name.states_backing())
    }

    /// The format that the file's first bytes tell.
    pub fn detected(&self) -> Option<ImageFormat> {
        let file = OsHost.open(&self.path, Access::Read).ok()?;
        ImageFormat::detect(&self.path, &*file).ok()
    }

    /// The file of the same name beside the overlay, if there is one and it has the stated format.
    pub fn moved(&self, image: &Path) -> Option<MovedBacking> {
        let name = self.path.file_name()?;
        let path = image.with_file_name(name);
        let meta = fs::metadata(&path).ok()?;
        if !meta.is_file() || fs::canonicalize(&path).ok()? == fs::canonicalize(image).ok()? {
            return None;
        }
        let there = Self { path, written: name.to_owned(), declared: self.declared.clone() };
        let format = there.detected().filter(|found| ImageFormat::from_name(found.name()).is_some())?;
        // A colon would be taken for a protocol, a dash for an option.
        let plain = !name.as_bytes().contains(&b':') && !name.as_bytes().starts_with(b"-");
        let name = if plain { name.to_owned() } else { Path::new(".").join(name).into() };
        self.declared.as_ref().is_none_or(|declared| declared == format.name()).then_some(MovedBacking {
            path: there.path,
            name,
            format,
        })
    }
}

/// The layer that lies `steps` below `image`, going by the names in the headers.
pub fn layer_down(image: &Path, steps: usize) -> Option<PathBuf> {
    (0..steps).try_fold(image.to_owned(), |image, _| Some(NamedBacking::of(&image)?.path))
}

/// Whether `check --repair all` would leave no corruption in an image: its plan says so, on a copy in memory.
pub fn can_be_repaired(image: &Path) -> bool {
    let plan = || {
        let file = OsHost.open(image, Access::Read).ok()?;
        let cluster0 = Qcow2::read_cluster0(image, &*file).ok()?;
        let data = open_data_file(&OsHost, image, &*file, &cluster0, &local()).ok()?;
        let data = data.as_ref().map(|(_, storage)| &**storage as &dyn Storage);
        repair::plan(image, &*file, data, RepairMode::All, &CheckOptions::default()).ok()
    };
    plan().is_some_and(|plan| plan.after.corruptions == 0 && plan.after.check_errors == 0)
}

/// Whether `flatten` would find its way through the tables of a chain, as QEMU reads them.
pub fn can_be_flattened(image: &Path) -> bool {
    let Ok(chain) = Chain::open(&OsHost, image, &OpenOptions { as_qemu: true, ..local() }) else {
        return false;
    };
    let images = chain.images();
    let view = View::new(&images, 0, chain.active());
    let (mut at, mut found) = (GuestOffset::new(0), Vec::new());
    loop {
        let start = match view.next_supplied(at) {
            Ok(Some(start)) => start,
            Ok(None) => return true,
            Err(_) => return false,
        };
        found.clear();
        if view.resolve(GuestRange { start, len: view.window() }, &mut found).is_err() {
            return false;
        }
        at = start + view.window();
    }
}

fn local() -> OpenOptions {
    OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() }
}

/// Whether there is a qcow2 image at `path` that holds nothing itself, as far as it can be read.
pub fn holds_nothing(path: &Path) -> bool {
    let look = || -> Result<bool> {
        let file = OsHost.open(path, Access::Read).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
        // Its tables tell: its data file need not be opened.
        let image = Qcow2::open(path, file.clone(), Some(file))?;
        image.check_number_of_tables()?;
        Ok(image.header().snapshots == 0 && image.next_allocated(GuestOffset::ZERO)?.is_none())
    };
    look().unwrap_or(false)
}
