//! Merges that were stopped: what their journals tell, and how they are taken up, or given up.

pub(crate) mod abort;
pub(crate) mod before;
pub(crate) mod describe;
pub(crate) mod emptied;
pub(crate) mod end;
pub(crate) mod heal;
pub(crate) mod obsolete;
pub(crate) mod samples;
pub(crate) mod torn;
pub(crate) mod unfinished;
pub(crate) mod work;
