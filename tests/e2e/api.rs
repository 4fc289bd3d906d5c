//! The API socket, driven as an orchestrator does: every operation, before and after the guest's
//! start, right and wrong.

mod drives;
mod files;
mod keyboard;
mod limits;
mod moments;
mod outputs;
mod pages;

use std::path::Path;

use e2e::api::Vmm;
use e2e::guest::{self, Tap};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Says what it has, and then what changes of it.
const INIT: &str = r#"$b ifconfig eth0 10.77.0.2 netmask 255.255.255.0
$b ip route add 169.254.169.254 dev eth0
echo "mac=$($b cat /sys/class/net/eth0/address)"
echo "entropy=$($b cat /sys/class/misc/hw_random/rng_current)"
echo "drivers: $($b ls /sys/bus/virtio/drivers | $b tr '\n' ' ')"
echo "pmem=$($b cat /sys/bus/nd/devices/namespace0.0/size)"
echo "vda=$($b cat /sys/block/vda/size)"
echo up
while :; do
  echo "metadata=$($b wget -qO- http://169.254.169.254/name 2>&1)"
  echo "size=$($b cat /sys/block/vda/size) memory=$($b awk '/MemTotal/ {print $2}' /proc/meminfo)"
  $b sleep 1
done
"#;

fn put(vmm: &Vmm, path: &str, body: Value) {
    vmm.done("PUT", path, &body);
}

fn file(folder: &Path, name: &str, bytes: u64) -> String {
    let path = folder.join(name);
    std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn every_operation_before_and_after_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let initrd = guest::initramfs(folder.path(), INIT);
    let (disk, larger) =
        (file(folder.path(), "disk", 1 << 20), file(folder.path(), "larger", 2 << 20));
    let pmem = file(folder.path(), "pmem", 4 << 20);
    let tap = Tap::new("api0", Some("10.77.0.1/24"));
    let socket = folder.path().join("api.sock");
    let mut vmm = Vmm::start(&socket, &["--id", "the-one"]);

    // Before anything is said.
    let instance = vmm.told("/");
    assert_eq!((&instance["id"], &instance["state"]), (&json!("the-one"), &json!("Not started")));
    assert_eq!(vmm.told("/version"), json!({ "firecracker_version": "1.17.0" }));
    let defaults = vmm.told("/machine-config");
    assert_eq!((&defaults["vcpu_count"], &defaults["mem_size_mib"]), (&json!(1), &json!(128)));

    // What there is only while the guest is there.
    let before = "not supported before starting the microVM";
    for (method, path, body) in [
        ("PATCH", "/vm", r#"{"state": "Paused"}"#),
        ("PATCH", "/vm", r#"{"state": "Resumed"}"#),
        ("PATCH", "/drives/a", r#"{"drive_id": "a", "path_on_host": "/x"}"#),
        ("PATCH", "/network-interfaces/a", r#"{"iface_id": "a"}"#),
        ("PATCH", "/balloon", r#"{"amount_mib": 1}"#),
        ("GET", "/balloon/statistics", ""),
        ("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s": 1}"#),
        ("PATCH", "/balloon/hinting/start", ""),
        ("PATCH", "/balloon/hinting/stop", ""),
        ("GET", "/balloon/hinting/status", ""),
        ("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 0}"#),
        ("GET", "/hotplug/memory", ""),
        ("PUT", "/actions", r#"{"action_type": "SendCtrlAltDel"}"#),
        ("PUT", "/snapshot/create", r#"{"snapshot_path": "s", "mem_file_path": "m"}"#),
    ] {
        vmm.refused(method, path, body, before);
    }
    vmm.refused("GET", "/balloon", "", "not configured");
    vmm.refused("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#, "no boot source");

    // What is wrong is refused, and leaves no trace.
    for (path, body, why) in [
        ("/machine-config", r#"{"vcpu_count": 33, "mem_size_mib": 128}"#, "between 1 and 32"),
        ("/machine-config", r#"{"vcpu_count": 3, "mem_size_mib": 128, "smt": true}"#, "even"),
        ("/machine-config", r#"{"vcpu_count": 1}"#, "missing field `mem_size_mib`"),
        ("/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 0}"#, "memory size"),
        ("/machine-config", r#"{"vcpu_count": -1, "mem_size_mib": 1}"#, "invalid value"),
        ("/machine-config", "{", "deserializing the json body"),
        ("/boot-source", r#"{"kernel_image_path": "/nothing/there"}"#, "/nothing/there"),
        ("/boot-source", r#"{"kernel_image_path": "/", "more": 1}"#, "unknown field `more`"),
        ("/drives/root", r#"{"drive_id": "other", "is_root_device": true}"#, "does not match"),
        ("/drives/root", r#"{"drive_id": "root", "is_root_device": true}"#, "path_on_host"),
        (
            "/network-interfaces/e",
            r#"{"iface_id": "e", "host_dev_name": "t", "guest_mac": "x"}"#,
            "MAC",
        ),
        ("/network-interfaces/e", r#"{"iface_id": "e", "host_dev_name": "t", "mtu": 67}"#, "MTU"),
        ("/vsock", r#"{"guest_cid": 2, "uds_path": "v"}"#, "guest_cid"),
        ("/balloon", r#"{"amount_mib": 129, "deflate_on_oom": true}"#, "higher than memory size"),
        ("/hotplug/memory", r#"{"total_size_mib": 100}"#, "multiple"),
        ("/mmds/config", r#"{"network_interfaces": ["nothing"]}"#, "does not correspond"),
        (
            "/mmds/config",
            r#"{"network_interfaces": ["e"], "ipv4_address": "10.0.0.1"}"#,
            "link local",
        ),
        ("/mmds", "[]", "not an object"),
        ("/cpu-config", r#"{"cpuid_modifiers": [{"leaf": "x"}]}"#, "not a number"),
        (
            "/snapshot/load",
            r#"{"snapshot_path": "/nothing", "mem_file_path": "/nothing"}"#,
            "/nothing",
        ),
        ("/actions", r#"{"action_type": "Fly"}"#, "unknown variant"),
        ("/vsock", "", "Empty PUT request."),
    ] {
        vmm.refused("PUT", path, body, why);
    }
    vmm.refused("PATCH", "/mmds", r#"{"a": 1}"#, "not initialized");
    vmm.refused("GET", "/nothing", "", "Invalid request method and/or path: GET /nothing.");
    vmm.refused("DELETE", "/drives/a/b", "", "Invalid request method");
    assert_eq!(vmm.told("/machine-config"), defaults);
    let long = format!(r#"{{"kernel_image_path": "{}"}}"#, "x".repeat(60_000));
    assert_eq!(vmm.ask("PUT", "/boot-source", &long).0, 413);

    // A machine with one of each.
    put(&vmm, "/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 192 }));
    vmm.done("PATCH", "/machine-config", &json!({ "vcpu_count": 2, "track_dirty_pages": true }));
    put(&vmm, "/boot-source", guest::boot_source(&initrd));
    put(
        &vmm,
        "/drives/disk",
        json!({
            "drive_id": "disk", "is_root_device": false, "path_on_host": disk, "cache_type": "Writeback",
            "rate_limiter": { "ops": { "size": 1000, "refill_time": 1000 } },
        }),
    );
    put(&vmm, "/pmem/store", json!({ "id": "store", "path_on_host": pmem }));
    put(
        &vmm,
        "/network-interfaces/eth0",
        json!({
            "iface_id": "eth0", "host_dev_name": tap.name(), "guest_mac": "02:76:00:00:00:77",
        }),
    );
    put(&vmm, "/vsock", json!({ "guest_cid": 7, "uds_path": folder.path().join("v.sock") }));
    put(
        &vmm,
        "/entropy",
        json!({ "rate_limiter": { "bandwidth": { "size": 10_000, "refill_time": 100 } } }),
    );
    put(
        &vmm,
        "/balloon",
        json!({
            "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1,
            "free_page_hinting": true, "free_page_reporting": true,
        }),
    );
    put(&vmm, "/hotplug/memory", json!({ "total_size_mib": 256 }));
    put(&vmm, "/serial", json!({ "rate_limiter": { "size": 1 << 20, "refill_time": 1000 } }));
    put(&vmm, "/mmds/config", json!({ "network_interfaces": ["eth0"] }));
    put(&vmm, "/mmds", json!({ "name": "first" }));
    vmm.refused(
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path": "s", "mem_file_path": "m"}"#,
        "not allowed after configuring boot-specific resources",
    );
    // What KVM must have, and what it may.
    put(&vmm, "/cpu-config", json!({ "kvm_capabilities": ["1", "65535"] }));
    let start = json!({ "action_type": "InstanceStart" });
    vmm.refused("PUT", "/actions", &start.to_string(), "KVM has no capability 65535");
    put(&vmm, "/cpu-config", json!({ "kvm_capabilities": ["1", "!65535"] }));
    put(&vmm, "/actions", start);
    vmm.process.wait_for("up\r\n");
    let said = vmm.process.stdout();
    assert!(said.contains("mac=02:76:00:00:00:77"), "{said}");
    assert!(said.contains("entropy=virtio_rng"), "{said}");
    assert!(said.contains("vda=2048"), "{said}");
    // A distribution's kernel has some of these as modules that images do not need.
    let has = |driver: &str| {
        let line = said.lines().find_map(|line| line.trim().strip_prefix("drivers:"));
        line.is_some_and(|drivers| drivers.split(' ').any(|name| name == driver))
    };
    assert!(!has("virtio_pmem") || said.contains("pmem=4194304"), "{said}");
    vmm.process.wait_for("metadata=first");

    // What there was only before.
    let after = "not supported after starting the microVM";
    for (method, path, body) in [
        ("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128}"#),
        ("PATCH", "/machine-config", r#"{"vcpu_count": 1}"#),
        ("PUT", "/boot-source", r#"{"kernel_image_path": "/"}"#),
        ("PUT", "/vsock", r#"{"guest_cid": 3, "uds_path": "v"}"#),
        ("PUT", "/entropy", "{}"),
        ("PUT", "/serial", "{}"),
        ("PUT", "/balloon", r#"{"amount_mib": 1, "deflate_on_oom": true}"#),
        ("PUT", "/hotplug/memory", r#"{"total_size_mib": 128}"#),
        ("PUT", "/mmds/config", r#"{"network_interfaces": ["eth0"]}"#),
        ("PUT", "/cpu-config", "{}"),
        ("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#),
        ("PUT", "/snapshot/load", r#"{"snapshot_path": "s", "mem_file_path": "m"}"#),
    ] {
        vmm.refused(method, path, body, after);
    }

    // What changes while the guest runs.
    vmm.done("PATCH", "/mmds", &json!({ "name": "second", "more": 1 }));
    assert_eq!(vmm.told("/mmds"), json!({ "name": "second", "more": 1 }));
    vmm.process.wait_for("metadata=second");
    vmm.done(
        "PATCH",
        "/drives/disk",
        &json!({
            "drive_id": "disk", "path_on_host": larger,
            "rate_limiter": { "ops": { "size": 0, "refill_time": 0 } },
        }),
    );
    vmm.process.wait_for("size=4096");
    vmm.refused(
        "PATCH",
        "/drives/none",
        r#"{"drive_id": "none", "path_on_host": "/x"}"#,
        "no such drive",
    );
    vmm.refused("PATCH", "/drives/disk", r#"{"drive_id": "disk", "path_on_host": "/x"}"#, "/x");
    vmm.done("PATCH", "/network-interfaces/eth0", &json!({
        "iface_id": "eth0", "rx_rate_limiter": { "bandwidth": { "size": 1 << 20, "refill_time": 100 } },
    }));
    vmm.done("PATCH", "/balloon", &json!({ "amount_mib": 32 }));
    assert_eq!(vmm.told("/balloon")["amount_mib"], json!(32));
    vmm.refused("PATCH", "/balloon", r#"{"amount_mib": 1000}"#, "higher than memory size");
    if has("virtio_balloon") {
        let statistics = || vmm.told("/balloon/statistics");
        let since = std::time::Instant::now();
        while statistics()["actual_mib"] != json!(32) || statistics()["free_memory"].is_null() {
            assert!(since.elapsed().as_secs() < 100, "{}", statistics());
        }
        assert!(statistics()["free_memory"].as_u64().unwrap() > 1 << 20);
    }
    vmm.done("PATCH", "/balloon/statistics", &json!({ "stats_polling_interval_s": 2 }));
    vmm.refused("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s": 0}"#, "tatistics");
    vmm.done("PATCH", "/balloon/hinting/start", &Value::Null);
    assert!(vmm.told("/balloon/hinting/status")["host_cmd"].as_u64().is_some());
    vmm.done("PATCH", "/balloon/hinting/stop", &Value::Null);
    vmm.done("PATCH", "/balloon", &json!({ "amount_mib": 0 }));
    vmm.done("PATCH", "/hotplug/memory", &json!({ "requested_size_mib": 128 }));
    let since = std::time::Instant::now();
    while has("virtio_mem") && vmm.told("/hotplug/memory")["plugged_size_mib"] != json!(128) {
        assert!(since.elapsed().as_secs() < 100, "{}", vmm.told("/hotplug/memory"));
    }
    vmm.refused("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 1000}"#, "");

    let config = vmm.told("/vm/config");
    assert_eq!(config["machine-config"]["vcpu_count"], json!(2));
    assert_eq!(config["drives"][0]["path_on_host"], json!(larger));
    assert_eq!(config["network-interfaces"][0]["iface_id"], json!("eth0"));

    // It stands still and goes on.
    vmm.done("PATCH", "/vm", &json!({ "state": "Paused" }));
    assert_eq!(vmm.told("/")["state"], json!("Paused"));
    let said = vmm.process.stdout().len();
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert_eq!(vmm.process.stdout().len(), said);
    vmm.done("PATCH", "/vm", &json!({ "state": "Resumed" }));
    assert_eq!(vmm.told("/")["state"], json!("Running"));
    vmm.process.signal(Signal::SIGTERM);
    vmm.process.finish().exits(143);
    assert!(!socket.exists());
}

#[test]
fn a_guest_that_ends_tells_so_by_status_and_last_line() {
    let folder = tempfile::tempdir().unwrap();
    let initrd = guest::initramfs(folder.path(), "$b reboot -f\n");
    let vmm = Vmm::start(&folder.path().join("api.sock"), &["--level", "Info"]);
    put(&vmm, "/boot-source", guest::boot_source(&initrd));
    put(&vmm, "/actions", json!({ "action_type": "InstanceStart" }));
    let done = vmm.process.finish().exits(0);
    let last = done.err().lines().last().unwrap_or_default().to_owned();
    assert!(last.contains("the guest asked for a reset"), "{}", done.err());
}

#[test]
fn a_socket_that_is_there_and_flags_that_are_wrong_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("taken");
    std::fs::write(&path, "").unwrap();
    let vmm = |arguments: &[&str]| {
        e2e::Running::start(std::process::Command::new("vmrun-vmm").args(arguments)).finish()
    };
    let done = vmm(&["--api-sock", path.to_str().unwrap()]).exits(1);
    assert!(done.err().contains("the path exists"), "{}", done.err());
    let long = format!("/tmp/{}", "x".repeat(200));
    vmm(&["--api-sock", &long]).exits(1);
    vmm(&["--id", "a b"]).exits(2);
    vmm(&["--no-api"]).exits(2);
    vmm(&["--describe-snapshot", path.to_str().unwrap()]).exits(1);
    vmm(&["--snapshot-version"]).exits(0).prints("v1.0.0\n");
}
