//! A TAP interface of the host that carries virtio-net headers.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
};

use super::header::LENGTH;

nix::ioctl_write_ptr_bad!(tunsetiff, request(202), libc::ifreq);
nix::ioctl_write_ptr_bad!(tunsetvnethdrsz, request(216), libc::c_int);
nix::ioctl_write_int_bad!(tunsetoffload, request(208));
nix::ioctl_read_bad!(
    tungetiff,
    nix::request_code_read!(b'T', 210, size_of::<libc::c_uint>()),
    libc::ifreq
);

/// Requests of linux/if_tun.h that write an int.
const fn request(number: u8) -> libc::c_ulong {
    nix::request_code_write!(b'T', number, size_of::<libc::c_int>())
}

const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A TAP interface.
pub struct Tap {
    file: File,
}

impl Tap {
    /// Attaches to the interface of this name, made beforehand for this user, or makes it where
    /// that is allowed.
    pub fn open(name: &str) -> io::Result<Tap> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        let mut request = empty_request();
        let room = request.ifr_name.len() - 1;
        if name.is_empty() || name.len() > room {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an interface name"));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
        // SAFETY: the descriptor is open, and the call reads and writes one ifreq, which is ours.
        unsafe { tunsetiff(file.as_raw_fd(), &raw const request) }?;
        Tap::ready(file)
    }

    /// Uses a descriptor that somebody else attached.
    pub fn from_descriptor(descriptor: OwnedFd) -> io::Result<Tap> {
        let mut request = empty_request();
        // SAFETY: the descriptor is open, and the call writes one ifreq, which is ours.
        unsafe { tungetiff(descriptor.as_raw_fd(), &raw mut request) }?;
        // SAFETY: the call has filled in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags } as libc::c_int;
        if flags & FLAGS != FLAGS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor is not a TAP with IFF_NO_PI and IFF_VNET_HDR",
            ));
        }
        let file = File::from(descriptor);
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
        Tap::ready(file)
    }

    fn ready(file: File) -> io::Result<Tap> {
        let length = LENGTH as libc::c_int;
        // SAFETY: the descriptor is open, and the call reads one int.
        unsafe { tunsetvnethdrsz(file.as_raw_fd(), &raw const length) }?;
        let tap = Tap { file };
        tap.set_offloads(0)?;
        Ok(tap)
    }

    /// Lets the host hand over what a guest with these features takes: unsummed and large packets.
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let has = |feature: u32, flag: libc::c_uint| {
            if features & (1 << feature) != 0 { flag } else { 0 }
        };
        let offloads = has(VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM)
            | has(VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4)
            | has(VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6)
            | has(VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN);
        // SAFETY: the descriptor is open, and the argument is a number.
        unsafe { tunsetoffload(self.file.as_raw_fd(), offloads as libc::c_int) }?;
        Ok(())
    }
}

fn empty_request() -> libc::ifreq {
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    unsafe { std::mem::zeroed() }
}

impl io::Read for Tap {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.file.read(into)
    }
}

impl io::Write for Tap {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.file.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
