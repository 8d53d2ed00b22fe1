//! The rights of a new file with the content of others: never more than theirs.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{Gid, Mode, Uid, XattrFlags};
use rustix::io::Errno;

use super::Owner;

/// Where Linux keeps a file's access list, and its security label.
const ACL: &str = "system.posix_acl_access";
const LABEL: &str = "security.selinux";
/// The longest attribute that Linux has, in bytes.
const LONGEST: usize = 64 << 10;

/// Who may read and write a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rights {
    owner: Owner,
    acl: Option<Vec<u8>>,
}

/// What the owner alone may do; the permissions of the group and of others begin behind it.
const OWNERS: u32 = 0o600;
const GROUPS: u32 = 0o060;
const ALL: u32 = 0o006;
const GROUP_READS: u32 = 0o040;
const ALL_READ: u32 = 0o004;

impl Rights {
    /// Those of a file that holds what all of `inputs` hold, and belongs to whom the first one does; `None` if that
    /// one's owner may not read another one.
    fn of_all(inputs: &[Self]) -> Option<Self> {
        let (first, others) = inputs.split_first()?;
        let mut rights = first.clone();
        let mut mode = first.owner.mode & (OWNERS | GROUPS | ALL);
        for Self { owner, acl } in others {
            let same_user = owner.user == first.owner.user;
            let same_group = owner.group == first.owner.group;
            let may_read =
                owner.mode & ALL_READ != 0 || (same_group && owner.mode & GROUP_READS != 0 && acl.is_none());
            if !same_user && !may_read {
                return None;
            }
            // Members of another group count as others here.
            let group = if same_group { owner.mode & GROUPS } else { (owner.mode & ALL) << 3 };
            mode &= OWNERS | group | (owner.mode & ALL);
        }
        // With a list, the group's permissions are those that the list may give to anybody. The list names neither the
        // owner nor the group, so that the same list may mean others.
        let is_same = |input: &Self| {
            let (one, other) = (&input.owner, &first.owner);
            input.acl == first.acl
                && (input.acl.is_none() || (one.user, one.group) == (other.user, other.group))
        };
        if !inputs.iter().all(is_same) {
            rights.acl = None;
            mode &= !GROUPS;
        }
        rights.owner.mode = mode;
        Some(rights)
    }
}

/// Gives a new file, which only its owner may read and write, the owner, group and permissions of the first of `inputs`,
/// and its access list and label, as far as the system permits and as nobody may read it then who may not read one of
/// the others. What cannot be given is left out.
pub(super) fn take(file: &File, inputs: &[&File]) {
    let rights: Option<Vec<Rights>> = inputs.iter().map(|input| look(input)).collect();
    // The list that the folder gives to its new files. It gives nothing while the group has no permission; the mode
    // below would give it some.
    if !remove_list(file) {
        return;
    }
    let Some(Rights { owner, acl }) = rights.and_then(|rights| Rights::of_all(&rights)) else { return };
    let (user, group) = (Uid::from_raw(owner.user), Gid::from_raw(owner.group));
    let mut mode = owner.mode;
    let is_group = rustix::fs::fchown(file, Some(user), Some(group)).is_ok()
        || rustix::fs::fchown(file, None, Some(group)).is_ok();
    // Where there is a list, the group's permissions come with it: without it, they are more than the group's.
    if !is_group || acl.is_some() {
        mode &= !GROUPS;
    }
    // Each step only widens the rights, so a step that fails leaves them tighter.
    let _ = rustix::fs::fchmod(file, Mode::from_raw_mode(mode));
    if let Some(acl) = acl.filter(|_| is_group) {
        let _ = rustix::fs::fsetxattr(file, ACL, &acl, XattrFlags::empty());
    }
    if let Some(label) = inputs.first().and_then(|input| attribute(input, LABEL)) {
        let _ = rustix::fs::fsetxattr(file, LABEL, &label, XattrFlags::empty());
    }
}

fn look(file: &File) -> Option<Rights> {
    let meta = file.metadata().ok()?;
    let owner = Owner { user: meta.uid(), group: meta.gid(), mode: meta.mode() & 0o777 };
    Some(Rights { owner, acl: attribute(file, ACL) })
}

/// Takes a file's access list away, so that its mode says all; whether there is none now.
fn remove_list(file: &File) -> bool {
    // The system has no lists here, or the file has none.
    matches!(rustix::fs::fremovexattr(file, ACL), Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP))
}

fn attribute(file: &File, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; LONGEST];
    let len = rustix::fs::fgetxattr(file, name, &mut value[..]).ok()?;
    value.truncate(len);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(user: u32, group: u32, mode: u32) -> Rights {
        Rights { owner: Owner { user, group, mode }, acl: None }
    }

    fn mode(inputs: &[Rights]) -> Option<u32> {
        Rights::of_all(inputs).map(|rights| rights.owner.mode)
    }

    #[test]
    fn nobody_may_read_the_whole_who_may_not_read_a_part() {
        assert_eq!(mode(&[file(1, 1, 0o640)]), Some(0o640));
        assert_eq!(mode(&[file(1, 1, 0o644), file(1, 1, 0o600)]), Some(0o600));
        assert_eq!(mode(&[file(1, 1, 0o660), file(1, 1, 0o640), file(1, 1, 0o664)]), Some(0o640));
        // A base that nobody may write does not keep the owner from writing the copy.
        assert_eq!(mode(&[file(1, 1, 0o600), file(1, 1, 0o444)]), Some(0o600));
        // The other one's group is none of this one's.
        assert_eq!(mode(&[file(1, 1, 0o640), file(1, 2, 0o660)]), Some(0o600));
        assert_eq!(mode(&[file(1, 1, 0o644), file(0, 0, 0o644)]), Some(0o644));
        // The owner of the first may not read the second.
        assert_eq!(mode(&[file(1, 1, 0o644), file(0, 0, 0o600)]), None);
        assert_eq!(mode(&[file(1, 5, 0o644), file(0, 5, 0o640)]), Some(0o640));
        assert_eq!(mode(&[file(1, 1, 0o4755)]), Some(0o644));
    }

    #[test]
    fn a_list_is_kept_if_all_have_it() {
        let listed = |list: u8| Rights { acl: Some(vec![list]), ..file(1, 1, 0o660) };
        assert_eq!(Rights::of_all(&[listed(1), listed(1)]), Some(listed(1)));
        for other in [listed(2), file(1, 1, 0o660)] {
            let rights = Rights::of_all(&[listed(1), other]).unwrap();
            assert_eq!((rights.acl, rights.owner.mode), (None, 0o600));
        }
        // The same list, but of another group.
        let other = Rights { owner: Owner { user: 1, group: 2, mode: 0o660 }, acl: Some(vec![1]) };
        let rights = Rights::of_all(&[listed(1), other]).unwrap();
        assert_eq!((rights.acl, rights.owner.mode), (None, 0o600));
        // Whom the list of another one lets read is not known here.
        let other = Rights { owner: Owner { user: 0, group: 1, mode: 0o660 }, acl: Some(vec![1]) };
        assert_eq!(Rights::of_all(&[file(1, 1, 0o660), other]), None);
    }

    /// A list as Linux keeps it: its version, then tag, permissions and id of each entry, all little endian. Beside
    /// the owner it lets the user 65534 read and write.
    #[allow(clippy::little_endian_bytes, reason = "Linux keeps lists so")]
    fn list(group: u8) -> Vec<u8> {
        let entry = |tag: u8, permissions: u8, id: u32| [[tag, 0, permissions, 0], id.to_le_bytes()].concat();
        let entries = [
            entry(0x01, 6, u32::MAX),
            entry(0x02, 6, 65534),
            entry(0x04, group, u32::MAX),
            entry(0x10, 6, u32::MAX),
            entry(0x20, 0, u32::MAX),
        ];
        [vec![2, 0, 0, 0], entries.concat()].concat()
    }

    #[test]
    fn a_folder_gives_nobody_what_the_inputs_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let new = |name: &str| {
            let mut options = File::options();
            options.read(true).write(true).create_new(true);
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            options.open(dir.path().join(name)).unwrap()
        };
        let plain = new("plain");
        rustix::fs::fchmod(&plain, Mode::from_raw_mode(0o640)).unwrap();
        let listed = new("listed");
        let set = rustix::fs::fsetxattr(&listed, ACL, &list(4), XattrFlags::empty());
        if set == Err(Errno::OPNOTSUPP) {
            eprintln!("skipped: {} has no access lists", dir.path().display());
            return;
        }
        set.unwrap();
        let inherited = "system.posix_acl_default";
        rustix::fs::setxattr(dir.path(), inherited, &list(6), XattrFlags::empty()).unwrap();
        for (name, inputs, acl, mode) in [
            ("a", [&plain, &plain], None, 0o640),
            ("b", [&listed, &listed], Some(list(4)), 0o660),
            ("c", [&listed, &plain], None, 0o600),
            ("d", [&plain, &listed], None, 0o600),
        ] {
            let file = new(name);
            assert_eq!(attribute(&file, ACL).map(|list| list.len()), Some(list(6).len()), "{name}");
            take(&file, &inputs);
            assert_eq!(attribute(&file, ACL), acl, "{name}");
            assert_eq!(file.metadata().unwrap().mode() & 0o777, mode, "{name}");
        }
    }
}
