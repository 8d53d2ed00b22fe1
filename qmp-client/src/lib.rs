//! The library that drives a running QEMU over QMP, its control socket.
//!
//! From the ground up, each floor usable by itself:
//!
//! - [`Address`]: where a monitor listens, as a user writes it.
//! - [`Message`], [`request`], [`reply`]: lines of QMP. Unknown events, fields and error classes are
//!   data, never a reason to lose the connection.
//! - [`Connection`]: numbered commands; each reply goes to the command whose number it carries, and a late
//!   one is recognised and dropped. [`Monitor`] is its trait, which a test can implement; [`Execute`] adds
//!   the typed commands.
//! - [`Owner`]: whether a monitor belongs to libvirt or another manager, whose own commands are to be used.
//! - [`Graph`]: the disks, and the chain of each, with layers counted from the bottom.
//! - [`Job`]: a job as a state machine, whoever started it. Events are hints; the query is the truth.
//!
//! ```no_run
//! use qmp_client::{Address, Connection, Graph, Options};
//!
//! let address: Address = "/run/vm1/qmp.sock".parse()?;
//! let monitor = Connection::connect(&address, &Options::default())?;
//! for layer in Graph::ask(&monitor)?.disk("vda")?.layers() {
//!     println!("[{}] {}", layer.index, layer.file);
//! }
//! # Ok::<(), qmp_client::Error>(())
//! ```
//!
//! The types of commands and answers are those of the `qapi` crate ([`qapi::qmp`]). Its transports are
//! not used: a QMP connection of theirs is lost on an unknown event, and out of step after a time-out.
//!
//! - [`snapshot()`]: new overlays for several disks in one transaction, undone if anything fails.
//! - [`Procedure`]: the live merge, down into a base ([`Procedure::commit`]) or up into the active layer
//!   ([`Procedure::pull`]), with the hazards of QEMU 10.0.2 fenced.
//! - [`State`], [`StateFile`]: what must be known of a merge after its client, or QEMU, has gone.
//! - [`libvirt`]: which domains of libvirt name an image, and what to type where libvirt owns the machine.
//! - [`Merge`]: a commit or pull with its job and its state file, each step in the right order.

mod block;
mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod libvirt;
mod live;
mod qmp;
#[cfg(test)]
#[path = "../../testdata/skipped.rs"]
mod skipped;
mod state;

pub use block::foreign::conclude;
pub use block::graph::{Backing, Disk, Graph, Layer, Range};
pub use block::jobs::{BlockJobState, Goal, Job, JobState, Progress, Waited, Watch, cancel, jobs};
pub use block::merge::{Direction, MergeOptions, Merged, Procedure};
pub use block::servers::nbd_server;
pub use block::snapshot::{UnfinishedSnapshot, is_of_a_snapshot, snapshot, unfinished_snapshots};
pub use error::{Error, Refusal, Result, StateFault};
pub use live::discover::{Files, Searched, Unfinished, folders_of_disks, folders_of_image, sweep_folders};
pub use live::machine::{Machine, Settled};
pub use live::outline::{Outline, OutlineLayer, Relink};
pub use live::plan::{
    Amounts, DataFate, End, Leaves, Nothing, Obstacle, Plan, Planned, Prepared, Request, Room,
};
pub use live::recover::{Deed, Fact, Finding, Found, Next, Recovery, Trouble};
pub use live::run::{Copying, Driver, Ended, Event as RunEvent, How, Left, Run, Step, Stopped};
pub use live::tidy::{Tidied, TidyOptions};
pub use live::verdict::{Compared, Doubt, Header, Leads, Seen, Treated, Verdict};
pub use live::{Hindrance, Merge, Throttle, Wishes};
pub use qapi;
pub use qcow2;
pub use qmp::address::Address;
pub use qmp::connection::{Connection, Options};
pub use qmp::message::{Event, Failure, Message, reply, request};
pub use qmp::monitor::{Execute, Monitor, patience};
pub use qmp::owner::Owner;
pub use state::{
    FileIdentity, Kind, Phase, Qemu, Rename, State, StateFile, StateLayer, Throttled, find_states, states_in,
    states_of, sweep,
};
