//! Starting a VMM and watching it.

#![allow(unsafe_code, reason = "runs code between fork and exec")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use api_server::machine::exit_status;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

/// A VMM that runs. It is killed when this is dropped, and when this process's main thread ends.
pub struct Vmm {
    child: Child,
    pidfd: OwnedFd,
}

impl Vmm {
    /// Starts the program with descriptors that it inherits under their numbers, its own messages
    /// in `log`. To be called on the main thread: the kernel kills the VMM when the thread that
    /// started it ends.
    pub fn start(
        program: &Path,
        arguments: impl FnOnce(&mut Command),
        inherited: &[RawFd],
        log: File,
    ) -> io::Result<Vmm> {
        let mut command = Command::new(program);
        arguments(&mut command);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).env_clear();
        tie_to_this_process(&mut command, inherited.to_vec());
        let child = command.spawn()?;
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        Ok(Vmm { child, pidfd })
    }

    /// Readable once the VMM has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
    }

    /// Waits for its end; one that takes longer than `limit` is killed.
    pub fn wait(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut descriptors = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut descriptors, timeout), Ok(1..)) {
            self.kill();
        }
        self.child.wait()
    }

    /// Another descriptor of the same kind as [`Vmm::pidfd`].
    pub fn clone_pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.wait();
    }
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

/// Kills a VMM by its pidfd, from another thread than the one that waits for it.
pub fn kill(pidfd: BorrowedFd<'_>) {
    let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
}

/// What an unexpected end means, for a user.
pub fn describe(status: ExitStatus) -> String {
    if let Some(signal) = status.signal() {
        let name = Signal::try_from(signal).map_or("unknown", Signal::as_str);
        return format!("the VMM was killed by signal {signal} ({name})");
    }
    match status.code() {
        Some(exit_status::POWER_OFF) => "the guest switched itself off".to_owned(),
        Some(exit_status::REBOOT) => "the guest asked for a reset".to_owned(),
        Some(exit_status::GUEST_CRASH) => "the guest's kernel crashed".to_owned(),
        Some(code) => format!("the VMM ended with status {code}"),
        None => "the VMM ended".to_owned(),
    }
}

/// Number of a descriptor that is to be inherited.
pub fn number(descriptor: &impl AsRawFd) -> RawFd {
    descriptor.as_raw_fd()
}
