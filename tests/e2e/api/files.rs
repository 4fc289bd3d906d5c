//! One file for several drives.

use std::path::Path;

use e2e::api::Vmm;
use e2e::guest;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const START: &str = r#"{"action_type": "InstanceStart"}"#;

/// A monitor whose machine would have these drives.
fn machine(folder: &Path, name: &str, drives: &[(&str, &Path, bool)]) -> Vmm {
    let vmm = Vmm::start(&folder.join(name), &[]);
    let source = json!({ "kernel_image_path": guest::attacker(), "boot_args": "attack=halt" });
    vmm.done("PUT", "/boot-source", &source);
    for (id, path, read_only) in drives {
        let drive = json!({
            "drive_id": id, "path_on_host": path, "is_root_device": false,
            "is_read_only": read_only, "io_engine": "Async",
        });
        vmm.done("PUT", &format!("/drives/{id}"), &drive);
    }
    vmm
}

fn start(vmm: &mut Vmm) {
    vmm.done("PUT", "/actions", &serde_json::from_str::<Value>(START).unwrap());
    vmm.process.wait_for("attack over");
}

fn end(vmm: Vmm) {
    vmm.process.signal(Signal::SIGTERM);
    vmm.process.finish().exits(143);
}

/// docs/hostile.md 23: two drives of one machine that write one file, or of which one writes what the
/// other reads, are refused at the start and in place of another disk. Two readers are not; nor is a
/// machine out of a snapshot, beside the one that it is of and that stands still.
#[test]
fn hostile_23_a_file_that_may_be_written_is_one_drives_of_a_machine() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (disk, other) = (path("disk"), path("other"));
    for file in [&disk, &other] {
        std::fs::File::create(file).unwrap().set_len(1 << 20).unwrap();
    }
    for (name, read_only) in [("twice", false), ("reads", true)] {
        let drives = [("a", &*disk, false), ("b", &*disk, read_only)];
        let vmm = machine(folder.path(), name, &drives);
        vmm.refused("PUT", "/actions", START, "drive b: drive a uses the same file");
        assert_eq!(vmm.told("/")["state"], json!("Not started"));
        end(vmm);
    }
    let mut readers = machine(folder.path(), "readers", &[("a", &disk, true), ("b", &disk, true)]);
    start(&mut readers);
    end(readers);

    let mut writer = machine(folder.path(), "writer", &[("a", &disk, false), ("b", &other, false)]);
    start(&mut writer);
    let patch = |id: &str, path: &Path| {
        let body = json!({ "drive_id": id, "path_on_host": path });
        writer.ask("PATCH", &format!("/drives/{id}"), &body.to_string())
    };
    // The same disk once more is how a client tells of its new size; another drive's is not to be had.
    assert_eq!(patch("a", &disk).0, 204);
    let (code, answer) = patch("a", &other);
    assert_eq!(code, 400);
    assert!(answer["fault_message"].as_str().unwrap().contains("uses the same file"), "{answer}");
    let fresh = path("fresh");
    std::fs::copy(&disk, &fresh).unwrap();
    assert_eq!((patch("a", &fresh).0, patch("b", &disk).0), (204, 204));

    writer.done("PATCH", "/vm", &json!({ "state": "Paused" }));
    let files = json!({ "snapshot_path": path("state"), "mem_file_path": path("memory") });
    writer.done("PUT", "/snapshot/create", &files);
    let restored = Vmm::start(&path("restored"), &[]);
    restored.done("PUT", "/snapshot/load", &files);
    end(writer);
    restored.done("PATCH", "/vm", &json!({ "state": "Resumed" }));
    end(restored);
}
