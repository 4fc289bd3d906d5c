//! Who vouches for an image: the signature policy (containers-policy.json(5)) and cosign's signatures.
//!
//! The policy is applied where an image enters the store, before any of its layers is read, and again
//! where its root device is asked for. For the second time the store keeps where each image came from
//! and the signatures it had ([`Provenance`]). So a change of the policy or of a key counts for what is
//! in the store already, and nothing has to be fetched for it.

mod identity;
mod origin;
mod policy;
mod scope;
mod sigstore;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use origin::Origin;
pub use policy::Policy;
pub(crate) use sigstore::{SIGNATURE, SIGNATURE_TYPE, tag};

use crate::digest::Digest;

/// Signatures of one image that are looked at; a registry may name as many as it likes.
pub(crate) const SIGNATURES_MAX: usize = 100;
/// Bytes of a signature's payload.
pub(crate) const PAYLOAD_MAX: u64 = 1 << 20;

/// Why the signature policy cannot be applied, or refuses an image.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The policy's file cannot be read.
    #[error("cannot read the signature policy {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The policy's file is not one.
    #[error("the signature policy {} is invalid: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        reason: String,
    },
    /// The policy has `reject` for the image.
    #[error("{image} is rejected by the signature policy {} ({scope})", path.display())]
    Rejected {
        /// Where the image comes from.
        image: String,
        /// The policy's file.
        path: PathBuf,
        /// The part of it that matched.
        scope: String,
    },
    /// The policy demands what is not verified here.
    #[error(
        "the signature policy {} ({scope}) has {demand} for {image}; vmrun verifies sigstoreSigned \
         with a key only",
        path.display()
    )]
    Unsupported {
        /// Where the image comes from.
        image: String,
        /// The policy's file.
        path: PathBuf,
        /// The part of it that matched.
        scope: String,
        /// `signedBy`, or a field.
        demand: &'static str,
    },
    /// A key that the policy names.
    #[error("the signature policy {}: {reason}", path.display())]
    Key {
        /// The policy's file.
        path: PathBuf,
        /// Which key, and what is wrong with it.
        reason: String,
    },
    /// There is no signature.
    #[error(
        "{image} has no signature, which the signature policy {} ({scope}) demands{hint}",
        path.display()
    )]
    Unsigned {
        /// Where the image comes from.
        image: String,
        /// The policy's file.
        path: PathBuf,
        /// The part of it that matched.
        scope: String,
        /// What may help.
        hint: &'static str,
    },
    /// There are signatures, none of which the policy accepts.
    #[error(
        "no signature of {image} satisfies the signature policy {} ({scope}): {reasons}",
        path.display()
    )]
    Refused {
        /// Where the image comes from.
        image: String,
        /// The policy's file.
        path: PathBuf,
        /// The part of it that matched.
        scope: String,
        /// What is wrong with each.
        reasons: String,
    },
    /// More signatures than are looked at.
    #[error("{image} has {count} signatures; more than {SIGNATURES_MAX} are refused")]
    TooMany {
        /// The image.
        image: String,
        /// How many.
        count: usize,
    },
}

/// A signature as cosign attaches it to an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Signature {
    /// What was signed, as text: a JSON document.
    pub payload: String,
    /// Base64.
    pub signature: String,
}

/// What is known of an image that may speak for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Evidence {
    /// The texts of indexes that lead to the manifest. Who signed one of those signed the manifest.
    pub indexes: Vec<String>,
    pub signatures: Vec<Signature>,
}

/// Where an image of the store came from, all of its ways, and what spoke for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Provenance {
    pub origins: Vec<Origin>,
    pub evidence: Evidence,
}

impl Provenance {
    /// Adds what another way of the same image into the store brought.
    pub(crate) fn add(&mut self, new: Provenance) {
        merge(&mut self.origins, new.origins);
        merge(&mut self.evidence.indexes, new.evidence.indexes);
        merge(&mut self.evidence.signatures, new.evidence.signatures);
    }
}

/// Appends what is new; of too many the oldest go.
fn merge<T: PartialEq>(into: &mut Vec<T>, new: Vec<T>) {
    for item in new {
        into.retain(|other| *other != item);
        into.push(item);
    }
    into.drain(..into.len().saturating_sub(SIGNATURES_MAX));
}

impl Evidence {
    /// The digests whose signature is the image's: its manifest's, and those of indexes that name it.
    fn digests(&self, manifest: Digest) -> Vec<Digest> {
        #[derive(Deserialize)]
        struct Entry {
            digest: String,
        }
        #[derive(Deserialize)]
        struct Index {
            manifests: Vec<Entry>,
        }
        let mut digests = vec![manifest];
        // An index may name an index; they are few, and each can lead to the next.
        for _ in 0..self.indexes.len() {
            for text in &self.indexes {
                let digest = Digest::of(text.as_bytes());
                let Ok(index) = serde_json::from_str::<Index>(text) else { continue };
                let leads = index
                    .manifests
                    .iter()
                    .any(|entry| entry.digest.parse().is_ok_and(|found| digests.contains(&found)));
                if leads && !digests.contains(&digest) {
                    digests.push(digest);
                }
            }
        }
        digests
    }
}
