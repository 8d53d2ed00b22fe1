//! Flattens a chain into one new file.
//!
//! A flatten is a merge of all layers into an empty image. The plan is made with an empty image in memory. The
//! work is done in a file with a temporary name, which gets its final name when everything is durable, or on a
//! block device. No input
//! is written; all of them are locked for reading.

mod device;
mod lost;
mod new_image;
mod plan;
mod target;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

use crate::chain::view::View;
use crate::chain::{Chain, Layer, OpenOptions, new_backing_name};
use crate::error::{Error, FileOp, Refusal, Result, shown};
use crate::image::alloc::Allocator;
use crate::image::create::dir_of;
use crate::image::refcounts::Refcounts;
use crate::image::{Image, ImageFormat, Lost, Qcow2};
use crate::merge::open_whole;
use crate::storage::{Host, MemFile, Storage};
use crate::transfer::{Job, Progress, Question, Run, Totals, Writer, Zeros};
use device::Device;
use new_image::{NewImage, new_image};
pub use plan::{FlattenOptions, FlattenPlan, FlattenReport};
use target::Temporary;

/// A flatten that is ready to be carried out: its chain is open and locked for reading.
#[derive(Debug)]
pub struct Flatten {
    host: Arc<dyn Host>,
    chain: Chain,
    /// How many layers stay below the new file.
    below: usize,
    new: NewImage,
    keep_zeros: bool,
    salvage: bool,
    /// The block device that takes the image, if it is one.
    device: Option<Device>,
    plan: FlattenPlan,
}

impl Flatten {
    /// Opens, locks and plans; nothing is written.
    ///
    /// # Errors
    /// What [`Chain::open`] reports; [`Error::Usage`] for a base that is not below the active image, or
    /// with a raw output, and for a snapshot that there is not; [`Error::Refused`] if the output exists or has no room for its backing name;
    /// [`Error::NoSpace`]; [`Error::Cancelled`].
    pub fn prepare(
        host: Arc<dyn Host>,
        active: &Path,
        options: &FlattenOptions,
        cancel: &AtomicBool,
    ) -> Result<Self> {
        let output = &options.output;
        if !options.onto_device {
            target::refuse_existing(&*host, output)?;
        }
        let open = OpenOptions {
            lock: true,
            access: Default::default(),
            as_qemu: true,
            salvage: options.salvage,
            ..options.open.clone()
        };
        let mut chain = open_whole(&*host, active, &open, None)?;
        if let Some(name) = &options.snapshot {
            show_snapshot(&mut chain, name)?;
        }
        let device = match options.onto_device {
            true => Some(Device::open(&*host, output, &chain)?),
            false => None,
        };
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
            snapshot: options.snapshot.clone(),
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
        plan.totals = with_job(&chain, below, &empty, (zeros, None, true), |job| job.plan(cancel))?;
        plan.file_size_after = new.file_size(output, &plan.totals)?;
        match &device {
            Some(device) => {
                if options.to == ImageFormat::Raw {
                    plan.file_size_after = plan.virtual_size;
                }
                device.judge_size(output, plan.file_size_after)?;
            }
            None => plan.is_room_unknown = is_room_unknown(&*host, &plan)?,
        }
        let (keep_zeros, salvage) = (options.keep_zeros, options.salvage);
        Ok(Self { host, chain, below, new, keep_zeros, salvage, device, plan })
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
    /// file stays behind, unless the process is killed; a device has lost what it held.
    pub fn execute(self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<FlattenReport> {
        let start = Instant::now();
        let report = match &self.device {
            Some(device) => self.onto(device, progress, cancel),
            None => self.beside(progress, cancel),
        };
        report.map(|report| FlattenReport { elapsed: start.elapsed(), ..report })
    }

    fn beside(&self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<FlattenReport> {
        let output = &self.plan.output;
        let temporary = Temporary::create(&*self.host, output)?;
        let file = temporary.file();
        let clusters = self.plan.totals.clusters_to_allocate;
        let image = self.new.write(temporary.path(), Arc::clone(file), clusters)?;
        let report = self.fill(&image, file, progress, cancel)?;
        temporary.give_name(output, &self.inputs())?;
        Ok(report)
    }

    /// Writes the image onto a block device. Nothing of what that held shows afterwards; a qcow2 image there begins to be one
    /// when all else is durable.
    fn onto(&self, device: &Device, progress: &dyn Progress, cancel: &AtomicBool) -> Result<FlattenReport> {
        let output = &self.plan.output;
        let clusters = self.plan.totals.clusters_to_allocate;
        device.clear(output, 0, Some(self.new.empty_size(output, clusters)?))?;
        let image = self.new.write(output, Arc::clone(device.file()), clusters)?;
        match self.new {
            NewImage::Raw { size } => {
                // The guest sees all of the device.
                device.clear(output, size, None)?;
                self.fill(&image, device.file(), progress, cancel)
            }
            NewImage::Qcow2(_) => {
                let magic = device.take_magic(output)?;
                let report = self.fill(&image, device.file(), progress, cancel)?;
                device.write_magic(output, &magic)?;
                Ok(report)
            }
        }
    }

    /// Fills the empty image, which lies in `file`, durably.
    fn fill(
        &self,
        image: &Image,
        file: &Arc<dyn Storage>,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<FlattenReport> {
        let output = &self.plan.output;
        // What a raw device held shows where nothing is written.
        let is_blank = self.device.is_none() || image.as_qcow2().is_some();
        let total = if is_blank { self.plan.totals.bytes_to_write } else { self.plan.virtual_size };
        let done = AtomicU64::new(0);
        let run = Run { progress, total, done, cancel, journal: None };
        let zeros = if self.keep_zeros { Zeros::Mapped } else { Zeros::Read };
        let lost = self.salvage.then(Lost::default);
        let how = (zeros, lost.as_ref(), is_blank);
        let totals = with_job(&self.chain, self.below, image, how, |job| match image {
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
        let (lost, lists_all_lost) = match &lost {
            Some(lost) => lost::seen(lost, &self.chain, self.below)?,
            None => (Vec::new(), true),
        };
        Ok(FlattenReport {
            totals,
            file_size: stat.len,
            allocated: stat.allocated,
            lost,
            lists_all_lost,
            ..FlattenReport::default()
        })
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

/// Whether the file system does not say that there is room for the new file.
///
/// # Errors
/// [`Error::NoSpace`]; the system's.
fn is_room_unknown(host: &dyn Host, plan: &FlattenPlan) -> Result<bool> {
    let dir = dir_of(&plan.output);
    let needed = plan.file_size_after;
    match host.free_space(dir).map_err(|e| Error::io(dir, FileOp::Stat, None, e))? {
        Some(available) if available < needed => {
            Err(Error::NoSpace { path: plan.output.clone(), needed, available })
        }
        available => Ok(available.is_none()),
    }
}

/// Lets the active image show its internal snapshot.
fn show_snapshot(chain: &mut Chain, name: &OsStr) -> Result<()> {
    match chain.image_at(chain.active())? {
        Image::Qcow2(image) => image.show_snapshot(name.as_bytes()),
        other => Err(Error::Usage(format!(
            "{}: a {} image has no internal snapshots",
            shown(other.path()),
            other.format().name()
        ))),
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

/// Calls `f` with the job that merges all layers but the first `below` into `new`, the image on top of those.
fn with_job<T>(
    chain: &Chain,
    below: usize,
    new: &Image,
    (zeros, lost, is_blank): (Zeros, Option<&Lost>, bool),
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
        only: None,
        // Where the new image is not blank, it needs the zeros, too.
        base_size: if is_blank { size } else { 0 },
        zero_until: size,
        limit: u64::MAX,
    };
    let (new_size, from) = (new.virtual_size(), crate::units::GuestOffset::ZERO);
    f(&Job { layers: &layers, base: below, question, new_size, from, zeros, lost })
}

/// The refusal of an output that exists.
fn exists(output: &Path) -> Error {
    Error::refused(output, Refusal::Exists)
}

#[cfg(test)]
mod salvage_tests;
#[cfg(test)]
mod tests;
