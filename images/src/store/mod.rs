//! The content store: an OCI image layout on disk that several processes may use at once and that
//! any of them may be killed over.
//!
//! ```text
//! ROOT/oci-layout  index.json       the layout; index.json is also the list of names
//! ROOT/blobs/sha256/HEX             complete, checked, never changed
//! ROOT/origins/HEX.json             where the image of this manifest came from, and its signatures
//! ROOT/erofs/ID.vN.erofs            root devices, made on demand, read-only
//! ROOT/partial/HEX                  downloads to take up again
//! ROOT/tmp/                         files in the making; leftovers are removed by the next command
//! ROOT/locks/                       see below
//! ```
//!
//! Rules that make it safe:
//! - A blob or root device gets its final name by a rename, after its content was checked and
//!   written to disk. `index.json` is replaced the same way, after the blobs it names.
//! - `locks/index` is held while `index.json` is changed, and while anything is removed.
//! - `locks/HEX.use` is held shared by who relies on a blob (a pull from before it looks for the
//!   blob until the image is in the index, a running container on the manifest), and taken
//!   exclusively by who removes it.
//! - `locks/HEX.write` is held by the one process that downloads a blob, `locks/ID.device` by
//!   the one that makes a root device. Others wait and then find the result.
//! - `locks/temp` is held shared by who has files in `tmp`.

mod database;
mod device;
mod lock;
mod manage;
mod provenance;
#[cfg(test)]
mod tests;
mod work;

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) use database::REF_NAME;
use database::Record;
use lock::{Lock, Mode};
pub use manage::{PruneOptions, PruneReport, Removed};
pub(crate) use work::{Arrival, Expected, Work};

use crate::archive;
use crate::conversion::{Converter, InProcess};
use crate::digest::Digest;
use crate::document::{self, DOCUMENT_MAX, Document, Manifest};
use crate::error::Error;
use crate::image::{Image, Layer};
use crate::layer::UnpackLimits;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::registry::{self, RegistryOptions};
use crate::rootfs;
use crate::signature::Policy;
use crate::source::Source;

/// When an image is fetched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// Every time; of an unchanged image only the manifest.
    Always,
    /// When the store does not have it.
    #[default]
    Missing,
    /// Never.
    Never,
}

/// How an image is pulled.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// How to speak to registries.
    pub registry: RegistryOptions,
    /// Bounds on compressed archive files.
    pub limits: UnpackLimits,
}

/// The content store.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    limits: UnpackLimits,
    tree: rootfs::Limits,
    policy: Option<Arc<Policy>>,
    converter: Arc<dyn Converter>,
}

/// Keeps an image from being removed. Held until it is dropped; a process that inherits the
/// descriptor keeps it, too.
#[derive(Debug)]
pub struct Lease {
    lock: Lock,
}

impl AsFd for Lease {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}

const LAYOUT: &[u8] = b"{\"imageLayoutVersion\": \"1.0.0\"}";

impl Store {
    /// Opens the store in `root`, and makes it where it is missing.
    pub fn open(root: &Path) -> Result<Store, Error> {
        let (limits, tree) = (UnpackLimits::default(), rootfs::Limits::default());
        let converter = Arc::new(InProcess);
        let store = Store { root: root.to_owned(), limits, tree, policy: None, converter };
        let layout = root.join("oci-layout");
        match fs::symlink_metadata(&layout) {
            Ok(_) => return Ok(store),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("open the image store", &layout)(error)),
        }
        // Others may open root devices by path; what is in blobs may be secret.
        for (folder, mode) in
            [("", 0o711), ("erofs", 0o711), ("blobs/sha256", 0o700), ("partial", 0o700)]
                .into_iter()
                .chain([("tmp", 0o700), ("locks", 0o700)])
        {
            let path = root.join(folder);
            let made = DirBuilder::new().recursive(true).mode(mode).create(&path);
            made.map_err(Error::io("create", &path))?;
        }
        let index = store.lock(&store.root.join("locks/index"), Mode::Exclusive)?;
        if !store.index().exists() {
            store.write_index(&index, &[])?;
        }
        // Last: its presence says that the rest is there.
        store.replace("oci-layout", LAYOUT)?;
        Ok(store)
    }

    /// The same store with other bounds on what images unpack to.
    pub fn with_limits(mut self, layer: UnpackLimits, tree: rootfs::Limits) -> Store {
        self.limits = layer;
        self.tree = tree;
        self
    }

    /// The same store that takes in, and makes root devices of, only what `policy` accepts.
    pub fn with_policy(mut self, policy: Option<Policy>) -> Store {
        self.policy = policy.map(Arc::new);
        self
    }

    /// The same store with what strangers made read by `converter`.
    pub fn with_converter(mut self, converter: Arc<dyn Converter>) -> Store {
        self.converter = converter;
        self
    }

    /// The folder it is in.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Fetches an image from a registry or archive, whether or not it is in the store. Blobs that
    /// are in the store are not downloaded again.
    pub fn pull(
        &self,
        source: &Source,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Image, Error> {
        match source {
            Source::Registry(reference) => {
                registry::pull(self, reference, &options.registry, progress)
            }
            Source::DockerArchive { path, select } => {
                archive::pull_docker(self, path, select, &options.limits, progress)
            }
            Source::OciArchive { path, select } => {
                archive::pull_oci_archive(self, path, select, &options.limits, progress)
            }
            Source::OciLayout { path, select } => {
                archive::pull_layout(self, path, select, progress)
            }
        }
    }

    /// The image that a user's word means: a name or id of the store, or a source, which is pulled
    /// as `policy` says. Archives are always read, unless the policy is `Never`.
    pub fn obtain(
        &self,
        text: &str,
        policy: PullPolicy,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Image, Error> {
        let source = match text.parse::<Source>() {
            Ok(source) => source,
            // An id, for example 64 digits, need not be a name.
            Err(error) => match self.find(text) {
                Ok(Some(image)) => return Ok(image),
                _ => return Err(error.into()),
            },
        };
        let name = match &source {
            Source::Registry(_) => Some(text.strip_prefix("docker://").unwrap_or(text)),
            _ => None,
        };
        match (policy, name) {
            (PullPolicy::Always, _) | (PullPolicy::Missing, None) => {
                self.pull(&source, options, progress)
            }
            (PullPolicy::Missing, Some(name)) => match self.find(name)? {
                Some(image) => Ok(image),
                None => {
                    progress.message(&format!("Unable to find image '{name}' locally"));
                    self.pull(&source, options, progress)
                }
            },
            (PullPolicy::Never, name) => {
                let found = name.map(|name| self.find(name)).transpose()?.flatten();
                found.ok_or_else(|| Error::NotPulled(text.to_owned()))
            }
        }
    }

    /// The image that `name` means: an id with or without `sha256:`, a name, or the beginning of an
    /// id. `Ok(None)` if there is none.
    pub fn find(&self, name: &str) -> Result<Option<Image>, Error> {
        let records = database::read(&self.index())?;
        let Some(found) = resolve(&records, name)? else { return Ok(None) };
        self.image(&found.record, found.name).map(Some)
    }

    /// Like [`Store::find`], but it is an error if there is none.
    pub fn get(&self, name: &str) -> Result<Image, Error> {
        self.find(name)?.ok_or_else(|| Error::NoSuchImage(name.to_owned()))
    }

    /// Keeps `image` from being removed while the lease lives. Take it before the image is used,
    /// and keep it for as long as a container runs.
    pub fn hold(&self, image: &Image) -> Result<Lease, Error> {
        let lock = self.lock(&self.use_lock(&image.manifest_digest), Mode::Shared)?;
        let records = database::read(&self.index())?;
        if !records.iter().any(|r| r.manifest == image.manifest_digest) {
            return Err(Error::Gone(image.title()));
        }
        Ok(Lease { lock })
    }

    fn index(&self) -> PathBuf {
        self.root.join("index.json")
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn partial(&self, digest: &Digest) -> PathBuf {
        self.root.join("partial").join(digest.hex())
    }

    pub(crate) fn write_lock(&self, digest: &Digest) -> PathBuf {
        self.root.join("locks").join(format!("{}.write", digest.hex()))
    }

    fn use_lock(&self, digest: &Digest) -> PathBuf {
        self.root.join("locks").join(format!("{}.use", digest.hex()))
    }

    fn lock(&self, path: &Path, mode: Mode) -> Result<Lock, Error> {
        Lock::wait(path, mode).map_err(Error::io("lock", path))
    }

    fn attempt(&self, path: &Path, mode: Mode) -> Result<Option<Lock>, Error> {
        Lock::attempt(path, mode).map_err(Error::io("lock", path))
    }

    /// Changes the list of images under the lock `_index`.
    fn write_index(&self, _index: &Lock, records: &[Record]) -> Result<(), Error> {
        self.replace("index.json", &database::format(records))
    }

    /// Replaces a file of the root folder as a whole. The caller holds `locks/index`.
    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let new = self.root.join(format!("{name}.new"));
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(Error::io("write", &new))?;
        let path = self.root.join(name);
        fs::rename(&new, &path).map_err(Error::io("write", &path))?;
        self.sync_folder(&self.root)
    }

    /// Makes renames in `folder` survive a power cut.
    fn sync_folder(&self, folder: &Path) -> Result<(), Error> {
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(Error::io("write", folder))
    }

    /// A manifest or configuration of the store, checked against its digest.
    pub(crate) fn document(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        let path = self.blob(digest);
        let mut bytes = Vec::new();
        let read = File::open(&path).and_then(|file| {
            let size = file.metadata()?.len().min(DOCUMENT_MAX);
            bytes.reserve_exact(usize::try_from(size).unwrap_or(0).saturating_add(1));
            file.take(DOCUMENT_MAX + 1).read_to_end(&mut bytes)?;
            Ok(())
        });
        read.map_err(Error::io("read", &path))?;
        let found = Digest::of(&bytes);
        if found != *digest {
            let reason = format!("its digest is {found}");
            return Err(Error::Damaged { path, reason });
        }
        Ok(bytes)
    }

    pub(crate) fn manifest(&self, digest: &Digest) -> Result<Manifest, Error> {
        let what = format!("manifest {digest}");
        match document::parse(&what, "", &self.document(digest)?)? {
            Document::Manifest(manifest) => Ok(manifest),
            Document::Index(_) => {
                let reason = "it is an index, not a manifest".to_owned();
                Err(Error::Damaged { path: self.blob(digest), reason })
            }
        }
    }

    fn image(&self, record: &Record, name: Option<Reference>) -> Result<Image, Error> {
        self.read_image(record, name).map_err(|error| match error {
            // Removed between reading the list and reading it.
            Error::Io { error, path, .. }
                if error.kind() == io::ErrorKind::NotFound
                    && !database::read(&self.index())
                        .is_ok_and(|all| all.iter().any(|r| r.manifest == record.manifest)) =>
            {
                let _ = path;
                let title = record.names.first().map(Reference::to_string);
                Error::Gone(title.unwrap_or_else(|| record.config.short()))
            }
            error => error,
        })
    }

    fn read_image(&self, record: &Record, name: Option<Reference>) -> Result<Image, Error> {
        let manifest = self.manifest(&record.manifest)?;
        let id = manifest.config.digest;
        let bytes = self.document(&id)?;
        let config = document::parse_config(&format!("image {id}"), &bytes, manifest.layers.len())?;
        let mut size = record.size.saturating_add(bytes.len() as u64);
        let mut layers = Vec::new();
        for (layer, diff_id) in manifest.layers.iter().zip(config.diff_ids) {
            size = size.saturating_add(layer.size);
            layers.push(Layer {
                digest: layer.digest,
                diff_id,
                compression: document::layer_compression("a layer", &layer.media_type)?,
                size: layer.size,
            });
        }
        Ok(Image {
            name: name.or_else(|| record.names.first().cloned()),
            names: record.names.clone(),
            repo_digests: record.repo_digests.clone(),
            manifest_digest: record.manifest,
            config_digest: id,
            config: config.parsed,
            layers,
            size,
            tagged: record.tagged,
        })
    }
}

/// An image that a user's word means.
struct Found {
    record: Record,
    /// The name, if the word was one.
    name: Option<Reference>,
}

fn resolve(records: &[Record], text: &str) -> Result<Option<Found>, Error> {
    let found = |record: &Record, name| Some(Found { record: record.clone(), name });
    if let Ok(digest) = text.parse::<Digest>() {
        let is = |r: &&Record| r.config == digest || r.manifest == digest;
        return Ok(records.iter().find(is).and_then(|record| found(record, None)));
    }
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    let is_hex = (1..=64).contains(&hex.len())
        && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    match text.parse::<Reference>() {
        Ok(reference) => {
            if let Some(record) = records.iter().find(|record| named(record, &reference)) {
                return Ok(found(record, Some(reference)));
            }
        }
        Err(error) if !is_hex => return Err(error.into()),
        Err(_) => {}
    }
    if !is_hex {
        return Ok(None);
    }
    let fits = |record: &&Record| record.config.hex().starts_with(hex);
    let mut ids: Vec<Digest> = records.iter().filter(fits).map(|r| r.config).collect();
    ids.sort();
    ids.dedup();
    if ids.len() > 1 {
        let ids: Vec<String> = ids.iter().map(Digest::short).collect();
        return Err(Error::Ambiguous { prefix: text.to_owned(), ids: ids.join(", ") });
    }
    Ok(records.iter().find(fits).and_then(|record| found(record, None)))
}

/// Whether `record` goes by `reference`. A digest decides alone, as with Docker.
fn named(record: &Record, reference: &Reference) -> bool {
    let Some(digest) = reference.digest() else { return record.names.contains(reference) };
    let same = |other: &Reference| other.name() == reference.name();
    record.repo_digests.iter().any(|r| same(r) && r.digest() == Some(digest))
        || (record.manifest == *digest && record.names.iter().chain(&record.repo_digests).any(same))
}
