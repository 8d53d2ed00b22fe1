//! Flattens a chain into one new file.
//!
//! A flatten is a merge of all layers into an empty image. The plan is made with an empty image in memory. The
//! work is done in a file with a temporary name, which gets its final name when everything is durable. No input
//! is written; all of them are locked for reading.

mod target;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};

use crate::chain::view::View;
use crate::chain::{Chain, Layer, OpenOptions, new_backing_name};
use crate::error::{Error, FileOp, Refusal, Result, shown};
use crate::image::alloc::Allocator;
use crate::image::create::{CreateOptions, NewImageLayout, dir_of, whole_sectors};
use crate::image::refcounts::Refcounts;
use crate::image::{Image, ImageFormat, Qcow2, Raw};
use crate::merge::open_whole;
use crate::serial;
use crate::storage::{Host, MemFile, Storage};
use crate::transfer::{Job, Progress, Question, Run, Totals, Writer, Zeros};
use target::Temporary;

/// What a caller may ask of a flatten.
#[derive(Clone, Debug)]
pub struct FlattenOptions {
    /// How the chain is opened: policy and formats. The flatten sets access and locks itself.
    pub open: OpenOptions,
    /// The new file. It must not exist.
    pub output: PathBuf,
    /// Its format.
    pub to: ImageFormat,
    /// Flatten only the layers above this one, given by path or index. The new file gets it as its backing
    /// file.
    pub base: Option<OsString>,
    /// Write zeros that lie among the data, instead of leaving holes for runs of 4 KiB or more.
    pub keep_zeros: bool,
}

/// What a flatten will do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FlattenPlan {
    /// The chain's active image.
    #[serde(serialize_with = "serial::name")]
    pub active: PathBuf,
    /// The new file.
    #[serde(serialize_with = "serial::name")]
    pub output: PathBuf,
    /// Its format.
    #[serde(rename = "format")]
    pub to: ImageFormat,
    /// The layer that becomes its backing file.
    #[serde(serialize_with = "serial::some_name")]
    pub base: Option<PathBuf>,
    /// The backing name that is written into it.
    #[serde(rename = "backing-filename", serialize_with = "serial::some_name")]
    pub backing_name: Option<OsString>,
    /// The size of its disk in bytes.
    pub virtual_size: u64,
    /// What is copied and taken.
    #[serde(flatten, serialize_with = "moved")]
    pub totals: Totals,
    /// The most bytes that the new file will take on the disk. (A raw file is as long as its disk, but with
    /// holes.)
    pub file_size_after: u64,
    /// Whether the file system does not say how much is free.
    #[serde(rename = "room-unknown")]
    pub is_room_unknown: bool,
}

/// The result of a flatten.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FlattenReport {
    /// What was copied and taken.
    #[serde(flatten, serialize_with = "moved")]
    pub totals: Totals,
    /// The length of the new file in bytes.
    #[serde(rename = "file-size-after")]
    pub file_size: u64,
    /// Bytes that it holds on the disk.
    #[serde(rename = "actual-size")]
    pub allocated: u64,
    /// How long it took.
    #[serde(rename = "seconds", serialize_with = "serial::seconds")]
    pub elapsed: Duration,
}

/// The totals as programs get them, without those that say nothing of their own here: a flatten writes all that
/// it copies.
fn moved<S: Serializer>(totals: &Totals, to: S) -> std::result::Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    #[serde(rename_all = "kebab-case")]
    struct Moved {
        bytes_to_copy: u64,
        bytes_to_zero: u64,
        clusters_to_allocate: u64,
    }
    let Totals { bytes_to_copy, bytes_to_zero, clusters_to_allocate, .. } = *totals;
    Moved { bytes_to_copy, bytes_to_zero, clusters_to_allocate }.serialize(to)
}

/// A flatten that is ready to be carried out: its chain is open and locked for reading.
#[derive(Debug)]
pub struct Flatten {
    host: Arc<dyn Host>,
    chain: Chain,
    /// How many layers stay below the new file.
    below: usize,
    new: NewImage,
    keep_zeros: bool,
    plan: FlattenPlan,
}

/// The kind of file that is made.
#[derive(Clone, Debug)]
enum NewImage {
    Raw { size: u64 },
    Qcow2(CreateOptions),
}

impl Flatten {
    /// Opens, locks and plans; nothing is written.
    ///
    /// # Errors
    /// What [`Chain::open`] reports; [`Error::Usage`] for a base that is not below the active image, or
    /// with a raw output; [`Error::Refused`] if the output exists or has no room for its backing name;
    /// [`Error::NoSpace`]; [`Error::Cancelled`].
    pub fn prepare(
        host: Arc<dyn Host>,
        active: &Path,
        options: &FlattenOptions,
        cancel: &AtomicBool,
    ) -> Result<Self> {
        let output = &options.output;
        target::refuse_existing(&*host, output)?;
        let open =
            OpenOptions { lock: true, access: Default::default(), as_qemu: true, ..options.open.clone() };
        let chain = open_whole(&*host, active, &open, None)?;
        let below = match &options.base {
            Some(name) => below(&*host, &chain, name, options.to)?,
            None => 0,
        };
        let backing = match below.checked_sub(1).and_then(|at| chain.layers().get(at)) {
            Some(base) => Some((base, backing_of(&*host, base, output)?)),
            None => None,
        };
        let new = new_image(&chain, options, backing.as_ref().map(|(_, backing)| backing.clone()))?;
        let mut plan = FlattenPlan {
            active: active.to_owned(),
            output: output.clone(),
            to: options.to,
            base: backing.as_ref().map(|(base, _)| base.path.clone()),
            backing_name: backing.map(|(_, (name, _))| OsString::from_vec(name)),
            virtual_size: 0,
            totals: Totals::default(),
            file_size_after: 0,
            is_room_unknown: false,
        };
        let empty = new.write(output, Arc::new(MemFile::new()), 0)?;
        plan.virtual_size = empty.virtual_size();
        // The plan does not read the data to find zeros in it, so its figures are upper bounds.
        let zeros = if options.keep_zeros { Zeros::Mapped } else { Zeros::Holes };
        plan.totals = with_job(&chain, below, &empty, zeros, |job| job.plan(cancel))?;
        plan.file_size_after = new.file_size(output, &plan.totals)?;
        let dir = dir_of(output);
        match host.free_space(dir).map_err(|e| Error::io(dir, FileOp::Stat, None, e))? {
            Some(available) if available < plan.file_size_after => {
                let needed = plan.file_size_after;
                return Err(Error::NoSpace { path: output.clone(), needed, available });
            }
            available => plan.is_room_unknown = available.is_none(),
        }
        Ok(Self { host, chain, below, new, keep_zeros: options.keep_zeros, plan })
    }

    /// What will be done.
    pub fn plan(&self) -> &FlattenPlan {
        &self.plan
    }

    /// The layers whose files were cut short: their tables place clusters behind the end of the file, which
    /// read as zeros, as in QEMU.
    pub fn cut_short(&self) -> Vec<PathBuf> {
        let cut = self
            .chain
            .layers()
            .iter()
            .filter(|layer| layer.image.as_qcow2().is_some_and(Qcow2::has_read_behind_end));
        cut.map(|layer| layer.path.clone()).collect()
    }

    /// The chain, open and locked for reading.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Carries the plan out. When it returns, the new file and its name are durable.
    ///
    /// # Errors
    /// An I/O error; [`Error::Refused`] if the output exists by now; [`Error::Cancelled`]. After an error no
    /// file stays behind, unless the process is killed.
    pub fn execute(self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<FlattenReport> {
        let start = Instant::now();
        let output = &self.plan.output;
        let temporary = Temporary::create(&*self.host, output)?;
        let file = temporary.file();
        let planned = self.plan.totals;
        let image = self.new.write(temporary.path(), Arc::clone(file), planned.clusters_to_allocate)?;
        let done = AtomicU64::new(0);
        let run = Run { progress, total: planned.bytes_to_write, done, cancel, journal: None };
        let zeros = if self.keep_zeros { Zeros::Mapped } else { Zeros::Read };
        let totals = with_job(&self.chain, self.below, &image, zeros, |job| match &image {
            Image::Raw(_) => job.run(None, &run),
            Image::Foreign(foreign) => Err(foreign.refuse()),
            Image::Qcow2(image) => {
                let refcounts = Refcounts::load(image)?;
                let allocator = Allocator::new(&refcounts);
                job.run(Some(&mut Writer { refcounts: &refcounts, allocator }), &run)
            }
        })?;
        file.sync().map_err(|e| Error::barrier(output, e))?;
        let stat = file.stat().map_err(|e| Error::io(output, FileOp::Stat, None, e))?;
        temporary.give_name(output, &self.inputs())?;
        Ok(FlattenReport { totals, file_size: stat.len, allocated: stat.allocated, elapsed: start.elapsed() })
    }
}

impl Flatten {
    /// The files whose content goes into the new file, the active image first.
    fn inputs(&self) -> Vec<&dyn Storage> {
        let layers = self.chain.layers().iter().skip(self.below).rev();
        let files = layers.flat_map(|layer| [layer.image.file(), layer.image.data_file()]);
        files.map(|file| &**file).collect()
    }
}

/// How many layers stay below the new file, if the layer `name` becomes its backing file.
fn below(host: &dyn Host, chain: &Chain, name: &OsStr, to: ImageFormat) -> Result<usize> {
    if to == ImageFormat::Raw {
        return Err(Error::Usage("a raw file has no backing file: a base needs qcow2".to_owned()));
    }
    let at = chain.find(host, name)?;
    if at >= chain.active() {
        return Err(Error::Usage(format!(
            "'{}' is the active image: there is nothing above it",
            shown(name)
        )));
    }
    Ok(at + 1)
}

/// The name by which the new file calls its backing file, and the format.
fn backing_of(host: &dyn Host, base: &Layer, output: &Path) -> Result<(Vec<u8>, String)> {
    let old = base.written_name.as_deref().unwrap_or_default();
    let name = new_backing_name(host, old, output, &base.path)?;
    Ok((name, base.image.format().name().to_owned()))
}

/// The kind of the new image. It takes cluster size and subclusters from the active image.
fn new_image(
    chain: &Chain,
    options: &FlattenOptions,
    backing: Option<(Vec<u8>, String)>,
) -> Result<NewImage> {
    let active = chain.layers().get(chain.active()).map(|layer| &layer.image);
    let size = active.map_or(0, Image::virtual_size);
    if options.to == ImageFormat::Raw {
        return Ok(NewImage::Raw { size: whole_sectors(&options.output, size)? });
    }
    let mut create = CreateOptions { backing, ..CreateOptions::new(size) };
    if let Some(qcow2) = active.and_then(Image::as_qcow2) {
        create.cluster_bits = qcow2.geometry().cluster_bits();
        create.extended_l2 = qcow2.geometry().extended_l2();
    }
    Ok(NewImage::Qcow2(create))
}

impl NewImage {
    /// Makes the empty image in `file`, with room for `clusters` clusters.
    fn write(&self, path: &Path, file: Arc<dyn Storage>, clusters: u64) -> Result<Image> {
        match self {
            Self::Raw { size } => {
                file.set_len(*size).map_err(|e| Error::io(path, FileOp::Grow, Some(*size), e))?;
                Ok(Image::Raw(Raw::open(path, file)?))
            }
            Self::Qcow2(options) => {
                NewImageLayout::of(path, options, clusters)?.write(path, &*file)?;
                Image::open(path, file, ImageFormat::Qcow2, None)
            }
        }
    }

    /// The most bytes that the file takes on the disk.
    fn file_size(&self, path: &Path, totals: &Totals) -> Result<u64> {
        match self {
            Self::Raw { .. } => Ok(totals.hole_bytes),
            Self::Qcow2(options) => {
                let clusters = totals.clusters_to_allocate;
                let data = clusters.saturating_mul(1 << options.cluster_bits);
                Ok(NewImageLayout::of(path, options, clusters)?.file_size().saturating_add(data))
            }
        }
    }
}

/// Calls `f` with the job that merges all layers but the first `below` into `new`, the image on top of those.
fn with_job<T>(
    chain: &Chain,
    below: usize,
    new: &Image,
    zeros: Zeros,
    f: impl FnOnce(&Job<'_>) -> Result<T>,
) -> Result<T> {
    let mut layers = chain.images();
    layers.insert(below.min(layers.len()), new);
    let view = View::new(&layers, below + 1, layers.len() - 1);
    let size = view.size();
    let below_size =
        below.checked_sub(1).and_then(|at| layers.get(at)).map_or(0, |image| image.virtual_size());
    let question = Question {
        view,
        base: new,
        below_size,
        own: None,
        base_size: size,
        zero_until: size,
        limit: u64::MAX,
    };
    let (new_size, from) = (new.virtual_size(), crate::units::GuestOffset::ZERO);
    f(&Job { layers: &layers, base: below, question, new_size, from, zeros })
}

/// The refusal of an output that exists.
fn exists(output: &Path) -> Error {
    Error::refused(output, Refusal::Exists)
}

#[cfg(test)]
mod tests;
