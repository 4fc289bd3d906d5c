//! Manifests, indexes and configurations (OCI image specification; Docker's older media types of
//! the same documents). Everything here comes from outside and is bounded before it is parsed.

use std::collections::BTreeMap;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::digest::{Digest, DigestError};
use crate::error::one_line;

/// The largest manifest, index or configuration, in bytes (registries' usual limit).
pub const DOCUMENT_MAX: u64 = 4 << 20;
/// The most layers of an image. Docker's own limit is 127.
pub const LAYERS_MAX: usize = 256;
/// The most entries of an index.
pub const INDEX_MAX: usize = 4096;

/// Media type of an OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of an OCI image configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Docker's media type of a manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's media type of an index.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker's media type of an image configuration.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// OCI media type of a layer, to which `+gzip` or `+zstd` may be added.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// What is wrong with a document. `what` names it, with its digest where known.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Larger than [`DOCUMENT_MAX`].
    #[error("{what} has {size} bytes; more than {DOCUMENT_MAX} are refused")]
    TooLarge {
        /// The document.
        what: String,
        /// Its size in bytes, as announced or read so far.
        size: u64,
    },
    /// Not the JSON it should be.
    #[error("{what} cannot be read: {error}")]
    Json {
        /// The document.
        what: String,
        /// What the parser said.
        error: serde_json::Error,
    },
    /// A digest that is none, or of another algorithm.
    #[error("{what}: {error}")]
    Digest {
        /// The document.
        what: String,
        /// What is wrong with the digest.
        error: DigestError,
    },
    /// A media type that is not an image's.
    #[error("{what} has the unsupported media type {media_type:?}{hint}")]
    MediaType {
        /// The document or layer.
        what: String,
        /// The media type.
        media_type: String,
        /// What it is, where known.
        hint: &'static str,
    },
    /// Both an index and a manifest, or neither.
    #[error("{what} is neither clearly an image manifest nor clearly an image index")]
    Ambiguous {
        /// The document.
        what: String,
    },
    /// More layers than [`LAYERS_MAX`], or an index with too many entries.
    #[error("{what} has {count} {kind}; more than {limit} are refused")]
    TooMany {
        /// The document.
        what: String,
        /// `layers` or `entries`.
        kind: &'static str,
        /// How many.
        count: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// An index without an image for this platform.
    #[error("no linux/amd64 in {what}; it has: {has}")]
    NoPlatform {
        /// The index.
        what: String,
        /// The platforms it has.
        has: String,
    },
    /// A configuration for another platform.
    #[error("{what} is for {has}, not for linux/amd64")]
    WrongPlatform {
        /// The configuration.
        what: String,
        /// Its platform.
        has: String,
    },
    /// Configuration and manifest disagree.
    #[error("{what} names {diff_ids} layers, its manifest {layers}")]
    LayerCount {
        /// The configuration.
        what: String,
        /// The layers of the configuration.
        diff_ids: usize,
        /// The layers of the manifest.
        layers: usize,
    },
    /// Indexes in indexes.
    #[error("{what}: an index in an index in an index is refused")]
    Nested {
        /// The innermost.
        what: String,
    },
}

/// Names a blob by media type, digest and size (OCI "Content Descriptors").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// For which platform, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Anything else, by key.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// A platform, in Go's words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `amd64`.
    #[serde(default)]
    pub architecture: String,
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// `v1`, `v2`, ...: the level of amd64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    fn text(&self) -> String {
        let variant = self.variant.as_deref().unwrap_or_default();
        let slash = if variant.is_empty() { "" } else { "/" };
        format!("{}/{}{slash}{variant}", self.os, self.architecture)
    }
}

/// An image manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// 2.
    pub schema_version: u32,
    /// What it is; may be missing in OCI's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The configuration's blob.
    pub config: Descriptor,
    /// The layers' blobs, lowest first.
    #[serde(default, deserialize_with = "nullable")]
    pub layers: Vec<Descriptor>,
}

/// An image index, or an OCI layout's `index.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// 2.
    pub schema_version: u32,
    /// What it is; may be missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// Manifests and further indexes.
    #[serde(default, deserialize_with = "nullable")]
    pub manifests: Vec<Descriptor>,
}

/// Go writes `null` for an empty list or map.
fn nullable<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// A document that a reference may lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// One image per platform.
    Index(Index),
}

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip (RFC 1952), of one or more members.
    Gzip,
    /// Zstandard (RFC 8878), of one or more frames.
    Zstd,
}

impl Compression {
    /// The packing that the first bytes of a blob show.
    pub fn of(start: &[u8]) -> Compression {
        match start {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            // A skippable frame.
            [low, 0x2a, 0x4d, 0x18, ..] if low & 0xf0 == 0x50 => Compression::Zstd,
            _ => Compression::None,
        }
    }

    /// The OCI media type of a layer packed so.
    pub fn layer_media_type(self) -> &'static str {
        match self {
            Compression::None => OCI_LAYER,
            Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// How a layer of this media type must be packed.
pub fn layer_compression(what: &str, media_type: &str) -> Result<Compression, DocumentError> {
    let bad = |hint| {
        Err(DocumentError::MediaType {
            what: what.to_owned(),
            media_type: media_type.chars().take(200).collect(),
            hint,
        })
    };
    match media_type {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.docker.image.rootfs.diff.tar" => Ok(Compression::None),
        "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Ok(Compression::Gzip),
        "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(Compression::Zstd),
        foreign if foreign.contains("nondistributable") || foreign.contains("rootfs.foreign") => {
            bad(": a foreign layer, which must be fetched from elsewhere")
        }
        encrypted if encrypted.ends_with("+encrypted") => bad(": an encrypted layer"),
        _ => bad(""),
    }
}

fn json<T: serde::de::DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, DocumentError> {
    check_size(what, bytes.len() as u64)?;
    serde_json::from_slice(bytes)
        .map_err(|error| DocumentError::Json { what: what.to_owned(), error })
}

/// Refuses what is larger than [`DOCUMENT_MAX`].
pub fn check_size(what: &str, size: u64) -> Result<(), DocumentError> {
    if size > DOCUMENT_MAX {
        return Err(DocumentError::TooLarge { what: what.to_owned(), size });
    }
    Ok(())
}

/// Parses a manifest or index. `announced` is the media type that a registry or descriptor gave;
/// it may be empty, or one that says nothing (`application/json`).
pub fn parse(what: &str, announced: &str, bytes: &[u8]) -> Result<Document, DocumentError> {
    let value: Value = json(what, bytes)?;
    let inner = value.get("mediaType").and_then(Value::as_str).unwrap_or_default();
    let announced = announced.split(';').next().unwrap_or_default().trim();
    let generic = matches!(announced, "" | "application/json" | "text/plain");
    let media_type = if generic { inner } else { announced };
    let unknown = |media_type: &str, hint| DocumentError::MediaType {
        what: what.to_owned(),
        media_type: media_type.chars().take(200).collect(),
        hint,
    };
    let ambiguous = || DocumentError::Ambiguous { what: what.to_owned() };
    // One document must not be read as two things (OCI advisory GHSA-77vh-xpmg-72qh).
    if !generic && !inner.is_empty() && inner != announced {
        return Err(ambiguous());
    }
    let has = |key: &str| value.get(key).is_some_and(|v| !v.is_null());
    let is_index = match media_type {
        OCI_MANIFEST | DOCKER_MANIFEST => false,
        OCI_INDEX | DOCKER_INDEX => true,
        "" if value.get("schemaVersion").and_then(Value::as_u64) == Some(1) => {
            return Err(unknown(
                "Docker manifest schema 1",
                ": it is obsolete; push the image again",
            ));
        }
        "" => match (has("config"), has("manifests")) {
            (true, false) => false,
            (false, true) => true,
            _ => return Err(ambiguous()),
        },
        old if old.starts_with("application/vnd.docker.distribution.manifest.v1+") => {
            return Err(unknown(old, ": it is obsolete; push the image again"));
        }
        other => return Err(unknown(other, "")),
    };
    if (is_index && (has("config") || has("layers"))) || (!is_index && has("manifests")) {
        return Err(ambiguous());
    }
    let error = |error| DocumentError::Json { what: what.to_owned(), error };
    if is_index {
        let index: Index = serde_json::from_value(value).map_err(error)?;
        if index.manifests.len() > INDEX_MAX {
            let (count, limit) = (index.manifests.len(), INDEX_MAX);
            let what = what.to_owned();
            return Err(DocumentError::TooMany { what, kind: "entries", count, limit });
        }
        return Ok(Document::Index(index));
    }
    let manifest: Manifest = serde_json::from_value(value).map_err(error)?;
    if manifest.layers.len() > LAYERS_MAX {
        let (count, limit) = (manifest.layers.len(), LAYERS_MAX);
        let what = what.to_owned();
        return Err(DocumentError::TooMany { what, kind: "layers", count, limit });
    }
    match manifest.config.media_type.as_str() {
        OCI_CONFIG | DOCKER_CONFIG => {}
        other => {
            let what = format!("the configuration in {what}");
            let media_type = other.chars().take(200).collect();
            let hint = ": it is not a container image";
            return Err(DocumentError::MediaType { what, media_type, hint });
        }
    }
    check_size(&format!("the configuration in {what}"), manifest.config.size)?;
    for layer in &manifest.layers {
        layer_compression(&format!("layer {} of {what}", layer.digest), &layer.media_type)?;
    }
    Ok(Document::Manifest(manifest))
}

/// Chooses the image for linux/amd64 from an index. An entry without a platform counts when it is
/// the only one.
pub fn select<'a>(
    what: &str,
    manifests: &'a [Descriptor],
) -> Result<&'a Descriptor, DocumentError> {
    let fits = |d: &&Descriptor| {
        d.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == "amd64")
    };
    // Levels above the first need a newer CPU; one that asks for none comes first.
    let level = |d: &&Descriptor| {
        let variant = d.platform.as_ref().and_then(|p| p.variant.clone()).unwrap_or_default();
        if variant == "v1" { String::new() } else { variant }
    };
    if let Some(found) = manifests.iter().filter(fits).min_by_key(level) {
        return Ok(found);
    }
    if let [only] = manifests
        && only.platform.is_none()
    {
        return Ok(only);
    }
    let mut has: Vec<String> = manifests
        .iter()
        .map(|d| d.platform.as_ref().map_or("an unnamed platform".into(), Platform::text))
        .filter(|text| text != "unknown/unknown")
        .collect();
    has.sort();
    has.dedup();
    let mut has = has.join(", ");
    if has.is_empty() {
        has.push_str("nothing");
    }
    Err(DocumentError::NoPlatform { what: what.to_owned(), has: one_line(&has) })
}

/// A configuration, checked against its manifest.
#[derive(Debug, Clone)]
pub struct Config {
    /// The parsed document.
    pub parsed: ImageConfiguration,
    /// The digests of the layers' tar streams, lowest first.
    pub diff_ids: Vec<Digest>,
}

/// Parses an image's configuration and checks platform and number of layers.
pub fn parse_config(what: &str, bytes: &[u8], layers: usize) -> Result<Config, DocumentError> {
    let mut value: Value = json(what, bytes)?;
    drop_nulls(&mut value);
    if let Value::Object(map) = &mut value {
        let rootfs = map.entry("rootfs").or_insert_with(|| Value::Object(Default::default()));
        if let Value::Object(rootfs) = rootfs {
            rootfs.entry("type").or_insert_with(|| "layers".into());
            rootfs.entry("diff_ids").or_insert_with(|| Value::Array(Vec::new()));
        }
    }
    let parsed: ImageConfiguration = serde_json::from_value(value)
        .map_err(|error| DocumentError::Json { what: what.to_owned(), error })?;
    let (os, architecture) = (parsed.os().to_string(), parsed.architecture().to_string());
    if (os.as_str(), architecture.as_str()) != ("linux", "amd64") {
        let has = one_line(&format!("{os}/{architecture}"));
        return Err(DocumentError::WrongPlatform { what: what.to_owned(), has });
    }
    let diff_ids = parsed.rootfs().diff_ids().iter().map(|id| id.parse());
    let diff_ids: Vec<Digest> = diff_ids
        .collect::<Result<_, _>>()
        .map_err(|error| DocumentError::Digest { what: what.to_owned(), error })?;
    if diff_ids.len() != layers {
        let diff_ids = diff_ids.len();
        return Err(DocumentError::LayerCount { what: what.to_owned(), diff_ids, layers });
    }
    Ok(Config { parsed, diff_ids })
}

/// Go writes `null` where a field is empty. The depth is bounded by the parser's.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(values) => values.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}
