//! Where an image comes from, in the words of the policy: a transport and an identity in it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::reference::Reference;

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A registry, with a tag or a digest.
    Docker(Reference),
    /// What `docker save` writes. The policy knows no scopes of it.
    DockerArchive,
    /// An OCI layout in a file, by its absolute path; none for a stream.
    OciArchive(Option<PathBuf>),
    /// An OCI layout, by its absolute path.
    Oci(PathBuf),
}

impl Origin {
    /// A registry. Where there is a digest the tag is not looked at, here as elsewhere.
    pub fn docker(reference: &Reference) -> Origin {
        Origin::Docker(match reference.digest() {
            Some(digest) => reference.with_digest(*digest),
            None => reference.clone(),
        })
    }

    /// The transport's name in the policy.
    pub fn transport(&self) -> &'static str {
        match self {
            Origin::Docker(_) => "docker",
            Origin::DockerArchive => "docker-archive",
            Origin::OciArchive(_) => "oci-archive",
            Origin::Oci(_) => "oci",
        }
    }

    /// The scopes of the transport that match, the narrowest first; without the transport's default.
    pub fn scopes(&self) -> Vec<String> {
        match self {
            Origin::Docker(reference) => docker_scopes(reference),
            Origin::DockerArchive | Origin::OciArchive(None) => Vec::new(),
            Origin::OciArchive(Some(path)) | Origin::Oci(path) => path
                .ancestors()
                .filter(|path| *path != Path::new("/"))
                .map(|path| path.display().to_string())
                .collect(),
        }
    }

    /// The name that a signature may be for.
    pub fn reference(&self) -> Option<&Reference> {
        match self {
            Origin::Docker(reference) => Some(reference),
            _ => None,
        }
    }
}

fn docker_scopes(reference: &Reference) -> Vec<String> {
    let mut scopes = vec![reference.canonical()];
    let mut name = reference.name();
    loop {
        scopes.push(name.clone());
        match name.rfind('/') {
            Some(at) => name.truncate(at),
            None => break,
        }
    }
    // Upstream leaves the port out here, and so must who wants to mean the same by one file.
    let mut host = name.split_once(':').map_or(name.as_str(), |(host, _)| host);
    while let Some((_, above)) = host.split_once('.') {
        scopes.push(format!("*.{above}"));
        host = above;
    }
    scopes
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Docker(reference) => write!(f, "docker:{}", reference.canonical()),
            Origin::OciArchive(Some(path)) | Origin::Oci(path) => {
                write!(f, "{}:{}", self.transport(), path.display())
            }
            Origin::DockerArchive | Origin::OciArchive(None) => write!(f, "{}:", self.transport()),
        }
    }
}

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Origin, String> {
        let unknown = || format!("{text:?} is no origin of an image");
        let (transport, identity) = text.split_once(':').ok_or_else(unknown)?;
        match transport {
            "docker" => Ok(Origin::docker(&identity.parse().map_err(|_| unknown())?)),
            "docker-archive" => Ok(Origin::DockerArchive),
            "oci-archive" if identity.is_empty() => Ok(Origin::OciArchive(None)),
            "oci-archive" => Ok(Origin::OciArchive(Some(identity.into()))),
            "oci" => Ok(Origin::Oci(identity.into())),
            _ => Err(unknown()),
        }
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Origin {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Origin, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scopes(text: &str) -> Vec<String> {
        text.parse::<Origin>().unwrap().scopes()
    }

    #[test]
    fn scopes_go_from_the_image_to_the_domain() {
        assert_eq!(
            scopes("docker:r.a.example.com:5000/b/c:v1"),
            [
                "r.a.example.com:5000/b/c:v1",
                "r.a.example.com:5000/b/c",
                "r.a.example.com:5000/b",
                "r.a.example.com:5000",
                "*.a.example.com",
                "*.example.com",
                "*.com"
            ]
        );
        let digest = crate::Digest::of(b"x");
        let both = scopes(&format!("docker:alpine:v1@{digest}"));
        assert_eq!(both[0], format!("docker.io/library/alpine@{digest}"));
        assert_eq!(
            both[1..],
            ["docker.io/library/alpine", "docker.io/library", "docker.io", "*.io"]
        );
    }

    #[test]
    fn scopes_of_layouts_are_their_folders() {
        assert_eq!(scopes("oci-archive:/a/b.tar"), ["/a/b.tar", "/a"]);
        assert_eq!(scopes("oci:/a/b"), ["/a/b", "/a"]);
        assert_eq!(scopes("oci-archive:"), [] as [&str; 0]);
        assert_eq!(scopes("docker-archive:"), [] as [&str; 0]);
    }

    #[test]
    fn origins_read_as_they_are_written() {
        for text in
            ["docker:h:5/a/b:v1", "docker-archive:", "oci-archive:/x:y", "oci-archive:", "oci:/x"]
        {
            assert_eq!(text.parse::<Origin>().unwrap().to_string(), text);
        }
        assert!("dir:/x".parse::<Origin>().is_err() && "docker:A B".parse::<Origin>().is_err());
    }
}
