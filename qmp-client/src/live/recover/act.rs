//! Acts on an interrupted merge. Each action takes a permission that only the judge ([`crate::State::judge`])
//! can give.

use std::path::{Path, PathBuf};

use qcow2::Result;
use qcow2::retire::Interrupted;
use qcow2::stamp::Stamp;
use qcow2::storage::OsHost;

use super::finding::{Deed, Fact, Finding, Found, Next, Trouble};
use super::{Case, look};
use crate::live::tidy::{StaysReason, Tidied, Tidy, TidyOptions};
use crate::live::verdict::{NotSwitched, RelinkBack, Switched};
use crate::state::{Kind, StateLayer};

impl Case<'_> {
    /// Ends a merge that has not switched: the chain is as it was.
    pub(super) fn not_switched(&self, leave: NotSwitched<'_>) -> Result<Finding> {
        let state = leave.state();
        look::free(state.layers.iter())?;
        let mut finding = self.finding(Found::NotSwitched);
        finding.valid_top = state.active().map(|layer| layer.file.clone());
        finding.facts.push(Fact::NothingSwitched);
        self.forget(&mut finding);
        if state.kind != Kind::Pull {
            finding.next = Some(self.offline());
        }
        Ok(finding)
    }

    /// Ends a complete merge: its obsolete layers become empty overlays on base, or are removed if the user
    /// asked for that.
    pub(super) fn switched(&self, leave: Switched<'_>, obsolete: &[(&StateLayer, Stamp)]) -> Result<Finding> {
        let state = leave.state();
        let mut finding = self.finding(Found::Completed);
        finding.valid_top = state.layers_after().next().map(|layer| layer.file.clone());
        match state.kind {
            Kind::Pull => {
                finding.facts.push(Fact::Pulled(state.merged().map(|layer| layer.file.clone()).collect()));
            }
            Kind::Commit => finding.facts.push(Fact::Complete),
            Kind::ActiveCommit => finding.facts.push(Fact::GuestMoved),
        }
        if state.kind != Kind::Pull {
            self.clean(leave, obsolete, &mut finding)?;
        }
        self.forget(&mut finding);
        Ok(finding)
    }

    /// Relinks the overlay to its former backing file. `opened` are the images, still locked from the
    /// comparison.
    pub(super) fn relink_back(&self, leave: RelinkBack<'_>, mut opened: Interrupted) -> Result<Finding> {
        let state = leave.state();
        let (overlay, name) = state
            .backing
            .as_ref()
            .map(|relink| (relink.overlay.clone(), relink.old.clone()))
            .unwrap_or_default();
        if !self.options.dry_run {
            opened.relink_back(&OsHost, &name)?;
        }
        drop(opened);
        let mut finding = self.finding(Found::RelinkedBack);
        finding.valid_top = state.active().map(|layer| layer.file.clone());
        let base = state.layer(state.base).map(|base| base.file.clone()).unwrap_or_default();
        finding.facts.push(Fact::BaseLacks { base, at: leave.at });
        finding.did.push(Deed::RelinkBack { overlay, name });
        self.forget(&mut finding);
        finding.next = Some(self.offline());
        Ok(finding)
    }

    /// Removes layers, or turns them into empty overlays on base. `obsolete` are the layers from the top, as
    /// they were seen.
    fn clean(
        &self,
        leave: Switched<'_>,
        obsolete: &[(&StateLayer, Stamp)],
        finding: &mut Finding,
    ) -> Result<()> {
        let state = leave.state();
        let mut options = TidyOptions::new(state.delete, &[]);
        options.no_lock = self.options.no_lock || self.options.dry_run;
        let mut tidied = Tidied::default();
        let (dry_run, cancel) = (self.options.dry_run, self.options.cancel);
        Tidy { switched: leave, options: &options, dry_run, cancel }.run(obsolete, &mut tidied);
        if let Some(error) = tidied.error {
            return Err(error);
        }
        if !tidied.deleted.is_empty() {
            finding.did.push(Deed::Remove(tidied.deleted));
        }
        if !tidied.emptied.is_empty() {
            let base = state.layer(state.base).map(|base| base.file.clone()).unwrap_or_default();
            finding.did.push(Deed::Empty { files: tidied.emptied, base });
        }
        let stays = |(file, why): (PathBuf, StaysReason)| Fact::Stays { file, why };
        finding.facts.extend(tidied.stale.into_iter().map(stays));
        Ok(())
    }

    /// Removes the state file, because everything that it notes is done.
    fn forget(&self, finding: &mut Finding) {
        let file = &self.merge.file;
        if !self.options.dry_run
            && let Err(error) = file.forget(&self.merge.state)
        {
            finding.trouble = Some(Trouble::NotForgotten(error));
            return;
        }
        finding.did.push(Deed::Forget(Path::to_owned(file.path())));
    }

    fn offline(&self) -> Next {
        Next::Offline { active: self.merge.state.top_before() }
    }
}
