//! Names of images: `[HOST[:PORT]/]NAME[:TAG][@DIGEST]`, with Docker's rules for what is left out.

use std::fmt;
use std::str::FromStr;

use crate::digest::{Digest, DigestError};

/// The registry of names that say none.
pub const DEFAULT_REGISTRY: &str = "docker.io";
/// The tag of names with neither tag nor digest.
pub const DEFAULT_TAG: &str = "latest";
/// Docker Hub's folder of images without an owner.
const LIBRARY: &str = "library/";
/// The longest repository name, in bytes, without the registry.
const REPOSITORY_MAX: usize = 255;
/// The longest tag, in bytes.
const TAG_MAX: usize = 128;

/// A full name of an image. At least one of tag and digest is set.
///
/// `Display` gives the familiar form, as `docker image ls` shows it (`alpine:latest`);
/// [`Reference::canonical`] the one with nothing left out (`docker.io/library/alpine:latest`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// What is wrong with a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Nothing, or not of the form of a name.
    #[error("invalid reference format: {name:?}: {reason}")]
    Format {
        /// The name as given.
        name: String,
        /// Which part is wrong.
        reason: &'static str,
    },
    /// Repository names have no upper-case letters.
    #[error("invalid reference format: repository name ({0}) must be lowercase")]
    Uppercase(String),
    /// The digest after `@`.
    #[error("invalid reference format: {name:?}: {error}")]
    Digest {
        /// The name as given.
        name: String,
        /// What is wrong with it.
        error: DigestError,
    },
}

impl Reference {
    /// The registry, with its port if one was given: `docker.io`, `localhost:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository in the registry: `library/alpine`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Registry and repository without tag and digest: `docker.io/library/alpine`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// Registry and repository as Docker shows them: `alpine`.
    pub fn familiar_name(&self) -> String {
        if self.registry != DEFAULT_REGISTRY {
            return self.name();
        }
        // Left out, the registry would be taken to be the first folder.
        if self.repository.split_once('/').is_some_and(|(folder, _)| names_a_host(folder)) {
            return self.name();
        }
        // `library/a/b` is not what `a/b` means, so the folder stays there.
        match self.repository.strip_prefix(LIBRARY) {
            Some(short) if !short.contains('/') => short.to_owned(),
            _ => self.repository.clone(),
        }
    }

    /// The name with nothing left out.
    pub fn canonical(&self) -> String {
        self.with_suffix(self.name())
    }

    /// The same repository under a tag only.
    pub fn with_tag(&self, tag: &str) -> Result<Reference, ReferenceError> {
        format!("{}:{tag}", self.name()).parse()
    }

    /// The same repository at a digest only.
    pub fn with_digest(&self, digest: Digest) -> Reference {
        Reference { tag: None, digest: Some(digest), ..self.clone() }
    }

    fn with_suffix(&self, mut name: String) -> String {
        if let Some(tag) = &self.tag {
            name.push(':');
            name.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            name.push('@');
            name.push_str(&digest.to_string());
        }
        name
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.with_suffix(self.familiar_name()))
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Reference, ReferenceError> {
        let bad = |reason| ReferenceError::Format { name: shorten(text), reason };
        if text.is_empty() {
            return Err(bad("it is empty"));
        }
        if text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(bad("64 hexadecimal digits are an image's id, not a name"));
        }
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => {
                let digest = digest
                    .parse()
                    .map_err(|error| ReferenceError::Digest { name: shorten(text), error })?;
                (rest, Some(digest))
            }
        };
        // A colon before the last slash belongs to the registry's port.
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(bad("the tag must be 1 to 128 letters, digits, `_`, `.` and `-`"));
        }
        let (registry, repository) = match path.split_once('/') {
            Some((host, repository)) if names_a_host(host) => (host, repository.to_owned()),
            _ => (DEFAULT_REGISTRY, path.to_owned()),
        };
        if !is_host(registry) {
            return Err(bad("the registry must be HOST or HOST:PORT"));
        }
        let (registry, repository) = match registry {
            "docker.io" | "index.docker.io" => {
                let folder = if repository.contains('/') { "" } else { LIBRARY };
                (DEFAULT_REGISTRY, format!("{folder}{repository}"))
            }
            other => (other, repository),
        };
        if !repository.split('/').all(is_component) {
            if repository.to_lowercase().split('/').all(is_component) {
                return Err(ReferenceError::Uppercase(shorten(&repository)));
            }
            return Err(bad(
                "a repository is lower-case letters and digits, parted by `.`, `_`, `-` or `/`",
            ));
        }
        if repository.len() > REPOSITORY_MAX {
            return Err(bad("the repository is longer than 255 bytes"));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some(DEFAULT_TAG),
            (tag, _) => tag,
        };
        Ok(Reference {
            registry: registry.to_owned(),
            repository,
            tag: tag.map(str::to_owned),
            digest,
        })
    }
}

/// A name that fits into a message.
fn shorten(text: &str) -> String {
    text.chars().take(300).collect()
}

/// Whether the part before the first slash is a host: it has a dot or a colon, is `localhost`, or
/// has an upper-case letter, which no repository may have.
fn names_a_host(part: &str) -> bool {
    part == "localhost" || part.bytes().any(|b| b == b'.' || b == b':' || b.is_ascii_uppercase())
}

fn is_host(text: &str) -> bool {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let Some((address, rest)) = rest.split_once(']') else { return false };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        match rest.strip_prefix(':') {
            Some(port) => (None, Some(port)),
            None if rest.is_empty() => (None, None),
            None => return false,
        }
    } else {
        match text.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(text), None),
        }
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    host.is_none_or(|host| host.len() <= 253 && host.split('.').all(label))
        && port.is_none_or(|port| {
            port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|p| p > 0)
        })
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=TAG_MAX).contains(&tag.len())
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// Runs of lower-case letters and digits, joined by `.`, `_`, `__` or any number of `-`.
fn is_component(component: &str) -> bool {
    let word = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    bytes.first().is_some_and(word)
        && bytes.last().is_some_and(word)
        && bytes
            .split(word)
            .filter(|joint| !joint.is_empty())
            .all(|joint| matches!(joint, b"." | b"_" | b"__") || joint.iter().all(|b| *b == b'-'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn what_is_left_out_is_filled_in_as_docker_does() {
        for (given, canonical, familiar) in [
            ("alpine", "docker.io/library/alpine:latest", "alpine:latest"),
            ("alpine:3.20", "docker.io/library/alpine:3.20", "alpine:3.20"),
            ("bob/app", "docker.io/bob/app:latest", "bob/app:latest"),
            ("docker.io/alpine", "docker.io/library/alpine:latest", "alpine:latest"),
            ("index.docker.io/alpine", "docker.io/library/alpine:latest", "alpine:latest"),
            ("docker.io/library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
            ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest", "localhost:5000/app:latest"),
            ("localhost:5000", "docker.io/library/localhost:5000", "localhost:5000"),
            ("ghcr.io/a/b/c:v1", "ghcr.io/a/b/c:v1", "ghcr.io/a/b/c:v1"),
            ("Registry/app", "Registry/app:latest", "Registry/app:latest"),
            ("127.0.0.1:5055/x/y", "127.0.0.1:5055/x/y:latest", "127.0.0.1:5055/x/y:latest"),
            ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
            ("a--b__c_d/e.f", "docker.io/a--b__c_d/e.f:latest", "a--b__c_d/e.f:latest"),
            ("docker.io/localhost/x:v", "docker.io/localhost/x:v", "docker.io/localhost/x:v"),
        ] {
            let reference: Reference = given.parse().unwrap();
            assert_eq!(reference.canonical(), canonical);
            assert_eq!(reference.to_string(), familiar);
            assert_eq!(familiar.parse::<Reference>().unwrap(), reference);
        }
    }

    #[test]
    fn a_digest_stands_for_a_tag() {
        let reference: Reference = format!("alpine@{DIGEST}").parse().unwrap();
        assert_eq!((reference.tag(), reference.digest()), (None, Some(&Digest::of(b""))));
        assert_eq!(reference.to_string(), format!("alpine@{DIGEST}"));
        let both: Reference = format!("h:1/alpine:3@{DIGEST}").parse().unwrap();
        assert_eq!((both.tag(), both.registry()), (Some("3"), "h:1"));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = "a".repeat(256);
        let tag = format!("a:{}", "t".repeat(129));
        for bad in [
            "",
            ":",
            "/",
            "a/",
            "/a",
            "a//b",
            "-a",
            "a-",
            "a___b",
            "a..b",
            "a:",
            "a:-t",
            "a: t",
            "a@",
            "a@sha256:12",
            "a@md5:00",
            "Not A Name",
            "a b",
            "a\0b",
            "../a",
            "a/../b",
            "http://a/b",
            "h:0/a",
            "h:99999/a",
            "h:x/a",
            "-h.x/a",
            "[::1/a",
            "[x]/a",
            "ä",
            &long,
            &tag,
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
        }
        assert_eq!(
            "Alpine".parse::<Reference>(),
            Err(ReferenceError::Uppercase("library/Alpine".into()))
        );
        assert!("0".repeat(64).parse::<Reference>().is_err());
        let edge = format!("h.x/{}:{}", "a".repeat(255), "t".repeat(128));
        assert!(edge.parse::<Reference>().is_ok());
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_reads_as_it_is_written(text in "[a-zA-Z0-9:/@._\\[\\]-]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(&reference.canonical().parse::<Reference>().unwrap(), &reference);
                prop_assert_eq!(&reference.to_string().parse::<Reference>().unwrap(), &reference);
            }
        }
    }
}
