//! Merges that leave the active layer where it is: its header, or that of another overlay, says which chain stands.

use std::path::{Path, PathBuf};

use qcow2::chain::{OpenOptions, Policy};
use qcow2::retire::{BackingIs, Interrupted, Known};
use qcow2::storage::{Host, OsHost};
use qcow2::{Error, Result};
use qmp_client::{Header, Kind, Phase, Qemu, StateLayer, Verdict};

use super::Case;
use super::look::{self, Same, Seen};
use super::tell::Finding;
use crate::cmd::live::obstacle::Obstacle;
use crate::cmd::live::tidy::{Tidied, Tidy, Wishes};
use crate::hint::word;
use crate::output::human::shell_word;

/// The layers of a merge that are still to be dealt with, and what they are.
pub(super) struct Merged<'a> {
    /// Those that are there, from the top.
    pub(super) left: Vec<(&'a StateLayer, Same)>,
    /// How many of them an earlier clean-up has emptied or marked.
    pub(super) treated: usize,
    /// Gone, by whomever.
    pub(super) gone: usize,
}

impl<'a> Case<'a> {
    /// A commit of layers below the active one.
    pub(super) fn commit(&self) -> Result<Finding> {
        let state = self.state;
        let (Some(overlay), Some(base)) = (state.layer(state.top + 1), state.layer(state.base)) else {
            return Ok(self.moved("it names no overlay and no base"));
        };
        if Obstacle::of_base(base).is_some() {
            return self.by_name(overlay);
        }
        let (Seen::Same(above), Seen::Same(below)) =
            (look::layer(state, overlay)?, look::layer(state, base)?)
        else {
            return Ok(self.moved("the overlay or the base is not the file that it was"));
        };
        let (name, leads_to) = look::backing(Path::new(&overlay.file))?;
        let top = state.layer(state.top).map(|layer| look::layer(state, layer)).transpose()?;
        if let Some(Seen::Same(top)) = &top
            && leads_to == Some(top.known.id)
        {
            return self.not_switched();
        }
        if leads_to != Some(below.known.id) {
            let name = name.unwrap_or_else(|| "nothing".to_owned());
            return Ok(self.unclear(
                format!(
                    "{} has {name} as its backing file, which is neither top nor base of this merge",
                    overlay.file
                ),
                format!(
                    "see the chain (qmerge info --chain {}); if it is right: rm {}",
                    self.active(),
                    self.path()
                ),
            ));
        }
        let merged = match self.merged(state.merged())? {
            Ok(merged) => merged,
            Err(finding) => return Ok(*finding),
        };
        let certain = state.phase == Phase::Switched || (merged.gone == 0 && merged.treated > 0);
        if merged.treated + merged.gone > 0 {
            return if certain { self.complete(&merged) } else { Ok(self.cannot_compare()) };
        }
        self.compare(overlay, &above, base, &below, &merged)
    }

    /// A commit into a base of which only the name can be looked at.
    fn by_name(&self, overlay: &StateLayer) -> Result<Finding> {
        let state = self.state;
        let Seen::Same(_) = look::layer(state, overlay)? else {
            return Ok(self.moved(&format!("{} is not the file that it was", overlay.file)));
        };
        let header = match look::backing(Path::new(&overlay.file))?.0 {
            Some(name) => Header::Names(name),
            None => Header::Nothing,
        };
        match state.judge(&look::all(state, Qemu::Gone, header)?) {
            Verdict::NotSwitched => self.not_switched(),
            Verdict::Switched => match self.merged(state.merged())? {
                Ok(merged) => self.complete(&merged),
                Err(finding) => Ok(*finding),
            },
            Verdict::InDoubt { why, .. } => Ok(self.in_doubt(why)),
            Verdict::AtWork => Ok(self.in_doubt("QEMU has the job".to_owned())),
        }
    }

    /// What the state and the files tell is not enough.
    pub(super) fn in_doubt(&self, why: String) -> Finding {
        let active = self.active();
        self.unclear(
            why,
            format!(
                "see the chain (qmerge info --chain {active}); when it is right as it stands: rm {}",
                self.path()
            ),
        )
    }

    /// Compares base with what was merged into it, and decides for the one chain or the other.
    fn compare(
        &self,
        overlay: &StateLayer,
        above: &Same,
        base: &StateLayer,
        below: &Same,
        merged: &Merged<'_>,
    ) -> Result<Finding> {
        let state = self.state;
        let known: Vec<Known> = merged.left.iter().map(|(_, same)| same.known.clone()).collect();
        let any =
            |known: &Known| Known { len: None, modified_ns: None, no_locks: self.no_lock, ..known.clone() };
        let options = self.options();
        let opened =
            Interrupted::open(&OsHost, Some(&any(&above.known)), &known, &any(&below.known), &options);
        let mut opened = match opened {
            Ok(opened) => opened,
            // QEMU called it a success, and has the base of a disk that runs; the merged layers are free, or not.
            Err(Error::InUse { .. }) if state.phase == Phase::Switched => return self.complete(merged),
            Err(error) => return Err(error),
        };
        if opened.backing() != BackingIs::Base {
            return Ok(self.moved("the overlay's backing file changed while it was looked at"));
        }
        let Some(at) = opened.first_difference(base.virtual_size, self.meter, self.stop.flag())? else {
            drop(opened);
            return self.complete(merged);
        };
        let times_tell = merged.left.iter().all(|(_, same)| same.written.is_some());
        if !times_tell || (state.phase == Phase::Switched && below.written != Some(false)) {
            return Ok(self.base_differs(base, at.get()));
        }
        let old = state.backing.as_ref().map(|rename| rename.old.clone()).unwrap_or_default();
        if !self.dry_run {
            opened.point_back(&OsHost, &old)?;
        }
        drop(opened);
        let mut finding = Finding::new(self, "pointed-back");
        finding.valid_top = state.active().map(|layer| layer.file.clone());
        finding.facts.push(format!(
            "QEMU had switched, but {} does not hold all that was merged (the first such byte of the disk is {at})",
            base.file
        ));
        finding.did.push(format!("give {} its former backing file back: {old}", overlay.file));
        self.forget(&mut finding);
        finding.next = Some(self.offline());
        Ok(finding)
    }

    /// A pull: the active layer took in those below it.
    pub(super) fn pull(&self) -> Result<Finding> {
        let state = self.state;
        let Some(active) = state.active() else { return Ok(self.moved("it names no image")) };
        let Seen::Same(_) = look::layer(state, active)? else {
            return Ok(self.moved("the active image is not the file that it was"));
        };
        let (name, leads_to) = look::backing(Path::new(&active.file))?;
        let file_of = |index| state.layer(index).map(|layer| look::layer(state, layer)).transpose();
        let is =
            |seen: &Option<Seen>| matches!(seen, Some(Seen::Same(same)) if leads_to == Some(same.known.id));
        // What is no file here is known by its name.
        let names = |wanted: Option<&str>| leads_to.is_none() && name.is_some() && name.as_deref() == wanted;
        let rename = state.backing.as_ref();
        if is(&file_of(state.top)?) || names(rename.map(|rename| rename.old.as_str())) {
            return self.not_switched();
        }
        let is_base = || Ok::<_, Error>(is(&file_of(state.base)?));
        let new = names(rename.and_then(|rename| rename.new.as_deref()));
        let switched = if state.base == 0 { name.is_none() } else { new || is_base()? };
        if !switched {
            return Ok(self
                .moved("the active image's backing file is neither what it was nor what it should become"));
        }
        let mut finding = Finding::new(self, "completed");
        finding.valid_top = Some(active.file.clone());
        let files: Vec<_> = state.merged().map(|layer| layer.file.as_str()).collect();
        finding.facts.push(format!(
            "the pull is complete; this disk no longer needs {}, which others may use",
            files.join(", ")
        ));
        self.forget(&mut finding);
        Ok(finding)
    }

    /// Nothing was switched: the chain is as it was.
    pub(super) fn not_switched(&self) -> Result<Finding> {
        look::free(self.state.layers.iter())?;
        let mut finding = Finding::new(self, "not-switched");
        finding.valid_top = self.state.active().map(|layer| layer.file.clone());
        finding
            .facts
            .push("nothing was switched: the chain is as it was, and shows the same disk".to_owned());
        self.forget(&mut finding);
        if self.state.kind != Kind::Pull {
            finding.next = Some(self.offline());
        }
        Ok(finding)
    }

    /// The merge is complete: what it left becomes empty overlays on base, or is removed if that was the wish.
    pub(super) fn complete(&self, merged: &Merged<'_>) -> Result<Finding> {
        let mut finding = Finding::new(self, "completed");
        finding.valid_top = self.state.left().next().map(|layer| layer.file.clone());
        finding.facts.push("the merge is complete".to_owned());
        self.clean(&merged.left, &mut finding)?;
        self.forget(&mut finding);
        Ok(finding)
    }

    /// Removes layers, or makes them empty overlays on base: from the top, as they are now.
    pub(super) fn clean(&self, left: &[(&StateLayer, Same)], finding: &mut Finding) -> Result<()> {
        let state = self.state;
        let base = state.layer(state.base).map_or("", |layer| layer.file.as_str());
        let wishes = Wishes { delete: state.delete, scan: Vec::new(), no_lock: self.no_lock };
        let known: Vec<_> = left.iter().map(|(layer, same)| (*layer, same.known.clone())).collect();
        let mut tidied = Tidied::default();
        let tidy = Tidy { state, wishes: &wishes, dry_run: self.dry_run, cancel: self.stop.flag() };
        tidy.run(&known, &mut tidied);
        if let Some(error) = tidied.error {
            return Err(error);
        }
        let list = |files: &[PathBuf]| {
            files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ")
        };
        if !tidied.deleted.is_empty() {
            finding.did.push(format!("remove {}", list(&tidied.deleted)));
        }
        if !tidied.emptied.is_empty() {
            let what = if tidied.emptied.len() == 1 { "an empty overlay" } else { "empty overlays" };
            finding.did.push(format!("make {} {what} on {base}", list(&tidied.emptied)));
        }
        for (file, why) in &tidied.stale {
            finding.facts.push(format!("{} stays as it is: {why}", file.display()));
        }
        Ok(())
    }

    /// What the merged layers are now; or the finding that one of them is not what it was.
    pub(super) fn merged(
        &self,
        layers: impl Iterator<Item = &'a StateLayer>,
    ) -> Result<std::result::Result<Merged<'a>, Box<Finding>>> {
        let mut merged = Merged { left: Vec::new(), treated: 0, gone: 0 };
        let base = self.state.layer(self.state.base).and_then(|base| OsHost.stat(Path::new(&base.file)).ok());
        for layer in layers {
            let path = Path::new(&layer.file);
            match look::layer(self.state, layer)? {
                Seen::Gone => merged.gone += 1,
                Seen::Other => {
                    return Ok(Err(Box::new(
                        self.moved(&format!("{} is not the file that it was", layer.file)),
                    )));
                }
                Seen::Same(same) => {
                    let emptied = base.as_ref().map(|base| look::is_empty_on(path, base.id)).transpose()?;
                    let begun = emptied == Some(true) || look::is_sealed(path)?;
                    let treated = begun || look::is_marked(path)?;
                    if !treated && same.written == Some(true) {
                        return Ok(Err(Box::new(self.touched(layer))));
                    }
                    merged.treated += usize::from(treated);
                    // What an earlier clean-up has begun is ended.
                    merged.left.push((layer, same));
                }
            }
        }
        Ok(Ok(merged))
    }

    /// Somebody has written to a layer that was merged.
    fn touched(&self, layer: &StateLayer) -> Finding {
        let (file, active) = (&layer.file, self.active());
        let chain = match self.state.phase {
            Phase::Switched => "the chain as it stands is complete, by QEMU's word",
            _ => "the chain as it stands may lack data, which cannot be told any more",
        };
        self.unclear(
            format!("{file} was merged, and somebody has written to it since; {chain}"),
            format!(
                "find out who opened {file}; if the disk is right as it is (qmerge check {active}): rm {}",
                self.path()
            ),
        )
    }

    fn cannot_compare(&self) -> Finding {
        self.unclear(
            "QEMU was about to switch, and merged layers are gone, so nobody can tell whether base holds what they held"
                .to_owned(),
            format!(
                "put the missing layers back, then again: {}; or, if the disk is right as it is: rm {}",
                self.call.again(),
                self.path()
            ),
        )
    }

    fn base_differs(&self, base: &StateLayer, at: u64) -> Finding {
        let old = self.state.backing.as_ref().map(|rename| (rename.old.as_str(), rename.overlay.as_str()));
        let (old, overlay) = old.unwrap_or_default();
        let format = self.state.layer(self.state.top).map_or("qcow2", |layer| layer.format.as_str());
        self.unclear(
            format!(
                "{} differs from what was merged into it (first at byte {at} of the disk): either somebody has written to \
                 it since, and it is what is wanted; or it has lost data, and the merged layers still hold it",
                base.file
            ),
            format!(
                "if base is right: rm {}; if the merged layers are: qemu-img rebase -u -F {format} -b {} {}",
                self.path(),
                shell_word(old),
                shell_word(overlay)
            ),
        )
    }

    /// The command that merges the same layers of the stopped machine.
    pub(super) fn offline(&self) -> String {
        self.offline_below(self.state.active().map_or("", |layer| &layer.file))
    }

    /// The same, with this image as the active one.
    pub(super) fn offline_below(&self, active: &str) -> String {
        let state = self.state;
        let file = |index| state.layer(index).map_or("", |layer| layer.file.as_str());
        let top = if file(state.top) == active {
            String::new()
        } else {
            format!(" --top {}", shell_word(file(state.top)))
        };
        let delete = if state.delete { " --delete" } else { "" };
        format!("qmerge commit {} --base {}{top}{delete}", shell_word(active), shell_word(file(state.base)))
    }

    /// How images are opened: as their headers say, wherever that leads. The format of top is known.
    pub(super) fn options(&self) -> OpenOptions {
        let active_format = self.state.layer(self.state.top).map(look::format);
        let no_locks = self.no_lock;
        OpenOptions { policy: Policy::local_files(), active_format, no_locks, ..OpenOptions::default() }
    }

    /// The image that was active, as one types it.
    pub(super) fn active(&self) -> String {
        self.state.active().map_or(String::new(), |layer| shell_word(&layer.file))
    }

    /// The state file, as one types it.
    pub(super) fn path(&self) -> String {
        word(self.file.path())
    }
}
