//! Answers requests: collects what the machine is made of, starts it, and changes it while it runs.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use api_server::machine::config_file::ConfigFile;
use api_server::machine::{
    BackendType, HugePages, InstanceInfo, InstanceState, Machine, MachineAnswer, MachineConfig,
    MachineError, MachineRequest, PartialDrive, PartialNetworkInterface, RestoredPages,
    SnapshotCreate, SnapshotLoad, SnapshotType,
};
use devices::virtio::balloon::Balloon;
use devices::virtio::block::Disk;
use std::sync::{Arc, Mutex};

use crate::machine::{self, Handed, Running, lock};
use crate::memory::{self, MemoryOptions};
use crate::snapshot::{MachineState, file, memory_file, userfault};
use crate::{limits, logger};

/// One machine, before and after its start.
pub struct Controller {
    id: String,
    description: ConfigFile,
    handed: Handed,
    running: Option<Running>,
    paused: bool,
    /// The event loop has not taken up the machine yet.
    fresh: bool,
}

/// Any error of ours as a refusal.
fn refused(error: impl ToString) -> MachineError {
    MachineError::new(&error.to_string())
}

const AFTER_START: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE_START: &str = "The requested operation is not supported before starting the microVM.";

impl Controller {
    /// A machine of this name that nothing is known of yet.
    pub fn new(id: String, handed: Handed) -> Controller {
        Controller {
            id,
            description: ConfigFile::default(),
            handed,
            running: None,
            paused: false,
            fresh: false,
        }
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
        let missing = || MachineError::new("Balloon device not configured.");
        self.running()?.devices.balloon.as_ref().ok_or_else(missing)
    }

    fn machine_config(&self) -> MachineConfig {
        self.description.machine_config.clone().unwrap_or_default()
    }

    /// Describes the machine; refused once it is there.
    fn describe(&mut self, request: MachineRequest) -> Result<(), MachineError> {
        if self.running.is_some() {
            return Err(MachineError::new(AFTER_START));
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
                if drive.is_root_device && others.any(|other| other.is_root_device) {
                    return Err(MachineError::new("A root block device already exists!"));
                }
                replace(&mut description.drives, drive, |drive| &drive.drive_id);
            }
            MachineRequest::PutNetworkInterface(interface) => {
                interface.check()?;
                let others = description.network_interfaces.iter();
                let mut others = others.filter(|other| other.iface_id != interface.iface_id);
                if let Some(mac) = &interface.guest_mac
                    && others.any(|other| other.guest_mac.as_ref() == Some(mac))
                {
                    return Err(refused(format!("The MAC address is already in use: {mac}")));
                }
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
                let handed = std::mem::take(&mut self.handed);
                let running = machine::boot(&self.description, handed).map_err(refused)?;
                self.started(running, false);
            }
            MachineRequest::LoadSnapshot(load) => self.load(&load)?,
            MachineRequest::PutPmem(_) => return not_yet("pmem"),
            MachineRequest::PutMemoryHotplug(_) => return not_yet("hotplug/memory"),
            MachineRequest::PutMmdsConfig(_) => return not_yet("mmds/config"),
            other => return Err(refused(format!("not a description: {other:?}"))),
        }
        Ok(())
    }

    fn started(&mut self, running: Running, paused: bool) {
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
        let drive = drives.iter_mut().find(|drive| drive.drive_id == *id).ok_or_else(missing)?;
        let mut device = lock(&device);
        if let Some(path) = change.path_on_host {
            let disk = Disk::open(&path, drive.is_read_only)
                .map_err(|error| refused(format!("drive {id}: {error}")))?;
            device.replace_disk(disk);
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
        let options = MemoryOptions {
            mib: config.mem_size_mib,
            pages: config.huge_pages,
            track_dirty_pages: config.track_dirty_pages,
        };
        if options.pages == HugePages::Explicit {
            return Err(failed(&"2M pages cannot be restored yet; use None or Transparent"));
        }
        let path = &backend.backend_path;
        let (memory, faults) = match backend.backend_type {
            BackendType::File => {
                let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
                let file = File::options()
                    .read(true)
                    .custom_flags(flags)
                    .open(path)
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
        let handed = std::mem::take(&mut self.handed);
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

/// Refuses a file that is not there, before it is needed.
fn readable(path: &Path) -> Result<(), MachineError> {
    match path.metadata() {
        Ok(_) => Ok(()),
        Err(error) => Err(refused(format!("{}: {error}", path.display()))),
    }
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
                let missing = || MachineError::new("Balloon device not configured.");
                return MachineAnswer::object(
                    self.description.balloon.as_ref().ok_or_else(missing)?,
                );
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
            MachineRequest::CreateSnapshot(create) => self.create(&create)?,
            MachineRequest::SendCtrlAltDel => {
                self.running()?;
                return Err(MachineError::new(
                    "SendCtrlAltDel: the machine has no keyboard; ask a program in the guest",
                ));
            }
            MachineRequest::PutLogger(config) => {
                logger::init(&config).map_err(refused)?;
                self.description.logger = Some(config);
            }
            MachineRequest::PutMetrics(_) | MachineRequest::FlushMetrics => {
                not_yet("metrics")?;
            }
            MachineRequest::PutMmds(_) | MachineRequest::PatchMmds(_) | MachineRequest::GetMmds => {
                not_yet("mmds")?;
            }
            MachineRequest::PatchPmem(_) => not_yet("pmem")?,
            MachineRequest::PatchMemoryHotplug(_) | MachineRequest::GetMemoryHotplug => {
                not_yet("hotplug/memory")?;
            }
            request => self.describe(request)?,
        }
        Ok(MachineAnswer::Done)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
