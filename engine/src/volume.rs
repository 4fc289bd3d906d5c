//! Volumes: ext4 file systems in files of the host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::disk::{self, DiskError};
use crate::paths::Paths;
use crate::spec::VolumeArgument;

/// Size of a new volume, in bytes: sparse, so this is what it may grow to.
pub const DEFAULT_SIZE: u64 = 10 << 30;

/// Why a volume cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A folder of the host.
    #[error(
        "{0} is a directory; shared directories are not supported yet: use a named volume (NAME:/path) or a disk image"
    )]
    Directory(PathBuf),
    /// Not an ext4 file system.
    #[error("{0} is not a disk image with an ext4 file system")]
    NotExt4(PathBuf),
    /// Somebody else has it.
    #[error("volume {0} is in use by another container; only read-only use (:ro) can be shared")]
    InUse(String),
    /// There is none.
    #[error("no such volume: {0}")]
    Unknown(String),
    /// It exists.
    #[error("volume {0} exists already")]
    Exists(String),
    /// Its file.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// It cannot be made.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |error| VolumeError::File { path, error }
}

/// A volume that this process, and the VMM that inherits the lock, may use.
pub struct Attached {
    /// The disk image.
    pub path: PathBuf,
    /// Held as long as it is used.
    pub lock: Flock<File>,
    /// Where it is mounted, and how.
    pub argument: VolumeArgument,
}

fn file_of(paths: &Paths, name: &str) -> PathBuf {
    paths.volumes().join(name).join("volume.ext4")
}

/// Makes a named volume.
pub fn create(paths: &Paths, name: &str, size: u64) -> Result<(), VolumeError> {
    let path = file_of(paths, name);
    let folder = paths.volumes().join(name);
    fs::create_dir_all(&folder).map_err(at(&folder))?;
    match disk::make(paths, size, &path) {
        Err(DiskError::File { error, .. }) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(VolumeError::Exists(name.to_owned()))
        }
        other => Ok(other?),
    }
}

/// Takes what `-v` names, making a named volume that does not exist.
pub fn attach(paths: &Paths, argument: VolumeArgument) -> Result<Attached, VolumeError> {
    let path = if argument.is_path() {
        let path = PathBuf::from(&argument.source);
        let metadata = fs::metadata(&path).map_err(at(&path))?;
        if metadata.is_dir() {
            return Err(VolumeError::Directory(path));
        }
        fs::canonicalize(&path).map_err(at(&path))?
    } else {
        match create(paths, &argument.source, DEFAULT_SIZE) {
            Ok(()) | Err(VolumeError::Exists(_)) => {}
            Err(error) => return Err(error),
        }
        file_of(paths, &argument.source)
    };
    let file = OpenOptions::new()
        .read(true)
        .write(!argument.read_only)
        // A FIFO would block.
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(&path)
        .map_err(at(&path))?;
    check_ext4(&path, &file)?;
    let how = if argument.read_only {
        FlockArg::LockSharedNonblock
    } else {
        FlockArg::LockExclusiveNonblock
    };
    let lock = Flock::lock(file, how).map_err(|(_, error)| match error {
        nix::Error::EWOULDBLOCK => VolumeError::InUse(argument.source.clone()),
        error => at(&path)(error.into()),
    })?;
    Ok(Attached { path, lock, argument })
}

/// A guest is only told to mount as ext4 what says that it is.
fn check_ext4(path: &Path, file: &File) -> Result<(), VolumeError> {
    const MAGIC_AT: u64 = 1024 + 56;
    let regular = file.metadata().map_err(at(path))?.is_file();
    let mut magic = [0; 2];
    if !regular || file.read_exact_at(&mut magic, MAGIC_AT).is_err() || magic != [0x53, 0xef] {
        return Err(VolumeError::NotExt4(path.to_owned()));
    }
    Ok(())
}

/// Names of the volumes, in order.
pub fn list(paths: &Paths) -> Result<Vec<String>, VolumeError> {
    let folder = paths.volumes();
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(at(&folder))?,
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().join("volume.ext4").exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

/// Removes a volume that nothing uses.
pub fn remove(paths: &Paths, name: &str) -> Result<(), VolumeError> {
    if !list(paths)?.iter().any(|known| known == name) {
        return Err(VolumeError::Unknown(name.to_owned()));
    }
    let path = file_of(paths, name);
    let file = File::open(&path).map_err(at(&path))?;
    let _lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| VolumeError::InUse(name.to_owned()))?;
    let folder = paths.volumes().join(name);
    fs::remove_dir_all(&folder).map_err(at(&folder))
}
