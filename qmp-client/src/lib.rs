//! A QMP client for disk image merges.
