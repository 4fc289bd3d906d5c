//! Drives whose requests io_uring carries out.

use std::path::Path;
use std::process::Command;

use e2e::api::Vmm;
use e2e::guest;
use nix::sys::signal::Signal;
use serde_json::json;

/// Writes to a file system, gives some of it back, and reads what it wrote; then once more, on what is
/// in the drive's place by then.
const INIT: &str = r#"turn() {
    $b mount -t ext4 -o discard /dev/vda /mnt || return
    $b dd if=/dev/urandom of=/mnt/kept bs=64k count=64 2>/dev/null
    $b cp /mnt/kept /mnt/dropped; $b sync
    $b rm /mnt/dropped; $b sync
    sum=$($b md5sum </mnt/kept)
    $b umount /mnt
    echo 3 >/proc/sys/vm/drop_caches
    $b mount -t ext4 -o ro /dev/vda /mnt
    [ "$sum" = "$($b md5sum </mnt/kept)" ] && echo "$1: ${sum%% *}"
    $b umount /mnt
}
turn first
until [ "$($b cat /sys/block/vda/size)" = 196608 ]; do $b sleep 0.1; done
turn second
while :; do $b sleep 1000; done
"#;

fn disk(path: &Path, mib: u64) {
    std::fs::File::create(path).unwrap().set_len(mib << 20).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-b", "4096"]).arg(path).status().unwrap();
    assert!(made.success());
}

/// What the guest said of its file is true on the host, too.
fn is_whole(path: &Path, said: &str, turn: &str) {
    let check = Command::new("e2fsck").arg("-fn").arg(path).output().unwrap();
    assert!(check.status.success(), "{turn}: {}", String::from_utf8_lossy(&check.stdout));
    let script = "debugfs -R 'cat /kept' \"$0\" 2>/dev/null | md5sum";
    let output = Command::new("sh").args(["-c", script]).arg(path).output().unwrap();
    let sum = String::from_utf8_lossy(&output.stdout);
    let sum = sum.split_whitespace().next().unwrap();
    assert!(said.contains(&format!("{turn}: {sum}")), "{turn}: {sum}, {said}");
}

#[test]
fn a_file_system_on_a_drive_of_io_uring_is_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (first, second) = (path("first"), path("second"));
    disk(&first, 64);
    disk(&second, 96);
    let initrd = guest::initramfs(folder.path(), INIT);
    let mut vmm = Vmm::start(&path("api"), &[]);
    vmm.done("PUT", "/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 128 }));
    vmm.done("PUT", "/boot-source", &guest::boot_source(&initrd));
    vmm.done(
        "PUT",
        "/drives/disk",
        &json!({
            "drive_id": "disk", "path_on_host": first, "is_root_device": false,
            "cache_type": "Writeback", "io_engine": "Async",
        }),
    );
    vmm.done("PUT", "/actions", &json!({ "action_type": "InstanceStart" }));
    vmm.process.wait_for("first: ");
    vmm.done("PATCH", "/drives/disk", &json!({ "drive_id": "disk", "path_on_host": second }));
    vmm.process.wait_for("second: ");
    vmm.process.wait_for("\r\n");
    vmm.process.signal(Signal::SIGTERM);
    let said = vmm.process.finish().exits(143).out();
    is_whole(&first, &said, "first");
    is_whole(&second, &said, "second");
    // What was given back is none of the host's.
    let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&first).unwrap()) * 512;
    assert!(used < 12 << 20, "{used} bytes");
}
