//! How a verb tells of its plan, and of what came of it.

use serde_json::Value;

use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::json::merged;

/// A plan, for programs and for people.
pub(super) struct ShownPlan {
    pub(super) plan: Value,
    pub(super) words: String,
    /// There is nothing to do.
    pub(super) is_nothing: bool,
}

impl ShownPlan {
    /// Tells what will be done, and says whether to do it: a dry run ends here.
    pub(super) fn tell(&self, dry_run: bool, console: &Console) -> Result<bool, Failure> {
        console.event("plan", self.plan.clone())?;
        if dry_run {
            console.result(&self.words)?;
            console.note("dry run: nothing was changed");
        } else if !self.is_nothing && !console.is_json() {
            console.note(&self.words);
        }
        Ok(!dry_run)
    }

    /// Tells what was done: `report` and `words`. If that cannot be printed, the failure says that it `is_done`.
    pub(super) fn tell_result(
        self,
        report: Value,
        words: String,
        is_done: &str,
        console: &Console,
    ) -> Result<Exit, Failure> {
        let words = if self.is_nothing { self.words } else { words };
        let printed = console.event("result", merged(self.plan, report));
        let printed = printed.and_then(|()| console.result(&words));
        printed.map(|()| Exit::DONE).map_err(|e| if self.is_nothing { e } else { e.behind(is_done) })
    }
}
