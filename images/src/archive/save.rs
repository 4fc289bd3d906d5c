//! Writing images into an archive.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};

use serde::Serialize;

use super::ArchiveError;
use super::load::CONTAINERD_NAME;
use crate::digest::Digest;
use crate::document::{Descriptor, Index, OCI_INDEX, Platform};
use crate::error::Error;
use crate::image::Image;
use crate::reference::Reference;
use crate::store::{REF_NAME, Store};

/// What `save` writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SaveFormat {
    /// What `docker save` writes since version 25: an OCI layout with a `manifest.json`.
    #[default]
    DockerArchive,
    /// An OCI layout.
    OciArchive,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

/// An image and the names it is saved under.
struct Entry {
    image: Image,
    names: Vec<Reference>,
}

impl Store {
    /// Writes images into one archive: a name saves that name, an id the image without a name.
    /// The same images give the same bytes.
    pub fn save(
        &self,
        images: &[&str],
        format: SaveFormat,
        output: &mut dyn Write,
    ) -> Result<(), Error> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut leases = Vec::new();
        for text in images {
            let image = self.get(text)?;
            leases.push(self.hold(&image)?);
            let name = text.parse::<Reference>().ok().filter(|n| image.names.contains(n));
            match entries.iter_mut().find(|e| e.image.manifest_digest == image.manifest_digest) {
                Some(entry) => entry.names.extend(name),
                None => entries.push(Entry { names: name.into_iter().collect(), image }),
            }
        }
        let mut tar = tar::Builder::new(output);
        let mut blobs: BTreeSet<Digest> = BTreeSet::new();
        for entry in &entries {
            blobs.insert(entry.image.manifest_digest);
            blobs.insert(entry.image.config_digest);
            blobs.extend(entry.image.layers.iter().map(|layer| layer.digest));
        }
        for digest in &blobs {
            let path = self.blob(digest);
            let file = File::open(&path).map_err(Error::io("read", &path))?;
            let size = file.metadata().map_err(Error::io("read", &path))?.len();
            append(&mut tar, &name(digest), size, &mut file.take(size))?;
        }
        let bytes = json(&self.save_index(&entries)?)?;
        append(&mut tar, "index.json", bytes.len() as u64, &mut bytes.as_slice())?;
        if format == SaveFormat::DockerArchive {
            let list: Vec<DockerImage> = entries.iter().map(docker).collect();
            let bytes = json(&list)?;
            append(&mut tar, "manifest.json", bytes.len() as u64, &mut bytes.as_slice())?;
        }
        let layout = b"{\"imageLayoutVersion\": \"1.0.0\"}";
        append(&mut tar, "oci-layout", layout.len() as u64, &mut layout.as_slice())?;
        let output = tar.into_inner().map_err(ArchiveError::Write)?;
        output.flush().map_err(ArchiveError::Write)?;
        drop(leases);
        Ok(())
    }

    fn save_index(&self, entries: &[Entry]) -> Result<Index, Error> {
        let mut manifests = Vec::new();
        for entry in entries {
            let digest = entry.image.manifest_digest;
            let path = self.blob(&digest);
            let metadata = std::fs::metadata(&path).map_err(Error::io("read", &path))?;
            let manifest = self.manifest(&digest)?;
            let media_type =
                manifest.media_type.unwrap_or_else(|| crate::document::OCI_MANIFEST.to_owned());
            let names: Vec<Option<&Reference>> = match entry.names.as_slice() {
                [] => vec![None],
                names => names.iter().map(Some).collect(),
            };
            for name in names {
                let mut annotations = BTreeMap::new();
                if let Some(name) = name {
                    annotations.insert(CONTAINERD_NAME.to_owned(), name.canonical());
                    let tag = name.tag().unwrap_or_default().to_owned();
                    annotations.insert(REF_NAME.to_owned(), tag);
                }
                manifests.push(Descriptor {
                    media_type: media_type.clone(),
                    digest,
                    size: metadata.len(),
                    platform: Some(Platform {
                        architecture: "amd64".to_owned(),
                        os: "linux".to_owned(),
                        variant: None,
                    }),
                    annotations,
                });
            }
        }
        Ok(Index { schema_version: 2, media_type: Some(OCI_INDEX.to_owned()), manifests })
    }
}

fn name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn docker(entry: &Entry) -> DockerImage {
    DockerImage {
        config: name(&entry.image.config_digest),
        repo_tags: entry.names.iter().map(Reference::to_string).collect(),
        layers: entry.image.layers.iter().map(|layer| name(&layer.digest)).collect(),
    }
}

fn json<T: Serialize>(value: &T) -> Result<Vec<u8>, Error> {
    let bytes = serde_json::to_vec(value);
    Ok(bytes.map_err(|error| ArchiveError::Write(io::Error::other(error)))?)
}

fn append(
    tar: &mut tar::Builder<&mut dyn Write>,
    name: &str,
    size: u64,
    bytes: &mut dyn Read,
) -> Result<(), Error> {
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_entry_type(tar::EntryType::Regular);
    tar.append_data(&mut header, name, bytes).map_err(ArchiveError::Write)?;
    Ok(())
}
