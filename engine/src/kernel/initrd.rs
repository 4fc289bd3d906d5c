//! The initramfs: our init and the kernel's modules in an uncompressed cpio archive, which the
//! kernel unpacks at the price of a copy.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{KernelError, at};
use crate::making::Making;

/// Version of what is in the archive beside the programs.
const LAYOUT: u32 = 2;

/// The archive for this init and these modules, made in `cache` where it is not there.
pub fn make(cache: &Path, init: &Path, modules: Option<&Path>) -> Result<PathBuf, KernelError> {
    let metadata = fs::metadata(init).map_err(at(init))?;
    // A new build of init is another file; hashing it at each start would cost milliseconds.
    // Packages' files have whole seconds, so both parts of the time count.
    let key = format!(
        "{:x}-{:x}-{:x}-{:x}.{:x}",
        metadata.dev(),
        metadata.ino(),
        metadata.len(),
        metadata.mtime(),
        metadata.mtime_nsec()
    );
    let kind = if modules.is_some() { "modules-" } else { "" };
    let path = cache.join(format!("initrd-{LAYOUT}-{kind}{key}.cpio"));
    if path.exists() {
        return Ok(path);
    }
    let program = fs::read(init).map_err(at(init))?;
    check_static(init, &program)?;
    let mut archive = Vec::new();
    // A kernel whose console is a module starts init without standard streams, and a Rust program
    // without them needs /dev/null.
    entry(&mut archive, "dev", 0o40755, (0, 0), &[]);
    entry(&mut archive, "dev/console", 0o20600, (5, 1), &[]);
    entry(&mut archive, "dev/null", 0o20666, (1, 3), &[]);
    entry(&mut archive, "init", 0o100755, (0, 0), &program);
    if let Some(folder) = modules {
        entry(&mut archive, "modules", 0o40755, (0, 0), &[]);
        let load = folder.join("load");
        let list = fs::read_to_string(&load).map_err(at(&load))?;
        entry(&mut archive, "modules/load", 0o100644, (0, 0), list.as_bytes());
        for name in list.lines().filter(|name| !name.contains('/')) {
            let path = folder.join(name);
            let mut bytes = Vec::new();
            File::open(&path)
                .and_then(|mut file| file.read_to_end(&mut bytes))
                .map_err(at(&path))?;
            entry(&mut archive, &format!("modules/{name}"), 0o100644, (0, 0), &bytes);
        }
    }
    entry(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    fs::create_dir_all(cache).map_err(at(cache))?;
    let mut making = Making::begin(cache).map_err(at(cache))?;
    making.file().write_all(&archive).map_err(at(&path))?;
    making.replace(&path).map_err(at(&path))?;
    Ok(path)
}

/// A dynamically linked init finds no linker in the initramfs, and the guest's kernel panics.
fn check_static(path: &Path, program: &[u8]) -> Result<(), KernelError> {
    use object::Object;
    let wrong = |reason| Err(KernelError::Init { path: path.to_owned(), reason });
    match object::File::parse(program) {
        Err(_) => wrong("not an ELF program"),
        Ok(file) if file.section_by_name(".interp").is_some() => wrong("linked dynamically"),
        Ok(_) => Ok(()),
    }
}

/// Appends one file in the `newc` format (Linux: buffer-format.rst).
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    let links = 1;
    let fields = [
        0, // inode
        mode,
        0, // owner
        0, // group
        links,
        0, // time
        data.len() as u32,
        0, // device
        0,
        device.0, // of a device node
        device.1,
        name.len() as u32 + 1,
        0, // checksum, unused
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}
