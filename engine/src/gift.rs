//! Handing a file to a VMM that runs: it connects to a socket in the folder that it sees, and is
//! sent a descriptor.

#![allow(unsafe_code, reason = "takes over a descriptor in a test")]

use std::fs::{File, Permissions};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// A file that is offered. Nobody gets it any more once this is dropped.
pub struct Gift {
    path: PathBuf,
    over: Arc<AtomicBool>,
    giver: Option<JoinHandle<()>>,
}

impl Gift {
    /// Offers a file at a path where nothing is; what another offer that was killed has left there
    /// is removed.
    pub fn offer(path: &Path, file: File) -> io::Result<Gift> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        // The VMM is another user, in a folder where nobody else comes.
        std::fs::set_permissions(path, Permissions::from_mode(0o666))?;
        let over = Arc::new(AtomicBool::new(false));
        let ends = over.clone();
        let giver = thread::Builder::new().stack_size(64 << 10).spawn(move || {
            for peer in listener.incoming().flatten() {
                if ends.load(Ordering::Acquire) {
                    return;
                }
                let _ = send(&peer, &file);
            }
        })?;
        Ok(Gift { path: path.to_owned(), over, giver: Some(giver) })
    }

    /// What to call the file to whom it is for.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn send(peer: &UnixStream, file: &File) -> io::Result<()> {
    let descriptors: [RawFd; 1] = [file.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(peer.as_raw_fd(), &[IoSlice::new(b"!")], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

impl Drop for Gift {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        // The thread waits for a peer: this is the last one.
        let woken = UnixStream::connect(&self.path).is_ok();
        let _ = std::fs::remove_file(&self.path);
        if let Some(giver) = self.giver.take().filter(|_| woken) {
            let _ = giver.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSliceMut, Read};
    use std::os::fd::{FromRawFd, OwnedFd};

    use nix::sys::socket::{ControlMessageOwned, UnixAddr, recvmsg};

    use super::*;

    fn take(path: &Path) -> Option<File> {
        let socket = UnixStream::connect(path).ok()?;
        let mut byte = [0];
        let mut data = [IoSliceMut::new(&mut byte)];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let flags = MsgFlags::empty();
        let message =
            recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut data, Some(&mut space), flags).ok()?;
        let descriptors = message.cmsgs().ok()?.find_map(|message| match message {
            ControlMessageOwned::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })?;
        // SAFETY: the kernel has just put the descriptor into this process.
        Some(File::from(unsafe { OwnedFd::from_raw_fd(descriptors[0]) }))
    }

    #[test]
    fn a_file_is_had_as_long_as_it_is_offered() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "text").unwrap();
        let path = folder.path().join("give");
        for _ in 0..2 {
            let file = File::open(folder.path().join("file")).unwrap();
            let gift = Gift::offer(&path, file).unwrap();
            let mut text = String::new();
            take(gift.path()).unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, "text");
            drop(gift);
            assert!(take(&path).is_none());
        }
    }
}
