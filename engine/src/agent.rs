//! The host's end of the agent protocol. The guest is not trusted: what it says is bounded by the
//! protocol's frames, what it does not say is waited for with the VMM's end in view.

use std::fs::Permissions;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_protocol::{
    AGENT_PORT, FrameError, Hello, HelloReply, Message, Purpose, READY_PORT, Request, Stream,
    VERSION, read_frame, write_frame,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long an agent that is up may take to answer a hello.
const HELLO_LIMIT: Duration = Duration::from_secs(30);
/// How long processes may take to stand still, and their files to be written.
const HOLD_LIMIT: Duration = Duration::from_secs(120);
/// How long a request may wait for a guest that does not read.
const SEND_LIMIT: Duration = Duration::from_secs(10);

/// Why the agent cannot be talked to.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A socket cannot be made.
    #[error(
        "cannot make a socket at {path}: {error}; name a --root with a shorter path, on a file system of this host"
    )]
    Listen {
        /// Its path.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// A socket cannot be reached.
    #[error("{path}: {error}")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// The VMM ended first.
    #[error("the machine ended before its agent answered")]
    MachineEnded,
    /// Nothing came for too long.
    #[error("the guest's agent does not answer")]
    Silent,
    /// It speaks another version.
    #[error("the guest's agent speaks version {0} of the protocol, not {VERSION}")]
    Version(u32),
    /// It refused a connection.
    #[error("the guest's agent refused: {0}")]
    Refused(String),
    /// What it says is not the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The connection broke.
    #[error("connection to the guest's agent: {0}")]
    Io(#[from] io::Error),
}

/// Waits for the guest to come up. Made before the VMM is, so that no notice is missed.
pub struct Ready {
    listener: UnixListener,
    path: PathBuf,
}

impl Ready {
    /// Listens where the VMM with its vsock at `vsock` hands over the guest's notice.
    pub fn listen(vsock: &Path) -> Result<Ready, AgentError> {
        let mut path = vsock.as_os_str().to_owned();
        path.push(format!("_{READY_PORT}"));
        let path = PathBuf::from(path);
        let listener = listen(&path)?;
        // The VMM is another user than this process is, in a folder where nobody else comes.
        std::fs::set_permissions(&path, Permissions::from_mode(0o666))
            .map_err(|error| AgentError::Listen { path: path.clone(), error })?;
        Ok(Ready { listener, path })
    }

    /// Waits until the agent listens, `limit` has passed, or `machine` (a pidfd) is readable. The
    /// agent's notice is to be kept as long as the machine runs: one that is restored from a
    /// snapshot of it knows by its loss that it was.
    pub fn wait(self, machine: BorrowedFd<'_>, limit: Duration) -> Result<UnixStream, AgentError> {
        wait_readable(self.listener.as_fd(), machine, limit)?;
        Ok(self.listener.accept()?.0)
    }
}

/// A socket for the VMM.
pub fn listen(path: &Path) -> Result<UnixListener, AgentError> {
    UnixListener::bind(path).map_err(|error| AgentError::Listen { path: path.to_owned(), error })
}

impl Drop for Ready {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Waits for `wanted`, with the machine's end as an error.
fn wait_readable(
    wanted: BorrowedFd<'_>,
    machine: BorrowedFd<'_>,
    limit: Duration,
) -> Result<(), AgentError> {
    let since = Instant::now();
    loop {
        let left = limit.saturating_sub(since.elapsed());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut descriptors =
            [PollFd::new(wanted, PollFlags::POLLIN), PollFd::new(machine, PollFlags::POLLIN)];
        match poll(&mut descriptors, timeout) {
            Err(nix::Error::EINTR) => continue,
            Err(error) => return Err(io::Error::from(error).into()),
            Ok(0) => return Err(AgentError::Silent),
            Ok(_) => {}
        }
        if descriptors[0].any().unwrap_or(false) {
            return Ok(());
        }
        if descriptors[1].any().unwrap_or(false) {
            return Err(AgentError::MachineEnded);
        }
    }
}

/// Opens a connection for this purpose, past the VMM's and the agent's greetings.
fn open(
    vsock: &Path,
    purpose: Purpose,
    machine: BorrowedFd<'_>,
    limit: Duration,
) -> Result<UnixStream, AgentError> {
    let failed = |error| AgentError::Socket { path: vsock.to_owned(), error };
    let mut stream = UnixStream::connect(vsock).map_err(failed)?;
    stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes())?;
    write_frame(&mut stream, &Hello { version: VERSION, purpose })?;
    let greeting = Greeting { stream: &stream, machine, since: Instant::now(), limit };
    match greeting.read()? {
        HelloReply::Accepted => Ok(stream),
        HelloReply::WrongVersion(version) => Err(AgentError::Version(version)),
        HelloReply::Refused(reason) => Err(AgentError::Refused(printable(&reason))),
    }
}

/// What a new connection says first, as a whole within a limit: a guest that sends a byte now and
/// then wins no more time.
struct Greeting<'a> {
    stream: &'a UnixStream,
    machine: BorrowedFd<'a>,
    since: Instant,
    limit: Duration,
}

impl Greeting<'_> {
    fn read(mut self) -> Result<HelloReply, AgentError> {
        let mut line = Vec::new();
        // A byte at a time: what follows the line must stay in the socket.
        while line.last() != Some(&b'\n') && line.len() < 32 {
            let mut byte = [0];
            if Read::read(&mut self, &mut byte)? == 0 {
                break;
            }
            line.extend(byte);
        }
        if !line.starts_with(b"OK ") {
            return Err(AgentError::Refused("it does not listen".to_owned()));
        }
        read_frame(&mut self)?.ok_or(AgentError::MachineEnded)
    }
}

impl Read for Greeting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.limit.saturating_sub(self.since.elapsed());
        wait_readable(self.stream.as_fd(), self.machine, left).map_err(|error| match error {
            AgentError::Io(error) => error,
            AgentError::MachineEnded => io::ErrorKind::ConnectionAborted.into(),
            other => io::Error::new(io::ErrorKind::TimedOut, other.to_string()),
        })?;
        self.stream.read(buffer)
    }
}

/// One of a process's streams, raw.
pub fn attach(
    vsock: &Path,
    process: u32,
    stream: Stream,
    machine: BorrowedFd<'_>,
) -> Result<UnixStream, AgentError> {
    open(vsock, Purpose::Stream { process, stream }, machine, HELLO_LIMIT)
}

/// Has the machine's processes stand still for a snapshot, until the connection is dropped.
pub fn hold_still(vsock: &Path, machine: BorrowedFd<'_>) -> Result<UnixStream, AgentError> {
    open(vsock, Purpose::Snapshot, machine, HOLD_LIMIT)
}

/// The control connection.
pub struct Control {
    stream: UnixStream,
}

impl Control {
    /// Opens it.
    pub fn open(vsock: &Path, machine: BorrowedFd<'_>) -> Result<Control, AgentError> {
        let stream = open(vsock, Purpose::Control, machine, HELLO_LIMIT)?;
        stream.set_write_timeout(Some(SEND_LIMIT))?;
        Ok(Control { stream })
    }

    /// Over a stream that others have greeted.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn over(stream: UnixStream) -> Control {
        Control { stream }
    }

    /// Sends a request. A guest that does not read for long is an error, after which no further
    /// request can be understood.
    pub fn send(&mut self, request: &Request) -> Result<(), AgentError> {
        Ok(write_frame(&mut self.stream, request)?)
    }

    /// A second handle, for another thread's requests.
    pub fn try_clone(&self) -> Result<Control, AgentError> {
        Ok(Control { stream: self.stream.try_clone()? })
    }

    /// The next message; the machine's end is an error.
    pub fn receive(&mut self) -> Result<Message, AgentError> {
        read_frame(&mut self.stream)?.ok_or(AgentError::MachineEnded)
    }

    /// Hangs up: the guest may switch itself off.
    pub fn close(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// A guest's text as a user may see it on a terminal: one line, no control characters, no more
/// than a line holds.
pub fn printable(text: &str) -> String {
    text.chars().take(1000).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::thread;

    use agent_protocol::MAX_FRAME;

    use super::*;

    /// A pipe's end that never becomes readable stands for a machine that lives.
    fn machine() -> (OwnedFd, OwnedFd) {
        nix::unistd::pipe().unwrap()
    }

    fn with_agent<T>(
        serve: impl FnOnce(UnixStream) + Send + 'static,
        client: impl FnOnce(&Path, BorrowedFd<'_>) -> T,
    ) -> T {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = [0; 13];
            stream.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"CONNECT 1024\n");
            serve(stream);
        });
        let (machine, _held) = machine();
        let result = client(&path, machine.as_fd());
        server.join().unwrap();
        result
    }

    #[test]
    fn a_connection_is_greeted_and_carries_messages() {
        let serve = |mut stream: UnixStream| {
            let hello: Hello = read_frame(&mut stream).unwrap().unwrap();
            assert_eq!(hello.purpose, Purpose::Control);
            stream.write_all(b"OK 1073741824\n").unwrap();
            write_frame(&mut stream, &HelloReply::Accepted).unwrap();
            let request: Request = read_frame(&mut stream).unwrap().unwrap();
            assert_eq!(request, Request::PowerOff);
            write_frame(&mut stream, &Message::Started { process: 3 }).unwrap();
        };
        with_agent(serve, |path, machine| {
            let mut control = Control::open(path, machine).unwrap();
            control.send(&Request::PowerOff).unwrap();
            assert_eq!(control.receive().unwrap(), Message::Started { process: 3 });
            assert!(matches!(control.receive(), Err(AgentError::MachineEnded)));
        });
    }

    /// docs/hostile.md 15: an agent that says anything.
    #[test]
    fn hostile_15_whatever_the_agent_says_is_an_error_not_a_hang() {
        let replies: Vec<Vec<u8>> = vec![
            vec![],
            b"OK".to_vec(),
            b"NO 1\n".to_vec(),
            vec![b'x'; 1 << 16],
            b"OK 1\n".to_vec(),
            [b"OK 1\n".as_slice(), &u32::MAX.to_le_bytes()].concat(),
            [b"OK 1\n".as_slice(), &(MAX_FRAME - 1).to_le_bytes(), &[0; 100]].concat(),
            [b"OK 1\n".as_slice(), &1u32.to_le_bytes(), &[0xff]].concat(),
            [b"OK 1\n".as_slice(), &2u32.to_le_bytes(), &[1, 9]].concat(),
        ];
        for reply in replies {
            let name = format!("{:?}", &reply[..reply.len().min(20)]);
            let serve = move |mut stream: UnixStream| {
                let _ = stream.write_all(&reply);
            };
            let result = with_agent(serve, |path, machine| Control::open(path, machine).err());
            assert!(result.is_some(), "{name}");
        }
    }

    /// docs/hostile.md 15: an agent that never finishes what it begins to say.
    #[test]
    fn hostile_15_a_greeting_byte_by_byte_does_not_win_time() {
        let (stream, mut agent) = UnixStream::pair().unwrap();
        let (machine, _held) = machine();
        // Ends when the other end is closed, which is what the test is about.
        let drip = thread::spawn(move || while agent.write_all(b"O").is_ok() {});
        let limit = Duration::ZERO;
        let since = Instant::now();
        let greeting = Greeting { stream: &stream, machine: machine.as_fd(), since, limit };
        assert!(greeting.read().is_err());
        drop(stream);
        drip.join().unwrap();

        let (stream, mut agent) = UnixStream::pair().unwrap();
        agent.write_all(b"OK 1").unwrap();
        let limit = Duration::from_millis(50);
        let greeting = Greeting { stream: &stream, machine: machine.as_fd(), since, limit };
        let error = greeting.read().unwrap_err();
        assert!(matches!(&error, AgentError::Io(error) if error.kind() == io::ErrorKind::TimedOut));
    }

    #[test]
    fn a_machine_that_ends_is_noticed_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let ready = Ready::listen(&folder.path().join("v")).unwrap();
        let (machine, held) = machine();
        drop(held);
        let error = ready.wait(machine.as_fd(), Duration::from_secs(600)).unwrap_err();
        assert!(matches!(error, AgentError::MachineEnded), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_guests_words_cannot_drive_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a?[2Jb?c");
        assert_eq!(printable(&"x".repeat(5000)).len(), 1000);
    }
}
