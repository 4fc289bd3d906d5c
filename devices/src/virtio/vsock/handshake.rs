//! How host programs and the device find each other's sockets.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect as connect_socket, recv, socket,
};

/// Longest first line: `CONNECT 4294967295\n`, with room to spare.
const MAX_LINE: usize = 32;

/// A host program that has connected and not yet said where to.
pub struct Handshake {
    socket: UnixStream,
}

/// How far it is.
pub enum Progress {
    /// The line is not complete.
    More,
    /// Connect to this port of the guest. The line was taken from the socket, nothing else.
    Connect(u32),
    /// The program went away, or said something else.
    Failed,
}

impl Handshake {
    /// Over this non-blocking socket.
    pub fn new(socket: UnixStream) -> Handshake {
        Handshake { socket }
    }

    /// The socket, to be watched.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The socket, with the bytes behind the line still in it.
    pub fn into_socket(self) -> UnixStream {
        self.socket
    }

    /// Looks at what has arrived; nothing more will where the program has `ended` its side.
    pub fn advance(&mut self, ended: bool) -> Progress {
        let mut line = [0; MAX_LINE];
        let descriptor = self.socket.as_raw_fd();
        // Only looked at: what follows the line are the stream's first bytes.
        let seen = match recv(descriptor, &mut line, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Progress::Failed,
            Ok(count) => &line[..count],
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Progress::More,
            Err(_) => return Progress::Failed,
        };
        let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
            return if ended || seen.len() == MAX_LINE { Progress::Failed } else { Progress::More };
        };
        let Some(port) = parse(&seen[..end]) else { return Progress::Failed };
        let length = end + 1;
        match recv(descriptor, &mut line[..length], MsgFlags::MSG_DONTWAIT) {
            Ok(count) if count == length => Progress::Connect(port),
            _ => Progress::Failed,
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?.trim_end_matches('\r');
    let (word, port) = text.split_once(' ')?;
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    (word.eq_ignore_ascii_case("connect") && digits).then(|| port.parse().ok())?
}

/// Connects to a host program's socket without ever waiting for it.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect_socket(socket.as_fd().as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn pair() -> (UnixStream, Handshake) {
        let (host, device) = UnixStream::pair().unwrap();
        device.set_nonblocking(true).unwrap();
        (host, Handshake::new(device))
    }

    #[test]
    fn what_follows_the_line_stays_in_the_socket() {
        let (mut host, mut handshake) = pair();
        host.write_all(b"CONN").unwrap();
        assert!(matches!(handshake.advance(false), Progress::More));
        host.write_all(b"ECT 1024\nfirst bytes").unwrap();
        assert!(matches!(handshake.advance(false), Progress::Connect(1024)));
        let mut rest = [0; 11];
        handshake.into_socket().read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"first bytes");
    }

    #[test]
    fn anything_but_the_one_line_is_refused() {
        for line in [
            "\n",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 4294967296\n",
            "CONNECT 1 2\n",
            "HELLO 1\n",
            "CONNECT 00000000000000000000000000000001\n",
            "\u{e9}\u{e9}\u{e9} 1\n",
        ] {
            let (mut host, mut handshake) = pair();
            host.write_all(line.as_bytes()).unwrap();
            assert!(matches!(handshake.advance(false), Progress::Failed), "{line:?}");
        }
        let (host, mut handshake) = pair();
        drop(host);
        assert!(matches!(handshake.advance(false), Progress::Failed));
        let (mut host, mut handshake) = pair();
        host.write_all(b"CONNE").unwrap();
        drop(host);
        assert!(matches!(handshake.advance(true), Progress::Failed));
    }
}
