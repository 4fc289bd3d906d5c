//! Has the image's processes stand still, by the freezer of control groups: they see nothing of it.
//!
//! Processes are moved to a group of their own for that, and back. Groups that the image has made
//! itself are frozen as they are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::early;

const GROUPS: &str = "/sys/fs/cgroup";
const OWN: &str = "/sys/fs/cgroup/vmrun-snapshot";
/// How long processes may take to leave what they do in the kernel.
const LIMIT: Duration = Duration::from_secs(5);

/// Processes that stand still. They go on when this is dropped.
pub struct Frozen {
    /// Groups that the image has made.
    groups: Vec<PathBuf>,
}

/// Freezes all processes but this one.
pub fn freeze() -> io::Result<Frozen> {
    let mut frozen = Frozen { groups: Vec::new() };
    if !Path::new(GROUPS).join("cgroup.procs").exists() {
        // A kernel without control groups. Its processes may see a moment of the old machine.
        early::log("no control groups: processes run on while a snapshot is restored");
        return Ok(frozen);
    }
    fs::create_dir_all(OWN)?;
    for entry in fs::read_dir(GROUPS)?.flatten() {
        let path = entry.path();
        let runs = fs::read_to_string(path.join("cgroup.freeze")).is_ok_and(|on| on.trim() == "0");
        if runs && path != Path::new(OWN) {
            fs::write(path.join("cgroup.freeze"), "1")?;
            frozen.groups.push(path);
        }
    }
    fs::write(Path::new(OWN).join("cgroup.freeze"), "1")?;
    // A process that forks while it is moved leaves another to be moved.
    while move_all(GROUPS, OWN)? > 0 {}
    let since = Instant::now();
    for group in frozen.groups.iter().map(PathBuf::as_path).chain([Path::new(OWN)]) {
        while !fs::read_to_string(group.join("cgroup.events"))?.contains("frozen 1") {
            if since.elapsed() > LIMIT {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(frozen)
}

/// Moves the image's processes from one group to another; how many there were.
fn move_all(from: &str, to: &str) -> io::Result<usize> {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/pid")).ok();
    let own = namespace("self");
    let list = fs::read_to_string(Path::new(from).join("cgroup.procs"))?;
    // Not those of our own namespace: this process and the kernel's.
    let others = list.lines().filter(|pid| namespace(pid).is_some_and(|it| Some(it) != own));
    let moved = others.filter(|pid| fs::write(Path::new(to).join("cgroup.procs"), pid).is_ok());
    Ok(moved.count())
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let result = (|| {
            for group in &self.groups {
                // The image may have had the group removed by others.
                let _ = fs::write(group.join("cgroup.freeze"), "0");
            }
            if Path::new(OWN).exists() {
                fs::write(Path::new(OWN).join("cgroup.freeze"), "0")?;
                while move_all(OWN, GROUPS)? > 0 {}
                fs::remove_dir(OWN)?;
            }
            io::Result::Ok(())
        })();
        if let Err(error) = result {
            early::log(&format!("processes after a snapshot: {error}"));
        }
    }
}
