//! Preparing a pull: its chain is opened and judged, and what will be done is planned.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::{PreparedPull, Pull, PullOptions, PullPlan};
use crate::chain::Chain;
use crate::error::{Error, FileOp, Result, shown};
use crate::journal;
use crate::journal::record::{Header, Purpose};
use crate::merge::resume::describe::describe;
use crate::merge::safety;
use crate::merge::up::{self, Lower, Up};
use crate::storage::Host;
use crate::transfer::ask::Span;

impl Pull {
    /// Opens, locks, judges and plans; nothing is written. Headers that a power cut has torn must be whole: see
    /// [`heal`](crate::merge::heal()).
    ///
    /// # Errors
    /// [`Refusal::TornHeader`](crate::Refusal::TornHeader), [`Refusal::UnfinishedMerge`](crate::Refusal::UnfinishedMerge); what [`Chain::open`] reports; [`Error::Usage`] for a base that is
    /// not below the image; [`Error::Refused`] for every safety rule; [`Error::NoSpace`]; [`Error::Cancelled`].
    pub fn prepare(
        host: Arc<dyn Host>,
        active: &Path,
        options: &PullOptions,
        cancel: &AtomicBool,
    ) -> Result<PreparedPull> {
        let dir = options.up.journal_dir.as_deref();
        let id = host.stat(active).map_err(|e| Error::io(active, FileOp::Open, None, e))?.id;
        let mut chain = up::open(&*host, active, &options.up.open, Some(id), dir, |_| Ok(()))?;
        let (at, base) = (chain.active(), base_of(&*host, &chain, options)?);
        let unfinished = up::unfinished(&*host, &mut chain, dir)?;
        let is_ours = unfinished.as_ref().is_some_and(|(work, _)| work.is_ours());
        let layer = chain.layer(at)?;
        let image = up::judge(layer, &options.up, is_ours)?;
        let lower = Lower::Layer(base);
        let backing_name = base.map(|base| up::name_of(&*host, layer, chain.layer(base)?)).transpose()?;
        let mut plan = PullPlan {
            active: layer.path.clone(),
            base: base.map(|base| Ok::<_, Error>(chain.layer(base)?.path.clone())).transpose()?,
            pulled: pulled(&chain, base),
            virtual_size: image.virtual_size(),
            is_resumed: is_ours,
            backing_name: backing_name.clone(),
            ..PullPlan::default()
        };
        if plan.pulled.is_empty() && unfinished.is_none() {
            return Ok(PreparedPull::Nothing(Box::new(plan)));
        }
        up::fits(image, backing_name.as_deref().zip(lower.format(&chain)?))?;
        journal::place(&*host, &layer.path, &**layer.image.file(), dir, journal::JOURNAL)?;
        let leaks = safety::consistent(layer, cancel)?;
        let totals = lower.with_job(&chain.images(), |job| job.plan(cancel))?;
        plan.totals = totals;
        (plan.file_size_after, plan.is_room_unknown) = up::room(&*host, layer, image, totals)?;
        let span = Span { base: base.unwrap_or(0), top: at, active: at };
        let header = Header {
            purpose: Purpose::Pull,
            // No index leads to this pull.
            top_index: 0,
            total: totals.bytes_to_write,
            ..describe(&*host, &chain, span, at)?
        };
        let up = Up {
            host,
            options: options.up.clone(),
            chain,
            lower,
            totals,
            backing_name,
            header,
            unfinished,
            leaks,
        };
        Ok(PreparedPull::Ready(Box::new(Self { plan, up })))
    }
}

/// The position of the layer that is to be the backing file.
fn base_of(host: &dyn Host, chain: &Chain, options: &PullOptions) -> Result<Option<usize>> {
    let Some(name) = &options.base else { return Ok(None) };
    let base = chain.find(host, name)?;
    if base >= chain.active() {
        let path = shown(&chain.layer(base)?.path);
        return Err(Error::Usage(format!("base [{}] {path} must lie below the image", base + 1)));
    }
    Ok(Some(base))
}

/// The layers whose data is taken in, the uppermost first.
fn pulled(chain: &Chain, base: Option<usize>) -> Vec<std::path::PathBuf> {
    let first = base.map_or(0, |base| base + 1);
    let layers = chain.layers().get(first..chain.active()).unwrap_or_default();
    layers.iter().rev().map(|layer| layer.path.clone()).collect()
}
