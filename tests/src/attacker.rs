//! The guest that attacks (`tests/attacker`) in a jail, with a device of every kind, and what must be
//! true of its monitor during and after the attack.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, chown};
use serde_json::{Value, json};

use crate::Running;
use crate::api::Vmm;

/// Whom the monitor becomes.
const UID: u32 = 4242;
/// What the monitor's cgroup is named after.
const PROGRAM: &str = "hostile";
/// The guest's memory and what its monitor may use beside it, MiB.
const GUEST: u64 = 128;
const OVERHEAD: u64 = 64;
/// Microseconds of processor time in each period, and the period.
const CPU: (u64, u64) = (60_000, 100_000);
/// Most bytes of messages that an attack may cause.
const MOST_MESSAGES: u64 = 256 << 10;

/// An attack under way.
pub struct Attack {
    /// The monitor and its API.
    pub vmm: Vmm,
    name: String,
    base: tempfile::TempDir,
    group: PathBuf,
    pid: String,
    since: Instant,
}

/// What the orders need.
fn processors(orders: &str) -> u32 {
    if orders.split(' ').any(|word| word == "second") { 2 } else { 1 }
}

/// A network namespace with a TAP in it, and the folder that is the monitor's root.
fn prepare(name: &str, root: &Path, orders: &str) {
    let run = |command: &str| {
        let status = Command::new("sh").args(["-ec", command]).status().unwrap();
        assert!(status.success(), "{command}");
    };
    run(&format!(
        "ip netns add {name}; ip -n {name} tuntap add tap0 mode tap vnet_hdr user {UID}; \
         ip -n {name} link set tap0 up; ip -n {name} address add 10.66.0.1/24 dev tap0"
    ));
    // As udev has it. Whose TAP it is decides who may use one.
    fs::set_permissions("/dev/net/tun", fs::Permissions::from_mode(0o666)).unwrap();
    fs::create_dir_all(root).unwrap();
    fs::copy(crate::guest::attacker(), root.join("attacker")).unwrap();
    for (file, mib) in [("disk", 1), ("other", 1), ("read_only", 1), ("memory", 4)] {
        fs::File::create(root.join(file)).unwrap().set_len(mib << 20).unwrap();
    }
    for file in ["log", "console"] {
        fs::File::create(root.join(file)).unwrap();
    }
    let drive = |name: &str, read_only: bool, engine: &str| {
        json!({
            "drive_id": name, "path_on_host": name, "is_root_device": false,
            "is_read_only": read_only, "io_engine": engine,
        })
    };
    let config = json!({
        "boot-source": { "kernel_image_path": "attacker", "boot_args": orders },
        "machine-config": { "vcpu_count": processors(orders), "mem_size_mib": GUEST },
        "drives": [
            drive("disk", false, "Sync"), drive("other", false, "Async"),
            drive("read_only", true, "Sync"),
        ],
        "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": "tap0" }],
        "vsock": { "guest_cid": 3, "uds_path": "/vsock" },
        "entropy": {},
        "balloon": {
            "amount_mib": 16, "deflate_on_oom": true, "stats_polling_interval_s": 1,
            "free_page_hinting": true, "free_page_reporting": true,
        },
        "memory-hotplug": { "total_size_mib": 256 },
        "pmem": [{ "id": "memory", "path_on_host": "memory" }],
        // vmrun's own: with it there is a virtio console beside the serial port.
        "console": { "serial": true, "output_path": "console" },
    });
    fs::write(root.join("vm.json"), config.to_string()).unwrap();
    for entry in fs::read_dir(root).unwrap().flatten() {
        chown(&entry.path(), Some(Uid::from_raw(UID)), Some(Gid::from_raw(UID))).unwrap();
    }
}

impl Attack {
    /// Starts a guest with these orders (see `tests/attacker/src/main.rs`) on either transport.
    pub fn start(name: &str, orders: &str, pci: bool) -> Attack {
        let name = format!("{name}-{}", if pci { "pci" } else { "mmio" });
        let base = tempfile::tempdir().unwrap();
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let root = base.path().canonicalize().unwrap().join(PROGRAM).join(&name).join("root");
        prepare(&name, &root, &format!("{orders}{}", if pci { " pci" } else { "" }));
        let mut command = Command::new("vmrun-vmm");
        let id = UID.to_string();
        command
            .args(["--jail", "--id", &name, "--exec-file", PROGRAM, "--uid", &id, "--gid", &id])
            .args(["--netns", &format!("/run/netns/{name}"), "--chroot-base-dir"])
            .arg(base.path().canonicalize().unwrap())
            .args(["--cgroup", &format!("memory.max={}", (GUEST + OVERHEAD) << 20)])
            .args(["--cgroup", &format!("cpu.max={} {}", CPU.0, CPU.1)])
            .args(["--cgroup", "pids.max=20", "--", "--config-file", "/vm.json"])
            .args(["--log-path", "/log", "--level", "Warn"])
            .args(pci.then_some("--enable-pci"));
        let process = Running::start(command.stdin(Stdio::null()));
        let since = Instant::now();
        let socket = root.join("run/firecracker.socket");
        while !socket.exists() {
            let messages = fs::read_to_string(root.join("log")).unwrap();
            assert!(since.elapsed() < Duration::from_secs(60), "no API socket: {messages}");
            std::thread::sleep(Duration::from_millis(5));
        }
        let group = Path::new("/sys/fs/cgroup").join(PROGRAM).join(&name);
        let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap();
        // The one that waits outside is the first.
        let pid = processes.lines().last().unwrap_or_else(|| panic!("the VMM is gone")).to_owned();
        Attack { vmm: Vmm::over(&socket, process), name, base, group, pid, since }
    }

    /// What its root is on the host.
    pub fn root(&self) -> PathBuf {
        self.base.path().join(PROGRAM).join(&self.name).join("root")
    }

    /// Waits until the guest has done its worst; what it said.
    pub fn wait(&mut self) -> String {
        self.vmm.process.wait_for("attack over");
        self.vmm.process.stdout()
    }

    fn counter(&self, file: &str, name: &str) -> u64 {
        let text = fs::read_to_string(self.group.join(file)).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name}: {text}")).parse().unwrap()
    }

    /// Microseconds of processor time that the machine has had, guest and monitor together.
    pub fn processor_time(&self) -> u64 {
        self.counter("cpu.stat", "usage_usec")
    }

    /// What must be true at any moment: the API answers, the guest can be made to stand still and to
    /// go on, and no limit was passed.
    pub fn check(&self) {
        assert_eq!(self.vmm.told("/")["state"], json!("Running"));
        self.vmm.done("PATCH", "/vm", &json!({ "state": "Paused" }));
        assert_eq!(self.vmm.told("/")["state"], json!("Paused"));
        self.vmm.done("PATCH", "/vm", &json!({ "state": "Resumed" }));
        self.vmm.done("PATCH", "/balloon", &json!({ "amount_mib": 8 }));
        assert_ne!(self.vmm.told("/vm/config"), Value::Null);
        // Memory: nobody was killed for it, and little is the monitor's own.
        assert_eq!(self.counter("memory.events", "oom_kill"), 0);
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        let own: u64 = own.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(own < OVERHEAD << 10, "{own} KiB of its own");
        // Processor time: no more than its share of all periods there were, each begun one counted.
        let used = self.processor_time();
        let periods = self.since.elapsed().as_micros() as u64 / CPU.1 + 2;
        assert!(used <= periods * CPU.0, "{used} us in {periods} periods");
        let messages = fs::metadata(self.root().join("log")).unwrap().len();
        assert!(messages < MOST_MESSAGES, "{messages} bytes of messages");
    }

    /// Ends the machine by a signal, or waits for its end: `status` it must be.
    pub fn end(self, signal: Option<Signal>, status: i32) {
        if let Some(signal) = signal {
            self.vmm.process.signal(signal);
        }
        let log = self.root().join("log");
        let done = self.vmm.process.finish();
        let messages = fs::read_to_string(log).unwrap();
        assert_eq!(done.status.code(), Some(status), "{}: {messages}\n{}", done.err(), done.out());
        assert!(!messages.contains("panicked") && !done.err().contains("panicked"), "{messages}");
        fs::remove_dir(&self.group).unwrap();
        let delete = ["netns", "delete", &self.name];
        assert!(Command::new("ip").args(delete).status().unwrap().success());
    }
}
