//! The talk with an agent about one process, from its start to its exit status.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::thread::JoinHandle;

use agent_protocol::{Identity, Message, Request, Start, Stream, WindowSize};

use crate::agent::{self, Control, printable};
use crate::run::RunError;
use crate::stdio::Forwarding;

/// The host's name for the main process.
const MAIN: u32 = 0;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its status as a shell tells it.
    pub status: u8,
    /// Whether the guest's kernel killed it for want of memory.
    pub out_of_memory: bool,
}

/// A process about to be run in a machine that is up.
pub struct Conversation<'a> {
    /// The machine's vsock.
    pub vsock: &'a Path,
    /// Its pidfd: readable at its end.
    pub machine: BorrowedFd<'a>,
    /// Where bytes and signals come from and go to.
    pub forwarding: &'a Forwarding,
    /// Those who carry the process's output, to be waited for also where this fails.
    pub outputs: &'a mut Vec<JoinHandle<()>>,
    /// Called once the process runs.
    pub on_start: &'a dyn Fn(),
}

impl Conversation<'_> {
    /// Has the process started, and waits until it has ended and all its output was read.
    ///
    /// The agent is not believed more than it must be: it may say that its process has ended, for
    /// that is its machine's business, and nothing after that counts.
    pub fn run(mut self, control: &mut Control, start: Start) -> Result<Exit, RunError> {
        let (main, terminal) = (start.process.id, start.process.terminal);
        self.attach(&start.process.streams)?;
        self.forwarding.asked();
        control.send(&Request::Start(Box::new(start)))?;
        self.follow(control, main, terminal)
    }

    /// Gives the machine, restored with a process in it, its identity, and goes on as after a start.
    pub fn go_on(
        mut self,
        control: &mut Control,
        identity: Identity,
        terminal: Option<WindowSize>,
    ) -> Result<Exit, RunError> {
        self.attach(&identity.streams)?;
        self.forwarding.asked();
        control.send(&Request::Identity(Box::new(identity)))?;
        self.follow(control, MAIN, terminal)
    }

    fn attach(&mut self, streams: &[Stream]) -> Result<(), RunError> {
        for stream in streams {
            let connection = agent::attach(self.vsock, MAIN, *stream, self.machine)?;
            let number = match stream {
                Stream::Stdin => {
                    self.forwarding.input(connection).map_err(RunError::Stdio)?;
                    continue;
                }
                Stream::Stdout => 1,
                Stream::Stderr => 2,
            };
            let output = self.forwarding.output(connection, number);
            self.outputs.push(output.map_err(RunError::Stdio)?);
        }
        Ok(())
    }

    fn follow(
        self,
        control: &mut Control,
        main: u32,
        terminal: Option<WindowSize>,
    ) -> Result<Exit, RunError> {
        let mut started = false;
        loop {
            match control.receive()? {
                Message::Started { process } | Message::Identified { process: Some(process) }
                    if process == main && !started =>
                {
                    started = true;
                    (self.on_start)();
                    self.forwarding.started(control.try_clone()?, process, terminal);
                }
                Message::StartFailed { kind, message } if !started => {
                    return Err(RunError::Start { kind, message: printable(&message) });
                }
                Message::Exited { process, status, out_of_memory } if process == main => {
                    self.forwarding.over();
                    for output in self.outputs.drain(..) {
                        let _ = output.join();
                    }
                    return Ok(Exit { status, out_of_memory });
                }
                other => return Err(RunError::Senseless(printable(&format!("{other:?}")))),
            }
        }
    }
}

/// Gives a restored machine without a process its identity.
pub fn identify(control: &mut Control, identity: Identity) -> Result<(), RunError> {
    control.send(&Request::Identity(Box::new(identity)))?;
    match control.receive()? {
        Message::Identified { process: None } => Ok(()),
        Message::StartFailed { kind, message } => {
            Err(RunError::Start { kind, message: printable(&message) })
        }
        other => Err(RunError::Senseless(printable(&format!("{other:?}")))),
    }
}

/// A process to talk about.
#[cfg(any(test, feature = "fuzzing"))]
pub fn sample(streams: Vec<agent_protocol::Stream>) -> Start {
    use agent_protocol::{Process, Root, Writable};
    Start {
        root: Root { device: "/dev/vda".to_owned(), writable: Writable::No },
        mounts: Vec::new(),
        hostname: "h".to_owned(),
        network: None,
        time_ns: 0,
        entropy: Vec::new(),
        machine_id: String::new(),
        process: Process {
            id: 0,
            argv: vec!["x".to_owned()],
            env: Vec::new(),
            cwd: "/".to_owned(),
            user: String::new(),
            groups: Vec::new(),
            terminal: None,
            streams,
            rlimits: Vec::new(),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::{Read, Write};
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread;

    use agent_protocol::{
        Hello, HelloReply, Purpose, StartFailure, Stream, read_frame, write_frame,
    };

    use super::*;
    use crate::agent::AgentError;

    fn greet(listener: &UnixListener) -> (UnixStream, Purpose) {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 13]).unwrap();
        let hello: Hello = read_frame(&mut stream).unwrap().unwrap();
        stream.write_all(b"OK 1\n").unwrap();
        write_frame(&mut stream, &HelloReply::Accepted).unwrap();
        (stream, hello.purpose)
    }

    /// Runs against an agent that takes these streams and then does as `agent` says with the
    /// control connection; also whether the process was taken for started.
    fn against(
        streams: Vec<Stream>,
        agent: impl FnOnce(UnixStream, Vec<UnixStream>) + Send + 'static,
    ) -> (Result<Exit, RunError>, bool) {
        let folder = tempfile::tempdir().unwrap();
        let vsock = folder.path().join("v");
        let listener = UnixListener::bind(&vsock).unwrap();
        let count = streams.len();
        let agent = thread::spawn(move || {
            let (mut control, purpose) = greet(&listener);
            assert_eq!(purpose, Purpose::Control);
            let attached = (0..count).map(|_| greet(&listener).0).collect();
            let request: Request = read_frame(&mut control).unwrap().unwrap();
            assert!(matches!(request, Request::Start(_)));
            agent(control, attached);
        });
        let (machine, _held): (OwnedFd, OwnedFd) = nix::unistd::pipe().unwrap();
        let mut control = Control::open(&vsock, machine.as_fd()).unwrap();
        let forwarding = Forwarding::idle(machine.try_clone().unwrap());
        let (mut outputs, started) = (Vec::new(), Cell::new(false));
        let conversation = Conversation {
            vsock: &vsock,
            machine: machine.as_fd(),
            forwarding: &forwarding,
            outputs: &mut outputs,
            on_start: &|| started.set(true),
        };
        let result = conversation.run(&mut control, sample(streams));
        control.close();
        for output in outputs {
            output.join().unwrap();
        }
        agent.join().unwrap();
        (result, started.get())
    }

    fn says(messages: Vec<Message>) -> (Result<Exit, RunError>, bool) {
        against(Vec::new(), move |mut control, _| {
            for message in &messages {
                if write_frame(&mut control, message).is_err() {
                    return;
                }
            }
        })
    }

    const STARTED: Message = Message::Started { process: 0 };
    const EXITED: Message = Message::Exited { process: 0, status: 7, out_of_memory: false };

    #[test]
    fn a_process_starts_and_ends() {
        let (result, started) = says(vec![STARTED, EXITED]);
        assert_eq!(result.unwrap(), Exit { status: 7, out_of_memory: false });
        assert!(started);
        let message = "x\x1b[2J: not found\n".to_owned();
        let failure = Message::StartFailed { kind: StartFailure::NotFound, message };
        let (result, started) = says(vec![failure]);
        let error = result.unwrap_err();
        assert_eq!((error.exit_code(), error.to_string().as_str()), (127, "x?[2J: not found?"));
        assert!(!started);
    }

    #[test]
    fn an_exit_waits_for_the_output() {
        let (result, _) = against(vec![Stream::Stdout, Stream::Stderr], |mut control, streams| {
            write_frame(&mut control, &STARTED).unwrap();
            write_frame(&mut control, &EXITED).unwrap();
            drop(streams);
        });
        assert_eq!(result.unwrap().status, 7);
    }

    /// docs/hostile.md 15: replies of any order, twice, and none.
    #[test]
    fn hostile_15_messages_out_of_order_end_the_conversation() {
        let other = Message::Exited { process: 5, status: 0, out_of_memory: false };
        let failed = Message::StartFailed { kind: StartFailure::Setup, message: "late".to_owned() };
        for messages in [
            vec![STARTED, STARTED, EXITED],
            vec![Message::Started { process: 9 }, EXITED],
            vec![STARTED, failed, EXITED],
            vec![STARTED, other, EXITED],
        ] {
            let name = format!("{messages:?}");
            let error = says(messages).0.unwrap_err();
            assert!(matches!(error, RunError::Senseless(_)), "{name}: {error}");
        }
        // The first exit counts; a process that is said to end before it starts has ended.
        assert_eq!(says(vec![STARTED, EXITED, EXITED, STARTED]).0.unwrap().status, 7);
        assert_eq!(says(vec![EXITED]).0.unwrap().status, 7);
        for messages in [vec![], vec![STARTED]] {
            let error = says(messages).0.unwrap_err();
            assert!(matches!(error, RunError::Agent(AgentError::MachineEnded)), "{error}");
        }
    }

    /// docs/hostile.md 15: bytes that are no message, and more than one holds.
    #[test]
    fn hostile_15_garbage_on_the_control_connection_is_an_error() {
        for bytes in [vec![0xff; 4096], 100u32.to_le_bytes().to_vec(), vec![1, 0, 0, 0, 0x7f]] {
            let (result, _) = against(Vec::new(), move |mut control, _| {
                let _ = control.write_all(&bytes);
            });
            let error = result.unwrap_err();
            assert!(matches!(error, RunError::Agent(AgentError::Frame(_))), "{error}");
        }
    }
}
