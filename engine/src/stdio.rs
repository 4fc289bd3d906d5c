//! Between the process and the user: standard streams, signals and the terminal.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use agent_protocol::{Request, WindowSize};
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

#[derive(Default)]
struct State {
    /// The way to the process, once it runs.
    process: Option<(Control, u32)>,
    /// A signal that came before it did.
    interrupted: Option<u8>,
}

/// Carries bytes and signals.
pub struct Forwarding {
    state: Arc<Mutex<State>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Forwarding {
    /// Begins to listen for signals: one that would end us before the process runs ends the
    /// machine.
    pub fn start(machine: OwnedFd, signals: bool) -> io::Result<Forwarding> {
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        thread::Builder::new().stack_size(256 << 10).spawn(move || {
            while let Ok(signal) = watched().wait() {
                forward(&shared, signal, machine.as_fd(), signals);
            }
        })?;
        Ok(Forwarding { state })
    }

    /// The process runs: signals are its own from now on.
    pub fn started(&self, control: Control, process: u32, terminal: Option<WindowSize>) {
        let mut state = lock(&self.state);
        state.process = Some((control, process));
        drop(state);
        // The size may have changed since the machine was described.
        if let Some(size) = window_size()
            && terminal.is_some_and(|before| before != size)
        {
            resize(&self.state, size);
        }
    }

    /// The signal that ended the machine before its process ran.
    pub fn interrupted(&self) -> Option<u8> {
        lock(&self.state).interrupted
    }

    /// Carries standard input to the process until its end. The thread may outlive the process: a
    /// terminal's input has no end.
    pub fn input(&self, mut to: UnixStream) -> io::Result<()> {
        let mut from = File::from(io::stdin().as_fd().try_clone_to_owned()?);
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
        let mut to = File::from(to);
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
    match &mut state.process {
        Some((control, process)) if signals => {
            let request =
                Request::Signal { process: *process, signal: signal as i32, group: false };
            if let Err(error) = control.send(&request) {
                tracing::debug!(%error, "signal not forwarded");
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
    if let Some((control, process)) = &mut lock(state).process {
        let request = Request::Resize { process: *process, size };
        if let Err(error) = control.send(&request) {
            tracing::debug!(%error, "size not forwarded");
        }
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
