//! Files in the making: beside the place where they will be, under another name until they are whole.
//!
//! Who makes one holds a shared lock on the folder. Whoever gets that lock alone knows that the
//! unfinished files in there are of commands that were killed, and removes them.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use tempfile::NamedTempFile;

/// How names of unfinished files begin.
const PREFIX: &str = ".tmp";

/// A file that is being made. Dropped, it is gone.
pub struct Making {
    file: NamedTempFile,
    // Last, so that the file is gone or has its name before others may look.
    _lock: Option<File>,
}

impl Making {
    /// A new, empty file in a folder, which must be there.
    pub fn begin(folder: &Path) -> io::Result<Making> {
        let lock = File::open(folder)?;
        if lock.try_lock().is_ok() {
            clear(folder);
        }
        // Without locks, on some network file systems, what the killed leave stays.
        let lock = lock.lock_shared().is_ok().then_some(lock);
        let file = tempfile::Builder::new().prefix(PREFIX).tempfile_in(folder)?;
        Ok(Making { file, _lock: lock })
    }

    /// The file.
    pub fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Where it is for now.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Gives it its name, in place of another file of that name.
    pub fn replace(self, target: &Path) -> io::Result<()> {
        Ok(self.file.persist(target).map(drop)?)
    }

    /// Gives it its name, which must be free.
    pub fn place(self, target: &Path) -> io::Result<()> {
        Ok(self.file.persist_noclobber(target).map(drop)?)
    }
}

/// Removes unfinished files. One that cannot be removed is in nobody's way.
fn clear(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// docs/hostile.md 27: what is being made is left alone, what the killed left is not.
    #[test]
    fn hostile_27_unfinished_files_of_the_killed_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let names = || {
            let entries = fs::read_dir(folder.path()).unwrap().flatten();
            let mut names: Vec<_> =
                entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        fs::write(folder.path().join(".tmpAbCdEf"), "a part").unwrap();
        fs::write(folder.path().join("whole"), "whole").unwrap();
        let mut first = Making::begin(folder.path()).unwrap();
        assert_eq!(names().len(), 2, "{:?}", names());
        first.file().write_all(b"first").unwrap();
        fs::write(folder.path().join(".tmpGhIjKl"), "of somebody who is at it").unwrap();
        let second = Making::begin(folder.path()).unwrap();
        assert_eq!(names().len(), 4, "{:?}", names());
        assert!(second.place(&folder.path().join("whole")).is_err());
        first.replace(&folder.path().join("whole")).unwrap();
        drop(Making::begin(folder.path()).unwrap());
        assert_eq!(names(), ["whole"]);
        assert_eq!(fs::read(folder.path().join("whole")).unwrap(), b"first");
    }
}
