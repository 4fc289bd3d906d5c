//! TAP interfaces whose life is their descriptor's.

#![allow(unsafe_code, reason = "ioctls of TAP interfaces")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

nix::ioctl_write_ptr_bad!(
    tunsetiff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// Creates the TAP interface `name`, which must not exist yet, and returns its one descriptor.
///
/// The interface is not persistent: the kernel removes it with its last descriptor, however the
/// process that holds it ends. It carries virtio-net headers (`IFF_VNET_HDR`). The descriptor is
/// close-on-exec and non-blocking.
///
/// Fails with `EBUSY` where the name is taken, with `EPERM` without `CAP_NET_ADMIN`.
pub fn create(name: &str) -> io::Result<OwnedFd> {
    let tun: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero: names are terminated.
    let room = request.ifr_name.len() - 1;
    if name.is_empty() || name.len() > room {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    // These flags fit 16 bits; IFF_TUN_EXCL is the top one.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open, and the request outlives the call, which reads and writes
    // no more than an ifreq.
    unsafe { tunsetiff(tun.as_raw_fd(), &raw const request) }?;
    Ok(tun.into())
}
