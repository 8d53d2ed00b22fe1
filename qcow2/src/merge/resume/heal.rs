//! Mends headers that a power cut has torn.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use crate::chain::{Chain, OpenOptions};
use crate::error::{Error, Result};
use crate::journal;
use crate::merge::options::CommitOptions;
use crate::storage::{Host, leads_nowhere};

/// Mends the headers of a chain that a power cut has torn while a merge changed them, from the records beside
/// the images. Each image is locked for that. Call this before a merge is prepared, because that refuses torn
/// headers. Returns which images were written.
///
/// # Errors
/// What [`Chain::open`] reports; [`Error::InUse`] if there is something to do and somebody holds the image;
/// [`Refusal::JournalOfAnother`](crate::Refusal::JournalOfAnother); [`Refusal::JournalVersion`](crate::Refusal::JournalVersion).
pub fn heal(host: &dyn Host, active: &Path, options: &CommitOptions) -> Result<Vec<PathBuf>> {
    if host.stat(active).is_err_and(|e| leads_nowhere(&e)) {
        // `prepare` reports this error, or knows that the merge has removed the image.
        return Ok(Vec::new());
    }
    let healed = RefCell::new(Vec::new());
    let heal_one = |path: &Path| {
        if journal::heal(host, path, options.journal_dir.as_deref(), options.open.no_locks)? {
            healed.borrow_mut().push(path.to_owned());
        }
        Ok(())
    };
    let open = OpenOptions { lock: false, ..options.open.clone() };
    let chain = Chain::open_after(host, active, &open, &heal_one)?;
    if let Some(top) = &options.top
        && let Err(Error::Usage(_)) = chain.find(host, top)
    {
        // A layer that was merged is not in the chain any more. Its last mark may be torn.
        heal_one(Path::new(top))?;
    }
    Ok(healed.into_inner())
}

/// Mends the header of one image, as [`heal`] does for those of a chain. Call this before a merge into it is
/// given up. `dir` holds journals that are not beside their images. Returns whether the image was written.
///
/// # Errors
/// As [`heal`], but for those of the chain.
pub fn heal_image(host: &dyn Host, path: &Path, open: &OpenOptions, dir: Option<&Path>) -> Result<bool> {
    journal::heal(host, path, dir, open.no_locks)
}
