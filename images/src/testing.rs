//! Images for tests, made in memory.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::digest::Digest;
use crate::document::{Compression, OCI_CONFIG, OCI_MANIFEST};

/// A tar of files with these names and contents.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        tar.append_data(&mut header, name, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// An image with everything about it in plain sight, to be spoilt by tests.
#[derive(Clone)]
pub struct Made {
    pub blobs: BTreeMap<Digest, Vec<u8>>,
    pub config: Value,
    pub manifest: Value,
}

impl Made {
    /// An image of layers, each a blob and the tar in it.
    pub fn new(layers: &[(Vec<u8>, Vec<u8>, Compression)]) -> Made {
        let diff_ids: Vec<_> = layers.iter().map(|(_, tar, _)| Digest::of(tar)).collect();
        let config = json!({
            "created": "2026-01-02T03:04:05Z", "architecture": "amd64", "os": "linux",
            "config": {"Cmd": ["/bin/sh"], "Env": ["A=1"], "Healthcheck": {"Test": ["NONE"]}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let mut made = Made { blobs: BTreeMap::new(), config, manifest: Value::Null };
        let descriptors: Vec<Value> = layers
            .iter()
            .map(|(blob, _, compression)| {
                let digest = made.add(blob.clone());
                let media_type = compression.layer_media_type();
                json!({"mediaType": media_type, "digest": digest, "size": blob.len()})
            })
            .collect();
        made.manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": null, "layers": descriptors,
        });
        made.describe_config();
        made
    }

    /// Two layers, gzip and Zstandard.
    pub fn two() -> Made {
        let (a, b) = (tar(&[("a", b"one")]), tar(&[("b", &noise(7, 3 << 20))]));
        Made::new(&[(gzip(&a), a, Compression::Gzip), (zstd(&b), b, Compression::Zstd)])
    }

    /// One small layer with `text` in it.
    pub fn small(text: &str) -> Made {
        let a = tar(&[("text", text.as_bytes())]);
        Made::new(&[(a.clone(), a, Compression::None)])
    }

    pub fn add(&mut self, blob: Vec<u8>) -> Digest {
        let digest = Digest::of(&blob);
        self.blobs.insert(digest, blob);
        digest
    }

    /// Makes the manifest name the configuration as it is now.
    pub fn describe_config(&mut self) {
        let bytes = serde_json::to_vec(&self.config).unwrap();
        let size = bytes.len();
        let digest = self.add(bytes);
        self.manifest["config"] = json!({"mediaType": OCI_CONFIG, "digest": digest, "size": size});
    }

    pub fn id(&self) -> Digest {
        Digest::of(&serde_json::to_vec(&self.config).unwrap())
    }

    pub fn manifest_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&self.manifest).unwrap()
    }

    pub fn layer(&self, at: usize) -> (Digest, Vec<u8>) {
        let text = self.manifest["layers"][at]["digest"].as_str().unwrap();
        let digest = text.parse().unwrap();
        (digest, self.blobs[&digest].clone())
    }

    /// Writes it as an OCI layout; `name` is its annotation.
    pub fn layout(&self, folder: &Path, name: &str) {
        let blobs = folder.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        let manifest = self.manifest_bytes();
        let digest = Digest::of(&manifest);
        fs::write(blobs.join(digest.hex()), &manifest).unwrap();
        for (digest, bytes) in &self.blobs {
            fs::write(blobs.join(digest.hex()), bytes).unwrap();
        }
        fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let path = folder.join("index.json");
        let mut index: Value = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap(),
            Err(_) => json!({"schemaVersion": 2, "manifests": []}),
        };
        index["manifests"].as_array_mut().unwrap().push(json!({
            "mediaType": OCI_MANIFEST, "digest": digest, "size": manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": name},
        }));
        fs::write(path, serde_json::to_vec(&index).unwrap()).unwrap();
    }

    /// The files of a `docker save` archive of it.
    pub fn docker(&self, tags: &[&str]) -> Vec<(String, Vec<u8>)> {
        let config = format!("{}.json", self.id().hex());
        let count = self.manifest["layers"].as_array().unwrap().len();
        let layers: Vec<String> = (0..count).map(|at| format!("{at}/layer.tar")).collect();
        let list = json!([{"Config": config, "RepoTags": tags, "Layers": layers}]);
        let mut files = vec![
            ("manifest.json".to_owned(), serde_json::to_vec(&list).unwrap()),
            (config, serde_json::to_vec(&self.config).unwrap()),
        ];
        files.extend(layers.into_iter().enumerate().map(|(at, name)| (name, self.layer(at).1)));
        files
    }
}

/// The same with names that are owned.
pub fn tar_of(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let files: Vec<_> = files.iter().map(|(n, c)| (n.as_str(), c.as_slice())).collect();
    tar(&files)
}

/// An error in a line, as a user sees them.
pub fn shown<T>(result: Result<T, crate::Error>) -> String {
    let text = result.map(|_| ()).unwrap_err().to_string();
    assert!(!text.contains(char::is_control), "{text:?}");
    text
}

/// Somebody who signs images as cosign does.
pub enum Signer {
    P256(ring::signature::EcdsaKeyPair),
    Ed25519(ring::signature::Ed25519KeyPair),
}

impl Signer {
    pub fn p256() -> Signer {
        use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
        let random = ring::rand::SystemRandom::new();
        let algorithm = &ECDSA_P256_SHA256_ASN1_SIGNING;
        let key = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
        Signer::P256(EcdsaKeyPair::from_pkcs8(algorithm, key.as_ref(), &random).unwrap())
    }

    pub fn ed25519() -> Signer {
        use ring::signature::Ed25519KeyPair;
        let key = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap();
        Signer::Ed25519(Ed25519KeyPair::from_pkcs8(key.as_ref()).unwrap())
    }

    /// The public key, as `cosign.pub` has it.
    pub fn pem(&self) -> String {
        use base64::Engine as _;
        use ring::signature::KeyPair as _;
        // What comes before the key in a SubjectPublicKeyInfo (RFC 5480, RFC 8410).
        let der = match self {
            Signer::P256(key) => {
                let algorithm = b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\
                    \x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00";
                [algorithm, key.public_key().as_ref()].concat()
            }
            Signer::Ed25519(key) => {
                let algorithm = b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00";
                [algorithm, key.public_key().as_ref()].concat()
            }
        };
        let text = base64::engine::general_purpose::STANDARD.encode(der);
        format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n")
    }

    /// The signature of a payload, in base64.
    pub fn sign(&self, payload: &[u8]) -> String {
        use base64::Engine as _;
        let signature = match self {
            Signer::P256(key) => {
                key.sign(&ring::rand::SystemRandom::new(), payload).unwrap().as_ref().to_vec()
            }
            Signer::Ed25519(key) => key.sign(payload).as_ref().to_vec(),
        };
        base64::engine::general_purpose::STANDARD.encode(signature)
    }
}

/// What cosign signs for a manifest or index under a name.
pub fn payload(digest: Digest, name: &str) -> Value {
    json!({
        "critical": {
            "identity": {"docker-reference": name},
            "image": {"docker-manifest-digest": digest},
            "type": "cosign container image signature",
        },
        "optional": null,
    })
}
