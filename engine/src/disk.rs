//! Sparse files with an empty ext4 file system: writable layers and volumes.

#![allow(unsafe_code, reason = "lseek to data and holes, with 64-bit offsets")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::making::Making;
use crate::paths::Paths;

/// Why a disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No e2fsprogs.
    #[error("cannot run mkfs.ext4: {0}; install e2fsprogs, or use --read-only")]
    NoMkfs(io::Error),
    /// It refused.
    #[error("mkfs.ext4 on {path}: {message}")]
    Mkfs {
        /// The file.
        path: PathBuf,
        /// Its last words.
        message: String,
    },
    /// A file cannot be made or copied.
    #[error("{path}: {error}{}", images::room_hint(error))]
    File {
        /// Which.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// Too small for a file system.
    #[error("a disk of {0} bytes is too small; at least 16 MiB are needed")]
    TooSmall(u64),
}

fn at(path: &Path) -> impl Fn(io::Error) -> DiskError {
    let path = path.to_owned();
    move |error| DiskError::File { path: path.clone(), error }
}

/// Makes `target`, which must not exist, a disk of `size` bytes with an empty file system: a copy of
/// a template's few blocks, the template itself being made at the first use of a size.
///
/// The disk appears whole under its name or not at all, also when this is killed.
pub fn make(paths: &Paths, size: u64, target: &Path) -> Result<(), DiskError> {
    if size < 16 << 20 {
        return Err(DiskError::TooSmall(size));
    }
    let folder = paths.templates();
    let template = folder.join(format!("ext4-{size}"));
    if !template.exists() {
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        // Two at once make one each, and the second replaces the first by its equal.
        let mut making = Making::begin(&folder).map_err(at(&folder))?;
        making.file().set_len(size).map_err(at(&template))?;
        format(making.path())?;
        // Every later disk is a copy of it: it must not be lost with the power but for its name.
        making.file().sync_all().map_err(at(&template))?;
        making.replace(&template).map_err(at(&template))?;
    }
    if target.exists() {
        return Err(at(target)(io::ErrorKind::AlreadyExists.into()));
    }
    let folder = target.parent().unwrap_or(Path::new("."));
    let mut making = Making::begin(folder).map_err(at(target))?;
    if !copy_sparse(&template, making.file()).map_err(at(target))? {
        format(making.path())?;
    }
    making.place(target).map_err(at(target))
}

/// Copies a disk to `target`, which must not exist: by reference where the file system can, else its
/// data without its holes.
pub fn copy(from: &Path, target: &Path) -> Result<(), DiskError> {
    let copy = || {
        let mut source = File::open(from)?;
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(target)?;
        if rustix::fs::ioctl_ficlone(&file, &source).is_ok() || copy_sparse(from, &file)? {
            return Ok(());
        }
        io::copy(&mut source, &mut file).map(drop)
    };
    copy().map_err(at(target))
}

fn format(path: &Path) -> Result<(), DiskError> {
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-J", "size=4", "-I", "256"])
        // The inode tables stay holes; the guest's kernel need not fill them either, for a hole
        // reads as zeroes.
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"])
        .args(["-O", "^resize_inode"])
        .arg(path)
        .env("PATH", program_path())
        .stdin(Stdio::null())
        .output()
        .map_err(DiskError::NoMkfs)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let message = text.lines().next_back().unwrap_or("no reason given").to_owned();
    Err(DiskError::Mkfs { path: path.to_owned(), message })
}

/// A user's PATH often lacks the folders where mkfs is.
fn program_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/sbin:/sbin")
}

/// Copies a sparse file's data, a few blocks, and leaves its holes; false where its file system (9p,
/// some network ones) does not tell data from holes, and all of it would be copied.
fn copy_sparse(from: &Path, target: &File) -> io::Result<bool> {
    let source = File::open(from)?;
    let size = source.metadata()?.len();
    target.set_len(size)?;
    let seek = |offset: u64, whence| {
        // SAFETY: lseek takes and returns numbers; the descriptor is open.
        let found = unsafe { libc::lseek(source.as_raw_fd(), offset as libc::off_t, whence) };
        if found >= 0 { Ok(found as u64) } else { Err(io::Error::last_os_error()) }
    };
    if seek(0, libc::SEEK_HOLE)? == size {
        return Ok(false);
    }
    let mut buffer = vec![0; 256 << 10];
    let mut offset = 0;
    loop {
        let start = match seek(offset, libc::SEEK_DATA) {
            // Nothing but a hole is left.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(true),
            other => other?,
        };
        let end = seek(start, libc::SEEK_HOLE)?;
        offset = start;
        while offset < end {
            let part = buffer.len().min((end - offset) as usize);
            source.read_exact_at(&mut buffer[..part], offset)?;
            target.write_all_at(&buffer[..part], offset)?;
            offset += part as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_disk_is_a_file_system_and_takes_little_room() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::open(Some(folder.path())).unwrap();
        for name in ["one", "two"] {
            let path = folder.path().join(name);
            make(&paths, 1 << 30, &path).unwrap();
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!(metadata.len(), 1 << 30);
            assert!(metadata.blocks() * 512 < 16 << 20, "{} blocks", metadata.blocks());
            let check = Command::new("e2fsck").args(["-fn"]).arg(&path).output().unwrap();
            assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4, "one, two, run, templates");
        let (one, copied) = (folder.path().join("one"), folder.path().join("copied"));
        copy(&one, &copied).unwrap();
        assert!(copy(&one, &copied).is_err(), "overwritten");
        assert!(fs::metadata(&copied).unwrap().blocks() * 512 < 16 << 20);
        let same = Command::new("cmp").args([&one, &copied]).status().unwrap();
        assert!(same.success());
        let path = folder.path().join("small");
        assert!(matches!(make(&paths, 1 << 20, &path), Err(DiskError::TooSmall(_))));
        assert!(make(&paths, 1 << 30, &folder.path().join("one")).is_err(), "overwritten");
    }
}
