//! Namespaces, and the two forks that they take: one writes the map of users from outside, since
//! nobody in the new user namespace may; the other is the first process in the new namespace of
//! process ids.

#![allow(unsafe_code, reason = "forks, which is sound in a process of one thread")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};
use rustix::process::{Pid as RawPid, PidfdFlags};

use crate::Parent;
use crate::error::{JailError, Step};

fn failed<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> JailError {
    JailError::step(Step::Namespaces, what)
}

/// Ends this process without any of the program's own ends.
fn exit(status: i32) -> ! {
    // SAFETY: the call has no preconditions.
    unsafe { libc::_exit(status) }
}

fn do_fork() -> nix::Result<ForkResult> {
    // SAFETY: `Jail::enter` is for processes of one thread, so no lock is held in the child by a
    // thread that is not there, and the child may do whatever the parent may.
    unsafe { nix::unistd::fork() }
}

/// Moves this process into a network namespace that there is.
pub fn join_network(path: &Path) -> Result<(), JailError> {
    let named = || format!("network namespace {}", path.display());
    let file = File::open(path).map_err(failed(named()))?;
    nix::sched::setns(file, CloneFlags::CLONE_NEWNET).map_err(failed(named()))
}

/// New namespaces, in whose user namespace there is one user and one group, under the numbers that
/// they have outside.
pub fn unshare(uid: u32, gid: u32, network: bool) -> Result<(), JailError> {
    let mut map = fork_mapper(Pid::this(), uid, gid)?;
    let mut flags = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    flags.set(CloneFlags::CLONE_NEWNET, network);
    nix::sched::unshare(flags).map_err(|error| {
        let error = match error {
            // So the kernel says that there may be no more of a kind, or none at all.
            nix::Error::ENOSPC => std::io::Error::other(
                "the host allows no more of them: see sysctl user.max_user_namespaces and its like",
            ),
            error => error.into(),
        };
        failed("unshare")(error)
    })?;
    let _ = map.go.write_all(b"!");
    let mut error = String::new();
    let _ = map.said.read_to_string(&mut error);
    let _ = waitpid(map.mapper, None);
    if error != MAPPED {
        let error = if error.is_empty() { "its writer died".to_owned() } else { error };
        return Err(failed("map of users")(std::io::Error::other(error)));
    }
    crate::privileges::set_ids(uid, gid)
}

/// What the writer of the map says when all went well.
const MAPPED: &str = "mapped";

struct Mapper {
    mapper: Pid,
    go: File,
    said: File,
}

fn pipe() -> Result<(File, File), JailError> {
    let flags = nix::fcntl::OFlag::O_CLOEXEC;
    let (read, write) = nix::unistd::pipe2(flags).map_err(JailError::host("pipe"))?;
    Ok((File::from(write), File::from(read)))
}

/// A process that stays outside until this one is in its new user namespace.
fn fork_mapper(target: Pid, uid: u32, gid: u32) -> Result<Mapper, JailError> {
    let (go, mut gone) = pipe()?;
    let (mut say, said) = pipe()?;
    match do_fork().map_err(failed("fork"))? {
        ForkResult::Parent { child } => Ok(Mapper { mapper: child, go, said }),
        ForkResult::Child => {
            // With this end of it open here too, it would wait for itself.
            drop(go);
            let mut byte = [0];
            // Where unshare failed there is nothing to map.
            if gone.read_exact(&mut byte).is_err() {
                exit(0);
            }
            let write = |file: &str, text: String| {
                let path = format!("/proc/{target}/{file}");
                fs::write(&path, text).map_err(|error| format!("{path}: {error}"))
            };
            let result = write("setgroups", "deny".to_owned())
                .and_then(|()| write("uid_map", format!("{uid} {uid} 1\n")))
                .and_then(|()| write("gid_map", format!("{gid} {gid} 1\n")));
            let text = result.err().unwrap_or_else(|| MAPPED.to_owned());
            let _ = say.write_all(text.as_bytes());
            exit(0)
        }
    }
}

/// The processes around the jail: the one that enters it, and the one that the confined process is to
/// die with.
#[derive(Debug)]
pub struct Around {
    own: OwnedFd,
    above: OwnedFd,
}

impl Around {
    /// To be called before this process becomes another user: the kernel forgets then that it was to
    /// be killed with the process above, which may be gone from then on.
    pub fn new(parent: &Parent) -> Result<Around, JailError> {
        let own = pidfd(Some(rustix::process::getpid()))?;
        // With this one where it waits, and with the one above where it leaves.
        let above = match parent {
            Parent::Leave { .. } => pidfd(rustix::process::getppid())?,
            Parent::Wait | Parent::Detach => own.try_clone().map_err(JailError::host("pidfd"))?,
        };
        Ok(Around { own, above })
    }
}

/// Goes on in a child, and never returns in the parent.
pub fn fork(parent: Parent, around: Around) -> Result<(), JailError> {
    let Around { own, above } = around;
    let before = SigSet::thread_get_mask().map_err(JailError::host("signal mask"))?;
    // None is lost between the fork and the wait.
    handed_on().thread_block().map_err(JailError::host("signal mask"))?;
    match do_fork().map_err(failed("fork"))? {
        ForkResult::Parent { child } => match parent {
            Parent::Wait => wait(child),
            Parent::Detach => exit(0),
            Parent::Leave { pid } => {
                let written = File::from(pid).write_all(format!("{child}\n").as_bytes());
                exit(i32::from(written.is_err()))
            }
        },
        ForkResult::Child => {
            let leaves = matches!(parent, Parent::Leave { .. });
            let detached = matches!(parent, Parent::Detach);
            drop(parent);
            before.thread_set_mask().map_err(JailError::host("signal mask"))?;
            if detached {
                nix::unistd::setsid().map_err(JailError::host("setsid"))?;
                return Ok(());
            }
            if leaves {
                // Its end would count as that of the process above.
                has_ended(own.as_fd(), PollTimeout::NONE);
            }
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
                .map_err(JailError::host("parent's death signal"))?;
            if has_ended(above.as_fd(), PollTimeout::ZERO) {
                exit(1);
            }
            Ok(())
        }
    }
}

fn pidfd(pid: Option<RawPid>) -> Result<OwnedFd, JailError> {
    // The process above is outside this namespace of process ids only where it set that up.
    let pid = pid.ok_or(rustix::io::Errno::SRCH).map_err(JailError::host("process above"))?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(JailError::host("pidfd"))
}

fn has_ended(process: BorrowedFd<'_>, timeout: PollTimeout) -> bool {
    loop {
        let mut descriptors = [PollFd::new(process, PollFlags::POLLIN)];
        match poll(&mut descriptors, timeout) {
            Err(nix::Error::EINTR) => {}
            Ok(0) => return false,
            _ => return true,
        }
    }
}

/// Signals that whoever started this sends to it and means for the confined process.
fn handed_on() -> SigSet {
    let signals = [
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ];
    signals.into_iter().collect()
}

/// Ends as the child does.
fn wait(child: Pid) -> ! {
    let signals = handed_on();
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(_, status)) => exit(status),
                Ok(WaitStatus::Signaled(_, signal, _)) => exit(128 + signal as i32),
                Err(_) => exit(1),
                Ok(_) => {}
            },
            Ok(signal) => {
                let _ = nix::sys::signal::kill(child, signal);
            }
            Err(_) => {}
        }
    }
}

/// Gives the host in the new UTS namespace the jail's name.
pub fn name_host(id: &str) -> Result<(), JailError> {
    let name: String = id.chars().filter(char::is_ascii).take(63).collect();
    nix::unistd::sethostname(name).map_err(failed("host name"))
}
