//! Merges that were stopped: they go on by the names in the headers.

use std::path::Path;

use crate::chain::Chain;
use crate::error::{Error, Refusal, Result};
use crate::merge::resume::unfinished_work::UnfinishedWork;
use crate::storage::Host;

/// Refuses if a merge or a pull was stopped in a chain: it goes on by the names as they are.
///
/// # Errors
/// [`Refusal::UnfinishedMerge`]; the system's.
pub(super) fn refuse_unfinished(host: &dyn Host, chain: &Chain, dir: Option<&Path>) -> Result<()> {
    for layer in chain.layers() {
        let Some(work) = UnfinishedWork::find(host, layer, dir)? else { continue };
        let is_pending = work.merge().is_some_and(|merge| !merge.is_removing);
        if is_pending || (work.merge().is_none() && work.is_ours()) {
            let percent = work.percent();
            return Err(Error::refused(&layer.path, Refusal::UnfinishedMerge { percent }));
        }
    }
    Ok(())
}
