//! What the host does to a machine that runs: the machine goes on, or ends with an error that names
//! the thing, and the others do not notice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use e2e::api::Vmm;
use e2e::guest::{self, Tap};
use e2e::{Running, Session, run, text};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const BASE: &str = "localhost/base";

/// A monitor whose guest runs a script, with more devices.
fn boot(folder: &Path, script: &str, devices: &[(&str, Value)]) -> Vmm {
    let initrd = guest::initramfs(folder, script);
    let log = folder.join("log");
    fs::write(&log, "").unwrap();
    let options = ["--level", "Warn", "--log-path", text(&log)];
    let vmm = Vmm::start(&folder.join("api"), &options);
    vmm.done("PUT", "/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 128 }));
    vmm.done("PUT", "/boot-source", &guest::boot_source(&initrd));
    for (path, body) in devices {
        vmm.done("PUT", path, body);
    }
    vmm.done("PUT", "/actions", &json!({ "action_type": "InstanceStart" }));
    vmm
}

fn drive(name: &str, path: &Path, engine: &str) -> Value {
    json!({
        "drive_id": name, "path_on_host": path, "is_root_device": false,
        "cache_type": "Writeback", "io_engine": engine,
    })
}

fn end(vmm: Vmm) {
    assert_eq!(vmm.told("/")["state"], json!("Running"));
    vmm.process.signal(Signal::SIGTERM);
    vmm.process.finish().exits(143);
}

/// A file system whose power can be cut: what was not written to its device by then is lost.
struct Cuttable {
    folder: PathBuf,
}

impl Cuttable {
    fn new(folder: &Path) -> Cuttable {
        let cuttable = Cuttable { folder: folder.to_owned() };
        fs::File::create(folder.join("device")).unwrap().set_len(64 << 20).unwrap();
        run("mkfs.ext4", &["-q", text(&folder.join("device"))]);
        cuttable.mount("device", "before");
        cuttable
    }

    fn mount(&self, device: &str, at: &str) -> PathBuf {
        let at = self.folder.join(at);
        fs::create_dir(&at).unwrap();
        // Nothing is written in the background as long as a test takes.
        let options = "loop,commit=900";
        run("mount", &["-o", options, text(&self.folder.join(device)), text(&at)]);
        at
    }

    fn before(&self) -> PathBuf {
        self.folder.join("before")
    }

    /// The power is gone, and comes back: what is on it then.
    fn cut(&self) -> PathBuf {
        // The page cache of the mounted file system stays behind; what is copied is the device's.
        fs::copy(self.folder.join("device"), self.folder.join("copy")).unwrap();
        self.mount("copy", "after")
    }
}

impl Drop for Cuttable {
    fn drop(&mut self) {
        for at in ["after", "before"] {
            let _ = Command::new("umount").arg(self.folder.join(at)).status();
        }
    }
}

/// docs/hostile.md 27: the power is cut after a flush was acknowledged.
#[test]
fn hostile_27_what_was_flushed_is_on_the_disk_when_the_power_is_cut() {
    let script = "for disk in a b; do
            $b yes \"flushed to $disk\" | $b dd of=/dev/vd$disk bs=64k count=16 iflag=fullblock conv=fsync 2>/dev/null
        done
        echo flushed; while :; do $b sleep 1000; done\n";
    let folder = tempfile::tempdir().unwrap();
    let disk = Cuttable::new(folder.path());
    let devices: Vec<_> = [("first", "Sync"), ("second", "Async")]
        .map(|(name, engine)| {
            let path = disk.before().join(name);
            fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
            (format!("/drives/{name}"), drive(name, &path, engine))
        })
        .into();
    // The names are the host's own business, and must be there already.
    run("sync", &[]);
    let devices: Vec<_> = devices.iter().map(|(path, body)| (&**path, body.clone())).collect();
    let mut vmm = boot(folder.path(), script, &devices);
    vmm.process.wait_for("flushed\r\n");
    fs::write(disk.before().join("not-flushed"), "by anybody").unwrap();
    let after = disk.cut();
    vmm.process.signal(Signal::SIGKILL);
    vmm.process.finish();
    for (name, letter) in [("first", 'a'), ("second", 'b')] {
        let bytes = fs::read(after.join(name)).unwrap();
        let wanted = format!("flushed to {letter}\n").repeat(1 << 17);
        assert_eq!(bytes.len(), 4 << 20);
        assert!(bytes[..1 << 20] == wanted.as_bytes()[..1 << 20], "{name} lost what it had");
    }
    // The cut was one.
    assert!(fs::read(after.join("not-flushed")).unwrap_or_default().is_empty());
}

/// docs/hostile.md 26: a disk's file is cut off under the machine.
#[test]
fn hostile_26_a_disk_that_is_cut_off_is_an_io_error_of_the_guest() {
    let script = "while :; do
            for disk in a b; do
                $b dd if=/dev/vd$disk of=/dev/null bs=4k skip=256 count=1 iflag=direct 2>/dev/null && echo \"$disk is read\" || echo \"$disk has an error\"
                $b dd if=/dev/vd$disk of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null && echo \"begin of $disk is read\"
            done
            $b sleep 0.1
        done\n";
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    for path in [&first, &second] {
        fs::File::create(path).unwrap().set_len(2 << 20).unwrap();
    }
    let devices = [
        ("/drives/first", drive("first", &first, "Sync")),
        ("/drives/second", drive("second", &second, "Async")),
    ];
    let mut vmm = boot(folder.path(), script, &devices);
    vmm.process.wait_for("b is read\r\n");
    for path in [&first, &second] {
        fs::File::options().write(true).open(path).unwrap().set_len(64 << 10).unwrap();
    }
    vmm.process.wait_for("a has an error");
    vmm.process.wait_for("b has an error");
    let said = vmm.process.stdout().len();
    while !vmm.process.stdout()[said..].contains("begin of a is read")
        || !vmm.process.stdout()[said..].contains("begin of b is read")
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    // As long as it was, it works again.
    for path in [&first, &second] {
        fs::File::options().write(true).open(path).unwrap().set_len(2 << 20).unwrap();
    }
    end(vmm);
    let log = fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(log.contains("first") && log.contains("second"), "{log}");
    assert!(log.len() < 64 << 10, "{} bytes", log.len());
}

/// docs/hostile.md 26: a file that is memory of the guest is cut off. A flush is an error, which the log
/// names; a program of the guest's that touches what is gone does not come back (KVM tries again and
/// again where the guest takes asynchronous page faults, and gives the processor up where it does not).
/// The monitor itself lives: it never touches that memory.
#[test]
fn hostile_26_persistent_memory_that_is_cut_off_is_no_end_of_the_monitor_by_a_signal() {
    let script =
        "page() { $b dd if=/dev/zero of=/dev/pmem0 bs=4k count=1 conv=notrunc,fsync 2>/dev/null; }
        page && echo flushed
        while page; do $b sleep 0.1; done
        echo \"not flushed\"
        $b dd if=/dev/pmem0 of=/dev/null bs=4k skip=256 count=256 iflag=direct 2>/dev/null
        echo \"it was read\"; $b sleep 1000\n";
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("memory");
    fs::File::create(&file).unwrap().set_len(4 << 20).unwrap();
    let store = json!({ "id": "store", "path_on_host": file });
    let mut vmm = boot(folder.path(), script, &[("/pmem/store", store)]);
    vmm.process.wait_for("flushed\r\n");
    fs::File::options().write(true).open(&file).unwrap().set_len(4096).unwrap();
    vmm.process.wait_for("not flushed");
    let messages = || fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(messages().contains("store") && messages().contains("cut off"), "{}", messages());
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(50));
        if messages().contains("cannot provide a page") {
            vmm.process.finish().exits(11);
            return;
        }
        assert_eq!(vmm.told("/")["state"], json!("Running"));
    }
    vmm.done("PATCH", "/vm", &json!({ "state": "Paused" }));
    vmm.done("PATCH", "/vm", &json!({ "state": "Resumed" }));
    assert!(!vmm.process.stdout().contains("it was read"));
    end(vmm);
}

/// docs/hostile.md 26: the TAP is removed.
#[test]
fn hostile_26_a_tap_that_is_removed_is_told_once() {
    let script = "$b ifconfig eth0 10.78.0.2 netmask 255.255.255.0; i=0
        while :; do
            $b ping -c 1 -W 1 10.78.0.1 >/dev/null && echo answered
            i=$((i+1)); echo \"turn $i\"; $b sleep 0.1
        done\n";
    let folder = tempfile::tempdir().unwrap();
    let tap = Tap::new("gone0", Some("10.78.0.1/24"));
    let interface = json!({ "iface_id": "eth0", "host_dev_name": tap.name() });
    let devices = [("/network-interfaces/eth0", interface)];
    let mut vmm = boot(folder.path(), script, &devices);
    vmm.process.wait_for("answered\r\n");
    drop(tap);
    let turns = vmm.process.stdout().matches("turn ").count();
    vmm.process.wait_for(&format!("turn {}\r\n", turns + 3));
    end(vmm);
    let log = fs::read_to_string(folder.path().join("log")).unwrap();
    assert_eq!(log.matches("was it removed?").count(), 1, "{log}");
    assert!(log.contains("eth0") && log.len() < 64 << 10, "{log}");
}

/// A container that counts, and the process and cgroup of its VMM.
struct Counting {
    run: Running,
    vmm: Pid,
    cgroup: PathBuf,
}

impl Counting {
    fn start() -> Counting {
        let folder = tempfile::tempdir().unwrap();
        let cidfile = folder.path().join("id");
        let session = Session::prepared();
        let count = "i=0; while :; do i=$((i+1)); echo \"turn $i\"; sleep 0.1; done";
        let mut run = session.start([
            "--cidfile",
            text(&cidfile),
            "-m",
            "128m",
            "--network",
            "none",
            BASE,
            "sh",
            "-c",
            count,
        ]);
        run.wait_for("turn 1\n");
        let id = fs::read_to_string(cidfile).unwrap()[..12].to_owned();
        let cgroup = Path::new("/sys/fs/cgroup/vmrun").join(id);
        let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
        let is_vmm = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.starts_with("vmrun-vmm"))
        };
        let vmm = processes.lines().find(is_vmm).unwrap_or_else(|| panic!("{processes:?}"));
        let vmm = Pid::from_raw(vmm.parse().unwrap());
        Counting { run, vmm, cgroup }
    }

    fn turns(&self) -> usize {
        self.run.stdout().matches("turn ").count()
    }

    fn goes_on(&mut self) {
        let turns = self.turns();
        self.run.wait_for(&format!("turn {}\n", turns + 2));
    }

    fn end(self) {
        self.run.signal(Signal::SIGKILL);
        self.run.finish();
    }
}

/// docs/hostile.md 26: the host kills a VMM because its memory limit is reached.
#[test]
fn hostile_26_a_vmm_killed_for_memory_is_told_and_the_others_go_on() {
    let mut other = Counting::start();
    let one = Counting::start();
    fs::write(one.cgroup.join("memory.max"), "16M").unwrap();
    let done = one.run.finish().exits(125);
    let last = done.err().lines().last().unwrap_or_default().to_owned();
    assert!(last.contains("SIGKILL") && last.contains("memory"), "{}", done.err());
    other.goes_on();
    other.end();
}

/// docs/hostile.md 27: SIGSTOP and SIGCONT.
#[test]
fn hostile_27_a_vmm_that_is_stopped_goes_on_later() {
    let mut other = Counting::start();
    let mut one = Counting::start();
    kill(one.vmm, Signal::SIGSTOP).unwrap();
    let state = || fs::read_to_string(format!("/proc/{}/stat", one.vmm)).unwrap();
    let since = Instant::now();
    while !state().contains(") T ") {
        assert!(since.elapsed() < Duration::from_secs(60), "{}", state());
    }
    other.goes_on();
    let turns = one.turns();
    other.goes_on();
    // What was on its way has come; nothing more does.
    assert!(one.turns() <= turns + 1);
    kill(one.vmm, Signal::SIGCONT).unwrap();
    one.goes_on();
    one.end();
    other.end();
}

/// docs/hostile.md 26: the host's disk is full under a machine's writable layer.
#[test]
fn hostile_26_a_full_disk_under_the_writable_layer_is_an_error_of_the_guest() {
    let (outside, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (device, place) = (outside.path().join("device"), text(folder.path()));
    // Not a tmpfs, whose files would be memory of the VMM's: it would be killed for that first. For the
    // same reason the device's blocks are there before.
    fs::write(&device, vec![0; 112 << 20]).unwrap();
    run("mkfs.ext4", &["-q", "-E", "nodiscard", text(&device)]);
    run("mount", &["-o", "loop", text(&device), place]);
    let vmrun = |arguments: &[&str]| {
        let mut command = Command::new("vmrun");
        command.args(arguments).env("VMRUN_ROOT", folder.path().join("root"));
        Running::start(command.stdin(std::process::Stdio::null())).finish()
    };
    let archive = format!("oci-archive:{}", e2e::images::archive("base").display());
    vmrun(&["image", "pull", "-q", &archive]).exits(0);
    vmrun(&["kernel", "import", "--default", text(&e2e::images::kernel())]).exits(0);
    // The guest believes in 10 GiB.
    let script = "echo kept >/kept; sync
        dd if=/dev/zero of=/fill bs=256k count=400 conv=fsync 2>/dev/null && echo all was written
        cat /kept; echo alive";
    let done = vmrun(&["run", "--rm", "-m", "128m", "--network", "none", BASE, "sh", "-c", script]);
    let after = vmrun(&["run", "--rm", "--network", "none", BASE, "echo", "another"]);
    run("umount", &[place]);
    // Which write finds no room is chance. A file's is an error of the program's; one of the file
    // system's own ends the machine, with a reason.
    if done.status.code() == Some(125) {
        done.complains(&["the guest's kernel crashed", "no storage space", "make room"]);
    } else {
        done.exits(0).prints("kept\nalive\n");
    }
    after.exits(0).prints("another\n");
}

/// docs/hostile.md 26: the host's clock jumps, forward and back.
#[test]
fn hostile_26_a_clock_that_jumps_stops_nothing() {
    let mut one = Counting::start();
    let session = Session::prepared();
    let now = || {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.unwrap().as_secs()
    };
    const DAYS: u64 = 40 * 86_400;
    run("date", &["-s", &format!("@{}", now() + DAYS)]);
    one.goes_on();
    let during = session.run(["--network", "none", BASE, "date", "+%s"]);
    run("date", &["-s", &format!("@{}", now() - DAYS)]);
    one.goes_on();
    one.end();
    let during: u64 = during.exits(0).out().trim().parse().unwrap();
    assert!(during >= now() + DAYS / 2, "a guest that started then has another time: {during}");
    session.run(["--network", "none", BASE, "echo", "after"]).exits(0).prints("after\n");
    session.vmrun(["ps", "-a"]).exits(0);
}
