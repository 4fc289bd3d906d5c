//! Guests of nothing but a kernel and a script, for tests of the monitor alone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An initramfs with busybox, and this script as its first program.
pub fn initramfs(folder: &Path, init: &str) -> PathBuf {
    let tree = folder.join("tree");
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    fs::write(tree.join("init"), init).unwrap();
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    let pack = "find . | cpio --quiet -o -H newc >../initrd";
    let status = Command::new("sh").args(["-c", pack]).current_dir(&tree).status().unwrap();
    assert!(status.success());
    folder.join("initrd")
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
