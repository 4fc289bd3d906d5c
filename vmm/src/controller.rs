//! Answers requests: collects what the machine is made of, starts it, and changes it while it runs.

mod hotplug;

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use api_server::machine::config_file::ConfigFile;
use api_server::machine::{
    BackendType, HugePages, InstanceInfo, InstanceState, Machine, MachineAnswer, MachineConfig,
    MachineError, MachineRequest, MmdsConfig, NetworkInterface, PartialDrive,
    PartialNetworkInterface, RestoredPages, SnapshotCreate, SnapshotLoad, SnapshotType,
};
use devices::host_file::{self, Access};
use devices::virtio::balloon::Balloon;
use devices::virtio::block::Disk;
use devices::virtio::mem::Mem;
use mmds::Mmds;

use crate::logger::Log;
use crate::machine::{self, Handed, Running, lock};
use crate::memory;
use crate::metrics::{Collector, Sample};
use crate::snapshot::{MachineState, file, memory_file, userfault};
use crate::{limits, metadata};

/// One machine, before and after its start.
pub struct Controller {
    id: String,
    description: ConfigFile,
    handed: Handed,
    log: Option<Log>,
    metrics: Collector,
    running: Option<Running>,
    paused: bool,
    metadata: Option<Arc<Mutex<Mmds>>>,
    /// Most bytes that the metadata service holds.
    metadata_limit: usize,
    /// The event loop has not taken up the machine yet.
    fresh: bool,
    /// Devices that are to go.
    removals: Vec<hotplug::Removal>,
    /// Devices that are gone, which nobody has been told yet.
    removed: Vec<hotplug::Removal>,
}

/// Any error of ours as a refusal.
fn refused(error: impl ToString) -> MachineError {
    MachineError::new(&error.to_string())
}

const AFTER_START: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE_START: &str = "The requested operation is not supported before starting the microVM.";

impl Controller {
    /// A machine of this name that nothing is known of yet. Its metadata service holds so many bytes
    /// of JSON.
    pub fn new(id: String, handed: Handed, metadata_limit: usize) -> Controller {
        Controller {
            metrics: Collector::new(&id),
            id,
            description: ConfigFile::default(),
            handed,
            log: None,
            running: None,
            paused: false,
            metadata: None,
            metadata_limit,
            fresh: false,
            removals: Vec::new(),
            removed: Vec::new(),
        }
    }

    /// What `PUT /logger` configures; without one it is refused.
    pub fn set_log(&mut self, log: Log) {
        self.description.logger = Some(log.config().clone());
        self.log = Some(log);
    }

    /// What the process counts beside the machine.
    pub fn metrics(&mut self) -> &mut Collector {
        &mut self.metrics
    }

    /// Carries out a request of the API that was received then, and takes the time.
    pub fn serve(
        &mut self,
        request: MachineRequest,
        received: Instant,
    ) -> Result<MachineAnswer, MachineError> {
        let timing = self.metrics.begin(&request, received);
        let answer = self.handle(request);
        if let (Some(timing), Ok(_)) = (timing, &answer) {
            self.metrics.end(&timing);
        }
        answer
    }

    /// Writes the last line of metrics, and leaves no files behind.
    pub fn finish(&mut self) {
        self.write_metrics();
        if let Some(running) = &self.running {
            running.clear_up();
        }
    }

    /// Writes a line of metrics, if it is known where to.
    pub fn write_metrics(&mut self) {
        let counted = self.counted();
        if let Err(error) = self.metrics.write(counted, self.log.as_ref()) {
            telemetry::limited_warning!("{error}");
        }
    }

    fn counted(&self) -> Vec<Sample> {
        let mut counted = self.running.as_ref().map(Running::metrics).unwrap_or_default();
        let service = self.metadata.iter();
        counted.extend(service.map(|service| lock(service).metrics().readings().into()));
        counted
    }

    /// The machine, the first time that there is one to be served.
    pub fn take_up(&mut self) -> Option<&mut Running> {
        std::mem::take(&mut self.fresh).then_some(())?;
        self.running.as_mut()
    }

    /// Whether there is a machine.
    pub fn is_started(&self) -> bool {
        self.running.is_some()
    }

    fn running(&self) -> Result<&Running, MachineError> {
        self.running.as_ref().ok_or_else(|| MachineError::new(BEFORE_START))
    }

    fn balloon(&self) -> Result<&Arc<Mutex<Balloon>>, MachineError> {
        self.running()?.devices.balloon.as_ref().ok_or_else(no_balloon)
    }

    fn hotplug(&self) -> Result<&Arc<Mutex<Mem>>, MachineError> {
        let missing = || MachineError::new("Memory hotplug is not configured.");
        self.running()?.devices.hotplug.as_ref().ok_or_else(missing)
    }

    /// The metadata service, which is made when it is first spoken of.
    fn metadata(&mut self) -> Result<Arc<Mutex<Mmds>>, MachineError> {
        match &self.metadata {
            Some(service) => Ok(service.clone()),
            None => {
                let service = metadata::service(self.metadata_limit)?;
                Ok(self.metadata.insert(service).clone())
            }
        }
    }

    /// What the machine gets from outside its description. It is kept until there is one.
    fn hand_over(&mut self, metadata: Option<&MmdsConfig>) -> Result<Handed, MachineError> {
        if let Some(config) = metadata {
            let service = self.metadata()?;
            lock(&service).configure(metadata::state(config)).map_err(refused)?;
            self.handed.metadata = Some(service);
        }
        self.handed
            .try_clone()
            .map_err(|error| refused(format!("a descriptor that was handed in: {error}")))
    }

    fn machine_config(&self) -> MachineConfig {
        self.description.machine_config.clone().unwrap_or_default()
    }

    /// Describes the machine; refused once it is there.
    fn describe(&mut self, request: MachineRequest) -> Result<(), MachineError> {
        if self.running.is_some() {
            return self.plug(request);
        }
        let description = &mut self.description;
        match request {
            MachineRequest::PutBootSource(source) => {
                if let Some(text) = &source.boot_args {
                    arch::boot::check_command_line(text).map_err(refused)?;
                }
                for path in std::iter::once(&source.kernel_image_path).chain(&source.initrd_path) {
                    readable(path)?;
                }
                description.boot_source = Some(source);
            }
            MachineRequest::PutMachineConfig(config) => self.set_machine_config(config)?,
            MachineRequest::PatchMachineConfig(update) => {
                self.set_machine_config(update.apply(&self.machine_config())?)?;
            }
            MachineRequest::PutCpuConfig(config) => description.cpu_config = Some(config),
            MachineRequest::PutDrive(drive) => {
                readable(drive.check()?)?;
                let others = description.drives.iter();
                let mut others = others.filter(|other| other.drive_id != drive.drive_id);
                let pmem = description.pmem.iter().any(|pmem| pmem.root_device);
                if drive.is_root_device && (pmem || others.any(|other| other.is_root_device)) {
                    return Err(MachineError::new("A root block device already exists!"));
                }
                replace(&mut description.drives, drive, |drive| &drive.drive_id);
            }
            MachineRequest::PutNetworkInterface(interface) => {
                interface.check()?;
                check_mac(description, &interface)?;
                let interfaces = &mut description.network_interfaces;
                replace(interfaces, interface, |interface| &interface.iface_id);
            }
            MachineRequest::PutVsock(vsock) => {
                vsock.check()?;
                description.vsock = Some(vsock);
            }
            MachineRequest::PutEntropy(entropy) => description.entropy = Some(entropy),
            MachineRequest::PutSerial(serial) => description.serial = Some(serial),
            MachineRequest::PutConsole(console) => description.console = Some(console),
            MachineRequest::PutBalloon(balloon) => {
                self.check_balloon(balloon.amount_mib)?;
                self.description.balloon = Some(balloon);
            }
            MachineRequest::StartInstance => {
                let known = |name: &String| {
                    description.network_interfaces.iter().any(|other| other.iface_id == *name)
                };
                if let Some(name) = self.handed.taps.keys().find(|name| !known(name)) {
                    return Err(refused(format!(
                        "a TAP was handed in for {name}, which is no interface"
                    )));
                }
                let config = self.description.mmds_config.clone();
                let handed = self.hand_over(config.as_ref())?;
                let running = machine::boot(&self.description, handed).map_err(refused)?;
                self.started(running, false);
            }
            MachineRequest::LoadSnapshot(load) => self.load(&load)?,
            MachineRequest::PutPmem(pmem) => {
                pmem.check()?;
                readable(&pmem.path_on_host)?;
                let drives = description.drives.iter().any(|drive| drive.is_root_device);
                let mut others = description.pmem.iter().filter(|other| other.id != pmem.id);
                if pmem.root_device && (drives || others.any(|other| other.root_device)) {
                    return Err(MachineError::new(
                        "Attempt to add pmem as a root device while the root device defined as a block device",
                    ));
                }
                replace(&mut description.pmem, pmem, |pmem| &pmem.id);
            }
            MachineRequest::PutMemoryHotplug(config) => {
                machine::hotplug_options(&config).check().map_err(refused)?;
                description.memory_hotplug = Some(config);
            }
            MachineRequest::PutMmdsConfig(config) => {
                config.check()?;
                let known = |id: &&String| {
                    description.network_interfaces.iter().any(|other| other.iface_id == **id)
                };
                let unknown: Vec<_> =
                    config.network_interfaces.iter().filter(|id| !known(id)).collect();
                if !unknown.is_empty() {
                    return Err(refused(format!(
                        "The list of network interface IDs provided contains at least one ID that \
                         does not correspond to any existing network interface: {unknown:?}"
                    )));
                }
                lock(&*self.metadata()?).configure(metadata::state(&config)).map_err(refused)?;
                self.description.mmds_config = Some(config);
            }
            other => return Err(refused(format!("not a description: {other:?}"))),
        }
        Ok(())
    }

    fn started(&mut self, running: Running, paused: bool) {
        self.handed = Handed::default();
        self.running = Some(running);
        (self.paused, self.fresh) = (paused, true);
    }

    fn set_machine_config(&mut self, config: MachineConfig) -> Result<(), MachineError> {
        config.check()?;
        if let Some(balloon) = &self.description.balloon
            && balloon.amount_mib as usize > config.mem_size_mib
        {
            return Err(MachineError::new(
                "The memory size (MiB) is smaller than the previously set balloon device target size.",
            ));
        }
        self.description.machine_config = Some(config);
        Ok(())
    }

    fn check_balloon(&self, amount_mib: u32) -> Result<(), MachineError> {
        if amount_mib as usize > self.machine_config().mem_size_mib {
            return Err(MachineError::new(
                "Amount of pages requested cannot be higher than memory size.",
            ));
        }
        Ok(())
    }

    fn patch_drive(&mut self, change: PartialDrive) -> Result<(), MachineError> {
        let id = &change.drive_id;
        let missing = || refused(format!("drive {id}: there is no such drive"));
        let device = self.running()?.devices.drives.get(id).cloned().ok_or_else(missing)?;
        let drives = &mut self.description.drives;
        if let Some(path) = &change.path_on_host {
            let mut changed = drives.clone();
            if let Some(drive) = changed.iter_mut().find(|drive| drive.drive_id == *id) {
                drive.path_on_host = Some(path.clone());
            }
            machine::check_sharing(&changed).map_err(refused)?;
        }
        let drive = drives.iter_mut().find(|drive| drive.drive_id == *id).ok_or_else(missing)?;
        let mut device = lock(&device);
        if let Some(path) = change.path_on_host {
            let disk = Disk::open(&path, drive.is_read_only)
                .map_err(|error| refused(format!("drive {id}: {error}")))?;
            device.replace_disk(disk).map_err(|error| refused(format!("drive {id}: {error}")))?;
            drive.path_on_host = Some(path);
        }
        if let Some(limits) = change.rate_limiter {
            let (bandwidth, ops) = limits::updates(&limits);
            device.update_rate_limiter(bandwidth, ops).map_err(refused)?;
            merge(&mut drive.rate_limiter, limits);
        }
        Ok(())
    }

    fn patch_interface(&mut self, change: PartialNetworkInterface) -> Result<(), MachineError> {
        let id = &change.iface_id;
        let missing = || refused(format!("interface {id}: there is no such interface"));
        let device = self.running()?.devices.interfaces.get(id).cloned().ok_or_else(missing)?;
        let interface = self
            .description
            .network_interfaces
            .iter_mut()
            .find(|interface| interface.iface_id == *id)
            .ok_or_else(missing)?;
        let mut device = lock(&device);
        if let Some(limits) = change.rx_rate_limiter {
            let (bandwidth, ops) = limits::updates(&limits);
            device.update_rx_rate_limiter(bandwidth, ops).map_err(refused)?;
            merge(&mut interface.rx_rate_limiter, limits);
        }
        if let Some(limits) = change.tx_rate_limiter {
            let (bandwidth, ops) = limits::updates(&limits);
            device.update_tx_rate_limiter(bandwidth, ops).map_err(refused)?;
            merge(&mut interface.tx_rate_limiter, limits);
        }
        Ok(())
    }

    fn create(&self, create: &SnapshotCreate) -> Result<(), MachineError> {
        let running = self.running()?;
        if !self.paused {
            return Err(MachineError::new(
                "Create snapshot error: Cannot save the microVM state: Operation not allowed: \
                 save/restore unavailable while running",
            ));
        }
        let (state_path, memory_path) = (&create.snapshot_path, &create.mem_file_path);
        let started = Instant::now();
        let state = running.save(&self.description).map_err(refused)?;
        let failed = |error: std::io::Error| {
            refused(format!("Create snapshot error: {}: {error}", memory_path.display()))
        };
        let memory = running.memory();
        let dirty = running.take_dirty_pages().map_err(refused)?;
        let written = match (create.snapshot_type, &dirty) {
            (SnapshotType::Diff, Some(pages)) => {
                memory_file::write_diff(memory, pages, memory_path)
            }
            // Without a record anything may have been written.
            (SnapshotType::Diff, None) | (SnapshotType::Full, _) => {
                memory_file::write_full(memory, memory_path)
            }
        };
        let written = written.map_err(failed).and_then(|()| {
            file::write(state_path, &state)
                .map_err(|error| refused(format!("Create snapshot error: {error}")))
        });
        if let (Err(_), Some(pages)) = (&written, &dirty) {
            memory_file::remember(memory, pages);
        }
        written?;
        tracing::info!("snapshot written in {} us", started.elapsed().as_micros());
        Ok(())
    }

    fn load(&mut self, load: &SnapshotLoad) -> Result<(), MachineError> {
        let empty = ConfigFile {
            logger: self.description.logger.clone(),
            metrics: self.description.metrics.clone(),
            ..ConfigFile::default()
        };
        if self.description != empty {
            return Err(MachineError::new(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring \
                 boot-specific resources.",
            ));
        }
        let started = Instant::now();
        let failed =
            |error: &dyn std::fmt::Display| refused(format!("Load snapshot error: {error}"));
        let backend = load.memory()?;
        let mut state: MachineState =
            file::read(&load.snapshot_path).map_err(|error| failed(&error))?;
        override_paths(&mut state.description, load)?;
        let config = state.description.machine_config.get_or_insert_default();
        config.track_dirty_pages = load.tracks_dirty_pages();
        config.huge_pages = match load.huge_pages {
            RestoredPages::Snapshot => config.huge_pages,
            RestoredPages::None => HugePages::None,
            RestoredPages::Transparent => HugePages::Transparent,
            RestoredPages::Explicit => HugePages::Explicit,
        };
        config.check()?;
        let options = machine::memory_options(&state.description);
        if options.pages == HugePages::Explicit {
            return Err(failed(&"2M pages cannot be restored yet; use None or Transparent"));
        }
        let path = &backend.backend_path;
        let (memory, faults) = match backend.backend_type {
            BackendType::File => {
                let file = host_file::open_with(path, Access::Read, File::options().read(true))
                    .map_err(|error| failed(&format!("{}: {error}", path.display())))?;
                (memory::from_file(&options, file).map_err(|error| failed(&error))?, None)
            }
            BackendType::Uffd => {
                let memory = memory::anonymous(&options).map_err(|error| failed(&error))?;
                let faults = userfault::hand_over(&memory, path)
                    .map_err(|error| failed(&format!("{}: {error}", path.display())))?;
                (memory, Some(faults))
            }
        };
        let handed = self.hand_over(state.description.mmds_config.as_ref())?;
        let running = machine::restore(&state, memory, faults, handed, load.clock_realtime)
            .map_err(|error| failed(&error))?;
        if load.resume_vm {
            running.resume().map_err(refused)?;
        }
        self.description = ConfigFile {
            boot_source: None,
            logger: empty.logger,
            metrics: empty.metrics,
            ..state.description
        };
        self.started(running, !load.resume_vm);
        tracing::info!("snapshot loaded in {} us", started.elapsed().as_micros());
        Ok(())
    }
}

/// Refuses two interfaces with one MAC address.
fn check_mac(description: &ConfigFile, interface: &NetworkInterface) -> Result<(), MachineError> {
    let others = description.network_interfaces.iter();
    let mut others = others.filter(|other| other.iface_id != interface.iface_id);
    if let Some(mac) = &interface.guest_mac
        && others.any(|other| other.guest_mac.as_ref() == Some(mac))
    {
        return Err(refused(format!("The MAC address is already in use: {mac}")));
    }
    Ok(())
}

/// Refuses a file that is not there, before it is needed.
fn readable(path: &Path) -> Result<(), MachineError> {
    match host_file::metadata(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(refused(format!("{}: {error}", path.display()))),
    }
}

fn no_balloon() -> MachineError {
    MachineError::new("Balloon device not configured.")
}

fn not_yet(what: &str) -> Result<(), MachineError> {
    Err(refused(format!("{what} is not supported yet")))
}

/// Puts an item where the one of the same name is, or at the end.
fn replace<T>(items: &mut Vec<T>, item: T, name: impl Fn(&T) -> &String) {
    match items.iter_mut().find(|other| name(other) == name(&item)) {
        Some(other) => *other = item,
        None => items.push(item),
    }
}

/// Limits as they are after a change.
fn merge(
    limits: &mut Option<api_server::machine::RateLimiter>,
    change: api_server::machine::RateLimiter,
) {
    let limits = limits.get_or_insert_default();
    limits.bandwidth = change.bandwidth.or(limits.bandwidth);
    limits.ops = change.ops.or(limits.ops);
}

fn override_paths(description: &mut ConfigFile, load: &SnapshotLoad) -> Result<(), MachineError> {
    for change in &load.network_overrides {
        let id = &change.iface_id;
        let mut interfaces = description.network_interfaces.iter_mut();
        let interface = interfaces
            .find(|interface| interface.iface_id == *id)
            .ok_or_else(|| refused(format!("Load snapshot error: Unknown Network Device: {id}")))?;
        interface.host_dev_name.clone_from(&change.host_dev_name);
        if change.guest_mac.is_some() {
            interface.guest_mac.clone_from(&change.guest_mac);
            interface.check()?;
        }
    }
    for change in &load.drive_overrides {
        let id = &change.drive_id;
        let drive =
            description.drives.iter_mut().find(|drive| drive.drive_id == *id).ok_or_else(|| {
                refused(format!("Load snapshot error: Unknown Block Device: {id}"))
            })?;
        drive.path_on_host = Some(change.path_on_host.clone());
    }
    if let Some(change) = &load.console_override {
        let missing = || MachineError::new("Load snapshot error: Unknown Console.");
        let console = description.console.as_mut().ok_or_else(missing)?;
        console.output_path = Some(change.output_path.clone());
    }
    if let Some(change) = &load.vsock_override {
        let missing = || MachineError::new("Load snapshot error: Unknown Vsock Device.");
        let vsock = description.vsock.as_mut().ok_or_else(missing)?;
        vsock.uds_path.clone_from(&change.uds_path);
    }
    Ok(())
}

impl Machine for Controller {
    fn handle(&mut self, request: MachineRequest) -> Result<MachineAnswer, MachineError> {
        match request {
            MachineRequest::GetInstance => {
                let state = match (&self.running, self.paused) {
                    (None, _) => InstanceState::NotStarted,
                    (Some(_), false) => InstanceState::Running,
                    (Some(_), true) => InstanceState::Paused,
                };
                return Ok(MachineAnswer::Instance(InstanceInfo {
                    id: self.id.clone(),
                    state,
                    vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
                    app_name: "vmrun".to_owned(),
                }));
            }
            MachineRequest::GetVersion => return Ok(MachineAnswer::Version),
            MachineRequest::GetVmConfig => {
                let machine_config = Some(self.machine_config());
                let description = ConfigFile { machine_config, ..self.description.clone() };
                return MachineAnswer::object(&description);
            }
            MachineRequest::GetMachineConfig => {
                return MachineAnswer::object(&self.machine_config());
            }
            MachineRequest::GetBalloon => {
                let balloon = self.description.balloon.as_ref().ok_or_else(no_balloon)?;
                return MachineAnswer::object(balloon);
            }
            MachineRequest::PatchBalloon(update) => {
                self.check_balloon(update.amount_mib)?;
                lock(self.balloon()?).set_target_mib(update.amount_mib);
                if let Some(balloon) = &mut self.description.balloon {
                    balloon.amount_mib = update.amount_mib;
                }
            }
            MachineRequest::GetBalloonStatistics => {
                let missing =
                    || MachineError::new("Statistics for the balloon device are not enabled");
                let statistics = lock(self.balloon()?).statistics().ok_or_else(missing)?;
                return MachineAnswer::object(&statistics);
            }
            MachineRequest::PatchBalloonStatistics(update) => {
                let interval = update.stats_polling_interval_s;
                lock(self.balloon()?).set_stats_interval(interval).map_err(refused)?;
                if let Some(balloon) = &mut self.description.balloon {
                    balloon.stats_polling_interval_s = interval;
                }
            }
            MachineRequest::StartBalloonHinting(start) => {
                lock(self.balloon()?).start_hinting(start.acknowledge_on_stop).map_err(refused)?;
            }
            MachineRequest::StopBalloonHinting => {
                lock(self.balloon()?).stop_hinting().map_err(refused)?;
            }
            MachineRequest::GetBalloonHinting => {
                let missing = || MachineError::new("Free page hinting is not enabled");
                let status = lock(self.balloon()?).hinting_status().ok_or_else(missing)?;
                return MachineAnswer::object(&status);
            }
            MachineRequest::PatchDrive(change) => self.patch_drive(change)?,
            MachineRequest::PatchNetworkInterface(change) => self.patch_interface(change)?,
            MachineRequest::Pause => {
                self.running()?.pause().map_err(refused)?;
                self.paused = true;
            }
            MachineRequest::Resume => {
                self.running()?.resume().map_err(refused)?;
                self.paused = false;
            }
            MachineRequest::CreateSnapshot(create) => {
                // A device that is gone is no part of it.
                self.settle();
                self.create(&create)?;
            }
            MachineRequest::SendCtrlAltDel => {
                lock(&self.running()?.keyboard)
                    .press_ctrl_alt_del()
                    .map_err(|error| refused(format!("SendCtrlAltDel: {error}")))?;
            }
            MachineRequest::PutLogger(config) => {
                let missing = || MachineError::new("There is no log to be configured.");
                let log = self.log.as_mut().ok_or_else(missing)?;
                log.configure(&config).map_err(refused)?;
                self.description.logger = Some(log.config().clone());
            }
            MachineRequest::PutMetrics(config) => {
                if self.is_started() {
                    return Err(MachineError::new(AFTER_START));
                }
                self.metrics.configure(&config).map_err(refused)?;
                self.description.metrics = Some(config);
            }
            MachineRequest::FlushMetrics => {
                self.running()?;
                let counted = self.counted();
                self.metrics.flush(counted, self.log.as_ref()).map_err(refused)?;
            }
            MachineRequest::GetMetrics => {
                let text = self.metrics.text(self.counted(), self.log.as_ref());
                return Ok(MachineAnswer::Text(text));
            }
            MachineRequest::PutMmds(contents) => {
                lock(&*self.metadata()?).put(contents).map_err(refused)?;
            }
            MachineRequest::PatchMmds(patch) => {
                lock(&*self.metadata()?).patch(&patch).map_err(refused)?;
            }
            MachineRequest::GetMmds => {
                return Ok(MachineAnswer::Object(lock(&*self.metadata()?).get()));
            }
            MachineRequest::PatchPmem(_) => not_yet("a rate_limiter of pmem")?,
            MachineRequest::PatchMemoryHotplug(update) => {
                let requested = update.requested_size_mib;
                lock(self.hotplug()?).set_requested_mib(requested).map_err(refused)?;
            }
            MachineRequest::GetMemoryHotplug => {
                return MachineAnswer::object(&lock(self.hotplug()?).status());
            }
            request => self.describe(request)?,
        }
        Ok(MachineAnswer::Done)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use api_server::machine::{Logger, Metrics};
    use serde_json::json;

    use super::*;

    fn controller() -> Controller {
        Controller::new("test".to_owned(), Handed::default(), 1 << 16)
    }

    #[test]
    fn metrics_are_configured_once_and_read_at_any_time() {
        let mut machine = controller();
        let file = tempfile::NamedTempFile::new().unwrap();
        let metrics_path = file.path().to_owned();
        let config = Metrics { metrics_path, emit_id: false, properties: BTreeMap::new() };
        assert!(matches!(machine.handle(MachineRequest::GetMetrics), Ok(MachineAnswer::Text(_))));
        let refused = machine.handle(MachineRequest::FlushMetrics).unwrap_err();
        assert_eq!(refused.message, BEFORE_START);
        let put = MachineRequest::PutMetrics(config.clone());
        assert_eq!(machine.handle(put.clone()), Ok(MachineAnswer::Done));
        assert!(machine.handle(put).is_err());
        assert_eq!(machine.description.metrics, Some(config));
        machine.write_metrics();
        assert_eq!(std::fs::read_to_string(file.path()).unwrap().lines().count(), 1);
    }

    #[test]
    fn a_load_that_fails_leaves_what_was_handed_in_for_the_next() {
        let memory = tempfile::NamedTempFile::new().unwrap();
        let state: MachineState =
            file::decode(include_bytes!("../tests/data/state-v1")).unwrap_or_else(|_| panic!());
        let options = machine::memory_options(&state.description);
        memory.as_file().set_len(options.bytes().unwrap() + options.hotplug).unwrap();
        let tap = tempfile::tempfile().unwrap();
        let taps = [("net".to_owned(), tap.into())].into();
        let handed = Handed { taps, ..Handed::default() };
        let mut machine = Controller::new("test".to_owned(), handed, 1 << 16);
        let load = MachineRequest::LoadSnapshot(
            serde_json::from_value(json!({
                "snapshot_path": concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/state-v1"),
                "mem_file_path": memory.path(),
            }))
            .unwrap(),
        );
        for _ in 0..2 {
            // No TAP is behind the descriptor.
            machine.handle(load.clone()).unwrap_err();
            let kept = machine.handed.taps.get("net").unwrap();
            nix::sys::stat::fstat(kept).unwrap();
        }
    }

    #[test]
    fn without_a_log_there_is_nothing_to_configure() {
        let put = MachineRequest::PutLogger(Logger::default());
        assert!(controller().handle(put).is_err());
    }

    #[test]
    fn a_restored_machine_has_other_files_and_another_address() {
        let mut description: ConfigFile = serde_json::from_value(json!({
            "drives": [{
                "drive_id": "root", "path_on_host": "/old", "is_root_device": false,
            }],
            "network-interfaces": [{
                "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "02:00:00:00:00:01",
            }],
            "console": { "output_path": "/old.log", "serial": false },
        }))
        .unwrap();
        let load = |overrides: serde_json::Value| {
            let mut load = json!({ "snapshot_path": "s", "mem_file_path": "m" });
            for (name, value) in overrides.as_object().unwrap() {
                load[name] = value.clone();
            }
            serde_json::from_value::<SnapshotLoad>(load).unwrap()
        };
        let all = load(json!({
            "drive_overrides": [{ "drive_id": "root", "path_on_host": "/new" }],
            "console_override": { "output_path": "/new.log" },
            "network_overrides": [{
                "iface_id": "eth0", "host_dev_name": "tap1", "guest_mac": "02:00:00:00:00:02",
            }],
        }));
        override_paths(&mut description, &all).unwrap();
        assert_eq!(description.drives[0].path_on_host.as_deref(), Some(Path::new("/new")));
        let console = description.console.as_ref().unwrap();
        assert_eq!(console.output_path.as_deref(), Some(Path::new("/new.log")));
        let mac = &mut description.network_interfaces[0].guest_mac;
        assert_eq!(mac.as_deref(), Some("02:00:00:00:00:02"));

        for (wrong, said) in [
            (json!({ "drive_overrides": [{ "drive_id": "x", "path_on_host": "/" }] }), "x"),
            (
                json!({ "network_overrides": [
                    { "iface_id": "eth0", "host_dev_name": "t", "guest_mac": "no" }
                ] }),
                "MAC",
            ),
        ] {
            let error = override_paths(&mut description, &load(wrong)).unwrap_err();
            assert!(error.message.contains(said), "{error}");
        }
        description.console = None;
        assert!(override_paths(&mut description, &all).is_err());
    }
}
