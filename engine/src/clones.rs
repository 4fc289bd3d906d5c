//! Many machines of one snapshot at once: a process of this program for each, all ended with this
//! one.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use nix::sys::wait::waitpid;

use crate::{stdio, vmm};

/// Most bytes of a line of output that are shown as one.
const LINE: u64 = 64 << 10;

/// Clones cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ClonesError {
    /// One of them.
    #[error("cannot start a clone: {0}")]
    Start(io::Error),
    /// The socket over which they tell that they run.
    #[error("{path}: {error}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
}

/// What happens to clones.
pub enum Event {
    /// One runs; its container's id.
    Runs(String),
    /// One has written a line to standard output (1) or error (2).
    Line(usize, i32, Vec<u8>),
    /// One has ended.
    Ended(usize, ExitStatus),
    /// This process was asked to end.
    Signal(i32),
}

/// Clones that run. They are killed when this is dropped.
pub struct Clones {
    machines: Vec<OwnedFd>,
    events: Receiver<Event>,
    _folder: tempfile::TempDir,
}

impl Clones {
    /// Starts `count` processes of this program with these arguments. To be called on the main
    /// thread, with signals held back as by [`stdio::block_signals`].
    pub fn start(count: usize, arguments: &[OsString]) -> Result<Clones, ClonesError> {
        // The machine of one that is killed becomes a child of this process.
        nix::sys::prctl::set_child_subreaper(true)
            .map_err(|error| ClonesError::Start(error.into()))?;
        let folder = tempfile::tempdir().map_err(ClonesError::Start)?;
        let path = folder.path().join("notify");
        let notices = UnixDatagram::bind(&path)
            .map_err(|error| ClonesError::Socket { path: path.clone(), error })?;
        let program = std::env::current_exe().map_err(ClonesError::Start)?;
        let (sender, events) = mpsc::channel();
        let mut clones = Clones { machines: Vec::new(), events, _folder: folder };
        for index in 0..count {
            let mut command = Command::new(&program);
            command.args(arguments).env("NOTIFY_SOCKET", &path);
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            vmm::tie_to_this_process(&mut command, Vec::new());
            let mut child = command.spawn().map_err(ClonesError::Start)?;
            let pid = rustix::process::Pid::from_child(&child);
            let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
            clones.machines.push(pidfd.map_err(|error| ClonesError::Start(error.into()))?);
            let stdout = child.stdout.take().map(|out| File::from(OwnedFd::from(out)));
            let stderr = child.stderr.take().map(|out| File::from(OwnedFd::from(out)));
            let outputs: Vec<_> = [(stdout, 1), (stderr, 2)]
                .into_iter()
                .filter_map(|(from, number)| Some((from?, number)))
                .map(|(from, number)| {
                    let sender = sender.clone();
                    spawn(move || lines(from, |line| Event::Line(index, number, line), &sender))
                })
                .collect::<Result<_, _>>()?;
            let sender = sender.clone();
            spawn(move || {
                let status = child.wait();
                for output in outputs {
                    let _ = output.join();
                }
                if let Ok(status) = status {
                    let _ = sender.send(Event::Ended(index, status));
                }
            })?;
        }
        let of_signals = sender.clone();
        spawn(move || {
            while let Ok(signal) = stdio::wait_for_end() {
                let _ = of_signals.send(Event::Signal(signal));
            }
        })?;
        spawn(move || {
            let mut text = [0; 1024];
            while let Ok(count) = notices.recv(&mut text) {
                let text = String::from_utf8_lossy(&text[..count]);
                let id = text.lines().find_map(|line| line.strip_prefix("X_VMRUN_ID="));
                if let Some(id) = id {
                    let _ = sender.send(Event::Runs(id.to_owned()));
                }
            }
        })?;
        Ok(clones)
    }

    /// What happens next; `None` where nothing can any more.
    pub fn next(&self) -> Option<Event> {
        self.events.recv().ok()
    }

    /// Waits for what is left of clones that have ended: machines of those that were killed.
    pub fn wait_for_machines(&self) {
        while !matches!(waitpid(None, None), Err(nix::Error::ECHILD)) {}
    }

    /// Kills them all.
    pub fn kill(&self) {
        self.machines.iter().for_each(|machine| vmm::kill(machine.as_fd()));
    }
}

impl Drop for Clones {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<thread::JoinHandle<()>, ClonesError> {
    thread::Builder::new().stack_size(256 << 10).spawn(work).map_err(ClonesError::Start)
}

/// Tells of each line, and of a longer one in parts.
fn lines(from: impl Read, event: impl Fn(Vec<u8>) -> Event, events: &Sender<Event>) {
    let mut from = BufReader::new(from);
    loop {
        let mut line = Vec::new();
        match from.by_ref().take(LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        if events.send(event(line)).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_comes_in_lines_of_bounded_length() {
        let (sender, events) = mpsc::channel();
        let text = [b"one\n\n".as_slice(), &vec![b'x'; LINE as usize + 1], b"\nend"].concat();
        lines(text.as_slice(), |line| Event::Line(7, 1, line), &sender);
        drop(sender);
        let lengths: Vec<_> = events
            .iter()
            .map(|event| match event {
                Event::Line(7, 1, line) => line.len(),
                _ => usize::MAX,
            })
            .collect();
        assert_eq!(lengths, [3, 0, LINE as usize, 1, 3]);
    }
}
