//! Every operation of Firecracker's API is routed, with every field its description names; the table
//! of them in `docs/api.md` is made here. `UPDATE_DOCS=1 cargo test -p api-server` writes it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fmt::Write;
use std::path::Path;

use api_server::machine::route::{Method, route};

/// An operation, a body with every field there is (none where it takes none), and how the answer
/// differs from Firecracker's.
struct Operation {
    name: &'static str,
    method: Method,
    path: &'static str,
    body: &'static str,
    differs: &'static str,
}

const fn operation(
    name: &'static str,
    method: Method,
    path: &'static str,
    body: &'static str,
    differs: &'static str,
) -> Operation {
    Operation { name, method, path, body, differs }
}

const OPERATIONS: [Operation; 38] = {
    use Method::{Get, Patch, Put};
    [
        operation(
            "describeInstance",
            Get,
            "/",
            "",
            "`app_name` is `vmrun`, `vmm_version` its version",
        ),
        operation("createSyncAction", Put, "/actions", r#"{"action_type": "InstanceStart"}"#, ""),
        operation("describeBalloonConfig", Get, "/balloon", "", ""),
        operation(
            "putBalloon",
            Put,
            "/balloon",
            r#"{"amount_mib": 1, "deflate_on_oom": true,
            "stats_polling_interval_s": 1, "free_page_hinting": true, "free_page_reporting": true}"#,
            "",
        ),
        operation("patchBalloon", Patch, "/balloon", r#"{"amount_mib": 1}"#, ""),
        operation("describeBalloonStats", Get, "/balloon/statistics", "", ""),
        operation(
            "patchBalloonStatsInterval",
            Patch,
            "/balloon/statistics",
            r#"{"stats_polling_interval_s": 1}"#,
            "",
        ),
        operation(
            "startBalloonHinting",
            Patch,
            "/balloon/hinting/start",
            r#"{"acknowledge_on_stop": true}"#,
            "",
        ),
        operation("describeBalloonHinting", Get, "/balloon/hinting/status", "", ""),
        operation("stopBalloonHinting", Patch, "/balloon/hinting/stop", "", ""),
        operation(
            "putGuestBootSource",
            Put,
            "/boot-source",
            r#"{"kernel_image_path": "k", "initrd_path": "i", "boot_args": "a"}"#,
            "",
        ),
        operation(
            "putCpuConfiguration",
            Put,
            "/cpu-config",
            r#"{"kvm_capabilities": ["1", "!2"],
            "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0", "flags": 0,
                "modifiers": [{"register": "eax", "bitmap": "0b1x0"}]}],
            "msr_modifiers": [{"addr": "0x10", "bitmap": "0b1"}]}"#,
            "fields of ARM processors are unknown",
        ),
        operation(
            "putGuestDriveByID",
            Put,
            "/drives/a",
            r#"{"drive_id": "a", "is_root_device": true,
            "partuuid": "p", "cache_type": "Writeback", "is_read_only": true, "path_on_host": "f",
            "rate_limiter": {"bandwidth": {"size": 1, "one_time_burst": 1, "refill_time": 1},
                "ops": {"size": 1, "refill_time": 1}}, "io_engine": "Async", "socket": "s"}"#,
            "`socket` (vhost-user) is refused",
        ),
        operation(
            "patchGuestDriveByID",
            Patch,
            "/drives/a",
            r#"{"drive_id": "a", "path_on_host": "f",
            "rate_limiter": {}}"#,
            "",
        ),
        operation(
            "putGuestPmemByID",
            Put,
            "/pmem/a",
            r#"{"id": "a", "path_on_host": "f",
            "root_device": true, "read_only": true, "rate_limiter": {}}"#,
            "`rate_limiter` is refused",
        ),
        operation(
            "patchGuestPmemByID",
            Patch,
            "/pmem/a",
            r#"{"id": "a", "rate_limiter": {}}"#,
            "refused",
        ),
        operation(
            "putLogger",
            Put,
            "/logger",
            r#"{"level": "Warning", "log_path": "f",
            "show_level": true, "show_log_origin": true, "module": "m"}"#,
            "",
        ),
        operation("getMachineConfiguration", Get, "/machine-config", "", ""),
        operation(
            "putMachineConfiguration",
            Put,
            "/machine-config",
            r#"{"vcpu_count": 2,
            "mem_size_mib": 128, "smt": true, "track_dirty_pages": true, "huge_pages": "2M",
            "cpu_template": "None"}"#,
            "`cpu_template` other than `None` is refused: use `/cpu-config`",
        ),
        operation(
            "patchMachineConfiguration",
            Patch,
            "/machine-config",
            r#"{"vcpu_count": 2,
            "mem_size_mib": 128, "smt": true, "track_dirty_pages": true, "huge_pages": "Transparent",
            "cpu_template": "None"}"#,
            "as above",
        ),
        operation(
            "putMetrics",
            Put,
            "/metrics",
            r#"{"metrics_path": "f", "emit_id": true,
            "properties": {"a": "b"}}"#,
            "",
        ),
        operation("putMmds", Put, "/mmds", r#"{"a": {"b": "c"}}"#, ""),
        operation("patchMmds", Patch, "/mmds", r#"{"a": null}"#, ""),
        operation("getMmds", Get, "/mmds", "", ""),
        operation(
            "putMmdsConfig",
            Put,
            "/mmds/config",
            r#"{"version": "V2", "network_interfaces": ["a"],
            "ipv4_address": "169.254.169.254", "imds_compat": true}"#,
            "",
        ),
        operation("putEntropyDevice", Put, "/entropy", r#"{"rate_limiter": {}}"#, ""),
        operation(
            "putSerialDevice",
            Put,
            "/serial",
            r#"{"serial_out_path": "f",
            "rate_limiter": {"size": 1, "refill_time": 1}}"#,
            "",
        ),
        operation(
            "putMemoryHotplug",
            Put,
            "/hotplug/memory",
            r#"{"total_size_mib": 1024,
            "slot_size_mib": 128, "block_size_mib": 2}"#,
            "",
        ),
        operation(
            "patchMemoryHotplug",
            Patch,
            "/hotplug/memory",
            r#"{"requested_size_mib": 128}"#,
            "",
        ),
        operation("getMemoryHotplug", Get, "/hotplug/memory", "", ""),
        operation(
            "putGuestNetworkInterfaceByID",
            Put,
            "/network-interfaces/a",
            r#"{"iface_id": "a",
            "host_dev_name": "t", "guest_mac": "02:00:00:00:00:01", "mtu": 1500,
            "rx_rate_limiter": {}, "tx_rate_limiter": {}}"#,
            "frames from another address than `guest_mac` are dropped",
        ),
        operation(
            "patchGuestNetworkInterfaceByID",
            Patch,
            "/network-interfaces/a",
            r#"{"iface_id": "a", "rx_rate_limiter": {}, "tx_rate_limiter": {}}"#,
            "",
        ),
        operation(
            "createSnapshot",
            Put,
            "/snapshot/create",
            r#"{"snapshot_path": "s",
            "mem_file_path": "m", "snapshot_type": "Diff"}"#,
            "the state file is vmrun's own",
        ),
        operation(
            "loadSnapshot",
            Put,
            "/snapshot/load",
            r#"{"snapshot_path": "s",
            "mem_backend": {"backend_type": "Uffd", "backend_path": "u"}, "track_dirty_pages": true,
            "enable_diff_snapshots": true, "resume_vm": true, "clock_realtime": true,
            "network_overrides": [{"iface_id": "a", "host_dev_name": "t"}],
            "vsock_override": {"uds_path": "v"}, "huge_pages": "Snapshot"}"#,
            "`huge_pages` `2M` is refused",
        ),
        operation("getFirecrackerVersion", Get, "/version", "", "the version of the API"),
        operation("patchVm", Patch, "/vm", r#"{"state": "Paused"}"#, ""),
        operation("getExportVmConfig", Get, "/vm/config", "", "what was never put is left out"),
        operation(
            "putGuestVsock",
            Put,
            "/vsock",
            r#"{"guest_cid": 3, "uds_path": "v", "vsock_id": "x"}"#,
            "",
        ),
    ]
};

fn name(method: Method) -> &'static str {
    match method {
        Method::Get => "GET",
        Method::Put => "PUT",
        Method::Patch => "PATCH",
        Method::Delete => "DELETE",
    }
}

#[test]
fn every_operation_is_routed_with_all_its_fields() {
    for Operation { name, method, path, body, .. } in OPERATIONS {
        if let Err(error) = route(method, path, body.as_bytes()) {
            panic!("{name}: {error}");
        }
        // What takes a body needs one, but for two; and knows no other field.
        let optional = ["startBalloonHinting", "stopBalloonHinting"].contains(&name);
        if method != Method::Get && !optional {
            assert!(route(method, path, b"").is_err(), "{name}");
            let free = ["putMmds", "patchMmds"].contains(&name);
            let more = br#"{"no_such_field": 1}"#;
            assert_eq!(route(method, path, more).is_ok(), free, "{name}");
        }
    }
}

#[test]
fn the_documented_table_is_this_one() {
    let mut table = String::from("| operation | request | |\n| --- | --- | --- |\n");
    for Operation { name: operation, method, path, differs, .. } in OPERATIONS {
        let path = path.replace("/drives/a", "/drives/{drive_id}");
        let path = path.replace("/pmem/a", "/pmem/{id}");
        let path = path.replace("/network-interfaces/a", "/network-interfaces/{iface_id}");
        let differs = if differs.is_empty() { "conforms" } else { differs };
        writeln!(table, "| {operation} | `{} {path}` | {differs} |", name(method)).unwrap();
    }
    const BEGIN: &str = "<!-- made by api-server/tests/operations.rs -->\n";
    const END: &str = "<!-- end -->";
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/api.md");
    let text = std::fs::read_to_string(&file).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (old, after) = rest.split_once(END).unwrap();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&file, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
    } else {
        assert_eq!(old, table, "UPDATE_DOCS=1 cargo test -p api-server writes it");
    }
}
