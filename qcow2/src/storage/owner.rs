//! Who may write a file, and whose journals, records and headers count for it.

/// To whom a file belongs, and who else may write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub user: u32,
    /// The group.
    pub group: u32,
    /// The permission bits (`chmod`), without the kind of the file.
    pub mode: u32,
}

/// The user who may write everything.
const ROOT: u32 = 0;
/// The permission of the group, and of everybody, to write.
const BY_GROUP: u32 = 0o020;
const BY_ALL: u32 = 0o002;
/// In such a folder a file is removed only by its own owner or the folder's.
const STICKY: u32 = 0o1000;

impl Owner {
    /// Whether the content of a file of this owner may decide what is written to a file of `target`, or that it
    /// is removed: only if everybody who could have written this file could have written that one, too.
    /// `caller` is the user who runs the program.
    ///
    /// A right that only a group gives does not count for this file's owner, because the members of a group may
    /// change.
    pub fn may_speak_for(&self, target: &Self, caller: u32) -> bool {
        let all_may = target.mode & BY_ALL != 0;
        let group_may = target.mode & BY_GROUP != 0 && target.group == self.group;
        let is_theirs = [ROOT, caller, target.user].contains(&self.user);
        let others_may_not = self.mode & BY_ALL == 0 && (group_may || self.mode & BY_GROUP == 0);
        all_may || (is_theirs && others_may_not)
    }

    /// Whether the content of a file of this owner may decide that a file of `target` in `folder` is removed:
    /// only if everybody who could have written this file could have removed that one, by the rules of
    /// unlink(2). Removal needs rights to the folder, not to the file. `caller` is the user who runs the
    /// program.
    ///
    /// A right that only a group gives counts for the file's own owner alone: what that one could empty is not lost by it.
    pub(crate) fn may_remove(&self, target: &Self, folder: &Self, caller: u32) -> bool {
        let all_may = folder.mode & (BY_ALL | STICKY) == BY_ALL;
        let others_may_not = self.mode & (BY_GROUP | BY_ALL) == 0
            || (self.mode & BY_ALL == 0 && self.group == folder.group && folder.mode & BY_GROUP != 0);
        let owns_file = self.user == target.user && folder.mode & (BY_GROUP | BY_ALL) != 0;
        let is_theirs = [ROOT, caller, folder.user].contains(&self.user) || owns_file;
        all_may || (is_theirs && others_may_not)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(user: u32, group: u32, mode: u32) -> Owner {
        Owner { user, group, mode }
    }

    #[test]
    fn only_who_may_write_a_file_is_believed_about_it() {
        let (alice, eve) = (1, 2);
        let disk = owner(alice, 10, 0o600);
        for (user, caller, believed) in [
            (alice, ROOT, true),
            (ROOT, alice, true),
            (ROOT, ROOT, true),
            (eve, eve, true),
            (eve, alice, false),
            (eve, ROOT, false),
        ] {
            let note = owner(user, 10, 0o600);
            assert_eq!(note.may_speak_for(&disk, caller), believed, "user {user}, caller {caller}");
        }
        // Everybody may write the disk.
        assert!(owner(eve, 10, 0o666).may_speak_for(&owner(ROOT, 0, 0o666), ROOT));
        // Being in the group is not enough.
        assert!(!owner(eve, 10, 0o600).may_speak_for(&owner(ROOT, 10, 0o660), ROOT));
    }

    #[test]
    fn what_others_may_have_written_is_as_theirs() {
        let disk = owner(1, 10, 0o600);
        for (mode, believed) in [(0o644, true), (0o620, false), (0o602, false), (0o666, false)] {
            assert_eq!(owner(1, 10, mode).may_speak_for(&disk, 1), believed, "{mode:o}");
        }
        // A file system that gives all files the same mode.
        assert!(owner(1, 10, 0o660).may_speak_for(&owner(1, 10, 0o660), 1));
        assert!(!owner(1, 11, 0o660).may_speak_for(&owner(1, 10, 0o660), 1));
    }

    #[test]
    fn the_right_to_write_a_file_is_no_right_to_remove_it() {
        let (alice, eve) = (1, 2);
        let note = |user| owner(user, 10, 0o600);
        let shared = owner(alice, 10, 0o666);
        for (folder, believed) in [
            // Only its owner may change the names in it.
            (owner(ROOT, 0, 0o755), false),
            (owner(ROOT, 0, 0o1777), false),
            // A right that a group gives is not looked up.
            (owner(ROOT, 10, 0o775), false),
            (owner(ROOT, 0, 0o777), true),
            (owner(eve, 10, 0o700), true),
        ] {
            assert_eq!(note(eve).may_remove(&shared, &folder, ROOT), believed, "{folder:?}");
            assert!(
                note(ROOT).may_remove(&shared, &folder, ROOT)
                    && note(alice).may_remove(&shared, &folder, alice)
            );
        }
        // Its own file, where the folder lets more than its owner remove something.
        for (folder, believed) in
            [(owner(ROOT, 0, 0o1777), true), (owner(ROOT, 10, 0o775), true), (owner(ROOT, 0, 0o755), false)]
        {
            assert_eq!(note(eve).may_remove(&owner(eve, 10, 0o600), &folder, ROOT), believed, "{folder:?}");
        }
        // Others may have written the note.
        assert!(!owner(ROOT, 0, 0o666).may_remove(&shared, &owner(ROOT, 0, 0o1777), ROOT));
        assert!(owner(alice, 10, 0o660).may_remove(&shared, &owner(alice, 10, 0o770), ROOT));
    }
}
