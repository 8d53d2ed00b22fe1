//! `qmerge live commit` and `qmerge live pull`: turns arguments into a request, and shows the plan.

use qcow2::error::shown;
use qmp_client::ways::not_begun;
use qmp_client::{Connection, End, Nothing, Planned, Prepared, Request, Room, Run, TidyOptions};

use super::follow::Follow;
use super::outcome::Outcome;
use super::plan::{show, text};
use super::trouble::{self, Session};
use super::{find, guard, look};
use crate::cli::{JobArgs, LiveCommitArgs, LivePullArgs};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::human::printable;
use crate::output::json::value;
use crate::output::progress::Meter;
use crate::output::size;
use crate::signals::Stop;

/// `live commit`.
pub(super) fn commit(
    session: &Session<'_>,
    monitor: Connection,
    args: &LiveCommitArgs,
    console: &Console,
) -> Result<Exit, Failure> {
    let request = args.request();
    MergeCall { session, disk: &args.disk, job: &args.job, request, what: "merging", console }.run(monitor)
}

/// `live pull`.
pub(super) fn pull(
    session: &Session<'_>,
    monitor: Connection,
    args: &LivePullArgs,
    console: &Console,
) -> Result<Exit, Failure> {
    let request = args.request();
    MergeCall { session, disk: &args.disk, job: &args.job, request, what: "pulling", console }.run(monitor)
}

/// A call that begins a merge, or goes on with it.
struct MergeCall<'a> {
    session: &'a Session<'a>,
    disk: &'a str,
    job: &'a JobArgs,
    request: Request,
    /// What is being done, as a participle.
    what: &'static str,
    console: &'a Console,
}

impl MergeCall<'_> {
    fn run(&self, monitor: Connection) -> Result<Exit, Failure> {
        let (session, console) = (self.session, self.console);
        let machine = look(session, &monitor)?;
        let disk = find(&machine, self.disk, session)?;
        guard::disk(session, disk)?;
        // Only the writes of a guest's device can be limited.
        let can_converge = disk.qdev().is_some();
        let prepared = machine.prepare(disk, &self.request);
        let mut merge = match prepared.map_err(|e| session.unplanned(&e, disk, &self.request))? {
            Prepared::Nothing(why) => return self.nothing_to_do(disk.name(), &why),
            Prepared::Finish(left) => {
                let options = self.tidy();
                Outcome::of_left(session, &machine, disk, &left, &options, console)?.tell(console)?;
                return Ok(Exit::DONE);
            }
            Prepared::UnderWay(merge) => *merge,
            Prepared::Merge(planned) => {
                self.announce(&planned)?;
                if self.request.dry_run {
                    console.note("dry run: nothing was changed");
                    return Ok(Exit::DONE);
                }
                let (throttle, end) = (planned.throttle.clone(), planned.plan.end);
                let written = planned.plan.relink.iter().map(|(overlay, _)| &overlay.file);
                let written: Vec<String> = written.chain([&planned.plan.receiver().file]).cloned().collect();
                let mut merge = planned.begin().map_err(|e| match &e {
                    qmp_client::Error::Refused { .. } => session.unplanned(&e, disk, &self.request),
                    _ => session.failure_with(&e, &not_begun(&e, &written, &session.wanted())),
                })?;
                if self.request.wait {
                    Outcome::started(session, &qmp_client::Driver::outline(&merge)).tell(console)?;
                    return Ok(Exit::DONE);
                }
                let mut follow = self.follow(end, can_converge)?;
                follow.run.throttle = throttle;
                let step = follow.step(&mut merge)?;
                drop(merge);
                drop(machine);
                drop(monitor);
                return follow.until_over(step);
            }
            _ => return Ok(Exit::DONE),
        };
        let outline = qmp_client::Driver::outline(&merge);
        if self.request.dry_run || self.request.wait {
            Outcome::started(session, &outline).tell(console)?;
            return Ok(Exit::DONE);
        }
        console.note(&format!("picked up again: the merge of {} is under way", printable(disk.name())));
        let mut follow = self.follow(self.request.end(outline.merges_active()), can_converge)?;
        follow.run.throttle = match self.request.converge {
            true => Some(machine.throttle(disk).map_err(|e| session.failure(&e))?),
            false => None,
        };
        let step = follow.step(&mut merge)?;
        drop(merge);
        drop(machine);
        drop(monitor);
        follow.until_over(step)
    }

    /// What to do with the files that are no longer needed.
    fn tidy(&self) -> TidyOptions {
        let mut options = TidyOptions::new(self.request.delete, &self.request.scan);
        options.no_lock = self.request.no_lock;
        options
    }

    fn follow(&self, end: End, can_converge: bool) -> Result<Follow<'_>, Failure> {
        let mut run = Run::new(self.session.address, self.disk, end);
        run.owns = true;
        run.timeout = self.job.timeout;
        run.state_dir.clone_from(&self.job.state_dir);
        run.tidy = self.tidy();
        Ok(Follow {
            session: self.session,
            console: self.console,
            meter: Meter::new(self.console, self.what),
            stop: Stop::watch().map_err(|e| trouble::no_signals(self.session, &e))?,
            run,
            can_converge,
        })
    }

    fn nothing_to_do(&self, disk: &str, why: &Nothing) -> Result<Exit, Failure> {
        let why = match why {
            Nothing::MergedBefore { into } => {
                let top = self.request.top.as_deref().unwrap_or_default();
                format!("{top} was already merged into {}", shown(into))
            }
            Nothing::NothingBetween => "no layer lies between".to_owned(),
            _ => "its chain has one layer".to_owned(),
        };
        self.console.event(
            "result",
            serde_json::json!({ "disk": disk, "status": "nothing-to-do", "nothing-to-do": why }),
        )?;
        self.console.result(&format!("nothing to do for {}: {why}", printable(disk)))?;
        Ok(Exit::DONE)
    }

    /// Shows the plan: on standard error, unless it is all that the user asked for.
    fn announce(&self, planned: &Planned<'_>) -> Result<(), Failure> {
        let (plan, console) = (&planned.plan, self.console);
        for job in &planned.begins_anew {
            console.note(&format!(
                "an earlier merge (job {}) ended without a switch; nothing is lost, it begins anew",
                printable(job)
            ));
        }
        console.event("plan", value(plan))?;
        if self.request.dry_run {
            // An active commit makes base durable itself.
            let flush = match &plan.relink {
                Some(_) => format!(" ({} is flushed before job-finalize)", show(plan.receiver())),
                None => String::new(),
            };
            let commands = plan.commands.iter().map(|(name, arguments)| {
                format!("  {}\n", printable(&format!(r#"{{"execute": "{name}", "arguments": {arguments}}}"#)))
            });
            let commands: String = commands.collect();
            console.result(&format!("{}\n\ncommands for QEMU{flush}:\n{commands}", text(plan)))?;
        } else if !console.is_json() {
            console.note(&text(plan));
        }
        if let (Room::Scarce, Some((folder, free))) = (planned.room, &plan.room) {
            console.note(&format!(
                "the room may not be enough: {} grows by up to {}, and {} are free in {}; if it is full, the job waits for room",
                show(plan.receiver()),
                size::exact(plan.growth()),
                size::exact(*free),
                folder.display()
            ));
        }
        Ok(())
    }
}
