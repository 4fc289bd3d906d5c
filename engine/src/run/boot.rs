//! Machines in which no user's process runs: one to make a snapshot of, and one to see whether
//! machines run here.

use std::path::Path;
use std::time::{Duration, Instant};

use api_server::machine::MachineConfig;
use images::Image;

use super::launch::{Launch, explain};
use super::machine::{Plan, bare_machine};
use super::{BOOT_LIMIT, NetworkMode, RunError};
use crate::agent::Ready;
use crate::confinement::Policy;
use crate::container::{Config, Container, Machine, VSOCK};
use crate::disk;
use crate::kernel::Kernel;
use crate::network::{self, Dns};
use crate::paths::Paths;
use crate::programs;
use crate::snapshot::{self, Work};
use crate::vmm::Handed;

/// How long a trial may take: a host on which it takes longer is of no use.
const TRIAL_LIMIT: Duration = Duration::from_secs(30);

/// A machine in which no process runs yet, for a snapshot.
#[derive(Clone, Debug)]
pub struct WarmOptions {
    /// The image as the user named it.
    pub image: String,
    /// Memory in bytes.
    pub memory: u64,
    /// Number of virtual processors.
    pub cpus: u8,
    /// No writable layer.
    pub read_only: bool,
    /// Size of the writable layer in bytes.
    pub disk: u64,
    /// Network.
    pub network: NetworkMode,
    /// How the VMM is confined.
    pub confinement: Policy,
    /// Let the VMM log everything.
    pub debug: bool,
}

/// Boots a machine of an image until it waits for what to run, and makes a snapshot of it there. To
/// be called on the main thread.
pub fn snapshot_warm(
    paths: &Paths,
    image: &Image,
    root_device: &Path,
    kernel: &Kernel,
    options: &WarmOptions,
    name: &str,
) -> Result<(), RunError> {
    let program = programs::vmm()?;
    let work = Work::begin(paths, name)?;
    let config = Config {
        image: options.image.clone(),
        image_id: image.config_digest.to_string(),
        remove: true,
        machine: Machine {
            root_device: root_device.to_owned(),
            memory_mib: (options.memory >> 20) as usize,
            cpus: options.cpus,
            network: options.network == NetworkMode::Default,
            writable: !options.read_only,
            volumes: 0,
        },
        ..Config::default()
    };
    let container = Container::create(paths, config)?;
    let attempt = || {
        let attachment = match options.network {
            NetworkMode::None => None,
            NetworkMode::Default => Some(network::attach(None)?),
        };
        let writable = container.writable();
        if let Some(path) = &writable {
            disk::make(paths, options.disk, path)?;
        }
        let ready = Ready::listen(&container.run().join(VSOCK))?;
        let plan = Plan {
            kernel,
            policy: &options.confinement,
            root_device,
            writable: writable.as_deref(),
            cpus: options.cpus,
            memory: options.memory,
            debug: options.debug,
        };
        let mut handed = Handed::default();
        let machine = plan.machine(&[], attachment.as_ref(), &container, &mut handed)?;
        let launch = Launch {
            program: &program,
            container: &container,
            policy: &options.confinement,
            volumes: &[],
            attachment: attachment.as_ref(),
        };
        let mut vmm = launch.start(Some(&machine), handed)?;
        let _notice = match ready.wait(vmm.pidfd(), BOOT_LIMIT) {
            Ok(notice) => notice,
            Err(error) => return Err(explain(error.into(), &mut vmm, &container)),
        };
        Ok(work.take(container.run(), container.writable().as_deref())?)
    };
    let taken = attempt();
    let machine = container.config.machine.clone();
    container.discard()?;
    let origin = snapshot::Origin {
        image: options.image.clone(),
        image_id: image.config_digest.to_string(),
        kernel: kernel.name.clone(),
        main: None,
        dns: Dns::default(),
        extra_hosts: Vec::new(),
    };
    taken?;
    Ok(work.finish(&machine, origin)?)
}

/// Starts a machine without an image and waits until its agent is up: whether machines run here.
pub fn try_boot(paths: &Paths, kernel: &Kernel, policy: &Policy) -> Result<Duration, RunError> {
    let program = programs::vmm()?;
    let memory_mib = 128;
    let machine = Machine { memory_mib, cpus: 1, ..Machine::default() };
    let config = Config { remove: true, machine, ..Config::default() };
    let container = Container::create(paths, config)?;
    let attempt = || {
        let ready = Ready::listen(&container.run().join(VSOCK))?;
        let mut handed = Handed::default();
        let mut config = bare_machine(kernel, policy, &container, &mut handed)?;
        config.machine_config =
            Some(MachineConfig { vcpu_count: 1, mem_size_mib: memory_mib, ..Default::default() });
        let since = Instant::now();
        let launch = Launch {
            program: &program,
            container: &container,
            policy,
            volumes: &[],
            attachment: None,
        };
        let mut vmm = launch.start(Some(&config), handed)?;
        match ready.wait(vmm.pidfd(), TRIAL_LIMIT) {
            Ok(_) => Ok(since.elapsed()),
            Err(error) => Err(explain(error.into(), &mut vmm, &container)),
        }
    };
    let result = attempt();
    container.discard()?;
    result
}
