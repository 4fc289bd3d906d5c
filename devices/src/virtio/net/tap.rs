//! A TAP interface of the host that carries virtio-net headers.

#![allow(unsafe_code, reason = "ioctls of TAP interfaces")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
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

/// What carries frames, each with a virtio-net header before it, one for each read or write of its
/// non-blocking descriptor.
pub trait Backend: AsFd + Send {
    /// Lets frames come that a driver with these features takes: unsummed and large packets.
    fn set_offloads(&self, features: u64) -> io::Result<()>;
}

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
}

/// `TUN_F_*` for a driver with these features. A large packet needs a checksum to be filled in:
/// without that feature the others mean nothing (virtio 1.2, 5.1.3.1), and TUNSETOFFLOAD would
/// refuse them.
fn offloads(features: u64) -> libc::c_uint {
    let has = |feature: u32| features & (1 << feature) != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = libc::TUN_F_CSUM;
    for (feature, flag) in
        [(VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4), (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6)]
    {
        if has(feature) {
            flags |= flag;
        }
    }
    if flags != libc::TUN_F_CSUM && has(VIRTIO_NET_F_GUEST_ECN) {
        flags |= libc::TUN_F_TSO_ECN;
    }
    flags
}

impl Backend for Tap {
    fn set_offloads(&self, features: u64) -> io::Result<()> {
        // SAFETY: the descriptor is open, and the argument is a number.
        unsafe { tunsetoffload(self.file.as_raw_fd(), offloads(features) as libc::c_int) }?;
        Ok(())
    }
}

fn empty_request() -> libc::ifreq {
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    unsafe { std::mem::zeroed() }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::FromRawFd;
    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::virtio::net::{Net, NetOptions};
    use crate::virtio::test_driver::{BUFFERS, Driver, readable, writable};

    /// docs/hostile.md 11: features that need another one, without it.
    #[test]
    fn hostile_11_offloads_that_make_no_sense_are_not_asked_for() {
        let large = (1 << VIRTIO_NET_F_GUEST_TSO4) | (1 << VIRTIO_NET_F_GUEST_TSO6);
        let (sums, marks) = (1 << VIRTIO_NET_F_GUEST_CSUM, 1 << VIRTIO_NET_F_GUEST_ECN);
        assert_eq!(offloads(large | marks), 0);
        assert_eq!(offloads(sums | marks), libc::TUN_F_CSUM);
        let all = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        assert_eq!(offloads(u64::MAX), all);
    }

    /// Runs this in a network namespace of its own, or says why not.
    fn in_own_network(test: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(|| {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
                println!("skipped: no network namespace of our own: {error}");
            } else if let Err(error) = std::fs::metadata("/dev/net/tun") {
                println!("skipped: /dev/net/tun: {error}");
            } else if !ip("link set lo up") {
                println!("skipped: no ip command (Debian: iproute2)");
            } else {
                test();
            }
        });
        thread.join().unwrap();
    }

    fn ip(words: &str) -> bool {
        Command::new("ip").args(words.split(' ')).status().is_ok_and(|status| status.success())
    }

    /// A socket that gets and sends the frames of all interfaces.
    fn sniffer() -> File {
        let all = u16::to_be(libc::ETH_P_ALL as u16);
        // SAFETY: no pointer is passed.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, all.into()) };
        assert!(socket >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the descriptor was just made, and is ours.
        let file = unsafe { File::from_raw_fd(socket) };
        let wait = nix::sys::time::TimeVal::new(10, 0);
        nix::sys::socket::setsockopt(&file, nix::sys::socket::sockopt::ReceiveTimeout, &wait)
            .unwrap();
        file
    }

    /// An Ethernet frame of a protocol that nobody speaks, to everyone.
    fn frame(source: [u8; 6], mark: u8) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend_from_slice(&source);
        frame.extend_from_slice(&[0x88, 0xb5]);
        frame.resize(200, mark);
        frame
    }

    /// Waits for the frame with this mark, past whatever the host's kernel has to say.
    fn wait_for(sniffer: &mut File, mark: u8) -> Vec<u8> {
        let mut bytes = [0; 2000];
        loop {
            let count = sniffer.read(&mut bytes).unwrap();
            if bytes[12..14] == [0x88, 0xb5] && bytes[14] == mark {
                return bytes[..count].to_vec();
            }
        }
    }

    #[test]
    fn frames_pass_a_real_tap_both_ways_until_it_is_removed() {
        in_own_network(|| {
            let mac = [2, 0x76, 1, 2, 3, 4];
            let opened = Tap::open("vmtest0").unwrap();
            let tap = Tap::from_descriptor(OwnedFd::from(opened.file)).unwrap();
            assert!(ip("link set vmtest0 up"));
            let mut sniffer = sniffer();
            let options = NetOptions { id: "eth0".into(), mac: Some(mac), ..NetOptions::default() };
            let net = Net::new(options, tap).unwrap();
            let features = crate::virtio::VirtioDevice::features(&net);
            let mut driver = Driver::new(net);
            driver.activate(features, 128);

            let mut sent = vec![0; LENGTH];
            sent.extend(frame(mac, 0x11));
            driver.write(BUFFERS, &sent);
            driver.send(1, &[readable(BUFFERS, sent.len() as u32)]);
            assert_eq!(wait_for(&mut sniffer, 0x11), frame(mac, 0x11));

            // The host's kernel has frames of its own for the interface (it looks for routers).
            for slot in 0..64 {
                driver.send(0, &[writable(BUFFERS + slot * 2048, 2048)]);
            }
            send_through(&sniffer, "vmtest0", &frame([2, 0, 0, 0, 0, 1], 0x22));
            let mut next = 0;
            'found: loop {
                driver.run();
                for (_, length) in driver.used(0) {
                    let got = driver.read(BUFFERS + next * 2048, length as usize);
                    next += 1;
                    if got[LENGTH + 12..LENGTH + 14] == [0x88, 0xb5] {
                        assert_eq!(got[LENGTH..], frame([2, 0, 0, 0, 0, 1], 0x22));
                        assert_eq!(got[10..LENGTH], [1, 0]);
                        break 'found;
                    }
                }
            }

            assert!(ip("link del vmtest0"));
            driver.run();
            driver.send(1, &[readable(BUFFERS, sent.len() as u32)]);
            driver.run();
            assert!(!driver.is_broken());
            assert_eq!(driver.used(1).len(), 2);
        });
    }

    fn send_through(mut sniffer: &File, interface: &str, frame: &[u8]) {
        let name = std::ffi::CString::new(interface).unwrap();
        // SAFETY: the name ends with a zero byte.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        // SAFETY: sockaddr_ll is plain data for which all zeroes is a valid value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = u16::to_be(libc::ETH_P_ALL as u16);
        address.sll_ifindex = index as i32;
        // SAFETY: the address is a local that is as long as stated.
        let bound = unsafe {
            libc::bind(
                sniffer.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        sniffer.write_all(frame).unwrap();
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let null = File::open("/dev/null").unwrap();
        assert!(Tap::from_descriptor(null.into()).is_err());
        in_own_network(|| {
            assert!(Tap::open("").is_err());
            assert!(Tap::open("a-name-that-is-too-long").is_err());
            // A TUN, and a TAP without a header.
            for flags in [libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR, libc::IFF_TAP] {
                let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
                let mut request = empty_request();
                request.ifr_ifru.ifru_flags = flags as libc::c_short;
                // SAFETY: as in `open`.
                unsafe { tunsetiff(file.as_raw_fd(), &raw const request) }.unwrap();
                assert!(Tap::from_descriptor(file.into()).is_err(), "{flags:#x}");
            }
        });
    }
}
