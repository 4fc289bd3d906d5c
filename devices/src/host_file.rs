//! Files of the host behind devices: opened by their paths, or handed over by whoever starts a VMM
//! that can open nothing itself.
//!
//! A path of the form `/dev/fd/N` is a descriptor that was inherited, whether or not there is a
//! `/dev`. A path that is a Unix socket is connected to, and the peer hands over one descriptor
//! (unix(7), SCM_RIGHTS). Either must be open in the way that is wanted, and no wider: a disk that
//! is read-only for the guest is so by its descriptor.

#![allow(unsafe_code, reason = "takes over descriptors that were handed over")]

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, IoSliceMut, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, RecvMsg, UnixAddr, recvmsg};

/// How long the peer of a socket may take to hand a descriptor over.
const HANDOVER_LIMIT: Duration = Duration::from_secs(5);

/// How a file is to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading, and nothing else.
    Read,
    /// Reading and writing.
    ReadWrite,
    /// Adding at the end.
    Append,
}

/// Opens a regular file or block device, with its size in bytes; none where it is something else.
/// One that is read-only for the guest is opened so: the guest's word is not needed.
pub fn open(path: &Path, read_only: bool) -> io::Result<Option<(File, u64)>> {
    let access = if read_only { Access::Read } else { Access::ReadWrite };
    let mut file = open_with(path, access, OpenOptions::new().read(true).write(!read_only))?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Ok(None);
    }
    // A block device has no length among its metadata.
    let size = file.seek(SeekFrom::End(0))?;
    Ok(Some((file, size)))
}

/// The file of this path: a descriptor that was handed over and is open for this access, or what
/// the options open. Neither waits: a FIFO without a peer would block for ever.
pub fn open_with(path: &Path, access: Access, options: &OpenOptions) -> io::Result<File> {
    if let Some(descriptor) = handed_over(path)? {
        check(descriptor.as_fd(), access)?;
        return Ok(File::from(descriptor));
    }
    options.clone().custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)
}

/// What is known of the file of this path.
pub fn metadata(path: &Path) -> io::Result<Metadata> {
    match inherited(path)? {
        Some(descriptor) => File::from(descriptor).metadata(),
        None => path.metadata(),
    }
}

/// A copy of the descriptor that the path stands for, whatever it is open for.
pub fn handed_over(path: &Path) -> io::Result<Option<OwnedFd>> {
    if let Some(descriptor) = inherited(path)? {
        return Ok(Some(descriptor));
    }
    let socket = path.metadata().is_ok_and(|it| it.file_type().is_socket());
    socket.then(|| receive(path)).transpose()
}

/// A copy of the descriptor N, where the path is `/dev/fd/N`.
pub fn inherited(path: &Path) -> io::Result<Option<OwnedFd>> {
    number(path).map(duplicate).transpose()
}

fn number(path: &Path) -> Option<RawFd> {
    let number = path.to_str()?.strip_prefix("/dev/fd/")?;
    // As the kernel has it: digits alone.
    let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| number.parse().ok()).flatten()
}

fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the number is not used as a descriptor here but by the kernel, in one call, which
    // fails with EBADF where it is none.
    let original = unsafe { BorrowedFd::borrow_raw(number) };
    let copy = fcntl(original, FcntlArg::F_DUPFD_CLOEXEC(3))?;
    // SAFETY: the kernel has just made the copy, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

fn receive(path: &Path) -> io::Result<OwnedFd> {
    let socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(HANDOVER_LIMIT))?;
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let message: RecvMsg<'_, '_, UnixAddr> = recvmsg(
        std::os::fd::AsRawFd::as_raw_fd(&socket),
        &mut data,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let received: Vec<OwnedFd> = message
        .cmsgs()?
        .filter_map(|message| match message {
            ControlMessageOwned::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        // SAFETY: the kernel has just put these descriptors into this process; nobody else has them.
        .map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) })
        .collect();
    let none =
        || io::Error::new(io::ErrorKind::InvalidData, "the socket's peer sent no descriptor");
    received.into_iter().next().ok_or_else(none)
}

fn check(descriptor: BorrowedFd<'_>, access: Access) -> io::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(descriptor, FcntlArg::F_GETFL)?);
    let mode = flags & OFlag::O_ACCMODE;
    let fits = match access {
        Access::Read => mode == OFlag::O_RDONLY && !flags.contains(OFlag::O_PATH),
        Access::ReadWrite => mode == OFlag::O_RDWR,
        Access::Append => mode != OFlag::O_RDONLY && flags.contains(OFlag::O_APPEND),
    };
    let wanted = match access {
        Access::Read => "only for reading",
        Access::ReadWrite => "for reading and writing",
        Access::Append => "for appending",
    };
    let wrong = || io::Error::new(io::ErrorKind::PermissionDenied, format!("not open {wanted}"));
    fits.then_some(()).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixListener;

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    fn by_number(file: &File) -> std::path::PathBuf {
        format!("/dev/fd/{}", file.as_raw_fd()).into()
    }

    #[test]
    fn descriptors_are_used_as_they_are_open() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 512]).unwrap();
        let reader = File::open(file.path()).unwrap();
        let writer = File::options().read(true).write(true).open(file.path()).unwrap();
        let adder = File::options().append(true).open(file.path()).unwrap();
        let (mut opened, size) = open(&by_number(&reader), true).unwrap().unwrap();
        assert_eq!(size, 512);
        opened.rewind().unwrap();
        let mut byte = [0];
        opened.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [7]);
        assert_eq!(open(&by_number(&writer), false).unwrap().unwrap().1, 512);
        let options = OpenOptions::new();
        open_with(&by_number(&adder), Access::Append, &options).unwrap();
        // A disk that the guest may only read is not to be writable for us either.
        for (file, read_only) in [(&writer, true), (&adder, true), (&reader, false)] {
            let error = open(&by_number(file), read_only).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
        assert!(open_with(&by_number(&writer), Access::Append, &options).is_err());
        assert_eq!(metadata(&by_number(&reader)).unwrap().len(), 512);
    }

    #[test]
    fn what_is_no_descriptor_is_refused() {
        for path in ["/dev/fd/999999", "/dev/fd/", "/dev/fd/-1", "/dev/fd/1x", "/dev/fd/+1"] {
            assert!(!matches!(open(Path::new(path), true), Ok(Some(_))), "{path}");
        }
        let (read, _write) = nix::unistd::pipe().unwrap();
        let pipe = File::from(read);
        assert!(open(&by_number(&pipe), true).unwrap().is_none());
    }

    #[test]
    fn a_socket_hands_a_descriptor_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("give");
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::write(folder.path().join("file"), [1; 1024]).unwrap();
        let file = File::open(folder.path().join("file")).unwrap();
        let giver = std::thread::spawn(move || {
            let (peer, _) = listener.accept().unwrap();
            let descriptors = [file.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&descriptors)];
            let data = [IoSlice::new(b"!")];
            sendmsg::<()>(peer.as_raw_fd(), &data, &rights, MsgFlags::empty(), None).unwrap();
            // The second one sends none.
            let _ = listener.accept().unwrap();
        });
        assert_eq!(open(&path, true).unwrap().unwrap().1, 1024);
        assert_eq!(open(&path, true).unwrap_err().kind(), io::ErrorKind::InvalidData);
        giver.join().unwrap();
    }
}
