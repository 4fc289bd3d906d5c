//! Guest memory whose pages another process brings when they are touched: userfaultfd(2).
//!
//! That process listens on a Unix socket. It gets one message: a JSON list of the ranges, and with it
//! the descriptor that tells of faults. Firecracker's handlers understand the same.

#![allow(unsafe_code, reason = "ioctls of userfaultfd")]

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use devices::GuestMemory;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Serialize;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

const PAGE: u64 = 4096;
/// `UFFD_API` and what is asked for: to be told of memory that a balloon gives back.
const API: u64 = 0xaa;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const REGISTER_MODE_MISSING: u64 = 1;

/// `struct uffdio_api` (linux/userfaultfd.h).
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, Api);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, Register);

/// A piece of memory, as the message has it.
#[derive(Serialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    /// Deprecated, and in bytes, whatever it is called.
    page_size_kib: u64,
}

/// Hands the faults of this memory, of which no page is there, to the process that listens at
/// `socket`. The descriptor and the connection are kept by that process and by the kernel.
pub fn hand_over(memory: &GuestMemory, socket: &Path) -> io::Result<OwnedFd> {
    let faults = open()?;
    let mut api = Api { api: API, features: FEATURE_EVENT_REMOVE, ioctls: 0 };
    // SAFETY: the descriptor is open, and the call reads and writes one structure, which is ours.
    unsafe { uffdio_api(faults.as_raw_fd(), &raw mut api) }?;
    let (mut mappings, mut offset) = (Vec::new(), 0);
    for region in memory.iter() {
        let start = region.as_ptr() as u64;
        let length = region.len();
        let mut range = Register { start, length, mode: REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: as above. The range is a mapping of guest memory, which only vm-memory's volatile
        // accessors and the guest touch: that a page comes late changes nothing for them.
        unsafe { uffdio_register(faults.as_raw_fd(), &raw mut range) }?;
        mappings.push(Mapping {
            base_host_virt_addr: start,
            size: length,
            offset,
            page_size: PAGE,
            page_size_kib: PAGE,
        });
        offset += length;
    }
    let message = serde_json::to_vec(&mappings)?;
    let stream = UnixStream::connect(socket)?;
    let descriptors = [faults.as_raw_fd()];
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&message)],
        &[ControlMessage::ScmRights(&descriptors)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(faults)
}

/// Faults of the kernel count too: KVM touches guest memory on the guest's behalf.
fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes one integer and touches no memory of ours.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let descriptor = i32::try_from(descriptor).unwrap_or(-1);
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
