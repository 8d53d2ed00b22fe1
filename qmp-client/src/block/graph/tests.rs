//! Graphs that QEMU 10.0.2 and its storage daemon told.

use super::*;
use crate::qmp::replay::Replay;

fn replayed(transcript: &str) -> Graph {
    Graph::ask(&Replay::of(transcript)).unwrap()
}

fn chain(disk: &Disk) -> Vec<(usize, &str, &str)> {
    disk.layers().iter().map(|l| (l.index, l.node.as_str(), l.file.as_str())).collect()
}

#[test]
fn a_drive_is_called_by_its_device_and_answers_to_its_drive() {
    let graph = replayed(include_str!("../../../testdata/transcripts/discovery-drive.jsonl"));
    assert_eq!(graph.disks().len(), 1);
    for name in ["vda", "drive0", "/machine/peripheral/vda/virtio-backend", "/vm/a/active.qcow2"] {
        assert_eq!(graph.disk(name).unwrap().name(), "vda", "{name}");
    }
    let disk = graph.disk("vda").unwrap();
    let files: Vec<_> = disk.layers().iter().map(|l| (l.index, l.file.as_str())).collect();
    let expected = [(5, "active"), (4, "s3"), (3, "s2"), (2, "s1"), (1, "base")];
    assert_eq!(
        files,
        expected.map(|(n, f)| (n, format!("/vm/a/{f}.qcow2"))).each_ref().map(|(n, f)| (*n, &**f))
    );
    assert!(disk.layers().iter().all(|l| l.node.starts_with('#') && l.format == "qcow2"));
    assert_eq!(disk.active().virtual_size, 64 << 20);
    assert!(!disk.active().read_only && disk.layers()[1].read_only);
    assert_eq!(disk.active().backing.as_ref().unwrap().format.as_deref(), Some("qcow2"));
    assert!(disk.layers()[4].backing.is_none());
}

#[test]
fn blockdev_nodes_keep_the_names_that_the_user_gave() {
    let graph = replayed(include_str!("../../../testdata/transcripts/discovery-blockdev.jsonl"));
    let disk = graph.disk("active-fmt").unwrap();
    assert_eq!(disk.root(), "active-fmt");
    assert_eq!(chain(disk)[4], (1, "base-fmt", "/vm/a/base.qcow2"));
    let base = disk.layer("base-fmt").unwrap();
    assert_eq!(base.protocol_node.as_deref(), Some("base-storage"));
    assert_eq!(base.protocol.as_deref(), Some("file"));
}

#[test]
fn a_storage_daemon_has_exports_for_disks() {
    let graph = replayed(include_str!("../../../testdata/transcripts/discovery-qsd.jsonl"));
    let disk = graph.disk("e0").unwrap();
    assert_eq!(disk.export(), Some("e0"));
    assert_eq!(disk.root(), "fmt0");
    let files: Vec<_> = disk.layers().iter().map(|l| l.file.as_str()).collect();
    assert_eq!(files, ["active", "s3", "s2", "s1", "base"].map(|f| format!("/vm/a/{f}.qcow2")));
    assert!(disk.layers().iter().all(|l| l.protocol.as_deref() == Some("file")));
}

#[test]
fn filters_are_left_out_of_the_count_and_stay_the_root() {
    let graph = replayed(include_str!("../../../testdata/transcripts/discovery-filters.jsonl"));
    let disk = &graph.disks()[0];
    assert_eq!(disk.root(), "thr");
    assert_eq!(disk.filters(), ["thr", "cor"]);
    assert_eq!(disk.active().node, "fmt0");
    assert_eq!(disk.layers().len(), 5);
}

#[test]
fn a_base_behind_a_protocol_is_found_by_its_index() {
    let graph = replayed(include_str!("../../../testdata/transcripts/discovery-nbd.jsonl"));
    let disk = graph.disk("vda").unwrap();
    let base = disk.layer("vda[1]").unwrap();
    assert_eq!(base.file, "nbd+unix://?socket=/vm/j/n.sock");
    assert_eq!((base.format.as_str(), base.protocol.as_deref()), ("raw", Some("nbd")));
    let above = disk.layer("[2]").unwrap().backing.as_ref().unwrap();
    assert_eq!(above.name, "nbd+unix:///?socket=/vm/j/n.sock");
}

#[test]
fn an_image_that_qemu_describes_in_json_has_the_name_of_its_file() {
    let described = include_str!("../../../testdata/transcripts/discovery-blockdev.jsonl").replace(
        "\"drv\":\"qcow2\",\"backing_file\":\"/vm/a/s1.qcow2\",\"file\":\"/vm/a/s2.qcow2\"",
        "\"drv\":\"qcow2\",\"backing_file\":\"/vm/a/s1.qcow2\",\"file\":\"json:{}\"",
    );
    assert!(described.contains("json:{}"));
    let graph = replayed(&described);
    assert_eq!(graph.disks()[0].layer("[3]").unwrap().file, "/vm/a/s2.qcow2");
}

#[test]
fn layers_are_named_by_index_node_or_path() {
    let graph = replayed(include_str!("../../../testdata/transcripts/discovery-blockdev.jsonl"));
    let disk = &graph.disks()[0];
    for name in ["[2]", "vda[2]", "active-fmt[2]", "s1-fmt", "/vm/a/s1.qcow2"] {
        assert_eq!(disk.layer(name).unwrap().index, 2, "{name}");
    }
    for name in ["[0]", "[6]", "vdb[2]", "s9", "/vm/a/nothing", "[-1]", "[", "]", ""] {
        let error = disk.layer(name).unwrap_err().to_string();
        assert!(
            error.contains("[5] /vm/a/active.qcow2") && error.contains("[1] /vm/a/base.qcow2"),
            "{error}"
        );
    }
}

#[test]
fn names_that_only_qemu_understands_are_replaced() {
    let transcript = include_str!("../../../testdata/transcripts/discovery-blockdev.jsonl");
    let graph = replayed(transcript).with_files(&|name| (name == "/vm/a/s1.qcow2").then(|| "/x/s1".into()));
    let disk = &graph.disks()[0];
    assert_eq!(disk.layer("/x/s1").unwrap().index, 2);
    assert_eq!(disk.layer("/vm/a/s2.qcow2").unwrap().index, 3);
}

#[test]
fn reversed_ranges_are_refused_with_the_chain() {
    let graph = replayed(include_str!("../../../testdata/transcripts/discovery-blockdev.jsonl"));
    let disk = &graph.disks()[0];
    let layer = |n: usize| disk.layer(&format!("[{n}]")).unwrap();
    let range = disk.range(layer(1), layer(3)).unwrap();
    assert_eq!(range.above.unwrap().index, 4);
    assert!(disk.range(layer(1), layer(5)).unwrap().above.is_none());
    let error = disk.range(layer(3), layer(1)).unwrap_err().to_string();
    assert!(error.contains("reversed") && error.contains("[3] /vm/a/s2.qcow2"), "{error}");
    assert!(disk.range(layer(2), layer(2)).unwrap_err().to_string().contains("itself"));
}

#[test]
fn a_disk_that_does_not_exist_is_answered_with_those_that_do() {
    let graph = replayed(include_str!("../../../testdata/transcripts/discovery-drive.jsonl"));
    let error = graph.disk("vdb").unwrap_err().to_string();
    assert!(error.contains("vdb") && error.contains("vda"), "{error}");
}

#[test]
fn a_graph_that_bites_its_tail_ends() {
    let edges: Edges = serde_json::from_value(json!({
        "nodes": [{"id": 1, "name": "a", "type": "block-driver"}, {"id": 2, "name": "b", "type": "block-driver"}],
        "edges": [{"parent": 1, "child": 2, "name": "backing"}, {"parent": 2, "child": 1, "name": "backing"}],
    }))
    .unwrap();
    assert_eq!(edges.chain("a").len(), 2);
    assert!(edges.chain("c").is_empty());
}

/// QEMU's statistics name the node that holds the data, which is not the one that holds the image.
#[test]
fn an_external_data_file_is_not_taken_for_the_image() {
    let node = |name: &str, driver: &str, file: &str| json!({"node-name": name, "drv": driver, "file": file, "image": {"virtual-size": 1}});
    let described = r#"json:{"data-file": {"driver": "file", "filename": "/vm/d.data"}, "driver": "qcow2"}"#;
    let nodes = [
        node("fmt", "qcow2", described),
        node("data", "file", "/vm/d.data"),
        node("image", "file", "/vm/d.qcow2"),
    ];
    let stats = json!([{"device": "d", "node-name": "fmt", "parent": {"node-name": "data"}}]);
    let drivers: Vec<_> = (1..)
        .zip(["fmt", "data", "image"])
        .map(|(id, name)| json!({"id": id, "name": name, "type": "block-driver"}))
        .collect();
    let edges =
        [(2, "data-file"), (3, "file")].map(|(to, name)| json!({"parent": 1, "child": to, "name": name}));
    let graph = json!({"nodes": drivers, "edges": edges});
    let answers = [
        ("query-blockstats", stats),
        ("query-named-block-nodes", json!(nodes)),
        ("x-debug-query-block-graph", graph),
    ];
    let script = (1..).zip(answers).map(|(id, (command, value))| {
        format!("{}\n{}\n", json!({"execute": command, "id": id}), json!({"return": value, "id": id}))
    });
    let graph = replayed(&script.collect::<String>());
    let layer = graph.disks()[0].active();
    assert_eq!(layer.file, "/vm/d.qcow2");
    assert_eq!(layer.protocol_node.as_deref(), Some("image"));
    assert_eq!(layer.data_file_node.as_deref(), Some("data"));
    assert_eq!(layer.data_file.as_deref(), Some("/vm/d.data"));
}
