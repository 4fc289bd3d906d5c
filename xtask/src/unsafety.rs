//! Which modules may have `unsafe` code: a test fails where another one does, or one of these needs it
//! no more.

use std::collections::BTreeSet;

use crate::command::root;
use crate::sources::{files, read};

/// The modules, each with what it is needed for. Everywhere else the compiler refuses it.
const ALLOWED: &[(&str, &str)] = &[
    ("devices/src/discard.rs", "madvise on guest memory"),
    ("devices/src/host_file.rs", "takes over descriptors that were handed over"),
    ("devices/src/virtio/block/disk.rs", "preadv and pwritev of guest memory"),
    (
        "devices/src/virtio/block/uring.rs",
        "the kernel uses guest memory while requests are in flight",
    ),
    ("devices/src/virtio/net/tap.rs", "ioctls of TAP interfaces"),
    ("devices/src/virtio/pmem/file.rs", "maps a file over reserved addresses"),
    ("devices/src/virtio/vectored.rs", "readv and writev of guest memory"),
    ("engine/src/confined.rs", "runs code between fork and exec"),
    ("engine/src/converter/child.rs", "takes over descriptors named by the parent"),
    ("engine/src/disk.rs", "lseek to data and holes, with 64-bit offsets"),
    ("engine/src/doctor/production.rs", "asks for Landlock's version"),
    ("engine/src/gift.rs", "takes over a descriptor in a test"),
    ("engine/src/network/tap.rs", "ioctls of TAP interfaces"),
    ("engine/src/network/tests.rs", "makes one thread of a test another user"),
    ("guest/src/agent.rs", "takes over a descriptor of accept4"),
    ("guest/src/process.rs", "ioctls, and code between fork and exec"),
    ("jail/src/descriptors.rs", "closes descriptors by their numbers"),
    ("jail/src/namespaces.rs", "forks, which is sound in a process of one thread"),
    ("tests/e2e/snapshots/userfault.rs", "takes over a descriptor, and ioctls of userfaultfd"),
    ("tests/e2e/terminal.rs", "runs code between fork and exec"),
    ("vmm/src/bin/vmrun-vmm/confinement.rs", "takes over descriptors named by the parent"),
    ("vmm/src/isolation.rs", "prctl options that no crate knows"),
    ("vmm/src/machine.rs", "takes over a descriptor as KVM's"),
    ("vmm/src/memory.rs", "madvise on guest memory"),
    ("vmm/src/msi.rs", "reads unions of KVM's"),
    ("vmm/src/pmem.rs", "makes a mapping a memory slot of KVM"),
    ("vmm/src/slots.rs", "makes mappings memory slots of KVM"),
    ("vmm/src/snapshot/userfault.rs", "ioctls of userfaultfd"),
    ("vmm/src/snapshot/vcpu_state.rs", "KVM reads as much of an XSAVE area as CPUID says"),
    ("vmm/src/vcpu.rs", "a signal handler writes to the page shared with KVM"),
    ("vmm/tests/core_scheduling.rs", "prctl options that no crate knows"),
    ("xtask/src/lab/machine.rs", "runs code between fork and exec"),
    ("xtask/src/lab/probe.rs", "makes a mapping a memory slot of KVM"),
    ("xtask/src/lab/tsc.rs", "reads the time stamp counter"),
    ("vmm/src/bin/vmrun-vmm/main.rs", "one option of the allocator's"),
    ("vmm/src/seccomp/tests.rs", "forks, and makes system calls that are forbidden"),
];

/// What lifts the workspace's ban.
const ALLOW: &str = "allow(unsafe_code";
/// What nothing can lift.
const FORBID: &str = "#![forbid(unsafe_code)]";

#[test]
fn unsafe_code_is_where_it_is_said_to_be() {
    let listed: BTreeSet<String> = ALLOWED.iter().map(|(file, _)| (*file).to_owned()).collect();
    assert_eq!(listed.len(), ALLOWED.len());
    let has = |file: &&String| *file != "xtask/src/unsafety.rs" && read(file).contains(ALLOW);
    let found: BTreeSet<String> = files(".rs").iter().filter(has).cloned().collect();
    assert_eq!(found, listed, "found (left) and listed (right) differ");
    for (file, reason) in ALLOWED {
        let text = read(file);
        let said = format!("{ALLOW}, reason = \"{reason}\")");
        assert!(text.contains(&said), "{file} does not say {said}");
        // The word in code, not in a comment.
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let uses = ["unsafe {", "unsafe fn", "unsafe impl"];
        assert!(
            code.filter(|line| !line.contains(ALLOW))
                .any(|line| uses.iter().any(|word| line.contains(word))),
            "{file} has no unsafe code"
        );
    }
}

#[test]
fn crates_without_unsafe_code_forbid_it() {
    for manifest in files("Cargo.toml") {
        let folder = manifest.trim_end_matches("Cargo.toml");
        // The workspace itself, cargo-fuzz's, and that of a kernel that the tests boot.
        if folder.is_empty() || ["fuzz/", "tests/attacker/"].contains(&folder) {
            continue;
        }
        assert!(read(&manifest).contains("[lints]\nworkspace = true"), "{manifest}");
        let needs =
            ALLOWED.iter().any(|(file, _)| file.starts_with(folder) && !file.contains("/e2e/"));
        let tops = ["lib.rs", "main.rs"].map(|top| format!("{folder}src/{top}"));
        for top in tops.iter().filter(|top| root().join(top).is_file()) {
            assert_eq!(read(top).contains(FORBID), !needs, "{top}");
        }
    }
}
