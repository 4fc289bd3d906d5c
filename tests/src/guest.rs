//! Guests of nothing but a kernel and a script, for tests of the monitor alone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What every first program does: mounts, drivers that the kernel has as modules, the console.
const BEGIN: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /tmp
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys; $b mount -t devtmpfs dev /dev
exec >/dev/console 2>&1 </dev/console
for module in $($b cat /modules/load 2>/dev/null); do $b insmod /modules/$module; done
"#;

/// An initramfs with busybox and the kernel's modules, whose first program is this script. In it
/// `$b` is busybox.
pub fn initramfs(folder: &Path, script: &str) -> PathBuf {
    tree(folder, script);
    pack(folder)
}

/// What such a guest boots from, as the API has it.
pub fn boot_source(initrd: &Path) -> serde_json::Value {
    serde_json::json!({
        "kernel_image_path": kernel(), "initrd_path": initrd,
        "boot_args": "console=ttyS0 reboot=k panic=-1 quiet",
    })
}

/// The initramfs of the tree in this folder.
pub fn pack(folder: &Path) -> PathBuf {
    let tree = folder.join("tree");
    let pack = "find . | cpio --quiet -o -H newc >../initrd";
    let status = Command::new("sh").args(["-c", pack]).current_dir(&tree).status().unwrap();
    assert!(status.success());
    folder.join("initrd")
}

/// The same as a folder of files, to be added to and made into a file system.
pub fn tree(folder: &Path, script: &str) -> PathBuf {
    let tree = folder.join("tree");
    // What an initramfs makes itself a file system that is never written must have.
    for place in ["bin", "proc", "sys", "dev", "tmp", "mnt"] {
        fs::create_dir_all(tree.join(place)).unwrap();
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    fs::write(tree.join("init"), format!("{BEGIN}{script}")).unwrap();
    if let Ok(modules) = fs::read_dir(kernel().with_file_name("modules")) {
        fs::create_dir(tree.join("modules")).unwrap();
        for module in modules.flatten() {
            fs::copy(module.path(), tree.join("modules").join(module.file_name())).unwrap();
        }
    }
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    tree
}

/// Adds the guest's end of streams over vsock to a tree: `guest-stream PORT` sends back what it is
/// sent at this port of the host, one stream after the other.
pub fn add_stream(tree: &Path) {
    let program = crate::images::assets().join("guest-stream");
    fs::copy(program, tree.join("bin/guest-stream")).unwrap();
}

/// A kernel that does what its command line says and needs nothing else (`tests/attacker`).
pub fn attacker() -> PathBuf {
    crate::images::assets().join("attacker")
}

/// An ELF kernel: what `vmrun kernel import` made of whichever it was given.
pub fn kernel() -> PathBuf {
    let kernels = fs::read_dir(crate::images::assets().join("root/kernels")).unwrap();
    let mut found: Vec<_> = kernels
        .filter_map(|entry| Some(entry.ok()?.path().join("vmlinux")))
        .filter(|path| path.exists())
        .collect();
    // The one that was built for micro-VMs, where there is more than one.
    found.sort();
    found.pop().unwrap_or_else(|| panic!("no kernel was imported"))
}

/// A TAP interface of the host, which is gone with the test.
pub struct Tap(String);

impl Tap {
    /// Makes one that is up, with this address of the host where it has any (`10.0.0.1/24`).
    pub fn new(name: &str, address: Option<&str>) -> Tap {
        let tap = Tap(name.to_owned());
        let ip = |arguments: &[&str]| {
            let status = Command::new("ip").args(arguments).status().unwrap();
            assert!(status.success(), "ip {arguments:?}");
        };
        ip(&["tuntap", "add", name, "mode", "tap", "vnet_hdr"]);
        if let Some(address) = address {
            ip(&["address", "add", address, "dev", name]);
        }
        ip(&["link", "set", name, "up"]);
        tap
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.0]).status();
    }
}
