//! Which hints there are. The tests read this file, too: they type each of them.

/// What a hint offers; programs find its name beside the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum HintKind {
    /// Something to do outside of this program; no command.
    Advice,
    /// The same command again, when what was in its way is gone.
    Again,
    /// The same command as root.
    AgainAsRoot,
    /// The same command goes on where it was stopped.
    GoOn,
    /// The help of the verb.
    Help,
    /// What an image is.
    Info,
    /// What the layers of a chain are.
    InfoChain,
    /// How far an image is damaged.
    Check,
    /// Repair of an image.
    Repair,
    /// The chain as one new file.
    Flatten,
    /// The same command, allowed to break images that use a layer.
    AllowSharedBase,
    /// The same command, allowed to change internal snapshots.
    AllowSnapshotChange,
    /// The same command, allowed to lose bitmaps.
    DropBitmaps,
    /// The same command, allowed to follow names into a folder.
    AllowDir,
    /// The same command, with the format of a backing file that its overlay does not state.
    BackingFormat,
    /// The same command, with the format of the named image.
    Format,
    /// The same command, on a file system without locks.
    NoLock,
    /// The merge begun anew over what others wrote.
    Restart,
    /// A restore to a copy of the image.
    AllowCopy,
    /// A stopped merge given up.
    Abort,
    /// A merge that can only be finished.
    Finish,
    /// The lower part of a long chain merged first.
    MergeLower,
    /// Another name for the file to write.
    OtherOutput,
    /// The name of a backing file that has moved, corrected by `qemu-img`.
    NewName,
    /// The demonstration again, in another way.
    Demo,
    /// A merge of a running machine brought to its end.
    Recover,
    /// The same merge as QEMU does it.
    LiveMerge,
    /// Disks of a running QEMU, or how things stand there.
    LiveLook,
    /// The same command, allowed to write encrypted data in plain text.
    AllowPlaintext,
    /// The same command, allowed to leave an old image as it is.
    AllowStale,
    /// The same command, which removes what nobody needs any more.
    Delete,
    /// The same command, the active layer included.
    Active,
    /// The same command, the active layer left out.
    BelowActive,
    /// The same command, which slows the guest down.
    Converge,
    /// The same merge when the machine is stopped.
    Offline,
    /// A merge upwards instead.
    LivePull,
    /// A merge that runs brought to its end.
    LiveEnd,
    /// A job ended without its effect.
    LiveCancel,
    /// A state file removed, because the chain is right as it stands.
    Forget,
    /// A command of libvirt's, for a machine that is libvirt's.
    Virsh,
}

impl HintKind {
    /// All of them.
    #[allow(dead_code, reason = "the tests read it")]
    pub(crate) const ALL: [Self; 40] = [
        Self::Advice,
        Self::Again,
        Self::AgainAsRoot,
        Self::GoOn,
        Self::Help,
        Self::Info,
        Self::InfoChain,
        Self::Check,
        Self::Repair,
        Self::Flatten,
        Self::AllowSharedBase,
        Self::AllowSnapshotChange,
        Self::DropBitmaps,
        Self::AllowDir,
        Self::BackingFormat,
        Self::Format,
        Self::NoLock,
        Self::Restart,
        Self::AllowCopy,
        Self::Abort,
        Self::Finish,
        Self::MergeLower,
        Self::OtherOutput,
        Self::NewName,
        Self::Demo,
        Self::Recover,
        Self::LiveMerge,
        Self::LiveLook,
        Self::AllowPlaintext,
        Self::AllowStale,
        Self::Delete,
        Self::Active,
        Self::BelowActive,
        Self::Converge,
        Self::Offline,
        Self::LivePull,
        Self::LiveEnd,
        Self::LiveCancel,
        Self::Forget,
        Self::Virsh,
    ];

    /// Its name, which does not change.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Advice => "advice",
            Self::Again => "again",
            Self::AgainAsRoot => "again-as-root",
            Self::GoOn => "go-on",
            Self::Help => "help",
            Self::Info => "info",
            Self::InfoChain => "info-chain",
            Self::Check => "check",
            Self::Repair => "repair",
            Self::Flatten => "flatten",
            Self::AllowSharedBase => "allow-shared-base",
            Self::AllowSnapshotChange => "allow-snapshot-change",
            Self::DropBitmaps => "drop-bitmaps",
            Self::AllowDir => "allow-dir",
            Self::BackingFormat => "backing-format",
            Self::Format => "format",
            Self::NoLock => "no-lock",
            Self::Restart => "restart",
            Self::AllowCopy => "allow-copy",
            Self::Abort => "abort",
            Self::Finish => "finish",
            Self::MergeLower => "merge-lower",
            Self::OtherOutput => "other-output",
            Self::NewName => "new-name",
            Self::Demo => "demo",
            Self::Recover => "recover",
            Self::LiveMerge => "live-merge",
            Self::LiveLook => "live-look",
            Self::AllowPlaintext => "allow-plaintext",
            Self::AllowStale => "allow-stale",
            Self::Delete => "delete",
            Self::Active => "active",
            Self::BelowActive => "below-active",
            Self::Converge => "converge",
            Self::Offline => "offline",
            Self::LivePull => "live-pull",
            Self::LiveEnd => "live-end",
            Self::LiveCancel => "live-cancel",
            Self::Forget => "forget",
            Self::Virsh => "virsh",
        }
    }
}
