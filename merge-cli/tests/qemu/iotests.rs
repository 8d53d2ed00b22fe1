//! Scenarios of QEMU's own test suite (`tests/qemu-iotests`), told by their numbers.

use kit::{Lab, View, qemu_is_here};

use crate::support::{Patch, lab};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const G: u64 = 1 << 30;

/// Fails unless `view` holds `pattern` in `len` bytes at `at`.
#[track_caller]
fn holds(view: &View, pattern: u8, at: u64, len: u64) {
    view.assert_all(at, at + len, pattern, "the pattern");
}

#[test]
fn t020_sectors_of_both_layers_alternate_in_one_cluster() {
    if !qemu_is_here() {
        return;
    }
    for (format, options) in
        [("raw", ""), ("qcow2", "cluster_size=64k"), ("qcow2", "compat=0.10"), ("qcow2", "extended_l2=on")]
    {
        let folder = lab("t020");
        if format == "raw" {
            folder.img(&["create", "-q", "-f", "raw", "base", "6G"]);
        } else {
            folder.create("base", 6 * G, options);
        }
        let stripes = |pattern: u64, shift: u64| {
            let mut commands = Vec::new();
            for area in [0, 4 * G] {
                for index in 0..64 {
                    commands.push(format!("write -P {pattern} {} 512", area + shift + index * 1024));
                }
                commands.push(format!("write -P {} {} 64k", pattern + 1, area + M + shift / 512 * 64 * K));
            }
            commands
        };
        let io = |format: &str, name: &str, commands: Vec<String>| {
            folder.io(format, name, &commands.iter().map(String::as_str).collect::<Vec<_>>())
        };
        io(format, "base", stripes(0x11, 0));
        folder.overlay("top.qcow2", "base", format, None, options);
        io("qcow2", "top.qcow2", stripes(0x21, 512));
        folder.merge("top.qcow2", &[]);
        let merged = folder.view(format, "base");
        for area in [0, 4 * G] {
            for index in 0..64 {
                holds(&merged, 0x11, area + index * 1024, 512);
                holds(&merged, 0x21, area + index * 1024 + 512, 512);
            }
            holds(&merged, 0x12, area + M, 64 * K);
            holds(&merged, 0x22, area + M + 64 * K, 64 * K);
            holds(&merged, 0, area + 2 * M, M);
        }
    }
}

#[test]
fn t020_the_middle_image_is_named_as_qemu_names_it() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("t020b");
    std::fs::create_dir(folder.join("subdir")).unwrap();
    folder.create("subdir/t.base", M, "");
    folder.overlay("subdir/t.mid", "t.base", "qcow2", Some(M), "");
    folder.overlay("subdir/t.top", "t.mid", "qcow2", Some(M), "");
    folder.io("qcow2", "subdir/t.top", &["write -P 1 0 64k"]);
    // A path is a path: relative to the current folder, as every command has it.
    folder.merge("subdir/t.top", &["--base", "subdir/t.mid"]);
    folder.io("qcow2", "subdir/t.top", &["write -P 2 0 64k"]);
    folder.merge("subdir/t.top", &["--base", &folder.arg("subdir/t.mid")]);
    holds(&folder.view("qcow2", "subdir/t.mid"), 2, 0, 64 * K);
}

#[test]
fn t039_no_image_is_left_dirty() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("t039");
    folder.create("base.qcow2", 128 * M, "lazy_refcounts=on");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "lazy_refcounts=on");
    folder.io("qcow2", "top.qcow2", &["write -P 1 0 512"]);
    folder.merge("top.qcow2", &[]);
    for name in ["base.qcow2", "top.qcow2"] {
        let image = Patch::of(&folder, name);
        assert_eq!(image.u64(72) & 1, 0, "{name} is dirty");
    }
    assert_eq!(Patch::of(&folder, "base.qcow2").u64(80) & 1, 1, "base lost its lazy refcounts");
}

/// Beyond 2 GiB, with an end inside a cluster.
fn t097(options: &[&str], prepare: impl Fn(&Lab)) -> Lab {
    let folder = lab("t097");
    let size = 2100 * M + 512;
    folder.create("base.qcow2", size, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0x7ffd0000 192k"]);
    folder.overlay("mid.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "mid.qcow2", &["write -P 2 0x7ffe0000 128k"]);
    folder.overlay("top.qcow2", "mid.qcow2", "qcow2", None, "");
    folder.io(
        "qcow2",
        "top.qcow2",
        &["write -P 3 0x7fff0000 64k", &format!("write -P 4 {} 512", size - 512)],
    );
    prepare(&folder);
    folder.merge("top.qcow2", options);
    let guest = folder.view("qcow2", "top.qcow2");
    holds(&guest, 1, 0x7ffd_0000, 64 * K);
    holds(&guest, 2, 0x7ffe_0000, 64 * K);
    holds(&guest, 3, 0x7fff_0000, 64 * K);
    holds(&guest, 4, size - 512, 512);
    folder
}

#[test]
fn t097_into_the_bottom() {
    if qemu_is_here() {
        let folder = t097(&[], |_| {});
        let base = folder.view("qcow2", "base.qcow2");
        base.assert_same(&folder.view("qcow2", "top.qcow2"), "base");
        assert_eq!(folder.chain_of("top.qcow2"), ["top.qcow2", "base.qcow2"]);
    }
}

#[test]
fn t097_into_the_middle() {
    if qemu_is_here() {
        let folder = t097(&["--base", "mid.qcow2"], |_| {});
        let mid = folder.view("qcow2", "mid.qcow2");
        mid.assert_same(&folder.view("qcow2", "top.qcow2"), "mid");
        holds(&folder.view("qcow2", "base.qcow2"), 1, 0x7ffd_0000, 192 * K);
        assert_eq!(folder.chain_of("top.qcow2"), ["top.qcow2", "mid.qcow2", "base.qcow2"]);
    }
}

#[test]
fn t097_keeping_the_active_image() {
    if qemu_is_here() {
        let folder = t097(&["--keep-active"], |_| {});
        folder.view("qcow2", "base.qcow2").assert_same(&folder.view("qcow2", "top.qcow2"), "base");
    }
}

#[test]
fn t176_a_snapshot_of_the_active_image_survives() {
    if qemu_is_here() {
        let folder = t097(&["--allow-snapshot-change"], |folder| {
            folder.img(&["snapshot", "-c", "snap", "top.qcow2"]);
        });
        folder.img(&["snapshot", "-l", "top.qcow2"]).says("snap");
    }
}

#[test]
fn t176_a_bitmap_of_the_active_image_stays_and_goes_with_the_image_only_when_told() {
    if qemu_is_here() {
        let folder = t097(&[], |folder| {
            folder.img(&["bitmap", "--add", "top.qcow2", "backup"]);
            folder.refused(&["commit", "top.qcow2", "--delete"], &[6]).says("backup");
        });
        folder.img(&["info", "top.qcow2"]).ok().says("backup");
    }
}

/// base 2 MiB all 1, mid 1 MiB empty, top 2 MiB empty.
fn t274() -> Lab {
    let folder = lab("t274");
    folder.create("base.qcow2", 2 * M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 2M"]);
    folder.overlay("mid.qcow2", "base.qcow2", "qcow2", Some(M), "");
    folder.overlay("top.qcow2", "mid.qcow2", "qcow2", Some(2 * M), "");
    folder
}

#[test]
fn t274_into_the_short_middle() {
    if qemu_is_here() {
        let folder = t274();
        folder.merge("top.qcow2", &["--shallow"]);
        let mid = folder.view("qcow2", "mid.qcow2");
        holds(&mid, 1, 0, M);
        holds(&mid, 0, M, M);
        folder.view("qcow2", "base.qcow2").assert_all(0, 2 * M, 1, "base");
    }
}

#[test]
fn t274_into_the_longer_base() {
    if qemu_is_here() {
        for options in [&[][..], &["--top", "mid.qcow2"]] {
            let folder = t274();
            folder.merge("top.qcow2", options);
            let base = folder.view("qcow2", "base.qcow2");
            holds(&base, 1, 0, M);
            holds(&base, 0, M, M);
        }
    }
}

#[test]
fn t274_a_short_overlay_that_was_resized_reads_zeros() {
    if !qemu_is_here() {
        return;
    }
    // Base, overlay, and the overlay's later size; the exposed range reads zeros and stays so.
    for (base, overlay, grown, preallocation) in [
        (6 * G, G, 8 * G, "off"),
        (6 * G, G, 8 * G, "metadata"),
        (384 * K, 253 * K, 512 * K, "falloc"),
        (400 * K, 256 * K, 512 * K, "full"),
        (512 * K, 256 * K, 500 * K, "metadata"),
    ] {
        let folder = lab("t274b");
        folder.create("base.qcow2", base, "");
        let at = if base > M { 5 * G } else { 256 * K };
        folder.io("qcow2", "base.qcow2", &[&format!("write -P 1 {at} 64k"), "write -P 2 0 64k"]);
        folder.overlay("mid.qcow2", "base.qcow2", "qcow2", Some(overlay), "");
        let option = format!("--preallocation={preallocation}");
        folder.img(&["resize", "-q", "-f", "qcow2", &option, "mid.qcow2", &grown.to_string()]);
        folder.overlay("top.qcow2", "mid.qcow2", "qcow2", None, "");
        folder.io("qcow2", "top.qcow2", &["write -P 3 64k 4k"]);
        folder.merge("top.qcow2", &["--base", "base.qcow2"]);
        let merged = folder.view("qcow2", "base.qcow2");
        holds(&merged, 2, 0, 64 * K);
        holds(&merged, 3, 64 * K, 4 * K);
        holds(&merged, 0, at, 64 * K);
    }
}

#[test]
fn t313_a_merge_frees_more_clusters_than_a_cache_holds() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("t313");
    // A refcount block of 4 KiB with 64-bit entries describes 512 clusters, 2 MiB of data.
    let size = 4 * 2 * M + 4 * K;
    folder.create("base.qcow2", size, "cluster_size=4k,refcount_bits=64");
    folder.io("qcow2", "base.qcow2", &[&format!("write -P 1 0 {size}")]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "cluster_size=4k,refcount_bits=64");
    folder.io("qcow2", "top.qcow2", &[&format!("write -z 0 {size}")]);
    folder.merge("top.qcow2", &[]);
    holds(&folder.view("qcow2", "base.qcow2"), 0, 0, size);
}

#[test]
fn t024_every_combination_of_three_layers() {
    if !qemu_is_here() {
        return;
    }
    for cluster in ["64k", "4k", "512"] {
        let folder = lab("t024");
        let options = format!("cluster_size={cluster}");
        folder.create("base.qcow2", 2 * M, &options);
        folder.overlay("a.qcow2", "base.qcow2", "qcow2", None, &options);
        folder.overlay("c.qcow2", "a.qcow2", "qcow2", None, &options);
        // Eight pieces, each held by another subset of the layers.
        for (name, bit) in [("base.qcow2", 1), ("a.qcow2", 2), ("c.qcow2", 4)] {
            let pieces = (0..16).filter(|piece| (piece % 8) & bit != 0);
            let commands: Vec<_> =
                pieces.map(|at| format!("write -P {} {} 64k", bit * 17, at * 64 * K)).collect();
            folder.io("qcow2", name, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        }
        let before = folder.view("qcow2", "c.qcow2");
        let held_by_c = Patch::of(&folder, "c.qcow2").len();
        folder.merge("c.qcow2", &["--top", "a.qcow2"]);
        assert_eq!(Patch::of(&folder, "c.qcow2").len(), held_by_c, "the overlay above top took data");
        folder.merge("c.qcow2", &[]);
        folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
    }
}

#[test]
fn t024_the_last_cluster_past_a_short_top_stays_zero() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("t024b");
    folder.create("base.qcow2", 5 * 64 * K, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 320k"]);
    folder.overlay("a.qcow2", "base.qcow2", "qcow2", Some(4 * 64 * K), "");
    folder.overlay("c.qcow2", "a.qcow2", "qcow2", Some(5 * 64 * K), "cluster_size=128k");
    folder.io("qcow2", "c.qcow2", &["write -P 2 0 64k"]);
    folder.merge("c.qcow2", &["--top", "a.qcow2"]);
    let guest = folder.view("qcow2", "c.qcow2");
    holds(&guest, 2, 0, 64 * K);
    holds(&guest, 1, 64 * K, 192 * K);
    holds(&guest, 0, 256 * K, 64 * K);
}

#[test]
fn t028_a_backing_file_that_ends_between_two_sectors_of_a_cluster() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("t028");
    let (base, top) = (3 * G + 1536, 4 * G + 1536);
    folder.create("base.qcow2", base, "");
    folder.io("qcow2", "base.qcow2", &[&format!("write -P 1 {} 16k", base - 16 * K)]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", Some(top), "");
    let commands: Vec<_> = (0..16).map(|i| format!("write -P 2 {} 512", base - 8 * K + i * 1024)).collect();
    folder.io("qcow2", "top.qcow2", &commands.iter().map(String::as_str).collect::<Vec<_>>());
    let before = folder.view("qcow2", "top.qcow2");
    folder.merge("top.qcow2", &[]);
    folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
}

#[test]
fn t050_zeros_over_a_full_backing_file_stay_zeros() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let folder = lab("t050");
        folder.img(&["create", "-q", "-f", format, "base", "10M"]);
        folder.io(format, "base", &["write -P 0x5a 0 10M"]);
        folder.overlay("a.qcow2", "base", format, None, "");
        folder.io("qcow2", "a.qcow2", &["write -z 0 10M"]);
        folder.overlay("c.qcow2", "a.qcow2", "qcow2", None, "");
        folder.merge("c.qcow2", &["--top", "a.qcow2"]);
        folder.view(format, "base").assert_all(0, 10 * M, 0, "base");
        folder.merge("c.qcow2", &[]);
    }
}

#[test]
fn t042_disks_without_bytes() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("t042");
    folder.create("base.qcow2", 0, "");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.qmerge(&["map", "top.qcow2", "--json"]).ok();
    folder.qmerge(&["check", "base.qcow2"]).ok();
    folder.qmerge(&["compare", "top.qcow2", "base.qcow2"]).ok();
    folder.merge("top.qcow2", &[]);
    for format in ["raw", "qcow2"] {
        folder.qmerge(&["flatten", "top.qcow2", "-o", "flat", "--to", format]).ok();
        assert_eq!(folder.view(format, "flat").len(), 0);
        std::fs::remove_file(folder.join("flat")).unwrap();
    }
}

#[test]
fn t031_unknown_header_extensions_survive() {
    if !qemu_is_here() {
        return;
    }
    for compat in ["1.1", "0.10"] {
        let folder = lab("t031");
        let options = format!("compat={compat}");
        folder.create("base.qcow2", M, &options);
        folder.overlay("a.qcow2", "base.qcow2", "qcow2", None, &options);
        folder.overlay("c.qcow2", "a.qcow2", "qcow2", None, &options);
        folder.io("qcow2", "a.qcow2", &["write -P 1 0 64k"]);
        for name in ["base.qcow2", "c.qcow2"] {
            add_extension(&folder, name);
        }
        folder.merge("c.qcow2", &["--top", "a.qcow2"]);
        assert_eq!(folder.backing_of("c.qcow2"), Some(("base.qcow2".into(), "qcow2".into())));
        for name in ["base.qcow2", "c.qcow2"] {
            let head = Patch::of(&folder, name).bytes(0, 4096);
            let found = head.windows(20).any(|window| window == b"\x12\x34\x56\x78\0\0\0\x0cfancy string");
            assert!(found, "the unknown extension of {name} is lost");
        }
    }
}

/// Puts an unknown extension behind the others; the name of the backing file moves behind it.
fn add_extension(folder: &Lab, name: &str) {
    let patch = Patch::of(folder, name);
    let start = if patch.u32(4) == 2 { 72 } else { u64::from(patch.u32(100)) };
    let mut at = start;
    while patch.u32(at) != 0 {
        at += 8 + u64::from(patch.u32(at + 4)).next_multiple_of(8);
    }
    let backing = patch.bytes(patch.u64(8), patch.u32(16) as usize);
    patch.write(at, b"\x12\x34\x56\x78\0\0\0\x0cfancy string\0\0\0\0\0\0\0\0\0\0\0\0");
    if !backing.is_empty() {
        patch.write(at + 32, &backing).set_u64(8, at + 32);
    }
    folder.check_clean(name);
}

#[test]
fn t036_unknown_compatible_bits_are_kept() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("t036");
    folder.create("base.qcow2", M, "");
    folder.overlay("a.qcow2", "base.qcow2", "qcow2", None, "");
    folder.overlay("c.qcow2", "a.qcow2", "qcow2", None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 1 0 64k"]);
    for name in ["base.qcow2", "c.qcow2"] {
        Patch::of(&folder, name).set_bits(80, 1 << 63 | 1 << 5);
    }
    folder.merge("c.qcow2", &["--top", "a.qcow2"]);
    for name in ["base.qcow2", "c.qcow2"] {
        assert_eq!(Patch::of(&folder, name).u64(80), 1 << 63 | 1 << 5, "{name}");
    }
}

#[test]
fn t112_every_refcount_width() {
    if !qemu_is_here() {
        return;
    }
    for bits in ["1", "2", "4", "8", "16", "32", "64"] {
        let folder = lab("t112");
        let options = format!("refcount_bits={bits},cluster_size=4k");
        folder.create("base.qcow2", 4 * M, &options);
        folder.io("qcow2", "base.qcow2", &["write -P 1 0 1M", "write -c -P 2 2M 4k"]);
        if bits != "1" {
            folder.img(&["snapshot", "-c", "snap", "base.qcow2"]);
        }
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, &options);
        folder.io("qcow2", "top.qcow2", &["write -P 3 512k 1M", "write -c -P 4 3M 64k", "write -z 0 32k"]);
        let before = folder.view("qcow2", "top.qcow2");
        folder.merge("top.qcow2", &[]);
        folder.view("qcow2", "base.qcow2").assert_same(&before, &format!("base, {bits} bits"));
    }
}

#[test]
fn t112_a_saturated_refcount_is_no_obstacle() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("t112s");
    folder.create("base.qcow2", M, "refcount_bits=2");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    // Active image and two snapshots: the largest count that two bits hold.
    folder.img(&["snapshot", "-c", "one", "base.qcow2"]);
    folder.img(&["snapshot", "-c", "two", "base.qcow2"]);
    let snapshot = folder.snapshot_view("base.qcow2", "one");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 0 512k"]);
    folder.merge("top.qcow2", &[]);
    folder.snapshot_view("base.qcow2", "one").assert_same(&snapshot, "the snapshot");
}

#[test]
fn t252_zeros_of_a_layer_that_the_base_does_not_have() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("t252");
    folder.create("base.qcow2", 6 * 64 * K, "");
    folder.io(
        "qcow2",
        "base.qcow2",
        &["write -P 0x11 0 64k", "write -P 0x11 128k 64k", "write -P 0x11 256k 64k"],
    );
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 0x22 0 128k", "write -z 256k 128k"]);
    folder.merge("top.qcow2", &[]);
    let base = folder.view("qcow2", "base.qcow2");
    holds(&base, 0x22, 0, 128 * K);
    holds(&base, 0x11, 128 * K, 64 * K);
    holds(&base, 0, 192 * K, 192 * K);
}

#[test]
fn t126_colons_and_odd_letters_in_names() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("t126");
    for base in [
        "./a:b.qcow2",
        "./nbd:c.qcow2",
        "with space.qcow2",
        "umlaut-\u{fc}.qcow2",
        "quote'\".qcow2",
        "%20.qcow2",
        "-dash.qcow2",
    ] {
        let path = folder.arg(base.trim_start_matches("./"));
        folder.create(&path, M, "");
        let name = if base.starts_with('-') { format!("./{base}") } else { base.to_owned() };
        folder.overlay("a.qcow2", &name, "qcow2", Some(M), "");
        folder.overlay("c.qcow2", "a.qcow2", "qcow2", Some(M), "");
        folder.io("qcow2", "a.qcow2", &["write -P 1 0 64k"]);
        folder.merge("c.qcow2", &["--top", "[2]"]);
        let (written, _) = folder.backing_of("c.qcow2").unwrap();
        assert!(written == base || written == name, "{written} instead of {base}");
        folder.io("qcow2", "c.qcow2", &["write -P 2 0 64k"]);
        folder.merge("c.qcow2", &["--delete"]);
        std::fs::remove_file(&path).unwrap();
    }
}
