//! Processes that confine themselves: how they are started, watched and ended.

#![allow(unsafe_code, reason = "runs code between fork and exec")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rustix::process::{WaitId, WaitIdOptions, waitid};

/// A confined process that runs. It is killed when this is dropped, and when this process's main
/// thread ends.
pub struct Confined {
    pidfd: OwnedFd,
    ended: Option<ExitStatus>,
}

/// Why there is none.
#[derive(Debug)]
pub enum StartError {
    /// The program cannot be run.
    Program(io::Error),
    /// It ended before it was confined, having said why.
    Refused,
}

impl<E: Into<io::Error>> From<E> for StartError {
    fn from(error: E) -> StartError {
        StartError::Program(error.into())
    }
}

impl Confined {
    /// Starts a command with descriptors that it inherits under their numbers, and one more, whose
    /// number `command` is told: that of the pipe for [`jail::Parent::Leave`]. To be called on a
    /// thread that outlives the process: the kernel kills what it started with it.
    ///
    /// The process that is started leaves another behind, in the jail, which becomes a child of this
    /// one.
    pub fn start(
        inherited: &[RawFd],
        command: impl FnOnce(RawFd) -> Result<Command, StartError>,
    ) -> Result<Confined, StartError> {
        let (told, tells) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let inherited: Vec<_> = inherited.iter().copied().chain([tells.as_raw_fd()]).collect();
        let mut command = command(tells.as_raw_fd())?;
        command.env_clear();
        tie_to_this_process(&mut command, inherited);
        nix::sys::prctl::set_child_subreaper(true)?;
        let mut child = command.spawn()?;
        // With the command go this process's ends of pipes.
        drop(command);
        drop(tells);
        let mut text = String::new();
        File::from(told).take(32).read_to_string(&mut text)?;
        let confined = child.wait()?.success();
        let pid = text.trim().parse().ok().and_then(rustix::process::Pid::from_raw);
        let Some(pid) = pid.filter(|_| confined) else { return Err(StartError::Refused) };
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        Ok(Confined { pidfd, ended: None })
    }

    /// Readable once the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills it.
    pub fn kill(&mut self) {
        kill(self.pidfd.as_fd());
    }

    /// Waits for its end; one that takes longer than `limit` is killed.
    pub fn wait(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut descriptors = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut descriptors, timeout), Ok(1..)) {
            self.kill();
        }
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let status = loop {
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(status) => break status,
            }
        };
        // As wait(2) has it.
        let status = status.map_or(0, |status| match status.terminating_signal() {
            Some(signal) => signal,
            None => status.exit_status().unwrap_or_default() << 8,
        });
        Ok(*self.ended.insert(ExitStatus::from_raw(status)))
    }

    /// Another descriptor of the same kind as [`Confined::pidfd`].
    pub fn clone_pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }
}

impl Drop for Confined {
    fn drop(&mut self) {
        self.kill();
        let _ = self.wait(Duration::ZERO);
    }
}

/// Kills a process by its pidfd, from another thread than the one that waits for it.
pub fn kill(pidfd: BorrowedFd<'_>) {
    let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
}

/// A signal with its name.
pub fn signal_name(signal: i32) -> String {
    let name = Signal::try_from(signal).map_or("unknown", Signal::as_str);
    format!("signal {signal} ({name})")
}

/// Has the kernel kill what the command starts when the thread that starts it ends, and lets it
/// inherit descriptors, which are to be open until it is there.
pub fn tie_to_this_process(command: &mut Command, inherited: Vec<RawFd>) {
    let parent = nix::unistd::getpid();
    let prepare = move || {
        // Not in the terminal's process group: Ctrl-C is for the guest's process.
        nix::unistd::setsid()?;
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        // Signals that wait for our forwarding are none of its business.
        nix::sys::signal::SigSet::empty().thread_set_mask()?;
        // The parent may have died before the last line.
        if nix::unistd::getppid() != parent {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        for descriptor in &inherited {
            // SAFETY: the parent holds the descriptors open until the child is there.
            let descriptor = unsafe { BorrowedFd::borrow_raw(*descriptor) };
            nix::fcntl::fcntl(
                descriptor,
                nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
            )?;
        }
        Ok(())
    };
    // SAFETY: the closure only makes system calls with data made before the fork.
    unsafe { command.pre_exec(prepare) };
}
