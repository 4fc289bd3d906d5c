//! Reading images from archives and layouts into the store.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::path::Path;

use serde::{Deserialize, Deserializer};

use super::ArchiveError;
use super::container::Container;
use crate::digest::Digest;
use crate::document::{
    self, Compression, Descriptor, Document, Index, Manifest, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST,
};
use crate::error::{Error, one_line};
use crate::image::Image;
use crate::layer::UnpackLimits;
use crate::progress::{Progress, Step};
use crate::reference::Reference;
use crate::signature::{Origin, Provenance};
use crate::source::Select;
use crate::store::{Arrival, Expected, REF_NAME, Store, Work};

/// The annotation in which Docker and containerd keep an image's full name.
pub(super) const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// An element of `manifest.json` (Docker image specification v1.2, "Combined Image JSON").
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default, deserialize_with = "nullable")]
    repo_tags: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    layers: Vec<String>,
}

fn nullable<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl Store {
    /// Reads all images of a file (`docker save`, an OCI archive; compressed or not) or directory
    /// (an OCI layout) into the store, with their names.
    pub fn load(&self, path: &Path, progress: &dyn Progress) -> Result<Vec<Image>, Error> {
        let work = Work::begin(self)?;
        let container = if path.is_dir() {
            Container::folder(path)?
        } else {
            Container::tar(path, &UnpackLimits::default(), &work)?
        };
        load_all(&work, &container, progress)
    }

    /// The same from a stream, which is copied to a file of the store first.
    pub fn load_stream(
        &self,
        stream: &mut dyn Read,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>, Error> {
        let work = Work::begin(self)?;
        let mut file = work.temp_file()?;
        let shown = Path::new("standard input");
        let mut buffer = vec![0u8; 1 << 18];
        loop {
            let read = match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(ArchiveError::Read { path: shown.to_owned(), error }.into());
                }
            };
            let written = file.as_file_mut().write_all(buffer.get(..read).unwrap_or_default());
            written.map_err(|error| Error::io("write", file.path())(error))?;
        }
        let spooled = file.reopen().map_err(Error::io("read", file.path()))?;
        let container = Container::tar_file(shown, spooled, &UnpackLimits::default(), &work)?;
        load_all(&work, &container, progress)
    }
}

fn load_all(
    work: &Work<'_>,
    container: &Container,
    progress: &dyn Progress,
) -> Result<Vec<Image>, Error> {
    let mut images = Vec::new();
    if container.has("manifest.json") {
        for image in docker_images(container)? {
            images.push(load_docker(work, container, &image, tags(&image), progress)?);
        }
    } else {
        let index = layout_index(container, "a docker-archive or OCI layout")?;
        for entry in &index.manifests {
            let name = entry_name(entry, None);
            images.push(load_oci(work, container, entry, name, progress)?);
        }
    }
    if images.is_empty() {
        return Err(ArchiveError::Empty { path: container.path().to_owned() }.into());
    }
    Ok(images)
}

/// One image of a `docker save` archive.
pub(crate) fn pull_docker(
    store: &Store,
    path: &Path,
    select: &Select,
    limits: &UnpackLimits,
    progress: &dyn Progress,
) -> Result<Image, Error> {
    let work = Work::begin(store)?;
    let container = Container::tar(path, limits, &work)?;
    let images = docker_images(&container)?;
    let names = |image: &DockerImage| match image.repo_tags.as_slice() {
        [] => "(no name)".to_owned(),
        tags => tags.join(", "),
    };
    let (image, tags) = match select {
        Select::Only => {
            let all: Vec<String> = images.iter().map(names).collect();
            match images.as_slice() {
                [only] => (only, tags(only)),
                [] => return Err(ArchiveError::Empty { path: path.to_owned() }.into()),
                _ => return Err(several(path, all)),
            }
        }
        Select::Index(at) => match images.get(*at) {
            Some(image) => (image, tags(image)),
            None => return Err(no_such(path, select, images.iter().map(names).collect())),
        },
        Select::Name(name) => {
            let wanted: Reference = name.parse()?;
            match images.iter().find(|image| tags(image).contains(&wanted)) {
                Some(image) => (image, vec![wanted]),
                None => return Err(no_such(path, select, images.iter().map(names).collect())),
            }
        }
    };
    load_docker(&work, &container, image, tags, progress)
}

/// One image of an OCI archive.
pub(crate) fn pull_oci_archive(
    store: &Store,
    path: &Path,
    select: &Select,
    limits: &UnpackLimits,
    progress: &dyn Progress,
) -> Result<Image, Error> {
    let work = Work::begin(store)?;
    let container = Container::tar(path, limits, &work)?;
    pull_oci(&work, &container, "an oci-archive", select, progress)
}

/// One image of an OCI layout.
pub(crate) fn pull_layout(
    store: &Store,
    path: &Path,
    select: &Select,
    progress: &dyn Progress,
) -> Result<Image, Error> {
    let work = Work::begin(store)?;
    let container = Container::folder(path)?;
    pull_oci(&work, &container, "an OCI layout", select, progress)
}

fn several(path: &Path, names: Vec<String>) -> Error {
    ArchiveError::Several { path: path.to_owned(), names: list(names) }.into()
}

fn no_such(path: &Path, select: &Select, names: Vec<String>) -> Error {
    let wanted = match select {
        Select::Name(name) => name.clone(),
        Select::Index(index) => format!("@{index}"),
        Select::Only => String::new(),
    };
    ArchiveError::NoSuchName { path: path.to_owned(), wanted, names: list(names) }.into()
}

fn list(names: Vec<String>) -> String {
    one_line(&names.join("; "))
}

fn docker_images(container: &Container) -> Result<Vec<DockerImage>, Error> {
    let path = container.path();
    if !container.has("manifest.json") {
        let is_oci = container.has("index.json");
        let hint = if is_oci { "; it is an OCI archive: use oci-archive:FILE" } else { "" };
        let (kind, missing) = ("a docker-archive", "manifest.json");
        return Err(ArchiveError::NotImage { path: path.to_owned(), kind, missing, hint }.into());
    }
    let bytes = container.document("manifest.json", "a docker-archive")?;
    let images = serde_json::from_slice(&bytes).map_err(|error| {
        let file = "manifest.json".to_owned();
        ArchiveError::Json { path: path.to_owned(), file, error }
    })?;
    Ok(images)
}

/// The names of an image that are names; what is not one is left out, as `docker load` does.
fn tags(image: &DockerImage) -> Vec<Reference> {
    let parsed = image.repo_tags.iter().filter_map(|tag| tag.parse::<Reference>().ok());
    parsed.filter(|reference| reference.digest().is_none()).collect()
}

fn load_docker(
    work: &Work<'_>,
    container: &Container,
    image: &DockerImage,
    names: Vec<Reference>,
    progress: &dyn Progress,
) -> Result<Image, Error> {
    let path = container.path();
    let origin = Origin::DockerArchive;
    work.store().admit_unsigned(&origin)?;
    let bytes = container.document(&image.config, "manifest.json")?;
    let id = Digest::of(&bytes);
    let what = format!("{}: {:?}", path.display(), image.config);
    // Both `HEX.json` and `blobs/sha256/HEX` promise a digest.
    let file = image.config.rsplit('/').next().unwrap_or_default();
    let hex = file.strip_suffix(".json").unwrap_or(file);
    if let Ok(expected) = format!("sha256:{hex}").parse::<Digest>()
        && expected != id
    {
        return Err(Error::WrongDigest { what, found: id, expected });
    }
    if image.layers.len() > document::LAYERS_MAX {
        let (count, limit) = (image.layers.len(), document::LAYERS_MAX);
        let what = format!("{}: manifest.json", path.display());
        return Err(document::DocumentError::TooMany { what, kind: "layers", count, limit }.into());
    }
    let config = document::parse_config(&what, &bytes, image.layers.len()).map_err(|error| {
        let document::DocumentError::LayerCount { diff_ids, layers, .. } = error else {
            return Error::from(error);
        };
        let (path, config) = (path.to_owned(), image.config.clone());
        ArchiveError::LayerCount { path, config, diff_ids, layers }.into()
    })?;
    let mut layers = Vec::new();
    for (name, diff_id) in image.layers.iter().zip(&config.diff_ids) {
        let mut blob = container.open(name, "manifest.json")?;
        let total = blob.left;
        let what = format!("{}: layer {name:?}", path.display());
        let read = |error| Error::from(ArchiveError::Read { path: path.join(name), error });
        let mut start = [0u8; 4];
        let have = read_start(&mut blob, &mut start).map_err(read)?;
        let start = start.get(..have).unwrap_or_default();
        let compression = Compression::of(start);
        // The digest of a layer that is not packed is its diff id.
        let plain = compression == Compression::None;
        let expected = plain.then_some(Expected { digest: *diff_id, size: total });
        progress.begin(Step::Load, name, total);
        let mut told = |done| progress.advance(Step::Load, name, done);
        let found = work.copy(&what, &mut start.chain(blob), expected, &mut told, &read)?;
        progress.finish(Step::Load, name);
        layers.push(Descriptor {
            media_type: compression.layer_media_type().to_owned(),
            digest: found.digest,
            size: found.size,
            platform: None,
            annotations: Default::default(),
        });
    }
    let config_descriptor = Descriptor {
        media_type: OCI_CONFIG.to_owned(),
        digest: work.put(&bytes)?,
        size: bytes.len() as u64,
        platform: None,
        annotations: Default::default(),
    };
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(OCI_MANIFEST.to_owned()),
        config: config_descriptor,
        layers,
    };
    let bytes = serde_json::to_vec(&manifest).map_err(|error| ArchiveError::Json {
        path: path.to_owned(),
        file: "manifest.json".to_owned(),
        error,
    })?;
    let provenance = Provenance { origins: vec![origin], ..Provenance::default() };
    let arrival = Arrival { names, repo_digests: Vec::new(), provenance };
    work.commit(&bytes, OCI_MANIFEST, &manifest, arrival)
}

/// Up to four bytes, to see how a layer is packed.
fn read_start(reader: &mut impl Read, start: &mut [u8; 4]) -> io::Result<usize> {
    let mut have = 0;
    while let Some(rest) = start.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}

fn layout_index(container: &Container, kind: &'static str) -> Result<Index, Error> {
    let path = container.path();
    for missing in ["oci-layout", "index.json"] {
        if !container.has(missing) {
            let docker = container.has("manifest.json");
            let hint =
                if docker { "; it is a docker-archive: use docker-archive:FILE" } else { "" };
            let path = path.to_owned();
            return Err(ArchiveError::NotImage { path, kind, missing, hint }.into());
        }
    }
    #[derive(Deserialize)]
    struct Layout {
        #[serde(rename = "imageLayoutVersion")]
        version: String,
    }
    let json = |file: &str, error| ArchiveError::Json {
        path: path.to_owned(),
        file: file.to_owned(),
        error,
    };
    let bytes = container.document("oci-layout", kind)?;
    let layout: Layout = serde_json::from_slice(&bytes).map_err(|e| json("oci-layout", e))?;
    if !layout.version.starts_with("1.") {
        return Err(ArchiveError::Entry {
            path: path.to_owned(),
            entry: "oci-layout".to_owned(),
            reason: format!("version {:?} of the layout is unknown", layout.version),
        }
        .into());
    }
    let bytes = container.document("index.json", kind)?;
    match document::parse(&format!("{}: index.json", path.display()), OCI_INDEX, &bytes)? {
        Document::Index(index) => Ok(index),
        Document::Manifest(_) => Err(ArchiveError::Empty { path: path.to_owned() }.into()),
    }
}

/// The name an entry of `index.json` gives its image. A mere tag is one only together with
/// `fallback`, the file's name.
fn entry_name(entry: &Descriptor, fallback: Option<&Path>) -> Option<Reference> {
    let annotation = |key: &str| entry.annotations.get(key);
    let full = annotation(CONTAINERD_NAME).and_then(|name| name.parse::<Reference>().ok());
    let named = full.or_else(|| {
        let name = annotation(REF_NAME)?;
        if name.contains(['/', ':']) {
            return name.parse().ok();
        }
        let file = fallback?.file_name()?.to_str()?.to_lowercase();
        let stem = file.split('.').next()?;
        format!("localhost/{stem}:{name}").parse().ok()
    });
    named.filter(|reference| reference.digest().is_none())
}

fn pull_oci(
    work: &Work<'_>,
    container: &Container,
    kind: &'static str,
    select: &Select,
    progress: &dyn Progress,
) -> Result<Image, Error> {
    let path = container.path();
    let index = layout_index(container, kind)?;
    let entries = &index.manifests;
    let names = || {
        let name = |e: &Descriptor| e.annotations.get(REF_NAME).cloned();
        entries.iter().map(|e| name(e).unwrap_or_else(|| "(no name)".into())).collect()
    };
    let fallback = path.canonicalize().ok();
    let name_of = |entry: &Descriptor| entry_name(entry, fallback.as_deref());
    let entry = match select {
        Select::Index(at) => entries.get(*at).ok_or_else(|| no_such(path, select, names()))?,
        Select::Name(wanted) => {
            let literal = |e: &&Descriptor| e.annotations.get(REF_NAME) == Some(wanted);
            let reference = wanted.parse::<Reference>().ok();
            let meant = |e: &&Descriptor| reference.is_some() && entry_name(e, None) == reference;
            let mut found: Vec<Descriptor> = entries.iter().filter(literal).cloned().collect();
            if found.is_empty() {
                found = entries.iter().filter(meant).cloned().collect();
            }
            match found.as_slice() {
                [] => return Err(no_such(path, select, names())),
                [only] => return load_oci(work, container, only, name_of(only), progress),
                // One name, several platforms.
                several => {
                    let what = format!("{}: index.json", path.display());
                    let chosen = document::select(&what, several)?;
                    return load_oci(work, container, chosen, name_of(chosen), progress);
                }
            }
        }
        Select::Only => {
            let distinct: BTreeSet<Digest> = entries.iter().map(|e| e.digest).collect();
            match (entries.as_slice(), distinct.len()) {
                ([], _) => return Err(ArchiveError::Empty { path: path.to_owned() }.into()),
                // One image under several names is one image.
                ([first, ..], 1) => first,
                (several, _) => {
                    let nameless = several.iter().all(|e| !e.annotations.contains_key(REF_NAME));
                    if !nameless {
                        return Err(self::several(path, names()));
                    }
                    document::select(&format!("{}: index.json", path.display()), several)?
                }
            }
        }
    };
    load_oci(work, container, entry, name_of(entry), progress)
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// A document that a descriptor names, checked.
fn oci_document(
    container: &Container,
    descriptor: &Descriptor,
    by: &str,
) -> Result<Vec<u8>, Error> {
    let what = format!("{}: {}", container.path().display(), descriptor.digest);
    document::check_size(&what, descriptor.size)?;
    let bytes = container.document(&blob_name(&descriptor.digest), by)?;
    if bytes.len() as u64 != descriptor.size {
        let (found, expected) = (bytes.len() as u64, descriptor.size);
        return Err(Error::WrongSize { what, found, expected });
    }
    let found = Digest::of(&bytes);
    if found != descriptor.digest {
        return Err(Error::WrongDigest { what, found, expected: descriptor.digest });
    }
    Ok(bytes)
}

fn load_oci(
    work: &Work<'_>,
    container: &Container,
    entry: &Descriptor,
    name: Option<Reference>,
    progress: &dyn Progress,
) -> Result<Image, Error> {
    let path = container.path();
    let origin = container.layout_origin();
    work.store().admit_unsigned(&origin)?;
    let mut entry = entry.clone();
    let mut by = "index.json".to_owned();
    for _ in 0..3 {
        let bytes = oci_document(container, &entry, &by)?;
        let what = format!("{}: {}", path.display(), entry.digest);
        let manifest = match document::parse(&what, &entry.media_type, &bytes)? {
            Document::Manifest(manifest) => manifest,
            Document::Index(index) => {
                by = format!("index {}", entry.digest);
                entry = document::select(&what, &index.manifests)?.clone();
                continue;
            }
        };
        let by = format!("manifest {}", entry.digest);
        let config_bytes = oci_document(container, &manifest.config, &by)?;
        let what = format!("{}: configuration {}", path.display(), manifest.config.digest);
        document::parse_config(&what, &config_bytes, manifest.layers.len())?;
        for layer in &manifest.layers {
            let file = blob_name(&layer.digest);
            let mut blob = container.open(&file, &by)?;
            let what = format!("{}: layer {}", path.display(), layer.digest);
            if blob.left != layer.size {
                let (found, expected) = (blob.left, layer.size);
                return Err(Error::WrongSize { what, found, expected });
            }
            let shown = layer.digest.to_string();
            progress.begin(Step::Load, &shown, layer.size);
            let mut told = |done| progress.advance(Step::Load, &shown, done);
            let read = |error| Error::from(ArchiveError::Read { path: path.join(&file), error });
            let expected = Expected { digest: layer.digest, size: layer.size };
            work.copy(&what, &mut blob, Some(expected), &mut told, &read)?;
            progress.finish(Step::Load, &shown);
        }
        work.put(&config_bytes)?;
        let media_type = match manifest.media_type.as_deref() {
            Some(inner) => inner,
            None if entry.media_type.is_empty() => OCI_MANIFEST,
            None => &entry.media_type,
        };
        let names = name.into_iter().collect();
        let provenance = Provenance { origins: vec![origin], ..Provenance::default() };
        let arrival = Arrival { names, repo_digests: Vec::new(), provenance };
        return work.commit(&bytes, media_type, &manifest, arrival);
    }
    let what = format!("{}: {}", path.display(), entry.digest);
    Err(document::DocumentError::Nested { what }.into())
}
