//! Distribution packages: a Debian package's kernel image and module tree.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use super::modules::Tree;
use super::{KernelError, at};

/// Most bytes of one file taken out of a package.
const MAX_FILE: u64 = 256 << 20;
/// Most bytes taken out in all: a generic kernel's modules come to about 400 MB.
const MAX_TOTAL: u64 = 2 << 30;

/// What a package holds.
pub struct Contents {
    /// The bzImage or ELF file.
    pub image: Vec<u8>,
    /// Its modules.
    pub modules: Option<Tree>,
}

/// Whether a file is a Debian package (an `ar` archive).
pub fn is_package(path: &Path) -> io::Result<bool> {
    let mut magic = [0; 8];
    match File::open(path)?.read_exact(&mut magic) {
        Ok(()) => Ok(&magic == b"!<arch>\n"),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads a package: the kernel in /boot, and what lies under /lib/modules.
pub fn read(path: &Path) -> Result<Contents, KernelError> {
    let malformed = |reason: String| KernelError::Malformed { path: path.to_owned(), reason };
    let mut archive = ar::Archive::new(BufReader::new(File::open(path).map_err(at(path))?));
    while let Some(entry) = archive.next_entry() {
        let entry = entry.map_err(|error| malformed(error.to_string()))?;
        let name = String::from_utf8_lossy(entry.header().identifier()).into_owned();
        let reader: Box<dyn Read> = match name.trim_end_matches('/') {
            "data.tar" => Box::new(entry),
            "data.tar.gz" => Box::new(flate2::read::GzDecoder::new(entry)),
            "data.tar.xz" => Box::new(xz2::read::XzDecoder::new(entry)),
            "data.tar.zst" => {
                Box::new(zstd::Decoder::new(entry).map_err(|error| malformed(error.to_string()))?)
            }
            _ => continue,
        };
        return read_tar(reader)
            .map_err(|error| malformed(error.to_string()))?
            .ok_or_else(|| malformed("there is no kernel in /boot of this package".to_owned()));
    }
    Err(malformed("there is no data.tar in this package".to_owned()))
}

fn read_tar(reader: impl Read) -> io::Result<Option<Contents>> {
    let mut image = None;
    let mut tree = Tree::default();
    let mut total = 0;
    for entry in tar::Archive::new(reader).entries()? {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = entry.path()?.to_string_lossy().trim_start_matches("./").to_owned();
        let relative = name.strip_prefix("usr/").unwrap_or(&name);
        let is_image = relative.starts_with("boot/vmlinuz-");
        let is_module = relative.starts_with("lib/modules/");
        if !is_image && !is_module {
            continue;
        }
        let base = relative.rsplit('/').next().unwrap_or(relative).to_owned();
        let wanted = is_image || Tree::wants(&base);
        if !wanted {
            continue;
        }
        let size = entry.size();
        total += size;
        if size > MAX_FILE || total > MAX_TOTAL {
            return Err(io::Error::other(format!("{name} is too large")));
        }
        let mut bytes = Vec::new();
        entry.by_ref().take(MAX_FILE).read_to_end(&mut bytes)?;
        if is_image {
            image = Some(bytes);
        } else {
            tree.add(&base, bytes);
        }
    }
    Ok(image.map(|image| Contents { image, modules: Some(tree) }))
}

/// The modules of a kernel that is installed on this host.
pub fn installed_modules(release: &str) -> io::Result<Tree> {
    let mut tree = Tree::default();
    let mut folders = vec![PathBuf::from("/lib/modules").join(release)];
    let mut seen = BTreeMap::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() && Tree::wants(&name) {
                seen.insert(name, entry.path());
            }
        }
    }
    for (name, path) in seen {
        tree.add(&name, fs::read(path)?);
    }
    Ok(tree)
}
