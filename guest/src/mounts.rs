//! From the initramfs to the image: the root file system and what is mounted over it.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use agent_protocol::{Mount, MountSource, Network, Root, Start, Writable};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;

use crate::error::{Context, SetupError};
use crate::{devices, files};

const IMAGE: &str = "/image";
const UPPER: &str = "/upper";
const ROOT: &str = "/root";

/// A mounted volume, by descriptor: what a process makes of its path does not matter then.
///
/// Dropping it leaves its file system clean: one that is not cannot be mounted read-only next time.
/// To be dropped when nothing writes any more.
pub struct Volume {
    target: String,
    read_only: bool,
    folder: File,
}

impl Drop for Volume {
    fn drop(&mut self) {
        if self.read_only {
            return;
        }
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        let path = format!("/proc/self/fd/{}", self.folder.as_raw_fd());
        if let Err(error) = mount(None::<&str>, path.as_str(), None::<&str>, flags, None::<&str>) {
            crate::early::log(&format!("volume {} is not clean: {error}", self.target));
        }
    }
}

/// What a machine keeps of its mounts.
pub struct Mounted {
    /// Those to be left clean.
    pub volumes: Vec<Volume>,
    /// Files over the image's.
    pub files: DecidedFiles,
}

/// Mounts the image with its writable layer, moves there, and mounts what a container has.
pub fn enter(start: &Start) -> Result<Mounted, SetupError> {
    mount_root(&start.root)?;
    // Files made here stay reachable by descriptor after the move.
    let files = DecidedFiles::prepare(start)?;
    fs::create_dir_all(format!("{ROOT}/dev")).context(|| "/dev".to_owned())?;
    mount_kind("tmpfs", &format!("{ROOT}/dev"), MsFlags::MS_NOSUID, "mode=755,size=65536k")?;
    devices::populate(Path::new(&format!("{ROOT}/dev")))?;
    let volumes = mount_volumes(&start.mounts)?;
    for name in ["proc", "sys"] {
        let (from, to) = (format!("/{name}"), format!("{ROOT}/{name}"));
        fs::create_dir_all(&to).context(|| to.clone())?;
        move_mount(&from, &to)?;
    }
    switch_root()?;
    pseudo_file_systems()?;
    for (file, path) in &files.0 {
        bind_file(file, path)?;
    }
    write_machine_id(&start.machine_id);
    for (mount, volume) in start.mounts.iter().zip(&volumes) {
        mount_one(mount, volume.as_ref())?;
    }
    // Made here, while that can be done, and over the mounts.
    let cwd = &start.process.cwd;
    fs::create_dir_all(cwd).context(|| format!("working directory {cwd}"))?;
    if start.root.writable == Writable::No {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
            .context(|| "cannot make the root read-only".to_owned())?;
    }
    Ok(Mounted { volumes: volumes.into_iter().flatten().collect(), files })
}

fn mount_root(root: &Root) -> Result<(), SetupError> {
    for path in [IMAGE, UPPER, ROOT] {
        fs::create_dir_all(path).context(|| path.to_owned())?;
    }
    devices::wait_for_block(&root.device)?;
    mount(Some(root.device.as_str()), IMAGE, Some("erofs"), MsFlags::MS_RDONLY, None::<&str>)
        .context(|| format!("cannot mount the image from {}", root.device))?;
    match &root.writable {
        Writable::Device(device) => {
            devices::wait_for_block(device)?;
            // Where the host's file cannot grow and the file system breaks, the machine ends: a kernel
            // that goes on keeps programs waiting for pages that nobody can write any more.
            let options = Some("noauto_da_alloc,errors=panic");
            mount(Some(device.as_str()), UPPER, Some("ext4"), MsFlags::MS_NOATIME, options)
                .context(|| format!("cannot mount the writable layer from {device}"))?;
        }
        // A read-only root gets its mount points on a tmpfs, and is made read-only at the end.
        Writable::No => mount_kind("tmpfs", UPPER, MsFlags::empty(), "mode=755,size=1m")?,
        Writable::Tmpfs { size } => {
            mount_kind("tmpfs", UPPER, MsFlags::empty(), &tmpfs_options(*size, 0o755))?;
        }
    }
    for name in ["data", "work"] {
        let path = format!("{UPPER}/{name}");
        fs::create_dir_all(&path).context(|| path.clone())?;
    }
    copy_attributes(Path::new(IMAGE), &PathBuf::from(format!("{UPPER}/data")))
        .context(|| "root directory".to_owned())?;
    let options = format!("lowerdir={IMAGE},upperdir={UPPER}/data,workdir={UPPER}/work");
    mount(Some("overlay"), ROOT, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .context(|| "cannot join the image and its writable layer".to_owned())
}

fn tmpfs_options(size: u64, mode: u32) -> String {
    match size {
        0 => format!("mode={mode:o}"),
        size => format!("mode={mode:o},size={size}"),
    }
}

fn mount_kind(kind: &str, target: &str, flags: MsFlags, options: &str) -> Result<(), SetupError> {
    mount(Some(kind), target, Some(kind), flags, Some(options))
        .context(|| format!("mount {kind} on {target}"))
}

fn move_mount(from: &str, to: &str) -> Result<(), SetupError> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .context(|| format!("move {from} to {to}"))
}

/// Makes the new root the process's own, and lets the initramfs go.
fn switch_root() -> Result<(), SetupError> {
    std::env::set_current_dir(ROOT).context(|| ROOT.to_owned())?;
    let _ = fs::remove_file("/init");
    move_mount(".", "/")?;
    nix::unistd::chroot(".").context(|| "chroot".to_owned())?;
    std::env::set_current_dir("/").context(|| "/".to_owned())
}

fn pseudo_file_systems() -> Result<(), SetupError> {
    for path in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        fs::create_dir_all(path).context(|| path.to_owned())?;
    }
    let secure = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_kind("devpts", "/dev/pts", secure, "newinstance,ptmxmode=0666,mode=0620,gid=5")?;
    mount_kind("tmpfs", "/dev/shm", secure | MsFlags::MS_NODEV, "mode=1777")?;
    mount_kind("mqueue", "/dev/mqueue", secure | MsFlags::MS_NODEV, "")?;
    // Kernels without control groups run containers without them.
    let _ = mount(
        Some("cgroup2"),
        "/sys/fs/cgroup",
        Some("cgroup2"),
        secure | MsFlags::MS_NODEV,
        None::<&str>,
    );
    Ok(())
}

/// The files that the host decides, open, each with its path in the image.
pub struct DecidedFiles(Vec<(File, &'static str)>);

impl DecidedFiles {
    fn prepare(start: &Start) -> Result<DecidedFiles, SetupError> {
        let mut paths = vec!["/etc/hostname", "/etc/hosts"];
        paths.extend(start.network.as_ref().map(|_| "/etc/resolv.conf"));
        let open = |path: &'static str| {
            let name = format!("/prepared{}", path.replace('/', "-"));
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(true).mode(0o644);
            Ok((options.open(&name).context(|| path.to_owned())?, path))
        };
        let files = paths.into_iter().map(open).collect::<Result<_, SetupError>>()?;
        let files = DecidedFiles(files);
        files.write(&start.hostname, start.network.as_ref())?;
        Ok(files)
    }

    /// Writes them, in place of what they have.
    pub fn write(&self, hostname: &str, network: Option<&Network>) -> Result<(), SetupError> {
        for (file, path) in &self.0 {
            let text = match *path {
                "/etc/hostname" => format!("{hostname}\n"),
                "/etc/hosts" => files::hosts(hostname, network),
                _ => network.map(files::resolv_conf).unwrap_or_default(),
            };
            file.set_len(0).context(|| path.to_string())?;
            file.write_all_at(text.as_bytes(), 0).context(|| path.to_string())?;
        }
        Ok(())
    }
}

/// Writes the machine's id where the image has a file for it. One that cannot be written, below a
/// read-only root, keeps what it has.
pub fn write_machine_id(id: &str) {
    const PATH: &str = "/etc/machine-id";
    if id.is_empty() || !fs::symlink_metadata(PATH).is_ok_and(|file| file.is_file()) {
        return;
    }
    if let Err(error) = fs::write(PATH, format!("{id}\n")) {
        crate::early::log(&format!("{PATH}: {error}"));
    }
}

/// Binds a file over a path of the image, whose links lead where they lead in the image.
fn bind_file(file: &File, path: &str) -> Result<(), SetupError> {
    let target = Path::new(path);
    if !target.exists() {
        let real = match fs::read_link(target) {
            Ok(link) => target.parent().unwrap_or(Path::new("/")).join(link),
            Err(_) => target.to_owned(),
        };
        if let Some(parent) = real.parent() {
            fs::create_dir_all(parent).context(|| path.to_owned())?;
        }
        File::create(&real).context(|| path.to_owned())?;
    }
    let source = format!("/proc/self/fd/{}", file.as_raw_fd());
    mount(Some(source.as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .context(|| path.to_owned())
}

/// Mounts the devices of volumes where the image cannot see them, before the move.
/// One entry for each mount point: those that are no devices have none.
fn mount_volumes(mounts: &[Mount]) -> Result<Vec<Option<Volume>>, SetupError> {
    let mut volumes = Vec::new();
    for (index, mount_point) in mounts.iter().enumerate() {
        let MountSource::Device { device, fs_type, copy_up } = &mount_point.source else {
            volumes.push(None);
            continue;
        };
        let place = format!("/volume{index}");
        fs::create_dir_all(&place).context(|| place.clone())?;
        devices::wait_for_block(device)?;
        let flags = if mount_point.read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        mount(Some(device.as_str()), place.as_str(), Some(fs_type.as_str()), flags, None::<&str>)
            .context(|| format!("cannot mount the volume for {}", mount_point.target))?;
        let folder = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(&place)
            .context(|| place.clone())?;
        let (target, read_only) = (mount_point.target.clone(), mount_point.read_only);
        volumes.push(Some(Volume { target, read_only, folder }));
        if *copy_up && !mount_point.read_only {
            fill(Path::new(&place), &mount_point.target)?;
        }
    }
    Ok(volumes)
}

/// Gives an empty volume what the image has at its target.
fn fill(volume: &Path, target: &str) -> Result<(), SetupError> {
    let what = || format!("cannot fill the volume for {target}");
    let lost = volume.join("lost+found");
    let mut entries = fs::read_dir(volume).context(what)?;
    if entries.any(|entry| entry.is_ok_and(|entry| entry.path() != lost)) {
        return Ok(());
    }
    let _ = fs::remove_dir(lost);
    let Some(source) = folder_of_image(Path::new(ROOT), target).context(what)? else {
        return Ok(());
    };
    // With the last component the links of /proc lead to the folder, not to themselves.
    copy_tree(&PathBuf::from(format!("/proc/self/fd/{}/.", source.as_raw_fd())), volume)
        .context(what)
}

/// The folder of this path in the image, whose links lead where they will once the image is the
/// root, never out of it. `None` where the image has none.
fn folder_of_image(root: &Path, path: &str) -> nix::Result<Option<OwnedFd>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open(root, flags, Mode::empty())?;
    let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    match openat2(&root, path, how) {
        Ok(folder) => Ok(Some(folder)),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
        Err(error) => Err(error),
    }
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            fs::create_dir(&target)?;
            copy_tree(&source, &target)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
            let metadata = fs::symlink_metadata(&source)?;
            lchown(&target, Some(metadata.uid()), Some(metadata.gid()))?;
            continue;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
        } else {
            let metadata = entry.metadata()?;
            let kind = if kind.is_fifo() {
                SFlag::S_IFIFO
            } else if kind.is_char_device() {
                SFlag::S_IFCHR
            } else if kind.is_block_device() {
                SFlag::S_IFBLK
            } else {
                continue;
            };
            mknod(&target, kind, Mode::from_bits_truncate(0o600), metadata.rdev())?;
        }
        copy_attributes(&source, &target)?;
    }
    copy_attributes(from, to)
}

/// Owner, mode and times; not of symbolic links.
fn copy_attributes(from: &Path, to: &Path) -> std::io::Result<()> {
    let metadata = fs::symlink_metadata(from)?;
    lchown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(to, metadata.permissions())?;
    let time = TimeSpec::new(metadata.mtime(), metadata.mtime_nsec());
    utimensat(nix::fcntl::AT_FDCWD, to, &time, &time, UtimensatFlags::NoFollowSymlink)?;
    Ok(())
}

fn mount_one(wanted: &Mount, volume: Option<&Volume>) -> Result<(), SetupError> {
    let target = wanted.target.as_str();
    fs::create_dir_all(target).context(|| target.to_owned())?;
    match (&wanted.source, volume) {
        (MountSource::Tmpfs { size, mode, no_exec }, _) => {
            let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            flags.set(MsFlags::MS_NOEXEC, *no_exec);
            flags.set(MsFlags::MS_RDONLY, wanted.read_only);
            mount_kind("tmpfs", target, flags, &tmpfs_options(*size, *mode))
        }
        (MountSource::Device { .. }, Some(volume)) => {
            let source = format!("/proc/self/fd/{}", volume.folder.as_raw_fd());
            mount(Some(source.as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .context(|| format!("cannot mount the volume for {target}"))
        }
        (MountSource::Device { .. }, None) => {
            Err(SetupError::setup(format!("the volume for {target} is not mounted")))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_of_the_image_is_found_through_the_images_links() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("run/lock")).unwrap();
        fs::create_dir(at("var")).unwrap();
        fs::write(at("file"), "").unwrap();
        for (target, link) in [
            ("/run", "var/run"),
            ("../../../../run", "climbs"),
            ("/etc", "outside"),
            ("self", "self"),
        ] {
            symlink(target, at(link)).unwrap();
        }
        let found = |path: &str| {
            let folder = folder_of_image(root.path(), path).unwrap()?;
            Some(fs::read_link(format!("/proc/self/fd/{}", folder.as_raw_fd())).unwrap())
        };
        let root_path = root.path().canonicalize().unwrap();
        for path in ["/run", "/var/run", "/climbs", "/../run", "/var/run/lock/.."] {
            assert_eq!(found(path), Some(root_path.join("run")), "{path}");
        }
        // docs/hostile.md 16: what only the machine outside the image has is not there.
        for path in ["/outside", "/outside/..", "/none", "/file", "/self", "/etc"] {
            assert_eq!(found(path).filter(|path| !path.starts_with(&root_path)), None, "{path}");
            assert_eq!(found(path), None, "{path}");
        }
    }

    #[test]
    fn a_tree_is_copied_with_owners_modes_times_and_links() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("deep/er")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("deep/file"), "text").unwrap();
        fs::set_permissions(from.join("deep/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::set_permissions(from.join("deep"), fs::Permissions::from_mode(0o1775)).unwrap();
        symlink("/nowhere", from.join("deep/er/link")).unwrap();
        nix::unistd::mkfifo(&from.join("fifo"), Mode::from_bits_truncate(0o640)).unwrap();
        let time = TimeSpec::new(1_000_000, 5);
        for path in ["deep/file", "deep", ""] {
            let path = from.join(path);
            utimensat(nix::fcntl::AT_FDCWD, &path, &time, &time, UtimensatFlags::FollowSymlink)
                .unwrap();
        }
        let opened = File::open(&from).unwrap();
        copy_tree(&PathBuf::from(format!("/proc/self/fd/{}/.", opened.as_raw_fd())), &to).unwrap();
        for path in ["", "deep", "deep/file", "deep/er", "deep/er/link", "fifo"] {
            let (one, other) = (from.join(path), to.join(path));
            let (one, other) =
                (fs::symlink_metadata(one).unwrap(), fs::symlink_metadata(other).unwrap());
            assert_eq!(one.mode(), other.mode(), "{path}");
            assert_eq!((one.uid(), one.gid()), (other.uid(), other.gid()), "{path}");
            if path != "deep/er/link" {
                let times = |one: &fs::Metadata| (one.mtime(), one.mtime_nsec());
                assert_eq!(times(&one), times(&other), "{path}");
            }
        }
        assert_eq!(fs::read(to.join("deep/file")).unwrap(), b"text");
        assert_eq!(fs::read_link(to.join("deep/er/link")).unwrap(), Path::new("/nowhere"));
    }
}
