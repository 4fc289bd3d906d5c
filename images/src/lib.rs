//! Container images: names, registries, archives, a content store and root devices.
//!
//! [`Store`] is the way in. Its operations block; they may be used by several processes at once on
//! one folder, and any of them may be killed at any point. Nothing here needs a privilege.
//!
//! ```no_run
//! # fn main() -> Result<(), images::Error> {
//! use images::{PullOptions, PullPolicy, Silent, Store};
//!
//! let store = Store::open("/var/lib/vmrun/images".as_ref())?;
//! let image = store.obtain("alpine", PullPolicy::Missing, &PullOptions::default(), &Silent)?;
//! let lease = store.hold(&image)?; // for as long as the container runs
//! let device = store.root_device(&image, &Silent)?; // an EROFS file
//! # drop((lease, device));
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod archive;
pub mod conversion;
mod digest;
pub mod document;
pub mod erofs;
mod error;
mod image;
pub mod layer;
mod progress;
mod reference;
pub mod registry;
pub mod rootfs;
pub mod signature;
mod source;
mod store;
#[cfg(test)]
mod testing;

pub use archive::SaveFormat;
pub use digest::{Digest, DigestError};
pub use error::{Error, room_hint};
pub use image::{Image, Inspect, Layer, ManifestDescriptor, Metadata, RootFs, Summary};
pub use layer::UnpackLimits;
pub use progress::{Progress, Silent, Step};
pub use reference::{DEFAULT_REGISTRY, DEFAULT_TAG, Reference, ReferenceError};
pub use registry::{Network, RegistryOptions};
pub use signature::{Policy, PolicyError};
pub use source::{Select, Source, SourceError};
pub use store::{Lease, PruneOptions, PruneReport, PullOptions, PullPolicy, Removed, Store};
