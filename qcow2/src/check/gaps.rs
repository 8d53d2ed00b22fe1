//! Keeps account of the parts of an image that could not be read. References counted without them are not to be
//! relied on: an unread table may refer to any cluster.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::error::Result;

use super::counts::Counts;
use super::finding::{Findings, Unread};

/// How many gaps are remembered with their place.
const KEPT: usize = 1000;

/// What could not be read on the way through an image. Its receiver must decide: [`Gaps::none`] makes an error
/// of it, [`Gaps::report`] a finding.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Gaps(Mutex<Vec<Unread>>);

impl Gaps {
    /// Notes that something could not be read.
    pub(crate) fn note(&self, unread: Unread) {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if list.len() < KEPT {
            list.push(unread);
        }
    }

    /// Adds the gaps of another walk.
    pub(crate) fn join(&self, other: Self) {
        other.into_list().into_iter().for_each(|unread| self.note(unread));
    }

    /// Succeeds only if everything was read.
    ///
    /// # Errors
    /// The first read that failed.
    pub(crate) fn none(self, path: &Path) -> Result<()> {
        match self.into_list().into_iter().min_by_key(|unread| unread.offset) {
            None => Ok(()),
            Some(unread) => Err(unread.error(path)),
        }
    }

    /// Makes findings of what could not be read.
    pub(crate) fn report(self, findings: &Findings) {
        self.into_list().into_iter().for_each(|unread| findings.add_unread(unread));
    }

    fn into_list(self) -> Vec<Unread> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The counted references of a window, and the gaps in the count. The counts cannot be taken out without saying
/// what happens with the gaps.
#[derive(Debug)]
pub(crate) struct Counted<'a> {
    path: &'a Path,
    counts: &'a Counts,
    gaps: Gaps,
}

impl<'a> Counted<'a> {
    pub(crate) fn new(path: &'a Path, counts: &'a Counts, gaps: Gaps) -> Self {
        Self { path, counts, gaps }
    }

    /// The counts, if every reference was read.
    ///
    /// # Errors
    /// The first read that failed.
    pub(crate) fn whole(self) -> Result<&'a Counts> {
        self.gaps.none(self.path)?;
        Ok(self.counts)
    }

    /// The counts, even with gaps; each gap becomes a finding.
    pub(crate) fn noted(self, findings: &Findings) -> &'a Counts {
        self.gaps.report(findings);
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::super::counts::Width;
    use super::super::finding::{Severity, Structure};
    use super::*;

    #[test]
    fn a_count_with_a_gap_is_an_error_or_a_finding() {
        let counts = Counts::new(4, Width::Narrow).unwrap();
        let gap =
            |offset| Unread { structure: Structure::L2Table, offset, source: io::Error::other("bad sector") };
        let with_gaps = || {
            let gaps = Gaps::default();
            gaps.note(gap(0x400));
            gaps.note(gap(0x200));
            Counted::new(Path::new("/image"), &counts, gaps)
        };
        assert!(Counted::new(Path::new("/image"), &counts, Gaps::default()).whole().is_ok());
        let error = with_gaps().whole().unwrap_err().to_string();
        assert!(error.contains("0x200") && error.contains("bad sector"), "{error}");
        let findings = Findings::new(10);
        with_gaps().noted(&findings);
        // The same sector in a later window is the same trouble.
        with_gaps().noted(&findings);
        assert_eq!(findings.count(Severity::Error), 2);
        assert!(findings.is_incomplete() && findings.is_damaged());
    }
}
