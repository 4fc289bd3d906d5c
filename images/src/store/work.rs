//! Bringing an image into the store.

use std::cell::RefCell;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use tempfile::NamedTempFile;

use super::lock::{Lock, Mode};
use super::{Store, database, database::Record};
use crate::conversion::Converter;
use crate::digest::{Digest, Hasher};
use crate::document::Manifest;
use crate::error::Error;
use crate::image::Image;
use crate::reference::Reference;
use crate::signature::Provenance;

/// What is known of a blob before it is read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected {
    pub digest: Digest,
    pub size: u64,
}

/// What is said of an image by where it comes from.
pub(crate) struct Arrival {
    pub names: Vec<Reference>,
    pub repo_digests: Vec<Reference>,
    pub provenance: Provenance,
}

/// An operation that adds blobs. What it holds is safe from being removed until it is dropped.
pub(crate) struct Work<'a> {
    store: &'a Store,
    _temp: Lock,
    held: RefCell<Vec<(Digest, Lock)>>,
}

impl<'a> Work<'a> {
    pub(crate) fn begin(store: &'a Store) -> Result<Work<'a>, Error> {
        let path = store.root.join("locks/temp");
        // Nobody else has temporary files: what is there was left by a process that was killed.
        let lock = match store.attempt(&path, Mode::Exclusive)? {
            Some(lock) => {
                store.clean_temp()?;
                lock.share().map_err(Error::io("lock", &path))?
            }
            None => store.lock(&path, Mode::Shared)?,
        };
        Ok(Work { store, _temp: lock, held: RefCell::default() })
    }

    /// The store it adds to.
    pub(crate) fn store(&self) -> &'a Store {
        self.store
    }

    /// What reads the bytes of strangers.
    pub(crate) fn converter(&self) -> &dyn Converter {
        &*self.store.converter
    }

    /// A new file that vanishes unless it is kept.
    pub(crate) fn temp_file(&self) -> Result<NamedTempFile, Error> {
        let folder = self.store.root.join("tmp");
        NamedTempFile::new_in(&folder).map_err(Error::io("create a file in", &folder))
    }

    /// Keeps the blob from being removed, whether it is there yet or not.
    pub(crate) fn hold(&self, digest: &Digest) -> Result<(), Error> {
        if !self.held.borrow().iter().any(|(held, _)| held == digest) {
            let lock = self.store.lock(&self.store.use_lock(digest), Mode::Shared)?;
            self.held.borrow_mut().push((*digest, lock));
        }
        Ok(())
    }

    /// Whether the store has the blob; from now on it is held.
    pub(crate) fn has(&self, expected: &Expected) -> Result<bool, Error> {
        self.hold(&expected.digest)?;
        let path = self.store.blob(&expected.digest);
        Ok(fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == expected.size))
    }

    /// Puts a document into the store.
    pub(crate) fn put(&self, bytes: &[u8]) -> Result<Digest, Error> {
        let digest = Digest::of(bytes);
        if !self.has(&Expected { digest, size: bytes.len() as u64 })? {
            let mut file = self.temp_file()?;
            let written = file.as_file_mut().write_all(bytes);
            written.map_err(Error::io("write", &self.store.blob(&digest)))?;
            self.keep(file, &digest)?;
        }
        Ok(digest)
    }

    /// Copies a blob into the store, checked against `expected` if it is known. `what` names it in
    /// errors; `read_error` makes an error of one of the reader's.
    pub(crate) fn copy(
        &self,
        what: &str,
        reader: &mut dyn Read,
        expected: Option<Expected>,
        progress: &mut dyn FnMut(u64),
        read_error: &dyn Fn(io::Error) -> Error,
    ) -> Result<Expected, Error> {
        let have = expected.as_ref().map(|e| self.has(e)).transpose()?.unwrap_or(false);
        let mut file = if have { None } else { Some(self.temp_file()?) };
        let mut hasher = Hasher::default();
        let mut buffer = vec![0u8; 1 << 18];
        let mut size = 0u64;
        let mut reported = 0u64;
        loop {
            let read = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(read_error(error)),
            };
            let piece = buffer.get(..read).unwrap_or_default();
            hasher.update(piece);
            size = size.saturating_add(read as u64);
            if let Some(expected) = expected
                && size > expected.size
            {
                break;
            }
            if let Some(file) = &mut file {
                let written = file.as_file_mut().write_all(piece);
                written.map_err(|error| Error::io("write", file.path())(error))?;
            }
            if size - reported >= 1 << 20 {
                reported = size;
                progress(size);
            }
        }
        progress(size);
        let digest = hasher.finish();
        if let Some(expected) = expected {
            if size != expected.size {
                let (what, expected) = (what.to_owned(), expected.size);
                return Err(Error::WrongSize { what, found: size, expected });
            }
            if digest != expected.digest {
                let (what, expected) = (what.to_owned(), expected.digest);
                return Err(Error::WrongDigest { what, found: digest, expected });
            }
        }
        let found = Expected { digest, size };
        if let Some(file) = file
            && !self.has(&found)?
        {
            self.keep(file, &digest)?;
        }
        Ok(found)
    }

    /// Gives a complete and checked file its name as a blob, which must be held.
    pub(crate) fn keep(&self, file: NamedTempFile, digest: &Digest) -> Result<(), Error> {
        self.hold(digest)?;
        let path = self.store.blob(digest);
        let action = || -> io::Result<()> {
            file.as_file().set_permissions(Permissions::from_mode(0o444))?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            Ok(())
        };
        action().map_err(Error::io("write", &path))
    }

    /// A document of the store, which is held.
    pub(crate) fn read(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        self.store.document(digest)
    }

    /// What an earlier download left of a blob, or an empty file; none while another process
    /// downloads it.
    pub(crate) fn partial(&self, digest: &Digest) -> Result<Option<Partial>, Error> {
        let lock = self.store.attempt(&self.store.write_lock(digest), Mode::Exclusive)?;
        let Some(lock) = lock else { return Ok(None) };
        let path = self.store.partial(digest);
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(Error::io("open", &path))?;
        Ok(Some(Partial { digest: *digest, path, file, lock }))
    }

    /// Puts the manifest, whose text is `bytes`, into the store and the image into the list. All its
    /// other blobs are there and held, and the signature policy has been asked.
    pub(crate) fn commit(
        &self,
        bytes: &[u8],
        media_type: &str,
        manifest: &Manifest,
        arrival: Arrival,
    ) -> Result<Image, Error> {
        let Arrival { names, repo_digests, provenance } = arrival;
        let store = self.store;
        let manifest_digest = self.put(bytes)?;
        store.sync_folder(&store.root.join("blobs/sha256"))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = names.first().or(repo_digests.first()).cloned();
        let record = Record {
            manifest: manifest_digest,
            media_type: media_type.to_owned(),
            size: bytes.len() as u64,
            config: manifest.config.digest,
            tagged: i64::try_from(now.as_secs()).ok().filter(|_| !names.is_empty()),
            names,
            repo_digests,
        };
        let index = store.lock(&store.root.join("locks/index"), Mode::Exclusive)?;
        // First, so that what is in the list never lacks it.
        store.add_provenance(&manifest_digest, provenance)?;
        let mut records = database::read(&store.index())?;
        let before = records.clone();
        database::insert(&mut records, record);
        let changed = records.iter().zip(&before).any(|(now, was)| {
            Record { tagged: None, ..now.clone() } != Record { tagged: None, ..was.clone() }
        });
        if changed || records.len() != before.len() {
            store.write_index(&index, &records)?;
        }
        drop(index);
        let is = |r: &&Record| r.manifest == manifest_digest;
        let record = records.iter().find(is);
        let record = record.ok_or_else(|| Error::Gone(manifest_digest.to_string()))?;
        store.image(record, name)
    }
}

/// A download that this process works on.
pub(crate) struct Partial {
    digest: Digest,
    path: PathBuf,
    file: File,
    lock: Lock,
}

impl Partial {
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the complete and checked file its name as a blob.
    pub(crate) fn keep(self, work: &Work<'_>) -> Result<(), Error> {
        work.hold(&self.digest)?;
        let blob = work.store.blob(&self.digest);
        let action = || -> io::Result<()> {
            self.file.set_permissions(Permissions::from_mode(0o444))?;
            self.file.sync_all()?;
            fs::rename(&self.path, &blob)
        };
        action().map_err(Error::io("write", &blob))?;
        self.lock.remove().map_err(Error::io("remove the lock of", &blob))
    }
}

impl Store {
    /// Removes all temporary files. The caller holds `locks/temp` exclusively.
    pub(super) fn clean_temp(&self) -> Result<(), Error> {
        let folder = self.root.join("tmp");
        let entries = fs::read_dir(&folder).map_err(Error::io("read", &folder))?;
        for entry in entries {
            let path = entry.map_err(Error::io("read", &folder))?.path();
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        Ok(())
    }
}
