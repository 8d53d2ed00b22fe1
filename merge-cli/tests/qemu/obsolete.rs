//! Layers that a merge has made obsolete, and that somebody uses all the same; files that two names lead to.

use std::fs;
use std::os::unix::fs::symlink;

use kit::{Lab, qemu_is_here};

use crate::support::lab;

const M: u64 = 1 << 20;

/// `base <- b <- c`, with b merged: an empty overlay on base beside `base <- c`.
fn merged(name: &str) -> Lab {
    let folder = lab(name);
    folder.create("base.qcow2", 4 * M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 2M"]);
    folder.overlay("b.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "b.qcow2", &["write -P 3 1M 1M"]);
    folder.overlay("c.qcow2", "b.qcow2", "qcow2", None, "");
    folder.io("qcow2", "c.qcow2", &["write -P 4 1536k 1M"]);
    folder.qmerge(&["commit", "c.qcow2", "--top", "b.qcow2"]).ok();
    folder
}

#[test]
fn a_merged_layer_that_was_written_since_is_an_image_like_any_other() {
    if !qemu_is_here() {
        return;
    }
    for snapshot in [false, true] {
        let folder = merged("branch");
        match snapshot {
            true => drop(folder.img(&["snapshot", "-c", "s", "b.qcow2"])),
            false => drop(folder.io("qcow2", "b.qcow2", &["write -P 9 0 64k"])),
        }
        let before = folder.view("qcow2", "b.qcow2");
        // It reads through base.
        folder.refused(&["commit", "c.qcow2"], &[6]).says("b.qcow2");
        folder.view("qcow2", "b.qcow2").assert_same(&before, "the branch");
        if !snapshot {
            folder.qmerge(&["info", "b.qcow2"]).ok().says("it holds data");
            folder.sh("cp b.qcow2 copy.qcow2; mkdir away; mv b.qcow2 away");
            folder.refused(&["commit", "c.qcow2"], &[6]).says("copy.qcow2");
            // What it holds is merged as that of any other image.
            folder.sh("mv away/b.qcow2 b.qcow2; rm c.qcow2 copy.qcow2");
            folder.qmerge(&["commit", "b.qcow2"]).ok();
            folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
            folder.qmerge(&["commit", "b.qcow2"]).ok();
        }
    }
    let folder = merged("untouched");
    folder.qmerge(&["commit", "b.qcow2"]).ok().says("already merged");
    folder.qmerge(&["info", "b.qcow2"]).ok().says("no longer needed");
    folder.qmerge(&["commit", "c.qcow2"]).ok();
}

/// Two chains of which one layer is the same file: what the other one reads there must not go.
#[test]
fn a_merged_layer_with_another_name_keeps_its_data() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("hard-linked");
    folder.sh("for d in vm1 vm2; do mkdir $d; (cd $d
         qemu-img create -q -f qcow2 base 4M; qemu-io -c 'write -q -P 1 0 1M' base
         qemu-img create -q -f qcow2 -b base -F qcow2 a; qemu-io -c 'write -q -P 3 1M 1M' a
         qemu-img create -q -f qcow2 -b a -F qcow2 c; qemu-io -c 'write -q -P 5 2M 1M' c); done
         ln -f vm1/a vm2/a");
    let (first, second) = (folder.view("qcow2", "vm1/c"), folder.view("qcow2", "vm2/c"));
    folder.qmerge(&["commit", "vm1/c", "--dry-run"]).ok().says("hard link").says("vm1/a");
    folder.qmerge(&["commit", "vm1/c"]).ok();
    folder.view("qcow2", "vm1/c").assert_same(&first, "the merged chain");
    folder.view("qcow2", "vm2/c").assert_same(&second, "the other chain");
}

#[test]
fn a_link_that_means_another_chain_than_the_file_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("two-chains");
    folder.sh("for d in real link; do mkdir $d; qemu-img create -q -f qcow2 $d/base 4M
         qemu-io -c 'write -q -P 1 0 1M' $d/base; done
         qemu-img create -q -f qcow2 -b base -F qcow2 real/c; qemu-io -c 'write -q -P 5 2M 1M' real/c");
    symlink("../real/c", folder.join("link/c")).unwrap();
    for verb in [&["commit", "link/c"][..], &["pull", "link/c"]] {
        folder.refused(verb, &[6]).says("two chains");
    }
    // Where the file itself has no other base, the link's is meant.
    fs::remove_file(folder.join("real/base")).unwrap();
    let before = folder.view("qcow2", "link/c");
    folder.qmerge(&["commit", "link/c"]).ok();
    folder.view("qcow2", "link/base").assert_same(&before, "base");
}
