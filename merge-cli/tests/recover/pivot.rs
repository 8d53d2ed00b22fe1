//! Pivots of which only the state file and the images tell: no image may be emptied that alone holds what a guest wrote.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime};

use qmp_client::{Goal, Job, Watch};
use serde_json::{Value, json};

use crate::lab::{Lab, When, run, text, tools_are_here};
use crate::write;

/// `live recover` changes nothing and leaves the question to the user, or waits until the images are free.
fn asks(lab: &Lab, code: i32, outcome: &str) {
    let before = fs::read(lab.dir().join("4.img")).unwrap();
    let found = lab.recover(code);
    assert_eq!(found["outcome"], outcome, "{found:#}");
    assert!(fs::read(lab.dir().join("4.img")).unwrap() == before, "4.img was changed: {found:#}");
    assert!(lab.state_file().exists());
}

/// The pivot never came, and the guest went on in the old active image. A daemon on base, with the same monitor and a
/// disk of the same name, is no proof of the contrary.
#[test]
fn a_base_that_is_started_by_hand_does_not_outdo_where_the_guest_went_on() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.dies("[4]", "job-finalize", When::Before);
    write(&lab, "4.img", "write -q -P 8 10M 1M");
    write(&lab, "1.img", "write -q -P 7 9M 1M");
    lab.start(&[], "1.img");
    asks(&lab, 5, "in-use");
    lab.kill();
    asks(&lab, 6, "unclear");
}

/// The pivot is noted, but its end was not cleaned up; somebody worked with the old active image before base was started
/// again.
#[test]
fn an_old_active_image_that_was_used_after_the_pivot_is_not_emptied_beside_a_base_in_use() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.pivots();
    lab.kill();
    write(&lab, "4.img", "write -q -P 8 10M 1M");
    write(&lab, "1.img", "write -q -P 7 9M 1M");
    lab.start(&[], "1.img");
    asks(&lab, 5, "in-use");
    lab.kill();
    asks(&lab, 6, "unclear");
}

/// Nothing of a pivot is noted, and a daemon runs on base: another client may have pivoted, or somebody has started base.
#[test]
fn a_base_that_runs_without_a_note_of_a_pivot_leaves_the_question_open() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.ok(&["live", "commit", "disk0", "--active", "--qmp", "qmp.sock"]);
    lab.kill();
    lab.start(&[], "1.img");
    asks(&lab, 6, "unclear");
    lab.kill();
    let found = lab.recover(0);
    assert_eq!((&found["outcome"], &found["valid-top"]), (&json!("not-switched"), &json!(lab.path("4.img"))));
}

/// Another client ends the merge with QEMU's own commands, and the guest goes on in base. Nothing of that is noted.
#[test]
fn a_pivot_by_another_client_that_nobody_noted_costs_no_write_of_the_guest() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.ok(&["live", "commit", "disk0", "--active", "--qmp", "qmp.sock"]);
    let note: Value = serde_json::from_slice(&fs::read(lab.state_file()).unwrap()).unwrap();
    let monitor = lab.connect();
    let job = Job::new(&monitor, note["job"].as_str().unwrap());
    job.complete().unwrap();
    job.wait(Goal::Pending, None, &mut |_| Watch::GoOn).unwrap();
    job.finalize().unwrap();
    job.wait(Goal::Concluded, None, &mut |_| Watch::GoOn).unwrap();
    job.take_result().unwrap();
    drop(monitor);
    // QEMU shows it as long as it runs, and whoever asks is told.
    let output = lab.qmerge(&["live", "commit", "disk0", "--active", "--pivot", "--qmp", "qmp.sock"]);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(6), "{err}");
    assert!(err.contains("QEMU shows the chain that it leaves") && err.contains("live recover"), "{err}");
    let jobs = lab.qmerge(&["live", "jobs", "--qmp", "qmp.sock"]);
    assert!(text(&jobs.stderr).contains("no switch is noted"), "{}", text(&jobs.stderr));
    asks(&lab, 6, "unclear");
    lab.kill();
    write(&lab, "1.img", "write -q -P 7 4M 64k");
    asks(&lab, 6, "unclear");
    let error = lab.recover(6)["error"].clone();
    assert!(error["message"].as_str().unwrap().contains("another client has pivoted"), "{error:#}");
    // The way out for whoever knows that: base is the disk, and has the last write.
    run("qemu-io", lab.dir(), &["-r", "-f", "qcow2", "-c", "read -q -P 7 4M 64k", "1.img"]);
    assert_eq!(lab.qmerge(&["commit", "4.img"]).status.code(), Some(6));
}

/// What the guest writes goes to the data file, so base's own time does not tell that the guest is there.
#[test]
fn a_base_whose_data_is_in_another_file_is_compared() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::with_base(&[], &["-o", "data_file=1.data,data_file_raw=on"]);
    lab.dies("[4]", "job-finalize", When::After);
    let image = File::options().write(true).open(lab.dir().join("1.img")).unwrap();
    let time = image.metadata().unwrap().modified().unwrap();
    write(&lab, "1.img", "write -q -P 7 4M 64k");
    image.set_modified(time).unwrap();
    written_at(&lab.dir().join("4.img"), SystemTime::now());
    asks(&lab, 6, "unclear");
}

/// QEMU writes tables to the old active image when it closes it, and dies before anybody notes the pivot. The client saw
/// when; whoever wrote to an image later was somebody else.
#[test]
fn an_old_active_image_that_qemu_wrote_to_until_it_died_is_superseded() {
    if !tools_are_here() {
        return;
    }
    for (later, outcome) in [(&[][..], "completed"), (&["1.img"], "unclear"), (&["4.img"], "unclear")] {
        let lab = Lab::new();
        lab.dies("[4]", "job-finalize", When::After);
        write(&lab, "1.img", "write -q -P 7 4M 64k");
        let images = ["1.img", "4.img"];
        let touch = |image: &&str| written_at(&lab.dir().join(image), SystemTime::now());
        let wait = || std::thread::sleep(Duration::from_millis(20));
        images.iter().for_each(touch);
        wait();
        // As if QEMU had gone only now.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let mut note: Value = serde_json::from_slice(&fs::read(lab.state_file()).unwrap()).unwrap();
        assert!(note["gone-ns"].as_u64().is_some());
        note["gone-ns"] = u64::try_from(now.as_nanos()).unwrap().into();
        fs::write(lab.state_file(), note.to_string()).unwrap();
        wait();
        later.iter().for_each(touch);
        if outcome == "unclear" {
            asks(&lab, 6, outcome);
            continue;
        }
        let found = lab.recover(0);
        assert_eq!((&found["outcome"], &found["valid-top"]), (&json!(outcome), &json!(lab.path("1.img"))));
        lab.nothing_is_left();
    }
}

/// A client that was killed when QEMU had switched and forgotten the job, and before it noted that.
#[test]
fn a_pivot_of_which_only_the_end_is_not_noted_is_ended_by_the_command_that_is_printed() {
    if !tools_are_here() {
        return;
    }
    for written in [false, true] {
        let lab = Lab::new();
        lab.pivots();
        let note = fs::read_to_string(lab.state_file()).unwrap();
        fs::write(lab.state_file(), note.replace("\"switched\"", "\"switching\"")).unwrap();
        if written {
            written_at(&lab.dir().join("4.img"), SystemTime::now());
        }
        let before = fs::read(lab.dir().join("4.img")).unwrap();
        let found = lab.recover(0);
        assert_eq!(found["outcome"], "running", "{found:#}");
        let next = found["next"].as_str().unwrap();
        if written {
            // By the guest, perhaps: base may have been started by hand.
            let run = lab.qmerge(&["live", "pivot", "disk0", "--qmp", &lab.path("qmp.sock")]);
            let said = String::from_utf8(run.stderr).unwrap();
            assert!(next.contains("live pivot disk0"), "{next}");
            assert!(run.status.code() == Some(6) && said.contains("was written to since"), "{said}");
            assert!(said.contains("live recover disk0") && lab.state_file().exists(), "{said}");
            assert!(fs::read(lab.dir().join("4.img")).unwrap() == before, "{said}");
        } else {
            lab.type_in(next);
            lab.nothing_is_left();
        }
        lab.kill();
        lab.shows("1.img");
        lab.shows("4.img");
    }
}

/// The guest moved to base; somebody booted the old active image, and the time of that write is older than the pivot.
#[test]
fn an_old_active_image_whose_time_was_set_back_is_not_emptied() {
    if !tools_are_here() {
        return;
    }
    let hour = Duration::from_secs(3600);
    for switched in [true, false] {
        let lab = Lab::new();
        match switched {
            true => lab.pivots(),
            false => lab.dies("[4]", "job-finalize", When::After),
        }
        lab.kill();
        let image = lab.dir().join("4.img");
        let time = fs::metadata(&image).unwrap().modified().unwrap();
        write(&lab, "1.img", "write -q -P 7 9M 1M");
        write(&lab, "4.img", "write -q -P 8 10M 1M");
        for back in [time, time - hour] {
            written_at(&image, back);
            asks(&lab, 6, "unclear");
        }
    }
}

/// As if something had been written there at that time.
fn written_at(image: &Path, time: SystemTime) {
    File::options().write(true).open(image).unwrap().set_modified(time).unwrap();
}
