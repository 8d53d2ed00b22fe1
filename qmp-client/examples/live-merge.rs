//! A live merge: everything into the base of a disk's chain, while the guest runs.
//!
//! ```text
//! cargo run -p qmp-client --example live-merge -- /run/vm1/qmp.sock vda
//! ```
//!
//! It plans, shows the plan, runs, follows, and leaves the merged layers as empty overlays on the base.

use std::error::Error;

use qmp_client::{Address, Connection, How, Machine, Options, Prepared, Request, Run, RunEvent, Step, Watch};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(address), Some(disk)) = (arguments.next(), arguments.next()) else {
        return Err("name a monitor and a disk".into());
    };
    merge(&address.parse()?, &disk)
}

/// Merges all layers of the disk into its base, and moves the guest there.
pub fn merge(address: &Address, disk: &str) -> Result<(), Box<dyn Error>> {
    let monitor = Connection::connect(address, &Options::default())?;
    let machine = Machine::look(&monitor, address)?;
    let mut request = Request::commit();
    request.pivot = true;
    let Prepared::Merge(planned) = machine.prepare(machine.graph().disk(disk)?, &request)? else {
        return Err("there is nothing to merge, or an earlier merge is to be ended first".into());
    };
    for layer in &planned.plan.merged {
        println!("{} goes into {}", layer.file, planned.plan.receiver().file);
    }
    let mut run = Run::new(address, disk, planned.plan.end);
    run.owns = true;
    let mut merge = planned.begin()?;
    let step = run.follow(&mut merge, &mut |event| {
        if let RunEvent::Copied { done, total } = event {
            println!("{done} of {total} bytes");
        }
        Watch::GoOn
    })?;
    match step {
        Step::Over(ended) => {
            println!("{disk} is in {} now", ended.merge.valid_top);
            if let How::Switched(tidied) = ended.how {
                println!("empty overlays on it: {:?}; not yet tidied: {:?}", tidied.emptied, tidied.kept);
            }
        }
        Step::Stalled => return Err("no room: make some, resume the job, and call Run::take_turns".into()),
    }
    Ok(())
}
