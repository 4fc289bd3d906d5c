//! More than there can be: drives, memory, and letters in a path.

use std::fs;
use std::path::Path;
use std::process::Command;

use e2e::api::Vmm;
use e2e::{Finished, Running, guest};
use serde_json::{Value, json};

/// A machine with so many drives, all of one file, that switches itself off.
fn drives(folder: &Path, count: usize, pci: bool) -> Finished {
    let disk = super::file(folder, "disk", 1 << 20);
    let drive = |number: usize| {
        json!({
            "drive_id": format!("d{number}"), "path_on_host": disk, "is_root_device": false,
            "is_read_only": true,
        })
    };
    run(folder, json!({ "drives": (0..count).map(drive).collect::<Vec<_>>() }), pci)
}

/// Runs a machine that switches itself off, and has this beside.
fn run(folder: &Path, mut config: Value, pci: bool) -> Finished {
    config["boot-source"] =
        json!({ "kernel_image_path": guest::attacker(), "boot_args": "attack=off" });
    config["drives"] = config.get("drives").cloned().unwrap_or(json!([]));
    let file = folder.join("vm.json");
    fs::write(&file, config.to_string()).unwrap();
    let mut command = Command::new("vmrun-vmm");
    command.arg("--no-api").arg("--config-file").arg(file).args(pci.then_some("--enable-pci"));
    Running::start(&mut command).finish()
}

/// docs/hostile.md 23: as many devices as there is room for, and one more, and many more.
#[test]
fn hostile_23_a_hundred_drives_are_too_many_and_as_many_as_fit_are_not() {
    let folder = tempfile::tempdir().unwrap();
    for (pci, most) in [(false, 17), (true, 31)] {
        drives(folder.path(), most, pci).exits(0);
        for count in [most + 1, 100] {
            let done = drives(folder.path(), count, pci).exits(1);
            done.complains(&["too many devices", &most.to_string()]);
        }
    }
}

/// docs/hostile.md 23: a path that no socket can have (unix(7)).
#[test]
fn hostile_23_sockets_with_long_paths_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let long = folder.path().join("x".repeat(200));
    let path = long.to_str().unwrap();
    let mut command = Command::new("vmrun-vmm");
    let done = Running::start(command.args(["--api-sock", path])).finish().exits(1);
    done.complains(&["API socket", path, "SUN_LEN"]);
    let vsock = json!({ "vsock": { "guest_cid": 3, "uds_path": path } });
    run(folder.path(), vsock, false).exits(1).complains(&["vsock", path, "SUN_LEN"]);
}

/// docs/hostile.md 23: more memory than the host has is had as it is touched; more than anybody has is
/// an error, after which the same monitor makes a machine of the right size.
#[test]
fn hostile_23_memory_beyond_the_hosts_is_taken_as_it_is_touched_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut vmm = Vmm::start(&folder.path().join("api"), &[]);
    let source = json!({ "kernel_image_path": guest::attacker(), "boot_args": "attack=halt" });
    vmm.done("PUT", "/boot-source", &source);
    let size = |mib: u64| {
        vmm.done("PUT", "/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": mib }));
    };
    // Past KVM's slots, past an address space, past what can be counted in bytes.
    for mib in [16 << 20, 1 << 40, u64::MAX >> 20, u64::MAX] {
        size(mib);
        let named = format!("cannot get {mib} MiB of guest memory");
        vmm.refused("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#, &named);
        assert_eq!(vmm.told("/")["state"], json!("Not started"));
    }
    let host = kib("/proc/meminfo", "MemTotal:") >> 10;
    size(2 * host);
    vmm.done("PUT", "/actions", &json!({ "action_type": "InstanceStart" }));
    vmm.process.wait_for("attack over");
    let resident = kib(&format!("/proc/{}/status", vmm.process.pid()), "VmRSS:");
    assert!(resident < 128 << 10, "{resident} KiB of {host} MiB twice");
    vmm.process.signal(nix::sys::signal::Signal::SIGTERM);
    vmm.process.finish().exits(143);
}

fn kib(file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
