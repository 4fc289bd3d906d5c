//! What goes wrong, and what the next command finds.

mod host;
mod lacks;
mod steps;

use std::process::Command;

use e2e::{Running, Session};
use nix::sys::signal::Signal;

const BASE: &str = "localhost/base";

/// docs/hostile.md 27: the VMM is killed under the command.
#[test]
fn hostile_27_a_killed_vmm_is_an_error_and_not_a_hang() {
    let session = Session::prepared();
    let mut running = session.start([BASE, "sh", "-c", "echo ready; sleep 600"]);
    running.wait_for("ready\n");
    let children = Command::new("pgrep").args(["-P", &running.pid().to_string()]).output().unwrap();
    let children = String::from_utf8_lossy(&children.stdout).into_owned();
    let vmm: i32 = children.lines().next().expect("the command has no VMM").parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
    let done = running.finish().exits(125);
    assert!(done.err().contains("SIGKILL") || done.err().contains("signal 9"), "{}", done.err());
}

/// docs/hostile.md 28: two commands at once on one name.
#[test]
fn hostile_28_a_name_belongs_to_one() {
    let session = Session::prepared();
    let name = format!("named-{}", std::process::id());
    let mut first = session.start(["--name", &name, BASE, "sh", "-c", "echo ready; sleep 600"]);
    first.wait_for("ready\n");
    session.run(["--name", &name, BASE, "true"]).exits(125).complains(&[&name, "in use"]);
    first.signal(Signal::SIGKILL);
    first.finish();
}

#[test]
fn a_guest_that_crashes_or_reboots_ends_the_run() {
    let session = Session::prepared();
    let crash = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60";
    let done = session.run([BASE, "sh", "-c", crash]);
    assert_eq!(done.status.code(), Some(125), "{}", done.err());
    let done = session.run([BASE, "sh", "-c", "reboot -f; sleep 60"]);
    // A reboot in a PID namespace is the end of that namespace, as it is in a container.
    assert!(
        matches!(done.status.code(), Some(125 | 129..=159)),
        "{:?} {}",
        done.status,
        done.err()
    );
}

/// docs/hostile.md 26: the disk is full.
#[test]
fn hostile_26_a_full_disk_is_told_and_leaves_the_store_usable() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs", path])
        .status()
        .unwrap();
    assert!(mount.success());
    let archive = format!("oci-archive:{}", e2e::images::archive("base").display());
    let pull = || {
        let mut command = Command::new("vmrun");
        command
            .args(["image", "pull", "-q", &archive])
            .env("VMRUN_ROOT", folder.path().join("root"));
        Running::start(&mut command).finish()
    };
    pull().exits(125).complains(&["space"]);
    let more = Command::new("mount").args(["-o", "remount,size=64m", path]).status().unwrap();
    assert!(more.success());
    pull().exits(0);
    assert!(Command::new("umount").arg(path).status().unwrap().success());
}

#[test]
fn the_doctor_finds_this_machine_well() {
    let session = Session::prepared();
    session.vmrun(["doctor"]).exits(0);
    let out = session.vmrun(["doctor", "--format", "json"]).exits(0).out();
    for line in out.lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
    assert!(out.lines().count() > 5, "{out}");
}
