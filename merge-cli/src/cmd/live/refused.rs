//! Merges that are not begun, in the words of the command.

use qmp_client::Hindrance;

use super::trouble::Session;
use crate::output::human::printable;
use crate::output::size;

/// What is wrong, in the words of the command where it has better ones: sizes and options.
pub(super) fn message(session: &Session<'_>, hindrance: &Hindrance) -> String {
    match hindrance {
        Hindrance::NoSpace { file, needed, free, folder } => format!(
            "{} will grow by {}, and {} are free in {}: {} are missing",
            printable(file),
            size::exact(*needed),
            size::exact(*free),
            folder.display(),
            size::exact(needed - free)
        ),
        Hindrance::ActiveNotAskedFor { index, file, .. } => format!(
            "[{index}] {} is the active layer, which the guest writes to; it is merged only with --active",
            printable(file)
        ),
        Hindrance::OnlyForActive { active, top } => format!(
            "{} is for the active layer [{active}], and [{top}] is a layer below it",
            session.option_for_active()
        ),
        _ => hindrance.to_string(),
    }
}
