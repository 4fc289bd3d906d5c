//! What images say of themselves, and what registries do.

use images::document::{self, Document};
use images::{Digest, Reference};

const WHAT: &str = "it";

/// A byte for what the rest is, and a document: a manifest or an index, announced as one or not, or a
/// configuration. What is understood is understood the same when it is written anew, and within the
/// bounds there are.
pub fn image_documents(input: &[u8]) {
    let Some((kind, text)) = input.split_first() else { return };
    let announced = [
        "",
        "application/json",
        document::OCI_MANIFEST,
        document::OCI_INDEX,
        document::DOCKER_MANIFEST,
        document::DOCKER_INDEX,
    ];
    if kind & 0x80 != 0 {
        configuration(text, usize::from(kind & 0x7f));
        return;
    }
    let announced = announced[usize::from(*kind) % announced.len()];
    match document::parse(WHAT, announced, text) {
        Ok(Document::Manifest(manifest)) => {
            assert!(manifest.layers.len() <= document::LAYERS_MAX);
            assert!(manifest.config.size <= document::DOCUMENT_MAX);
            let written = serde_json::to_vec(&manifest).unwrap();
            let again = document::parse(WHAT, announced, &written).unwrap();
            assert_eq!(again, Document::Manifest(manifest));
        }
        Ok(Document::Index(index)) => {
            assert!(index.manifests.len() <= document::INDEX_MAX);
            match document::select(WHAT, &index.manifests) {
                Ok(chosen) => assert!(index.manifests.contains(chosen)),
                Err(error) => one_line(&error.to_string()),
            }
            let written = serde_json::to_vec(&index).unwrap();
            let again = document::parse(WHAT, announced, &written).unwrap();
            assert_eq!(again, Document::Index(index));
        }
        Err(error) => one_line(&error.to_string()),
    }
}

fn configuration(text: &[u8], layers: usize) {
    let config = match document::parse_config(WHAT, text, layers) {
        Ok(config) => config,
        Err(error) => return one_line(&error.to_string()),
    };
    assert_eq!(config.diff_ids.len(), layers);
    // As JSON, where volumes are a map: read from one, they are a list in any order.
    let written = serde_json::to_value(&config.parsed).unwrap();
    let again = document::parse_config(WHAT, written.to_string().as_bytes(), layers).unwrap();
    assert_eq!(serde_json::to_value(&again.parsed).unwrap(), written);
    assert_eq!(again.diff_ids, config.diff_ids);
}

/// A message that cannot steer a terminal.
fn one_line(text: &str) {
    assert!(!text.contains(char::is_control), "{text:?}");
}

/// A byte for what the rest is, and a text: the name of an image, a digest, or the header in which a
/// registry says how to log in. What is a name is the same name written in full or as a user would.
pub fn image_references(input: &[u8]) {
    let Some((kind, text)) = input.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    match kind % 3 {
        0 => match text.parse::<Reference>() {
            Ok(name) => {
                assert!(name.tag().is_some() || name.digest().is_some());
                assert!(!name.repository().contains("..") && !name.canonical().contains(' '));
                assert_eq!(name.canonical().parse().as_ref(), Ok(&name));
                assert_eq!(name.to_string().parse().as_ref(), Ok(&name));
            }
            Err(error) => one_line(&error.to_string()),
        },
        1 => match text.parse::<Digest>() {
            Ok(digest) => {
                assert_eq!(digest.to_string(), text);
                assert_eq!(digest.hex().len(), 64);
            }
            Err(error) => one_line(&error.to_string()),
        },
        _ => {
            for realm in images::registry::fuzzing::realms(&text) {
                // A quoted text in the header may be all of it.
                assert!(realm.len() <= text.len());
            }
        }
    }
}
