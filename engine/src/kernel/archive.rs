//! Distribution packages: a Debian package's kernel image and module tree.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::Path;

use super::modules::Tree;
use super::{KernelError, at};

/// Most bytes of one file taken out of a package.
const MAX_FILE: u64 = 256 << 20;
/// Most bytes that a package unpacks to, looked at or not: a generic kernel's come to about 400 MB.
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
        return read_tar(reader.take(MAX_TOTAL))
            .map_err(|error| malformed(error.to_string()))?
            .ok_or_else(|| malformed("there is no kernel in /boot of this package".to_owned()));
    }
    Err(malformed("there is no data.tar in this package".to_owned()))
}

fn read_tar(reader: impl Read) -> io::Result<Option<Contents>> {
    let mut image = None;
    let mut tree = Tree::default();
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
        if entry.size() > MAX_FILE {
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

/// The modules that were installed with the kernel at `image`: those in its own folder
/// (`/lib/modules/VERSION/vmlinuz`), or beside `/boot`. `None` where there are none.
pub fn installed_modules(image: &Path, version: &str) -> Result<Option<Tree>, KernelError> {
    let real = fs::canonicalize(image).map_err(at(image))?;
    let Some(folder) = real.parent() else { return Ok(None) };
    let beside = |path: &str| folder.join("..").join(path).join(version);
    let places = [folder.to_owned(), beside("lib/modules"), beside("usr/lib/modules")];
    match places.iter().find(|place| place.join("modules.builtin").is_file()) {
        Some(place) => read_tree(place).map(Some),
        None => Ok(None),
    }
}

fn read_tree(folder: &Path) -> Result<Tree, KernelError> {
    let mut tree = Tree::default();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(at(&folder))? {
            let path = entry.map_err(at(&folder))?.path();
            let kind = fs::symlink_metadata(&path).map_err(at(&path))?.file_type();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() && Tree::wants(&name) {
                tree.add(&name, super::read_file(&path)?);
            }
        }
    }
    Ok(tree)
}
