//! Where state is kept.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// The two folders of everything: what lasts, and what is gone with the machine's end.
#[derive(Clone, Debug)]
pub struct Paths {
    state: PathBuf,
    run: PathBuf,
}

/// The folders cannot be made or used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {path}: {error}; name another folder with --root or VMRUN_ROOT")]
pub struct PathsError {
    /// The folder.
    pub path: PathBuf,
    /// What the host says.
    pub error: io::Error,
}

impl Paths {
    /// Below `root` where it is given; else `/var/lib/vmrun` and `/run/vmrun` for root, and the XDG
    /// directories for others. The folders are made, for their owner alone.
    pub fn open(root: Option<&Path>) -> Result<Paths, PathsError> {
        let paths = Paths::locate(root);
        for path in [&paths.state, &paths.run] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(|error| PathsError { path: path.clone(), error })?;
        }
        let absolute = |path: &Path| {
            fs::canonicalize(path).map_err(|error| PathsError { path: path.to_owned(), error })
        };
        Ok(Paths { state: absolute(&paths.state)?, run: absolute(&paths.run)? })
    }

    /// Folders for a test, and what removes them.
    #[cfg(test)]
    pub fn temporary() -> (tempfile::TempDir, Paths) {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::open(Some(folder.path())).unwrap();
        (folder, paths)
    }

    fn locate(root: Option<&Path>) -> Paths {
        if let Some(root) = root {
            return Paths { state: root.to_owned(), run: root.join("run") };
        }
        if nix::unistd::geteuid().is_root() {
            return Paths { state: "/var/lib/vmrun".into(), run: "/run/vmrun".into() };
        }
        let folder = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
        let home = folder("HOME").unwrap_or_else(|| "/".into());
        let state =
            folder("XDG_DATA_HOME").unwrap_or_else(|| home.join(".local/share")).join("vmrun");
        // Without a runtime directory, state that is stale after a reboot is found and removed.
        let run =
            folder("XDG_RUNTIME_DIR").map_or_else(|| state.join("run"), |run| run.join("vmrun"));
        Paths { state, run }
    }

    /// What lasts: kernels and volumes are below it.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The image store.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    /// A folder per container.
    pub fn containers(&self) -> PathBuf {
        self.state.join("containers")
    }

    /// A folder per volume.
    pub fn volumes(&self) -> PathBuf {
        self.state.join("volumes")
    }

    /// A folder per snapshot.
    pub fn snapshots(&self) -> PathBuf {
        self.state.join("snapshots")
    }

    /// Empty file systems to copy.
    pub fn templates(&self) -> PathBuf {
        self.state.join("templates")
    }

    /// Sockets of running containers; short, since a socket's path has at most 107 bytes.
    pub fn run(&self) -> &Path {
        &self.run
    }
}
