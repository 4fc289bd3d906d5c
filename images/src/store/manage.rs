//! Listing, naming and removing images.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;

use super::database::{self, Record};
use super::device::device_name;
use super::lock::{Lock, Mode};
use super::{Store, resolve};
use crate::digest::Digest;
use crate::error::Error;
use crate::image::{Inspect, ManifestDescriptor, Metadata, RootFs, Summary, rfc3339, seconds};
use crate::reference::Reference;

/// One effect of removing an image, as `docker image rm` prints it (Engine API,
/// `ImageDeleteResponseItem`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Removed {
    /// A name was taken away.
    Untagged(String),
    /// The image's configuration, or a layer, was deleted.
    Deleted(Digest),
}

/// What `prune` removes.
#[derive(Debug, Clone, Default)]
pub struct PruneOptions {
    /// Also images that have a name. Otherwise only those without.
    pub all: bool,
    /// Ids of images that containers need, running or not; they stay.
    pub keep: Vec<Digest>,
}

/// What `prune` did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct PruneReport {
    /// What was removed.
    pub images_deleted: Vec<Removed>,
    /// Bytes of disk that were freed.
    pub space_reclaimed: u64,
}

impl Store {
    /// All images, newest first; one that several manifests lead to is one line.
    pub fn list(&self) -> Result<Vec<Summary>, Error> {
        let mut lines: Vec<Summary> = Vec::new();
        for record in database::read(&self.index())? {
            let image = match self.image(&record, None) {
                Ok(image) => image,
                Err(Error::Gone(_)) => continue,
                Err(error) => return Err(error),
            };
            let repo_tags = record.names.iter().map(Reference::to_string);
            let repo_digests = record.repo_digests.iter().map(Reference::to_string);
            match lines.iter_mut().find(|line| line.id == image.config_digest) {
                Some(line) => {
                    line.repo_tags.extend(repo_tags);
                    line.repo_digests.extend(repo_digests);
                }
                None => lines.push(Summary {
                    id: image.config_digest,
                    repo_tags: repo_tags.collect(),
                    repo_digests: repo_digests.collect(),
                    created: image.config.created().as_deref().and_then(seconds).unwrap_or(0),
                    size: image.size,
                }),
            }
        }
        lines.sort_by(|a, b| (b.created, &a.repo_tags).cmp(&(a.created, &b.repo_tags)));
        Ok(lines)
    }

    /// All that is known of an image, with Docker's names.
    pub fn inspect(&self, name: &str) -> Result<Inspect, Error> {
        let image = self.get(name)?;
        let raw = self.document(&image.config_digest)?;
        let raw: Value = serde_json::from_slice(&raw).map_err(|error| {
            let reason = error.to_string();
            Error::Damaged { path: self.blob(&image.config_digest), reason }
        })?;
        let records = database::read(&self.index())?;
        let same: Vec<&Record> =
            records.iter().filter(|r| r.config == image.config_digest).collect();
        let own = same.iter().find(|r| r.manifest == image.manifest_digest);
        let comment = image.config.history().iter().flatten().last();
        Ok(Inspect {
            id: image.config_digest,
            repo_tags: same.iter().flat_map(|r| &r.names).map(Reference::to_string).collect(),
            repo_digests: same
                .iter()
                .flat_map(|r| &r.repo_digests)
                .map(Reference::to_string)
                .collect(),
            comment: comment.and_then(|h| h.comment().clone()).unwrap_or_default(),
            created: image.config.created().clone(),
            author: image.config.author().clone().unwrap_or_default(),
            config: match raw.get("config") {
                Some(config @ Value::Object(_)) => config.clone(),
                _ => Value::Object(Default::default()),
            },
            architecture: image.config.architecture().to_string(),
            os: image.config.os().to_string(),
            size: image.size,
            root_fs: RootFs {
                kind: "layers".into(),
                layers: image.layers.iter().map(|layer| layer.diff_id).collect(),
            },
            metadata: Metadata { last_tag_time: image.tagged.and_then(rfc3339) },
            descriptor: ManifestDescriptor {
                digest: image.manifest_digest,
                size: own.map_or(0, |r| r.size),
                media_type: own.map(|r| r.media_type.clone()).unwrap_or_default(),
            },
        })
    }

    /// Gives the image `source` the further name `target`; another image that had it loses it.
    pub fn tag(&self, source: &str, target: &str) -> Result<(), Error> {
        let target: Reference = target.parse()?;
        if target.digest().is_some() {
            return Err(Error::TagWithDigest(target.to_string()));
        }
        let index = self.lock_index()?;
        let mut records = database::read(&self.index())?;
        let found = resolve(&records, source)?;
        let found = found.ok_or_else(|| Error::NoSuchImage(source.to_owned()))?;
        if found.record.names.contains(&target) {
            return Ok(());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let tagged = i64::try_from(now.as_secs()).ok();
        database::insert(&mut records, Record { names: vec![target], tagged, ..found.record });
        self.write_index(&index, &records)
    }

    /// Takes a name away, and deletes the image if it was the last one; an id means all names.
    /// An image in use is refused; with `force` it loses its names and stays until it is pruned.
    pub fn remove(&self, name: &str, force: bool) -> Result<Vec<Removed>, Error> {
        let index = self.lock_index()?;
        let mut records = database::read(&self.index())?;
        let found = resolve(&records, name)?;
        let found = found.ok_or_else(|| Error::NoSuchImage(name.to_owned()))?;
        let mut removed = Vec::new();
        let mut drop_records: Vec<Digest> = Vec::new();
        let by_digest = |record: &Record, reference: &Reference| {
            record
                .repo_digests
                .iter()
                .position(|r| r.name() == reference.name() && r.digest() == reference.digest())
        };
        // A digest that no registry gave is the manifest's: it means the image, as an id does.
        let name_is_listed = |reference: &&Reference| {
            reference.digest().is_none() || by_digest(&found.record, reference).is_some()
        };
        match found.name.as_ref().filter(name_is_listed) {
            Some(reference) => {
                let is = |r: &&mut Record| r.manifest == found.record.manifest;
                let Some(record) = records.iter_mut().find(is) else { return Ok(removed) };
                match reference.digest().and(by_digest(record, reference)) {
                    Some(at) if record.names.len() + record.repo_digests.len() > 1 => {
                        removed.push(Removed::Untagged(record.repo_digests.remove(at).to_string()));
                    }
                    None if record.names.len() > 1 => {
                        record.names.retain(|name| name != reference);
                        removed.push(Removed::Untagged(reference.to_string()));
                    }
                    _ => drop_records.push(record.manifest),
                }
            }
            None => {
                let same = records.iter().filter(|r| r.config == found.record.config);
                let names: Vec<String> =
                    same.clone().flat_map(|r| &r.names).map(Reference::to_string).collect();
                if names.len() > 1 && !force {
                    let names = names.join(", ");
                    return Err(Error::SeveralNames { id: name.to_owned(), names });
                }
                drop_records.extend(same.map(|r| r.manifest));
            }
        }
        let mut locks = Vec::new();
        for manifest in drop_records {
            let lock = self.attempt(&self.use_lock(&manifest), Mode::Exclusive)?;
            if lock.is_none() && !force {
                return Err(Error::InUse { image: name.to_owned() });
            }
            let is = |r: &Record| r.manifest == manifest;
            let Some(at) = records.iter().position(is) else { continue };
            if let Some(record) = records.get_mut(at) {
                let gone = record.names.drain(..).chain(record.repo_digests.drain(..));
                removed.extend(gone.map(|name| Removed::Untagged(name.to_string())));
            }
            if let Some(lock) = lock {
                records.remove(at);
                locks.push((manifest, lock));
            }
        }
        self.write_index(&index, &records)?;
        let (deleted, _) = self.sweep(&records, locks)?;
        removed.extend(deleted.into_iter().map(Removed::Deleted));
        Ok(removed)
    }

    /// Removes images that nothing uses, and everything that belongs to no image: blobs, root
    /// devices, downloads nobody works on. Never touches what a container or command holds.
    pub fn prune(&self, options: &PruneOptions) -> Result<PruneReport, Error> {
        let index = self.lock_index()?;
        let mut report = PruneReport::default();
        let mut records = database::read(&self.index())?;
        let mut locks = Vec::new();
        let mut kept = Vec::new();
        for record in records.drain(..) {
            let wanted = !record.names.is_empty() && !options.all;
            if wanted || options.keep.contains(&record.config) {
                kept.push(record);
                continue;
            }
            match self.attempt(&self.use_lock(&record.manifest), Mode::Exclusive)? {
                None => kept.push(record),
                Some(lock) => {
                    locks.push((record.manifest, lock));
                    let gone = record.names.iter().chain(&record.repo_digests);
                    report.images_deleted.extend(gone.map(|n| Removed::Untagged(n.to_string())));
                }
            }
        }
        self.write_index(&index, &kept)?;
        let (deleted, bytes) = self.sweep(&kept, locks)?;
        report.images_deleted.extend(deleted.into_iter().map(Removed::Deleted));
        report.space_reclaimed = bytes.saturating_add(self.sweep_downloads()?);
        if let Some(lock) = self.attempt(&self.root.join("locks/temp"), Mode::Exclusive)? {
            self.clean_temp()?;
            drop(lock);
        }
        self.sweep_locks()?;
        Ok(report)
    }

    fn lock_index(&self) -> Result<Lock, Error> {
        self.lock(&self.root.join("locks/index"), Mode::Exclusive)
    }

    /// Removes blobs and root devices that no image of `records` needs and nobody holds; what was
    /// removed and its bytes. The index is locked and written. `mine` are locks held already.
    fn sweep(
        &self,
        records: &[Record],
        mine: Vec<(Digest, Lock)>,
    ) -> Result<(Vec<Digest>, u64), Error> {
        let mut live: BTreeSet<Digest> = BTreeSet::new();
        let mut devices: BTreeSet<String> = BTreeSet::new();
        for record in records {
            match self.read_image(record, None) {
                Ok(image) => {
                    live.insert(record.manifest);
                    live.insert(image.config_digest);
                    live.extend(image.layers.iter().map(|layer| layer.digest));
                    devices.insert(device_name(&image.device_id()));
                }
                Err(error) => {
                    // Which layers it needs is unknown, so nothing may go until it is removed.
                    tracing::warn!("nothing is deleted: {error}");
                    return Ok((Vec::new(), 0));
                }
            }
        }
        let mut deleted = Vec::new();
        let mut bytes = 0u64;
        let mut mine = mine;
        let folder = self.root.join("blobs/sha256");
        for (name, size) in files(&folder)? {
            let Ok(digest) = format!("sha256:{name}").parse::<Digest>() else { continue };
            if live.contains(&digest) {
                continue;
            }
            let lock = match mine.iter().position(|(held, _)| *held == digest) {
                Some(at) => Some(mine.swap_remove(at).1),
                None => self.attempt(&self.use_lock(&digest), Mode::Exclusive)?,
            };
            let Some(lock) = lock else { continue };
            unlink(&folder.join(&name))?;
            lock.remove().map_err(Error::io("remove the lock of", &folder.join(&name)))?;
            bytes = bytes.saturating_add(size);
            deleted.push(digest);
        }
        let folder = self.root.join("erofs");
        for (name, size) in files(&folder)? {
            if !devices.contains(&name) {
                unlink(&folder.join(&name))?;
                bytes = bytes.saturating_add(size);
            }
        }
        self.sweep_origins(records)?;
        Ok((deleted, bytes))
    }

    /// Removes downloads that nobody works on; their bytes.
    fn sweep_downloads(&self) -> Result<u64, Error> {
        let folder = self.root.join("partial");
        let mut bytes = 0u64;
        for (name, size) in files(&folder)? {
            let Ok(digest) = format!("sha256:{name}").parse::<Digest>() else { continue };
            if let Some(lock) = self.attempt(&self.write_lock(&digest), Mode::Exclusive)? {
                unlink(&folder.join(&name))?;
                lock.remove().map_err(Error::io("remove the lock of", &folder.join(&name)))?;
                bytes = bytes.saturating_add(size);
            }
        }
        Ok(bytes)
    }

    /// Removes lock files of what is not there.
    fn sweep_locks(&self) -> Result<(), Error> {
        let folder = self.root.join("locks");
        for (name, _) in files(&folder)? {
            let Some((hex, _)) = name.split_once('.') else { continue };
            let Ok(digest) = format!("sha256:{hex}").parse::<Digest>() else { continue };
            if self.blob(&digest).exists() {
                continue;
            }
            if let Some(lock) = self.attempt(&folder.join(&name), Mode::Exclusive)? {
                lock.remove().map_err(Error::io("remove", &folder.join(&name)))?;
            }
        }
        Ok(())
    }
}

/// Names and allocated bytes of the files in a folder.
pub(super) fn files(folder: &Path) -> Result<Vec<(String, u64)>, Error> {
    use std::os::unix::fs::MetadataExt;
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_file() {
            found.push((name, metadata.blocks().saturating_mul(512)));
        }
    }
    Ok(found)
}

pub(super) fn unlink(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}
