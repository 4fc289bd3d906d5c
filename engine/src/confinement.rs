//! Where and as whom a VMM runs: a jail that it enters by itself before it does anything else, with
//! what this says as its walls.

use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

pub use jail::Step;
use jail::User;

/// Memory of a VMM beside the guest's, in bytes: the program, the host's page tables for the guest
/// (a 256th at most) and the page cache of its disks, which gives way where it is short.
const OVERHEAD: u64 = 64 << 20;
/// Threads beside the processors': the event loop, the API's, and those that KVM makes.
const THREADS: u64 = 16;
/// Time for each processor, and for the devices of all, in each period; microseconds.
const PERIOD: u64 = 100_000;
/// Bytes of a file beside the largest that the machine is made of: a snapshot's state, messages.
const LARGER: u64 = 64 << 20;

/// What a user says about how VMMs are confined.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Parts of the jail to go on without.
    pub unconfined: Vec<Step>,
    /// The cgroup below which each VMM gets one, instead of `vmrun`; without a slash in front it
    /// begins, for others than root, at the cgroup above the caller's own.
    pub cgroup_parent: Option<PathBuf>,
    /// No other process shares a processor core with a VMM.
    pub core_scheduling: bool,
}

/// What a machine may use.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Memory of the guest, in bytes.
    pub memory: u64,
    /// Number of virtual processors.
    pub cpus: u8,
    /// Bytes of the largest file that it writes.
    pub file: u64,
}

impl Policy {
    /// What a VMM that starts in the folder of its sockets calls one of them. Without a root of its own
    /// it has no way through the folders above, which are another user's.
    pub fn socket(&self, folder: &Path, name: &str) -> PathBuf {
        match self.unconfined.contains(&Step::Namespaces) {
            true => name.into(),
            false => folder.join(name),
        }
    }
}

/// One VMM's jail.
#[derive(Debug)]
pub struct Confinement {
    user: Option<User>,
    parent: PathBuf,
    unconfined: Vec<Step>,
    core_scheduling: bool,
}

impl Confinement {
    /// The jail of a VMM to come.
    pub fn new(policy: &Policy) -> io::Result<Confinement> {
        let root = nix::unistd::geteuid().is_root();
        Ok(Confinement {
            user: root.then(User::take).transpose()?,
            parent: policy.cgroup_parent.clone().unwrap_or_else(|| "vmrun".into()),
            unconfined: policy.unconfined.clone(),
            core_scheduling: policy.core_scheduling,
        })
    }

    /// What has to be held as long as the VMM runs.
    pub fn lock(&self) -> Option<RawFd> {
        self.user.as_ref().map(User::lock)
    }

    /// Where the jail's cgroup will be, where there is to be one.
    pub fn cgroup(&self, id: &str) -> Option<PathBuf> {
        if self.unconfined.contains(&Step::Cgroup) {
            return None;
        }
        jail::Cgroup { parent: self.parent.clone(), values: Vec::new() }.folder(id).ok()
    }

    /// The options that say all this to a VMM, which sees one folder of the host's: that of its
    /// sockets. It starts there where that is no root of its own: see [`Policy::socket`].
    pub fn arguments(&self, command: &mut Command, sockets: &Path, share: Share) {
        if self.unconfined.contains(&Step::Namespaces) {
            command.current_dir(sockets);
        }
        command.args(["--jail", "--empty-root", "--visible"]).arg(sockets);
        if let Some(user) = &self.user {
            let id = user.id().to_string();
            command.args(["--uid", &id, "--gid", &id]);
        }
        for step in &self.unconfined {
            command.args(["--unconfined", step.name()]);
        }
        command.arg("--parent-cgroup").arg(&self.parent);
        if self.core_scheduling {
            command.arg("--core-scheduling");
        }
        let cpus = u64::from(share.cpus);
        let memory = share.memory + share.memory / 256 + OVERHEAD;
        // Half a processor for the devices, so that the guest's own are not held up by them.
        let quota = cpus * PERIOD + PERIOD / 2;
        for value in [
            format!("memory.max={memory}"),
            format!("pids.max={}", cpus + THREADS),
            format!("cpu.max={quota} {PERIOD}"),
        ] {
            command.arg("--cgroup").arg(value);
        }
        let largest = share.file.max(share.memory) + LARGER;
        command.arg("--resource-limit").arg(format!("fsize={largest}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_gets_what_it_was_promised_and_a_little_more() {
        let confinement = Confinement {
            user: None,
            parent: "vmrun".into(),
            unconfined: vec![Step::Landlock],
            core_scheduling: true,
        };
        let mut command = Command::new("x");
        let share = Share { memory: 128 << 20, cpus: 2, file: 1 << 30 };
        confinement.arguments(&mut command, Path::new("/run/x"), share);
        let arguments: Vec<_> = command.get_args().map(|text| text.to_str().unwrap()).collect();
        for expected in [
            "memory.max=201850880",
            "pids.max=18",
            "cpu.max=250000 100000",
            "fsize=1140850688",
            "landlock",
            "--core-scheduling",
        ] {
            assert!(arguments.contains(&expected), "{expected}: {arguments:?}");
        }
    }
}
