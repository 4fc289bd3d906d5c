//! Signatures as cosign makes them (sigstore cosign's `SIGNATURE_SPEC.md`).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Signature;
use crate::digest::Digest;

/// The annotation that holds a signature in base64.
pub(crate) const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// The media type of what is signed.
pub(crate) const SIGNATURE_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// What a payload calls itself.
const PAYLOAD_TYPE: &str = "cosign container image signature";

/// The tag under which a repository has the signatures of a manifest or index.
pub(crate) fn tag(digest: &Digest) -> String {
    format!("sha256-{}.sig", digest.hex())
}

/// What is signed. As strict as containers/image, which refuses what it does not know.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Payload {
    critical: Critical,
    #[serde(rename = "optional")]
    _optional: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Critical {
    #[serde(rename = "type")]
    kind: String,
    image: SignedImage,
    identity: Identity,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct SignedImage {
    docker_manifest_digest: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Identity {
    docker_reference: String,
}

/// A public key: ECDSA on P-256 or P-384, Ed25519, or RSA of 2048 bits or more.
pub(super) struct Key(SubjectPublicKeyInfoDer<'static>);

impl Key {
    /// Reads a key in PEM (RFC 7468, `PUBLIC KEY`).
    pub fn parse(pem: &[u8]) -> Result<Key, String> {
        let key = SubjectPublicKeyInfoDer::from_pem_slice(pem)
            .map_err(|_| "it is no public key in PEM".to_owned())?;
        webpki::RawPublicKeyEntity::try_from(&key)
            .map_err(|_| "it is no public key (SubjectPublicKeyInfo)".to_owned())?;
        Ok(Key(key))
    }

    fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        // Cosign signs SHA-256 digests with every kind of key but Ed25519. The kind is the key's to
        // say: an algorithm that does not fit it fails.
        const ALGORITHMS: [&dyn SignatureVerificationAlgorithm; 4] = [
            webpki::ring::ECDSA_P256_SHA256,
            webpki::ring::ECDSA_P384_SHA256,
            webpki::ring::ED25519,
            webpki::ring::RSA_PKCS1_2048_8192_SHA256,
        ];
        let Ok(key) = webpki::RawPublicKeyEntity::try_from(&self.0) else { return false };
        ALGORITHMS.iter().any(|a| key.verify_signature(*a, message, signature).is_ok())
    }
}

/// Whether one of `keys` signed one of `digests` for a name that `accepts`; why not.
pub(super) fn verify(
    signature: &Signature,
    keys: &[Key],
    digests: &[Digest],
    accepts: impl Fn(&str) -> bool,
) -> Result<(), String> {
    let bytes = STANDARD.decode(&signature.signature).map_err(|_| "it is not base64".to_owned())?;
    let payload = signature.payload.as_bytes();
    // Nothing is read of what nobody vouches for.
    if !keys.iter().any(|key| key.verifies(payload, &bytes)) {
        return Err("it was not made with the policy's key".to_owned());
    }
    let payload: Payload =
        serde_json::from_slice(payload).map_err(|error| format!("its payload: {error}"))?;
    let Critical { kind, image, identity } = payload.critical;
    if kind != PAYLOAD_TYPE {
        return Err(format!("its payload is a {kind:?}"));
    }
    if !image.docker_manifest_digest.parse().is_ok_and(|digest| digests.contains(&digest)) {
        return Err(format!("it is for {:?}, another image", image.docker_manifest_digest));
    }
    if !accepts(&identity.docker_reference) {
        return Err(format!("it is for the name {:?}", identity.docker_reference));
    }
    Ok(())
}
