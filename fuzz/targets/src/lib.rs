//! What is fuzzed: one function for each target, that takes any bytes and panics where a promise is
//! broken.
//!
//! The programs of cargo-fuzz (`fuzz/fuzz_targets`) call these, and so do the tests of this crate,
//! that need no nightly compiler: they try each seed and some mutations of it.

#![forbid(unsafe_code)]
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a target says that it found something"
)]

mod agent;
mod api;
mod boot;
mod documents;
mod driver;
mod images;
mod kernel;
mod legacy;
mod mmds;
mod pci;
mod snapshot;
mod virtio;
mod vsock;

use std::fs::File;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};

pub use self::images::image_tar;
pub use agent::{agent_conversation, agent_frames};
pub use api::{api_request, config_file};
pub use boot::elf_kernel;
pub use documents::{image_documents, image_references};
pub use kernel::kernel_import;
pub use legacy::legacy_ports;
pub use mmds::mmds;
pub use pci::pci_bus;
pub use snapshot::snapshot_state;
pub use virtio::{tap_frames, virtio_queues};
pub use vsock::vsock_packets;

/// A target: its name, which is that of its program and of its folder of seeds, and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 16] = [
    ("agent_conversation", agent_conversation),
    ("agent_frames", agent_frames),
    ("api_request", api_request),
    ("config_file", config_file),
    ("elf_kernel", elf_kernel),
    ("image_documents", image_documents),
    ("image_references", image_references),
    ("image_tar", image_tar),
    ("kernel_import", kernel_import),
    ("legacy_ports", legacy_ports),
    ("mmds", mmds),
    ("pci_bus", pci_bus),
    ("snapshot_state", snapshot_state),
    ("tap_frames", tap_frames),
    ("virtio_queues", virtio_queues),
    ("vsock_packets", vsock_packets),
];

/// An empty file in memory.
fn memory_file() -> File {
    memfd_create(c"fuzz", MemfdFlags::CLOEXEC).unwrap().into()
}

/// A name under which an open file can be opened once more.
fn path_of(file: &File) -> PathBuf {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}
