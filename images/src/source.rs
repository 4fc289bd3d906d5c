//! Where an image comes from, with skopeo's names.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::reference::{Reference, ReferenceError};

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `[docker://]REFERENCE`: a registry.
    Registry(Reference),
    /// `docker-archive:FILE[:REFERENCE|:@INDEX]`: what `docker save` writes.
    DockerArchive {
        /// The file.
        path: PathBuf,
        /// Which image of the archive.
        select: Select,
    },
    /// `oci-archive:FILE[:NAME|:@INDEX]`: an OCI image layout in a tar file.
    OciArchive {
        /// The file.
        path: PathBuf,
        /// Which image of the archive.
        select: Select,
    },
    /// `oci:DIRECTORY[:NAME|:@INDEX]`: an OCI image layout.
    OciLayout {
        /// The directory.
        path: PathBuf,
        /// Which image of the layout.
        select: Select,
    },
}

/// Which image of an archive or layout is meant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Select {
    /// The only one.
    #[default]
    Only,
    /// The one with this name.
    Name(String),
    /// The one at this place, counted from 0.
    Index(usize),
}

/// What is wrong with the text of a source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// Not a reference.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// No path after the transport.
    #[error("{transport}: needs a path: `{transport}:PATH[:NAME]`")]
    NoPath {
        /// `docker-archive`, `oci-archive` or `oci`.
        transport: &'static str,
    },
    /// What follows the path names no image.
    #[error("{given:?} names no image of {path}: {reason}")]
    Select {
        /// The archive or layout.
        path: String,
        /// What followed its path.
        given: String,
        /// Why it cannot be a name.
        reason: String,
    },
    /// One of skopeo's transports that is not supported.
    #[error(
        "images from {0}: are not supported; use a registry reference, docker-archive:FILE, \
         oci-archive:FILE or oci:DIR"
    )]
    Transport(String),
}

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Source, SourceError> {
        if let Some(reference) = text.strip_prefix("docker://") {
            return Ok(Source::Registry(reference.parse()?));
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (path, select) = path_and_select("docker-archive", rest)?;
            if let Select::Name(name) = &select {
                name.parse::<Reference>().map_err(|error| SourceError::Select {
                    path: path.display().to_string(),
                    given: name.clone(),
                    reason: error.to_string(),
                })?;
            }
            return Ok(Source::DockerArchive { path, select });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (path, select) = path_and_select("oci-archive", rest)?;
            return Ok(Source::OciArchive { path, select });
        }
        if let Some(rest) = text.strip_prefix("oci:") {
            let (path, select) = path_and_select("oci", rest)?;
            return Ok(Source::OciLayout { path, select });
        }
        for transport in ["docker-daemon", "containers-storage", "ostree", "sif", "tarball"] {
            if text.strip_prefix(transport).is_some_and(|rest| rest.starts_with(':')) {
                return Err(SourceError::Transport(transport.to_owned()));
            }
        }
        if text.starts_with("dir:/") || text.starts_with("dir:.") {
            return Err(SourceError::Transport("dir".to_owned()));
        }
        Ok(Source::Registry(text.parse()?))
    }
}

/// Splits `PATH[:NAME|:@INDEX]` at the first colon; a path with a colon cannot be written, as with
/// skopeo.
fn path_and_select(transport: &'static str, rest: &str) -> Result<(PathBuf, Select), SourceError> {
    let (path, name) = rest.split_once(':').map_or((rest, None), |(p, n)| (p, Some(n)));
    if path.is_empty() {
        return Err(SourceError::NoPath { transport });
    }
    let bad = |name: &str, reason: &str| SourceError::Select {
        path: path.to_owned(),
        given: name.to_owned(),
        reason: reason.to_owned(),
    };
    let select = match name {
        None => Select::Only,
        Some("") => return Err(bad("", "it is empty")),
        Some(name) => match name.strip_prefix('@') {
            None => Select::Name(name.to_owned()),
            Some(index) => {
                Select::Index(index.parse().map_err(|_| bad(name, "`@` needs a number"))?)
            }
        },
    };
    Ok((path.into(), select))
}

impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Select::Only => Ok(()),
            Select::Name(name) => write!(f, ":{name}"),
            Select::Index(index) => write!(f, ":@{index}"),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Registry(reference) => reference.fmt(f),
            Source::DockerArchive { path, select } => {
                write!(f, "docker-archive:{}{select}", path.display())
            }
            Source::OciArchive { path, select } => {
                write!(f, "oci-archive:{}{select}", path.display())
            }
            Source::OciLayout { path, select } => write!(f, "oci:{}{select}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skopeos_names_are_understood() {
        let name = |name: &str| Select::Name(name.into());
        for (text, source) in [
            (
                "docker-archive:/a/b.tar",
                Source::DockerArchive { path: "/a/b.tar".into(), select: Select::Only },
            ),
            (
                "docker-archive:b.tar:h:5/x:v1",
                Source::DockerArchive { path: "b.tar".into(), select: name("h:5/x:v1") },
            ),
            (
                "docker-archive:b.tar:@2",
                Source::DockerArchive { path: "b.tar".into(), select: Select::Index(2) },
            ),
            ("oci-archive:b:v1", Source::OciArchive { path: "b".into(), select: name("v1") }),
            ("oci:dir:v1", Source::OciLayout { path: "dir".into(), select: name("v1") }),
            ("oci:./dir", Source::OciLayout { path: "./dir".into(), select: Select::Only }),
            ("alpine:latest", Source::Registry("alpine".parse().unwrap())),
        ] {
            assert_eq!(text.parse::<Source>().unwrap(), source);
            assert_eq!(source.to_string(), text);
        }
        assert_eq!("docker://h:5/a".parse(), "h:5/a".parse::<Source>());
    }

    #[test]
    fn what_is_no_source_is_refused() {
        for bad in [
            "",
            "oci:",
            "oci-archive:",
            "docker-archive::x",
            "oci:d:",
            "oci:d:@x",
            "Not A Name",
            "docker-archive:f:Not A Name",
            "docker-daemon:alpine:latest",
            "dir:/tmp/x",
            "docker://",
        ] {
            assert!(bad.parse::<Source>().is_err(), "{bad:?}");
        }
    }
}
