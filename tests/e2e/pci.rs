//! `vmrun-vmm --enable-pci`: virtio devices on a PCI bus, those that come and go, and snapshots.

mod pmem;
mod processors;

use std::fs;
use std::path::{Path, PathBuf};

use e2e::api::Vmm;
use e2e::guest::{self, Tap};
use serde_json::{Value, json};

/// The guest's first program: says what it sees of its devices whenever that is new. A drive is seen
/// by the line that it begins with.
const INIT: &str = r#"for device in /sys/bus/virtio/devices/*; do
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
    vmm: Vmm,
}

impl Machine {
    /// A monitor that waits for requests.
    fn start(options: &[&str]) -> Machine {
        let folder = tempfile::tempdir().unwrap();
        let vmm = Vmm::start(&folder.path().join("api"), options);
        Machine { folder, vmm }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// One request; status and text of its answer.
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let (status, body) = self.vmm.ask(method, path, body);
        (status, body.to_string())
    }

    #[track_caller]
    fn put(&self, path: &str, body: &Value) {
        self.vmm.done("PUT", path, body);
    }

    #[track_caller]
    fn patch(&self, path: &str, body: &Value) {
        self.vmm.done("PATCH", path, body);
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
        self.describe_with(INIT, 1);
    }

    fn describe_with(&self, init: &str, vcpus: u32) {
        let initrd = guest::initramfs(self.folder.path(), init);
        self.put("/machine-config", &json!({ "vcpu_count": vcpus, "mem_size_mib": 256 }));
        self.put(
            "/boot-source",
            &json!({
                "kernel_image_path": guest::kernel(),
                "initrd_path": initrd,
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
        self.vmm.process.wait_for(text);
    }

    fn end(self) {
        self.vmm.process.signal(nix::sys::signal::Signal::SIGTERM);
        self.vmm.process.finish().exits(143);
    }
}

fn write_drive(file: &Path, name: &str) {
    let mut bytes = format!("{name}\n").into_bytes();
    bytes.resize(2 << 20, 0);
    fs::write(file, bytes).unwrap();
}

fn interface(tap: &Tap, id: &str) -> Value {
    json!({ "iface_id": id, "host_dev_name": tap.name() })
}

#[test]
fn every_kind_of_device_works_on_pci() {
    let tap = Tap::new("pcitap0", None);
    let mut machine = Machine::start(&["--enable-pci"]);
    machine.describe();
    machine.put("/drives/first", &machine.drive("first"));
    machine.put("/network-interfaces/eth0", &interface(&tap, "eth0"));
    machine.put("/vsock", &json!({ "guest_cid": 3, "uds_path": machine.path("vsock") }));
    machine.put("/entropy", &json!({}));
    machine.put("/balloon", &json!({ "amount_mib": 0, "deflate_on_oom": true }));
    let file = machine.path("pmem");
    write_drive(&file, "persistent");
    machine.put("/pmem/p", &json!({ "id": "p", "path_on_host": file }));
    machine.run();
    machine.wait_for("devices: vda:first memory eth0.");
    let said = machine.vmm.process.stdout();
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
    let tap = Tap::new("pcitap1", None);
    let mut machine = Machine::start(&["--enable-pci"]);
    machine.describe();
    machine.put("/drives/first", &machine.drive("first"));
    machine.run();
    machine.wait_for("devices: vda:first.");
    // One whose io_uring is made while the guest runs.
    let mut second = machine.drive("second");
    second["io_engine"] = json!("Async");
    machine.put("/drives/second", &second);
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
    machine.put("/network-interfaces/eth0", &interface(&tap, "eth0"));
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
    assert!(machine.vmm.process.stdout().contains("virtio_blk on platform"));
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
