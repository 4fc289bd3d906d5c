//! `vmrun-vmm --enable-pci`: virtio devices on a PCI bus, those that come and go, and snapshots.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::Running;
use serde_json::{Value, json};

/// The guest's first program: says what it sees of its devices whenever that is new. A drive is seen
/// by the line that it begins with.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys; $b mount -t devtmpfs dev /dev
exec >/dev/console 2>&1 </dev/console
for device in /sys/bus/virtio/devices/*; do
    driver=$($b readlink $device/driver); parent=$($b readlink -f $device/../subsystem)
    echo "${driver##*/} on ${parent##*/}"
done
echo "processors=$($b nproc)"
echo "messages=$($b grep -c PCI-MSI /proc/interrupts)"
$b head -c 16 /dev/hwrng | $b wc -c | $b sed 's/^/random=/'
$b ip link set eth0 up 2>/dev/null && echo "carrier=$($b cat /sys/class/net/eth0/carrier)"
while :; do
    now=
    for drive in /sys/block/vd*; do
        name=${drive##*/}
        [ -b /dev/$name ] && now="$now $name:$($b dd if=/dev/$name bs=512 count=1 iflag=direct 2>/dev/null | $b head -n 1)"
    done
    for space in /sys/bus/nd/devices/namespace*; do [ -e $space ] && now="$now memory"; done
    for link in /sys/class/net/eth*; do [ -e $link ] && now="$now ${link##*/}"; done
    [ "$now" = "$last" ] || echo "devices:$now."
    last=$now
    $b sleep 0.1
done
"#;

struct Machine {
    folder: tempfile::TempDir,
    running: Running,
    socket: PathBuf,
}

impl Machine {
    /// A monitor that waits for requests.
    fn start(options: &[&str]) -> Machine {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let mut command = Command::new("vmrun-vmm");
        command.arg("--api-sock").arg(&socket).args(options);
        let running = Running::start(command.stdin(std::process::Stdio::null()));
        while !socket.exists() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Machine { folder, running, socket }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// One request; status and body of its answer.
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut client = UnixStream::connect(&self.socket).unwrap();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Length: {length}\r\n\r\n"
        );
        client.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        (status.unwrap_or_else(|| panic!("no answer: {answer}")), body.to_owned())
    }

    #[track_caller]
    fn put(&self, path: &str, body: &Value) {
        assert_eq!(self.ask("PUT", path, &body.to_string()), (204, String::new()), "{path}");
    }

    #[track_caller]
    fn patch(&self, path: &str, body: &Value) {
        assert_eq!(self.ask("PATCH", path, &body.to_string()), (204, String::new()), "{path}");
    }

    /// Has the guest let go of a device. In the lab it may take longer than the monitor waits.
    #[track_caller]
    fn unplug(&self, path: &str) {
        for attempt in 0..10 {
            match self.ask("DELETE", path, "") {
                (204, _) => return,
                (400, said) if said.contains("has not let go") => {}
                (400, said) if attempt > 0 && said.contains("no such device") => return,
                other => panic!("{path}: {other:?}"),
            }
        }
        panic!("{path}: the guest does not let go");
    }

    /// Kernel, memory and first program.
    fn describe(&self) {
        self.describe_with(1);
    }

    fn describe_with(&self, vcpus: u8) {
        let tree = self.path("tree");
        fs::create_dir_all(tree.join("bin")).unwrap();
        fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
        fs::write(tree.join("init"), INIT).unwrap();
        fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
        let pack = "find . | cpio --quiet -o -H newc >../initrd";
        let status = Command::new("sh").args(["-c", pack]).current_dir(&tree).status().unwrap();
        assert!(status.success());
        self.put("/machine-config", &json!({ "vcpu_count": vcpus, "mem_size_mib": 256 }));
        self.put(
            "/boot-source",
            &json!({
                "kernel_image_path": e2e::images::kernel(),
                "initrd_path": self.path("initrd"),
                "boot_args": "console=ttyS0 reboot=k panic=-1",
            }),
        );
    }

    /// A drive that begins with its name.
    fn drive(&self, name: &str) -> Value {
        let file = self.path(name);
        write_drive(&file, name);
        json!({ "drive_id": name, "path_on_host": file, "is_root_device": false })
    }

    fn run(&self) {
        self.put("/actions", &json!({ "action_type": "InstanceStart" }));
    }

    fn wait_for(&mut self, text: &str) {
        self.running.wait_for(text);
    }

    fn end(self) {
        self.running.signal(nix::sys::signal::Signal::SIGTERM);
        self.running.finish().exits(143);
    }
}

fn write_drive(file: &Path, name: &str) {
    let mut bytes = format!("{name}\n").into_bytes();
    bytes.resize(2 << 20, 0);
    fs::write(file, bytes).unwrap();
}

/// An interface of the host that is gone with the test.
struct Tap(&'static str);

impl Tap {
    fn new(name: &'static str) -> Tap {
        let status = Command::new("ip").args(["tuntap", "add", name, "mode", "tap"]).status();
        assert!(status.unwrap().success());
        let status = Command::new("ip").args(["link", "set", name, "up"]).status();
        assert!(status.unwrap().success());
        Tap(name)
    }

    fn interface(&self, id: &str) -> Value {
        json!({ "iface_id": id, "host_dev_name": self.0 })
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", self.0]).status();
    }
}

#[test]
fn every_kind_of_device_works_on_pci() {
    let tap = Tap::new("pcitap0");
    let mut machine = Machine::start(&["--enable-pci"]);
    machine.describe();
    machine.put("/drives/first", &machine.drive("first"));
    machine.put("/network-interfaces/eth0", &tap.interface("eth0"));
    machine.put("/vsock", &json!({ "guest_cid": 3, "uds_path": machine.path("vsock") }));
    machine.put("/entropy", &json!({}));
    machine.put("/balloon", &json!({ "amount_mib": 0, "deflate_on_oom": true }));
    let file = machine.path("pmem");
    write_drive(&file, "persistent");
    machine.put("/pmem/p", &json!({ "id": "p", "path_on_host": file }));
    machine.run();
    machine.wait_for("devices: vda:first memory eth0.");
    let said = machine.running.stdout();
    for driver in ["virtio_blk", "virtio_net", "vmw_vsock_virtio_transport", "virtio_rng"] {
        assert!(said.contains(&format!("{driver} on pci")), "{driver}: {said}");
    }
    assert!(
        said.contains("virtio_balloon on pci") && said.contains("virtio_pmem on pci"),
        "{said}"
    );
    assert!(said.contains("random=16\r\n") && said.contains("carrier=1\r\n"), "{said}");
    assert!(!said.contains("messages=0"), "{said}");
    machine.end();
}

#[test]
fn devices_come_and_go_without_a_rescan() {
    let tap = Tap::new("pcitap1");
    let mut machine = Machine::start(&["--enable-pci"]);
    machine.describe();
    machine.put("/drives/first", &machine.drive("first"));
    machine.run();
    machine.wait_for("devices: vda:first.");
    machine.put("/drives/second", &machine.drive("second"));
    machine.wait_for("devices: vda:first vdb:second.");
    // A name is taken until its device is gone.
    let again = machine.drive("second").to_string();
    assert_eq!(machine.ask("PUT", "/drives/second", &again).0, 400);
    machine.unplug("/drives/second");
    assert_eq!(machine.ask("DELETE", "/drives/second", "").0, 400);
    assert!(!machine.ask("GET", "/vm/config", "").1.contains("second"));

    // Into the slot that is free again, then more of them, of every kind.
    machine.put("/drives/third", &machine.drive("third"));
    machine.wait_for("devices: vda:first vdb:third.");
    machine.put("/network-interfaces/eth0", &tap.interface("eth0"));
    machine.wait_for("devices: vda:first vdb:third eth0.");
    let file = machine.path("pmem");
    write_drive(&file, "persistent");
    machine.put("/pmem/p", &json!({ "id": "p", "path_on_host": file }));
    machine.wait_for("devices: vda:first vdb:third memory eth0.");
    for path in ["/pmem/p", "/network-interfaces/eth0", "/drives/third"] {
        machine.unplug(path);
    }
    machine.put("/drives/fourth", &machine.drive("fourth"));
    machine.wait_for("devices: vda:first vdb:fourth.");
    machine.end();
}

#[test]
fn a_guest_that_does_not_let_go_keeps_its_device_and_nobody_waits() {
    let mut machine = Machine::start(&["--enable-pci"]);
    machine.describe();
    machine.put("/drives/first", &machine.drive("first"));
    machine.run();
    machine.wait_for("devices: vda:first.");
    machine.patch("/vm", &json!({ "state": "Paused" }));
    std::thread::scope(|scope| {
        let removal = scope.spawn(|| machine.ask("DELETE", "/drives/first", ""));
        std::thread::sleep(std::time::Duration::from_millis(500));
        assert_eq!(machine.ask("GET", "/", "").0, 200);
        assert!(!removal.is_finished());
        let (status, said) = removal.join().unwrap();
        assert!(status == 400 && said.contains("has not let go"), "{status} {said}");
    });
    assert!(machine.ask("GET", "/vm/config", "").1.contains("first"));
    machine.end();
}

#[test]
fn without_pci_nothing_comes_or_goes() {
    let mut machine = Machine::start(&[]);
    machine.describe();
    machine.put("/drives/first", &machine.drive("first"));
    machine.run();
    machine.wait_for("devices: vda:first.");
    assert!(machine.running.stdout().contains("virtio_blk on platform"));
    let drive = machine.drive("second").to_string();
    for (method, path, body) in
        [("PUT", "/drives/second", drive.as_str()), ("DELETE", "/drives/first", "")]
    {
        let (status, said) = machine.ask(method, path, body);
        assert!(status == 400 && said.contains("after starting the microVM"), "{said}");
    }
    machine.end();
}

#[test]
fn a_snapshot_over_pci_is_restored_whatever_the_options_say() {
    let mut machine = Machine::start(&["--enable-pci"]);
    machine.describe();
    machine.put("/drives/first", &machine.drive("first"));
    machine.run();
    machine.wait_for("devices: vda:first.");
    // Slots that are not those of a new machine with these devices.
    machine.put("/drives/second", &machine.drive("second"));
    machine.wait_for("devices: vda:first vdb:second.");
    machine.put("/drives/third", &machine.drive("third"));
    machine.wait_for("devices: vda:first vdb:second vdc:third.");
    machine.unplug("/drives/second");
    machine.wait_for("devices: vda:first vdc:third.");
    machine.patch("/vm", &json!({ "state": "Paused" }));
    let (state, memory) = (machine.path("state"), machine.path("memory"));
    let create = json!({ "snapshot_path": state, "mem_file_path": memory });
    machine.put("/snapshot/create", &create);

    let mut restored = Machine::start(&[]);
    restored.put(
        "/snapshot/load",
        &json!({
            "snapshot_path": state,
            "mem_backend": { "backend_type": "File", "backend_path": memory },
            "resume_vm": true,
        }),
    );
    // Read by the guest again and again, so this is seen through its queues and interrupts.
    write_drive(&machine.path("third"), "changed");
    restored.wait_for("devices: vda:first vdc:changed.");
    restored.put("/drives/fourth", &restored.drive("fourth"));
    restored.wait_for("vdb:fourth");
    restored.unplug("/drives/third");
    restored.wait_for("devices: vda:first vdb:fourth.");
    restored.end();
    machine.end();
}
