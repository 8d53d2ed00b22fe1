//! Edits of cluster 0, judged after every crash, and by qemu-img.

use std::path::Path;
use std::process::Command;

use kit::Random;

use super::extensions::{
    EXT_DATA_FILE, EXT_EMPTIED_ONTO, EXT_FEATURE_NAMES, EXT_MERGED_INTO, EXT_MERGING_INTO, Extension,
};
use super::words::PutWords;
use super::*;
use crate::units::HostOffset;

fn text(random: &mut Random, len: u64) -> String {
    (0..len).map(|_| char::from(b'a' + random.below(26) as u8)).collect()
}

fn header(version: u32, cluster_bits: u32) -> Header {
    let mut header = Header::new(version, Geometry::new(cluster_bits, 4, false).unwrap(), 1 << 20);
    header.l1_entries = header.geometry().l1_entries_for(header.size) as u32;
    header.l1_offset = HostOffset::new(3 << cluster_bits);
    header.refcount_table_offset = HostOffset::new(1 << cluster_bits);
    header.refcount_table_clusters = 1;
    header
}

fn whole(mut bytes: Vec<u8>) -> Vec<u8> {
    let cluster = Header::decode(&bytes).unwrap().geometry().cluster_size() as usize;
    bytes.resize(cluster, 0);
    bytes
}

/// Cluster 0 of an overlay as qemu-img makes it.
fn overlay(version: u32, cluster_bits: u32, name: &str) -> Vec<u8> {
    let mut cluster = Cluster0::new(header(version, cluster_bits));
    cluster.set_backing(name.as_bytes(), "raw").unwrap();
    whole(cluster.encode().unwrap())
}

fn bitmaps(cluster_bits: u32) -> Extension {
    let directory_offset = HostOffset::new(9 << cluster_bits);
    BitmapsExtension { count: 1, directory_size: 32, directory_offset }.encode()
}

/// Any valid cluster 0, also in layouts that QEMU never writes; `None` where a draw does not fit.
fn any_cluster0(random: &mut Random) -> Option<Vec<u8>> {
    let cluster_bits = [9, 10, 11, 12, 16][random.below(5) as usize];
    let version = if random.chance(30) { 2 } else { 3 };
    let mut header = header(version, cluster_bits);
    if version == 3 && random.chance(30) {
        header.header_length = [104, 112, 128][random.below(3) as usize];
        header.tail = vec![0; (header.header_length as usize).saturating_sub(105)];
    }
    if version == 3 && random.chance(30) {
        header.autoclear |= 1 << (40 + random.below(10));
    }
    let mut extensions = Vec::new();
    if random.chance(70) {
        let format = ["raw", "qcow2", "vmdk", "longer-format"][random.below(4) as usize];
        extensions.push(Extension::new(EXT_BACKING_FORMAT, format));
    }
    if random.chance(20) {
        let len = random.below(40);
        extensions.push(Extension::new(EXT_DATA_FILE, text(random, 1 + len)));
    }
    if random.chance(60) {
        extensions.push(Extension::known_feature_names());
    }
    if version == 3 && random.chance(30) {
        header.autoclear |= features::BITMAPS;
        extensions.push(bitmaps(cluster_bits));
    }
    if random.chance(20) {
        let len = random.below(60);
        extensions.push(Extension::new(EXT_MERGED_INTO, text(random, len)));
    }
    for kind in 0..random.below(3) as u32 {
        let len = if random.chance(20) { random.below(600) } else { random.below(30) };
        extensions.push(Extension::new(0x1000_0000 + kind, text(random, len)));
    }
    if random.chance(30) {
        let by = random.below(extensions.len() as u64 + 1) as usize;
        extensions.rotate_left(by);
    }
    let mut bytes = header.encode();
    extensions.iter().for_each(|e| e.encode_into(&mut bytes));
    let has_name = random.chance(90);
    if !has_name || random.chance(85) {
        bytes.put_u64(0);
    }
    let gap = if random.chance(30) { random.below(700) as usize } else { 0 };
    let name = if random.chance(20) { random.below(1023) } else { random.below(40) };
    let name = text(random, 1 + name);
    if has_name && gap > 0 && bytes.ends_with(&[0; 8]) {
        bytes.resize(bytes.len() + gap, 0);
    }
    if has_name {
        header.backing_offset = bytes.len() as u64;
        header.backing_len = name.len() as u32;
        bytes.extend_from_slice(name.as_bytes());
        let start = header.encode();
        bytes[..start.len()].copy_from_slice(&start);
    }
    if bytes.len() > 1 << cluster_bits {
        return None;
    }
    let mut bytes = whole(bytes);
    // What nobody looks at may hold anything.
    if random.chance(50) && has_name {
        let end = (header.backing_offset + u64::from(header.backing_len)) as usize;
        bytes[end..].fill(0xee);
    }
    Cluster0::parse(&bytes).is_ok().then_some(bytes)
}

/// What an image says, without where it says it; feature names may go.
fn meaning(cluster0: &[u8]) -> Cluster0 {
    let mut read = Cluster0::parse(cluster0).expect("cluster 0 must stay valid");
    read.remove_extension(EXT_FEATURE_NAMES);
    read.extensions.iter_mut().for_each(|e| e.offset = 0);
    read.extensions_end = 0;
    read.extensions_closed = true;
    read.header.backing_offset = 0;
    read
}

/// What an image says after an edit that clears unknown autoclear bits.
fn expected(old: &[u8], edit: impl FnOnce(&mut Cluster0)) -> Cluster0 {
    let mut new = meaning(old);
    if new.header.version >= 3 {
        new.header.autoclear &= features::KNOWN_AUTOCLEAR;
    }
    edit(&mut new);
    new
}

fn replace(
    cluster: &mut Cluster0,
    extension: Extension,
    otherwise: impl FnOnce(&mut Vec<Extension>, Extension),
) {
    match cluster.extensions.iter().position(|e| e.magic == extension.magic) {
        Some(place) => cluster.extensions[place] = extension,
        None => otherwise(&mut cluster.extensions, extension),
    }
}

/// Does the writes of `switch`; if it is atomic, looks at the image after every sector that a crash
/// could leave as the last one: it must mean one of `states`, in this order.
fn run(old: &[u8], switch: &Switch, states: &[Cluster0]) -> Vec<u8> {
    let mut now = old.to_vec();
    let mut state = 0;
    for write in &switch.writes {
        assert!(!write.bytes.is_empty());
        let end = write.offset as usize + write.bytes.len();
        assert!(end <= old.len(), "writes stay in cluster 0");
        let mut at = write.offset as usize;
        while at < end {
            let to = ((at / 512 + 1) * 512).min(end);
            let from = write.offset as usize;
            now[at..to].copy_from_slice(&write.bytes[at - from..to - from]);
            at = to;
            if switch.atomic {
                let now = meaning(&now);
                let found = states[state..].iter().position(|s| *s == now);
                state += found.unwrap_or_else(|| panic!("between the states: {now:#?}\n{switch:?}"));
            }
        }
    }
    assert_eq!(meaning(&now), *states.last().unwrap());
    now
}

#[test]
fn backing_switches_in_any_layout_survive_any_crash() {
    let (mut atomic, mut spanning, mut refused) = (0, 0, 0);
    for seed in 0..6000 {
        let mut random = Random::new(seed);
        let Some(old) = any_cluster0(&mut random) else { continue };
        let len = if random.chance(10) { random.below(1023) } else { random.below(60) };
        let name = text(&mut random, 1 + len);
        let format = ["raw", "qcow2"][random.below(2) as usize];
        let new = expected(&old, |new| {
            new.backing_name = Some(name.clone().into_bytes());
            new.header.backing_len = name.len() as u32;
            replace(new, Extension::new(EXT_BACKING_FORMAT, format), |list, e| list.insert(0, e));
        });
        match plan_backing_switch(&old, &name, format) {
            Ok(switch) => {
                let after = run(&old, &switch, &[meaning(&old), new]);
                *if switch.atomic { &mut atomic } else { &mut spanning } += 1;
                assert!(switch.atomic || switch.writes.len() == 1);
                let again = plan_backing_switch(&after, &name, format).unwrap();
                assert_eq!(again.writes, [], "seed {seed}: nothing is left to do");
            }
            Err(RewriteError::NoRoom { needed, room }) => {
                assert!(needed > room, "seed {seed}");
                assert!(new.encode().is_err(), "seed {seed}: a plain layout would fit");
                refused += 1;
            }
            Err(other) => panic!("seed {seed}: {other}"),
        }
    }
    assert!(atomic > 3000 && spanning > 20 && refused > 20, "{atomic} {spanning} {refused}");
}

#[test]
fn backing_table_size_and_mark_switch_together_in_any_layout() {
    let (mut atomic, mut spanning, mut marks) = (0, 0, 0);
    for seed in 0..4000 {
        let mut random = Random::new(seed);
        let Some(mut old) = any_cluster0(&mut random) else { continue };
        if random.chance(50)
            && let Ok(switch) = plan_mark(&old, "/base", Mark::Merging)
        {
            switch.writes.iter().for_each(|w| w.apply_to(&mut old));
        }
        let len = 1 + random.below(60);
        let name = if random.chance(30) { "base".to_owned() } else { text(&mut random, len) };
        let header = Header::decode(&old).unwrap();
        let l1_offset = HostOffset::new(header.geometry().cluster_size() * 77);
        let size = header.size + (1 << 20);
        let l1_entries = header.l1_entries + header.geometry().l1_entries_for(size) as u32;
        let path = text(&mut random, 200);
        let (mark, magic) = match random.chance(50) {
            true => (Mark::Merged, EXT_MERGED_INTO),
            false => (Mark::Emptied, EXT_EMPTIED_ONTO),
        };
        let with_mark = |mark: Option<&str>| {
            expected(&old, |new| {
                new.backing_name = Some(name.clone().into_bytes());
                new.header.backing_len = name.len() as u32;
                (new.header.l1_offset, new.header.l1_entries, new.header.size) =
                    (l1_offset, l1_entries, size);
                new.remove_extension(EXT_MERGING_INTO);
                new.remove_extension(EXT_MERGED_INTO);
                replace(new, Extension::new(EXT_BACKING_FORMAT, "raw"), |list, e| list.insert(0, e));
                new.extensions.extend(mark.map(|mark| Extension::new(magic, mark)));
            })
        };
        let disk = EmptyDisk {
            name: name.as_bytes(),
            format: "raw",
            l1_offset,
            l1_entries,
            size,
            mark: (mark, path.as_bytes()),
        };
        match plan_empty_switch(&old, &disk) {
            Ok(switch) => {
                let mut end = old.clone();
                switch.writes.iter().for_each(|w| w.apply_to(&mut end));
                let end = Cluster0::parse(&end).unwrap();
                let found = if mark == Mark::Merged { end.merged_into() } else { end.emptied_onto() };
                let found = found.map(|path| path.to_str().unwrap().to_owned());
                assert!(found.as_ref().is_none_or(|found| found.is_empty() || *found == path), "seed {seed}");
                marks += u32::from(found.is_some());
                run(&old, &switch, &[meaning(&old), with_mark(found.as_deref())]);
                *if switch.atomic { &mut atomic } else { &mut spanning } += 1;
            }
            Err(RewriteError::NoRoom { .. }) => assert!(with_mark(None).encode().is_err(), "seed {seed}"),
            Err(other) => panic!("seed {seed}: {other}"),
        }
    }
    assert!(atomic > 2000 && spanning > 10 && marks > 1000, "{atomic} {spanning} {marks}");
}

#[test]
fn marks_in_any_layout_survive_any_crash() {
    let (mut full, mut empty, mut spanning) = (0, 0, 0);
    for seed in 0..6000 {
        let mut random = Random::new(seed);
        let Some(old) = any_cluster0(&mut random) else { continue };
        let len = if random.chance(10) { random.below(2000) } else { random.below(60) };
        let path = text(&mut random, 1 + len);
        let marked = |data: &str| {
            expected(&old, |new| replace(new, Extension::new(EXT_MERGED_INTO, data), |list, e| list.push(e)))
        };
        match plan_mark(&old, &path, Mark::Merged) {
            Ok(switch) => {
                let mut end = old.clone();
                switch.writes.iter().for_each(|w| w.apply_to(&mut end));
                let found = Cluster0::parse(&end).unwrap().merged_into().unwrap();
                let found = found.to_str().unwrap();
                assert!(found == path || found.is_empty(), "seed {seed}");
                run(&old, &switch, &[meaning(&old), marked(found)]);
                spanning += u32::from(!switch.atomic);
                *if found.is_empty() { &mut empty } else { &mut full } += 1;
            }
            Err(RewriteError::NoRoom { .. }) => assert!(marked("").encode().is_err(), "seed {seed}"),
            Err(other) => panic!("seed {seed}: {other}"),
        }
    }
    assert!(full > 3000 && empty > 100 && spanning > 20, "{full} {empty} {spanning}");
}

#[test]
fn mutated_headers_are_refused_or_edited_rightly() {
    let (mut accepted, mut refused) = (0, 0);
    for seed in 0..20_000 {
        let mut random = Random::new(seed);
        let Some(mut bytes) = any_cluster0(&mut random) else { continue };
        for _ in 0..1 + random.below(3) {
            let at = if random.chance(70) { random.below(160) } else { random.below(bytes.len() as u64) };
            let value = [0, 1, 0x7f, 0x80, 0xff, random.below(256)][random.below(6) as usize];
            bytes[at as usize] = value as u8;
        }
        if random.chance(10) {
            bytes.truncate(random.below(bytes.len() as u64) as usize);
        }
        let Ok(read) = Cluster0::parse(&bytes) else {
            refused += 1;
            continue;
        };
        accepted += 1;
        let mut old = bytes.clone();
        old.resize(read.header.geometry().cluster_size() as usize, 0);
        let name = "a new name";
        let new = expected(&old, |new| {
            new.backing_name = Some(name.into());
            new.header.backing_len = name.len() as u32;
            replace(new, Extension::new(EXT_BACKING_FORMAT, "raw"), |list, e| list.insert(0, e));
        });
        if let Ok(switch) = plan_backing_switch(&bytes, name, "raw") {
            run(&old, &switch, &[meaning(&old), new]);
        }
    }
    assert!(accepted > 3000 && refused > 3000, "{accepted} {refused}");
}

#[test]
fn bitmaps_are_dropped_bit_first() {
    let (mut dropped, mut atomic) = (0, 0);
    for seed in 0..6000 {
        let mut random = Random::new(seed);
        let Some(old) = any_cluster0(&mut random) else { continue };
        let had = Cluster0::parse(&old).unwrap().extension(EXT_BITMAPS).is_some();
        let switch = plan_drop_bitmaps(&old).unwrap();
        let clear = |new: &mut Cluster0| new.header.autoclear &= !features::BITMAPS;
        let void = expected(&old, clear);
        let mut gone = void.clone();
        gone.remove_extension(EXT_BITMAPS);
        let after = run(&old, &switch, &[meaning(&old), void, gone]);
        assert_eq!(Cluster0::parse(&after).unwrap().extension(EXT_BITMAPS), None);
        dropped += u32::from(had);
        atomic += u32::from(had && switch.atomic);
    }
    assert!(dropped > 500 && atomic * 10 > dropped * 9, "{dropped} {atomic}");
}

#[test]
fn images_of_qemu_img_switch_in_one_sector() {
    for version in [2, 3] {
        for bits in [9, 12, 16, 21] {
            for name in ["b", "base.qcow2", "/var/lib/libvirt/images/some/longer/path/to/a/base-image.qcow2"]
            {
                let old = overlay(version, bits, "layer-a.qcow2");
                let switch = plan_backing_switch(&old, name, "qcow2").unwrap();
                assert!(switch.atomic, "version {version}, {bits} bits, {name}");
                let last = switch.writes.last().unwrap();
                assert!(last.offset >= 8 && last.offset + last.bytes.len() as u64 <= 512);
                assert!(
                    plan_mark(&old, name, Mark::Merged).unwrap().atomic,
                    "version {version}, {bits} bits, {name}"
                );
            }
        }
    }
}

#[test]
fn a_format_is_added_where_there_was_none() {
    let mut cluster = Cluster0::new(header(3, 16));
    cluster.backing_name = Some(b"base.qcow2".to_vec());
    cluster.set_extension(bitmaps(16));
    cluster.header.autoclear |= features::BITMAPS;
    let old = whole(cluster.encode().unwrap());
    assert!(Cluster0::parse(&old).unwrap().extension(EXT_FEATURE_NAMES).is_some());
    let switch = plan_backing_switch(&old, "other.raw", "raw").unwrap();
    assert!(switch.atomic);
    let mut new = old;
    switch.writes.iter().for_each(|w| w.apply_to(&mut new));
    let new = Cluster0::parse(&new).unwrap();
    assert_eq!(new.backing_format().as_deref(), Some("raw"));
    assert_eq!(new.extension(EXT_FEATURE_NAMES), None, "given up to make room in the sector");
    assert!(new.bitmaps().unwrap().is_some());
}

#[test]
fn long_names_in_small_clusters_span_sectors() {
    // Neither does the new name fit beside the old one, nor into the first sector.
    let old = overlay(3, 10, &"a".repeat(700));
    let switch = plan_backing_switch(&old, "b".repeat(700), "raw").unwrap();
    assert!(!switch.atomic && switch.writes.len() == 1);
    let old = overlay(3, 9, "a");
    assert!(plan_backing_switch(&old, "b".repeat(376), "raw").unwrap().atomic);
    assert_eq!(
        plan_backing_switch(&old, "b".repeat(377), "raw"),
        Err(RewriteError::NoRoom { needed: 513, room: 512 })
    );
}

#[test]
fn names_that_no_header_holds_are_refused() {
    let old = overlay(3, 16, "a");
    assert!(plan_backing_switch(&old, "n".repeat(1023), "raw").is_ok());
    for (name, format) in
        [("n".repeat(1024), "raw"), (String::new(), "raw"), ("n".into(), "sixteen-letters-")]
    {
        assert!(matches!(plan_backing_switch(&old, &name, format), Err(RewriteError::Name { .. })));
    }
}

#[test]
fn damaged_headers_are_not_edited() {
    let mut old = overlay(3, 16, "a");
    old[79] = 0x20;
    for plan in [
        plan_backing_switch(&old, "b", "raw"),
        plan_mark(&old, "b", Mark::Merging),
        plan_drop_bitmaps(&old),
        plan_feature_bits(&old, 0, 0),
    ] {
        assert!(matches!(plan, Err(RewriteError::Format(_))));
    }
}

#[test]
fn feature_bits_are_one_write() {
    let mut cluster = Cluster0::new(header(3, 16));
    cluster.header.autoclear = 1 << 63 | features::DATA_FILE_RAW;
    cluster.header.incompatible = features::DATA_FILE;
    let old = whole(cluster.encode().unwrap());
    let switch = plan_feature_bits(&old, features::DATA_FILE | features::DIRTY, 1 << 63).unwrap();
    assert_eq!((switch.writes.len(), switch.atomic), (1, true));
    let mut new = old;
    switch.writes.iter().for_each(|w| w.apply_to(&mut new));
    let new = Cluster0::parse(&new).unwrap().header;
    assert!(new.is_dirty() && new.has_data_file());
    assert_eq!(new.autoclear, 0, "unknown bits are cleared too");
    let v2 = overlay(2, 16, "a");
    assert_eq!(plan_feature_bits(&v2, 1, 1).unwrap(), Switch { writes: vec![], atomic: true });
}

/// Runs qemu-img in `dir`; gives what it printed.
fn qemu_img(dir: &Path, args: &[&str]) -> String {
    let output = Command::new("qemu-img").args(args).current_dir(dir).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "qemu-img {args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn qemu_img_reads_what_was_edited() {
    if !kit::are_here(&["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    qemu_img(dir, &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "other base.qcow2", "1M"]);
    for options in ["compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=1024", "cluster_size=2M"] {
        for backing in [&["-b", "base.raw", "-F", "raw"][..], &[]] {
            let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options, "top.qcow2", "1M"];
            args.splice(4..4, backing.iter().copied());
            qemu_img(dir, &args);
            if options == "compat=1.1" {
                qemu_img(dir, &["bitmap", "--add", "top.qcow2", "daily"]);
            }
            let path = dir.join("top.qcow2");
            let mut file = std::fs::read(&path).unwrap();
            let cluster0 = Cluster0::parse(&file).unwrap();
            assert_eq!(cluster0.bitmaps().unwrap().is_some(), options == "compat=1.1");
            if let Some(bitmaps) = cluster0.bitmaps().unwrap() {
                let start = bitmaps.directory_offset.get() as usize;
                let directory = &file[start..start + bitmaps.directory_size as usize];
                let list = decode_bitmap_directory(directory, &bitmaps).unwrap();
                assert_eq!(list[0].display_name(), "daily");
                assert!(list[0].validate(&cluster0.header.geometry(), 1 << 20).is_ok());
                assert_eq!(encode_bitmap_directory(&list), directory);
            }
            let apply = |file: &mut Vec<u8>, plan: Switch| plan.writes.iter().for_each(|w| w.apply_to(file));
            let switch = plan_backing_switch(&file, "other base.qcow2", "qcow2").unwrap();
            assert!(switch.atomic, "{options}");
            apply(&mut file, switch);
            for mark in [Mark::Merging, Mark::Merged] {
                let mark = plan_mark(&file, "/somewhere/base.raw", mark).unwrap();
                assert!(mark.atomic, "{options}");
                apply(&mut file, mark);
            }
            let drop = plan_drop_bitmaps(&file).unwrap();
            apply(&mut file, drop);
            std::fs::write(&path, &file).unwrap();
            let info: serde_json::Value =
                serde_json::from_str(&qemu_img(dir, &["info", "--output=json", "top.qcow2"])).unwrap();
            assert_eq!(info["backing-filename"], "other base.qcow2", "{options}");
            assert_eq!(info["backing-filename-format"], "qcow2", "{options}");
            assert!(info["format-specific"]["data"].get("bitmaps").is_none(), "{options}");
            // An edit by QEMU keeps our mark.
            qemu_img(dir, &["rebase", "-u", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
            let read = Cluster0::parse(&std::fs::read(&path).unwrap()).unwrap();
            assert_eq!(read.merged_into().as_deref(), Some(Path::new("/somewhere/base.raw")), "{options}");
            assert_eq!(read.backing_name.as_deref(), Some(&b"base.raw"[..]), "{options}");
        }
    }
}

#[test]
fn fresh_headers_equal_those_of_qemu_img() {
    if !kit::are_here(&["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    qemu_img(dir, &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    for (version, bits) in [(2, 9), (2, 16), (3, 9), (3, 12), (3, 13), (3, 16), (3, 21)] {
        let compat = if version == 2 { "0.10" } else { "1.1" };
        let options = format!("compat={compat},cluster_size={}", 1u64 << bits);
        qemu_img(
            dir,
            &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", "-o", &options, "a.qcow2"],
        );
        let theirs = std::fs::read(dir.join("a.qcow2")).unwrap();
        let read = Cluster0::parse(&theirs).unwrap();
        let mut ours = Cluster0::new(read.header.clone());
        ours.set_backing(b"base.raw", "raw").unwrap();
        assert_eq!(whole(ours.encode().unwrap()), theirs[..1 << bits], "version {version}, {bits} bits");
    }
}
