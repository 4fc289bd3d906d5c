//! What a confined process sees of files.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::mount::MsFlags;
use nix::unistd::{Gid, Uid};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use crate::Root;
use crate::error::{JailError, Step};

fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> JailError {
    JailError::step(Step::Namespaces, format!("root: {}", what.into()))
}

/// Where the new root is mounted for a moment: a folder that every host has.
const PLACE: &str = "/proc";

/// A mount to take along.
struct Mount {
    path: PathBuf,
    /// Made while this process has the host's privileges, where it has any: the user that it will be
    /// may not come as far.
    tree: Option<OwnedFd>,
}

impl Mount {
    fn new(path: &Path) -> Result<Mount, JailError> {
        let tree = match open_tree(path) {
            Ok(tree) => Some(tree),
            Err(rustix::io::Errno::PERM) => None,
            Err(error) => return Err(failed(path.display().to_string())(error)),
        };
        Ok(Mount { path: path.to_owned(), tree })
    }

    fn open(&mut self) -> Result<OwnedFd, JailError> {
        match self.tree.take() {
            Some(tree) => Ok(tree),
            None => open_tree(&self.path).map_err(failed(self.path.display().to_string())),
        }
    }
}

/// A copy of the mount that a path is in, beginning there, which is not mounted anywhere.
fn open_tree(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, path, flags | OpenTreeFlags::AT_SYMLINK_NOFOLLOW)
}

/// A root that is ready but for the new mount namespace.
pub struct Prepared {
    folder: Option<Mount>,
    below: Vec<(Mount, bool)>,
}

impl Prepared {
    /// Does what needs the host's privileges. A folder that is to be the root belongs to the user
    /// afterwards.
    pub fn new(root: &Root, uid: u32, gid: u32) -> Result<Prepared, JailError> {
        match root {
            Root::Empty { visible } => {
                let below = visible.iter().map(|path| Ok((Mount::new(path)?, true)));
                Ok(Prepared { folder: None, below: below.collect::<Result<_, JailError>>()? })
            }
            Root::Folder { path, nodes } => {
                make_folder(path, uid, gid)?;
                let there = |path: &&PathBuf| {
                    path.symlink_metadata().is_ok_and(|it| it.file_type().is_char_device())
                };
                let nodes = nodes.iter().filter(there);
                let below = nodes.map(|path| Ok((Mount::new(path)?, false)));
                let below = below.collect::<Result<_, JailError>>()?;
                Ok(Prepared { folder: Some(Mount::new(path)?), below })
            }
        }
    }

    /// Has the process, which has a mount namespace of its own, in the new root.
    pub fn enter(&mut self) -> Result<(), JailError> {
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).map_err(failed("private mounts"))?;
        let empty = self.folder.is_none();
        let new_root = match &mut self.folder {
            Some(folder) => folder.open()?,
            None => empty_root().map_err(failed("tmpfs"))?,
        };
        let below: Vec<_> = self
            .below
            .iter_mut()
            .map(|(mount, folder)| Ok((mount.open()?, mount.path.clone(), *folder)))
            .collect::<Result<_, JailError>>()?;
        attach(&new_root, CWD, PLACE).map_err(failed(PLACE))?;
        nix::unistd::fchdir(&new_root).map_err(failed("chdir"))?;
        for (tree, path, folder) in &below {
            let named = || failed::<io::Error>(path.display().to_string());
            let target = make_target(&new_root, path, *folder).map_err(named())?;
            attach(tree, &target, "").map_err(io::Error::from).map_err(named())?;
        }
        rustix::process::pivot_root(".", ".").map_err(failed("pivot_root"))?;
        rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed("unmount"))?;
        nix::unistd::chdir("/").map_err(failed("chdir"))?;
        for (_, path, folder) in &below {
            let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
            flags.set(MsFlags::MS_NODEV, *folder);
            remount(path, flags)?;
        }
        let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
        flags.set(MsFlags::MS_RDONLY, empty);
        remount(Path::new("/"), flags)
    }
}

fn remount(path: &Path, flags: MsFlags) -> Result<(), JailError> {
    let flags = MountFlags::from_bits_truncate(flags.bits() as u32) | MountFlags::BIND;
    rustix::mount::mount_remount(path, flags, "")
        .map_err(failed(format!("remounting {}", path.display())))
}

fn empty_root() -> rustix::io::Result<OwnedFd> {
    let tmpfs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("size", "64k"), ("nr_inodes", "64"), ("mode", "0755")] {
        rustix::mount::fsconfig_set_string(&tmpfs, key, value)?;
    }
    rustix::mount::fsconfig_create(&tmpfs)?;
    rustix::mount::fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
}

fn attach(tree: &OwnedFd, folder: impl AsFd, path: &str) -> rustix::io::Result<()> {
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    flags.set(MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH, path.is_empty());
    rustix::mount::move_mount(tree, "", folder, path, flags)
}

/// A folder or empty file below the new root to mount something on. Nothing on the way may be a
/// symbolic link: who prepared the folder would decide where it leads.
fn make_target(root: &OwnedFd, path: &Path, folder: bool) -> io::Result<OwnedFd> {
    let parts: Vec<_> = path.components().filter(|part| part.as_os_str() != "/").collect();
    let mut here = root.try_clone()?;
    for (index, part) in parts.iter().enumerate() {
        let name = part.as_os_str();
        let last = index + 1 == parts.len();
        let made = if last && !folder {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&here, name, flags, Mode::RUSR).map(drop)
        } else {
            rustix::fs::mkdirat(&here, name, Mode::from_raw_mode(0o755))
        };
        match made {
            Err(rustix::io::Errno::EXIST) | Ok(()) => {}
            Err(error) => return Err(error.into()),
        }
        here = open_beneath(&here, Path::new(name))?;
    }
    Ok(here)
}

fn open_beneath(folder: impl AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(folder, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// Makes the folder where there is none, and gives it, with `run` and `dev` in it, to the user.
fn make_folder(path: &Path, uid: u32, gid: u32) -> Result<(), JailError> {
    let named = || failed::<io::Error>(path.display().to_string());
    if !path.is_absolute() {
        return Err(named()(io::ErrorKind::InvalidInput.into()));
    }
    let top = open_folder(Path::new("/")).map_err(named())?;
    // Whoever may write to a folder on the way could have put a link there.
    let root = make_target(&top, path, true).map_err(named())?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    for name in ["run", "dev"] {
        match rustix::fs::mkdirat(&root, name, Mode::from_raw_mode(0o700)) {
            Err(rustix::io::Errno::EXIST) | Ok(()) => {}
            Err(error) => return Err(named()(error.into())),
        }
        let inner = open_beneath(&root, Path::new(name)).map_err(|error| named()(error.into()))?;
        give(&inner, uid, gid).map_err(named())?;
    }
    give(&root, uid, gid).map_err(named())
}

fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::NO_SYMLINKS;
    Ok(rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve)?)
}

fn give(file: &OwnedFd, uid: Uid, gid: Gid) -> io::Result<()> {
    let now = rustix::fs::fstat(file)?;
    if (now.st_uid, now.st_gid) == (uid.as_raw(), gid.as_raw()) {
        return Ok(());
    }
    let (uid, gid) = (uid.as_raw(), gid.as_raw());
    let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
    Ok(rustix::fs::chownat(file, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn folder(path: &Path) -> Result<(), JailError> {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        make_folder(path, uid, gid)
    }

    #[test]
    fn a_root_is_made_with_what_a_vmm_needs() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("vmm/id/root");
        folder(&root).unwrap();
        folder(&root).unwrap();
        assert_eq!(root.join("run").metadata().unwrap().mode() & 0o777, 0o700);
        assert!(folder(Path::new("relative")).is_err());
    }

    #[test]
    fn symbolic_links_lead_nowhere() {
        // HOSTILE: a jailer that follows links of another user's gives away the host's folders.
        let place = tempfile::tempdir().unwrap();
        let victim = place.path().join("victim");
        fs::create_dir(&victim).unwrap();
        let link = place.path().join("link");
        symlink(&victim, &link).unwrap();
        assert!(folder(&link).is_err());
        assert!(folder(&link.join("root")).is_err());
        let root = place.path().join("root");
        fs::create_dir(&root).unwrap();
        symlink(&victim, root.join("dev")).unwrap();
        assert!(folder(&root).is_err());
        let handle = open_folder(&root).unwrap();
        assert!(make_target(&handle, Path::new("/dev/net/tun"), false).is_err());
        assert_eq!(fs::read_dir(&victim).unwrap().count(), 0);
    }

    #[test]
    fn targets_are_made_below_the_root() {
        let place = tempfile::tempdir().unwrap();
        let handle = open_folder(place.path()).unwrap();
        make_target(&handle, Path::new("/run/x/y"), true).unwrap();
        make_target(&handle, Path::new("/dev/net/tun"), false).unwrap();
        make_target(&handle, Path::new("/dev/net/tun"), false).unwrap();
        assert!(place.path().join("run/x/y").is_dir());
        assert!(place.path().join("dev/net/tun").is_file());
        assert!(make_target(&handle, Path::new("/../x"), true).is_err());
    }
}
