//! A cgroup of version 2 for one process.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::error::{JailError, Step};

/// A share of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// The cgroup below which the new one is made: a path without `..`. It begins at the root of
    /// cgroups if it has a slash in front or the caller is root; else at the cgroup above the
    /// caller's own, where a service manager lets users have others.
    pub parent: PathBuf,
    /// Files and what is written into them, such as `memory.max` and `134217728`.
    pub values: Vec<(String, String)>,
}

fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> JailError {
    JailError::step(Step::Cgroup, what)
}

fn other(text: impl Into<String>) -> io::Error {
    io::Error::other(text.into())
}

impl Cgroup {
    /// Where the cgroup of the jail of this id is, for whoever removes it after the jail's end.
    pub fn folder(&self, id: &str) -> Result<PathBuf, JailError> {
        let (base, parent) = self.base()?;
        Ok(base.join(parent).join(id))
    }

    /// Makes the cgroup and has this process in it.
    pub(crate) fn enter(&self, id: &str) -> Result<(), JailError> {
        let (base, parent) = self.base()?;
        let group = self.make(&base, &parent.join(id))?;
        let path = group.join("cgroup.procs");
        fs::write(&path, "0").map_err(failed(format!("moving into {}", path.display())))
    }

    /// Where cgroups may be made, and the path from there.
    fn base(&self) -> Result<(PathBuf, PathBuf), JailError> {
        let root = hierarchy()?;
        if let Ok(parent) = self.parent.strip_prefix("/") {
            return Ok((root, parent.to_owned()));
        }
        let base = match nix::unistd::geteuid().is_root() {
            true => root,
            false => root.join(own()?.parent().unwrap_or(Path::new(""))),
        };
        Ok((base, self.parent.clone()))
    }

    fn make(&self, base: &Path, below: &Path) -> Result<PathBuf, JailError> {
        let mut group = base.to_owned();
        for part in below.components() {
            let Component::Normal(name) = part else {
                let text = format!("cgroup {}: it may not have ..", below.display());
                return Err(JailError::Senseless(text));
            };
            self.delegate(&group)?;
            group.push(name);
            match fs::create_dir(&group) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed(format!("making {}", group.display()))(error));
                }
                _ => {}
            }
        }
        for (file, value) in &self.values {
            let plain = |byte: u8| byte.is_ascii_lowercase() || matches!(byte, b'.' | b'_');
            if !file.contains('.') || !file.bytes().all(plain) {
                let text = format!("{file} is not a file of a cgroup, such as memory.max");
                return Err(JailError::Senseless(text));
            }
            let path = group.join(file);
            if !path.exists() {
                let text = "the host's cgroups do not have it";
                return Err(failed(file.clone())(other(text)));
            }
            fs::write(&path, value).map_err(failed(format!("{file}={value}")))?;
        }
        Ok(group)
    }

    /// Has the children of a cgroup governed by the controllers that the values need.
    fn delegate(&self, group: &Path) -> Result<(), JailError> {
        let path = group.join("cgroup.subtree_control");
        let now = fs::read_to_string(&path).map_err(failed(path.display().to_string()))?;
        for (file, _) in &self.values {
            let controller = file.split('.').next().unwrap_or_default();
            if controller == "cgroup" || now.split_whitespace().any(|name| name == controller) {
                continue;
            }
            fs::write(&path, format!("+{controller}")).map_err(|error| {
                let what = format!("{file}: controller {controller} below {}", group.display());
                let error = match error.raw_os_error() {
                    Some(libc::EBUSY) => other("that cgroup has processes of its own"),
                    Some(libc::EACCES) => other(
                        "it is not this user's; start this in a cgroup that is, for example by \
                         systemd-run --user --scope",
                    ),
                    Some(libc::ENOENT) => other("the host does not have it here"),
                    _ => error,
                };
                failed(what)(error)
            })?;
        }
        Ok(())
    }
}

/// Where cgroups of version 2 are mounted.
fn hierarchy() -> Result<PathBuf, JailError> {
    let path = "/proc/self/mountinfo";
    let mounts = fs::read_to_string(path).map_err(failed(path))?;
    mount_point(&mounts).ok_or_else(|| failed("cgroup v2")(other("it is not mounted")))
}

fn mount_point(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let is_cgroup = right.split(' ').next() == Some("cgroup2");
        is_cgroup.then(|| left.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// The caller's cgroup below the root of cgroups.
fn own() -> Result<PathBuf, JailError> {
    let path = "/proc/self/cgroup";
    let text = fs::read_to_string(path).map_err(failed(path))?;
    let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
    own.map(PathBuf::from).ok_or_else(|| failed(path)(other("no cgroup of version 2")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_v2_is_found_among_mounts() {
        let mounts = "22 1 0:5 / /proc rw - proc proc rw\n\
            31 22 0:26 / /sys/fs/cgroup/unified rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("22 1 0:5 / /cgroup2 rw - proc proc rw\n"), None);
    }

    #[test]
    fn a_cgroup_stays_below_its_base() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        fs::create_dir(&base).unwrap();
        fs::write(base.join("cgroup.subtree_control"), "memory").unwrap();
        let cgroup = |parent: &str, file: &str| Cgroup {
            parent: parent.into(),
            values: vec![(file.to_owned(), "1".to_owned())],
        };
        for below in ["../x/a", "/x/a", "../a", ".."] {
            let error = cgroup("", "memory.max").make(&base, Path::new(below)).unwrap_err();
            assert!(matches!(error, JailError::Senseless(_)), "{error}");
        }
        for file in ["memory", "../memory.max", "memory.max/x", ""] {
            assert!(cgroup("", file).make(&base, Path::new("a")).is_err(), "{file}");
        }
        let error = cgroup("", "memory.max").make(&base, Path::new("a")).unwrap_err();
        assert!(matches!(error, JailError::Step { step: Step::Cgroup, .. }), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
