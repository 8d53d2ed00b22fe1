//! Live merges of disk image chains, in QEMUs and storage daemons that run, over QMP, their control socket.
//!
//! # A merge
//!
//! [`Machine::look`] asks QEMU for its disks. [`Machine::prepare`] makes a [`Plan`] of a [`Request`], or says what hinders it
//! ([`Hindrance`]). [`Planned::begin`] notes the merge in a state file and starts it. [`Run::follow`] stays with it to its end: the
//! disk has its shorter chain then, and the merged layers are empty overlays on base, or removed.
//!
//! ```no_run
//! use qmp_client::{Address, Connection, Machine, Options, Prepared, Request, Run, Watch};
//!
//! let address: Address = "/run/vm1/qmp.sock".parse()?;
//! let monitor = Connection::connect(&address, &Options::default())?;
//! let machine = Machine::look(&monitor, &address)?;
//! let mut request = Request::commit();
//! request.top = Some("[3]".into());
//! if let Prepared::Merge(planned) = machine.prepare(machine.graph().disk("vda")?, &request)? {
//!     println!("{} bytes are copied", planned.plan.bytes.copy);
//!     let mut run = Run::new(&address, "vda", planned.plan.end);
//!     let mut merge = planned.begin()?;
//!     run.follow(&mut merge, &mut |_| Watch::GoOn)?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # When something dies
//!
//! QEMU, this program or the host may end at any moment. The state file beside the active image says how far the merge was.
//! [`Machine::prepare`] finds it, and goes on where the merge was, if QEMU runs. [`Unfinished::recover`] needs no QEMU: it says
//! which image holds the disk, and puts right what is left, or says why only the user can know ([`Doubt`]). One judge decides
//! that, [`State::judge`], and fuzzers judge it.
//!
//! The examples `live-merge` and `live-recover` show both, whole.
//!
//! # The floors below
//!
//! Each is usable by itself:
//!
//! - [`Address`], [`Connection`]: numbered commands; each reply goes to the command whose number it carries, and a late one is
//!   dropped. Unknown events, fields and error classes are data. [`Monitor`] is its trait, which a test can implement;
//!   [`Execute`] adds the typed commands of the `qapi` crate ([`qapi::qmp`]).
//! - [`Owner`]: whether a monitor belongs to libvirt or another manager, whose own commands are to be used.
//! - [`Graph`]: the disks, and the chain of each, with layers counted from the bottom.
//! - [`Job`]: a job as a state machine, whoever started it. Events are hints; the query is the truth.
//! - [`snapshot()`]: new overlays for several disks in one transaction, undone if anything fails.
//! - [`Procedure`]: the live merge itself, down into a base ([`Procedure::commit`]) or up into the active layer
//!   ([`Procedure::pull`]), with the hazards of QEMU 10.0.2 fenced.
//! - [`State`], [`StateFile`]: what must be known of a merge after its client, or QEMU, has gone.
//! - [`Merge`]: a procedure with its job and its state file, each step in the right order.
//! - [`libvirt`]: which domains of libvirt name an image, and what to type where libvirt owns the machine.

mod block;
mod error;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod libvirt;
mod live;
mod qmp;
mod serial;
mod state;
pub mod ways;

pub use block::foreign::conclude;
pub use block::graph::{Backing, Disk, Graph, Layer, Range};
pub use block::jobs::{BlockJobState, Goal, Job, JobState, Progress, Waited, Watch, cancel, jobs};
pub use block::merge::{Direction, MergeOptions, Merged, Procedure};
pub use block::servers::nbd_server;
pub use block::snapshot::{Undone, UnfinishedSnapshot, is_of_a_snapshot, snapshot, unfinished_snapshots};
pub use error::{Error, Refusal, Result, StateFault};
pub use live::counterpart::{RunningMerge, StoppedMerge};
pub use live::discover::{
    Files, Interrupted, Searched, Unfinished, folders_of_disks, folders_of_image, sweep_folders,
    unbelieved_states,
};
pub use live::machine::{Machine, Settled};
pub use live::outline::{Outline, OutlineLayer, Relink};
pub use live::plan::{
    DataFate, End, Leaves, Nothing, Obstacle, Plan, Planned, PlannedBytes, Prepared, Request, Room,
};
pub use live::recover::{Deed, Fact, Finding, Found, Next, Recovery, Trouble};
pub use live::run::{AfterFailure, Copying, Driver, Ended, Event as RunEvent, How, Run, Step, Stopped};
pub use live::tidy::{StaysReason, Tidied, TidyOptions};
pub use live::verdict::{Compared, Doubt, Header, Leads, Seen, Treated, Verdict};
pub use live::{Hindrance, Merge, Throttle, Wishes};
pub use qapi;
pub use qcow2;
pub use qmp::address::Address;
pub use qmp::connection::{Connection, Options};
pub use qmp::message::{Event, Failure, Message, reply, request};
pub use qmp::monitor::{Execute, Monitor, patience};
pub use qmp::monitors::{is_machine, monitor_of};
pub use qmp::naming::{Named, words_naming};
pub use qmp::owner::Owner;
pub use state::{
    Kind, Phase, Qemu, RecordedRelink, State, StateFile, StateLayer, Throttled, find_states, states_in,
    states_of, sweep,
};
