//! A tar file or a directory with an image in it, as named blobs.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde::{Deserialize, Serialize};
use tar::EntryType;

use super::ArchiveError;
use crate::conversion::{ConversionError, Message, Task};
use crate::document::DOCUMENT_MAX;
use crate::error::Error;
use crate::layer::{UnpackLimits, unpack_archive};
use crate::signature::Origin;
use crate::store::Work;

/// An image of the largest allowed number of layers has three entries a layer in old archives.
const ENTRIES_MAX: usize = 1 << 16;
/// Bytes of all names in an archive, which are kept in memory.
const NAMES_MAX: usize = 32 << 20;
/// Bytes of the headers of one entry (long names, PAX records).
const HEADERS_MAX: u64 = 1 << 20;
/// Links from one name to the next.
const LINKS_MAX: usize = 8;

/// Where images are read from.
pub(super) enum Container {
    /// A tar file: its name in messages, its absolute path if it has one, where each entry's bytes are.
    Tar { path: PathBuf, real: Option<PathBuf>, file: File, entries: HashMap<String, Place> },
    /// A directory.
    Folder { path: PathBuf },
}

/// What the name of an archive's entry stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// Bytes of the archive.
    File {
        /// Where they begin.
        offset: u64,
        /// How many there are.
        size: u64,
    },
    /// Another entry's name.
    Link(String),
}

/// The bytes of an entry.
pub(super) struct Blob {
    file: File,
    offset: u64,
    pub(super) left: u64,
}

impl Read for Blob {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        let Some(buf) = buf.get_mut(..want).filter(|buf| !buf.is_empty()) else { return Ok(0) };
        let read = self.file.read_at(buf, self.offset)?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is cut off"));
        }
        self.offset = self.offset.saturating_add(read as u64);
        self.left = self.left.saturating_sub(read as u64);
        Ok(read)
    }
}

impl Container {
    /// Opens a tar file.
    pub(super) fn tar(
        path: &Path,
        limits: &UnpackLimits,
        work: &Work<'_>,
    ) -> Result<Container, Error> {
        let read = |error| ArchiveError::Read { path: path.to_owned(), error };
        // Opening a FIFO would wait for its writer.
        let flags = nix::libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(read)?;
        let mut container = Container::tar_file(path, file, limits, work)?;
        if let Container::Tar { real, .. } = &mut container {
            *real = path.canonicalize().ok();
        }
        Ok(container)
    }

    /// An open tar file, called `path` in messages. A compressed one is unpacked first, into a file
    /// of the store.
    pub(super) fn tar_file(
        path: &Path,
        file: File,
        limits: &UnpackLimits,
        work: &Work<'_>,
    ) -> Result<Container, Error> {
        let read = |error| ArchiveError::Read { path: path.to_owned(), error };
        if !file.metadata().map_err(read)?.is_file() {
            let expected = "a regular file";
            return Err(ArchiveError::NotA { path: path.to_owned(), expected }.into());
        }
        let unpacked = work.temp_file()?;
        let task = Task::Archive { name: path.display().to_string(), unpack: limits.clone() };
        let (mut packed, mut told) = (false, Index::default());
        let inputs = vec![file.try_clone().map_err(read)?];
        let tell = &mut |message| match message {
            Message::Packed(is) => packed = is,
            Message::Entry(name, place) => told.add(name, place),
            _ => {}
        };
        let done = work.converter().run(&task, inputs, unpacked.as_file(), tell);
        done.map_err(|error| match error {
            ConversionError::Archive(error) => error.into(),
            ConversionError::Layer(error) => Error::from(error),
            ConversionError::Convert(error) => {
                Error::Converter { what: path.display().to_string(), reason: error.to_string() }
            }
            ConversionError::Process(reason) => {
                Error::Converter { what: path.display().to_string(), reason }
            }
        })?;
        let file = if packed { unpacked.into_file() } else { file };
        let length = file.metadata().map_err(read)?.len();
        let entries = told.checked(path, length)?;
        Ok(Container::Tar { path: path.to_owned(), real: None, file, entries })
    }

    /// Opens a directory.
    pub(super) fn folder(path: &Path) -> Result<Container, Error> {
        let metadata = fs::metadata(path);
        let metadata =
            metadata.map_err(|error| ArchiveError::Read { path: path.to_owned(), error })?;
        if !metadata.is_dir() {
            let expected = "a directory";
            return Err(ArchiveError::NotA { path: path.to_owned(), expected }.into());
        }
        Ok(Container::Folder { path: path.to_owned() })
    }

    /// Where the image of an OCI layout comes from.
    pub(super) fn layout_origin(&self) -> Origin {
        match self {
            Container::Tar { real, .. } => Origin::OciArchive(real.clone()),
            Container::Folder { path } => {
                Origin::Oci(path.canonicalize().unwrap_or_else(|_| path.clone()))
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Container::Tar { path, .. } | Container::Folder { path } => path,
        }
    }

    /// Whether it has an entry of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        match self {
            Container::Tar { entries, .. } => {
                normal(name).is_some_and(|name| entries.contains_key(&name))
            }
            Container::Folder { path } => path.join(name).symlink_metadata().is_ok(),
        }
    }

    /// The bytes of the entry `name`; `by` says where the name was found.
    pub(super) fn open(&self, name: &str, by: &str) -> Result<Blob, ArchiveError> {
        let missing = || ArchiveError::Missing {
            path: self.path().to_owned(),
            entry: name.chars().take(300).collect(),
            by: by.to_owned(),
        };
        let read = |error| ArchiveError::Read { path: self.path().join(name), error };
        match self {
            Container::Tar { file, entries, .. } => {
                let mut at = normal(name).ok_or_else(missing)?;
                for _ in 0..LINKS_MAX {
                    match entries.get(&at).ok_or_else(missing)? {
                        Place::Link(target) => at = target.clone(),
                        Place::File { offset, size } => {
                            let file = file.try_clone().map_err(read)?;
                            return Ok(Blob { file, offset: *offset, left: *size });
                        }
                    }
                }
                Err(self.refuse(name, "it leads through too many links"))
            }
            Container::Folder { path } => {
                // The names come from this program or are digests; still, none may leave the folder.
                let inside = normal(name).ok_or_else(missing)?;
                let flags = nix::libc::O_NONBLOCK;
                let file =
                    OpenOptions::new().read(true).custom_flags(flags).open(path.join(&inside));
                let file = file.map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => missing(),
                    _ => read(error),
                })?;
                let metadata = file.metadata().map_err(read)?;
                if !metadata.is_file() {
                    return Err(self.refuse(name, "it is not a regular file"));
                }
                Ok(Blob { file, offset: 0, left: metadata.len() })
            }
        }
    }

    /// A document of at most [`DOCUMENT_MAX`] bytes.
    pub(super) fn document(&self, name: &str, by: &str) -> Result<Vec<u8>, ArchiveError> {
        let mut blob = self.open(name, by)?;
        if blob.left > DOCUMENT_MAX {
            return Err(ArchiveError::TooLarge {
                path: self.path().to_owned(),
                entry: name.chars().take(300).collect(),
                size: blob.left,
            });
        }
        let mut bytes = Vec::new();
        let read = blob.read_to_end(&mut bytes);
        read.map_err(|error| ArchiveError::Read { path: self.path().join(name), error })?;
        Ok(bytes)
    }

    fn refuse(&self, entry: &str, reason: &str) -> ArchiveError {
        ArchiveError::Entry {
            path: self.path().to_owned(),
            entry: entry.chars().take(300).collect(),
            reason: reason.to_owned(),
        }
    }
}

/// A name without `.` and leading `/`; none if it leaves the archive.
fn normal(name: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part if part.contains('\0') => return None,
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// Bounds what the tar crate keeps in memory while it looks for the next entry. The bytes of the
/// entries themselves are skipped by seeking.
struct Metered {
    file: io::BufReader<File>,
    budget: Rc<Cell<u64>>,
}

impl Read for Metered {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buf)?;
        let left = self.budget.get().checked_sub(read as u64);
        let left = left.ok_or_else(|| io::Error::other("the headers of an entry are too long"))?;
        self.budget.set(left);
        Ok(read)
    }
}

impl Seek for Metered {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match to {
            SeekFrom::Current(by) => {
                self.file.seek_relative(by)?;
                self.file.stream_position()
            }
            to => self.file.seek(to),
        }
    }
}

/// What was told of an archive, by somebody whom the archive may have taken over.
#[derive(Default)]
struct Index {
    entries: HashMap<String, Place>,
    names: usize,
    wrong: Option<&'static str>,
}

impl Index {
    fn add(&mut self, name: String, place: Place) {
        let target = match &place {
            Place::Link(target) => target.as_str(),
            Place::File { .. } => "",
        };
        self.names = self.names.saturating_add(name.len()).saturating_add(target.len());
        let inside = |name: &str| normal(name).is_some_and(|normal| normal == name);
        if self.entries.len() >= ENTRIES_MAX || self.names > 2 * NAMES_MAX {
            self.wrong = Some("too many entries");
        } else if !inside(&name) || (!target.is_empty() && !inside(target)) {
            self.wrong = Some("a name that leads out of it");
        } else if self.entries.insert(name, place).is_some() {
            self.wrong = Some("two entries of one name");
        }
    }

    /// The entries, where all of them are within an archive of so many bytes.
    fn checked(self, path: &Path, length: u64) -> Result<HashMap<String, Place>, Error> {
        let outside = |place: &Place| match place {
            Place::File { offset, size } => {
                offset.checked_add(*size).is_none_or(|end| end > length)
            }
            Place::Link(_) => false,
        };
        let beyond = self.entries.values().any(outside).then_some("an entry beyond its end");
        match self.wrong.or(beyond) {
            None => Ok(self.entries),
            Some(what) => Err(Error::Converter {
                what: path.display().to_string(),
                reason: format!("what was told of it has {what}"),
            }),
        }
    }
}

/// Reads the headers of an archive, and tells where its files are; one that is packed is unpacked to
/// `output` first.
pub(crate) fn scan(
    path: &Path,
    input: File,
    mut output: File,
    limits: &UnpackLimits,
    tell: &mut dyn FnMut(Message),
) -> Result<(), ArchiveError> {
    let read = |error| ArchiveError::Read { path: path.to_owned(), error };
    let plain = unpack_archive(path, input, &mut output, limits).map_err(read)?;
    tell(Message::Packed(plain.is_none()));
    for (name, place) in index(path, plain.unwrap_or(output))? {
        tell(Message::Entry(name, place));
    }
    Ok(())
}

/// Reads the headers of a tar file.
fn index(path: &Path, mut start: File) -> Result<HashMap<String, Place>, ArchiveError> {
    let bad = |error| ArchiveError::NotTar { path: path.to_owned(), error };
    let refuse = |entry: &str, reason: &str| ArchiveError::Entry {
        path: path.to_owned(),
        entry: entry.chars().take(300).collect(),
        reason: reason.to_owned(),
    };
    let length = start.metadata().map_err(bad)?.len();
    start.seek(SeekFrom::Start(0)).map_err(bad)?;
    let budget = Rc::new(Cell::new(HEADERS_MAX));
    let file = io::BufReader::with_capacity(4096, start);
    let mut archive = tar::Archive::new(Metered { file, budget: budget.clone() });
    let mut found: HashMap<String, Place> = HashMap::new();
    let (mut count, mut names) = (0usize, 0usize);
    let mut entries = archive.entries_with_seek().map_err(bad)?;
    loop {
        budget.set(HEADERS_MAX);
        let Some(entry) = entries.next() else { break };
        let entry = entry.map_err(bad)?;
        let raw = entry.path_bytes();
        let shown = String::from_utf8_lossy(&raw).into_owned();
        count += 1;
        names = names.saturating_add(shown.len());
        if count > ENTRIES_MAX || names > NAMES_MAX {
            let limit = ENTRIES_MAX;
            return Err(ArchiveError::TooManyEntries { path: path.to_owned(), limit });
        }
        let (offset, size) = (entry.raw_file_position(), entry.size());
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(refuse(&shown, "the file ends before it does"));
        }
        let place = match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous => Place::File { offset, size },
            kind @ (EntryType::Symlink | EntryType::Link) => {
                let target = entry.link_name_bytes().unwrap_or_default();
                let target = String::from_utf8_lossy(&target).into_owned();
                names = names.saturating_add(target.len());
                // A symlink starts at its folder, a hard link at the top.
                let from = if kind == EntryType::Symlink && !target.starts_with('/') {
                    let folder = shown.rsplit_once('/').map_or("", |(folder, _)| folder);
                    format!("{folder}/{target}")
                } else {
                    target
                };
                match normal(&from) {
                    Some(target) => Place::Link(target),
                    None => return Err(refuse(&shown, "its link leads out of the archive")),
                }
            }
            EntryType::Directory | EntryType::XGlobalHeader => continue,
            _ => return Err(refuse(&shown, "only files, directories and links are allowed")),
        };
        let Some(name) = std::str::from_utf8(&raw).ok().and_then(normal) else {
            return Err(refuse(&shown, "its name leads out of the archive"));
        };
        if found.insert(name, place).is_some() {
            // Which of the two counts would depend on who reads the archive.
            return Err(refuse(&shown, "there are two entries of this name"));
        }
    }
    Ok(found)
}
