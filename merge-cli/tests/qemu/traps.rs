//! The traps of merging, one test each: every one has bitten an engine, or QEMU itself.

use kit::{Lab, qemu_is_here};

use crate::support::{Patch, lab};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;

/// Runs `test` for a raw and for a qcow2 base of `size` bytes, filled with 0x11.
fn with_full_base(name: &str, size: u64, test: impl Fn(&Lab, &'static str, &'static str)) {
    if !qemu_is_here() {
        return;
    }
    for (format, base) in [("raw", "base.raw"), ("qcow2", "base.qcow2")] {
        let folder = lab(name);
        folder.img(&["create", "-q", "-f", format, base, &size.to_string()]);
        folder.io(format, base, &[&format!("write -P 0x11 0 {size}")]);
        test(&folder, format, base);
    }
}

#[test]
fn a_short_middle_layer_hides_what_lies_below_its_end() {
    with_full_base("short-mid", 8 * M, |folder, format, base| {
        folder.overlay("mid.qcow2", base, format, Some(4 * M), "");
        folder.overlay("top.qcow2", "mid.qcow2", "qcow2", Some(8 * M), "");
        folder.merge("top.qcow2", &[]);
        let merged = folder.view(format, base);
        merged.assert_all(0, 4 * M, 0x11, "the part that mid shows");
        merged.assert_all(4 * M, 8 * M, 0, "the part past mid's end");
    });
}

#[test]
fn a_short_middle_layer_with_an_odd_end_hides_to_the_byte() {
    with_full_base("odd-mid", 8 * M, |folder, format, base| {
        folder.overlay("mid.qcow2", base, format, Some(4 * M + 512 * 3), "");
        folder.overlay("top.qcow2", "mid.qcow2", "qcow2", Some(8 * M), "cluster_size=4k");
        folder.io("qcow2", "top.qcow2", &["write -P 0x33 5M 1k"]);
        folder.merge("top.qcow2", &[]);
        let merged = folder.view(format, base);
        merged.assert_all(0, 4 * M + 1536, 0x11, "the part that mid shows");
        merged.assert_all(4 * M + 1536, 5 * M, 0, "the part past mid's end");
        merged.assert_all(5 * M, 5 * M + 1024, 0x33, "top's own data");
        merged.assert_all(5 * M + 1024, 8 * M, 0, "the rest");
    });
}

#[test]
fn a_short_layer_merged_into_a_middle_base_grows_it_with_zeros() {
    with_full_base("grow-mid", 2 * M, |folder, format, base| {
        folder.overlay("mid.qcow2", base, format, Some(M), "");
        folder.overlay("top.qcow2", "mid.qcow2", "qcow2", Some(2 * M), "");
        let before = folder.files();
        folder.merge("top.qcow2", &["--base", "mid.qcow2"]);
        let mid = folder.view("qcow2", "mid.qcow2");
        assert_eq!(mid.len(), 2 * M);
        mid.assert_all(0, M, 0x11, "what mid showed");
        mid.assert_all(M, 2 * M, 0, "what mid hid");
        assert_eq!(folder.files()[base], before[base]);
    });
}

#[test]
fn the_overlay_above_a_short_top_still_reads_zeros_past_its_end() {
    with_full_base("short-top", 8 * M, |folder, format, base| {
        folder.overlay("a.qcow2", base, format, Some(4 * M), "");
        folder.overlay("c.qcow2", "a.qcow2", "qcow2", Some(8 * M), "");
        folder.io("qcow2", "a.qcow2", &["write -P 0x22 1M 1M"]);
        folder.merge("c.qcow2", &["--top", "a.qcow2"]);
        let guest = folder.view("qcow2", "c.qcow2");
        guest.assert_all(M, 2 * M, 0x22, "a's data");
        guest.assert_all(4 * M, 8 * M, 0, "past a's end");
        assert_eq!(folder.chain_of("c.qcow2"), ["c.qcow2", base]);
    });
}

#[test]
fn the_tail_of_a_longer_base_is_kept_when_the_active_image_is_short() {
    with_full_base("short-active", 8 * M, |folder, format, base| {
        folder.overlay("c.qcow2", base, format, Some(4 * M), "");
        folder.io("qcow2", "c.qcow2", &["write -P 0x22 1M 1M"]);
        let run = folder.merge("c.qcow2", &[]);
        let merged = folder.view(format, base);
        assert_eq!(merged.len(), 8 * M, "base never shrinks");
        merged.assert_all(4 * M, 8 * M, 0x11, "base's old tail");
        assert!(
            run.text().contains("tail") || run.text().contains("4194304"),
            "the tail is not announced:\n{run}"
        );
    });
}

#[test]
fn a_grown_base_does_not_show_its_own_backings_tail() {
    with_full_base("grown-base", 8 * M, |folder, format, bottom| {
        for compat in ["1.1", "0.10"] {
            folder.overlay("base.mid", bottom, format, Some(4 * M), &format!("compat={compat}"));
            folder.overlay("top.qcow2", "base.mid", "qcow2", Some(8 * M), "");
            folder.io("qcow2", "top.qcow2", &["write -P 0x22 6M 64k"]);
            folder.merge("top.qcow2", &["--base", "base.mid"]);
            let merged = folder.view("qcow2", "base.mid");
            assert_eq!(merged.len(), 8 * M);
            merged.assert_all(0, 4 * M, 0x11, "what base showed");
            merged.assert_all(4 * M, 6 * M, 0, "the new part");
            merged.assert_all(6 * M, 6 * M + 64 * K, 0x22, "top's data");
            merged.assert_all(6 * M + 64 * K, 8 * M, 0, "the new part");
        }
    });
}

#[test]
fn a_base_grown_inside_a_cluster_does_not_show_its_backings_tail() {
    with_full_base("grown-odd", 8 * M, |folder, format, bottom| {
        for compat in ["1.1", "0.10"] {
            folder.overlay("mid.qcow2", bottom, format, Some(M + 5 * 512), &format!("compat={compat}"));
            folder.overlay("top.qcow2", "mid.qcow2", "qcow2", Some(2 * M + 512), "");
            folder.merge("top.qcow2", &["--base", "mid.qcow2"]);
            let merged = folder.view("qcow2", "mid.qcow2");
            merged.assert_all(0, M + 2560, 0x11, "what base showed");
            merged.assert_all(M + 2560, 2 * M + 512, 0, "the new part");
        }
    });
}

#[test]
fn a_discard_hides_what_lies_below_in_version_3_and_keeps_data_in_version_2() {
    with_full_base("discard", M, |folder, format, base| {
        for (compat, shown) in [("1.1", 0), ("0.10", 0x22)] {
            let name = "top.qcow2";
            folder.io(format, base, &["write -P 0x11 0 1M"]);
            folder.overlay(name, base, format, None, &format!("compat={compat}"));
            folder.io("qcow2", name, &["write -P 0x22 0 256k", "discard 64k 64k"]);
            folder.view("qcow2", name).assert_all(64 * K, 128 * K, shown, "QEMU's own reading");
            folder.merge(name, &[]);
            let merged = folder.view(format, base);
            merged.assert_all(0, 64 * K, 0x22, "before the discard");
            merged.assert_all(64 * K, 128 * K, shown, "the discarded cluster");
            merged.assert_all(128 * K, 256 * K, 0x22, "after the discard");
        }
    });
}

#[test]
fn allocated_zero_clusters_are_zeros_not_their_old_data() {
    with_full_base("zero-alloc", M, |folder, format, base| {
        folder.overlay("top.qcow2", base, format, None, "");
        folder.io("qcow2", "top.qcow2", &["write -P 0x22 0 256k", "write -z 64k 128k"]);
        let map = folder.img(&["map", "--output=json", "-f", "qcow2", "top.qcow2"]).json();
        let held = map.as_array().unwrap().iter().any(|e| e["zero"] == true && e["offset"].is_u64());
        assert!(held, "the clusters did not keep their place: {map}");
        folder.merge("top.qcow2", &[]);
        let merged = folder.view(format, base);
        merged.assert_all(64 * K, 192 * K, 0, "the zero clusters");
        merged.assert_all(192 * K, 256 * K, 0x22, "top's data");
        merged.assert_all(256 * K, M, 0x11, "base's data");
    });
}

#[test]
fn zeros_written_over_data_in_a_middle_layer_stay_zeros() {
    with_full_base("zeros", M, |folder, format, base| {
        folder.overlay("a.qcow2", base, format, None, "");
        folder.overlay("b.qcow2", "a.qcow2", "qcow2", None, "");
        folder.overlay("c.qcow2", "b.qcow2", "qcow2", None, "");
        folder.io("qcow2", "a.qcow2", &["write -P 0x22 0 512k"]);
        folder.io("qcow2", "b.qcow2", &["write -z -u 64k 256k", "write -z 600k 3k"]);
        folder.merge("c.qcow2", &["--top", "b.qcow2"]);
        folder.view(format, base).assert_all(64 * K, 320 * K, 0, "b's zeros");
        folder.merge("c.qcow2", &[]);
    });
}

#[test]
fn compressed_clusters_that_share_a_host_cluster_merge() {
    with_full_base("compressed", 4 * M, |folder, format, base| {
        for (kind, cluster) in
            [("zlib", "4k"), ("zstd", "64k"), ("zlib", "2M"), ("zlib", "512"), ("zstd", "1k")]
        {
            let options = format!("compression_type={kind},cluster_size={cluster}");
            folder.overlay("top.qcow2", base, format, None, &options);
            let commands = ["write -c -P 0x21 0 4M", "write -P 0x22 4k 512", "write -P 0x23 1M 1k"];
            folder.io("qcow2", "top.qcow2", &commands);
            let check = folder.img(&["check", "--output=json", "top.qcow2"]).json();
            assert!(check["compressed-clusters"].as_u64() > Some(0), "nothing was compressed: {check}");
            folder.merge("top.qcow2", &[]);
            let merged = folder.view(format, base);
            merged.assert_all(0, 4 * K, 0x21, "compressed data");
            merged.assert_all(4 * K, 4 * K + 512, 0x22, "data over it");
            merged.assert_all(M + K, 4 * M, 0x21, "compressed data");
        }
    });
}

#[test]
fn a_compressed_base_takes_data_over_and_beside_its_clusters() {
    if !qemu_is_here() {
        return;
    }
    for (kind, cluster) in [("zlib", "64k"), ("zstd", "4k"), ("zlib", "512")] {
        let folder = lab("compressed-base");
        let options = format!("compression_type={kind},cluster_size={cluster}");
        folder.create("base.qcow2", 2 * M, &options);
        folder.io("qcow2", "base.qcow2", &["write -c -P 0x21 0 1M"]);
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "cluster_size=4k");
        let commands = ["write -P 0x22 512 512", "write -P 0x23 100k 300k", "write -z 900k 300k"];
        folder.io("qcow2", "top.qcow2", &commands);
        folder.merge("top.qcow2", &[]);
        let merged = folder.view("qcow2", "base.qcow2");
        merged.assert_all(0, 512, 0x21, "base's compressed data");
        merged.assert_all(512, 1024, 0x22, "data over it");
        merged.assert_all(1024, 100 * K, 0x21, "base's compressed data");
        merged.assert_all(100 * K, 400 * K, 0x23, "data over it");
        merged.assert_all(900 * K, 2 * M, 0, "zeros");
    }
}

#[test]
fn clusters_that_a_snapshot_shares_are_copied_never_overwritten() {
    if !qemu_is_here() {
        return;
    }
    for options in ["", "compat=0.10", "extended_l2=on", "cluster_size=512", "refcount_bits=2"] {
        let folder = lab("snapshots");
        folder.create("base.qcow2", 2 * M, options);
        folder.io("qcow2", "base.qcow2", &["write -P 0x11 0 1M", "write -c -P 0x12 1M 64k"]);
        folder.img(&["snapshot", "-c", "first", "base.qcow2"]);
        folder.io("qcow2", "base.qcow2", &["write -P 0x13 256k 256k"]);
        folder.img(&["snapshot", "-c", "second", "base.qcow2"]);
        let (first, second) =
            (folder.snapshot_view("base.qcow2", "first"), folder.snapshot_view("base.qcow2", "second"));
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
        let commands =
            ["write -P 0x22 0 300k", "write -z 512k 64k", "write -P 0x23 1M 4k", "write -P 0x24 700k 512"];
        folder.io("qcow2", "top.qcow2", &commands);
        let before = folder.view("qcow2", "top.qcow2");
        folder.merge("top.qcow2", &[]);
        folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
        folder.snapshot_view("base.qcow2", "first").assert_same(&first, &format!("first ({options})"));
        folder.snapshot_view("base.qcow2", "second").assert_same(&second, &format!("second ({options})"));
    }
}

#[test]
fn a_snapshot_keeps_its_content_when_base_grows() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("snapshot-grow");
    folder.create("base.qcow2", M, "cluster_size=4k");
    folder.io("qcow2", "base.qcow2", &["write -P 0x11 0 1M"]);
    folder.img(&["snapshot", "-c", "snap", "base.qcow2"]);
    let snapshot = folder.snapshot_view("base.qcow2", "snap");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", Some(40 * M), "");
    folder.io("qcow2", "top.qcow2", &["write -P 0x22 512k 1M", "write -P 0x23 39M 1M"]);
    folder.merge("top.qcow2", &[]);
    folder.snapshot_view("base.qcow2", "snap").assert_same_range(&snapshot, 0, M, "the snapshot");
    folder.img(&["snapshot", "-a", "snap", "base.qcow2"]);
    folder.check_clean("base.qcow2");
    folder.view("qcow2", "base.qcow2").assert_same_range(&snapshot, 0, M, "base after going back");
}

#[test]
fn odd_virtual_ends_merge_to_the_last_byte() {
    if !qemu_is_here() {
        return;
    }
    for (raw_len, top_len) in [(1_000_000, 1_000_448), (1_000_000, 1_048_576 + 512), (1, 512), (513, 66_048)]
    {
        let folder = lab("odd-end");
        folder.raw("base.raw", raw_len, raw_len, 0x11);
        folder.overlay("top.qcow2", "base.raw", "raw", Some(top_len), "");
        folder.io("qcow2", "top.qcow2", &[&format!("write -P 0x22 {} 512", top_len - 512)]);
        folder.merge("top.qcow2", &[]);
        let merged = folder.view("raw", "base.raw");
        assert_eq!(merged.len(), top_len);
        merged.assert_all(top_len - 512, top_len, 0x22, "the last sector");
        merged.assert_all(0, raw_len.min(top_len - 512), 0x11, "base's data");
        merged.assert_all(raw_len.min(top_len - 512), top_len - 512, 0, "between");
    }
}

#[test]
fn an_odd_raw_base_under_a_top_that_writes_nothing_at_the_end() {
    if !qemu_is_here() {
        return;
    }
    for raw_len in [1_000_000, 999_999, 4097] {
        let folder = lab("odd-raw");
        folder.raw("base.raw", raw_len, raw_len, 0x11);
        folder.overlay("top.qcow2", "base.raw", "raw", None, "cluster_size=512");
        folder.io("qcow2", "top.qcow2", &["write -P 0x22 0 1k"]);
        folder.merge("top.qcow2", &[]);
        let merged = folder.view("raw", "base.raw");
        merged.assert_all(0, 1024, 0x22, "top's data");
        merged.assert_all(1024, raw_len, 0x11, "base's data");
    }
}

#[test]
fn a_larger_base_cluster_keeps_the_chains_content_around_a_small_change() {
    if !qemu_is_here() {
        return;
    }
    for (cluster, compat) in [("2M", "1.1"), ("64k", "0.10"), ("1M", "1.1")] {
        let folder = lab("partial");
        folder.raw("bottom.raw", 4 * M, 4 * M, 0x11);
        let options = format!("cluster_size={cluster},compat={compat}");
        folder.overlay("base.qcow2", "bottom.raw", "raw", None, &options);
        folder.overlay("a.qcow2", "base.qcow2", "qcow2", None, "cluster_size=512");
        folder.overlay("top.qcow2", "a.qcow2", "qcow2", None, "cluster_size=4k");
        folder.io("qcow2", "a.qcow2", &["write -P 0x22 1k 512", "write -P 0x22 3M 1k"]);
        folder.io("qcow2", "top.qcow2", &["write -P 0x33 2M 512", "write -z 3M 512"]);
        let before = folder.view("qcow2", "top.qcow2");
        folder.merge("top.qcow2", &["--base", "base.qcow2"]);
        folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
    }
}

#[test]
fn refcount_blocks_and_their_table_grow_in_the_middle_of_a_merge() {
    if !qemu_is_here() {
        return;
    }
    // With clusters of 512 bytes and 64-bit refcounts a block describes 32 KiB, and a table cluster 2 MiB.
    for options in
        ["cluster_size=512,refcount_bits=64", "cluster_size=512", "cluster_size=1k,refcount_bits=1"]
    {
        let folder = lab("refcounts");
        folder.create("base.qcow2", 12 * M, options);
        folder.io("qcow2", "base.qcow2", &["write -P 0x11 0 100k"]);
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
        folder.io("qcow2", "top.qcow2", &["write -P 0x22 50k 5M", "write -P 0x23 6M 6M"]);
        let before = folder.view("qcow2", "top.qcow2");
        let table = Patch::of(&folder, "base.qcow2").refcount_table_offset();
        folder.merge("top.qcow2", &[]);
        folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
        if options.contains("512") {
            assert_ne!(
                Patch::of(&folder, "base.qcow2").refcount_table_offset(),
                table,
                "the table did not move"
            );
        }
        let limit = 12 * M * 3 / 2;
        assert!(
            Patch::of(&folder, "base.qcow2").len() < limit,
            "base is larger than {limit} bytes ({options})"
        );
    }
}

#[test]
fn the_first_table_of_a_base_grows_with_its_size() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("l1");
    folder.create("base.qcow2", M, "cluster_size=512");
    folder.io("qcow2", "base.qcow2", &["write -P 0x11 0 1M"]);
    let table = Patch::of(&folder, "base.qcow2").l1_offset();
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", Some(64 * M + 512), "");
    folder.io("qcow2", "top.qcow2", &["write -P 0x22 64M 512", "write -P 0x23 30M 64k"]);
    folder.merge("top.qcow2", &[]);
    let base = Patch::of(&folder, "base.qcow2");
    assert_eq!(base.size(), 64 * M + 512);
    assert_ne!(base.l1_offset(), table, "the table did not move");
    // Once more, over the grown table.
    folder.io("qcow2", "top.qcow2", &["write -P 0x24 0 64k", "write -P 0x25 50M 64k"]);
    folder.merge("top.qcow2", &[]);
    folder.view("qcow2", "base.qcow2").assert_all(50 * M, 50 * M + 64 * K, 0x25, "the second merge");
}

#[test]
fn the_first_cluster_of_a_data_file_is_data() {
    if !qemu_is_here() {
        return;
    }
    for raw in ["off", "on"] {
        let folder = lab("data-file");
        let options = format!("data_file=base.data,data_file_raw={raw}");
        folder.create("base.qcow2", 2 * M, &options);
        folder.io("qcow2", "base.qcow2", &["write -P 0x11 512k 512k"]);
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "data_file=top.data");
        folder.io(
            "qcow2",
            "top.qcow2",
            &["write -P 0x22 0 128k", "write -z 600k 100k", "write -P 0x23 1M 512"],
        );
        let before = folder.view("qcow2", "top.qcow2");
        folder.merge("top.qcow2", &[]);
        folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
        let info = folder.img(&["info", "--output=json", "base.qcow2"]).json();
        let data = &info["format-specific"]["data"];
        assert_eq!(data["data-file-raw"], raw == "on", "{info}");
        if raw == "on" {
            // A raw data file shows the guest's bytes by itself.
            folder.view("raw", "base.data").assert_same(&before, "the raw data file");
        }
    }
}

#[test]
fn a_raw_data_file_of_a_grown_base_shows_the_guests_bytes() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("data-grow");
    folder.create("base.qcow2", M, "data_file=base.data,data_file_raw=on");
    folder.io("qcow2", "base.qcow2", &["write -P 0x11 0 1M"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", Some(3 * M), "");
    folder.io("qcow2", "top.qcow2", &["write -z 0 64k", "write -P 0x22 2M 64k", "discard 128k 64k"]);
    let before = folder.view("qcow2", "top.qcow2");
    folder.merge("top.qcow2", &[]);
    folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
    folder.view("raw", "base.data").assert_same(&before, "the raw data file");
}

#[test]
fn subclusters_move_exactly() {
    if !qemu_is_here() {
        return;
    }
    for (base_options, top_options) in [
        ("extended_l2=on", "extended_l2=on"),
        ("extended_l2=on,cluster_size=16k", "extended_l2=on,cluster_size=2M"),
        ("cluster_size=512", "extended_l2=on"),
        ("extended_l2=on,cluster_size=2M", "cluster_size=4k"),
        ("compat=0.10", "extended_l2=on"),
    ] {
        let folder = lab("subclusters");
        folder.create("base.qcow2", 4 * M, base_options);
        folder.io("qcow2", "base.qcow2", &["write -P 0x11 0 4M"]);
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, top_options);
        let commands = [
            "write -P 0x22 2k 2k",
            "write -z 6k 4k",
            "write -P 0x23 64k 512",
            "write -z -u 128k 64k",
            "discard 2M 128k",
            "write -P 0x24 3M 1k",
            "write -z 3090k 2k",
        ];
        folder.io("qcow2", "top.qcow2", &commands);
        let before = folder.view("qcow2", "top.qcow2");
        folder.merge("top.qcow2", &[]);
        folder
            .view("qcow2", "base.qcow2")
            .assert_same(&before, &format!("{top_options} into {base_options}"));
    }
}

#[test]
fn an_untouched_subcluster_is_not_allocated() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("precise");
    folder.raw("bottom.raw", M, M, 0x11);
    folder.overlay("base.qcow2", "bottom.raw", "raw", None, "extended_l2=on");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "extended_l2=on");
    folder.io("qcow2", "top.qcow2", &["write -P 0x22 64k 2k"]);
    folder.merge("top.qcow2", &["--base", "base.qcow2"]);
    let map = folder.img(&["map", "--output=json", "-f", "qcow2", "base.qcow2"]).json();
    let own = map.as_array().unwrap().iter().filter(|e| e["depth"] == 0 && e["present"] == true);
    let bytes: u64 = own.map(|e| e["length"].as_u64().unwrap()).sum();
    assert_eq!(bytes, 2 * K, "QEMU's own commit fills the cluster: {map}");
}

#[test]
fn a_dirty_base_is_refused_and_keeps_its_data() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("dirty");
    folder.create("base.qcow2", 4 * M, "lazy_refcounts=on");
    // Dies without closing the image: the dirty bit stays, and the refcounts are stale.
    folder.try_io("qcow2", "base.qcow2", &["write -P 1 0 1M", "flush", "abort"]);
    let info = folder.img(&["info", "--output=json", "base.qcow2"]).json();
    assert_eq!(info["dirty-flag"], true, "{info}");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", Some(4 * M), "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 2M 256k"]);
    folder.refused(&["commit", "top.qcow2"], &[9]).says("dirty").says("base.qcow2").says("check");
    folder.refused(&["commit", "top.qcow2", "--dry-run"], &[9]);
    folder.qmerge(&["info", "base.qcow2"]).ok().says("dirty");
}

#[test]
fn a_base_marked_corrupt_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("corrupt");
    folder.create("base.qcow2", M, "");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 0 64k"]);
    Patch::of(&folder, "base.qcow2").set_bits(72, 2);
    folder.refused(&["commit", "top.qcow2"], &[9]).says("corrupt").says("base.qcow2");
    folder.qmerge(&["info", "base.qcow2"]).ok().says("corrupt");
}

#[test]
fn a_top_marked_corrupt_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("corrupt-top");
    folder.create("base.qcow2", M, "");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 0 64k"]);
    Patch::of(&folder, "top.qcow2").set_bits(72, 2);
    folder.refused(&["commit", "top.qcow2"], &[9]).says("corrupt").says("top.qcow2");
}

#[test]
fn unknown_autoclear_bits_of_base_are_cleared_before_it_is_written() {
    if !qemu_is_here() {
        return;
    }
    for (bits, left) in [(1 << 63, 0), (1 << 40 | 1 << 2, 0)] {
        let folder = lab("autoclear");
        folder.create("base.qcow2", M, "");
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
        folder.io("qcow2", "top.qcow2", &["write -P 3 0 64k"]);
        Patch::of(&folder, "base.qcow2").set_bits(88, bits);
        folder.merge("top.qcow2", &[]);
        assert_eq!(Patch::of(&folder, "base.qcow2").u64(88), left);
    }
}

#[test]
fn unknown_incompatible_bits_are_refused_by_name() {
    if !qemu_is_here() {
        return;
    }
    for victim in ["base.qcow2", "mid.qcow2", "top.qcow2"] {
        let folder = lab("incompatible");
        folder.create("base.qcow2", M, "");
        folder.overlay("mid.qcow2", "base.qcow2", "qcow2", None, "");
        folder.overlay("top.qcow2", "mid.qcow2", "qcow2", None, "");
        folder.io("qcow2", "top.qcow2", &["write -P 3 0 64k"]);
        Patch::of(&folder, victim).set_bits(72, 1 << 63);
        folder.refused(&["commit", "top.qcow2"], &[7]).says(victim).says("63");
    }
}

#[test]
fn an_unaligned_l2_entry_in_top_is_refused_where_qemu_aborts() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("unaligned");
    folder.create("base.qcow2", M, "");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 0 128k"]);
    let top = Patch::of(&folder, "top.qcow2");
    top.set_u64(top.l2_entry(0), 1 << 63 | 0x50200);
    folder.refused(&["commit", "top.qcow2"], &[9]).says("top.qcow2");
}

#[test]
fn an_l2_entry_of_base_that_points_at_metadata_is_refused_where_qemu_dies() {
    if !qemu_is_here() {
        return;
    }
    for target in ["l2", "l1", "refcounts", "header"] {
        let folder = lab("overlap");
        folder.create("base.qcow2", M, "");
        folder.io("qcow2", "base.qcow2", &["write -P 1 0 128k"]);
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
        folder.io("qcow2", "top.qcow2", &["write -P 3 0 64k"]);
        let base = Patch::of(&folder, "base.qcow2");
        let value = match target {
            "l2" => base.l2_table(0),
            "l1" => base.l1_offset(),
            "refcounts" => base.refcount_block_offset(),
            _ => 0,
        };
        base.set_u64(base.l2_entry(0), 1 << 63 | value);
        if target == "header" {
            // Offset 0 with COPIED set; without it the entry would be an ordinary hole.
            assert_eq!(base.u64(base.l2_entry(0)), 1 << 63);
        }
        folder.refused(&["commit", "top.qcow2"], &[9]).says("base.qcow2").says("check");
    }
}

#[test]
fn a_refcount_of_base_that_is_too_low_is_refused_where_qemu_destroys_data() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("too-low");
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 128k"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 512k 64k"]);
    let base = Patch::of(&folder, "base.qcow2");
    let cluster = base.host_offset(0) / base.cluster_size();
    base.write(base.refcount_block_offset() + cluster * 2, &[0, 0]);
    folder.refused(&["commit", "top.qcow2"], &[9]).says("base.qcow2").says("check");
}

#[test]
fn leaks_in_base_do_not_stop_a_merge() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("leaks");
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 128k"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 512k 64k", "write -P 4 32k 64k"]);
    let base = Patch::of(&folder, "base.qcow2");
    // A cluster in the middle of the file that nothing refers to.
    base.set_len(101 * base.cluster_size());
    base.write(base.refcount_block_offset() + 100 * 2, &[0, 1]);
    folder.qmerge(&["check", "base.qcow2"]).expect(3);
    let before = folder.view("qcow2", "top.qcow2");
    folder.qmerge(&["commit", "top.qcow2"]).ok();
    folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
    let check = folder.try_img(&["check", "base.qcow2"]);
    assert!(check.code == 0 || check.code == 3, "{check}");
}

#[test]
fn a_truncated_base_is_refused_where_qemu_hides_the_damage() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("truncated");
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 512k"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 768k 64k"]);
    let base = Patch::of(&folder, "base.qcow2");
    base.set_len(base.host_offset(256 * K));
    folder.refused(&["commit", "top.qcow2"], &[9]).says("base.qcow2");
}

#[test]
fn a_truncated_overlay_is_refused_and_base_keeps_its_data() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("truncated-top");
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 0 512k"]);
    let top = Patch::of(&folder, "top.qcow2");
    top.set_len(top.host_offset(256 * K));
    folder.refused(&["commit", "top.qcow2"], &[9]).says("top.qcow2");
}

#[test]
fn snapshots_in_a_merged_layer_are_refused_until_allowed() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("overlay-snapshots");
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    folder.overlay("mid.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "mid.qcow2", &["write -P 2 0 64k"]);
    folder.img(&["snapshot", "-c", "snap", "mid.qcow2"]);
    folder.overlay("top.qcow2", "mid.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 128k 64k"]);
    for options in [&[][..], &["--top", "mid.qcow2"]] {
        let mut args = vec!["commit", "top.qcow2"];
        args.extend(options);
        folder.refused(&args, &[6]).says("mid.qcow2").says("--allow-snapshot-change");
    }
    folder.merge("top.qcow2", &["--top", "mid.qcow2", "--allow-snapshot-change"]);
}

#[test]
fn an_active_image_with_snapshots_is_refused_until_allowed() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("active-snapshots");
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 128k 64k"]);
    folder.img(&["snapshot", "-c", "snap", "top.qcow2"]);
    folder.refused(&["commit", "top.qcow2"], &[6]).says("top.qcow2").says("--allow-snapshot-change");
    folder.merge("top.qcow2", &["--allow-snapshot-change"]);
}

#[test]
fn bitmaps_of_merged_layers_are_refused_until_given_up() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("overlay-bitmaps");
    folder.create("base.qcow2", M, "");
    folder.overlay("mid.qcow2", "base.qcow2", "qcow2", None, "");
    folder.img(&["bitmap", "--add", "mid.qcow2", "backup"]);
    folder.io("qcow2", "mid.qcow2", &["write -P 2 0 64k"]);
    folder.overlay("top.qcow2", "mid.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 128k 64k"]);
    folder.refused(&["commit", "top.qcow2"], &[6]).says("backup").says("--drop-bitmaps");
    folder.refused(&["commit", "top.qcow2", "--top", "mid.qcow2"], &[6]).says("backup");
    folder.merge("top.qcow2", &["--top", "mid.qcow2", "--drop-bitmaps"]);
}

/// The ranges that a persistent bitmap marks, as QEMU exports them.
fn dirty_ranges(folder: &Lab, image: &str, bitmap: &str) -> Vec<(u64, u64)> {
    let socket = folder.scratch().with_extension("sock");
    let mut server = std::process::Command::new("qemu-nbd");
    let bitmap_option = format!("--bitmap={bitmap}");
    server
        .args(["-r", "-f", "qcow2", "--socket", socket.to_str().unwrap(), &bitmap_option])
        .arg(folder.join(image));
    let holder = kit::Holder::start(server, || socket.exists());
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        socket.display()
    );
    let map = folder.img(&["map", "--output=json", "--image-opts", &options]).json();
    drop(holder);
    let number = |entry: &serde_json::Value, key: &str| entry[key].as_u64().unwrap();
    // In this mode QEMU shows a dirty range as a hole.
    let dirty =
        map.as_array().unwrap().iter().filter(|entry| entry["data"] == false).cloned().collect::<Vec<_>>();
    dirty
        .iter()
        .map(|entry| (number(entry, "start"), number(entry, "start") + number(entry, "length")))
        .collect()
}

#[test]
fn a_bitmap_of_base_marks_everything_that_the_merge_changed() {
    if !kit::are_here(&["qemu-img", "qemu-io", "qemu-nbd"]) {
        return;
    }
    let folder = lab("bitmaps");
    folder.create("base.qcow2", 4 * M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 4M"]);
    folder.img(&["bitmap", "--add", "-g", "64k", "base.qcow2", "backup"]);
    folder.io("qcow2", "base.qcow2", &["write -P 2 3M 64k"]);
    assert_eq!(dirty_ranges(&folder, "base.qcow2", "backup"), [(3 * M, 3 * M + 64 * K)], "QEMU's own marks");
    let before = folder.view("qcow2", "base.qcow2");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", Some(6 * M), "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 0 64k", "write -z 1M 100k", "write -P 4 5M 512"]);
    folder.merge("top.qcow2", &[]);
    let after = folder.view("qcow2", "base.qcow2");
    let dirty = dirty_ranges(&folder, "base.qcow2", "backup");
    let mut at = 0;
    for (start, end) in dirty.iter().copied().chain([(after.len(), after.len())]) {
        let what = "content changed outside the bitmap's marks";
        after.assert_same_range(&before, at, start, what);
        at = end;
    }
    assert!(
        dirty.iter().any(|(start, end)| (*start..*end).contains(&(3 * M))),
        "the old mark is lost: {dirty:?}"
    );
    let info = folder.img(&["info", "--output=json", "base.qcow2"]).json();
    let bitmap = &info["format-specific"]["data"]["bitmaps"][0];
    assert_eq!(bitmap["flags"], serde_json::json!(["auto"]), "{info}");
}

#[test]
fn a_backing_format_that_the_file_contradicts_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("wrong-format");
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 2 0 64k"]);
    folder.img(&["rebase", "-u", "-b", "base.qcow2", "-F", "raw", "top.qcow2"]);
    folder.refused(&["commit", "top.qcow2"], &[6]).says("raw").says("qcow2").says("base.qcow2");
}

#[test]
fn a_raw_file_declared_as_qcow2_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("not-qcow2");
    folder.raw("base.raw", M, M, 1);
    folder.overlay("top.qcow2", "base.raw", "raw", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 2 0 64k"]);
    folder.img(&["rebase", "-u", "-b", "base.raw", "-F", "qcow2", "top.qcow2"]);
    folder.refused(&["commit", "top.qcow2"], &[6, 9]).says("base.raw");
}

#[test]
fn a_backing_name_without_format_is_refused_until_told() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("no-format");
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 2 0 64k"]);
    forget_backing_format(&folder, "top.qcow2");
    folder.refused(&["commit", "top.qcow2"], &[6]).says("format").says("--backing-format");
    folder.refused(&["commit", "top.qcow2", "--backing-format", "base.qcow2=raw"], &[6]).says("base.qcow2");
    folder.refused(&["commit", "top.qcow2", "--backing-format", "base.qcow2=vmdk"], &[2]);
    let before = folder.view("qcow2", "top.qcow2");
    folder.merge("top.qcow2", &["--backing-format", "base.qcow2=qcow2"]);
    folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
}

/// Turns the backing format extension into an unknown one, as if the image had been made without a format.
pub(crate) fn forget_backing_format(folder: &Lab, name: &str) {
    let patch = Patch::of(folder, name);
    let mut at = if patch.u32(4) == 2 { 72 } else { u64::from(patch.u32(100)) };
    while patch.u32(at) != 0xe279_2aca {
        assert_ne!(patch.u32(at), 0, "{name} has no backing format");
        at += 8 + u64::from(patch.u32(at + 4)).next_multiple_of(8);
    }
    patch.set_u32(at, 0x1234_5678);
}

#[test]
fn a_merge_into_an_empty_disk_and_of_an_empty_disk() {
    with_full_base("empty", 0, |folder, format, base| {
        folder.overlay("top.qcow2", base, format, Some(0), "");
        folder.merge("top.qcow2", &[]);
        assert_eq!(folder.view(format, base).len(), 0);
        folder.overlay("grown.qcow2", base, format, Some(M), "");
        folder.io("qcow2", "grown.qcow2", &["write -P 5 512k 1k"]);
        folder.merge("grown.qcow2", &["--allow-shared-base"]);
        let merged = folder.view(format, base);
        assert_eq!(merged.len(), M);
        merged.assert_all(512 * K, 513 * K, 5, "the data");
    });
}

#[test]
fn a_disk_has_whole_sectors_as_qemu_shows_them() {
    if !qemu_is_here() {
        return;
    }
    const MIB: u64 = 1 << 20;
    for written in [MIB + 100, 3 * MIB / 2 - 1, MIB] {
        let folder = lab("whole-sectors");
        folder.raw("base", MIB, MIB, 1);
        folder.overlay("o.qcow2", "base", "raw", Some(2 * MIB), "");
        folder.io("qcow2", "o.qcow2", &["write -P 7 960k 64k"]);
        Patch::of(&folder, "o.qcow2").set_u64(24, written);
        let theirs = |format: &str, name: &str| {
            folder.img(&["info", "-f", format, "--output=json", name]).json()["virtual-size"]
                .as_u64()
                .unwrap()
        };
        let size = theirs("qcow2", "o.qcow2");
        assert_eq!(size, written & !511, "QEMU rounds a header down");
        let ours = folder.qmerge(&["info", "--json", "o.qcow2"]).ok().json();
        assert_eq!(ours["virtual-size"], size);
        let map = folder.qmerge(&["map", "--json", "o.qcow2"]).ok().json();
        let end = map.as_array().unwrap().last().unwrap();
        assert_eq!(end["start"].as_u64().unwrap() + end["length"].as_u64().unwrap(), size);
        for to in ["raw", "qcow2"] {
            folder.qmerge(&["flatten", "o.qcow2", "-o", to, "--to", to]).ok();
            assert_eq!(theirs(to, to), size);
            folder.img(&["compare", "-q", "-f", "qcow2", "-F", to, "o.qcow2", to]);
            folder.qmerge(&["compare", "o.qcow2", to]).ok();
        }
        folder.qmerge(&["commit", "o.qcow2"]).ok();
        assert_eq!(theirs("raw", "base"), size);
        folder.img(&["compare", "-q", "-f", "raw", "-F", "raw", "base", "raw"]);
        // A raw file is rounded up.
        std::fs::File::create(folder.join("odd")).unwrap().set_len(written).unwrap();
        let ours = folder.qmerge(&["info", "--json", "-f", "raw", "odd"]).ok().json();
        assert_eq!(ours["virtual-size"], theirs("raw", "odd"));
        assert_eq!(theirs("raw", "odd"), written.next_multiple_of(512));
    }
}
