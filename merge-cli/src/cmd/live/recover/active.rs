//! Merges of the active layer: the guest goes on with base, and the image that it leaves is stale from then on.

use std::path::Path;

use qcow2::Result;
use qcow2::retire::{Interrupted, Known};
use qcow2::storage::OsHost;
use qcow2::{Error, ErrorKind, units::GuestOffset};
use qmp_client::{Header, Phase, Qemu, StateLayer, Verdict};

use super::Case;
use super::below::Merged;
use super::look::{self, Same, Seen};
use super::tell::Finding;
use crate::cmd::live::obstacle::Obstacle;
use crate::hint::word;

impl Case<'_> {
    /// A commit of all layers above base, the active one too.
    pub(super) fn active_commit(&self, qemu: Qemu) -> Result<Finding> {
        let state = self.state;
        let (Some(old), Some(base)) = (state.active(), state.layer(state.base)) else {
            return Ok(self.moved("it names no image"));
        };
        if Obstacle::of_base(base).is_some() {
            return self.onto_unknown(qemu, old, base);
        }
        let Seen::Same(below) = look::layer(state, base)? else {
            return Ok(self.moved(&format!("{} is not the file that it was", base.file)));
        };
        let seen = look::layer(state, old)?;
        if state.phase == Phase::Copying {
            return match seen {
                Seen::Same(_) if qemu == Qemu::ShowsAfter => Ok(self.runs_on_base(old, base)),
                Seen::Same(_) => self.not_switched(),
                _ => Ok(self.moved(&format!("{} is not the file that it was", old.file))),
            };
        }
        let rest = match self.merged(state.merged().filter(|layer| layer.index != old.index))? {
            Ok(rest) => rest,
            Err(finding) => return Ok(*finding),
        };
        let same = match seen {
            Seen::Other => return Ok(self.moved(&format!("{} is not the file that it was", old.file))),
            Seen::Gone => return self.retired(None, &rest),
            Seen::Same(same) => same,
        };
        let path = &same.known.path;
        let emptied = look::is_empty_on(path, below.known.id)? || look::is_sealed(path)?;
        let mut seen = qmp_client::Seen {
            retired: emptied,
            closing_writes_base: look::is_written_by_closing(base)?,
            ..look::all(state, qemu, Header::Unread)?
        };
        for (layer, file) in [(old, &same), (base, &below)] {
            if file.written.is_none() {
                seen.tells_no_time(state, layer.index);
            }
        }
        match state.judge(&seen) {
            Verdict::NotSwitched => self.not_switched(),
            // Where nobody has written to base, comparing is cheaper than being wrong.
            Verdict::Switched if below.written == Some(true) => self.retired(Some((old, &same)), &rest),
            _ if emptied || self.is_superseded(&same, &below, &rest)? => {
                self.retired(Some((old, &same)), &rest)
            }
            _ => Ok(self.two_disks(old, &same, base, &below)),
        }
    }

    /// Whether base holds all that the old active image shows, or held it when the guest moved there.
    fn is_superseded(&self, old: &Same, base: &Same, rest: &Merged<'_>) -> Result<bool> {
        // QEMU may have closed it after the state was noted; nobody else could open it before.
        let quiet =
            old.written == Some(false) || (old.modified_ns > 0 && old.modified_ns <= self.state.changed_ns);
        if quiet && (self.state.phase == Phase::Switched || base.written != Some(false)) {
            return Ok(true);
        }
        if rest.treated + rest.gone > 0 {
            // There is no old chain any more to compare base with.
            return Ok(quiet);
        }
        match self.difference(old, base, rest) {
            Ok(difference) => Ok(difference.is_none()),
            // Base was whole and durable when the state was noted.
            Err(Error::InUse { .. }) if quiet => Ok(true),
            // An image that only QEMU can read.
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(quiet),
            Err(error) => Err(error),
        }
    }

    fn difference(&self, old: &Same, base: &Same, rest: &Merged<'_>) -> Result<Option<GuestOffset>> {
        let mut merged = vec![old.known.clone()];
        merged.extend(rest.left.iter().map(|(_, same)| same.known.clone()));
        let any = Known { len: None, modified_ns: None, ..base.known.clone() };
        let opened = Interrupted::open(&OsHost, None, &merged, &any, &self.options())?;
        let size = self.state.layer(self.state.base).map_or(0, |layer| layer.virtual_size);
        opened.first_difference(size, self.meter, self.stop.flag())
    }

    /// A commit into a base that cannot be looked at: only the old active image tells.
    fn onto_unknown(&self, qemu: Qemu, old: &StateLayer, base: &StateLayer) -> Result<Finding> {
        let state = self.state;
        if state.phase == Phase::Copying && qemu == Qemu::ShowsAfter {
            return Ok(self.runs_on_base(old, base));
        }
        let rest = match self.merged(state.merged().filter(|layer| layer.index != old.index))? {
            Ok(rest) => rest,
            Err(finding) => return Ok(*finding),
        };
        let same = match look::layer(state, old)? {
            Seen::Same(same) => Some((old, same)),
            Seen::Gone => None,
            // It was no file here from the beginning.
            Seen::Other if old.identity.is_none() => None,
            Seen::Other => return Ok(self.moved(&format!("{} is not the file that it was", old.file))),
        };
        match state.judge(&look::all(state, qemu, Header::Unread)?) {
            Verdict::NotSwitched => self.not_switched(),
            Verdict::Switched => self.retired(same.as_ref().map(|(layer, same)| (*layer, same)), &rest),
            Verdict::InDoubt { why, .. } => Ok(self.in_doubt(why)),
            Verdict::AtWork => Ok(self.in_doubt("QEMU has the job".to_owned())),
        }
    }

    /// The disk is in base; the old active image and the layers below it become empty overlays on it, or go.
    fn retired(&self, old: Option<(&StateLayer, &Same)>, rest: &Merged<'_>) -> Result<Finding> {
        let state = self.state;
        let mut finding = Finding::new(self, "completed");
        let Some(base) = state.layer(state.base) else { return Ok(self.moved("it names no base")) };
        finding.valid_top = Some(base.file.clone());
        finding.facts.push("the merge is complete, and the guest had moved to base".to_owned());
        let old = old.map(|(layer, same)| (layer, same.clone()));
        let left: Vec<_> = old.into_iter().chain(rest.left.iter().cloned()).collect();
        self.clean(&left, &mut finding)?;
        self.forget(&mut finding);
        Ok(finding)
    }

    /// QEMU runs on base, and nobody has noted a pivot.
    fn runs_on_base(&self, old: &StateLayer, base: &StateLayer) -> Finding {
        let (old_file, base_file) = (&old.file, &base.file);
        self.unclear(
            format!(
                "QEMU runs on {base_file}, but no pivot is noted. Either another client has pivoted, and {base_file} is the \
                 disk; or somebody has started {base_file}, and what the guest wrote last is in {old_file}"
            ),
            format!(
                "shut the virtual machine down and start none before you know. To take {base}: mv {old} {old}.old; rm {state}; \
                 to take the other: rm {state}; qmerge commit {old}",
                base = word(Path::new(base_file)),
                old = word(Path::new(old_file)),
                state = self.path()
            ),
        )
    }

    /// The old active image holds bytes that base does not: somebody has written to it since.
    fn two_disks(&self, old: &StateLayer, active: &Same, base: &StateLayer, below: &Same) -> Finding {
        let (old_file, base_file) = (&old.file, &base.file);
        let when = |same: &Same| match same.written {
            Some(true) => "was written to since",
            Some(false) => "was not written to since",
            None => "keeps no time of its writes",
        };
        self.unclear(
            format!(
                "{old_file} holds bytes that {base_file} does not. Either the guest moved to {base_file}, which is the disk \
                 then, and somebody has opened {old_file} afterwards; or QEMU did not come to the switch, and the \
                 guest went on in {old_file}. {old_file} {}; {base_file} {}",
                when(active),
                when(below)
            ),
            format!(
                "start no virtual machine before you know; qmerge compare {} {} shows the first difference. To take base: \
                 mv {old} {old}.old; rm {state}; to take the other: rm {state}; qmerge commit {old}",
                word(Path::new(old_file)),
                word(Path::new(base_file)),
                old = word(Path::new(old_file)),
                state = self.path()
            ),
        )
    }
}
