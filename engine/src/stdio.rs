//! Between the process and the user: standard streams, signals and the terminal.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use agent_protocol::{Request, WindowSize};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::agent::Control;
use crate::vmm;

const CHUNK: usize = 256 << 10;

/// Signals that are the process's, not ours.
const FORWARDED: [Signal; 9] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGCONT,
    Signal::SIGTSTP,
];

/// Holds signals back from every thread made after this; to be called before any is, so that
/// [`Forwarding`] gets them.
pub fn block_signals() -> io::Result<()> {
    Ok(watched().thread_block()?)
}

/// Lets them end the program again, as they do by default.
pub fn unblock_signals() -> io::Result<()> {
    Ok(watched().thread_unblock()?)
}

/// Waits for a signal that means the end, for who has no process to forward signals to; its number.
pub fn wait_for_end() -> io::Result<i32> {
    let ends = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];
    Ok(ends.into_iter().collect::<SigSet>().wait()? as i32)
}

fn watched() -> SigSet {
    FORWARDED.into_iter().chain([Signal::SIGWINCH]).collect()
}

/// The size of the terminal that standard input is, or output where it is not.
pub fn window_size() -> Option<WindowSize> {
    let of = |descriptor: BorrowedFd<'_>| {
        let size = rustix::termios::tcgetwinsize(descriptor).ok()?;
        (size.ws_row > 0 && size.ws_col > 0)
            .then_some(WindowSize { rows: size.ws_row, columns: size.ws_col })
    };
    of(io::stdin().as_fd()).or_else(|| of(io::stdout().as_fd()))
}

/// Standard input without line editing, until dropped.
pub struct Terminal(Option<Termios>);

impl Terminal {
    /// Makes standard input raw, where that is wanted and it is a terminal.
    pub fn enter(wanted: bool) -> io::Result<Terminal> {
        let stdin = io::stdin();
        if !wanted || !stdin.is_terminal() {
            return Ok(Terminal(None));
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(Terminal(Some(before)))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// Who signals are for.
#[derive(Default)]
enum Phase {
    /// Nothing runs yet: they are for us.
    #[default]
    Starting,
    /// The process was asked for, and may run before the agent's word of it is here: its first
    /// signal waits for that. A second one is for us, should the word never come.
    Asked(Option<Signal>),
    /// The process.
    Running(Control, u32),
    /// Nobody: the process has ended, and the machine is about to.
    Over,
}

#[derive(Default)]
struct State {
    phase: Phase,
    /// A signal that ended the machine in place of the process.
    interrupted: Option<u8>,
}

/// Carries bytes and signals.
#[derive(Clone)]
pub struct Forwarding {
    state: Arc<Mutex<State>>,
    /// The VMM's pidfd.
    machine: Arc<OwnedFd>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Forwarding {
    /// Begins to listen for signals: one that would end us before the process runs ends the
    /// machine.
    pub fn start(machine: OwnedFd, signals: bool) -> io::Result<Forwarding> {
        let state = Arc::new(Mutex::new(State::default()));
        let forwarding = Forwarding { state, machine: Arc::new(machine) };
        let Forwarding { state, machine } = forwarding.clone();
        thread::Builder::new().stack_size(256 << 10).spawn(move || {
            while let Ok(signal) = watched().wait() {
                forward(&state, signal, machine.as_fd(), signals);
            }
        })?;
        Ok(forwarding)
    }

    /// One that no signal reaches.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn idle(machine: OwnedFd) -> Forwarding {
        Forwarding { state: Arc::default(), machine: Arc::new(machine) }
    }

    /// The process is about to be asked for.
    pub fn asked(&self) {
        lock(&self.state).phase = Phase::Asked(None);
    }

    /// The process runs: signals are its own from now on.
    pub fn started(&self, control: Control, process: u32, terminal: Option<WindowSize>) {
        let running = Phase::Running(control, process);
        let before = std::mem::replace(&mut lock(&self.state).phase, running);
        if let Phase::Asked(Some(signal)) = before {
            forward(&self.state, signal, self.machine.as_fd(), true);
        }
        // The size may have changed since the machine was described.
        if let Some(size) = window_size()
            && terminal.is_some_and(|before| before != size)
        {
            resize(&self.state, size);
        }
    }

    /// The process has ended, and its status is known: no signal changes that any more.
    pub fn over(&self) {
        lock(&self.state).phase = Phase::Over;
    }

    /// The signal that ended the machine in place of its process.
    pub fn interrupted(&self) -> Option<u8> {
        lock(&self.state).interrupted
    }

    /// Carries standard input to the process until its end. The thread may outlive the process: a
    /// terminal's input has no end.
    pub fn input(&self, mut to: UnixStream) -> io::Result<()> {
        let mut from = Patient(File::from(io::stdin().as_fd().try_clone_to_owned()?));
        let copy = move || {
            copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        };
        thread::Builder::new().stack_size(256 << 10).spawn(copy).map(drop)
    }

    /// Carries a stream of the process to our standard output (1) or error (2) until its end.
    pub fn output(&self, mut from: UnixStream, number: i32) -> io::Result<JoinHandle<()>> {
        let to = if number == 1 {
            io::stdout().as_fd().try_clone_to_owned()?
        } else {
            io::stderr().as_fd().try_clone_to_owned()?
        };
        let mut to = Patient(File::from(to));
        thread::Builder::new().stack_size(256 << 10).spawn(move || {
            copy(&mut from, &mut to);
            // Nobody reads any more: the guest need not send.
            let _ = from.shutdown(Shutdown::Both);
        })
    }
}

fn forward(state: &Mutex<State>, signal: Signal, machine: BorrowedFd<'_>, signals: bool) {
    if signal == Signal::SIGWINCH {
        if let Some(size) = window_size() {
            resize(state, size);
        }
        return;
    }
    let mut state = lock(state);
    match &mut state.phase {
        Phase::Over => {}
        Phase::Asked(waiting @ None) if signals => *waiting = Some(signal),
        Phase::Running(control, process) if signals => {
            let request =
                Request::Signal { process: *process, signal: signal as i32, group: false };
            if let Err(error) = control.send(&request) {
                // A guest that takes no signals must not be one that cannot be ended.
                tracing::warn!("signal not forwarded, the machine is ended: {error}");
                state.interrupted = Some(signal as i32 as u8);
                vmm::kill(machine);
            }
        }
        // Without forwarding a signal ends us, and with us the machine.
        _ if matches!(signal, Signal::SIGCONT | Signal::SIGTSTP) => {}
        _ => {
            state.interrupted = Some(signal as i32 as u8);
            vmm::kill(machine);
        }
    }
}

fn resize(state: &Mutex<State>, size: WindowSize) {
    if let Phase::Running(control, process) = &mut lock(state).phase {
        let request = Request::Resize { process: *process, size };
        if let Err(error) = control.send(&request) {
            tracing::debug!(%error, "size not forwarded");
        }
    }
}

/// A file that waits, also where whoever gave it to us has made it non-blocking: that is a property
/// of what the descriptor refers to, and not ours to change.
struct Patient(File);

impl Patient {
    fn until<T>(&self, ready: PollFlags, mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            match work() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let mut descriptors = [PollFd::new(self.0.as_fd(), ready)];
                    match poll(&mut descriptors, PollTimeout::NONE) {
                        Ok(_) | Err(nix::Error::EINTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                other => return other,
            }
        }
    }
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.until(PollFlags::POLLIN, || (&self.0).read(buffer))
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.until(PollFlags::POLLOUT, || (&self.0).write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn copy(from: &mut impl Read, to: &mut impl Write) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if to.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patient(end: UnixStream) -> Patient {
        end.set_nonblocking(true).unwrap();
        Patient(File::from(OwnedFd::from(end)))
    }

    /// Programs like node leave their standard streams non-blocking for whoever shares them.
    #[test]
    fn nothing_is_lost_over_non_blocking_streams() {
        let (mut source, stdin) = UnixStream::pair().unwrap();
        let (stdout, mut sink) = UnixStream::pair().unwrap();
        let (mut stdin, mut stdout) = (patient(stdin), patient(stdout));
        let carrier = thread::spawn(move || copy(&mut stdin, &mut stdout));
        let sent: Vec<u8> = (0..3_000_000u32).map(|number| (number % 251) as u8).collect();
        let bytes = sent.clone();
        let writer = thread::spawn(move || {
            for part in bytes.chunks(700_001) {
                source.write_all(part).unwrap();
            }
        });
        let mut received = Vec::new();
        sink.read_to_end(&mut received).unwrap();
        assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
        writer.join().unwrap();
        carrier.join().unwrap();
    }

    #[test]
    fn a_reader_that_has_gone_ends_the_copy() {
        let (stdout, sink) = UnixStream::pair().unwrap();
        drop(sink);
        copy(&mut io::repeat(0), &mut patient(stdout));
    }

    /// docs/hostile.md 15: an agent that reads no requests; a signal still ends its machine.
    #[test]
    fn hostile_15_a_guest_that_takes_no_signals_is_ended() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        // A socket that takes nothing at once: its other end has gone.
        let control = Control::over(UnixStream::pair().unwrap().0);
        let state = Mutex::new(State { phase: Phase::Running(control, 0), interrupted: None });
        forward(&state, Signal::SIGINT, pidfd.as_fd(), true);
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
        assert_eq!(lock(&state).interrupted, Some(2));
    }

    #[test]
    fn a_signal_before_the_agents_word_waits_for_it_and_a_second_does_not() {
        let (machine, _held): (OwnedFd, OwnedFd) = nix::unistd::pipe().unwrap();
        let forwarding = Forwarding::idle(machine);
        let send = |signal| forward(&forwarding.state, signal, forwarding.machine.as_fd(), true);
        forwarding.asked();
        send(Signal::SIGINT);
        assert_eq!(forwarding.interrupted(), None);
        let (ours, mut agents) = UnixStream::pair().unwrap();
        forwarding.started(Control::over(ours), 3, None);
        let request: Request = agent_protocol::read_frame(&mut agents).unwrap().unwrap();
        assert_eq!(request, Request::Signal { process: 3, signal: 2, group: false });

        forwarding.asked();
        send(Signal::SIGTERM);
        send(Signal::SIGINT);
        assert_eq!(forwarding.interrupted(), Some(2));
    }
}
