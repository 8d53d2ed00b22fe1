//! The command under test, in a lab.

use std::path::Path;
use std::process::Command;

use super::Lab;
use crate::shell::type_hints;
use crate::{Run, end, run};

impl Lab {
    /// The command under test.
    pub fn command(&self) -> &Path {
        &self.command
    }

    /// The command under test with these arguments, to be run here.
    pub fn to_run(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.command);
        command.args(args).current_dir(self.dir());
        command
    }

    /// Runs `qmerge` here, and types no hint.
    #[track_caller]
    pub fn call(&self, args: &[&str]) -> Run {
        end(&mut self.to_run(args))
    }

    /// Runs `qmerge` here, and types the hints that it prints, if it does; see [`type_hints`].
    #[track_caller]
    pub fn qmerge(&self, args: &[&str]) -> Run {
        let run = self.call(args);
        type_hints(self, &run);
        run
    }

    /// Runs the built command here, and kills it when it is about to sync for the `call`-th time. False if it ends before.
    pub fn killed_at_sync(&self, call: u32, args: &[&str]) -> bool {
        self.signalled_at_sync("SIGKILL", call, args).code != 0
    }

    /// Runs the built command here, and sends it a signal when it is about to sync for the `call`-th time. It copies slowly
    /// if it may answer the signal: a thread of its own takes it, and comes late on a busy machine.
    pub fn signalled_at_sync(&self, signal: &str, call: u32, args: &[&str]) -> Run {
        let inject = format!("inject=fdatasync:signal={signal}:when={call}");
        let slowly = ["-e", "inject=fadvise64:delay_enter=100000"];
        let slowly: &[&str] = if signal == "SIGKILL" { &[] } else { &slowly };
        self.traced(&[&["-e", "trace=fdatasync,fadvise64", "-e", &inject], slowly].concat(), args)
    }

    /// Runs the built command here, and kills it when it is about to remove the file `name`. False if it ends before.
    pub fn killed_at_removal(&self, name: &str, args: &[&str]) -> bool {
        let kill = ["-e", "trace=?unlink,unlinkat", "-e", "inject=?unlink,unlinkat:signal=SIGKILL:when=1"];
        // By the bare name, as it is removed from its folder, which is open.
        self.traced(&[&kill[..], &["-P", name]].concat(), args).code != 0
    }

    /// Runs the built command here, and kills it when one of its threads is about to sync a folder for the `call`-th time.
    /// False if it ends before.
    pub fn killed_at_folder_sync(&self, call: u32, args: &[&str]) -> bool {
        let inject = format!("inject=fsync:signal=SIGKILL:when={call}");
        self.traced(&["-e", "trace=fsync", "-e", &inject], args).code != 0
    }

    /// Runs the built command here under strace with these options.
    pub fn traced(&self, options: &[&str], args: &[&str]) -> Run {
        let binary = self.command.display().to_string();
        let strace = ["-qq", "-f", "-o", "/dev/null"];
        run(self.dir(), "strace", &[&strace, options, &[&binary], args].concat())
    }

    /// Runs a merge that must succeed, keep what the guest sees through `active`, and leave every image sound.
    #[track_caller]
    pub fn merge(&self, active: &str, args: &[&str]) -> Run {
        let before = self.view("qcow2", active);
        let mut words = vec!["commit", active];
        words.extend(args);
        let run = self.qmerge(&words).ok();
        if self.join(active).exists() {
            self.view("qcow2", active).assert_same(&before, &format!("{run}\nthe view through {active}"));
        }
        self.all_clean();
        run
    }

    /// Fails unless `qmerge` refuses with one of `codes`, ends with a hint, and leaves every file as it was.
    #[track_caller]
    pub fn refused(&self, args: &[&str], codes: &[i32]) -> Run {
        let before = self.files();
        let run = self.qmerge(args);
        assert!(codes.contains(&run.code), "expected an exit code of {codes:?}:\n{run}");
        assert!(run.last_line().starts_with("hint: "), "the last line is no hint:\n{run}");
        self.assert_unchanged(&before, &run);
        run
    }

    /// As [`Self::refused`] with `code`, or done without a change.
    #[track_caller]
    pub fn refused_or_ok(&self, args: &[&str], code: i32) -> Run {
        let before = self.files();
        let run = self.qmerge(args);
        assert!(run.code == 0 || run.code == code, "expected exit code 0 or {code}:\n{run}");
        self.assert_unchanged(&before, &run);
        run
    }
}
