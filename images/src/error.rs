//! What the store's operations fail with.

use std::io;
use std::path::{Path, PathBuf};

use crate::archive::ArchiveError;
use crate::digest::Digest;
use crate::document::DocumentError;
use crate::layer::LayerError;
use crate::reference::ReferenceError;
use crate::registry::RegistryError;
use crate::rootfs::ConvertError;
use crate::signature::PolicyError;
use crate::source::SourceError;

/// Why an operation on images failed. `Display` is one line for a user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a name of an image.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// Not a source of an image.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A manifest, index or configuration.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// An archive or layout.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// A registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The signature policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A layer's stream.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A layer's entries, or the root device.
    #[error("cannot make the root device of {image}: {}{}", one_line(.error), convert_hint(.error))]
    Convert {
        /// The image's name or id.
        image: String,
        /// Which layer and entry.
        error: ConvertError,
    },
    /// The process that reads layers or archives.
    #[error("cannot convert {what}: {reason}")]
    Converter {
        /// The image's name or id, or the archive's path.
        what: String,
        /// What became of it.
        reason: String,
    },
    /// The store's own files.
    #[error("cannot {action} {}: {error}{}", path.display(), hint(.error))]
    Io {
        /// `create`, `read`, ...
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A file of the store that is not as it was written.
    #[error("{} is damaged: {reason}; remove the image and pull it again", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// How it shows.
        reason: String,
    },
    /// A blob that is not what its name says.
    #[error("{what} has digest {found}, expected {expected}")]
    WrongDigest {
        /// The blob and where it came from.
        what: String,
        /// Of its bytes.
        found: Digest,
        /// By its descriptor.
        expected: Digest,
    },
    /// A blob of another size than announced.
    #[error("{what} has {found} bytes, expected {expected}")]
    WrongSize {
        /// The blob and where it came from.
        what: String,
        /// Its bytes; when there are more than expected, how many were read.
        found: u64,
        /// By its descriptor.
        expected: u64,
    },
    /// The store has no such image.
    #[error("No such image: {0}")]
    NoSuchImage(String),
    /// An id prefix that several images share.
    #[error("{prefix} is the beginning of several images' ids: {ids}; give more digits")]
    Ambiguous {
        /// As given.
        prefix: String,
        /// Short ids.
        ids: String,
    },
    /// An image that is being used.
    #[error(
        "conflict: unable to remove image {image} (must be forced) - it is being used by a running \
         container or another command"
    )]
    InUse {
        /// As given.
        image: String,
    },
    /// An id that has several names.
    #[error(
        "conflict: unable to delete {id} (must be forced) - image is referenced in multiple \
         repositories: {names}"
    )]
    SeveralNames {
        /// As given.
        id: String,
        /// Its names.
        names: String,
    },
    /// A name with a digest cannot be given to an image.
    #[error("refusing to create a tag with a digest reference: {0}")]
    TagWithDigest(String),
    /// An image that went away while it was used.
    #[error("image {0} was removed by another command meanwhile; pull it again")]
    Gone(String),
    /// The policy `never` and no such image.
    #[error("image {0} is not in the store and must not be pulled (`--pull never`)")]
    NotPulled(String),
}

const FULL: &str = "; make room, for example with `vmrun image prune`";

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |error| Error::Io { action, path, error }
    }
}

fn convert_hint(error: &ConvertError) -> &'static str {
    match error {
        ConvertError::Write(error) => hint(error),
        _ => "",
    }
}

/// Text that holds parts of a hostile file, as one line that cannot steer a terminal.
pub(crate) fn one_line(text: &dyn std::fmt::Display) -> String {
    let text = text.to_string();
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(1000).collect()
}

/// What helps where a disk is full or a quota used up, to be added to a line; empty elsewhere.
pub fn room_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FULL,
        _ => "",
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "; run as the user that owns it, or choose another --root"
        }
        _ => room_hint(error),
    }
}
