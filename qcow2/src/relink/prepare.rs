//! Preparing a relink, and carrying it out.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::plan::{NameChange, PreparedRelink, Relink, RelinkOptions, RelinkPlan, Vouched};
use super::prove::{self, Evidence};
use super::unfinished::refuse_unfinished;
use crate::chain::{BackingName, Chain, Layer, OpenOptions, Rename};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::{Cluster0, EXT_BACKING_FORMAT, EXT_DATA_FILE, Extension, NewNames, Switch, plan_names};
use crate::image::Qcow2;
use crate::image::rewrite::{read_cluster, rewrite_error};
use crate::journal::{Edit, edit_headers};
use crate::merge::resume::torn::refuse_torn_header;
use crate::merge::safety::one_meaning;
use crate::storage::{Access, Host};
use crate::transfer::Progress;

impl Relink {
    /// Opens, locks, judges and proves; nothing is written. A header that a power cut has torn must be whole: see
    /// [`heal_image`](crate::merge::heal_image).
    ///
    /// # Errors
    /// [`Refusal::TornHeader`], [`Refusal::UnfinishedMerge`]; what [`Chain::open`] reports of the chain with the new names;
    /// [`Refusal::NotProved`]; [`Refusal::HeaderRoom`]; [`Error::Cancelled`].
    pub fn prepare(
        host: Arc<dyn Host>,
        image: &Path,
        options: &RelinkOptions,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<PreparedRelink> {
        let dir = options.journal_dir.as_deref();
        refuse_torn_header(&*host, image, dir)?;
        let (chain, old, missing) = open(&*host, image, options)?;
        let layer = chain.layer(chain.active())?;
        let Some(qcow2) = layer.image.as_qcow2() else {
            return Err(Error::refused(image, Refusal::Raw));
        };
        if qcow2.header().is_corrupt() {
            return Err(Error::refused(image, Refusal::CorruptBit));
        }
        refuse_unfinished(&*host, &chain, dir)?;
        let mut plan = RelinkPlan {
            image: image.to_owned(),
            backing: None,
            data_file: None,
            atomic: true,
            missing_below: missing,
        };
        let evidence = Evidence { host: &*host, chain: &chain, old: &old, options, progress, cancel };
        let mut files = Vec::new();
        if let Some(name) = options.backing.as_deref() {
            let below = chain.active().checked_sub(1).map(|at| chain.layer(at)).transpose()?;
            let below = below.ok_or_else(|| Error::refused(image, Refusal::NoBackingFile))?;
            files.push((below.path.clone(), below.id));
            plan.backing = backing_change(&evidence, image, below, name)?;
        }
        if let Some(name) = options.data_file.as_deref() {
            let data = layer.data_file.as_ref().ok_or_else(|| Error::refused(image, Refusal::NoDataFile))?;
            files.push((data.path.clone(), data.id));
            plan.data_file = data_change(&evidence, image, name)?;
        }
        if plan.changes().next().is_none() {
            return Ok(PreparedRelink::Nothing(Box::new(plan)));
        }
        let doubtful = plan.changes().find_map(|(role, change)| {
            let doubt = change.proved.as_ref().err()?.clone();
            Some(Refusal::NotProved { role, file: change.file.clone(), doubt })
        });
        if let Some(reason) = doubtful.filter(|_| options.vouched != Vouched::Files) {
            return Err(Error::refused(image, reason));
        }
        let switch = edit(qcow2, &plan)?;
        plan.atomic = switch.atomic;
        let journal_dir = options.journal_dir.clone();
        Ok(PreparedRelink::Ready(Box::new(Self { host, chain, plan, switch, files, journal_dir })))
    }

    pub(super) fn execute(self) -> Result<()> {
        let layer = self.chain.layer(self.chain.active())?;
        // Somebody may have exchanged files meanwhile: what was proved is true of those that were opened.
        for (path, id) in self.files.iter().chain([&(layer.path.clone(), layer.id)]) {
            let now = self.host.stat(path).map_err(|e| Error::io(path, FileOp::Stat, None, e))?;
            if now.id != *id {
                return Err(Error::refused(path, Refusal::NameMoved));
            }
        }
        let writes = self.switch.writes.into_iter().map(|write| (write.offset, write.bytes)).collect();
        let edit =
            Edit { path: &layer.path, file: &**layer.image.file(), writes, atomic: self.switch.atomic };
        edit_headers(&*self.host, &[edit], self.journal_dir.as_deref())
    }
}

/// Opens the chain as it will be. Also what the header says now, and the file below that is missing, if one is.
fn open(
    host: &dyn Host,
    image: &Path,
    options: &RelinkOptions,
) -> Result<(Chain, Cluster0, Option<PathBuf>)> {
    let old = RefCell::new(None);
    let names = |cluster0: &mut Cluster0| {
        old.replace(Some(cluster0.clone()));
        let refuse = |reason| Err(Error::refused(image, reason));
        if let Some(name) = &options.backing {
            if cluster0.backing_name.is_none() {
                return refuse(Refusal::NoBackingFile);
            }
            let (name, old) = (name.as_bytes(), cluster0.backing_name.clone().unwrap_or_default());
            let said = |name: &[u8]| BackingName::parse(name).ok()?.format().map(str::to_owned);
            // A name may say the format, too. What the header says goes before that, so it follows a new name.
            let format = options.backing_format.map(|format| format.name().to_owned());
            let format = format.or_else(|| said(name)).or_else(|| cluster0.backing_format());
            if let Some(format) = format.or_else(|| said(&old)) {
                cluster0.set_extension(Extension::new(EXT_BACKING_FORMAT, format));
            }
            cluster0.backing_name = Some(name.to_vec());
        }
        if let Some(name) = &options.data_file {
            if !cluster0.header.has_data_file() || cluster0.data_file_name().is_none() {
                return refuse(Refusal::NoDataFile);
            }
            cluster0.set_extension(Extension::new(EXT_DATA_FILE, name.as_bytes()));
        }
        Ok(())
    };
    // What the image names now may be missing if that name stays; what it will name may not.
    let below = if options.backing.is_some() { 2 } else { 1 };
    let id = host.stat(image).map_err(|e| Error::io(image, FileOp::Open, None, e))?.id;
    let access = [(id, Access::ReadWrite)].into();
    let open = OpenOptions { lock: true, access, ..options.open.clone() };
    let (chain, missing) = Chain::open_renamed(host, image, &open, &Rename { names: &names, below })?;
    if chain.layer(chain.active())?.id != id {
        return Err(Error::refused(image, Refusal::NameMoved));
    }
    let missing = match missing {
        Some(Error::MissingLayer { resolved, .. }) => Some(resolved),
        _ => None,
    };
    let old = old.into_inner().ok_or_else(|| Error::refused(image, Refusal::Raw))?;
    Ok((chain, old, missing))
}

fn backing_change(
    evidence: &Evidence<'_>,
    image: &Path,
    below: &Layer,
    name: &OsStr,
) -> Result<Option<NameChange>> {
    let parsed = BackingName::parse(name.as_bytes());
    if let Ok(parsed) = &parsed {
        one_meaning(evidence.host, image, parsed)?;
    }
    let before = evidence.old.backing_name.clone().unwrap_or_default();
    let format = below.image.format();
    if before == name.as_bytes() && evidence.old.backing_format().as_deref() == Some(format.name()) {
        return Ok(None);
    }
    let proved = prove::backing(evidence, image, below)?;
    Ok(Some(NameChange {
        before: std::ffi::OsString::from_vec(before),
        after: name.to_owned(),
        file: below.path.clone(),
        format: Some(format),
        proved,
        merged_into: below.image.as_qcow2().and_then(obsolete),
    }))
}

/// The base that an image was merged into, if it keeps the data of that time.
fn obsolete(image: &Qcow2) -> Option<PathBuf> {
    image.cluster0().merged_into().filter(|_| image.cluster0().keeps_merged_data())
}

fn data_change(evidence: &Evidence<'_>, image: &Path, name: &OsStr) -> Result<Option<NameChange>> {
    let before = evidence.old.data_file_name().unwrap_or_default().to_vec();
    if before == name.as_bytes() {
        return Ok(None);
    }
    let layer = evidence.chain.layer(evidence.chain.active())?;
    let data = layer.data_file.as_ref().ok_or_else(|| Error::refused(image, Refusal::NoDataFile))?;
    Ok(Some(NameChange {
        before: std::ffi::OsString::from_vec(before),
        after: name.to_owned(),
        file: data.path.clone(),
        format: None,
        proved: prove::data_file(evidence, image, layer, data)?,
        merged_into: None,
    }))
}

/// The change of the header, as writes.
fn edit(image: &Qcow2, plan: &RelinkPlan) -> Result<Switch> {
    let backing = plan.backing.as_ref();
    let format = backing.and_then(|change| change.format).map_or("raw", |format| format.name());
    let names = NewNames {
        backing: backing.map(|change| (change.after.as_bytes(), format)),
        data_file: plan.data_file.as_ref().map(|change| change.after.as_bytes()),
    };
    let longest = plan.changes().map(|(_, change)| &change.after).max_by_key(|name| name.len());
    let longest = longest.cloned().unwrap_or_default();
    plan_names(&read_cluster(image)?, &names).map_err(|e| rewrite_error(image.path(), &longest, e))
}
