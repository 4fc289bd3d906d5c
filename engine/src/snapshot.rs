//! Snapshots: machines on disk, from which any number of others is made.
//!
//! ```text
//! snapshots/
//!   .lock             taken while one is begun, finished or removed
//!   .work-*/          one that is being made; its `lock` is held meanwhile
//!   NAME/
//!     manifest.json   what it is, and the sizes and digests of the rest
//!     state           processors and devices, as the VMM writes them
//!     memory          the guest's, sparse; every machine maps it copy-on-write
//!     writable.ext4   the writable layer, where there is one
//! ```
//!
//! A snapshot appears whole under its name or not at all. The image's device is not in it: it is
//! found by the image's id, and must be the very file that the guest knows.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use agent_protocol::Stream;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::agent::{self, AgentError};
use crate::container::{self, ContainerError, Machine, VSOCK};
use crate::disk::{self, DiskError};
use crate::gift::Gift;
use crate::machine_api::{ApiError, MachineApi};
use crate::network::Dns;
use crate::paths::Paths;

/// Version of the folder's layout and of what its guest understands.
const FORMAT: u32 = 1;
/// Most bytes of a file that is read as a whole each time.
const MAX_DIGESTED: u64 = 32 << 20;
const WORK: &str = ".work-";
const MANIFEST: &str = "manifest.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
const WRITABLE: &str = "writable.ext4";

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file of it.
    #[error("{path}: {error}{}", images::room_hint(error))]
    File {
        /// Which.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// The name is taken.
    #[error(
        "snapshot {0} exists already; remove it (vmrun snapshot rm {0}), or choose another name"
    )]
    Exists(String),
    /// There is none.
    #[error("no such snapshot: {0}; vmrun snapshot ls lists those there are")]
    Unknown(String),
    /// It is not what was written.
    #[error("snapshot {name} is damaged: {reason}; remove it and make it again")]
    Damaged {
        /// Its name.
        name: String,
        /// How that shows.
        reason: String,
    },
    /// Another version of this program made it.
    #[error("snapshot {name} was made by vmrun {version}, whose snapshots this one does not read")]
    Version {
        /// Its name.
        name: String,
        /// The other's version.
        version: String,
    },
    /// Its image is another or gone.
    #[error("snapshot {name} needs image {image} ({id}), which was {what}")]
    Image {
        /// Its name.
        name: String,
        /// The image's name.
        image: String,
        /// The image's id.
        id: String,
        /// What became of it.
        what: &'static str,
    },
    /// It has disks that others use too.
    #[error("container {0} has volumes, of which no snapshot can be made")]
    Volumes(String),
    /// The container.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// Its disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Its agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Its VMM.
    #[error(transparent)]
    Machine(#[from] ApiError),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |error| SnapshotError::File { path, error }
}

/// A file as it was when the snapshot was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its name, without its folder.
    pub name: String,
    /// Its bytes.
    pub size: u64,
    /// Its digest, in hexadecimal; not of what is too large to be read each time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

impl FileRecord {
    fn of(path: &Path, digest: bool) -> io::Result<FileRecord> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let sha256 = digest.then(|| hash(path)).transpose()?;
        Ok(FileRecord { name, size: path.metadata()?.len(), sha256 })
    }
}

fn hash(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_DIGESTED).read_to_end(&mut bytes)?;
    Ok(Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The process that runs in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Main {
    /// Its program and arguments.
    pub command: Vec<String>,
    /// Whether it has a terminal.
    pub terminal: bool,
}

impl Main {
    /// The streams that it is given anew.
    pub(crate) fn streams(&self, interactive: bool) -> Vec<Stream> {
        let stdin = interactive.then_some(Stream::Stdin);
        let stderr = (!self.terminal).then_some(Stream::Stderr);
        stdin.into_iter().chain([Stream::Stdout]).chain(stderr).collect()
    }
}

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    format: u32,
    /// Version of the agent protocol that the guest speaks.
    protocol: u32,
    /// Version of the program that made it.
    pub vmrun_version: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The image's name or id, as the user gave it.
    pub image: String,
    /// The image's id.
    pub image_id: String,
    /// The image's device.
    pub root_device: FileRecord,
    /// Name of the kernel, which is in memory and not needed any more.
    pub kernel: String,
    /// The process that runs; none where the machine waits for one.
    pub main: Option<Main>,
    /// Memory in MiB.
    pub memory_mib: usize,
    /// Number of virtual processors.
    pub cpus: u8,
    /// Whether it has a network interface.
    pub network: bool,
    /// Name resolution, where it is not the host's.
    pub dns: Dns,
    /// Lines for /etc/hosts: name and address.
    pub extra_hosts: Vec<(String, String)>,
    files: Vec<FileRecord>,
}

/// What of a snapshot its maker knows best.
pub(crate) struct Origin {
    pub image: String,
    pub image_id: String,
    pub kernel: String,
    pub main: Option<Main>,
    pub dns: Dns,
    pub extra_hosts: Vec<(String, String)>,
}

/// A snapshot that is there.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// What it is.
    pub manifest: Manifest,
    folder: PathBuf,
}

impl Snapshot {
    /// The snapshot of this name, whole as far as that can be seen quickly.
    pub fn open(paths: &Paths, name: &str) -> Result<Snapshot, SnapshotError> {
        let unknown = || SnapshotError::Unknown(name.to_owned());
        let folder = folder_of(paths, name).ok_or_else(unknown)?;
        if !folder.is_dir() {
            return Err(unknown());
        }
        let damaged = |reason: String| SnapshotError::Damaged { name: name.to_owned(), reason };
        let manifest = read_manifest(&folder).map_err(|error| damaged(error.to_string()))?;
        if (manifest.format, manifest.protocol) != (FORMAT, agent_protocol::VERSION) {
            let version = manifest.vmrun_version.clone();
            return Err(SnapshotError::Version { name: name.to_owned(), version });
        }
        for name in [STATE, MEMORY] {
            if !manifest.files.iter().any(|file| file.name == name) {
                return Err(damaged(format!("its manifest names no {name}")));
            }
        }
        for file in &manifest.files {
            let path = folder.join(Path::new(&file.name).file_name().unwrap_or_default());
            let now = FileRecord::of(&path, file.sha256.is_some())
                .map_err(|error| damaged(format!("{}: {error}", path.display())))?;
            if now != *file {
                return Err(damaged(format!("{} is not what was written", path.display())));
            }
        }
        Ok(Snapshot { name: name.to_owned(), manifest, folder })
    }

    /// The VMM's file.
    pub fn state(&self) -> PathBuf {
        self.folder.join(STATE)
    }

    /// The guest's memory.
    pub fn memory(&self) -> PathBuf {
        self.folder.join(MEMORY)
    }

    /// The writable layer.
    pub fn writable(&self) -> Option<PathBuf> {
        let files = &self.manifest.files;
        files.iter().any(|file| file.name == WRITABLE).then(|| self.folder.join(WRITABLE))
    }

    /// Refuses a device that is not the one that the guest has seen.
    pub fn check_root_device(&self, path: &Path) -> Result<(), SnapshotError> {
        if FileRecord::of(path, false).map_err(at(path))? == self.manifest.root_device {
            return Ok(());
        }
        Err(self.image_error("converted anew"))
    }

    /// The image cannot be used, for it was this.
    pub fn image_error(&self, what: &'static str) -> SnapshotError {
        SnapshotError::Image {
            name: self.name.clone(),
            image: self.manifest.image.clone(),
            id: self.manifest.image_id.clone(),
            what,
        }
    }

    /// Bytes that it takes on disk.
    pub fn disk_usage(&self) -> u64 {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some(entry.metadata().ok()?.blocks() * 512)).sum()
    }
}

fn read_manifest(folder: &Path) -> io::Result<Manifest> {
    serde_json::from_slice(&fs::read(folder.join(MANIFEST))?).map_err(io::Error::from)
}

/// Where a snapshot of this name is; `None` where none can have it.
fn folder_of(paths: &Paths, name: &str) -> Option<PathBuf> {
    crate::spec::check_name("the snapshot's name", name).ok()?;
    Some(paths.snapshots().join(name))
}

/// All snapshots, the newest first. One that is damaged is not in the way of others.
pub fn list(paths: &Paths) -> Result<Vec<Snapshot>, SnapshotError> {
    let all = paths.snapshots();
    let entries = match fs::read_dir(&all) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(at(&all))?,
    };
    let read = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let folder = folder_of(paths, &name)?;
        match read_manifest(&folder) {
            Ok(manifest) => Some(Snapshot { name, manifest, folder }),
            Err(error) => {
                tracing::warn!("snapshot {name} is damaged: {error}");
                None
            }
        }
    };
    let mut snapshots: Vec<_> = entries.flatten().filter_map(read).collect();
    snapshots.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.manifest.created));
    Ok(snapshots)
}

/// Ids of the images that snapshots need.
pub fn image_ids(paths: &Paths) -> Result<Vec<String>, SnapshotError> {
    Ok(list(paths)?.into_iter().map(|snapshot| snapshot.manifest.image_id).collect())
}

/// Removes a snapshot. Machines that were made of it have what they need of it open.
pub fn remove(paths: &Paths, name: &str) -> Result<(), SnapshotError> {
    let unknown = || SnapshotError::Unknown(name.to_owned());
    let folder = folder_of(paths, name).filter(|path| path.is_dir()).ok_or_else(unknown)?;
    let _guard = guard(paths)?;
    // At once out of sight: killed meanwhile, this leaves no half of a snapshot.
    let grave = paths.snapshots().join(format!("{WORK}removed-{name}"));
    fs::rename(&folder, &grave).map_err(at(&folder))?;
    fs::remove_dir_all(&grave).map_err(at(&grave))
}

/// Waits for the lock on all snapshots, and removes what those who were killed have left.
fn guard(paths: &Paths) -> Result<Flock<File>, SnapshotError> {
    let all = paths.snapshots();
    DirBuilder::new().recursive(true).mode(0o700).create(&all).map_err(at(&all))?;
    let path = all.join(".lock");
    let file = File::create(&path).map_err(at(&path))?;
    let guard =
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| at(&path)(error.into()))?;
    for entry in fs::read_dir(&all).map_err(at(&all))?.flatten() {
        let dead = || lock_work(&entry.path()).is_ok_and(|lock| lock.is_some());
        if entry.file_name().to_string_lossy().starts_with(WORK) && dead() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(guard)
}

/// The lock of a folder under way; `None` where another holds it.
fn lock_work(folder: &Path) -> io::Result<Option<Flock<File>>> {
    let file = File::create(folder.join("lock"))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error.into()),
    }
}

/// A snapshot that is being made. Nothing is left of it where it is not finished.
pub(crate) struct Work {
    paths: Paths,
    name: String,
    folder: tempfile::TempDir,
    _lock: Option<Flock<File>>,
}

impl Work {
    /// Begins a snapshot of a name that is free.
    pub(crate) fn begin(paths: &Paths, name: &str) -> Result<Work, SnapshotError> {
        let _guard = guard(paths)?;
        let all = paths.snapshots();
        if all.join(name).exists() {
            return Err(SnapshotError::Exists(name.to_owned()));
        }
        let folder = tempfile::Builder::new().prefix(WORK).tempdir_in(&all).map_err(at(&all))?;
        let lock = lock_work(folder.path()).map_err(at(folder.path()))?;
        Ok(Work { paths: paths.clone(), name: name.to_owned(), folder, _lock: lock })
    }

    /// Has the machine whose sockets are in `run`, which stands still meanwhile, written with its
    /// writable layer.
    pub(crate) fn take(&self, run: &Path, writable: Option<&Path>) -> Result<(), SnapshotError> {
        let api = MachineApi::of(run);
        api.pause()?;
        let written = self.copy(&api, run, writable);
        // Whatever went wrong, the machine runs on.
        api.resume()?;
        written
    }

    fn copy(
        &self,
        api: &MachineApi,
        run: &Path,
        writable: Option<&Path>,
    ) -> Result<(), SnapshotError> {
        let folder = self.folder.path();
        // The VMM can make no file; those that it is to write are handed to it.
        let give = |name: &str| {
            let path = folder.join(name);
            let mut options = File::options();
            options.read(true).write(true).create_new(true).mode(0o600);
            let file = options.open(&path).map_err(at(&path))?;
            let socket = run.join(format!("give-{name}"));
            Gift::offer(&socket, file).map_err(at(&socket))
        };
        let (state, memory) = (give(STATE)?, give(MEMORY)?);
        api.create_snapshot(state.path(), memory.path())?;
        if let Some(path) = writable {
            disk::copy(path, &folder.join(WRITABLE))?;
        }
        Ok(())
    }

    /// Gives it its name.
    pub(crate) fn finish(self, machine: &Machine, origin: Origin) -> Result<(), SnapshotError> {
        let folder = self.folder.path();
        let mut files = Vec::new();
        for name in [STATE, MEMORY, WRITABLE] {
            let path = folder.join(name);
            if path.exists() {
                File::open(&path).and_then(|file| file.sync_all()).map_err(at(&path))?;
                files.push(FileRecord::of(&path, name == STATE).map_err(at(&path))?);
            }
        }
        let device = &machine.root_device;
        let Origin { image, image_id, kernel, main, dns, extra_hosts } = origin;
        let manifest = Manifest {
            format: FORMAT,
            protocol: agent_protocol::VERSION,
            vmrun_version: env!("CARGO_PKG_VERSION").to_owned(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |it| it.as_secs()),
            image,
            image_id,
            root_device: FileRecord::of(device, false).map_err(at(device))?,
            kernel,
            main,
            memory_mib: machine.memory_mib,
            cpus: machine.cpus,
            network: machine.network,
            dns,
            extra_hosts,
            files,
        };
        let path = folder.join(MANIFEST);
        let write = || {
            let mut file = File::create(&path)?;
            file.write_all(&serde_json::to_vec_pretty(&manifest)?)?;
            file.sync_all()?;
            File::open(folder)?.sync_all()
        };
        write().map_err(at(&path))?;
        let _guard = guard(&self.paths)?;
        // While the guard is held nobody takes the folder for one that was left.
        let _ = fs::remove_file(folder.join("lock"));
        let target = self.paths.snapshots().join(&self.name);
        let (here, how) = (rustix::fs::CWD, rustix::fs::RenameFlags::NOREPLACE);
        match rustix::fs::renameat_with(here, folder, here, &target, how) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Err(SnapshotError::Exists(self.name)),
            Err(error) => return Err(at(&target)(error.into())),
        }
        // There is nothing left to remove.
        let _ = self.folder.keep();
        let all = self.paths.snapshots();
        File::open(&all).and_then(|folder| folder.sync_all()).map_err(at(&all))
    }
}

/// Makes a snapshot of a container that runs, and goes on running.
pub fn create(paths: &Paths, container: &str, name: &str) -> Result<(), SnapshotError> {
    let other = container::running(paths, container)?;
    let work = Work::begin(paths, name)?;
    let api = MachineApi::of(&other.run);
    // One that was killed half-way has left the machine standing still.
    api.resume()?;
    if other.config.machine.volumes > 0 {
        return Err(SnapshotError::Volumes(other.config.name));
    }
    // The end of the machine is the end of its sockets, which is as good as its pidfd.
    let (machine, _held) = nix::unistd::pipe().map_err(|error| at(&other.run)(error.into()))?;
    let held = agent::hold_still(&other.run.join(VSOCK), machine.as_fd())?;
    work.take(&other.run, other.writable().as_deref())?;
    drop(held);
    let config = other.config;
    let machine = config.machine;
    let origin = Origin {
        image: config.image,
        image_id: config.image_id,
        kernel: config.kernel,
        main: Some(Main { command: config.command, terminal: config.terminal }),
        dns: config.dns,
        extra_hosts: config.extra_hosts,
    };
    work.finish(&machine, origin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin() -> Origin {
        Origin {
            image: "i".to_owned(),
            image_id: "sha256:0".to_owned(),
            kernel: "6.1".to_owned(),
            main: Some(Main { command: vec!["x".to_owned()], terminal: false }),
            dns: Dns::default(),
            extra_hosts: Vec::new(),
        }
    }

    /// Makes a snapshot as if a VMM had written it.
    fn make(paths: &Paths, name: &str) -> Result<(), SnapshotError> {
        let work = Work::begin(paths, name)?;
        let device = paths.state().join("device");
        fs::write(&device, "image").unwrap();
        for (name, text) in [(STATE, "state"), (MEMORY, "memory"), (WRITABLE, "disk")] {
            fs::write(work.folder.path().join(name), text).unwrap();
        }
        let machine = Machine { root_device: device, ..Machine::default() };
        work.finish(&machine, origin())
    }

    fn entries(paths: &Paths) -> usize {
        let entries = fs::read_dir(paths.snapshots()).unwrap().flatten();
        entries.filter(|entry| entry.file_name() != ".lock").count()
    }

    #[test]
    fn a_snapshot_is_made_found_and_removed() {
        let (_folder, paths) = Paths::temporary();
        assert!(list(&paths).unwrap().is_empty());
        make(&paths, "one").unwrap();
        assert!(matches!(make(&paths, "one"), Err(SnapshotError::Exists(_))));
        let found = Snapshot::open(&paths, "one").unwrap();
        assert_eq!(found.manifest.main, origin().main);
        assert_eq!(fs::read(found.memory()).unwrap(), b"memory");
        assert_eq!(fs::read(found.writable().unwrap()).unwrap(), b"disk");
        found.check_root_device(&paths.state().join("device")).unwrap();
        assert!(matches!(
            found.check_root_device(&found.memory()),
            Err(SnapshotError::Image { .. })
        ));
        assert_eq!((list(&paths).unwrap().len(), entries(&paths)), (1, 1));
        for name in ["two", "", ".", "..", "../one", ".work-x", "one/"] {
            let error = Snapshot::open(&paths, name).unwrap_err();
            assert!(matches!(error, SnapshotError::Unknown(_)), "{name}: {error}");
            assert!(matches!(remove(&paths, name), Err(SnapshotError::Unknown(_))), "{name}");
        }
        remove(&paths, "one").unwrap();
        assert_eq!((list(&paths).unwrap().len(), entries(&paths)), (0, 0));
    }

    #[test]
    fn nothing_is_left_of_one_that_was_not_finished() {
        let (_folder, paths) = Paths::temporary();
        drop(Work::begin(&paths, "dropped").unwrap());
        assert_eq!(entries(&paths), 0);
        // Killed: nobody drops it, and its lock is free.
        let killed = Work::begin(&paths, "killed").unwrap();
        let folder = killed.folder.keep();
        fs::write(folder.join(MEMORY), "half").unwrap();
        drop(killed._lock);
        let alive = Work::begin(&paths, "alive").unwrap();
        assert!(!folder.exists() && alive.folder.path().exists());
        assert!(list(&paths).unwrap().is_empty());
        make(&paths, "whole").unwrap();
        assert!(alive.folder.path().exists(), "another's work was taken for left");
    }

    #[test]
    fn a_damaged_one_is_said_to_be_so_and_not_in_the_way() {
        let (_folder, paths) = Paths::temporary();
        make(&paths, "good").unwrap();
        type Spoil<'a> = (&'a str, &'a dyn Fn(&Path));
        let spoil: [Spoil; 5] = [
            (STATE, &|path| fs::write(path, "STATE").unwrap()),
            (MEMORY, &|path| fs::write(path, "mem").unwrap()),
            (WRITABLE, &|path| fs::remove_file(path).unwrap()),
            (MANIFEST, &|path| fs::write(path, "{").unwrap()),
            (MANIFEST, &|path| {
                let text = fs::read_to_string(path).unwrap();
                fs::write(path, text.replace("\"memory\"", "\"../good/memory\"")).unwrap();
            }),
        ];
        for (index, (file, spoil)) in spoil.into_iter().enumerate() {
            let name = format!("bad{index}");
            make(&paths, &name).unwrap();
            spoil(&paths.snapshots().join(&name).join(file));
            let error = Snapshot::open(&paths, &name).unwrap_err();
            assert!(matches!(error, SnapshotError::Damaged { .. }), "{file}: {error}");
            assert_eq!(error.to_string().lines().count(), 1, "{error}");
        }
        assert!(list(&paths).unwrap().iter().any(|snapshot| snapshot.name == "good"));
        remove(&paths, "bad3").unwrap();

        let path = paths.snapshots().join("good").join(MANIFEST);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
        let error = Snapshot::open(&paths, "good").unwrap_err();
        assert!(matches!(error, SnapshotError::Version { .. }), "{error}");
    }
}
