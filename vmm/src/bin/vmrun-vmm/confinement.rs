//! The jail of the command line, whose options are those of Firecracker's `jailer`.

#![allow(unsafe_code, reason = "takes over descriptors named by the parent")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use api_server::machine::MachineError;
use clap::Args;
use jail::{Cgroup, Jail, Parent, Resource, Root, Step};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::failed;

/// Most descriptors, where nothing else is said: connections of the guest's are most of them.
const MAX_DESCRIPTORS: u64 = 2048;
/// Of the host's devices, what a machine that is configured later may need.
const NODES: [&str; 2] = ["/dev/net/tun", "/dev/userfaultfd"];

/// Confine the process before it does anything else.
#[derive(Args)]
#[command(next_help_heading = "Jail")]
pub struct JailOptions {
    /// Enter a jail: namespaces, a root, a cgroup and a user of its own, no capabilities
    #[arg(long)]
    jail: bool,
    /// Become this user; needed as root
    #[arg(long, requires = "jail")]
    uid: Option<u32>,
    /// Become this group; needed as root
    #[arg(long, requires = "jail")]
    gid: Option<u32>,
    /// Name the jail's folder and cgroup after this program
    #[arg(long, requires = "jail", value_name = "PATH")]
    exec_file: Option<PathBuf>,
    /// Have the folder CHROOT_BASE_DIR/EXEC_FILE/ID/root as root; other paths are looked up there
    #[arg(long, requires = "jail", value_name = "PATH", default_value = "/srv/jailer")]
    chroot_base_dir: PathBuf,
    /// Have an empty root that cannot be written, with nothing but the folders of --visible
    #[arg(long, requires = "jail", conflicts_with = "chroot_base_dir")]
    empty_root: bool,
    /// Have this folder of the host in the empty root, to connect to sockets in it
    #[arg(long, requires = "empty_root", value_name = "PATH")]
    visible: Vec<PathBuf>,
    /// Join this network namespace, instead of a new one without interfaces
    #[arg(long, requires = "jail", value_name = "PATH")]
    netns: Option<PathBuf>,
    /// Go into the background, with /dev/null as standard streams
    #[arg(long, requires = "jail")]
    daemonize: bool,
    /// Have a process id namespace of its own; a jail always has
    #[arg(long, requires = "jail")]
    new_pid_ns: bool,
    /// Write this value to a file of the jail's cgroup
    #[arg(long, requires = "jail", value_name = "FILE=VALUE")]
    cgroup: Vec<String>,
    /// Version of cgroups
    #[arg(long, requires = "jail", value_parser = ["2"], default_value = "2")]
    cgroup_version: String,
    /// Make the cgroup below this one, which begins at the root of cgroups if it has a slash in front
    /// or the caller is root, and else above the caller's own [default: the name of EXEC_FILE]
    #[arg(long, requires = "jail", value_name = "PATH")]
    parent_cgroup: Option<PathBuf>,
    /// Limit a resource: no-file (number of descriptors) or fsize (bytes of a file that is written)
    #[arg(long, requires = "jail", value_name = "RESOURCE=VALUE")]
    resource_limit: Vec<String>,
    /// Go on without a part of the jail: cgroup, namespaces, landlock or seccomp
    #[arg(long, requires = "jail", value_name = "PART")]
    unconfined: Vec<Step>,
    /// Leave these descriptors open, which were inherited
    #[arg(long, requires = "jail", value_name = "FD,...", value_delimiter = ',')]
    keep_fds: Vec<RawFd>,
    /// Write the id of the confined process to this descriptor and leave it to the process above
    #[arg(long, requires = "jail", conflicts_with = "daemonize", value_name = "FD")]
    pid_fd: Option<RawFd>,
}

/// Opened before the jail was closed.
pub struct Opened {
    pub kvm: OwnedFd,
}

impl JailOptions {
    /// Starts the program anew without its environment where a jail is asked for: what that holds is
    /// of no use inside, and may be a secret of the host's. To be called before any descriptor is
    /// taken over, which would be closed.
    pub fn clear_environment(&self) -> Result<(), MachineError> {
        if !self.jail || std::env::vars_os().next().is_none() {
            return Ok(());
        }
        let error =
            Command::new("/proc/self/exe").args(std::env::args_os().skip(1)).env_clear().exec();
        Err(failed(format!("/proc/self/exe: {error}")))
    }

    /// Enters the jail where one is asked for, with these descriptors left open: returns in the
    /// confined process only.
    pub fn enter(&self, id: &str, mut kept: Vec<RawFd>) -> Result<Option<Opened>, MachineError> {
        if !self.jail {
            return Ok(None);
        }
        kept.extend(&self.keep_fds);
        kept.extend(self.pid_fd);
        // SAFETY: nothing in this process has opened a descriptor yet but what is kept; the others
        // were inherited by number.
        unsafe { jail::close_others(kept) }
            .map_err(|error| failed(format!("closing descriptors: {error}")))?;
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(|error| {
            failed(format!(
                "cannot open /dev/kvm: {error}; is KVM enabled, and may this user read and write it?"
            ))
        })?;
        if self.daemonize {
            silence().map_err(|error| failed(format!("/dev/null: {error}")))?;
        }
        let jail = self.describe(id)?;
        jail.enter().map_err(failed)?;
        Ok(Some(Opened { kvm: kvm.into() }))
    }

    /// Whether the caller goes on without this part.
    pub fn is_without(&self, step: Step) -> bool {
        self.unconfined.contains(&step)
    }

    fn describe(&self, id: &str) -> Result<Jail, MachineError> {
        let root = nix::unistd::geteuid().is_root();
        let own = |asked: Option<u32>, name: &str, own: u32| match asked {
            Some(number) => Ok(number),
            None if root => Err(failed(format!("--jail: root must say --{name}"))),
            None => Ok(own),
        };
        let program = self.exec_file.as_ref().and_then(|path| path.file_name());
        let program = program.unwrap_or("vmrun-vmm".as_ref());
        let cgroup = Cgroup {
            parent: self.parent_cgroup.clone().unwrap_or_else(|| program.into()),
            values: self
                .cgroup
                .iter()
                .map(|text| pair("--cgroup", text))
                .collect::<Result<_, _>>()?,
        };
        let mut limits = vec![(Resource::RLIMIT_NOFILE, MAX_DESCRIPTORS)];
        for text in &self.resource_limit {
            let (name, value) = pair("--resource-limit", text)?;
            let wrong = |what: &str| failed(format!("--resource-limit {text}: {what}"));
            let resource = match name.as_str() {
                "no-file" => Resource::RLIMIT_NOFILE,
                "fsize" => Resource::RLIMIT_FSIZE,
                _ => return Err(wrong("there are no-file and fsize")),
            };
            limits.push((resource, value.parse().map_err(|_| wrong("not a number"))?));
        }
        let parent = match self.pid_fd {
            // SAFETY: the descriptor was inherited, and nothing else in this process knows its
            // number, which the caller gave away with this option; a wrong one makes writes fail.
            Some(number) => Parent::Leave { pid: unsafe { OwnedFd::from_raw_fd(number) } },
            None if self.daemonize => Parent::Detach,
            None => Parent::Wait,
        };
        // Who started this knows where that leads; below it nothing may lead anywhere.
        let base = std::fs::canonicalize(&self.chroot_base_dir);
        let base = base.unwrap_or_else(|_| self.chroot_base_dir.clone());
        Ok(Jail {
            id: id.to_owned(),
            uid: own(self.uid, "uid", nix::unistd::geteuid().as_raw())?,
            gid: own(self.gid, "gid", nix::unistd::getegid().as_raw())?,
            root: match self.empty_root {
                true => Root::Empty { visible: self.visible.clone() },
                false => Root::Folder {
                    path: base.join(program).join(id).join("root"),
                    nodes: NODES.map(PathBuf::from).to_vec(),
                },
            },
            network: self.netns.clone(),
            cgroup: Some(cgroup),
            limits,
            parent,
            without: self.unconfined.clone(),
        })
    }
}

fn pair(option: &str, text: &str) -> Result<(String, String), MachineError> {
    let (name, value) =
        text.split_once('=').ok_or_else(|| failed(format!("{option} {text}: no = in it")))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Makes the standard streams /dev/null.
fn silence() -> io::Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}

/// Takes over an inherited descriptor, which programs that this one starts do not inherit.
pub fn inherited(option: &str, number: &str) -> Result<OwnedFd, MachineError> {
    let wrong = |error: &dyn std::fmt::Display| failed(format!("{option}: {error}"));
    let number: RawFd = number
        .parse()
        .ok()
        .filter(|number| *number > 2)
        .ok_or_else(|| wrong(&"not the number of a descriptor above 2"))?;
    // SAFETY: the descriptor is only borrowed for a call that fails where it is not open.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|error| wrong(&error))?;
    // SAFETY: it is open, as just seen; it was inherited, and nothing else in this process knows
    // its number, which the caller gave away with this option.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    debug_assert_eq!(descriptor.as_fd().as_raw_fd(), number);
    Ok(descriptor)
}
