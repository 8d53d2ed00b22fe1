//! Opens a chain from the active image down, name by name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::name::{BackingName, Stated};
use super::policy::{Named, Opened, Policy, not_writable};
use super::{Chain, DataFile, Layer, data_file};
use crate::error::{Contradiction, Error, FileOp, Refusal, Result, Role, shown};
use crate::format::{Cluster0, EXT_BACKING_FORMAT, FormatError};
use crate::image::{Image, ImageFormat, Qcow2};
use crate::storage::{
    Access, FileId, FileKind, Host, LockMode, Storage, if_there, leads_nowhere, lock, may_be_unlocked,
};

/// How a chain is opened. The default names no formats, opens everything for reading, takes no locks,
/// and lets no image name other files.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Which files may be opened because an image names them.
    pub policy: Policy,
    /// The active image's format; `None` lets its magic decide.
    pub active_format: Option<ImageFormat>,
    /// Formats of backing files whose overlays do not state one. A key is any path that leads to the file, or
    /// its name as written in the overlay.
    pub backing_formats: BTreeMap<PathBuf, ImageFormat>,
    /// The access of files that are not opened for reading only. An external data file is opened like its
    /// image.
    pub access: BTreeMap<FileId, Access>,
    /// Whether every file is locked as QEMU locks it, before anything is read from it: for writing if it is
    /// opened for writing, else for reading.
    pub lock: bool,
    /// Whether a file that is opened for writing may lie on a file system without locks. Then only the caller
    /// can know that nobody else uses it. Files that are only read may always lie there.
    pub no_locks: bool,
    /// Whether images that are cut short are read as QEMU does (`Qcow2::read_as_qemu`).
    pub as_qemu: bool,
    /// Whether everything is to be read that can be, of images that are damaged. What is lost reads as zeros.
    pub salvage: bool,
}

impl OpenOptions {
    /// Opens what the policy allows, for reading, without locks.
    pub fn new(policy: Policy) -> Self {
        Self { policy, ..Self::default() }
    }

    /// The same with every file locked.
    #[must_use]
    pub fn locked(self) -> Self {
        Self { lock: true, ..self }
    }

    /// The same for an active image of this format; `None` lets its magic decide.
    #[must_use]
    pub fn with_format(self, active_format: Option<ImageFormat>) -> Self {
        Self { active_format, ..self }
    }

    /// The same with these formats of backing files whose overlays do not state one, each by a path that leads to the
    /// file, or by its name as written.
    #[must_use]
    pub fn with_backing_formats(self, formats: impl IntoIterator<Item = (PathBuf, ImageFormat)>) -> Self {
        Self { backing_formats: formats.into_iter().collect(), ..self }
    }
}

impl Chain {
    /// Opens `active` and all images below it.
    ///
    /// # Errors
    /// - [`Error::MissingLayer`], [`Error::Io`]: a file that does not exist or cannot be read;
    /// - [`Error::Refused`]: a name that the policy forbids, that is not a local file, or that has no format
    ///   or the wrong one; a loop; more layers than the policy allows;
    /// - [`Error::InUse`]: another process holds a file;
    /// - [`Error::Format`]: an image that is damaged, or uses a feature that is not supported.
    pub fn open(host: &dyn Host, active: &Path, options: &OpenOptions) -> Result<Self> {
        Self::open_after(host, active, options, &|_| Ok(()))
    }

    /// As [`Chain::open`]; `before` is called with the name of each image before anything is read from it.
    ///
    /// # Errors
    /// Those of [`Chain::open`], and of `before`.
    pub(crate) fn open_after(
        host: &dyn Host,
        active: &Path,
        options: &OpenOptions,
        before: &dyn Fn(&Path) -> Result<()>,
    ) -> Result<Self> {
        let mut opener = Opener { host, options, before, rename: None, layers: Vec::new() };
        let mut next = Some(opener.open_active(active)?);
        while let Some(file) = next {
            next = opener.add(file)?;
        }
        opener.finish()
    }

    /// As [`Chain::open`], as if the header of `active`, which must be qcow2, had the names that `rename` gives it. The chain
    /// ends above the first file that is not there and that `rename` has not named, which is returned as an error.
    ///
    /// # Errors
    /// Those of [`Chain::open`], and of `rename`.
    pub(crate) fn open_renamed(
        host: &dyn Host,
        active: &Path,
        options: &OpenOptions,
        rename: &Rename<'_>,
    ) -> Result<(Self, Option<Error>)> {
        let mut opener =
            Opener { host, options, before: &|_| Ok(()), rename: Some(rename), layers: Vec::new() };
        let mut next = Some(opener.open_active(active)?);
        let mut missing = None;
        while let Some(file) = next {
            next = match opener.add(file) {
                Err(e) if is_nothing_there(&e) && opener.layers.len() >= rename.below => {
                    missing = Some(e);
                    None
                }
                added => added?,
            };
        }
        Ok((opener.finish()?, missing))
    }
}

/// Other names for the files of an image, in the place of those in its header.
#[derive(Clone, Copy)]
pub(crate) struct Rename<'a> {
    /// Changes the names.
    pub(crate) names: &'a dyn Fn(&mut Cluster0) -> Result<()>,
    /// How many layers there must be, the image included.
    pub(crate) below: usize,
}

/// Whether a backing file does not exist.
fn is_nothing_there(error: &Error) -> bool {
    let Error::MissingLayer { role: Role::BackingFile, source, .. } = error else { return false };
    leads_nowhere(source)
}

/// Opens the external data file of a single image, if it has one, under the policy and the locks of `options`.
/// `file` is the image itself: its identity selects the access, and its owner decides what may be done with the
/// data file.
///
/// # Errors
/// As [`Chain::open`].
pub fn open_data_file(
    host: &dyn Host,
    image: &Path,
    file: &dyn Storage,
    cluster0: &Cluster0,
    options: &OpenOptions,
) -> Result<Option<(DataFile, Arc<dyn Storage>)>> {
    let opener = Opener { host, options, before: &|_| Ok(()), rename: None, layers: Vec::new() };
    opener.open_data_file(image, file, cluster0)
}

/// A file that is about to become a layer.
struct FoundFile {
    path: PathBuf,
    written_name: Option<Vec<u8>>,
    id: FileId,
    format: ImageFormat,
    storage: Arc<dyn Storage>,
    /// The name by which the overlay calls it.
    name: Option<BackingName>,
    /// What the names in the layers above state about its backing file.
    stated: Vec<Stated>,
}

struct Opener<'a> {
    host: &'a dyn Host,
    options: &'a OpenOptions,
    /// Called with the name of each image before anything is read from it.
    before: &'a dyn Fn(&Path) -> Result<()>,
    /// Other names for the files of the first image.
    rename: Option<&'a Rename<'a>>,
    /// Top first.
    layers: Vec<Layer>,
}

impl Opener<'_> {
    fn access(&self, id: FileId) -> Access {
        self.options.access.get(&id).copied().unwrap_or(Access::Read)
    }

    fn open_active(&self, path: &Path) -> Result<FoundFile> {
        let io = |op| move |e| Error::io(path, op, None, e);
        let access = self.access(self.host.stat(path).map_err(io(FileOp::Open))?.id);
        (self.before)(path)?;
        let storage =
            self.host.open(path, access).map_err(|e| not_writable(path, access, e, io(FileOp::Open)))?;
        let id = storage.stat().map_err(io(FileOp::Stat))?.id;
        self.lock(path, id, access, &*storage)?;
        let format = match self.options.active_format {
            Some(format) => format,
            None => ImageFormat::detect_readable(path, &*storage)?,
        };
        Ok(FoundFile {
            path: path.to_owned(),
            written_name: None,
            id,
            format,
            storage,
            name: None,
            stated: Vec::new(),
        })
    }

    fn lock(&self, path: &Path, id: FileId, access: Access, storage: &dyn Storage) -> Result<()> {
        if !self.options.lock {
            return Ok(());
        }
        let mode = match access {
            Access::Read => LockMode::Read,
            Access::ReadWrite => LockMode::Write,
        };
        lock(self.host, path, storage, mode)?;
        may_be_unlocked(self.host, path, id, storage, access, self.options.no_locks)
    }

    /// Adds a layer and returns the one below it.
    fn add(&mut self, file: FoundFile) -> Result<Option<FoundFile>> {
        let FoundFile { path, written_name, id, format, storage, name: called, stated } = file;
        let mut data_file = None;
        let mut data_storage = None;
        let mut below = None;
        if format == ImageFormat::Qcow2 {
            let mut cluster0 = Qcow2::read_cluster0(&path, &*storage)?;
            cluster0.validate().map_err(|e| Error::format(&path, e))?;
            if let Some(rename) = self.rename.take() {
                (rename.names)(&mut cluster0)?;
            }
            if let Some((found, opened)) = self.open_data_file(&path, &*storage, &cluster0)? {
                data_file = Some(found);
                data_storage = Some(opened);
            }
            self.judge_data_file(&path, called.as_ref(), data_file.as_ref())?;
            below = cluster0.backing_name.clone().map(|name| (name, cluster0));
        }
        let mut image = Image::open(&path, storage, format, data_storage)?;
        if let Image::Qcow2(qcow2) = &mut image {
            qcow2.own_data_file(data_file.as_ref().is_some_and(|data| data.kept.is_none()));
            if self.options.as_qemu {
                qcow2.read_as_qemu();
            }
            if self.options.salvage {
                qcow2.salvage();
            }
            // This check comes before anything follows the tables: time and memory of a merge grow with their
            // number.
            qcow2.check_number_of_tables()?;
        }
        let access = self.access(id);
        self.layers.push(Layer { index: 0, path: path.clone(), written_name, id, access, data_file, image });
        let mut found =
            below.map(|(name, cluster0)| self.open_backing(&path, name, &cluster0)).transpose()?;
        self.judge_stated(&path, stated, found.as_mut())?;
        Ok(found)
    }

    fn open_data_file(
        &self,
        image: &Path,
        file: &dyn Storage,
        cluster0: &Cluster0,
    ) -> Result<Option<(DataFile, Arc<dyn Storage>)>> {
        let Some(written) = cluster0.data_file_name().filter(|_| cluster0.header.has_data_file()) else {
            return Ok(None);
        };
        let role = Role::DataFile;
        let name =
            BackingName::parse_data_file(written).map_err(|why| not_local(image, role, written, why))?;
        let named = Named { image, role, written, name: &name };
        let image_id = file.stat().map_err(|e| Error::io(image, FileOp::Stat, None, e))?.id;
        let access = self.access(image_id);
        let Opened { path, id, storage } = self.options.policy.open(self.host, &named, |_| access)?;
        if id == image_id || self.holds(id) {
            return Err(Error::refused(image, Refusal::DataFileIsLayer { file: path }));
        }
        self.lock(&path, id, access, &*storage)?;
        let may_write = data_file::may_write(self.host, file, &*storage)
            .map_err(|e| Error::io(&path, FileOp::Stat, None, e))?
            || self.options.policy.vouches(self.host, &path)?;
        let kept = data_file::kept(self.host, (image, file), (&path, &*storage), may_write)?;
        Ok(Some((DataFile { path, written_name: written.to_vec(), id, kept, may_write }, storage)))
    }

    fn open_backing(&self, image: &Path, written: Vec<u8>, cluster0: &Cluster0) -> Result<FoundFile> {
        let role = Role::BackingFile;
        let name = BackingName::parse(&written).map_err(|why| not_local(image, role, &written, why))?;
        let limit = self.options.policy.max_depth();
        if self.layers.len() >= limit {
            return Err(Error::refused(image, Refusal::TooDeep { limit }));
        }
        let named = Named { image, role, written: &written, name: &name };
        let Opened { path, id, storage } =
            self.options.policy.open(self.host, &named, |id| self.access(id))?;
        if self.holds(id) {
            return Err(Error::refused(image, Refusal::Loop { file: path }));
        }
        (self.before)(&path)?;
        self.lock(&path, id, self.access(id), &*storage)?;
        let kind = storage.stat().map_err(|e| Error::io(&path, FileOp::Stat, None, e))?.kind;
        let format = self.backing_format(&named, cluster0, &path, (id, kind), &*storage)?;
        let stated = name.backing().cloned().into_iter().collect();
        let name = Some(name);
        Ok(FoundFile { path, written_name: Some(written), id, format, storage, name, stated })
    }

    /// Checks that what names above state about the backing file of the image at `path` is what that image
    /// names. What they state about layers further down is handed on, and checked there.
    fn judge_stated(&self, path: &Path, stated: Vec<Stated>, found: Option<&mut FoundFile>) -> Result<()> {
        let refuse = |what| Err(Error::refused(path, Refusal::Contradicted(what)));
        let Some(found) = found else {
            return match stated.iter().find(|stated| **stated != Stated::Nothing) {
                Some(_) => refuse(Contradiction::Backing),
                None => Ok(()),
            };
        };
        for stated in stated {
            let Stated::File(name) = stated else {
                return refuse(Contradiction::NoBacking);
            };
            let resolved = name.resolve(path);
            let is_same = self.id_of(&resolved)? == Some(found.id)
                && name.format().is_none_or(|format| format == found.format.name());
            if !is_same {
                let named = found.path.clone();
                return refuse(Contradiction::OtherBacking { stated: resolved, named });
            }
            found.stated.extend(name.backing().cloned());
        }
        Ok(())
    }

    /// Does for the data file what [`Opener::judge_stated`] does for the backing file.
    fn judge_data_file(
        &self,
        path: &Path,
        called: Option<&BackingName>,
        found: Option<&DataFile>,
    ) -> Result<()> {
        let Some(name) = called.and_then(BackingName::data_file) else { return Ok(()) };
        let id = self.id_of(&name.resolve(path))?;
        if id.is_some() && id == found.map(|file| file.id) {
            return Ok(());
        }
        Err(Error::refused(path, Refusal::Contradicted(Contradiction::OtherDataFile)))
    }

    /// The file that a name leads to, if there is one.
    fn id_of(&self, path: &Path) -> Result<Option<FileId>> {
        let stat = if_there(self.host.stat(path)).map_err(|e| Error::io(path, FileOp::Stat, None, e))?;
        Ok(stat.map(|stat| stat.id))
    }

    /// Whether a layer, or a layer's data file, is this file.
    fn holds(&self, id: FileId) -> bool {
        self.layers.iter().any(|l| l.id == id || l.data_file.as_ref().is_some_and(|d| d.id == id))
    }

    /// The format of a backing file: what the overlay states, else what the caller states, never a guess. What
    /// the overlay states must agree with the file's magic: a raw disk must not be read as an image because its
    /// guest wrote a qcow2 header into it, nor an image's metadata as the content of a raw disk. If the caller
    /// and the overlay both say "raw", the user knows that the disk's content looks like an image. A format
    /// that this engine does not read may be recognised by its magic: such a layer is only locked, never read
    /// or written.
    fn backing_format(
        &self,
        named: &Named<'_>,
        cluster0: &Cluster0,
        path: &Path,
        (id, kind): (FileId, FileKind),
        storage: &dyn Storage,
    ) -> Result<ImageFormat> {
        let Named { image, written, name, .. } = *named;
        let text = || String::from_utf8_lossy(written).into_owned();
        let given = self.given_format(written, path, id)?;
        let Some(declared) = cluster0.backing_format().or_else(|| name.format().map(str::to_owned)) else {
            let missing = || Error::refused(image, Refusal::MissingFormat { name: text() });
            return match (given, ImageFormat::detect(path, storage)?) {
                (None, found @ ImageFormat::Foreign(_)) => Ok(found),
                (None, _) => Err(missing()),
                (Some(given), found) if found == given => Ok(given),
                // If the caller is wrong, reading shows wrong bytes, but does no damage.
                (Some(ImageFormat::Raw), ImageFormat::Foreign(_)) if self.access(id) == Access::Read => {
                    Ok(ImageFormat::Raw)
                }
                // Only the caller says so, and the file's magic says otherwise. Guest data written over an
                // image's header could not be undone.
                (Some(given), found) => Err(mismatch(image, text(), given, found)),
            };
        };
        let Some(format) = declared_format(&declared, kind) else {
            let offset = cluster0.extension(EXT_BACKING_FORMAT).map_or(0, |e| e.offset);
            let error = FormatError::unsupported("backing format", offset, declared, "raw or qcow2");
            return Err(Error::format(image, error));
        };
        if let Some(given) = given.filter(|&given| given != format) {
            return Err(Error::Usage(format!(
                "{}: the format {} was given for its backing file '{}', but the image says {declared}",
                shown(image),
                given.name(),
                text(),
            )));
        }
        let found = ImageFormat::detect(path, storage)?;
        let is_right = given.is_some() || format.agrees_with(found);
        if is_right { Ok(format) } else { Err(mismatch(image, text(), format, found)) }
    }

    fn given_format(&self, written: &[u8], path: &Path, id: FileId) -> Result<Option<ImageFormat>> {
        for (key, &format) in &self.options.backing_formats {
            let is_named = key == path || key.as_os_str().as_encoded_bytes() == written;
            if is_named || self.id_of(key)? == Some(id) {
                return Ok(Some(format));
            }
        }
        Ok(None)
    }

    fn finish(self) -> Result<Chain> {
        let mut layers = self.layers;
        layers.reverse();
        for (at, layer) in layers.iter_mut().enumerate() {
            layer.index = at + 1;
        }
        Ok(Chain { layers })
    }
}

/// The format that an overlay states. QEMU also takes the drivers `file` and `host_device` as formats: they
/// show the bytes as they are.
fn declared_format(name: &str, kind: FileKind) -> Option<ImageFormat> {
    match (name, kind) {
        ("file", FileKind::Regular) | ("host_device", FileKind::Block) => Some(ImageFormat::Raw),
        _ => ImageFormat::from_name(name),
    }
}

fn mismatch(image: &Path, name: String, declared: ImageFormat, found: ImageFormat) -> Error {
    let found = match found {
        ImageFormat::Raw => None,
        found => Some(found.name()),
    };
    Error::refused(image, Refusal::FormatMismatch { name, declared: declared.name(), found })
}

fn not_local(image: &Path, role: Role, written: &[u8], why: String) -> Error {
    let name = String::from_utf8_lossy(written).into_owned();
    Error::refused(image, Refusal::NotLocal { role, name, why })
}
