//! `SendCtrlAltDel`: the guest's kernel reads its keyboard, and tells its init.

use std::path::Path;

use e2e::api::Vmm;
use e2e::guest;
use serde_json::json;

/// Waits for the driver of the keyboard; is told of the keys twice, and switches off.
const INIT: &str = r#"until $b grep -q 'AT .*keyboard' /proc/bus/input/devices; do $b sleep 0.1; done
echo 0 >/proc/sys/kernel/ctrl-alt-del
times=0
trap 'times=$((times+1)); echo "keys pressed: $times"; [ $times = 2 ] && $b poweroff -f' INT
echo "the keyboard is there: $($b grep -c i8042 /proc/interrupts)"
while :; do $b sleep 0.1; done
"#;

/// Once while the guest runs, and once while it stands still, so that the keys wait in the snapshot.
#[test]
fn ctrl_alt_del_reaches_init_also_through_a_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let initrd = guest::initramfs(folder.path(), INIT);
    let mut vmm = Vmm::start(&path("api0"), &[]);
    vmm.done("PUT", "/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 192 }));
    vmm.done(
        "PUT",
        "/boot-source",
        &json!({
            // A distribution's: the one for micro-VMs has no keyboard.
            "kernel_image_path": e2e::images::assets().join("bzimage"), "initrd_path": initrd,
            "boot_args": "console=ttyS0 reboot=k panic=-1 quiet",
        }),
    );
    vmm.done("PUT", "/actions", &json!({ "action_type": "InstanceStart" }));
    vmm.process.wait_for("the keyboard is there: 1");
    let keys = json!({ "action_type": "SendCtrlAltDel" });
    vmm.done("PUT", "/actions", &keys);
    vmm.process.wait_for("keys pressed: 1");
    vmm.done("PATCH", "/vm", &json!({ "state": "Paused" }));
    vmm.done("PUT", "/actions", &keys);
    // Nobody reads them, and there is room for few.
    vmm.done("PUT", "/actions", &keys);
    vmm.refused("PUT", "/actions", &keys.to_string(), "has not read the keys");
    let (state, memory) = (path("state"), path("memory"));
    let create = json!({ "snapshot_path": state, "mem_file_path": memory });
    vmm.done("PUT", "/snapshot/create", &create);
    let said = vmm.process.stdout();
    assert!(!said.contains("keys pressed: 2"), "{said}");
    vmm.process.signal(nix::sys::signal::Signal::SIGTERM);
    vmm.process.finish().exits(143);

    let vmm = Vmm::start(Path::new(&path("api1")), &[]);
    vmm.done(
        "PUT",
        "/snapshot/load",
        &json!({
            "snapshot_path": state,
            "mem_backend": { "backend_type": "File", "backend_path": memory },
            "resume_vm": true,
        }),
    );
    let done = vmm.process.finish().exits(0);
    assert!(done.out().contains("keys pressed: 2"), "{}", done.out());
}
