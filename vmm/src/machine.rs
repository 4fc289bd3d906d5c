//! Putting a machine together, in the order that KVM is quickest with: memory slots before the
//! interrupt controllers, notifications last, and no slot changed after that.

#![allow(unsafe_code, reason = "takes over a descriptor as KVM's")]

mod hotplug;
mod processors;

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use api_server::machine::config_file::ConfigFile;
use api_server::machine::{
    BootSource, CacheType, Drive, IoEngine, MachineConfig, MemoryHotplug, MmdsConfig,
    NetworkInterface,
};
use arch::acpi::{self, GenerationId, Platform};
use arch::boot::{self, LoadedKernel};
use arch::layout;
use devices::GuestMemory;
use devices::bus::Bus;
use devices::host_file::{self, Access};
use devices::legacy::i8042::I8042;
use devices::legacy::power::{AcpiPower, PowerSwitch};
use devices::legacy::serial::SerialPort;
use devices::rate_limiter::RateLimiter;
use devices::virtio::balloon::{Balloon, BalloonOptions};
use devices::virtio::block::{Block, BlockOptions, Disk, Engine};
use devices::virtio::mem::{Mem, MemOptions};
use devices::virtio::net::{Net, NetOptions, Tap};
use devices::virtio::pmem::Pmem;
use devices::virtio::rng::{Rng, RngOptions};
use devices::virtio::vsock::Vsock as VsockDevice;
use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use mmds::Mmds;
use processors::VcpuPlan;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::device_manager::{DeviceManager, Subscriber, VirtioSlot};
use crate::generation::Generation;
use crate::memory::MemoryOptions;
use crate::metadata::Link;
use crate::metrics::Sample;
use crate::pci::Pci;
use crate::pmem::PmemPlaces;
use crate::seccomp::Seccomp;
use crate::slots::HotplugSlots;
use crate::snapshot::memory_file::DirtyPages;
use crate::snapshot::{MachineState, SavedDevice, SavedRegisters, VmState, saved_msrs};
use crate::vcpu::{Buses, HaltSwitch, Vcpu};
use crate::{StartError, cpu_template, generation, limits, memory, output_file, slots, vcpu};

/// Firecracker's command line for a kernel that is given none.
const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux \
    i8042.nomux i8042.dumbkbd swiotlb=noforce";
/// Most bytes that a guest's console writes to a file on the host.
const CONSOLE_LIMIT: u64 = 16 << 20;

/// What comes to a machine from outside its description.
#[derive(Default)]
pub struct Handed {
    /// /dev/kvm, where somebody else opened it.
    pub kvm: Option<OwnedFd>,
    /// TAPs that somebody else opened, by interface.
    pub taps: HashMap<String, OwnedFd>,
    /// Listens where the vsock's path says, where somebody else made it.
    pub vsock: Option<UnixListener>,
    /// Tells how long the guest took to its user space.
    pub boot_timer: Option<Instant>,
    /// The metadata service, where the description puts it on an interface.
    pub metadata: Option<Arc<Mutex<Mmds>>>,
    /// Virtio devices are on a PCI bus; a machine from a snapshot has what that has.
    pub pci: bool,
    /// What the processors' threads may do.
    pub seccomp: Seccomp,
}

impl Handed {
    /// The same once more, on descriptors of its own: what a machine that cannot be made was given is
    /// there for the next one.
    pub fn try_clone(&self) -> std::io::Result<Handed> {
        let taps = self.taps.iter().map(|(id, tap)| Ok((id.clone(), tap.try_clone()?)));
        Ok(Handed {
            kvm: self.kvm.as_ref().map(OwnedFd::try_clone).transpose()?,
            taps: taps.collect::<std::io::Result<_>>()?,
            vsock: self.vsock.as_ref().map(UnixListener::try_clone).transpose()?,
            boot_timer: self.boot_timer,
            metadata: self.metadata.clone(),
            pci: self.pci,
            seccomp: self.seccomp.clone(),
        })
    }
}

/// A machine whose processors run, or stand still.
pub struct Running {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    vcpus: Vec<Vcpu>,
    slots: Vec<VirtioSlot>,
    pio: Arc<Bus>,
    pci: Option<Pci>,
    pmem: PmemPlaces,
    /// What the API may change later.
    pub devices: Devices,
    /// To be served by the event loop.
    pub subscribers: Vec<Subscriber>,
    /// Not to be served by the event loop any more.
    pub unplugged: Vec<Subscriber>,
    /// What the guest let go of, by device type and name.
    pub ejected: Vec<(u32, String)>,
    /// The guest's ways to end.
    pub power: Arc<PowerSwitch>,
    /// The processors' ways to end.
    pub halt: Arc<HaltSwitch>,
    /// The serial port, for its input.
    pub serial: Option<Arc<Mutex<SerialPort>>>,
    /// The keyboard.
    pub keyboard: Arc<Mutex<I8042>>,
    /// Whether KVM records which pages the guest writes.
    tracks_dirty_pages: bool,
    /// Tells another process of faults in guest memory, as long as there is any.
    _faults: Option<OwnedFd>,
}

/// Devices that the API may change while the guest runs, by their ids.
#[derive(Default)]
pub struct Devices {
    /// Drives.
    pub drives: HashMap<String, Arc<Mutex<Block>>>,
    /// Network interfaces.
    pub interfaces: HashMap<String, Arc<Mutex<Net>>>,
    /// The balloon.
    pub balloon: Option<Arc<Mutex<Balloon>>>,
    /// Memory that can be plugged in.
    pub hotplug: Option<Arc<Mutex<Mem>>>,
    hotplug_slots: Option<HotplugSlots>,
    vsock: Option<Arc<Mutex<VsockDevice>>>,
}

/// The memory that a machine of this description has.
pub fn memory_options(description: &ConfigFile) -> MemoryOptions {
    let config = description.machine_config.clone().unwrap_or_default();
    let hotplug = description.memory_hotplug.as_ref();
    MemoryOptions {
        mib: config.mem_size_mib,
        pages: config.huge_pages,
        hotplug: hotplug.map_or(0, |hotplug| u64::from(hotplug.total_size_mib) << 20),
        track_dirty_pages: config.track_dirty_pages,
    }
}

/// How the memory that can be plugged in is divided.
pub fn hotplug_options(config: &MemoryHotplug) -> MemOptions {
    MemOptions {
        total_size_mib: config.total_size_mib,
        slot_size_mib: config.slot_size_mib,
        block_size_mib: config.block_size_mib,
    }
}

/// Makes the machine and lets it run.
pub fn boot(description: &ConfigFile, handed: Handed) -> Result<Running, StartError> {
    let source = description.boot_source.as_ref().ok_or(StartError::NoBootSource)?;
    let config = description.machine_config.clone().unwrap_or_default();
    let options = memory_options(description);
    let memory = memory::create(&options)?;
    let parts = Parts::assemble(description, &memory, handed, None)?;
    // The kernel finds the rest when it is plugged in.
    let ram = memory::ram(&memory, &options)?;
    generation::write(&ram)?;
    let keyboard = description.console.as_ref().is_none_or(|console| console.keyboard);
    let kernel = load(&ram, source, &config, &parts, keyboard)?;
    let supported = parts
        .kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(StartError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let template = description.cpu_config.clone().unwrap_or_default();
    cpu_template::check_capabilities(&parts.kvm, &template)?;
    let vcpus = (0..config.vcpu_count)
        .map(|id| {
            let plan = VcpuPlan { id, config: &config, template: &template };
            processors::make(&parts.vm, &plan, &supported, &kernel.entry, &memory)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let running = parts.finish(memory, vcpus, config.track_dirty_pages)?;
    running.resume()?;
    Ok(running)
}

/// Makes the machine that a state and its memory describe; it stands still. Connections over vsock
/// are gone, and the guest is told.
pub fn restore(
    state: &MachineState,
    memory: GuestMemory,
    faults: Option<OwnedFd>,
    handed: Handed,
    realtime: bool,
) -> Result<Running, StartError> {
    let damaged = |reason: &str| StartError::Device {
        device: "snapshot".to_owned(),
        reason: reason.to_owned(),
    };
    let config = state.description.machine_config.clone().unwrap_or_default();
    if state.vcpus.len() != usize::from(config.vcpu_count) {
        return Err(damaged("its number of processors is not that of its description"));
    }
    let parts = Parts::assemble(&state.description, &memory, handed, Some(state))?;
    let supported = parts
        .kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(StartError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let template = state.description.cpu_config.clone().unwrap_or_default();
    state.vm.restore_irqchips(&parts.vm)?;
    let vcpus = (0..)
        .zip(&state.vcpus)
        .map(|(id, state)| {
            let plan = VcpuPlan { id, config: &config, template: &template };
            state.check(&plan.leaves(&supported)?)?;
            let vcpu =
                parts.vm.create_vcpu(id.into()).map_err(StartError::kvm("KVM_CREATE_VCPU"))?;
            state.restore(&vcpu)?;
            Ok(vcpu)
        })
        .collect::<Result<Vec<_>, StartError>>()?;
    if state.devices.len() != parts.manager.slots.len() {
        return Err(damaged("its devices are not those of its description"));
    }
    for slot in &parts.manager.slots {
        let device_type = slot.device_type();
        let same =
            |saved: &&SavedDevice| (saved.device_type, &saved.name) == (device_type, &slot.name);
        let saved = state.devices.iter().find(same);
        let saved = saved.ok_or_else(|| damaged("its devices are not those of its description"))?;
        slot.restore(saved, parts.manager.pci.as_ref())?;
    }
    if let (Some(pci), Some(state)) = (&parts.manager.pci, &state.pci) {
        pci.restore(state);
    }
    if let Some(vsock) = &parts.devices.vsock {
        lock(vsock).transport_reset();
    }
    parts.generation.renew(&memory)?;
    let tracks = memory.iter().any(|region| memory::written(region).is_tracking());
    let mut running = parts.finish(memory, vcpus, tracks)?;
    running._faults = faults;
    // Last: the guest's time goes on from here.
    state.vm.restore_clock(&running.vm, realtime)?;
    Ok(running)
}

/// A poisoned lock means a bug in another thread; the device still answers.
pub fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Running {
    /// Lets processors run.
    pub fn resume(&self) -> Result<(), StartError> {
        vcpu::run_all(&self.vcpus)
    }

    /// Has processors stand still.
    pub fn pause(&self) -> Result<(), StartError> {
        vcpu::pause_all(&self.vcpus)
    }

    /// The state of a machine that stands still.
    pub fn save(&self, description: &ConfigFile) -> Result<MachineState, StartError> {
        // First: it interrupts processors and writes memory.
        self.slots.iter().for_each(|slot| lock(&slot.device).drain());
        let vcpus = vcpu::save_all(&self.vcpus)?;
        Ok(MachineState {
            description: description.clone(),
            vcpus,
            vm: VmState::save(&self.vm)?,
            devices: self.slots.iter().map(VirtioSlot::save).collect(),
            pci: self.pci.as_ref().map(Pci::save),
            pmem: self.pmem.save(),
            serial: self.serial.as_ref().map(|serial| lock(serial).save()),
            keyboard: Some(lock(&self.keyboard).save()),
        })
    }

    /// What devices and processors have counted. Reading changes nothing.
    pub fn metrics(&self) -> Vec<Sample> {
        let devices = self.slots.iter().filter_map(|slot| {
            let readings = lock(&slot.device).metrics()?;
            // The others are named by what they are, of which there is one.
            let several = matches!(readings.group, "block" | "net" | "pmem");
            Some(Sample { name: several.then(|| slot.name.clone()), readings })
        });
        let vcpus = (0..).zip(&self.vcpus).map(|(id, vcpu): (u8, _)| Sample {
            name: Some(id.to_string()),
            readings: vcpu.metrics(),
        });
        devices.chain(vcpus).chain(self.pio.metrics().map(Sample::from)).collect()
    }

    /// Leaves no file behind. The processors' threads hold the devices until the process ends.
    pub fn clear_up(&self) {
        if let Some(vsock) = &self.devices.vsock {
            lock(vsock).remove_socket();
        }
    }

    /// The machine's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The pages written since this was last asked, by the guest or for it; none where nobody keeps
    /// a record.
    pub fn take_dirty_pages(&self) -> Result<Option<DirtyPages>, StartError> {
        if !self.tracks_dirty_pages {
            return Ok(None);
        }
        let mut all = Vec::new();
        for (slot, region) in (0..).zip(self.memory.iter()) {
            let hotplug = self.devices.hotplug_slots.as_ref();
            let mut pages = match hotplug.filter(|slots| slots.start() == region.start_addr()) {
                Some(slots) => slots.take_dirty_pages()?,
                None => self
                    .vm
                    .get_dirty_log(slot, region.len() as usize)
                    .map_err(StartError::kvm("KVM_GET_DIRTY_LOG"))?,
            };
            for (page, own) in pages.iter_mut().zip(memory::written(region).take()) {
                *page |= own;
            }
            all.push(pages);
        }
        Ok(Some(all))
    }
}

/// A machine before it has processors.
struct Parts {
    kvm: Kvm,
    vm: Arc<VmFd>,
    manager: DeviceManager,
    devices: Devices,
    pmem: PmemPlaces,
    root: Option<RootDevice>,
    serial: Option<Arc<Mutex<SerialPort>>>,
    keyboard: Arc<Mutex<I8042>>,
    power: Arc<PowerSwitch>,
    halt: Arc<HaltSwitch>,
    generation: Generation,
    seccomp: Seccomp,
}

impl Parts {
    fn assemble(
        description: &ConfigFile,
        memory: &GuestMemory,
        mut handed: Handed,
        saved: Option<&MachineState>,
    ) -> Result<Parts, StartError> {
        let kvm = open_kvm(handed.kvm.take())?;
        let vm = kvm.create_vm().map_err(StartError::kvm("KVM_CREATE_VM"))?;
        let vm = Arc::new(vm);
        slots::set_ram(&vm, &memory::ram(memory, &memory_options(description))?)?;
        let (mut pmem, files) = pmem(&vm, description, saved)?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(StartError::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(layout::KVM_TSS as usize)
            .map_err(StartError::kvm("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(StartError::kvm("KVM_CREATE_IRQCHIP"))?;
        let power = PowerSwitch::new().map_err(StartError::host("eventfd"))?;
        let halt = HaltSwitch::new().map_err(StartError::host("eventfd"))?;
        let mut manager = DeviceManager::default();
        let keyboard = add_power_and_keyboard(&mut manager, &power, saved)?;
        let serial = add_serial(&mut manager, description, saved)?;
        if let Some(since) = handed.boot_timer {
            manager.add_mmio(layout::BOOT_TIMER, 1, BootTimer(Some(since)))?;
        }
        let mut devices = Devices::default();
        if match saved {
            Some(saved) => saved.pci.is_some(),
            None => handed.pci,
        } {
            let memory_64 = match saved.and_then(|saved| saved.pci.as_ref()) {
                Some(state) => state.memory_64,
                None => layout::pci_memory_64(pmem.end()),
            };
            pmem.set_limit(memory_64);
            manager.pci = Some(Pci::new(&vm, memory_64, &mut manager)?);
            manager.pci_slots = saved.map(pci_slots).unwrap_or_default();
        }
        let root = add_virtio(&mut manager, &mut devices, memory, description, &mut handed)?;
        add_hotplug_memory(&mut manager, &mut devices, memory, description, &vm)?;
        let root = add_pmem(&mut manager, memory, description, files, &pmem)?.or(root);
        let generation = Generation::new(&mut manager)?;
        Ok(Parts {
            kvm,
            vm,
            manager,
            devices,
            pmem,
            root,
            serial,
            keyboard,
            power,
            halt,
            generation,
            seccomp: handed.seccomp,
        })
    }

    /// Gives each processor a thread, on which it stands still.
    fn finish(
        mut self,
        memory: GuestMemory,
        vcpus: Vec<VcpuFd>,
        tracks_dirty_pages: bool,
    ) -> Result<Running, StartError> {
        self.manager.connect(&self.vm)?;
        let saved_msrs: Arc<[u32]> = saved_msrs(&self.kvm)?.into();
        vcpu::prepare_signals()?;
        let manager = self.manager;
        let buses = Buses { pio: Arc::new(manager.pio), mmio: Arc::new(manager.mmio) };
        let pio = buses.pio.clone();
        let vcpus = (0..)
            .zip(vcpus)
            .map(|(id, fd)| {
                let (memory, buses) = (memory.clone(), buses.clone());
                let (halt, saved_msrs) = (self.halt.clone(), saved_msrs.clone());
                Vcpu::spawn(id, fd, memory, buses, halt, saved_msrs, &self.seccomp)
            })
            .collect::<Result<_, _>>()?;
        Ok(Running {
            vm: self.vm,
            memory,
            vcpus,
            slots: manager.slots,
            pio,
            pci: manager.pci,
            pmem: self.pmem,
            devices: self.devices,
            subscribers: manager.subscribers,
            unplugged: Vec::new(),
            ejected: Vec::new(),
            power: self.power,
            halt: self.halt,
            serial: self.serial,
            keyboard: self.keyboard,
            tracks_dirty_pages,
            _faults: None,
        })
    }
}

fn open_kvm(handed: Option<OwnedFd>) -> Result<Kvm, StartError> {
    let kvm = match handed {
        // SAFETY: the descriptor is ours, and is given away here; whether it is KVM's the next call
        // tells.
        Some(descriptor) => unsafe { Kvm::from_raw_fd(descriptor.into_raw_fd()) },
        None => Kvm::new().map_err(StartError::OpenKvm)?,
    };
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(StartError::KvmVersion);
    }
    Ok(kvm)
}

fn add_power_and_keyboard(
    manager: &mut DeviceManager,
    power: &Arc<PowerSwitch>,
    saved: Option<&MachineState>,
) -> Result<Arc<Mutex<I8042>>, StartError> {
    let acpi = AcpiPower::new(power.clone(), acpi::SLEEP_TYPE_OFF, acpi::RESET_VALUE);
    manager.add_pio(layout::POWER_PORT, 3, Arc::new(Mutex::new(acpi)))?;
    let failed = || StartError::device::<std::io::Error>("keyboard controller");
    let mut keyboard = I8042::new(power.clone()).map_err(failed())?;
    if let Some(state) = saved.and_then(|saved| saved.keyboard.as_ref()) {
        keyboard.restore(state).map_err(StartError::device("keyboard controller"))?;
    }
    let interrupt = keyboard.interrupt_event().try_clone().map_err(failed())?;
    manager.add_interrupt(interrupt, layout::KEYBOARD_GSI);
    let keyboard = Arc::new(Mutex::new(keyboard));
    manager.add_pio(layout::I8042_PORT, 5, keyboard.clone())?;
    Ok(keyboard)
}

fn add_serial(
    manager: &mut DeviceManager,
    description: &ConfigFile,
    saved: Option<&MachineState>,
) -> Result<Option<Arc<Mutex<SerialPort>>>, StartError> {
    if !description.console.as_ref().is_none_or(|console| console.serial) {
        return Ok(None);
    }
    let failed = StartError::device::<std::io::Error>;
    let config = description.serial.clone().unwrap_or_default();
    let output: Box<dyn Write + Send> = match &config.serial_out_path {
        Some(path) => {
            Box::new(output_file::open(path).map_err(StartError::open("serial output", path))?)
        }
        None => Box::new(std::io::stdout()),
    };
    let limiter = limits::byte_limiter(config.rate_limiter.as_ref()).map_err(failed("serial"))?;
    let output = SerialOutput { output, limiter };
    let serial = match saved.and_then(|saved| saved.serial.as_ref()) {
        Some(state) => SerialPort::restore(output, state),
        None => SerialPort::new(output),
    };
    let serial = serial.map_err(failed("serial port"))?;
    let interrupt = serial.interrupt_event().try_clone();
    manager.add_interrupt(interrupt.map_err(failed("serial port"))?, layout::SERIAL_GSI);
    let serial = Arc::new(Mutex::new(serial));
    manager.add_pio(layout::SERIAL_PORT, 8, serial.clone())?;
    Ok(Some(serial))
}

/// What the command line says of the root device.
struct RootDevice {
    name: String,
    read_only: bool,
}

fn add_virtio(
    manager: &mut DeviceManager,
    devices: &mut Devices,
    memory: &GuestMemory,
    description: &ConfigFile,
    handed: &mut Handed,
) -> Result<Option<RootDevice>, StartError> {
    check_sharing(&description.drives)?;
    let mut root = None;
    // The guest names drives in the order in which it finds them; the root device is /dev/vda.
    let (roots, others): (Vec<_>, Vec<_>) =
        description.drives.iter().partition(|drive| drive.is_root_device);
    for drive in roots.into_iter().chain(others) {
        let id = &drive.drive_id;
        let block = make_block(drive)?;
        devices.drives.insert(id.clone(), manager.add_virtio(memory, id, block)?);
        if drive.is_root_device {
            let partition = drive.partuuid.as_ref().map(|id| format!("PARTUUID={id}"));
            let name = partition.unwrap_or_else(|| "/dev/vda".to_owned());
            root = Some(RootDevice { name, read_only: drive.is_read_only });
        }
    }
    for interface in &description.network_interfaces {
        let id = &interface.iface_id;
        let metadata = description.mmds_config.as_ref().zip(handed.metadata.as_ref());
        let net = make_net(interface, handed.taps.remove(id), metadata)?;
        devices.interfaces.insert(id.clone(), manager.add_virtio(memory, id, net)?);
    }
    if let Some(vsock) = &description.vsock {
        let name = format!("vsock: {}", vsock.uds_path.display());
        let vsock = match handed.vsock.take() {
            Some(listener) => VsockDevice::listening(vsock.guest_cid, &vsock.uds_path, listener),
            None => VsockDevice::new(vsock.guest_cid, &vsock.uds_path),
        };
        let vsock = vsock.map_err(StartError::device(name))?;
        devices.vsock = Some(manager.add_virtio(memory, "vsock", vsock)?);
    }
    if let Some(balloon) = &description.balloon {
        let options = BalloonOptions {
            amount_mib: balloon.amount_mib,
            deflate_on_oom: balloon.deflate_on_oom,
            stats_polling_interval_s: balloon.stats_polling_interval_s,
            free_page_hinting: balloon.free_page_hinting,
            free_page_reporting: balloon.free_page_reporting,
        };
        let balloon = Balloon::new(options).map_err(StartError::device("balloon"))?;
        devices.balloon = Some(manager.add_virtio(memory, "balloon", balloon)?);
    }
    if let Some(entropy) = &description.entropy {
        let failed = StartError::device::<std::io::Error>;
        let rate_limiter =
            limits::limiter(entropy.rate_limiter.as_ref()).map_err(failed("entropy"))?;
        let rng = Rng::new(RngOptions { rate_limiter }).map_err(failed("entropy"))?;
        manager.add_virtio(memory, "entropy", rng)?;
    }
    if let Some(path) =
        description.console.as_ref().and_then(|console| console.output_path.as_ref())
    {
        let output = output_file::open(path).map_err(StartError::open("console output", path))?;
        let console = devices::virtio::console::Console::new(Box::new(output), CONSOLE_LIMIT)
            .map_err(StartError::device("console"))?;
        manager.add_virtio(memory, "console", console)?;
    }
    Ok(root)
}

fn make_block(drive: &Drive) -> Result<Block, StartError> {
    let id = &drive.drive_id;
    let path = drive.check().map_err(StartError::device(format!("drive {id}")))?;
    let disk = Disk::open(path, drive.is_read_only)
        .map_err(|error| StartError::Drive { id: id.clone(), error })?;
    let rate_limiter =
        limits::limiter(drive.rate_limiter.as_ref()).map_err(StartError::device(id))?;
    let flush = drive.cache_type == CacheType::Writeback;
    let engine = match drive.io_engine {
        IoEngine::Sync => Engine::Sync,
        IoEngine::Async => Engine::Async,
    };
    let options = BlockOptions { id: id.clone(), flush, rate_limiter, engine };
    Block::new(options, disk).map_err(StartError::device(id))
}

/// An interface over its TAP or one that somebody else opened, with the metadata service where its
/// configuration names the interface.
fn make_net(
    interface: &NetworkInterface,
    tap: Option<OwnedFd>,
    metadata: Option<(&MmdsConfig, &Arc<Mutex<Mmds>>)>,
) -> Result<Net, StartError> {
    let id = &interface.iface_id;
    let failed = || StartError::device::<std::io::Error>(format!("interface {id}"));
    let mac = interface.check().map_err(StartError::device(format!("interface {id}")))?;
    let tap = match tap {
        Some(descriptor) => Tap::from_descriptor(descriptor),
        None => Tap::open(&interface.host_dev_name),
    };
    let name = format!("interface {id}: TAP {}", interface.host_dev_name);
    let tap = tap.map_err(StartError::device::<std::io::Error>(name))?;
    let options = NetOptions {
        id: id.clone(),
        mac,
        mtu: interface.mtu,
        rx_rate_limiter: limits::limiter(interface.rx_rate_limiter.as_ref()).map_err(failed())?,
        tx_rate_limiter: limits::limiter(interface.tx_rate_limiter.as_ref()).map_err(failed())?,
    };
    let mut net = Net::new(options, tap).map_err(failed())?;
    if let Some((config, service)) = metadata
        && config.network_interfaces.contains(id)
    {
        let link = Link::new(config, service.clone())?;
        net.set_responder(Box::new(link)).map_err(failed())?;
    }
    Ok(net)
}

/// Memory that can be plugged in.
fn add_hotplug_memory(
    manager: &mut DeviceManager,
    devices: &mut Devices,
    memory: &GuestMemory,
    description: &ConfigFile,
    vm: &Arc<VmFd>,
) -> Result<(), StartError> {
    let start = arch::memory::above(memory_options(description).bytes()?);
    if let Some(config) = &description.memory_hotplug {
        let options = hotplug_options(config);
        let slots = HotplugSlots::new(vm.clone(), memory.clone(), start, options.clone());
        let device = Mem::new(options, start, Box::new(slots.clone()))
            .map_err(StartError::device("hotplug/memory"))?;
        devices.hotplug = Some(manager.add_virtio(memory, "memory", device)?);
        devices.hotplug_slots = Some(slots);
    }
    Ok(())
}

/// Files as persistent memory, which the guest's address space is arranged around.
fn pmem(
    vm: &Arc<VmFd>,
    description: &ConfigFile,
    saved: Option<&MachineState>,
) -> Result<(PmemPlaces, Vec<Pmem>), StartError> {
    let options = memory_options(description);
    let end = GuestAddress(arch::memory::above(options.bytes()?).0 + options.hotplug);
    let mut places = PmemPlaces::new(vm.clone(), end);
    let saved = saved.map_or(&[][..], |saved| &saved.pmem);
    let files = description.pmem.iter().map(|config| places.add(config, saved));
    let files = files.collect::<Result<_, _>>()?;
    Ok((places, files))
}

fn add_pmem(
    manager: &mut DeviceManager,
    memory: &GuestMemory,
    description: &ConfigFile,
    files: Vec<Pmem>,
    places: &PmemPlaces,
) -> Result<Option<RootDevice>, StartError> {
    let mut root = None;
    for (config, device) in description.pmem.iter().zip(files) {
        manager.add_virtio(memory, &config.id, device)?;
        if let Some(number) = places.number(&config.id).filter(|_| config.root_device) {
            let name = format!("/dev/pmem{number}");
            root = Some(RootDevice { name, read_only: config.read_only });
        }
    }
    Ok(root)
}

/// In which slot each device was.
fn pci_slots(saved: &MachineState) -> HashMap<(u32, String), u8> {
    let place = |device: &SavedDevice| match device.registers {
        SavedRegisters::Mmio(_) => None,
        SavedRegisters::Pci { slot, .. } => Some(((device.device_type, device.name.clone()), slot)),
    };
    saved.devices.iter().filter_map(place).collect()
}

/// Refuses one file behind two drives unless both only read it: two writers, or a writer behind the
/// back of a reader's cache, ruin a file system.
pub(crate) fn check_sharing(drives: &[Drive]) -> Result<(), StartError> {
    let mut seen: Vec<(u64, u64, &Drive)> = Vec::new();
    for drive in drives {
        // What cannot be looked at cannot be opened either, and is refused then.
        let path = drive.path_on_host.as_ref();
        let Some(file) = path.and_then(|path| host_file::metadata(path).ok()) else { continue };
        let same = |other: &&(u64, u64, &Drive)| (other.0, other.1) == (file.dev(), file.ino());
        if let Some((_, _, other)) = seen.iter().find(same)
            && !(drive.is_read_only && other.is_read_only)
        {
            let failed = StartError::device(format!("drive {}", drive.drive_id));
            return Err(failed(format!("drive {} uses the same file", other.drive_id)));
        }
        seen.push((file.dev(), file.ino(), drive));
    }
    Ok(())
}

fn open(what: &'static str, path: &Path) -> Result<File, StartError> {
    let failed = || StartError::open(what, path);
    let file =
        host_file::open_with(path, Access::Read, File::options().read(true)).map_err(failed())?;
    if !file.metadata().map_err(failed())?.is_file() {
        return Err(failed()(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            "not a regular file",
        )));
    }
    Ok(file)
}

fn load(
    memory: &GuestMemory,
    source: &BootSource,
    config: &MachineConfig,
    parts: &Parts,
    keyboard: bool,
) -> Result<LoadedKernel, StartError> {
    let path = &source.kernel_image_path;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| StartError::Boot { path, error }
    };
    let mut image = open("kernel", path)?;
    let kernel = boot::load_kernel(memory, &mut image).map_err(failed(path))?;
    let initramfs = match &source.initrd_path {
        Some(path) => {
            let mut image = open("initramfs", path)?;
            Some(boot::load_initramfs(memory, &kernel, &mut image).map_err(failed(path))?)
        }
        None => None,
    };
    let mut command_line = source.boot_args.clone().unwrap_or_else(|| DEFAULT_BOOT_ARGS.to_owned());
    if let Some(root) = &parts.root {
        let mode = if root.read_only { "ro" } else { "rw" };
        command_line += &format!(" root={} {mode}", root.name);
    }
    let platform = Platform {
        vcpus: config.vcpu_count,
        virtio: parts.manager.virtio.clone(),
        serial: parts.serial.is_some(),
        keyboard,
        generation_id: Some(GenerationId {
            address: layout::GENERATION_ID,
            gsi: layout::GENERATION_GSI,
        }),
        pci: parts.manager.pci.as_ref().map(Pci::host),
    };
    let rsdp = acpi::write(memory, &platform)?;
    boot::write_parameters(memory, &kernel, initramfs, &command_line, rsdp)
        .map_err(failed(path))?;
    Ok(kernel)
}

/// Where the serial port writes; above its limit bytes are dropped.
struct SerialOutput {
    output: Box<dyn Write + Send>,
    limiter: RateLimiter,
}

impl Write for SerialOutput {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.limiter.is_blocked() {
            // Nobody waits for the limiter: what comes while it blocks is gone.
            self.limiter.timer_fired();
        }
        if self.limiter.allows(bytes.len() as u64, 0) {
            self.output.write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.output.flush()
    }
}

/// Firecracker's boot timer: a guest's init writes a byte, the log tells the time. Once: a guest must
/// not fill the log.
struct BootTimer(Option<std::time::Instant>);

impl devices::bus::BusDevice for BootTimer {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        const MAGIC: u8 = 123;
        if data == [MAGIC]
            && let Some(since) = self.0.take()
        {
            tracing::info!("Guest-boot-time = {} us", since.elapsed().as_micros());
        }
    }
}
