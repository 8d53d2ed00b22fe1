//! Unfinished merges: what their journals tell, and how a merge goes on with one, or gives it up.

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
pub(crate) mod unfinished_work;
pub(crate) mod work;
