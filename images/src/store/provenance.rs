//! Where the images of the store came from, and whether the signature policy accepts them.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use super::Store;
use super::database::Record;
use super::manage::{files, unlink};
use crate::digest::Digest;
use crate::error::Error;
use crate::image::Image;
use crate::signature::{Evidence, Origin, PolicyError, Provenance};

/// For an image of an archive, which has no signatures.
const NO_SIGNATURES: &str = "; archives and layouts have none that vmrun reads";
/// For an image that was pulled when nothing was demanded.
const PULL_AGAIN: &str = "; it was not verified when it was pulled: pull it again";

impl Store {
    /// Whether images from there need a signature; an error if they are rejected anyhow.
    pub(crate) fn wants_signature(&self, origin: &Origin) -> Result<bool, PolicyError> {
        self.policy.as_ref().map_or(Ok(false), |policy| policy.wants_signature(origin))
    }

    /// Asks the policy for an image that is about to come from a registry.
    pub(crate) fn admit(
        &self,
        origin: &Origin,
        manifest: Digest,
        evidence: &Evidence,
    ) -> Result<(), PolicyError> {
        let Some(policy) = &self.policy else { return Ok(()) };
        policy.check(origin, manifest, evidence, "")
    }

    /// Asks the policy for an image that is about to come from somewhere without signatures.
    pub(crate) fn admit_unsigned(&self, origin: &Origin) -> Result<(), PolicyError> {
        let Some(policy) = &self.policy else { return Ok(()) };
        policy.check(origin, Digest::of(b""), &Evidence::default(), NO_SIGNATURES)
    }

    /// Asks the policy for an image of the store: one of the ways it came must be accepted now.
    pub(super) fn admit_image(&self, image: &Image) -> Result<(), Error> {
        let Some(policy) = &self.policy else { return Ok(()) };
        let Provenance { mut origins, evidence } = self.provenance(&image.manifest_digest)?;
        if origins.is_empty() {
            // From before this was written down: its names must do.
            origins = image.names.iter().chain(&image.repo_digests).map(Origin::docker).collect();
        }
        let mut refused = None;
        for origin in &origins {
            match policy.check(origin, image.manifest_digest, &evidence, PULL_AGAIN) {
                Ok(()) => return Ok(()),
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        match refused {
            Some(error) => Err(error.into()),
            None => {
                Ok(policy.check(&Origin::DockerArchive, image.manifest_digest, &evidence, "")?)
            }
        }
    }

    fn origins(&self) -> PathBuf {
        self.root.join("origins")
    }

    /// What is known of the image with this manifest.
    fn provenance(&self, manifest: &Digest) -> Result<Provenance, Error> {
        let path = self.origins().join(format!("{}.json", manifest.hex()));
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Provenance::default());
            }
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::Damaged { path, reason: error.to_string() })
    }

    /// Writes down another way into the store. The caller holds `locks/index`.
    pub(super) fn add_provenance(&self, manifest: &Digest, new: Provenance) -> Result<(), Error> {
        let folder = self.origins();
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.map_err(Error::io("create", &folder))?;
        let before = self.provenance(manifest)?;
        let mut all = before.clone();
        all.add(new);
        if all == before {
            return Ok(());
        }
        let path = folder.join(format!("{}.json", manifest.hex()));
        let temporary = folder.join(format!("{}.new", manifest.hex()));
        let write = || -> io::Result<()> {
            let mut file = File::create(&temporary)?;
            serde_json::to_writer(&mut file, &all)?;
            file.flush()?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        };
        write().map_err(Error::io("write", &path))?;
        self.sync_folder(&folder)
    }

    /// Forgets what is not in the list. The caller holds `locks/index`.
    pub(super) fn sweep_origins(&self, records: &[Record]) -> Result<(), Error> {
        let folder = self.origins();
        if !folder.exists() {
            return Ok(());
        }
        let live: BTreeSet<String> =
            records.iter().map(|record| format!("{}.json", record.manifest.hex())).collect();
        for (name, _) in files(&folder)? {
            if !live.contains(&name) {
                unlink(&folder.join(name))?;
            }
        }
        Ok(())
    }
}
