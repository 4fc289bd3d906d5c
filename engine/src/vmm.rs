//! Starting a VMM and watching it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use api_server::machine::exit_status;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rustix::process::{WaitId, WaitIdOptions, waitid};

/// A VMM that runs. It is killed when this is dropped, and when this process's main thread ends.
pub struct Vmm {
    pidfd: OwnedFd,
    ended: Option<ExitStatus>,
}

/// Why there is no VMM.
#[derive(Debug)]
pub enum StartError {
    /// The program cannot be run.
    Program(io::Error),
    /// It ended before it was confined; what it says is in its log.
    Refused,
}

impl<E: Into<io::Error>> From<E> for StartError {
    fn from(error: E) -> StartError {
        StartError::Program(error.into())
    }
}

/// Files that a VMM is given, since it can open none itself. It knows them by their numbers.
#[derive(Default)]
pub struct Handed {
    files: Vec<OwnedFd>,
    largest: u64,
}

impl Handed {
    /// Gives it a descriptor; the path by which it is named.
    pub fn give(&mut self, file: impl Into<OwnedFd>) -> PathBuf {
        let file = file.into();
        let path = format!("/dev/fd/{}", file.as_raw_fd()).into();
        self.files.push(file);
        path
    }

    /// A file to read; it is not writable for the VMM whatever its guest does.
    pub fn read(&mut self, path: &Path) -> io::Result<PathBuf> {
        // A FIFO must not hold us up.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        Ok(self.give(file))
    }

    /// A file to read and write, which it may make no larger than the largest of them is.
    pub fn write(&mut self, path: &Path) -> io::Result<PathBuf> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        self.largest = self.largest.max(file.metadata()?.len());
        Ok(self.give(file))
    }

    /// A file to add to, made where there is none.
    pub fn append(&mut self, path: &Path) -> io::Result<PathBuf> {
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).mode(0o600).open(path)?;
        Ok(self.give(file))
    }

    /// Bytes of the largest file that it may write.
    pub fn largest(&self) -> u64 {
        self.largest
    }

    /// The numbers.
    pub fn numbers(&self) -> impl Iterator<Item = RawFd> {
        self.files.iter().map(AsRawFd::as_raw_fd)
    }
}

impl Vmm {
    /// Starts the program with descriptors that it inherits under their numbers, its own messages
    /// in `log`. To be called on the main thread: the kernel kills the VMM when the thread that
    /// started it ends.
    ///
    /// The process that is started leaves another behind, in the jail, which becomes a child of this
    /// one.
    pub fn start(
        program: &Path,
        arguments: impl FnOnce(&mut Command),
        inherited: &[RawFd],
        log: File,
    ) -> Result<Vmm, StartError> {
        let (told, tells) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let inherited: Vec<_> = inherited.iter().copied().chain([tells.as_raw_fd()]).collect();
        let mut command = Command::new(program);
        arguments(&mut command);
        let kept: Vec<_> = inherited.iter().map(RawFd::to_string).collect();
        command.arg("--keep-fds").arg(kept.join(","));
        command.arg("--pid-fd").arg(tells.as_raw_fd().to_string());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).env_clear();
        tie_to_this_process(&mut command, inherited);
        nix::sys::prctl::set_child_subreaper(true)?;
        let mut child = command.spawn()?;
        drop(tells);
        let mut text = String::new();
        File::from(told).take(32).read_to_string(&mut text)?;
        let confined = child.wait()?.success();
        let pid = text.trim().parse().ok().and_then(rustix::process::Pid::from_raw);
        let Some(pid) = pid.filter(|_| confined) else { return Err(StartError::Refused) };
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        Ok(Vmm { pidfd, ended: None })
    }

    /// Readable once the VMM has ended.
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

    /// Another descriptor of the same kind as [`Vmm::pidfd`].
    pub fn clone_pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
        let _ = self.wait(Duration::ZERO);
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
        // Nobody sends this one: it is how a filter ends a process.
        let why = match signal {
            libc::SIGSYS => ": it made a system call that its filter forbids",
            _ => "",
        };
        return format!("the VMM was killed by signal {signal} ({name}){why}");
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
