//! Images in files: `docker save` archives, OCI archives and OCI layouts. All of it is hostile
//! input; blobs are streamed, only documents are held in memory.

mod container;
mod load;
mod save;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

pub use container::Place;
pub(crate) use container::scan;
pub(crate) use load::{pull_docker, pull_layout, pull_oci_archive};
pub use save::SaveFormat;

use crate::document::DOCUMENT_MAX;
use crate::error::one_line;

/// Why an archive or layout cannot be used. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file or directory cannot be opened or read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system or the unpacker said.
        error: io::Error,
    },
    /// Neither a file nor, for a layout, a directory.
    #[error("{} is not {expected}", path.display())]
    NotA {
        /// Which.
        path: PathBuf,
        /// `a regular file`, `a directory`.
        expected: &'static str,
    },
    /// Not a tar archive, or one that breaks off.
    #[error("{} is not a tar archive, or is damaged: {}", path.display(), one_line(.error))]
    NotTar {
        /// Which.
        path: PathBuf,
        /// What the tar reader said.
        error: io::Error,
    },
    /// An entry of the archive that is refused.
    #[error("{}: entry {entry:?}: {reason}", path.display())]
    Entry {
        /// The archive.
        path: PathBuf,
        /// The entry's name.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// More entries than an archive of images can have.
    #[error("{} has more than {limit} entries", path.display())]
    TooManyEntries {
        /// The archive.
        path: PathBuf,
        /// How many are allowed.
        limit: usize,
    },
    /// Something that another part of the archive names is not there.
    #[error("{} has no {entry:?}, which {by} names", path.display())]
    Missing {
        /// The archive or layout.
        path: PathBuf,
        /// What is missing.
        entry: String,
        /// Where it is named.
        by: String,
    },
    /// Without its list of images.
    #[error("{} is not {kind}: it has no {missing}{hint}", path.display())]
    NotImage {
        /// The archive or layout.
        path: PathBuf,
        /// `a docker-archive`, ...
        kind: &'static str,
        /// `manifest.json`, ...
        missing: &'static str,
        /// What it is instead, where known.
        hint: &'static str,
    },
    /// A list of images that cannot be read.
    #[error("{}: {file} cannot be read: {error}", path.display())]
    Json {
        /// The archive or layout.
        path: PathBuf,
        /// `manifest.json`, ...
        file: String,
        /// What the parser said.
        error: serde_json::Error,
    },
    /// A document larger than [`DOCUMENT_MAX`].
    #[error("{}: {entry:?} has {size} bytes; more than {DOCUMENT_MAX} are refused", path.display())]
    TooLarge {
        /// The archive or layout.
        path: PathBuf,
        /// The document.
        entry: String,
        /// Its bytes.
        size: u64,
    },
    /// Nothing in it.
    #[error("{} has no image in it", path.display())]
    Empty {
        /// The archive or layout.
        path: PathBuf,
    },
    /// Several images, and it was not said which.
    #[error("{} has several images: {names}; say which one: PATH:NAME", path.display())]
    Several {
        /// The archive or layout.
        path: PathBuf,
        /// Their names.
        names: String,
    },
    /// Not the image that was asked for.
    #[error("{} has no image {wanted}; it has: {names}", path.display())]
    NoSuchName {
        /// The archive or layout.
        path: PathBuf,
        /// As asked for.
        wanted: String,
        /// What it has.
        names: String,
    },
    /// `manifest.json` and the configuration disagree.
    #[error("{}: {config} names {diff_ids} layers, manifest.json {layers}", path.display())]
    LayerCount {
        /// The archive.
        path: PathBuf,
        /// The configuration.
        config: String,
        /// Its layers.
        diff_ids: usize,
        /// Those of `manifest.json`.
        layers: usize,
    },
    /// Any of these, in the words of the process that found it.
    #[error("{0}")]
    Reported(String),
    /// The archive could not be written.
    #[error("cannot write the archive: {0}")]
    Write(#[source] io::Error),
}
