//! Where and as whom a VMM runs: a jail that it enters by itself before it does anything else, with
//! what this says as its walls.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

pub use jail::Step;
use nix::fcntl::{Flock, FlockArg};

/// Users that VMMs of root's become, one each: a range that neither systemd nor the tools for
/// subordinate ids give to anyone.
const USERS: std::ops::Range<u32> = 0x7000_0000..0x7001_0000;
/// Whose locks are here, whatever the state directory is: users are the host's.
const LOCKS: &str = "/run/vmrun/users";
/// How often a user is drawn before all are tried in turn.
const DRAWS: usize = 32;

/// Memory of a VMM beside the guest's, in bytes: the program, the host's page tables for the guest
/// (a 256th at most) and the page cache of its disks, which gives way where it is short.
const OVERHEAD: u64 = 64 << 20;
/// Threads beside the processors': the event loop, the API's, and those that KVM makes.
const THREADS: u64 = 16;
/// Time for each processor, and for the devices of all, in each period; microseconds.
const PERIOD: u64 = 100_000;
/// Bytes of a file beside the largest that the machine is made of: a snapshot's state, messages.
const LARGER: u64 = 64 << 20;

/// What a user says about how VMMs are confined.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Parts of the jail to go on without.
    pub unconfined: Vec<Step>,
    /// The cgroup below which each VMM gets one, instead of `vmrun`; without a slash in front it
    /// begins, for others than root, at the cgroup above the caller's own.
    pub cgroup_parent: Option<PathBuf>,
}

/// What a machine may use.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Memory of the guest, in bytes.
    pub memory: u64,
    /// Number of virtual processors.
    pub cpus: u8,
    /// Bytes of the largest file that it writes.
    pub file: u64,
}

/// One VMM's jail.
#[derive(Debug)]
pub struct Confinement {
    user: Option<User>,
    parent: PathBuf,
    unconfined: Vec<Step>,
}

/// A user that no other VMM is, as long as its lock is held.
#[derive(Debug)]
struct User {
    id: u32,
    lock: Flock<File>,
}

impl Confinement {
    /// The jail of a VMM to come.
    pub fn new(policy: &Policy) -> io::Result<Confinement> {
        let root = nix::unistd::geteuid().is_root();
        Ok(Confinement {
            user: root.then(|| User::take(Path::new(LOCKS))).transpose()?,
            parent: policy.cgroup_parent.clone().unwrap_or_else(|| "vmrun".into()),
            unconfined: policy.unconfined.clone(),
        })
    }

    /// What has to be held as long as the VMM runs.
    pub fn lock(&self) -> Option<RawFd> {
        self.user.as_ref().map(|user| user.lock.as_raw_fd())
    }

    /// Where the jail's cgroup will be, where there is to be one.
    pub fn cgroup(&self, id: &str) -> Option<PathBuf> {
        if self.unconfined.contains(&Step::Cgroup) {
            return None;
        }
        jail::Cgroup { parent: self.parent.clone(), values: Vec::new() }.folder(id).ok()
    }

    /// The options that say all this to a VMM, which sees one folder of the host's: that of its
    /// sockets.
    pub fn arguments(&self, command: &mut Command, sockets: &Path, share: Share) {
        command.args(["--jail", "--empty-root", "--visible"]).arg(sockets);
        if let Some(user) = &self.user {
            let id = user.id.to_string();
            command.args(["--uid", &id, "--gid", &id]);
        }
        for step in &self.unconfined {
            command.args(["--unconfined", step.name()]);
        }
        command.arg("--parent-cgroup").arg(&self.parent);
        let cpus = u64::from(share.cpus);
        let memory = share.memory + share.memory / 256 + OVERHEAD;
        // Half a processor for the devices, so that the guest's own are not held up by them.
        let quota = cpus * PERIOD + PERIOD / 2;
        for value in [
            format!("memory.max={memory}"),
            format!("pids.max={}", cpus + THREADS),
            format!("cpu.max={quota} {PERIOD}"),
        ] {
            command.arg("--cgroup").arg(value);
        }
        let largest = share.file.max(share.memory) + LARGER;
        command.arg("--resource-limit").arg(format!("fsize={largest}"));
    }
}

impl User {
    fn take(locks: &Path) -> io::Result<User> {
        DirBuilder::new().recursive(true).mode(0o700).create(locks)?;
        for _ in 0..DRAWS {
            let mut bytes = [0; 2];
            crate::random::fill(&mut bytes)?;
            if let Some(user) =
                User::lock(locks, USERS.start + u32::from(u16::from_ne_bytes(bytes)))?
            {
                return Ok(user);
            }
        }
        for id in USERS {
            if let Some(user) = User::lock(locks, id)? {
                return Ok(user);
            }
        }
        Err(io::Error::other("every user that a VMM can become is taken"))
    }

    /// The user, where no VMM is.
    fn lock(locks: &Path, id: u32) -> io::Result<Option<User>> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(locks.join(id.to_string()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(User { id, lock })),
            Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
            Err((_, error)) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_vmms_are_one_user() {
        let folder = tempfile::tempdir().unwrap();
        let users: Vec<_> = (0..100).map(|_| User::take(folder.path()).unwrap()).collect();
        let mut ids: Vec<_> = users.iter().map(|user| user.id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), users.len());
        assert!(ids.iter().all(|id| USERS.contains(id)));
        let first = users[0].id;
        assert!(User::lock(folder.path(), first).unwrap().is_none());
        drop(users);
        assert!(User::lock(folder.path(), first).unwrap().is_some());
    }

    #[test]
    fn a_machine_gets_what_it_was_promised_and_a_little_more() {
        let confinement =
            Confinement { user: None, parent: "vmrun".into(), unconfined: vec![Step::Landlock] };
        let mut command = Command::new("x");
        let share = Share { memory: 128 << 20, cpus: 2, file: 1 << 30 };
        confinement.arguments(&mut command, Path::new("/run/x"), share);
        let arguments: Vec<_> = command.get_args().map(|text| text.to_str().unwrap()).collect();
        for expected in [
            "memory.max=201850880",
            "pids.max=18",
            "cpu.max=250000 100000",
            "fsize=1140850688",
            "landlock",
        ] {
            assert!(arguments.contains(&expected), "{expected}: {arguments:?}");
        }
    }
}
