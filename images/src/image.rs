//! An image of the store, and what is shown of it.

use oci_spec::image::ImageConfiguration;
use serde::Serialize;
use serde_json::Value;

use crate::digest::Digest;
use crate::document::Compression;
use crate::reference::Reference;

/// An image of the store.
#[derive(Debug, Clone)]
pub struct Image {
    /// The name it was asked for by, or its first one; none if it has none.
    pub name: Option<Reference>,
    /// All its names.
    pub names: Vec<Reference>,
    /// Under which digests it was found in which repositories.
    pub repo_digests: Vec<Reference>,
    /// The digest of its manifest in the store.
    pub manifest_digest: Digest,
    /// The digest of its configuration: the image's id.
    pub config_digest: Digest,
    /// Its configuration.
    pub config: ImageConfiguration,
    /// Its layers, lowest first.
    pub layers: Vec<Layer>,
    /// Bytes of all its blobs.
    pub size: u64,
    /// When it last got a name, in seconds since 1970.
    pub tagged: Option<i64>,
}

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The digest of the blob.
    pub digest: Digest,
    /// The digest of the tar stream in it.
    pub diff_id: Digest,
    /// How it is packed.
    pub compression: Compression,
    /// The blob's bytes.
    pub size: u64,
}

impl Image {
    /// The image's id.
    pub fn id(&self) -> Digest {
        self.config_digest
    }

    /// Identifies the root device: the blobs that it is made of and what they have to unpack to.
    ///
    /// Not the chain id of the OCI image specification, which is made of diff ids alone: an image
    /// says of itself which those are, and that it is right is found by a process that its layers
    /// may have taken over. The blobs' digests are true, so that nobody can have a device made
    /// which is then another image's.
    pub fn device_id(&self) -> Digest {
        let line = |layer: &Layer| format!("{} {}\n", layer.digest, layer.diff_id);
        Digest::of(self.layers.iter().map(line).collect::<String>().as_bytes())
    }

    /// A name for messages: its name, or its short id.
    pub fn title(&self) -> String {
        self.name.as_ref().map_or_else(|| self.config_digest.short(), Reference::to_string)
    }
}

/// A line of `image ls`: one image with all its names. Serializes as a JSON object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Summary {
    /// Its id.
    pub id: Digest,
    /// `name:tag`, familiar forms; none if it is dangling.
    pub repo_tags: Vec<String>,
    /// `name@digest`.
    pub repo_digests: Vec<String>,
    /// When it was made, in seconds since 1970; 0 if it does not say.
    pub created: i64,
    /// Bytes of its blobs.
    pub size: u64,
}

/// What `image inspect` shows, with Docker's names (Engine API, `ImageInspect`).
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Inspect {
    /// Its id.
    pub id: Digest,
    /// `name:tag`, familiar forms.
    pub repo_tags: Vec<String>,
    /// `name@digest`.
    pub repo_digests: Vec<String>,
    /// The comment of the newest step of its history.
    pub comment: String,
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Who made it.
    pub author: String,
    /// The `config` object of its configuration, as it is there.
    pub config: Value,
    /// `amd64`.
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// Bytes of its blobs.
    pub size: u64,
    /// Its layers.
    #[serde(rename = "RootFS")]
    pub root_fs: RootFs,
    /// What this store knows of it.
    pub metadata: Metadata,
    /// The manifest in the store.
    pub descriptor: ManifestDescriptor,
}

/// The layers of an image.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct RootFs {
    /// `layers`.
    #[serde(rename = "Type")]
    pub kind: String,
    /// Diff ids, lowest first.
    pub layers: Vec<Digest>,
}

/// What the store knows of an image.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Metadata {
    /// When it last got a name, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_tag_time: Option<String>,
}

/// The manifest of an image.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ManifestDescriptor {
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// OCI's or Docker's.
    pub media_type: String,
}

/// An instant as RFC 3339.
pub(crate) fn rfc3339(seconds: i64) -> Option<String> {
    Some(jiff::Timestamp::from_second(seconds).ok()?.to_string())
}

/// Seconds since 1970 of an RFC 3339 text.
pub(crate) fn seconds(text: &str) -> Option<i64> {
    Some(text.parse::<jiff::Timestamp>().ok()?.as_second())
}
