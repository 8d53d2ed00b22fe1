//! Bugs that other qcow2 engines have or had, one test each; ours must not repeat them.

use std::fs;

use kit::{qemu_is_here, run};

use crate::support::{Patch, lab};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;

#[test]
fn imago_cloud_hypervisor_v2_overlays_have_a_backing_format_too() {
    if !qemu_is_here() {
        return;
    }
    // A guest that writes a qcow2 header into its raw disk must not make us open what that header names.
    let folder = lab("v2-format");
    folder.create("secret.qcow2", M, "");
    folder.io("qcow2", "secret.qcow2", &["write -P 0x66 0 1M"]);
    folder.overlay("evil.qcow2", &folder.arg("secret.qcow2"), "qcow2", None, "");
    let header = fs::read(folder.join("evil.qcow2")).unwrap();
    fs::remove_file(folder.join("evil.qcow2")).unwrap();
    folder.raw("base.raw", M, M, 0x11);
    Patch::of(&folder, "base.raw").write(0, &header);
    for compat in ["0.10", "1.1"] {
        folder.overlay("top.qcow2", "base.raw", "raw", Some(M), &format!("compat={compat}"));
        let gold = folder.view("qcow2", "top.qcow2");
        gold.assert_all(512 * K, M, 0x11, "QEMU's own reading");
        let target = folder.scratch();
        let flat = folder.qmerge(&["flatten", "top.qcow2", "-o", target.to_str().unwrap(), "--to", "raw"]);
        // Refusing a raw image with a qcow2 head is as safe as reading it raw; following it is not.
        match flat.code {
            0 => folder.view("raw", target.to_str().unwrap()).assert_same(&gold, "the flattened image"),
            6 => assert!(flat.text().contains("base.raw"), "{flat}"),
            _ => panic!("{flat}"),
        }
        let info = folder.qmerge(&["info", "top.qcow2"]).ok();
        assert!(!info.text().contains("secret"), "{info}");
    }
}

#[test]
fn qcow2_rs_reads_v3_fields_of_a_v2_header() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("v2-fields");
    folder.create("base.qcow2", M, "compat=0.10");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 64k"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "compat=0.10");
    folder.io("qcow2", "top.qcow2", &["write -P 2 64k 64k"]);
    folder.merge("top.qcow2", &[]);
    assert_eq!(Patch::of(&folder, "base.qcow2").u32(4), 2);
    assert_eq!(Patch::of(&folder, "top.qcow2").u32(4), 2);
}

#[test]
fn qcow2_rs_go_qcow2reader_accept_versions_that_do_not_exist() {
    if !qemu_is_here() {
        return;
    }
    for version in [0, 1, 4, 0x0300_0000] {
        let folder = lab("version");
        folder.create("base.qcow2", M, "");
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
        Patch::of(&folder, "base.qcow2").set_u32(4, version);
        // Version 1 is another format, which the overlay does not declare.
        let (codes, word): (&[i32], _) = if version == 1 { (&[6], "qcow") } else { (&[7, 9], "version") };
        folder.refused(&["commit", "top.qcow2"], codes).says(word).says("base.qcow2");
    }
}

#[test]
fn qcow2_rs_hangs_on_clusters_of_512_bytes() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("small-clusters");
    folder.create("base.qcow2", 4 * M, "cluster_size=512");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "cluster_size=512");
    folder.io("qcow2", "top.qcow2", &["write -P 2 512 2M", "write -z 3M 1000k"]);
    let before = folder.view("qcow2", "top.qcow2");
    folder.merge("top.qcow2", &[]);
    folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
}

#[test]
fn crosvm_masks_zero_clusters_and_reads_stale_data() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("zero-flag");
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 2 0 64k", "write -z 0 64k", "write -z -u 128k 64k"]);
    let gold = folder.view("qcow2", "top.qcow2");
    gold.assert_all(0, 64 * K, 0, "an allocated zero cluster");
    folder.qmerge(&["compare", "top.qcow2", gold.arg()]).ok();
}

#[test]
fn libqcow_reads_compressed_clusters_at_odd_offsets_as_zeros() {
    if !qemu_is_here() {
        return;
    }
    for kind in ["zlib", "zstd"] {
        let folder = lab("odd-offsets");
        folder.create("image.qcow2", 2 * M, &format!("cluster_size=4k,compression_type={kind}"));
        let commands: Vec<_> =
            (0..200).map(|i| format!("write -c -P {} {} 4k", i % 250 + 1, i * 8 * K)).collect();
        folder.io("qcow2", "image.qcow2", &commands.iter().map(String::as_str).collect::<Vec<_>>());
        let image = Patch::of(&folder, "image.qcow2");
        let odd = (0..200).filter(|i| image.u64(image.l2_entry(i * 8 * K)) & 1 == 1).count();
        assert!(odd > 0, "no compressed cluster lies at an odd offset");
        let gold = folder.view("qcow2", "image.qcow2");
        folder.qmerge(&["compare", "image.qcow2", gold.arg()]).ok();
    }
}

#[test]
fn all_rust_engines_hand_out_ciphertext() {
    if !qemu_is_here() {
        return;
    }
    for method in ["luks", "aes"] {
        let folder = lab("encrypted");
        let mut options = format!("encrypt.format={method},encrypt.key-secret=s");
        if method == "luks" {
            options += ",encrypt.iter-time=10";
        }
        folder.img(&[
            "create",
            "-q",
            "--object",
            "secret,id=s,data=x",
            "-f",
            "qcow2",
            "-o",
            &options,
            "base.qcow2",
            "1M",
        ]);
        folder.img(&[
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "top.qcow2",
            "1M",
        ]);
        for args in
            [&["commit", "top.qcow2"][..], &["map", "base.qcow2"], &["compare", "top.qcow2", "base.qcow2"]]
        {
            let codes: &[i32] = if args[0] == "compare" { &[2] } else { &[7] };
            let run = folder.refused(args, codes);
            assert!(run.text().to_lowercase().contains(method), "the method is not named:\n{run}");
        }
        let run = folder.refused(&["flatten", "top.qcow2", "-o", "flat", "--to", "raw"], &[7]);
        assert!(run.text().contains("base.qcow2"), "{run}");
        // What an encrypted image is can be told; that nothing can be done with it, too.
        let info = folder.qmerge(&["info", "base.qcow2"]).says(method);
        assert!([0, 7].contains(&info.code), "{info}");
    }
}

#[test]
fn cloud_hypervisor_crosvm_overwrite_clusters_of_snapshots() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("shared");
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 0x77 0 1M"]);
    folder.img(&["snapshot", "-c", "snap", "base.qcow2"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 0xab 0 64k"]);
    folder.merge("top.qcow2", &[]);
    folder.snapshot_view("base.qcow2", "snap").assert_all(0, M, 0x77, "the snapshot");
}

#[test]
fn cloud_hypervisor_leaks_the_old_place_of_a_reused_zero_cluster() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("zero-reuse");
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 512k", "write -z 0 512k"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 2 0 64k", "write -P 3 100k 512"]);
    let len = Patch::of(&folder, "base.qcow2").len();
    folder.merge("top.qcow2", &[]);
    assert!(Patch::of(&folder, "base.qcow2").len() <= len, "base grew although its clusters were there");
}

#[test]
fn cloud_hypervisor_rebuilds_dirty_images_and_forgets_snapshots() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("dirty-snapshots");
    folder.create("base.qcow2", M, "lazy_refcounts=on");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    folder.img(&["snapshot", "-c", "snap", "base.qcow2"]);
    folder.try_io("qcow2", "base.qcow2", &["write -P 2 0 512k", "flush", "abort"]);
    assert_eq!(Patch::of(&folder, "base.qcow2").u64(72) & 1, 1, "the image is not dirty");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", Some(M), "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 0 64k"]);
    folder.refused(&["commit", "top.qcow2"], &[9]).says("dirty");
}

#[test]
fn cloud_hypervisor_6354_drops_lazy_refcounts() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("lazy");
    folder.create("base.qcow2", M, "lazy_refcounts=on");
    folder.io("qcow2", "base.qcow2", &["write -c -P 1 0 64k"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 0 128k"]);
    folder.merge("top.qcow2", &[]);
    assert_eq!(Patch::of(&folder, "base.qcow2").u64(80) & 1, 1, "the flag is gone");
}

#[test]
fn cloud_hypervisor_8358_8606_hand_out_clusters_that_are_in_use() {
    if !qemu_is_here() {
        return;
    }
    // A compressed base that was resized and discarded: the free clusters lie between the used ones.
    let folder = lab("free-list");
    folder.create("base.qcow2", 4 * M, "cluster_size=4k");
    folder.io(
        "qcow2",
        "base.qcow2",
        &["write -c -P 1 0 2M", "write -P 2 2M 2M", "discard 512k 1M", "discard 2500k 500k"],
    );
    folder.img(&["resize", "-q", "base.qcow2", "8M"]);
    folder.io("qcow2", "base.qcow2", &["write -P 3 5M 64k"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "cluster_size=4k");
    folder.io("qcow2", "top.qcow2", &["write -P 4 600k 700k", "write -P 5 6M 2M", "write -P 6 2600k 100k"]);
    let before = folder.view("qcow2", "top.qcow2");
    folder.merge("top.qcow2", &[]);
    folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
}

#[test]
fn cloud_hypervisor_8597_doubles_the_file_when_refcounts_move() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("doubled");
    folder.create("base.qcow2", 16 * M, "cluster_size=512,refcount_bits=64");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 4 0 8M"]);
    folder.merge("top.qcow2", &[]);
    let len = Patch::of(&folder, "base.qcow2").len();
    assert!(len < 9 * M + M / 2, "8 MiB of data make a file of {len} bytes");
}

#[test]
fn imago_forgets_that_a_data_file_is_raw() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("raw-flag");
    folder.create("base.qcow2", M, "data_file=base.data,data_file_raw=on");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 0 64k"]);
    folder.merge("top.qcow2", &[]);
    assert_eq!(Patch::of(&folder, "base.qcow2").u64(88), 2, "the autoclear bit is gone");
}

#[test]
fn imago_cloud_hypervisor_wipe_persistent_bitmaps() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("wiped");
    folder.create("base.qcow2", M, "");
    folder.img(&["bitmap", "--add", "base.qcow2", "enabled"]);
    folder.img(&["bitmap", "--add", "--disable", "base.qcow2", "disabled"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 0 64k"]);
    folder.merge("top.qcow2", &[]);
    let info = folder.img(&["info", "--output=json", "base.qcow2"]).json();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().expect("the bitmaps are gone");
    assert_eq!(bitmaps.len(), 2, "{info}");
    assert!(
        bitmaps.iter().all(|bitmap| !bitmap["flags"].as_array().unwrap().contains(&"in-use".into())),
        "{info}"
    );
}

#[test]
fn imago_refuses_corrupt_images_even_for_reading() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("read-corrupt");
    folder.create("image.qcow2", M, "");
    folder.io("qcow2", "image.qcow2", &["write -P 3 0 64k"]);
    Patch::of(&folder, "image.qcow2").set_bits(72, 2);
    let gold = folder.view("qcow2", "image.qcow2");
    folder.qmerge(&["compare", "image.qcow2", gold.arg()]).ok();
    let target = folder.scratch();
    folder.qmerge(&["flatten", "image.qcow2", "-o", target.to_str().unwrap(), "--to", "raw"]).ok();
    folder.view("raw", target.to_str().unwrap()).assert_same(&gold, "the rescued data");
}

#[test]
fn qcow2_rs_crosvm_resolve_backing_files_from_the_current_folder() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("relative");
    fs::create_dir(folder.join("vm")).unwrap();
    folder.create("vm/base.qcow2", M, "");
    folder.io("qcow2", "vm/base.qcow2", &["write -P 1 0 1M"]);
    folder.overlay("vm/top.qcow2", "base.qcow2", "qcow2", Some(M), "");
    // A decoy of the same name where the command runs.
    folder.create("base.qcow2", M, "");
    let decoy = folder.files()["base.qcow2"];
    folder.io("qcow2", "vm/top.qcow2", &["write -P 2 0 64k"]);
    folder.merge("vm/top.qcow2", &[]);
    folder.view("qcow2", "vm/base.qcow2").assert_all(64 * K, M, 1, "base");
    assert_eq!(folder.files()["base.qcow2"], decoy);
}

#[test]
fn imago_qcow2_rs_overflow_on_loops() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("loop");
    folder.create("self.qcow2", M, "");
    folder.img(&["rebase", "-u", "-b", "self.qcow2", "-F", "qcow2", "self.qcow2"]);
    folder.create("a.qcow2", M, "");
    folder.create("b.qcow2", M, "");
    folder.img(&["rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2"]);
    folder.img(&["rebase", "-u", "-b", "./a.qcow2", "-F", "qcow2", "b.qcow2"]);
    std::os::unix::fs::symlink("c.qcow2", folder.join("link.qcow2")).unwrap();
    folder.create("c.qcow2", M, "");
    folder.img(&["rebase", "-u", "-b", "link.qcow2", "-F", "qcow2", "c.qcow2"]);
    for image in ["self.qcow2", "a.qcow2", "b.qcow2", "c.qcow2"] {
        for verb in ["commit", "map"] {
            folder.refused(&[verb, image], &[6]).says("loop");
        }
        folder.refused(&["info", image, "--chain"], &[6]).says("loop");
        folder.qmerge(&["info", image]).ok();
    }
}

#[test]
fn imago_qcow2_rs_crash_on_absurd_depth() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("depth");
    const DEPTH: usize = 5000;
    folder.create("l0000.qcow2", M, "cluster_size=4k");
    folder.overlay("l0001.qcow2", "l0000.qcow2", "qcow2", None, "cluster_size=4k");
    let template = fs::read(folder.join("l0001.qcow2")).unwrap();
    let at = Patch::of(&folder, "l0001.qcow2").u64(8) as usize;
    for layer in 2..DEPTH {
        let mut image = template.clone();
        image[at..at + 11].copy_from_slice(format!("l{:04}.qcow2", layer - 1).as_bytes());
        fs::write(folder.join(&format!("l{layer:04}.qcow2")), image).unwrap();
    }
    let active = format!("l{:04}.qcow2", DEPTH - 1);
    folder.qmerge(&["map", &active]).ok().says("nothing");
}

#[test]
fn beta9_1856_chains_of_64_layers_and_more_merge() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("deep");
    folder.create("l0.qcow2", 8 * M, "");
    folder.io("qcow2", "l0.qcow2", &["write -P 255 0 8M"]);
    const DEPTH: u64 = 100;
    for layer in 1..=DEPTH {
        let name = format!("l{layer}.qcow2");
        folder.overlay(&name, &format!("l{}.qcow2", layer - 1), "qcow2", None, "");
        folder.io("qcow2", &name, &[&format!("write -P {layer} {} 8k", layer * 70 * K)]);
    }
    let active = format!("l{DEPTH}.qcow2");
    folder.merge(&active, &["--top", "l50.qcow2", "--base", "l3.qcow2", "--delete"]);
    folder.merge(&active, &["--delete"]);
    assert_eq!(folder.names(), ["l0.qcow2"]);
    let merged = folder.view("qcow2", "l0.qcow2");
    for layer in 1..=DEPTH {
        let at = layer * 70 * K;
        merged.assert_all(at, at + 8 * K, layer as u8, "a layer's data");
        merged.assert_all(at + 8 * K, at + 70 * K, 255, "base's data");
    }
}

#[test]
fn qcow2_rs_returns_foreign_bytes_past_a_short_base() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let folder = lab("short-base");
        folder.img(&["create", "-q", "-f", format, "base", "100000"]);
        folder.io(format, "base", &["write -P 1 0 99840"]);
        folder.overlay("top.qcow2", "base", format, Some(4 * M), "");
        let gold = folder.view("qcow2", "top.qcow2");
        folder.qmerge(&["compare", "top.qcow2", gold.arg()]).ok();
        folder.merge("top.qcow2", &[]);
        folder.view(format, "base").assert_same(&gold, "the grown base");
    }
}

#[test]
fn imago_panics_on_a_feature_name_table_of_one_byte() {
    if !qemu_is_here() {
        return;
    }
    for len in [0, 1, 47, 49] {
        let folder = lab("feature-names");
        folder.create("base.qcow2", M, "");
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
        folder.io("qcow2", "top.qcow2", &["write -P 1 0 64k"]);
        let base = Patch::of(&folder, "base.qcow2");
        let at = u64::from(base.u32(100));
        assert_eq!(base.u32(at), 0x6803_f857, "the first extension is no feature name table");
        base.write(at + 8 + len, &[0; 512 - 56]).set_u32(at + 4, len as u32);
        base.set_bits(72, 1 << 40);
        folder.refused(&["commit", "top.qcow2"], &[7]).says("40");
        base.set_u64(72, 0);
        folder.merge("top.qcow2", &[]);
    }
}

#[test]
fn osv_scalibr_1995_1997_header_numbers_are_checked_before_use() {
    if !qemu_is_here() {
        return;
    }
    for (at, value) in [
        (20, 8),
        (20, 22),
        (20, 63),
        (20, u32::MAX),
        (116, u32::MAX),
        (116, 0x7fff_fff8),
        (100, u32::MAX),
        (100, 80),
    ] {
        let folder = lab("numbers");
        folder.create("base.qcow2", M, "");
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
        Patch::of(&folder, "base.qcow2").set_u32(at, value);
        folder.refused(&["commit", "top.qcow2"], &[7, 9]).says("base.qcow2");
        folder.refused(&["info", "base.qcow2"], &[7, 9]);
    }
}

#[test]
fn go_qcow2reader_allocates_what_the_header_says() {
    if !qemu_is_here() {
        return;
    }
    // A first-level table of 32 GiB, a refcount table of 256 TiB, four thousand million snapshots.
    for (at, value) in [(36, u32::MAX), (56, u32::MAX), (60, u32::MAX)] {
        let folder = lab("huge-tables");
        folder.create("base.qcow2", M, "");
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
        Patch::of(&folder, "base.qcow2").set_u32(at, value);
        folder.refused(&["commit", "top.qcow2"], &[7, 9]).says("base.qcow2");
    }
}

#[test]
fn cve_2024_32498_and_4467_info_opens_nothing_but_the_named_file() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("data-file");
    folder.create("image.qcow2", M, "data_file=image.data");
    fs::remove_file(folder.join("image.data")).unwrap();
    run(folder.dir(), "mkfifo", &["image.data"]).ok();
    // Opening the fifo would hang.
    folder.qmerge(&["info", "image.qcow2"]).ok().says("image.data");
    folder.refused(&["map", "image.qcow2"], &[6]).says("image.data");
    fs::remove_file(folder.join("image.data")).unwrap();
    folder.qmerge(&["info", "image.qcow2"]).ok();
    folder.refused(&["map", "image.qcow2"], &[1, 6]).says("image.data");
}

#[test]
fn cve_class_backing_names_lead_only_to_local_files() {
    if !qemu_is_here() {
        return;
    }
    let names = [
        "nbd://127.0.0.1:1/x",
        "nbd:127.0.0.1:1",
        "http://127.0.0.1:1/x.qcow2",
        "ssh://host/x",
        "fat:/etc",
        "json:{\"driver\":\"nbd\",\"host\":\"127.0.0.1\",\"port\":\"1\"}",
        "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"nbd\",\"server\":{\"type\":\"unix\",\"path\":\"/x\"}}}",
        "json:{",
        "/dev/null",
        "/dev/tty",
        "pipe",
        ".",
    ];
    let folder = lab("protocols");
    run(folder.dir(), "mkfifo", &["pipe"]).ok();
    for name in names {
        folder.create("top.qcow2", M, "");
        folder.img(&["rebase", "-u", "-b", name, "-F", "raw", "top.qcow2"]);
        let run = folder.refused(&["commit", "top.qcow2"], &[6, 7]);
        assert!(run.text().contains("top.qcow2") || run.text().contains(name), "{run}");
        folder.refused(&["map", "top.qcow2"], &[6, 7]);
        folder.qmerge(&["info", "top.qcow2"]).ok();
    }
}

#[test]
fn allowed_folders_confine_what_images_name() {
    if !qemu_is_here() {
        return;
    }
    let elsewhere = lab("outside");
    elsewhere.create("base.qcow2", M, "");
    let folder = lab("confined");
    folder.overlay("top.qcow2", &elsewhere.arg("base.qcow2"), "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 1 0 64k"]);
    std::os::unix::fs::symlink(elsewhere.join("base.qcow2"), folder.join("link.qcow2")).unwrap();
    folder.overlay("by-link.qcow2", "link.qcow2", "qcow2", None, "");
    let inside = folder.dir().to_str().unwrap();
    for image in ["top.qcow2", "by-link.qcow2"] {
        folder.refused(&["commit", image, "--allow-dir", inside], &[6]).says("base.qcow2");
    }
    fs::remove_file(folder.join("by-link.qcow2")).unwrap();
    folder.merge("top.qcow2", &["--allow-dir", inside, "--allow-dir", elsewhere.dir().to_str().unwrap()]);
}

#[test]
fn incus_3186_a_failed_match_never_merges_something_else() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("no-match");
    folder.create("base.qcow2", M, "");
    folder.overlay("a.qcow2", "base.qcow2", "qcow2", None, "");
    folder.overlay("c.qcow2", "a.qcow2", "qcow2", None, "");
    folder.io("qcow2", "c.qcow2", &["write -P 1 0 64k"]);
    folder.create("other.qcow2", M, "");
    for options in [
        ["--base", ""],
        ["--top", ""],
        ["--base", "other.qcow2"],
        ["--top", "other.qcow2"],
        ["--base", "ase.qcow2"],
    ] {
        let mut args = vec!["commit", "c.qcow2"];
        args.extend(options);
        folder.refused(&args, &[1, 2]);
    }
}

#[test]
fn libvirtkvm_scripts_29_deletes_the_wrong_files() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("wrong-files");
    fs::create_dir(folder.join("real")).unwrap();
    folder.create("base.qcow2", M, "");
    folder.overlay("real/a.qcow2", "../base.qcow2", "qcow2", Some(M), "");
    folder.io("qcow2", "real/a.qcow2", &["write -P 1 0 64k"]);
    std::os::unix::fs::symlink("real/a.qcow2", folder.join("a.qcow2")).unwrap();
    // Relative names count from the overlay as named: through the symlink there is another base.
    fs::write(folder.join("bystander.qcow2"), fs::read(folder.join("real/a.qcow2")).unwrap()).unwrap();
    fs::remove_file(folder.join("bystander.qcow2")).unwrap();
    folder.overlay("c.qcow2", "real/a.qcow2", "qcow2", None, "");
    fs::write(folder.join("b.qcow2"), "not part of the chain").unwrap();
    fs::write(folder.join("c.qcow2.bak"), "a backup").unwrap();
    folder.merge("c.qcow2", &["--top", "real/a.qcow2", "--delete"]);
    assert_eq!(folder.names(), ["a.qcow2", "b.qcow2", "base.qcow2", "c.qcow2", "c.qcow2.bak"]);
}

#[test]
fn opennebula_2189_an_overlay_never_becomes_its_own_backing_file() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("own-backing");
    fs::create_dir(folder.join("vm")).unwrap();
    folder.create("disk.qcow2", M, "");
    folder.io("qcow2", "disk.qcow2", &["write -P 9 0 1M"]);
    folder.overlay("mid.qcow2", "disk.qcow2", "qcow2", None, "");
    folder.io("qcow2", "mid.qcow2", &["write -P 8 0 64k"]);
    // Overlay and base have the same file name in different folders.
    folder.overlay("vm/disk.qcow2", "../mid.qcow2", "qcow2", Some(M), "");
    folder.io("qcow2", "vm/disk.qcow2", &["write -P 7 64k 64k"]);
    folder.merge("vm/disk.qcow2", &["--top", "mid.qcow2"]);
    assert_eq!(folder.backing_of("vm/disk.qcow2"), Some(("../disk.qcow2".into(), "qcow2".into())));
    folder.merge("vm/disk.qcow2", &[]);
    assert_eq!(folder.backing_of("vm/disk.qcow2"), Some(("../disk.qcow2".into(), "qcow2".into())));
}

#[test]
fn trap_9_a_first_table_may_be_longer_than_the_size_asks_for() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("long-l1");
    folder.create("base.qcow2", 8 * M, "cluster_size=512");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 8M"]);
    folder.img(&["resize", "-q", "--shrink", "base.qcow2", "1M"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", Some(4 * M), "cluster_size=512");
    folder.io("qcow2", "top.qcow2", &["write -P 2 512k 64k"]);
    folder.merge("top.qcow2", &[]);
    folder.view("qcow2", "base.qcow2").assert_all(M, 4 * M, 0, "the new part");
}

#[test]
fn trap_14_a_new_name_that_outgrows_the_header_gives_up_the_feature_names_first() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("crowded");
    // Cluster 0 of 1 KiB: header 112, feature names 392, format 16, and a name of 380 bytes at most.
    let long = "n".repeat(240);
    let base = format!("{}.qcow2", "b".repeat(200));
    fs::create_dir(folder.join(&long)).unwrap();
    let path = format!("{long}/{base}");
    folder.create(&path, M, "");
    folder.io("qcow2", &path, &["write -P 1 0 1M"]);
    folder.overlay("a.qcow2", &path, "qcow2", Some(M), "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 0 64k"]);
    folder.overlay("c.qcow2", "a.qcow2", "qcow2", Some(M), "cluster_size=1k");
    folder.io("qcow2", "c.qcow2", &["write -P 3 64k 64k"]);
    folder.merge("c.qcow2", &["--top", "a.qcow2"]);
    assert_eq!(folder.backing_of("c.qcow2"), Some((path, "qcow2".into())));
}

#[test]
fn trap_4_compressed_data_may_run_to_the_end_of_the_file() {
    if !qemu_is_here() {
        return;
    }
    for kind in ["zlib", "zstd"] {
        let folder = lab("compressed-end");
        folder.create("image.qcow2", M, &format!("compression_type={kind}"));
        folder.io("qcow2", "image.qcow2", &["write -c -P 7 0 64k"]);
        let image = Patch::of(&folder, "image.qcow2");
        // The data ends inside a sector; cut the file right behind it, as a streamed image may be.
        let entry = image.u64(image.l2_entry(0));
        let start = entry & ((1 << 54) - 1);
        let data = image.bytes(start, (image.len() - start) as usize);
        let end = data.iter().rposition(|byte| *byte != 0).unwrap() as u64 + 1;
        image.set_len(start + end);
        let gold = folder.view("qcow2", "image.qcow2");
        gold.assert_all(0, 64 * K, 7, "QEMU's own reading");
        folder.qmerge(&["compare", "image.qcow2", gold.arg()]).ok();
    }
}
