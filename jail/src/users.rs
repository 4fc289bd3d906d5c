//! Users that confined processes of root's become, one each.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use rustix::rand::{GetRandomFlags, getrandom};

/// A range that neither systemd nor the tools for subordinate ids give to anyone.
const USERS: std::ops::Range<u32> = 0x7000_0000..0x7001_0000;
/// Whose locks are here, whatever the state directory is: users are the host's.
const LOCKS: &str = "/run/vmrun/users";
/// How often a user is drawn before all are tried in turn.
const DRAWS: usize = 32;

/// A user that no other confined process is, as long as its lock is held.
#[derive(Debug)]
pub struct User {
    id: u32,
    lock: Flock<File>,
}

impl User {
    /// Takes one that is free. Only root can become it.
    pub fn take() -> io::Result<User> {
        User::take_in(Path::new(LOCKS))
    }

    /// Number of the user and of its group.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The lock, for a process that is to hold it, too.
    pub fn lock(&self) -> RawFd {
        self.lock.as_raw_fd()
    }

    fn take_in(locks: &Path) -> io::Result<User> {
        DirBuilder::new().recursive(true).mode(0o700).create(locks)?;
        for _ in 0..DRAWS {
            let mut bytes = [0; 2];
            // So few bytes come whole or not at all, once the system has random numbers.
            getrandom(&mut bytes, GetRandomFlags::empty())?;
            let id = USERS.start + u32::from(u16::from_ne_bytes(bytes));
            if let Some(user) = User::attempt(locks, id)? {
                return Ok(user);
            }
        }
        for id in USERS {
            if let Some(user) = User::attempt(locks, id)? {
                return Ok(user);
            }
        }
        Err(io::Error::other("every user that a confined process can become is taken"))
    }

    /// The user, where nobody is.
    fn attempt(locks: &Path, id: u32) -> io::Result<Option<User>> {
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
    fn no_two_processes_are_one_user() {
        let folder = tempfile::tempdir().unwrap();
        let users: Vec<_> = (0..100).map(|_| User::take_in(folder.path()).unwrap()).collect();
        let mut ids: Vec<_> = users.iter().map(|user| user.id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), users.len());
        assert!(ids.iter().all(|id| USERS.contains(id)));
        let first = users[0].id;
        assert!(User::attempt(folder.path(), first).unwrap().is_none());
        drop(users);
        assert!(User::attempt(folder.path(), first).unwrap().is_some());
    }
}
