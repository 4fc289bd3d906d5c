//! A container's folder, name and lock.
//!
//! ```text
//! containers/
//!   .lock                taken while a container is made or removed
//!   <64 hex digits>/
//!     lock               held as long as anything of the container runs
//!     config.json        what it is; written once
//!     status.json        how it ended; written once
//!     writable.ext4      its writable layer
//!     cgroup             path of the cgroup that its VMM is in
//!     vm.json  console.log  vmm.log
//! ```
//!
//! The lock is an open file description that the VMM inherits. So it is free exactly when the
//! command and the VMM are both gone, whatever ended them, and everyone can see that.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::making::Making;
use crate::network::Dns;
use crate::paths::Paths;

/// Name of the vsock device's socket.
pub const VSOCK: &str = "v";
/// Name of the writable layer.
const WRITABLE: &str = "writable.ext4";
/// Where the path of its VMM's cgroup is.
const CGROUP: &str = "cgroup";

/// Why a container cannot be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// A file of it.
    #[error("{path}: {error}{}", images::room_hint(error))]
    File {
        /// Which.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// Another has the name.
    #[error(
        "the container name {name:?} is already in use by container {id}; remove that (vmrun rm {name}), or choose another"
    )]
    NameInUse {
        /// The name.
        name: String,
        /// The other's short id.
        id: String,
    },
    /// There is none.
    #[error("no such container: {0}")]
    Unknown(String),
    /// Several begin so.
    #[error("several containers begin with {0}; give more digits")]
    Ambiguous(String),
    /// It runs.
    #[error("container {0} is running; stop it first")]
    Running(String),
    /// It does not.
    #[error("container {0} is not running")]
    NotRunning(String),
    /// No random numbers.
    #[error("cannot get random numbers: {0}")]
    Random(io::Error),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> ContainerError {
    let path = path.to_owned();
    move |error| ContainerError::File { path, error }
}

/// What a container is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Config {
    /// 64 hexadecimal digits.
    pub id: String,
    /// Unique among containers.
    pub name: String,
    /// The image's name or id, as the user gave it.
    pub image: String,
    /// The image's id.
    pub image_id: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Seconds since 1970.
    pub created: u64,
    /// Removed at its end.
    pub remove: bool,
    /// The user's labels.
    #[serde(default)]
    pub labels: Vec<String>,
    /// Names of the volumes it uses.
    #[serde(default)]
    pub volumes: Vec<String>,
    /// Name of its kernel.
    #[serde(default)]
    pub kernel: String,
    /// Whether its process has a terminal.
    #[serde(default)]
    pub terminal: bool,
    /// Name resolution, where it is not the host's.
    #[serde(default)]
    pub dns: Dns,
    /// Lines for /etc/hosts: name and address.
    #[serde(default)]
    pub extra_hosts: Vec<(String, String)>,
    /// Its machine.
    #[serde(default)]
    pub machine: Machine,
}

/// What a container's machine is made of. Its VMM would say so too, but what a guest may have broken
/// into is not asked which files are its own.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    /// The image's device.
    pub root_device: PathBuf,
    /// Memory in MiB.
    pub memory_mib: usize,
    /// Number of virtual processors.
    pub cpus: u8,
    /// Whether it has a network interface.
    pub network: bool,
    /// Whether it has a writable layer.
    pub writable: bool,
    /// Number of volumes.
    pub volumes: usize,
}

/// How a container ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Exit status.
    pub exit_code: u8,
    /// Killed for want of memory.
    pub out_of_memory: bool,
    /// Seconds since 1970.
    pub finished: u64,
}

/// A container as others see it.
#[derive(Clone, Debug)]
pub struct Listed {
    /// What it is.
    pub config: Config,
    /// Whether it runs.
    pub running: bool,
    /// How it ended, where that is known.
    pub status: Option<Status>,
}

/// A container that this process has made and holds.
pub struct Container {
    /// What it is.
    pub config: Config,
    folder: PathBuf,
    run: PathBuf,
    all: PathBuf,
    lock: Flock<File>,
}

impl Container {
    /// Makes a container; `config` without an id or with an empty name gets one. What others have
    /// left behind is cleared first.
    pub fn create(paths: &Paths, mut config: Config) -> Result<Container, ContainerError> {
        let all = paths.containers();
        fs::create_dir_all(&all).map_err(at(&all))?;
        let _guard = guard(&all)?;
        let others = reap(paths)?;
        config.id = random_id()?;
        let taken = |name: &str| others.iter().find(|other| other.config.name == name);
        if config.name.is_empty() {
            config.name = loop {
                let name = crate::names::random().map_err(ContainerError::Random)?;
                if taken(&name).is_none() {
                    break name;
                }
            };
        } else if let Some(other) = taken(&config.name) {
            let id = short(&other.config.id).to_owned();
            return Err(ContainerError::NameInUse { name: config.name, id });
        }
        config.created = now();
        let folder = all.join(&config.id);
        DirBuilder::new().mode(0o700).create(&folder).map_err(at(&folder))?;
        let lock = lock(&folder, FlockArg::LockExclusiveNonblock)?
            .ok_or_else(|| ContainerError::Running(config.id.clone()))?;
        write_whole(&folder.join("config.json"), &config)?;
        let run = run_folder(paths, &config.id);
        // Its VMM, which is another user, goes through it to sockets; the folder above is closed.
        DirBuilder::new().create(&run).map_err(at(&run))?;
        fs::set_permissions(&run, fs::Permissions::from_mode(0o711)).map_err(at(&run))?;
        Ok(Container { config, folder, run, all, lock })
    }

    /// A file of its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Its writable layer, where it has one.
    pub fn writable(&self) -> Option<PathBuf> {
        self.config.machine.writable.then(|| self.path(WRITABLE))
    }

    /// The folder of its files, where the host has no room for more in it.
    pub fn full_folder(&self) -> Option<&Path> {
        /// Bytes with which a file system does not go on.
        const NO_ROOM: u64 = 1 << 20;
        let room = rustix::fs::statvfs(&self.folder).ok()?;
        (room.f_bavail.saturating_mul(room.f_frsize) < NO_ROOM).then_some(&self.folder)
    }

    /// Where its sockets are.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// Records where its VMM's cgroup is, before that is made.
    pub fn set_cgroup(&self, folder: &Path) -> Result<(), ContainerError> {
        let path = self.path(CGROUP);
        fs::write(&path, folder.as_os_str().as_encoded_bytes()).map_err(at(&path))
    }

    /// Whether the host killed its VMM because what that may use of memory was used up.
    pub fn was_killed_for_memory(&self) -> bool {
        fs::read(self.path(CGROUP)).is_ok_and(|cgroup| has_oom_kill(OsStr::from_bytes(&cgroup)))
    }

    /// Its lock, for the VMM to inherit.
    pub fn lock(&self) -> &File {
        &self.lock
    }

    /// Records its end, and removes what is not to stay.
    pub fn finish(self, exit_code: u8, out_of_memory: bool) -> Result<(), ContainerError> {
        if self.config.remove {
            return self.discard();
        }
        let _ = fs::remove_dir_all(&self.run);
        remove_cgroup(&self.folder);
        let status = Status { exit_code, out_of_memory, finished: now() };
        write_whole(&self.folder.join("status.json"), &status)
    }

    /// Removes it with all it wrote.
    pub fn discard(self) -> Result<(), ContainerError> {
        let _guard = guard(&self.all)?;
        remove_folder(&self.run)?;
        if !remove_cgroup(&self.folder) && self.config.remove {
            // The next command does.
            return Ok(());
        }
        remove_folder(&self.folder)
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The first twelve digits of an id.
pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

fn run_folder(paths: &Paths, id: &str) -> PathBuf {
    paths.run().join(short(id))
}

/// Whether a process in this cgroup was killed for want of memory (`memory.events` of cgroup v2).
fn has_oom_kill(cgroup: impl AsRef<Path>) -> bool {
    let events = fs::read_to_string(cgroup.as_ref().join("memory.events")).unwrap_or_default();
    let counts = events.lines().filter_map(|line| line.strip_prefix("oom_kill "));
    counts.filter_map(|count| count.trim().parse::<u64>().ok()).any(|count| count > 0)
}

/// Removes a folder with all in it, which may be gone already. That of its files is the last of a
/// container: as long as it is there, the next command clears up what this one could not.
fn remove_folder(path: &Path) -> Result<(), ContainerError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path)(error)),
        _ => Ok(()),
    }
}

/// Removes the cgroup of a VMM that is gone; false where something of that is still in it: its files
/// are closed a little earlier.
fn remove_cgroup(folder: &Path) -> bool {
    let path = folder.join(CGROUP);
    let Ok(cgroup) = fs::read(&path) else { return true };
    // Only an empty one can be removed, so nothing is lost by a wrong one.
    match fs::remove_dir(OsStr::from_bytes(&cgroup)) {
        Err(error)
            if [io::ErrorKind::ResourceBusy, io::ErrorKind::DirectoryNotEmpty]
                .contains(&error.kind()) =>
        {
            return false;
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return true,
        _ => {}
    }
    let _ = fs::remove_file(&path);
    true
}

fn random_id() -> Result<String, ContainerError> {
    let mut bytes = [0; 32];
    crate::random::fill(&mut bytes).map_err(ContainerError::Random)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn open_lock(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW).open(path)
}

/// Waits for the lock on all containers.
fn guard(all: &Path) -> Result<Flock<File>, ContainerError> {
    let path = all.join(".lock");
    let file = open_lock(&path).map_err(at(&path))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| at(&path)(error.into()))
}

/// Takes a container's lock; `None` where another holds it.
fn lock(folder: &Path, how: FlockArg) -> Result<Option<Flock<File>>, ContainerError> {
    let path = folder.join("lock");
    let file = open_lock(&path).map_err(at(&path))?;
    match Flock::lock(file, how) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(at(&path)(error.into())),
    }
}

fn write_whole(path: &Path, value: &impl Serialize) -> Result<(), ContainerError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let write = || {
        let mut making = Making::begin(folder)?;
        making.file().write_all(&serde_json::to_vec_pretty(value)?)?;
        making.replace(path)
    };
    write().map_err(at(path))
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Removes what is left of containers that nobody holds and nobody wants, and returns the rest. The
/// caller holds the lock on all. What cannot be removed is no reason to run nothing any more.
fn reap(paths: &Paths) -> Result<Vec<Listed>, ContainerError> {
    let all = paths.containers();
    let mut rest = Vec::new();
    for entry in fs::read_dir(&all).map_err(at(&all))?.flatten() {
        // Only what a container made is a container's.
        if let Some(id) = entry.file_name().to_str().filter(|name| is_id(name)) {
            match reap_one(paths, id, &entry.path()) {
                Ok(listed) => rest.extend(listed),
                Err(error) => tracing::warn!("cannot clear up: {error}"),
            }
        }
    }
    rest.sort_by_key(|listed| std::cmp::Reverse(listed.config.created));
    Ok(rest)
}

fn is_id(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn reap_one(paths: &Paths, id: &str, folder: &Path) -> Result<Option<Listed>, ContainerError> {
    let running = lock(folder, FlockArg::LockExclusiveNonblock)?.is_none();
    let path = folder.join("config.json");
    let config = match read::<Config>(&path) {
        Some(config) => Some(config),
        // A file that the power's end has spoiled does not make the container's data worthless.
        None if path.exists() => {
            Some(Config { id: id.to_owned(), name: short(id).to_owned(), ..Config::default() })
        }
        // Whoever made it was killed before it was whole.
        None => None,
    };
    let mut is_over = !running;
    if !running {
        remove_folder(&run_folder(paths, id))?;
        is_over = remove_cgroup(folder);
    }
    match config {
        Some(config) if running || !config.remove => {
            let status = read(&folder.join("status.json"));
            Ok(Some(Listed { config, running, status }))
        }
        _ if !is_over => Ok(None),
        _ => remove_folder(folder).map(|()| None),
    }
}

/// All containers, the newest first.
pub fn list(paths: &Paths) -> Result<Vec<Listed>, ContainerError> {
    let all = paths.containers();
    if !all.exists() {
        return Ok(Vec::new());
    }
    let _guard = guard(&all)?;
    reap(paths)
}

/// The one of this name or id, or whose id begins so.
fn find(listed: Vec<Listed>, wanted: &str) -> Result<Listed, ContainerError> {
    let named = |one: &Listed| one.config.name == wanted || one.config.id == wanted;
    if let Some(found) = listed.iter().find(|one| named(one)) {
        return Ok(found.clone());
    }
    let mut begin = listed.into_iter().filter(|one| one.config.id.starts_with(wanted));
    match (begin.next(), begin.next()) {
        (Some(found), None) if !wanted.is_empty() => Ok(found),
        (Some(_), Some(_)) => Err(ContainerError::Ambiguous(wanted.to_owned())),
        _ => Err(ContainerError::Unknown(wanted.to_owned())),
    }
}

/// A container that another process holds.
pub struct Other {
    /// What it is.
    pub config: Config,
    /// Where its sockets are.
    pub run: PathBuf,
    /// Where its files are.
    pub folder: PathBuf,
}

impl Other {
    /// Its writable layer, where it has one.
    pub fn writable(&self) -> Option<PathBuf> {
        self.config.machine.writable.then(|| self.folder.join(WRITABLE))
    }
}

/// A container that runs, by name or the begin of its id.
pub fn running(paths: &Paths, wanted: &str) -> Result<Other, ContainerError> {
    let Listed { config, running, .. } = find(list(paths)?, wanted)?;
    if !running {
        return Err(ContainerError::NotRunning(config.name));
    }
    let folder = paths.containers().join(&config.id);
    Ok(Other { run: run_folder(paths, &config.id), folder, config })
}

/// Removes a container that does not run, by name or the begin of its id; its name.
pub fn remove(paths: &Paths, wanted: &str) -> Result<(), ContainerError> {
    let all = paths.containers();
    fs::create_dir_all(&all).map_err(at(&all))?;
    let _guard = guard(&all)?;
    let found = find(reap(paths)?, wanted)?;
    if found.running {
        return Err(ContainerError::Running(found.config.name));
    }
    let folder = all.join(&found.config.id);
    if !remove_cgroup(&folder) {
        return Err(ContainerError::Running(found.config.name));
    }
    remove_folder(&folder)
}

/// Ids of the images that containers were made of.
pub fn image_ids(paths: &Paths) -> Result<Vec<String>, ContainerError> {
    Ok(list(paths)?.into_iter().map(|listed| listed.config.image_id).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(name: &str, remove: bool) -> Config {
        Config {
            name: name.to_owned(),
            image: "i".to_owned(),
            image_id: "sha256:0".to_owned(),
            command: vec!["x".to_owned()],
            remove,
            ..Config::default()
        }
    }

    #[test]
    fn a_container_lives_is_listed_and_removed() {
        let (_folder, paths) = Paths::temporary();
        let container = Container::create(&paths, config("one", false)).unwrap();
        assert!(list(&paths).unwrap()[0].running);
        assert!(matches!(remove(&paths, "one"), Err(ContainerError::Running(_))));
        let again = Container::create(&paths, config("one", false)).err().unwrap();
        assert!(matches!(again, ContainerError::NameInUse { .. }), "{again}");
        let id = container.config.id.clone();
        container.finish(7, false).unwrap();
        let listed = list(&paths).unwrap();
        assert_eq!(listed[0].status.as_ref().unwrap().exit_code, 7);
        assert!(!listed[0].running);
        remove(&paths, &id[..4]).unwrap();
        assert!(matches!(remove(&paths, &id), Err(ContainerError::Unknown(_))));
        assert!(matches!(remove(&paths, ""), Err(ContainerError::Unknown(_))));
    }

    #[test]
    fn hostile_26_a_kill_for_memory_is_told_from_others() {
        let cgroup = tempfile::tempdir().unwrap();
        let events = |text: &str| fs::write(cgroup.path().join("memory.events"), text).unwrap();
        assert!(!has_oom_kill(cgroup.path()));
        events("low 0\nmax 12\noom 1\noom_kill 0\noom_group_kill 3\n");
        assert!(!has_oom_kill(cgroup.path()));
        events("low 0\nmax 12\noom 1\noom_kill 2\noom_group_kill 0\n");
        assert!(has_oom_kill(cgroup.path()));
    }

    /// docs/hostile.md 27: whoever held it was killed.
    #[test]
    fn hostile_27_what_the_dead_leave_is_cleared() {
        let (_folder, paths) = Paths::temporary();
        let container = Container::create(&paths, config("gone", true)).unwrap();
        let (folder, run) = (container.folder.clone(), container.run.clone());
        // Dropping without finishing is what the kernel does to a killed process's locks.
        drop(container);
        assert!(folder.exists() && run.exists());
        // Half made: no config yet.
        fs::create_dir(paths.containers().join("a".repeat(64))).unwrap();
        let next = Container::create(&paths, config("gone", true)).unwrap();
        assert!(!folder.exists() && !run.exists());
        assert_eq!(list(&paths).unwrap().len(), 1);
        next.finish(0, false).unwrap();
        assert_eq!(fs::read_dir(paths.containers()).unwrap().count(), 1, "only the lock stays");
    }

    /// docs/hostile.md 27: the VMM has let go of its lock, and is not out of its cgroup yet.
    #[test]
    fn hostile_27_a_cgroup_that_is_still_in_use_is_removed_later() {
        let (outside, paths) = Paths::temporary();
        let container = Container::create(&paths, config("ending", true)).unwrap();
        let (folder, cgroup) = (container.folder.clone(), outside.path().join("cgroup"));
        fs::create_dir_all(cgroup.join("in-use")).unwrap();
        container.set_cgroup(&cgroup).unwrap();
        drop(container);
        assert!(list(&paths).unwrap().is_empty(), "the name is free");
        assert!(folder.exists() && cgroup.exists());
        fs::remove_dir(cgroup.join("in-use")).unwrap();
        assert!(list(&paths).unwrap().is_empty());
        assert!(!folder.exists() && !cgroup.exists());
    }

    /// docs/hostile.md 26, 27: a description lost with the power, and folders of others.
    #[test]
    fn hostile_27_a_spoiled_container_is_kept_and_in_nobodys_way() {
        let (_folder, paths) = Paths::temporary();
        let container = Container::create(&paths, config("spoiled", true)).unwrap();
        let (folder, id) = (container.folder.clone(), container.config.id.clone());
        drop(container);
        fs::write(folder.join("config.json"), "").unwrap();
        let foreign = paths.containers().join("lost+found");
        fs::create_dir(&foreign).unwrap();
        // Its lock cannot be taken, for it is a folder.
        let broken = paths.containers().join("b".repeat(64));
        fs::create_dir_all(broken.join("lock")).unwrap();
        Container::create(&paths, config("next", true)).unwrap().finish(0, false).unwrap();
        assert!(folder.exists() && foreign.exists() && broken.exists());
        let listed = list(&paths).unwrap();
        assert_eq!(listed.len(), 1);
        assert!(!listed[0].running && listed[0].config.name == short(&id));
        remove(&paths, &id).unwrap();
        assert!(!folder.exists());
    }

    /// docs/hostile.md 28: two at once on one name.
    #[test]
    fn hostile_28_one_of_many_gets_the_name() {
        let (_folder, paths) = Paths::temporary();
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let paths = paths.clone();
                std::thread::spawn(move || Container::create(&paths, config("same", false)).ok())
            })
            .collect();
        let made: Vec<_> = threads.into_iter().filter_map(|t| t.join().unwrap()).collect();
        assert_eq!(made.len(), 1);
    }
}
