//! Volumes: ext4 file systems in files of the host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::container::{self, ContainerError};
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
    /// Its journal has to be replayed, which takes writing.
    #[error("volume {0} was not left clean by its last user; use it once without :ro")]
    Unclean(String),
    /// Somebody else has it.
    #[error("volume {0} is in use by another container; only read-only use (:ro) can be shared")]
    InUse(String),
    /// A container that may run again has it.
    #[error(
        "volume {name} is used by container {container}; remove that first (vmrun rm {container})"
    )]
    Used {
        /// The volume.
        name: String,
        /// The container's name.
        container: String,
    },
    /// The containers cannot be asked.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// There is none.
    #[error("no such volume: {0}")]
    Unknown(String),
    /// It exists.
    #[error("volume {0} exists already")]
    Exists(String),
    /// Its file.
    #[error("{path}: {error}{}", images::room_hint(error))]
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

/// Says early that a directory cannot be shared.
pub fn refuse_directory(argument: &VolumeArgument) -> Result<(), VolumeError> {
    let path = PathBuf::from(&argument.source);
    if argument.is_path() && path.is_dir() {
        return Err(VolumeError::Directory(path));
    }
    Ok(())
}

/// Takes what `-v` names, making a named volume that does not exist.
pub fn attach(paths: &Paths, argument: VolumeArgument) -> Result<Attached, VolumeError> {
    let path = if argument.is_path() {
        refuse_directory(&argument)?;
        let path = PathBuf::from(&argument.source);
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
    let how = if argument.read_only {
        FlockArg::LockSharedNonblock
    } else {
        FlockArg::LockExclusiveNonblock
    };
    let lock = Flock::lock(file, how).map_err(|(_, error)| match error {
        nix::Error::EWOULDBLOCK => VolumeError::InUse(argument.source.clone()),
        error => at(&path)(error.into()),
    })?;
    // Not before it is ours: who writes to it is not done.
    let clean = check_ext4(&path, &lock)?;
    if argument.read_only && !clean {
        return Err(VolumeError::Unclean(argument.source));
    }
    Ok(Attached { path, lock, argument })
}

/// A guest is only told to mount as ext4 what says that it is. Whether it can be mounted without
/// writing to it (Linux, Documentation/filesystems/ext4, the super block).
fn check_ext4(path: &Path, file: &File) -> Result<bool, VolumeError> {
    const MAGIC_AT: u64 = 1024 + 0x38;
    const INCOMPATIBLE_AT: u64 = 1024 + 0x60;
    const NEEDS_RECOVERY: u8 = 0x04;
    let regular = file.metadata().map_err(at(path))?.is_file();
    let (mut magic, mut features) = ([0; 2], [0; 4]);
    if !regular
        || file.read_exact_at(&mut magic, MAGIC_AT).is_err()
        || file.read_exact_at(&mut features, INCOMPATIBLE_AT).is_err()
        || magic != [0x53, 0xef]
    {
        return Err(VolumeError::NotExt4(path.to_owned()));
    }
    Ok(features[0] & NEEDS_RECOVERY == 0)
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

/// What is known of a volume.
#[derive(Clone, Debug)]
pub struct Info {
    /// The disk image.
    pub path: PathBuf,
    /// What it may grow to, in bytes.
    pub size: u64,
    /// What it takes on the host, in bytes.
    pub used: u64,
}

/// Looks at a volume.
pub fn inspect(paths: &Paths, name: &str) -> Result<Info, VolumeError> {
    known(paths, name)?;
    let path = file_of(paths, name);
    let metadata = fs::metadata(&path).map_err(at(&path))?;
    Ok(Info {
        size: metadata.len(),
        // Blocks are counted in units of 512 bytes, whatever the file system's are.
        used: metadata.blocks() * 512,
        path,
    })
}

/// Removes the volumes that no container uses; their names, and the bytes that are free again.
pub fn prune(paths: &Paths) -> Result<(Vec<String>, u64), VolumeError> {
    let (mut removed, mut freed) = (Vec::new(), 0u64);
    for name in list(paths)? {
        let used = inspect(paths, &name)?.used;
        match remove(paths, &name) {
            Ok(()) => {
                freed = freed.saturating_add(used);
                removed.push(name);
            }
            // Another prune was faster, or somebody uses it.
            Err(VolumeError::Used { .. } | VolumeError::InUse(_) | VolumeError::Unknown(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok((removed, freed))
}

fn known(paths: &Paths, name: &str) -> Result<(), VolumeError> {
    match list(paths)?.iter().any(|known| known == name) {
        true => Ok(()),
        false => Err(VolumeError::Unknown(name.to_owned())),
    }
}

/// Removes a volume that no container uses, whether it runs or not.
pub fn remove(paths: &Paths, name: &str) -> Result<(), VolumeError> {
    known(paths, name)?;
    let containers = container::list(paths)?;
    let user = containers.iter().find(|one| one.config.volumes.iter().any(|volume| volume == name));
    if let Some(user) = user {
        let container = user.config.name.clone();
        return Err(VolumeError::Used { name: name.to_owned(), container });
    }
    let path = file_of(paths, name);
    let file = File::open(&path).map_err(at(&path))?;
    let _lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| VolumeError::InUse(name.to_owned()))?;
    let folder = paths.volumes().join(name);
    fs::remove_dir_all(&folder).map_err(at(&folder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::{Config, Container};

    fn argument(source: &str, read_only: bool) -> VolumeArgument {
        VolumeArgument { source: source.to_owned(), target: "/data".to_owned(), read_only }
    }

    #[test]
    fn a_volume_has_one_writer_or_many_readers() {
        let (_folder, paths) = Paths::temporary();
        let first = attach(&paths, argument("data", false)).unwrap();
        let second = attach(&paths, argument("data", true)).err().unwrap();
        assert!(matches!(second, VolumeError::InUse(_)), "{second}");
        assert!(matches!(remove(&paths, "data"), Err(VolumeError::InUse(_))));
        drop(first);
        let readers = [true, true].map(|read_only| attach(&paths, argument("data", read_only)));
        assert!(readers.iter().all(Result::is_ok));
        assert!(attach(&paths, argument("data", false)).is_err());
    }

    #[test]
    fn a_container_that_stays_keeps_its_volume() {
        let (_folder, paths) = Paths::temporary();
        for name in ["kept", "free"] {
            create(&paths, name, 32 << 20).unwrap();
        }
        assert!(matches!(create(&paths, "kept", 32 << 20), Err(VolumeError::Exists(_))));
        let config = Config {
            name: "user".to_owned(),
            volumes: vec!["kept".to_owned()],
            ..Config::default()
        };
        Container::create(&paths, config).unwrap().finish(0, false).unwrap();
        assert!(matches!(remove(&paths, "kept"), Err(VolumeError::Used { .. })));
        let info = inspect(&paths, "kept").unwrap();
        assert!(info.size == 32 << 20 && info.used < info.size, "{info:?}");
        assert_eq!(prune(&paths).unwrap().0, ["free"]);
        container::remove(&paths, "user").unwrap();
        remove(&paths, "kept").unwrap();
        assert!(matches!(inspect(&paths, "kept"), Err(VolumeError::Unknown(_))));
    }

    /// docs/hostile.md 23, 26: what is given as a disk and is none.
    #[test]
    fn hostile_23_what_is_no_disk_is_refused() {
        let (folder, paths) = Paths::temporary();
        let refused =
            |path: &Path| attach(&paths, argument(path.to_str().unwrap(), false)).err().unwrap();
        assert!(matches!(refused(folder.path()), VolumeError::Directory(_)));
        let path = folder.path().join("file");
        for content in [&[][..], &[0; 513], &[0; 4096]] {
            fs::write(&path, content).unwrap();
            assert!(matches!(refused(&path), VolumeError::NotExt4(_)));
        }
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(refused(&fifo), VolumeError::NotExt4(_)));
        assert!(matches!(refused(Path::new("/no/such/disk")), VolumeError::File { .. }));
    }

    /// docs/hostile.md 27: its last machine was killed, and its journal is full.
    #[test]
    fn hostile_27_an_unclean_volume_is_refused_read_only() {
        let (_folder, paths) = Paths::temporary();
        create(&paths, "data", 32 << 20).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(file_of(&paths, "data")).unwrap();
        let mut feature = [0];
        file.read_exact_at(&mut feature, 1024 + 0x60).unwrap();
        file.write_all_at(&[feature[0] | 4], 1024 + 0x60).unwrap();
        let error = attach(&paths, argument("data", true)).err().unwrap();
        assert!(matches!(error, VolumeError::Unclean(_)), "{error}");
        attach(&paths, argument("data", false)).unwrap();
    }

    /// docs/hostile.md 27: killed while a volume was made.
    #[test]
    fn hostile_27_a_half_made_volume_is_made_anew() {
        let (_folder, paths) = Paths::temporary();
        let folder = paths.volumes().join("half");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(".tmpAbCdEf"), "a part").unwrap();
        assert!(list(&paths).unwrap().is_empty());
        drop(attach(&paths, argument("half", false)).unwrap());
        assert_eq!(list(&paths).unwrap(), ["half"]);
    }
}
