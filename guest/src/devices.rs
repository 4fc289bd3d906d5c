//! Device nodes of a container, and waiting for those of the machine.

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};

use crate::error::{Context, SetupError};

/// Waits until the kernel has found a block device.
pub fn wait_for_block(path: &str) -> Result<(), SetupError> {
    for _ in 0..2500 {
        if fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device()) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(2));
    }
    Err(SetupError::setup(format!("{path}: the kernel finds no such block device")))
}

/// Makes the nodes and links that the OCI runtime specification lists, in an empty `/dev`.
pub fn populate(dev: &Path) -> Result<(), SetupError> {
    let before = umask(Mode::empty());
    let made = nodes(dev);
    umask(before);
    made
}

fn nodes(dev: &Path) -> Result<(), SetupError> {
    let all = Mode::from_bits_truncate(0o666);
    for (name, major, minor) in [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ] {
        let path = dev.join(name);
        mknod(&path, SFlag::S_IFCHR, all, makedev(major, minor))
            .context(|| path.display().to_string())?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("core", "/proc/kcore"),
        ("ptmx", "pts/ptmx"),
    ] {
        symlink(target, dev.join(name)).context(|| format!("/dev/{name}"))?;
    }
    Ok(())
}
