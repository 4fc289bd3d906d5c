//! Starting a VMM and watching it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use api_server::machine::exit_status;

pub use crate::confined::{Confined as Vmm, StartError, kill, tie_to_this_process};
use crate::confined::{Confined, signal_name};

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

/// Starts the program with descriptors that it inherits under their numbers, its own messages in
/// `log`. To be called on the main thread; see [`Confined::start`].
pub fn start(
    program: &Path,
    arguments: impl FnOnce(&mut Command),
    inherited: &[RawFd],
    log: File,
) -> Result<Vmm, StartError> {
    Confined::start(inherited, |pid_pipe| {
        let mut command = Command::new(program);
        arguments(&mut command);
        let kept: Vec<_> = inherited.iter().chain([&pid_pipe]).map(RawFd::to_string).collect();
        command.arg("--keep-fds").arg(kept.join(","));
        command.arg("--pid-fd").arg(pid_pipe.to_string());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(command)
    })
}

/// What an unexpected end means, for a user.
pub fn describe(status: ExitStatus) -> String {
    if let Some(signal) = status.signal() {
        // Nobody sends this one: it is how a filter ends a process.
        let why = match signal {
            libc::SIGSYS => ": it made a system call that its filter forbids",
            _ => "",
        };
        return format!("the VMM was killed by {}{why}", signal_name(signal));
    }
    match status.code() {
        Some(exit_status::POWER_OFF) => "the guest switched itself off".to_owned(),
        Some(exit_status::REBOOT) => "the guest asked for a reset".to_owned(),
        Some(exit_status::GUEST_CRASH) => "the guest's kernel crashed".to_owned(),
        Some(code) => format!("the VMM ended with status {code}"),
        None => "the VMM ended".to_owned(),
    }
}
