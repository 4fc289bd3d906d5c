//! Locks between processes: `flock` on files of their own, so that the kernel releases them
//! whatever happens to the holder.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A lock, held until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    path: PathBuf,
}

/// Who else may hold a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Shared,
    Exclusive,
}

impl Lock {
    /// Takes the lock `path`, waiting for it.
    pub(crate) fn wait(path: &Path, mode: Mode) -> io::Result<Lock> {
        loop {
            let file = open(path)?;
            match mode {
                Mode::Shared => file.lock_shared()?,
                Mode::Exclusive => file.lock()?,
            }
            if current(&file, path)? {
                return Ok(Lock { file, path: path.to_owned() });
            }
        }
    }

    /// Takes the lock `path` if nobody is in the way.
    pub(crate) fn attempt(path: &Path, mode: Mode) -> io::Result<Option<Lock>> {
        loop {
            let file = open(path)?;
            let taken = match mode {
                Mode::Shared => file.try_lock_shared(),
                Mode::Exclusive => file.try_lock(),
            };
            match taken {
                Ok(()) if current(&file, path)? => {
                    return Ok(Some(Lock { file, path: path.to_owned() }));
                }
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
    }

    /// Removes the file of an exclusive lock. Who waits for it sees that and starts again.
    pub(crate) fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }

    /// Turns an exclusive lock into a shared one. Somebody may get it exclusively in between.
    pub(crate) fn share(self) -> io::Result<Lock> {
        self.file.lock_shared()?;
        Ok(self)
    }
}

impl AsFd for Lock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Whether the locked file is still the one that others find: it may have been removed between
/// opening and locking.
fn current(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::metadata(path) {
        Ok(theirs) => Ok((ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_lock_is_not_a_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let first = Lock::wait(&path, Mode::Exclusive).unwrap();
        assert!(Lock::attempt(&path, Mode::Shared).unwrap().is_none());
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || Lock::wait(&path, Mode::Exclusive).unwrap()
        });
        std::thread::sleep(std::time::Duration::from_millis(50));
        first.remove().unwrap();
        let second = waiting.join().unwrap();
        // The waiter did not keep the removed file's lock: a third one sees it.
        assert!(Lock::attempt(&path, Mode::Shared).unwrap().is_none());
        drop(second);
        assert!(Lock::attempt(&path, Mode::Shared).unwrap().is_some());
    }
}
