//! What the kernel is asked for so that neighbours learn nothing of a machine by what they share with
//! it: pages and processor cores. Both are properties of the process; ask before it makes threads.

#![allow(unsafe_code, reason = "prctl options that no crate knows")]

use std::io;

/// The kernel does not grant it.
#[derive(Debug, thiserror::Error)]
pub enum IsolationError {
    /// `PR_SET_MEMORY_MERGE` failed.
    #[error("cannot keep this process's memory from being merged by KSM: {0}")]
    Merging(#[source] io::Error),
    /// There is no core scheduling.
    #[error(
        "the host's kernel has no core scheduling (CONFIG_SCHED_CORE, Linux 5.14 and later); switch SMT \
         off instead, and leave --core-scheduling away"
    )]
    NoCoreScheduling,
    /// `PR_SCHED_CORE` failed.
    #[error("cannot get a core scheduling cookie: {0}")]
    Cookie(#[source] io::Error),
}

fn prctl(option: libc::c_int, arguments: [libc::c_ulong; 4]) -> io::Result<()> {
    let [second, third, fourth, fifth] = arguments;
    // SAFETY: for the options used here all arguments are numbers, none a pointer, and what the call
    // changes (which pages may be merged, where threads may run) is nothing that memory safety rests on.
    match unsafe { libc::prctl(option, second, third, fourth, fifth) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Keeps KSM from merging any memory of this process, guest memory first of all: how long a write takes
/// would tell a neighbour whether a page of its own is there, too. Nothing here asks for merging, but a
/// parent may have (`PR_SET_MEMORY_MERGE` is inherited; systemd's `MemoryKSM=`). Also takes apart what
/// was merged before.
///
/// # Errors
/// The kernel refuses. One that does not know the request (before 6.4, or without KSM) is none: there
/// nobody can have switched it on.
pub fn refuse_merging() -> Result<(), IsolationError> {
    match prctl(libc::PR_SET_MEMORY_MERGE, [0; 4]) {
        Err(error) if error.raw_os_error() != Some(libc::EINVAL) => {
            Err(IsolationError::Merging(error))
        }
        _ => Ok(()),
    }
}

/// Gives this process a core scheduling cookie of its own (Linux: admin-guide/hw-vuln/core-scheduling):
/// the kernel runs no other process beside it on the threads of one core. Its threads inherit it.
///
/// # Errors
/// The kernel has no core scheduling, or has no cookie left. A processor without SMT is none: what is
/// asked for is so already.
pub fn take_core() -> Result<(), IsolationError> {
    // linux/prctl.h and linux/pid.h; libc has them for Android only.
    const PR_SCHED_CORE: libc::c_int = 62;
    const PR_SCHED_CORE_CREATE: libc::c_ulong = 1;
    const THIS_PROCESS: libc::c_ulong = 0;
    const PIDTYPE_TGID: libc::c_ulong = 1;
    granted(prctl(PR_SCHED_CORE, [PR_SCHED_CORE_CREATE, THIS_PROCESS, PIDTYPE_TGID, 0]))
}

fn granted(result: io::Result<()>) -> Result<(), IsolationError> {
    let Err(error) = result else { return Ok(()) };
    match error.raw_os_error() {
        Some(libc::ENODEV) => Ok(()),
        Some(libc::EINVAL) => Err(IsolationError::NoCoreScheduling),
        _ => Err(IsolationError::Cookie(error)),
    }
}

#[cfg(test)]
mod tests {
    use api_server::machine::HugePages;
    use vm_memory::GuestMemoryBackend;

    use super::*;
    use crate::memory::{self, MemoryOptions};

    /// Whether the mapping at `address` may be merged: `mg` of its `VmFlags` in smaps (proc(5)).
    fn mergeable(address: *mut u8) -> bool {
        let address = address as usize;
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in smaps.lines() {
            let mut range = line.split(' ').next().unwrap().split('-');
            let bound = |text: Option<&str>| usize::from_str_radix(text?, 16).ok();
            if let (Some(start), Some(end)) = (bound(range.next()), bound(range.next())) {
                inside = (start..end).contains(&address);
            }
            if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
                return flags.split_whitespace().any(|flag| flag == "mg");
            }
        }
        panic!("{address:#x} is not mapped");
    }

    #[test]
    fn guest_memory_is_never_merged_even_if_a_parent_wants_it() {
        let options = |pages| MemoryOptions { mib: 4, pages, hotplug: 0, track_dirty_pages: false };
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        let make = || {
            [
                memory::create(&options(HugePages::None)).unwrap(),
                memory::create(&options(HugePages::Transparent)).unwrap(),
                memory::anonymous(&options(HugePages::None)).unwrap(),
                memory::from_file(&options(HugePages::None), file.try_clone().unwrap()).unwrap(),
            ]
        };
        let merged = |memory: &devices::GuestMemory| {
            mergeable(memory.get_host_address(vm_memory::GuestAddress(0)).unwrap())
        };
        // Nothing here asks for it.
        assert!(!make().iter().any(merged));
        // A process that has been told to merge.
        if let Err(error) = prctl(libc::PR_SET_MEMORY_MERGE, [1, 0, 0, 0]) {
            eprintln!("the rest is skipped: this kernel merges nothing by itself: {error}");
            refuse_merging().unwrap();
            return;
        }
        let before = make();
        assert!(before.iter().any(merged));
        refuse_merging().unwrap();
        assert!(!before.iter().any(merged));
        assert!(!make().iter().any(merged));
    }

    #[test]
    fn what_the_kernel_says_of_a_cookie_is_understood() {
        let says = |number| granted(Err(io::Error::from_raw_os_error(number)));
        granted(Ok(())).unwrap();
        // No SMT: nobody shares a core.
        says(libc::ENODEV).unwrap();
        assert!(matches!(says(libc::EINVAL), Err(IsolationError::NoCoreScheduling)));
        assert!(matches!(says(libc::ENOMEM), Err(IsolationError::Cookie(_))));
        assert!(matches!(says(libc::EPERM), Err(IsolationError::Cookie(_))));
    }
}
