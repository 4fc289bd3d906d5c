//! The start of a container's VMM, and why one ended.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use api_server::machine::config_file::ConfigFile;

use super::{RunError, at};
use crate::agent::{self, AgentError, printable};
use crate::confinement::{Confinement, Policy, Share};
use crate::container::{Container, VSOCK};
use crate::machine_api::{ApiError, MachineApi};
use crate::network::Attachment;
use crate::vmm::{self, Handed, Vmm};
use crate::volume::Attached;

/// What the VMM of a container is started with.
pub struct Launch<'a> {
    pub program: &'a Path,
    pub container: &'a Container,
    pub policy: &'a Policy,
    pub volumes: &'a [Attached],
    pub attachment: Option<&'a Attachment>,
}

impl Launch<'_> {
    /// Starts the VMM, which inherits the locks, the network, its sockets and what it was handed.
    /// Without a machine it waits for one over its API.
    pub fn start(&self, machine: Option<&ConfigFile>, mut handed: Handed) -> Result<Vmm, RunError> {
        let container = self.container;
        let id = crate::container::short(&container.config.id);
        let mut description = None;
        if let Some(machine) = machine {
            let path = container.path("vm.json");
            let text = serde_json::to_vec(machine).map_err(io::Error::from).map_err(at(&path))?;
            std::fs::write(&path, text).map_err(at(&path))?;
            description = Some(handed.read(&path).map_err(at(&path))?);
        }
        let api = handed.give(agent::listen(MachineApi::of(container.run()).socket())?);
        let vsock = agent::listen(&container.run().join(VSOCK))?;
        let log_path = container.path("vmm.log");
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&log_path)
            .map_err(at(&log_path))?;
        let confinement = Confinement::new(self.policy)
            .map_err(|error| RunError::Machine(format!("a user for the VMM: {error}")))?;
        if let Some(cgroup) = confinement.cgroup(id) {
            container.set_cgroup(&cgroup)?;
        }
        let shape = &container.config.machine;
        let share = Share {
            memory: (shape.memory_mib as u64) << 20,
            cpus: shape.cpus,
            file: handed.largest(),
        };
        let mut inherited = vec![container.lock().as_raw_fd(), vsock.as_raw_fd()];
        inherited.extend(confinement.lock());
        inherited.extend(self.volumes.iter().map(|volume| volume.lock.as_raw_fd()));
        inherited.extend(self.attachment.map(|attachment| attachment.tap.as_raw_fd()));
        inherited.extend(handed.numbers());
        let arguments = |command: &mut std::process::Command| {
            match &description {
                Some(path) => command.arg("--config-file").arg(path),
                None => command.args(["--level", "Warning", "--show-level"]),
            };
            command.args(["--id", id]).arg("--api-sock").arg(&api);
            command.arg("--vsock-fd").arg(vsock.as_raw_fd().to_string());
            if let Some(attachment) = self.attachment {
                command.arg("--tap-fd").arg(format!("eth0={}", attachment.tap.as_raw_fd()));
            }
            confinement.arguments(command, container.run(), share);
        };
        vmm::start(self.program, arguments, &inherited, log).map_err(|error| match error {
            vmm::StartError::Program(error) => at(self.program)(error),
            vmm::StartError::Refused => RunError::Machine(refusal(container)),
        })
    }
}

/// Why a VMM that did not start did not, in its own words.
fn refusal(container: &Container) -> String {
    let line = last_line(container, "vmm.log").unwrap_or_default();
    line.trim_start_matches("vmrun-vmm: ").to_owned()
}

/// The last line of a container's file that is not empty; of a crash the one that says panic.
fn last_line(container: &Container, name: &str) -> Option<String> {
    let bytes = tail(&container.path(name)).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let panic = lines.iter().find(|line| line.contains("Kernel panic"));
    panic.or(lines.last()).map(|line| printable(line))
}

/// Turns a broken conversation into what a user can use: why the VMM ended, in its own words or the
/// guest kernel's last ones.
pub fn explain(error: RunError, vmm: &mut Vmm, container: &Container) -> RunError {
    let silent = matches!(&error, RunError::Agent(AgentError::Silent));
    let broken = matches!(
        &error,
        RunError::Agent(AgentError::MachineEnded | AgentError::Io(_) | AgentError::Frame(_))
            | RunError::Restore(ApiError::Socket { .. } | ApiError::Senseless(_))
    );
    if !broken && !silent {
        return error;
    }
    if silent {
        vmm.kill();
    }
    // A VMM whose sockets closed is about to end.
    let Ok(status) = vmm.wait(Duration::from_secs(5)) else { return error };
    if status.code() == Some(api_server::machine::exit_status::START_FAILED) {
        return RunError::Machine(refusal(container));
    }
    let reason = if silent { error.to_string() } else { vmm::describe(status) };
    if !silent && status.code().is_none() {
        return RunError::Ended(match container.was_killed_for_memory() {
            true => format!("{reason}: it reached the limit of its memory on the host"),
            false => reason,
        });
    }
    // What a guest on a full disk says finds no room either.
    if let Some(folder) = container.full_folder() {
        let error = io::Error::from(io::ErrorKind::StorageFull);
        let hint = images::room_hint(&error);
        return RunError::Ended(format!("{reason}; {}: {error}{hint}", folder.display()));
    }
    // A guest that crashed before it had a console has said nothing; its VMM knows how it ended.
    let said = last_line(container, "console.log").map(|line| format!("its console says: {line}"));
    let said = said
        .or_else(|| last_line(container, "vmm.log").map(|line| format!("the VMM says: {line}")));
    RunError::Ended(said.map_or(reason.clone(), |said| format!("{reason}; {said}")))
}

/// The end of a file that a guest may have filled.
fn tail(path: &Path) -> io::Result<Vec<u8>> {
    const LENGTH: u64 = 8192;
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LENGTH)))?;
    let mut bytes = Vec::new();
    file.take(LENGTH).read_to_end(&mut bytes)?;
    Ok(bytes)
}
