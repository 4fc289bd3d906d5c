//! Where a guest's words go.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use e2e::api::Vmm;
use e2e::guest;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use serde_json::json;

/// Says more than a FIFO holds on each of its consoles.
const INIT: &str = r#"for console in ttyS0 hvc0; do
    echo "begin of $console" >/dev/$console
    $b yes "more than anybody wants to read" | $b head -c 100000 >/dev/$console
done
$b poweroff -f
"#;

/// docs/hostile.md 23: a FIFO without a reader, and one that nobody empties.
#[test]
fn hostile_23_fifos_without_a_reader_stop_neither_the_start_nor_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = |name: &str| {
        let path = folder.path().join(name);
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        path
    };
    let (serial, console) = (fifo("serial"), fifo("console"));
    let initrd = guest::initramfs(folder.path(), INIT);
    // The console is vmrun's own and not in the API.
    let config = json!({
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
        "boot-source": {
            "kernel_image_path": guest::kernel(), "initrd_path": initrd,
            "boot_args": "console=ttyS0 reboot=k panic=-1 quiet",
        },
        "serial": { "serial_out_path": serial },
        "console": { "output_path": console },
    });
    let file = folder.path().join("vm.json");
    std::fs::write(&file, config.to_string()).unwrap();
    let vmm = Vmm::start(&folder.path().join("api"), &["--config-file", file.to_str().unwrap()]);
    assert_eq!(vmm.told("/")["state"], json!("Running"));
    // Only now a reader, so that what the FIFOs hold outlives the monitor.
    let read = |path| {
        std::fs::File::options()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)
            .unwrap()
    };
    let (mut serial, mut console) = (read(serial), read(console));
    vmm.process.finish().exits(0);
    let all = |from: &mut std::fs::File| {
        let mut text = String::new();
        from.read_to_string(&mut text).unwrap();
        text
    };
    let (serial, console) = (all(&mut serial), all(&mut console));
    assert!(serial.contains("begin of ttyS0") && serial.len() < 100_000, "{serial}");
    assert!(console.contains("begin of hvc0") && console.len() < 100_000, "{console}");
}
