//! Guest kernels: imported once, kept under their version's name, found without being asked for.
//!
//! ```text
//! kernels/
//!   default              name of the one to use
//!   6.1.0-40-cloud-amd64/
//!     vmlinux            an ELF file with a PVH note, or a bzImage where there is none
//!     modules/           those the guest needs, decompressed, and `load`: their order
//!     initrd-*.cpio      with our init in it, made at first use
//! ```

mod archive;
mod image;
mod initrd;
mod modules;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::making::Making;

/// Why a kernel cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file cannot be read or written.
    #[error("{path}: {error}{}", images::room_hint(error))]
    File {
        /// Which file.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// Not one of the formats.
    #[error("{0}: not a kernel; a vmlinux, a bzImage or a linux-image package is needed")]
    NotAKernel(PathBuf),
    /// A bzImage or package whose parts do not fit together.
    #[error("{path}: {reason}")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The kernel cannot run guests.
    #[error("{path}: the kernel lacks {what}, which guests need")]
    Lacks {
        /// Which file.
        path: PathBuf,
        /// A module or feature.
        what: String,
    },
    /// No kernel of this name.
    #[error("no kernel named {0}; vmrun kernel ls lists those there are")]
    Unknown(String),
    /// None at all.
    #[error(
        "no guest kernel; import one with: vmrun kernel import FILE (a vmlinux, /boot/vmlinuz-*, or a linux-image-*.deb)"
    )]
    None,
    /// The init program is missing or cannot run in a guest.
    #[error("{path}: {reason}; build it with: cargo xtask build")]
    Init {
        /// Where it was sought.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> KernelError {
    let path = path.to_owned();
    move |error| KernelError::File { path, error }
}

/// Folders that an import fills.
const WORK: &str = ".import-";
/// Most bytes of a kernel file: one with debugging information comes close.
const MAX_FILE: u64 = 1 << 30;

/// A device or pipe given as a kernel would keep us waiting, or never end.
fn check_regular(path: &Path) -> Result<(), KernelError> {
    match fs::metadata(path).map_err(at(path))?.is_file() {
        true => Ok(()),
        false => Err(KernelError::NotAKernel(path.to_owned())),
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, KernelError> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(at(path))?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(at(path))?;
    if bytes.len() as u64 > MAX_FILE {
        let reason = "larger than 1 GiB".to_owned();
        return Err(KernelError::Malformed { path: path.to_owned(), reason });
    }
    Ok(bytes)
}

fn sync_folder(path: &Path) -> Result<(), KernelError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(at(path))
}

/// A kernel that can be booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its version, or the path it was given by.
    pub name: String,
    /// The file to boot.
    pub image: PathBuf,
    /// Modules to load first; absent where everything is built in.
    modules: Option<PathBuf>,
    /// Where an initrd made for it is kept.
    cache: PathBuf,
}

impl Kernel {
    /// The initramfs with this init program and the kernel's modules, made where it is missing.
    pub fn initrd(&self, init: &Path) -> Result<PathBuf, KernelError> {
        initrd::make(&self.cache, init, self.modules.as_deref())
    }
}

/// The kernels of a state directory.
pub struct Kernels {
    folder: PathBuf,
}

impl Kernels {
    /// Those below `root`.
    pub fn open(root: &Path) -> Kernels {
        Kernels { folder: root.join("kernels") }
    }

    /// Imports a vmlinux, bzImage or Debian package and returns its kernel. One that is there
    /// already is replaced. An installed kernel (`/boot/vmlinuz-VERSION`) brings its modules along.
    pub fn import(&self, path: &Path) -> Result<Kernel, KernelError> {
        check_regular(path)?;
        if archive::is_package(path).map_err(at(path))? {
            let found = archive::read(path)?;
            return self.add(path, found.image, found.modules.as_ref());
        }
        let image = read_file(path)?;
        let modules = match image::version(&image) {
            Some(version) => archive::installed_modules(path, &version)?,
            None => None,
        };
        self.add(path, image, modules.as_ref())
    }

    fn add(
        &self,
        path: &Path,
        image: Vec<u8>,
        tree: Option<&modules::Tree>,
    ) -> Result<Kernel, KernelError> {
        let image = image::bootable(path, image)?;
        let name = image::version(&image).unwrap_or_else(|| "unnamed".to_owned());
        let chosen = tree.map_or(Ok(Vec::new()), |tree| modules::choose(path, tree))?;
        let _lock = self.lock()?;
        let work = tempfile::Builder::new()
            .prefix(WORK)
            .tempdir_in(&self.folder)
            .map_err(at(&self.folder))?;
        let write = |name: &str, bytes: &[u8]| {
            let path = work.path().join(name);
            let mut file = File::create(&path).map_err(at(&path))?;
            file.write_all(bytes).and_then(|()| file.sync_all()).map_err(at(&path))
        };
        write("vmlinux", &image)?;
        if !chosen.is_empty() {
            let folder = work.path().join("modules");
            fs::create_dir(&folder).map_err(at(&folder))?;
            let mut order = String::new();
            for module in &chosen {
                write(&format!("modules/{}", module.file), &module.bytes)?;
                order.push_str(&module.file);
                order.push('\n');
            }
            write("modules/load", order.as_bytes())?;
            sync_folder(&folder)?;
        }
        sync_folder(work.path())?;
        let target = self.folder.join(&name);
        if target.exists() {
            // In one step: at no time is there none. What it replaces goes with the work folder.
            let exchange = rustix::fs::RenameFlags::EXCHANGE;
            rustix::fs::renameat_with(
                rustix::fs::CWD,
                work.path(),
                rustix::fs::CWD,
                &target,
                exchange,
            )
            .map_err(|error| at(&target)(error.into()))?;
        } else {
            fs::rename(work.path(), &target).map_err(at(&target))?;
            // There is nothing left to remove.
            let _ = work.keep();
        }
        sync_folder(&self.folder)?;
        if self.default_name().is_none() {
            self.set_default(&name)?;
        }
        self.get(&name)
    }

    /// Keeps other changes of the kernels away until dropped, and removes what one that was killed
    /// has left.
    fn lock(&self) -> Result<File, KernelError> {
        fs::create_dir_all(&self.folder).map_err(at(&self.folder))?;
        let path = self.folder.join(".lock");
        let file = File::create(&path).map_err(at(&path))?;
        file.lock().map_err(at(&path))?;
        for entry in fs::read_dir(&self.folder).map_err(at(&self.folder))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(WORK) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(file)
    }

    /// Imports the kernel this host runs, from where distributions keep it.
    fn import_running(&self) -> Option<Kernel> {
        let release = nix::sys::utsname::uname().ok()?.release().to_str()?.to_owned();
        [format!("/boot/vmlinuz-{release}"), format!("/lib/modules/{release}/vmlinuz")]
            .iter()
            .map(Path::new)
            .filter(|path| path.exists())
            .find_map(|path| {
                // Without its modules it may lack what guests need.
                let tree = archive::installed_modules(path, &release).ok()??;
                self.add(path, read_file(path).ok()?, Some(&tree)).ok()
            })
    }

    /// Names of the kernels, in order.
    pub fn list(&self) -> Result<Vec<String>, KernelError> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(at(&self.folder))?,
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.path().join("vmlinux").exists())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| !name.starts_with('.'))
            .collect();
        names.sort();
        Ok(names)
    }

    /// The kernel of this name.
    pub fn get(&self, name: &str) -> Result<Kernel, KernelError> {
        let folder = self.folder.join(name);
        let plain = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
        if !plain || !folder.join("vmlinux").exists() {
            return Err(KernelError::Unknown(name.to_owned()));
        }
        let modules = Some(folder.join("modules")).filter(|path| path.join("load").exists());
        Ok(Kernel { name: name.to_owned(), image: folder.join("vmlinux"), modules, cache: folder })
    }

    /// Forgets a kernel.
    pub fn remove(&self, name: &str) -> Result<(), KernelError> {
        let _lock = self.lock()?;
        let kernel = self.get(name)?;
        if self.default_name().as_deref() == Some(name) {
            let path = self.folder.join("default");
            fs::remove_file(&path).map_err(at(&path))?;
        }
        fs::remove_dir_all(&kernel.cache).map_err(at(&kernel.cache))
    }

    /// Name of the kernel used when none is asked for.
    pub fn default_name(&self) -> Option<String> {
        let name = fs::read_to_string(self.folder.join("default")).ok()?;
        Some(name.trim().to_owned()).filter(|name| !name.is_empty())
    }

    /// Makes a kernel the one used when none is asked for.
    pub fn set_default(&self, name: &str) -> Result<(), KernelError> {
        self.get(name)?;
        let path = self.folder.join("default");
        let mut making = Making::begin(&self.folder).map_err(at(&self.folder))?;
        making.file().write_all(name.as_bytes()).map_err(at(&path))?;
        making.replace(&path).map_err(at(&path))
    }

    /// The kernel to boot: the one asked for (by name, or a path to a file that boots as it is),
    /// else `VMRUN_KERNEL`, the default one, a `vmlinux` installed with vmrun, or the host's own.
    pub fn resolve(&self, asked: Option<&str>) -> Result<Kernel, KernelError> {
        let environment = std::env::var("VMRUN_KERNEL").ok().filter(|name| !name.is_empty());
        if let Some(name) = asked.or(environment.as_deref()) {
            return if name.contains('/') { self.at_path(Path::new(name)) } else { self.get(name) };
        }
        if let Some(name) = self.default_name() {
            return self.get(&name);
        }
        if let Some(path) = installed() {
            return self.at_path(&path);
        }
        self.import_running().ok_or(KernelError::None)
    }

    fn at_path(&self, path: &Path) -> Result<Kernel, KernelError> {
        let path = fs::canonicalize(path).map_err(at(path))?;
        check_regular(&path)?;
        let mut magic = [0; 4];
        let mut file = File::open(&path).map_err(at(&path))?;
        let elf = file.read_exact(&mut magic).is_ok() && &magic == b"\x7fELF";
        if !elf && archive::is_package(&path).map_err(at(&path))? {
            return self.import(&path);
        }
        if !elf && image::version(&read_file(&path)?).is_none() {
            return Err(KernelError::NotAKernel(path));
        }
        let name = String::from_utf8_lossy(path.as_os_str().as_bytes()).into_owned();
        Ok(Kernel { name, image: path, modules: None, cache: self.folder.clone() })
    }
}

/// A kernel that was installed with vmrun: beside the program, or in its share folder.
fn installed() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let folder = program.parent()?;
    [folder.join("vmlinux"), folder.join("../share/vmrun/vmlinux")]
        .into_iter()
        .find(|path| path.exists())
}
