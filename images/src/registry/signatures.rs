//! Fetching the signatures of an image: cosign keeps them in the same repository, as the layers of an
//! image under a tag that is made of the digest that was signed.

use super::client::{Client, Request};
use super::error::RegistryError;
use crate::digest::Digest;
use crate::document::{DOCUMENT_MAX, DocumentError, Manifest, OCI_MANIFEST};
use crate::error::Error;
use crate::reference::Reference;
use crate::signature::{
    Evidence, PAYLOAD_MAX, PolicyError, SIGNATURE, SIGNATURE_TYPE, SIGNATURES_MAX, Signature, tag,
};
use crate::store::Expected;

/// The signatures of a manifest, and of the indexes that led to it.
pub(super) async fn fetch(
    client: &Client<'_>,
    reference: &Reference,
    manifest: Digest,
    indexes: Vec<String>,
) -> Result<Evidence, Error> {
    let mut evidence = Evidence { indexes, signatures: Vec::new() };
    let above = evidence.indexes.iter().map(|text| Digest::of(text.as_bytes()));
    for digest in [manifest].into_iter().chain(above) {
        let what = format!("signatures {digest} of {reference}");
        let path = format!("manifests/{}", tag(&digest));
        let request = Request { what: &what, path: &path, accept: Some(OCI_MANIFEST), from: None };
        let answer = match client.document(&request, DOCUMENT_MAX).await {
            Ok(answer) => answer,
            // Nobody signed this one.
            Err(RegistryError::NotFound { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        let attached: Manifest = serde_json::from_slice(&answer.bytes)
            .map_err(|error| DocumentError::Json { what: what.clone(), error })?;
        // Cosign attaches other things in the same way.
        let layers = attached.layers.iter().filter(|layer| layer.media_type == SIGNATURE_TYPE);
        let count = layers.clone().count().saturating_add(evidence.signatures.len());
        if count > SIGNATURES_MAX {
            let image = reference.to_string();
            return Err(PolicyError::TooMany { image, count }.into());
        }
        for layer in layers {
            let what = format!("signature {} of {reference}", layer.digest);
            // What has no annotation is no signature, and is not worth a request.
            let Some(signature) = layer.annotations.get(SIGNATURE) else { continue };
            if layer.size > PAYLOAD_MAX {
                return Err(DocumentError::TooLarge { what, size: layer.size }.into());
            }
            let wanted = Expected { digest: layer.digest, size: layer.size };
            let payload = client.small_blob(&what, &wanted).await?;
            // What is not text is no payload; it could not be kept, either.
            let Ok(payload) = String::from_utf8(payload) else { continue };
            evidence.signatures.push(Signature { payload, signature: signature.clone() });
        }
    }
    Ok(evidence)
}
