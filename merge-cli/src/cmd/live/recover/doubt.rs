//! Reports doubts that only the user can settle: what is uncertain, and what to do in each case.

use std::path::Path;

use qmp_client::{Doubt, Kind, Outline, Phase};

use crate::call::Call;
use crate::exit::Exit;
use crate::failure::Report;
use crate::hint::{Command, Hint, HintKind, Hints, relink, word};
use crate::output::human::printable;

/// The report of a doubt about a merge.
pub(super) fn report(merge: &Outline, doubt: &Doubt, call: &Call) -> Report {
    let case = Case { merge, call };
    let (why, hint) = case.words(doubt);
    let message = format!("{}: {why}; nothing was changed", merge.state_file().display());
    Report { kind: "unclear", message, hint, exit: Exit::REFUSED }
}

struct Case<'a> {
    merge: &'a Outline,
    call: &'a Call,
}

impl Case<'_> {
    fn words(&self, doubt: &Doubt) -> (String, Hints) {
        match doubt {
            Doubt::Moved { .. } => self.moved(doubt),
            Doubt::Written { file } => self.written(file),
            Doubt::LayersMissing => (
                doubt.to_string(),
                Hints::from(Hint::command(
                    HintKind::Again,
                    "put the missing layers back, then again",
                    self.call.again(),
                ))
                .or(self.forget("or, if the disk is right as it is")),
            ),
            Doubt::BaseDiffers { at } => self.base_differs(*at),
            Doubt::PivotUnseen => {
                let (old, base) = (self.old(), self.base());
                let why = format!(
                    "no pivot is noted, and {base} was written to and differs from {old}. Either the copy was not complete \
                     when QEMU ended, and {old} is the disk; or another client has pivoted (job-complete, job-finalize), and \
                     what the guest wrote last is in {base}"
                );
                (why, self.either("start no virtual machine before you know whether somebody has pivoted"))
            }
            Doubt::RunsOnBase => {
                let (old, base) = (self.old(), self.base());
                let why = format!(
                    "QEMU runs on {base}, but no pivot is noted. Either another client has pivoted, and {base} is the \
                     disk; or somebody has started {base}, and what the guest wrote last is in {old}"
                );
                (why, self.either("shut the virtual machine down and start none before you know"))
            }
            Doubt::TwoDisks { old_written, base_written } => self.two_disks(*old_written, *base_written),
            _ => {
                let why = doubt.to_string();
                let look = "see the chain; when it is right as it stands, remove the state file";
                (why, Hints::from(self.chain(look)).or(self.forget("if it is right as it stands")))
            }
        }
    }

    /// A file of the chain is not the one that the state speaks of.
    fn moved(&self, doubt: &Doubt) -> (String, Hints) {
        let why = format!("{doubt}, so this state may speak of other images than those that lie here");
        let back = "if the images were moved, put them back where they were; the chain as it stands";
        let hints = Hints::from(self.chain(back)).or(self.forget("if that chain is right"));
        (why, hints)
    }

    /// Somebody has written to a layer that was merged.
    fn written(&self, file: &str) -> (String, Hints) {
        let file = printable(file);
        let chain = match self.merge.phase {
            Phase::Switched => "the chain as it stands is complete, by QEMU's word",
            _ => "the chain as it stands may lack data, which cannot be told any more",
        };
        let check = Command::qmerge(["check"]).file(self.active());
        let look = format!("find out who opened {file}; whether the disk is sound as it is");
        let hints = Hints::from(Hint::command(HintKind::Check, look, check))
            .or(self.forget("if it is right as it is"));
        (format!("{file} was merged, and somebody has written to it since; {chain}"), hints)
    }

    fn base_differs(&self, at: u64) -> (String, Hints) {
        let why = format!(
            "{} differs from what was merged into it (first at byte {at} of the disk): either somebody has written to it \
             since, and it is what is wanted; or it has lost data, and the merged layers still hold it",
            self.base()
        );
        let right = self.forget("if base is right");
        let Some(relinked) = &self.merge.relink else { return (why, right.into()) };
        let format = self.merge.layer(self.merge.top).map_or("qcow2", |layer| layer.format.as_str());
        let command = relink(Path::new(&relinked.overlay), relinked.old.as_ref(), format, true);
        let state = word(self.merge.state_file());
        let before = format!("or, if the merged layers are, remove {state} first; then");
        let back = Hint::command(HintKind::NewName, before, command);
        (why, Hints::from(right).or(back))
    }

    /// The old active image holds bytes that base does not: somebody has written to it since.
    fn two_disks(&self, old_written: Option<bool>, base_written: Option<bool>) -> (String, Hints) {
        let (old, base) = (self.old(), self.base());
        let when = |written: Option<bool>| match written {
            Some(true) => "was written to since",
            Some(false) => "was not written to since",
            None => "keeps no time of its writes",
        };
        let why = format!(
            "{old} holds bytes that {base} does not. Either the guest moved to {base}, which is the disk then, and somebody \
             has opened {old} afterwards; or QEMU did not come to the switch, and the guest went on in {old}. {old} {}; \
             {base} {}",
            when(old_written),
            when(base_written)
        );
        let compare = format!(
            "start no virtual machine before you know; qmerge compare {} {} shows the first difference",
            word(Path::new(self.active())),
            word(Path::new(self.target()))
        );
        (why, self.either(&compare))
    }

    /// What to do for each of two disks.
    fn either(&self, before: &str) -> Hints {
        let (old, state) = (word(Path::new(self.active())), word(self.merge.state_file()));
        let base = word(Path::new(self.target()));
        Hint::advice(format!(
            "{before}. To take {base}: mv {old} {old}.old; rm {state}; to take the other: rm {state}; qmerge commit {old}"
        ))
        .into()
    }

    fn chain(&self, words: &str) -> Hint {
        let chain = Command::qmerge(["info", "--chain"]).file(self.active());
        Hint::command(HintKind::InfoChain, words, chain)
    }

    fn forget(&self, words: &str) -> Hint {
        let remove = Command::of("rm").file(self.merge.state_file());
        Hint::command(HintKind::Forget, words, remove)
    }

    fn active(&self) -> &str {
        self.merge.active().map_or("", |layer| &layer.file)
    }

    fn target(&self) -> &str {
        let base = self.merge.layer(self.merge.base).map_or("", |layer| &layer.file);
        if self.merge.kind == Kind::Pull { self.active() } else { base }
    }

    fn old(&self) -> String {
        printable(self.active())
    }

    fn base(&self) -> String {
        printable(self.target())
    }
}
