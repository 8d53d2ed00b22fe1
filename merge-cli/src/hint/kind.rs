//! The kinds of hints. The tests read this file, too, and type each hint.

/// Makes the kinds, with their names.
macro_rules! kinds {
    ($(#[doc = $doc:literal] $kind:ident = $name:literal,)*) => {
        /// What a hint offers; programs find its name beside the text.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum HintKind {
            $(#[doc = $doc] $kind,)*
        }

        impl HintKind {
            /// All of them.
            #[allow(dead_code, reason = "the tests read it")]
            pub(crate) const ALL: &[Self] = &[$(Self::$kind,)*];

            /// Its name, which does not change.
            pub(crate) fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }
        }
    };
}

kinds! {
    /// Something to do outside of this program; no command.
    Advice = "advice",
    /// The same command again, when what was in its way is gone.
    Again = "again",
    /// The same command as root.
    AgainAsRoot = "again-as-root",
    /// The same command goes on where it was stopped.
    GoOn = "go-on",
    /// The help of the verb.
    Help = "help",
    /// What an image is.
    Info = "info",
    /// What the layers of a chain are.
    InfoChain = "info-chain",
    /// How far an image is damaged.
    Check = "check",
    /// Repair of an image.
    Repair = "repair",
    /// The chain as one new file.
    Flatten = "flatten",
    /// The same command, which writes over a block device.
    OntoDevice = "onto-device",
    /// The same command, which writes zeros in the place of what cannot be read.
    Salvage = "salvage",
    /// The same command, allowed to break images that use a layer.
    AllowSharedBase = "allow-shared-base",
    /// The same command, allowed to change internal snapshots.
    AllowSnapshotChange = "allow-snapshot-change",
    /// The same command, allowed to lose bitmaps.
    DropBitmaps = "drop-bitmaps",
    /// The same command, allowed to follow names into a folder.
    AllowDir = "allow-dir",
    /// The same command, with the format of a backing file that its overlay does not state.
    BackingFormat = "backing-format",
    /// The same command, with the format of the named image.
    Format = "format",
    /// The same command, on a file system without locks.
    NoLock = "no-lock",
    /// The merge begun anew over what others wrote.
    Restart = "restart",
    /// A restore to a copy of the image.
    AllowCopy = "allow-copy",
    /// A stopped merge given up.
    Abort = "abort",
    /// The same relink, on the word of the user.
    Trust = "trust",
    /// A merge that can only be finished.
    Finish = "finish",
    /// The lower part of a long chain merged first.
    MergeLower = "merge-lower",
    /// Another name for the file to write.
    OtherOutput = "other-output",
    /// The name of a backing file that has moved, corrected.
    NewName = "new-name",
    /// The demonstration again, in another way.
    Demo = "demo",
    /// A live merge recovered.
    Recover = "recover",
    /// The same merge as QEMU does it.
    LiveMerge = "live-merge",
    /// Disks of a running QEMU, or how things stand there.
    LiveLook = "live-look",
    /// The same command, allowed to write encrypted data in plain text.
    AllowPlaintext = "allow-plaintext",
    /// The same command, allowed to leave an old image as it is.
    AllowStale = "allow-stale",
    /// The same command, which removes obsolete files.
    Delete = "delete",
    /// The same command, the active layer included.
    Active = "active",
    /// The same command, the active layer left out.
    BelowActive = "below-active",
    /// The same command, which slows the guest down.
    Converge = "converge",
    /// The same merge when the machine is stopped.
    Offline = "offline",
    /// A merge upwards instead.
    LivePull = "live-pull",
    /// A merge that runs brought to its end.
    LiveEnd = "live-end",
    /// A job ended without its effect.
    LiveCancel = "live-cancel",
    /// A state file removed, because the chain is right as it stands.
    Forget = "forget",
    /// A command of libvirt's, for a machine that is libvirt's.
    Virsh = "virsh",
}
