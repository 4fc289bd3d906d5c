//! The store's list of images, kept in the layout's `index.json` (OCI image layout). One entry per
//! name, or one without a name; what only this store needs is in annotations of its own.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use crate::digest::Digest;
use crate::document::{Descriptor, Index, OCI_INDEX, Platform};
use crate::error::Error;
use crate::reference::Reference;

/// OCI's annotation of an image's name in a layout.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";
const REPO_DIGESTS: &str = "dev.vmrun.repo-digests";
const CONFIG: &str = "dev.vmrun.config";
const TAGGED: &str = "dev.vmrun.tagged";

/// An image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub manifest: Digest,
    pub media_type: String,
    pub size: u64,
    pub config: Digest,
    pub names: Vec<Reference>,
    pub repo_digests: Vec<Reference>,
    pub tagged: Option<i64>,
}

/// Reads `index.json`. It is replaced as a whole, so no lock is needed.
pub(crate) fn read(path: &Path) -> Result<Vec<Record>, Error> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    parse(&bytes).map_err(|reason| Error::Damaged { path: path.to_owned(), reason })
}

fn parse(bytes: &[u8]) -> Result<Vec<Record>, String> {
    let index: Index = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let mut records: Vec<Record> = Vec::new();
    for entry in index.manifests {
        let get = |key: &str| entry.annotations.get(key).map(String::as_str);
        let digest = |key: &'static str| {
            let text = get(key).ok_or_else(|| format!("{} has no {key}", entry.digest))?;
            text.parse::<Digest>().map_err(|e| e.to_string())
        };
        let position = records.iter().position(|r| r.manifest == entry.digest);
        let record = match position.and_then(|at| records.get_mut(at)) {
            Some(record) => record,
            None => {
                records.push(Record {
                    manifest: entry.digest,
                    media_type: entry.media_type.clone(),
                    size: entry.size,
                    config: digest(CONFIG)?,
                    names: Vec::new(),
                    repo_digests: Vec::new(),
                    tagged: get(TAGGED).and_then(|t| t.parse().ok()),
                });
                records.last_mut().ok_or("no record")?
            }
        };
        if let Some(name) = get(REF_NAME) {
            record.names.push(name.parse().map_err(|e| format!("{e}"))?);
        }
        for text in get(REPO_DIGESTS).unwrap_or_default().split_whitespace() {
            let reference: Reference = text.parse().map_err(|e| format!("{e}"))?;
            if !record.repo_digests.contains(&reference) {
                record.repo_digests.push(reference);
            }
        }
    }
    Ok(records)
}

/// The bytes of `index.json`.
pub(crate) fn format(records: &[Record]) -> Vec<u8> {
    let manifests = records.iter().flat_map(|record| {
        let mut annotations = BTreeMap::from([(CONFIG.to_owned(), record.config.to_string())]);
        if let Some(tagged) = record.tagged {
            annotations.insert(TAGGED.to_owned(), tagged.to_string());
        }
        if !record.repo_digests.is_empty() {
            let texts: Vec<String> = record.repo_digests.iter().map(Reference::canonical).collect();
            annotations.insert(REPO_DIGESTS.to_owned(), texts.join(" "));
        }
        let entry = Descriptor {
            media_type: record.media_type.clone(),
            digest: record.manifest,
            size: record.size,
            platform: Some(Platform {
                architecture: "amd64".into(),
                os: "linux".into(),
                variant: None,
            }),
            annotations,
        };
        let names = record.names.iter().map(|name| Some(name.canonical()));
        let names: Vec<_> = if record.names.is_empty() { vec![None] } else { names.collect() };
        names.into_iter().map(move |name| {
            let mut entry = entry.clone();
            if let Some(name) = name {
                entry.annotations.insert(REF_NAME.to_owned(), name);
            }
            entry
        })
    });
    let index = Index {
        schema_version: 2,
        media_type: Some(OCI_INDEX.to_owned()),
        manifests: manifests.collect(),
    };
    // These types always have a JSON form.
    serde_json::to_vec_pretty(&index).unwrap_or_default()
}

/// Adds an image, or what is new about one that is there. Names move to it from other images.
pub(crate) fn insert(records: &mut Vec<Record>, new: Record) {
    for record in records.iter_mut() {
        record.names.retain(|name| !new.names.contains(name));
    }
    match records.iter_mut().find(|r| r.manifest == new.manifest) {
        None => records.push(new),
        Some(record) => {
            record.names.extend(new.names);
            for digest in new.repo_digests {
                if !record.repo_digests.contains(&digest) {
                    record.repo_digests.push(digest);
                }
            }
            record.tagged = new.tagged.or(record.tagged);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(seed: &[u8], names: &[&str]) -> Record {
        Record {
            manifest: Digest::of(seed),
            media_type: crate::document::OCI_MANIFEST.into(),
            size: 3,
            config: Digest::of(b"config"),
            names: names.iter().map(|name| name.parse().unwrap()).collect(),
            repo_digests: Vec::new(),
            tagged: Some(7),
        }
    }

    #[test]
    fn records_read_as_they_are_written() {
        let mut first = record(b"1", &["a", "b:2"]);
        first.repo_digests = vec![format!("a@{}", Digest::of(b"x")).parse().unwrap()];
        let records = vec![first, record(b"2", &[])];
        assert_eq!(parse(&format(&records)).unwrap(), records);
    }

    #[test]
    fn a_name_belongs_to_one_image() {
        let mut records = vec![record(b"1", &["a", "b"])];
        insert(&mut records, record(b"2", &["a"]));
        insert(&mut records, record(b"2", &["c"]));
        let names = |r: &Record| r.names.iter().map(Reference::to_string).collect::<Vec<_>>();
        assert_eq!(
            records.iter().map(names).collect::<Vec<_>>(),
            [vec!["b:latest"], vec!["a:latest", "c:latest"]]
        );
    }
}
