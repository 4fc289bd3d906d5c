//! Confinement of a process by itself, before it touches anything that a stranger made.
//!
//! [`Jail::enter`] takes a process of one thread and comes back in a child of it, which is in
//! namespaces and a cgroup of its own, has a root without anything that it was not given, an
//! unprivileged user id, no capabilities and no way to any. What is open stays open: that, and what
//! is handed over later, is all that it can use.
//!
//! The order matters. What needs the host's privileges (the cgroup, mounts to take along) comes
//! before the user namespace; what needs the capabilities of that namespace (mounts, `pivot_root`)
//! before they are given up; Landlock last, since it would forbid the rest.

mod cgroup;
mod descriptors;
mod error;
mod namespaces;
mod privileges;
mod root;
mod users;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

pub use cgroup::Cgroup;
pub use descriptors::close_others;
pub use error::{JailError, Step};
pub use nix::sys::resource::Resource;
pub use users::User;

/// What a process is confined to.
#[derive(Debug)]
pub struct Jail {
    /// Names the cgroup and the host in the new UTS namespace.
    pub id: String,
    /// The user it becomes; as root one that nobody else has, else the caller's own.
    pub uid: u32,
    /// The group it becomes.
    pub gid: u32,
    /// What it sees of files.
    pub root: Root,
    /// A network namespace to use instead of a new, empty one: a path as `ip netns` makes it.
    pub network: Option<PathBuf>,
    /// Its share of the host.
    pub cgroup: Option<Cgroup>,
    /// Limits of setrlimit(2), soft and hard.
    pub limits: Vec<(Resource, u64)>,
    /// What becomes of the process that entered.
    pub parent: Parent,
    /// Steps that are left out, because whoever starts this wants to go on without them.
    pub without: Vec<Step>,
}

/// What a confined process sees of files.
#[derive(Clone, Debug)]
pub enum Root {
    /// Nothing but these folders, at the paths where they are, read-only. Sockets in them can be
    /// connected to.
    Empty {
        /// Absolute paths.
        visible: Vec<PathBuf>,
    },
    /// This folder, and these of the host's device nodes below it.
    Folder {
        /// Absolute path.
        path: PathBuf,
        /// Absolute paths; what the host lacks is left out.
        nodes: Vec<PathBuf>,
    },
}

/// What becomes of the process that entered the jail.
#[derive(Debug)]
pub enum Parent {
    /// It waits for the confined one, hands on signals and ends as that does.
    Wait,
    /// It ends at once. The confined process falls to the nearest subreaper above, with whose end it
    /// is killed; its process id, in decimal and with a line feed, is written here.
    Leave {
        /// A pipe's end.
        pid: OwnedFd,
    },
    /// It ends at once, and nothing ends the confined process but itself.
    Detach,
}

impl Jail {
    /// Enters the jail: returns in the confined process only. To be called while there is one thread.
    pub fn enter(self) -> Result<(), JailError> {
        let skipped = |step: Step| self.without.contains(&step);
        let around = namespaces::Around::new(&self.parent)?;
        if let Some(cgroup) = self.cgroup.as_ref().filter(|_| !skipped(Step::Cgroup)) {
            cgroup.enter(&self.id)?;
        }
        let namespaces = !skipped(Step::Namespaces);
        let mut root = root::Prepared::new(&self.root, self.uid, self.gid)?;
        privileges::drop_groups()?;
        if namespaces {
            if let Some(path) = &self.network {
                namespaces::join_network(path)?;
            }
            namespaces::unshare(self.uid, self.gid, self.network.is_none())?;
            namespaces::fork(self.parent, around)?;
            namespaces::name_host(&self.id)?;
            root.enter()?;
        } else {
            privileges::set_ids(self.uid, self.gid)?;
            namespaces::fork(self.parent, around)?;
        }
        privileges::limit(&self.limits)?;
        privileges::drop_all()?;
        if !skipped(Step::Landlock) {
            // Without a root of its own it still needs paths of the host's.
            privileges::landlock(&self.root, namespaces)?;
        }
        Ok(())
    }
}
