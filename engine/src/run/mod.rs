//! From an image to a process's exit status: makes a container, starts its VMM, tells its agent what
//! to run, and stays between the process and the terminal until the end.

mod boot;
mod launch;
mod machine;

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_protocol::{
    Identity, Mount, MountSource, Network as GuestNetwork, Root, Start, StartFailure, Stream,
    WindowSize, Writable,
};
use api_server::machine::{
    BackendType, ConsoleOverride, DriveOverride, MemoryBackend, NetworkOverride, RestoredPages,
    SnapshotLoad, VsockOverride,
};
use images::Image;

pub use boot::{WarmOptions, snapshot_warm, try_boot};

use crate::agent::{AgentError, Control, Ready};
use crate::confinement::Policy;
use crate::container::{Config, Container, ContainerError, Machine, VSOCK};
use crate::conversation::{self, Conversation, Exit};
use crate::disk::{self, DiskError};
use crate::kernel::{Kernel, KernelError};
use crate::machine_api::{ApiError, MachineApi};
use crate::network::{self, Attachment, Dns, NetworkError};
use crate::paths::Paths;
use crate::programs::{self, ProgramError};
use crate::snapshot::{Main, Snapshot, SnapshotError};
use crate::spec::{self, ProcessOptions, SpecError, VolumeArgument};
use crate::stdio::{Forwarding, Terminal};
use crate::vmm::Handed;
use crate::volume::{self, Attached, VolumeError};
use launch::{Launch, explain};
use machine::{Plan, interface_override};

/// Size of a container's writable layer, in bytes: sparse, so this is what it may grow to.
pub const DEFAULT_DISK: u64 = 10 << 30;
/// Memory of a machine nobody has said anything about, in bytes.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// Less memory than this boots no kernel that runs images.
pub const MIN_MEMORY: u64 = 64 << 20;

/// The guest's disks are vda to vdz; the image and the writable layer are two of them.
const MAX_VOLUMES: usize = 24;
/// How long a guest may take to come up. Generous: emulated hosts are slow, and a guest that
/// crashes is noticed at once.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// How long a VMM may take to end after its guest was told that all is read.
const END_LIMIT: Duration = Duration::from_secs(20);

/// What a machine is connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NetworkMode {
    /// The host's bridge.
    #[default]
    Default,
    /// Nothing but its loopback.
    None,
}

/// Where a machine comes from.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'a> {
    /// It boots this kernel.
    Kernel(&'a Kernel),
    /// It is restored from this snapshot of the image.
    Snapshot(&'a Snapshot),
}

impl Origin<'_> {
    /// The process that runs already.
    fn main(&self) -> Option<&Main> {
        match self {
            Origin::Kernel(_) => None,
            Origin::Snapshot(snapshot) => snapshot.manifest.main.as_ref(),
        }
    }

    fn kernel_name(&self) -> &str {
        match self {
            Origin::Kernel(kernel) => &kernel.name,
            Origin::Snapshot(snapshot) => &snapshot.manifest.kernel,
        }
    }
}

/// What a user asks for, beside the image.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// The image as the user named it.
    pub image: String,
    /// The container's name; empty for a random one.
    pub name: String,
    /// Remove the container at its end.
    pub remove: bool,
    /// Labels, `NAME=value`.
    pub labels: Vec<String>,
    /// The process.
    pub process: ProcessOptions,
    /// Host name; the container's short id where there is none.
    pub hostname: Option<String>,
    /// Memory in bytes.
    pub memory: u64,
    /// Number of virtual processors.
    pub cpus: u8,
    /// No writable layer.
    pub read_only: bool,
    /// Size of the writable layer in bytes.
    pub disk: u64,
    /// tmpfs mounts.
    pub tmpfs: Vec<Mount>,
    /// Volumes.
    pub volumes: Vec<VolumeArgument>,
    /// Network.
    pub network: NetworkMode,
    /// The guest's address, where a certain one is wanted.
    pub ip: Option<Ipv4Addr>,
    /// Name servers, search domains and options, each in place of the host's where given.
    pub dns: Dns,
    /// Lines for /etc/hosts: name and address.
    pub extra_hosts: Vec<(String, String)>,
    /// Write the container's id to this file, which must not exist.
    pub cidfile: Option<PathBuf>,
    /// Leave signals to this process alone.
    pub no_signals: bool,
    /// How the VMM is confined.
    pub confinement: Policy,
    /// Let the VMM log everything.
    pub debug: bool,
}

/// Why nothing was run, or why it ended in an unexpected way.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The container.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// Its process.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Its writable layer.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Its volumes.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Its kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Its network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The other programs.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A file of the container.
    #[error("{path}: {error}{}", images::room_hint(error))]
    File {
        /// Which.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// The machine did not start.
    #[error("cannot start the machine: {0}")]
    Machine(String),
    /// It ended before its process did.
    #[error("the machine ended before its process did: {0}")]
    Ended(String),
    /// Its snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The VMM refuses what it is asked for.
    #[error("cannot restore the machine: {0}")]
    Restore(#[from] ApiError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The agent says what makes no sense.
    #[error("the guest's agent makes no sense: {0}")]
    Senseless(String),
    /// The process did not start.
    #[error("{message}")]
    Start {
        /// What kind of failure.
        kind: StartFailure,
        /// What the guest says.
        message: String,
    },
    /// More disks than a guest's names for them.
    #[error("at most {MAX_VOLUMES} volumes can be mounted")]
    TooManyVolumes,
    /// The terminal or the standard streams.
    #[error("{0}")]
    Stdio(io::Error),
    /// The user ended it while it started.
    #[error("interrupted")]
    Interrupted(u8),
}

impl RunError {
    /// The exit status of the command, as Docker has it.
    pub fn exit_code(&self) -> u8 {
        match self {
            RunError::Start { kind: StartFailure::CannotExecute, .. } => 126,
            RunError::Start { kind: StartFailure::NotFound, .. } => 127,
            RunError::Interrupted(signal) => 128u8.wrapping_add(*signal),
            _ => 125,
        }
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> RunError {
    let path = path.to_owned();
    move |error| RunError::File { path, error }
}

/// Runs an image in the foreground; the exit status of its process. To be called on the main
/// thread.
pub fn run(
    paths: &Paths,
    image: &Image,
    root_device: &Path,
    origin: Origin<'_>,
    options: &RunOptions,
) -> Result<u8, RunError> {
    let program = programs::vmm()?;
    // What can be wrong about the wishes is said before anything is made.
    let command = match origin.main() {
        Some(main) => main.command.clone(),
        None => spec::process(image.config.config().as_ref(), &options.process, "")?.argv,
    };
    if let Origin::Snapshot(snapshot) = origin {
        snapshot.check_root_device(root_device)?;
    }
    let config = Config {
        id: String::new(),
        name: options.name.clone(),
        image: options.image.clone(),
        image_id: image.config_digest.to_string(),
        command,
        created: 0,
        remove: options.remove,
        labels: options.labels.clone(),
        volumes: options
            .volumes
            .iter()
            .filter(|volume| !volume.is_path())
            .map(|volume| volume.source.clone())
            .collect(),
        kernel: origin.kernel_name().to_owned(),
        terminal: match origin.main() {
            Some(main) => main.terminal,
            None => options.process.terminal.is_some(),
        },
        dns: options.dns.clone(),
        extra_hosts: options.extra_hosts.clone(),
        machine: shape(root_device, origin, options),
    };
    let container = Container::create(paths, config)?;
    if let Err(error) = write_cidfile(options, &container) {
        container.discard()?;
        return Err(error);
    }
    let foreground = Foreground {
        paths,
        image,
        root_device,
        origin,
        options,
        container: &container,
        started: Cell::new(false),
    };
    let result = foreground.run(&program);
    let started = foreground.started.get();
    let finished = match &result {
        Ok(exit) => container.finish(exit.status, exit.out_of_memory),
        // What a process wrote before its machine broke down is its user's, and so are the logs.
        Err(error) if started => container.finish(error.exit_code(), false),
        // A container that never ran is of no use to anyone.
        Err(_) => {
            if let Some(path) = &options.cidfile {
                let _ = std::fs::remove_file(path);
            }
            container.discard()
        }
    };
    // The process's status matters more than what is left of its container.
    if let Err(second) = finished {
        tracing::warn!("{second}");
    }
    result.map(|exit| exit.status)
}

/// What the container's machine is made of.
fn shape(root_device: &Path, origin: Origin<'_>, options: &RunOptions) -> Machine {
    let root_device = root_device.to_owned();
    match origin {
        Origin::Kernel(_) => Machine {
            root_device,
            memory_mib: (options.memory >> 20) as usize,
            cpus: options.cpus,
            network: options.network == NetworkMode::Default,
            writable: !options.read_only,
            volumes: options.volumes.len(),
        },
        Origin::Snapshot(snapshot) => Machine {
            root_device,
            memory_mib: snapshot.manifest.memory_mib,
            cpus: snapshot.manifest.cpus,
            network: snapshot.manifest.network,
            writable: snapshot.writable().is_some(),
            volumes: 0,
        },
    }
}

fn write_cidfile(options: &RunOptions, container: &Container) -> Result<(), RunError> {
    let Some(path) = &options.cidfile else { return Ok(()) };
    let mut file = File::create_new(path).map_err(at(path))?;
    file.write_all(container.config.id.as_bytes()).map_err(at(path))
}

struct Foreground<'a> {
    paths: &'a Paths,
    image: &'a Image,
    root_device: &'a Path,
    origin: Origin<'a>,
    options: &'a RunOptions,
    container: &'a Container,
    /// Whether the process ever ran.
    started: Cell<bool>,
}

impl Foreground<'_> {
    fn run(&self, program: &Path) -> Result<Exit, RunError> {
        let volumes = self.volumes()?;
        let attachment =
            self.has_network().then(|| network::attach(self.options.ip)).transpose()?;
        let writable = self.writable_layer()?;
        let vsock = self.container.run().join(VSOCK);
        let ready = Ready::listen(&vsock)?;
        let mut handed = Handed::default();
        let mut load = None;
        let machine = match self.origin {
            Origin::Kernel(kernel) => {
                let plan = Plan {
                    kernel,
                    policy: &self.options.confinement,
                    root_device: self.root_device,
                    writable: writable.as_deref(),
                    cpus: self.options.cpus,
                    memory: self.options.memory,
                    debug: self.options.debug,
                };
                Some(plan.machine(&volumes, attachment.as_ref(), self.container, &mut handed)?)
            }
            Origin::Snapshot(snapshot) => {
                let network = attachment.as_ref().map(interface_override);
                load = Some(self.load(snapshot, writable.as_deref(), network, &mut handed)?);
                None
            }
        };
        let launch = Launch {
            program,
            container: self.container,
            policy: &self.options.confinement,
            volumes: &volumes,
            attachment: attachment.as_ref(),
        };
        let mut vmm = launch.start(machine.as_ref(), handed)?;
        // The VMM has its own copy; ours would keep the address after its end.
        let network = attachment.as_ref().map(|attachment| self.guest_network(attachment));
        drop(attachment);

        let forwarding = Forwarding::start(
            vmm.clone_pidfd().map_err(RunError::Stdio)?,
            !self.options.no_signals,
        )
        .map_err(RunError::Stdio)?;
        let mut outputs = Vec::new();
        let process = &self.options.process;
        let terminal =
            process.terminal.is_some() || self.origin.main().is_some_and(|it| it.terminal);
        let on_start = || self.on_start();
        let mut notice = None;
        let converse = || {
            if let Some(load) = &load {
                MachineApi::of(self.container.run()).load_snapshot(load)?;
            }
            notice = Some(ready.wait(vmm.pidfd(), BOOT_LIMIT)?);
            let mut control = Control::open(&vsock, vmm.pidfd())?;
            // Not before, so that Ctrl-C ends a machine that does not come up. Without -i nothing
            // would read the keys: they stay the terminal's, and Ctrl-C a signal.
            let raw = terminal && process.interactive;
            let _terminal = Terminal::enter(raw).map_err(RunError::Stdio)?;
            let conversation = Conversation {
                vsock: &vsock,
                machine: vmm.pidfd(),
                forwarding: &forwarding,
                outputs: &mut outputs,
                on_start: &on_start,
            };
            let exit = match (self.origin, self.origin.main()) {
                (_, Some(main)) => {
                    let identity = self.identity(network, main.streams(process.interactive))?;
                    // Of which size its terminal was nobody knows: it is told.
                    let size = main.terminal.then_some(WindowSize { rows: 0, columns: 0 });
                    conversation.go_on(&mut control, identity, size)?
                }
                (origin, None) => {
                    if matches!(origin, Origin::Snapshot(_)) {
                        let identity = self.identity(network.clone(), Vec::new())?;
                        conversation::identify(&mut control, identity)?;
                    }
                    let start = self.start(network, writable.is_some(), &volumes)?;
                    conversation.run(&mut control, start)?
                }
            };
            Ok((control, exit))
        };
        let result = converse();
        drop(notice);
        match result {
            Ok((control, exit)) => {
                control.close();
                let _ = vmm.wait(END_LIMIT);
                Ok(exit)
            }
            Err(error) => {
                if let Some(signal) = forwarding.interrupted() {
                    return Err(RunError::Interrupted(signal));
                }
                let error = explain(error, &mut vmm, self.container);
                if matches!(error, RunError::Start { .. }) && !volumes.is_empty() {
                    // The guest has hung up, and leaves them clean before it ends.
                    let _ = vmm.wait(END_LIMIT);
                }
                // What the process wrote before the end is shown before the error is.
                vmm.kill();
                for output in outputs {
                    let _ = output.join();
                }
                Err(error)
            }
        }
    }

    fn has_network(&self) -> bool {
        match self.origin {
            Origin::Kernel(_) => self.options.network == NetworkMode::Default,
            Origin::Snapshot(snapshot) => snapshot.manifest.network,
        }
    }

    /// The process runs. Where somebody waits for that, a service manager for example, it is told
    /// as sd_notify(3) has it.
    fn on_start(&self) {
        self.started.set(true);
        if let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) {
            let text = format!("READY=1\nX_VMRUN_ID={}", self.container.config.id);
            let sent = UnixDatagram::unbound().and_then(|it| it.send_to(text.as_bytes(), &socket));
            if let Err(error) = sent {
                tracing::warn!("NOTIFY_SOCKET {}: {error}", Path::new(&socket).display());
            }
        }
    }

    fn writable_layer(&self) -> Result<Option<PathBuf>, RunError> {
        let Some(path) = self.container.writable() else { return Ok(None) };
        match self.origin {
            Origin::Kernel(_) => disk::make(self.paths, self.options.disk, &path)?,
            Origin::Snapshot(snapshot) => {
                if let Some(from) = snapshot.writable() {
                    disk::copy(&from, &path)?;
                }
            }
        }
        Ok(Some(path))
    }

    fn volumes(&self) -> Result<Vec<Attached>, RunError> {
        if self.options.volumes.len() > MAX_VOLUMES {
            return Err(RunError::TooManyVolumes);
        }
        let volumes = self.options.volumes.iter();
        Ok(volumes
            .map(|argument| volume::attach(self.paths, argument.clone()))
            .collect::<Result<_, _>>()?)
    }

    /// What makes the machine one of the snapshot, with files and an address of its own.
    fn load(
        &self,
        snapshot: &Snapshot,
        writable: Option<&Path>,
        network: Option<NetworkOverride>,
        handed: &mut Handed,
    ) -> Result<SnapshotLoad, RunError> {
        let read = |handed: &mut Handed, path: &Path| handed.read(path).map_err(at(path));
        let drive = |id: &str, path_on_host: PathBuf| DriveOverride {
            drive_id: id.to_owned(),
            path_on_host,
        };
        let image = drive("image", read(handed, self.root_device)?);
        let writable = writable
            .map(|path| Ok::<_, RunError>(drive("writable", handed.write(path).map_err(at(path))?)))
            .transpose()?;
        let console = self.container.path("console.log");
        Ok(SnapshotLoad {
            snapshot_path: read(handed, &snapshot.state())?,
            mem_file_path: None,
            mem_backend: Some(MemoryBackend {
                backend_type: BackendType::File,
                backend_path: read(handed, &snapshot.memory())?,
            }),
            enable_diff_snapshots: false,
            track_dirty_pages: false,
            resume_vm: true,
            network_overrides: network.into_iter().collect(),
            vsock_override: Some(VsockOverride {
                uds_path: self.options.confinement.socket(self.container.run(), VSOCK),
            }),
            drive_overrides: std::iter::once(image).chain(writable).collect(),
            console_override: Some(ConsoleOverride {
                output_path: handed.append(&console).map_err(at(&console))?,
            }),
            clock_realtime: false,
            huge_pages: RestoredPages::Snapshot,
        })
    }

    fn hostname(&self) -> String {
        let id = || crate::container::short(&self.container.config.id).to_owned();
        self.options.hostname.clone().unwrap_or_else(id)
    }

    /// 32 digits that no other machine has.
    fn machine_id(&self) -> String {
        self.container.config.id.chars().take(32).collect()
    }

    fn identity(
        &self,
        network: Option<GuestNetwork>,
        streams: Vec<Stream>,
    ) -> Result<Identity, RunError> {
        Ok(Identity {
            hostname: self.hostname(),
            network,
            time_ns: now(),
            entropy: entropy()?,
            machine_id: self.machine_id(),
            streams,
        })
    }

    fn guest_network(&self, attachment: &Attachment) -> GuestNetwork {
        let host = network::dns_of_host();
        let wished = &self.options.dns;
        let choose = |wished: &Vec<String>, host: Vec<String>| {
            if wished.is_empty() { host } else { wished.clone() }
        };
        GuestNetwork {
            mac: attachment.mac,
            address: (attachment.address.octets(), attachment.prefix),
            gateway: Some(attachment.gateway.octets()),
            mtu: attachment.mtu,
            dns: choose(&wished.servers, host.servers),
            dns_search: choose(&wished.search, host.search),
            dns_options: choose(&wished.options, host.options),
            extra_hosts: self.options.extra_hosts.clone(),
        }
    }

    fn start(
        &self,
        network: Option<GuestNetwork>,
        writable: bool,
        volumes: &[Attached],
    ) -> Result<Start, RunError> {
        let hostname = self.hostname();
        let process =
            spec::process(self.image.config.config().as_ref(), &self.options.process, &hostname)?;
        let writable = match writable {
            true => Writable::Device("/dev/vdb".to_owned()),
            false => Writable::No,
        };
        // vda is the image, and vdb the writable layer where there is one.
        let first = if writable == Writable::No { b'b' } else { b'c' };
        let devices = (first..=b'z').zip(volumes).map(|(letter, volume)| Mount {
            source: MountSource::Device {
                device: format!("/dev/vd{}", char::from(letter)),
                fs_type: "ext4".to_owned(),
                copy_up: !volume.argument.is_path(),
            },
            target: volume.argument.target.clone(),
            read_only: volume.argument.read_only,
        });
        let restored = matches!(self.origin, Origin::Snapshot(_));
        Ok(Start {
            root: Root { device: "/dev/vda".to_owned(), writable },
            mounts: self.options.tmpfs.iter().cloned().chain(devices).collect(),
            hostname,
            network,
            time_ns: now(),
            entropy: entropy()?,
            machine_id: if restored { self.machine_id() } else { String::new() },
            process,
        })
    }
}

/// Nanoseconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos() as u64
}

fn entropy() -> Result<Vec<u8>, RunError> {
    let mut bytes = vec![0; 64];
    crate::random::fill(&mut bytes).map_err(RunError::Stdio)?;
    Ok(bytes)
}
