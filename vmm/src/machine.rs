//! Putting a machine together, in the order that KVM is quickest with: memory slots before the
//! interrupt controllers, notifications last, and no slot changed after that.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Barrier, Mutex};

use api_server::machine::{
    BootSource, CacheType, Console, Drive, Entropy, MachineConfig, NetworkInterface, Vsock,
};
use arch::acpi::{self, Platform};
use arch::boot::{self, Entry, LoadedKernel};
use arch::cpuid::{self, Topology};
use arch::{layout, registers};
use devices::GuestMemory;
use devices::legacy::power::{AcpiPower, I8042, PowerSwitch};
use devices::legacy::serial::SerialPort;
use devices::virtio::block::{Block, BlockOptions, Disk};
use devices::virtio::net::{Net, NetOptions, Tap};
use devices::virtio::rng::{Rng, RngOptions};
use devices::virtio::vsock::Vsock as VsockDevice;
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::device_manager::{DeviceManager, Subscriber};
use crate::vcpu::{Buses, HaltSwitch};
use crate::{StartError, memory, vcpu};

/// Firecracker's command line for a kernel that is given none.
const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux \
    i8042.nomux i8042.dumbkbd swiotlb=noforce";
/// Most bytes that a guest's console writes to a file on the host.
const CONSOLE_LIMIT: u64 = 16 << 20;

/// All that a machine is made of.
#[derive(Default)]
pub struct Plan {
    /// Processors and memory.
    pub machine: MachineConfig,
    /// What to boot.
    pub boot_source: Option<BootSource>,
    /// Block devices.
    pub drives: Vec<Drive>,
    /// Network interfaces, each with its TAP where that was handed in.
    pub interfaces: Vec<(NetworkInterface, Option<OwnedFd>)>,
    /// The vsock device.
    pub vsock: Option<Vsock>,
    /// The entropy device.
    pub entropy: Option<Entropy>,
    /// The guest's consoles.
    pub console: Console,
    /// Tells how long the guest took to its user space.
    pub boot_timer: Option<std::time::Instant>,
}

/// A machine whose processors run.
pub struct Running {
    /// Kept open as long as the machine is wanted.
    _vm: VmFd,
    /// To be served by the event loop.
    pub subscribers: Vec<Subscriber>,
    /// The guest's ways to end.
    pub power: Arc<PowerSwitch>,
    /// The processors' ways to end.
    pub halt: Arc<HaltSwitch>,
    /// The serial port, for its input.
    pub serial: Option<Arc<Mutex<SerialPort>>>,
}

/// Makes the machine and lets it run.
pub fn start(mut plan: Plan) -> Result<Running, StartError> {
    let source = plan.boot_source.take().ok_or(StartError::NoBootSource)?;
    let kvm = open_kvm()?;
    let vm = kvm.create_vm().map_err(StartError::kvm("KVM_CREATE_VM"))?;
    let memory = memory::create(plan.machine.mem_size_mib)?;
    set_memory_slots(&vm, &memory)?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(StartError::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(StartError::kvm("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(StartError::kvm("KVM_CREATE_IRQCHIP"))?;

    let power = PowerSwitch::new().map_err(StartError::host("eventfd"))?;
    let halt = HaltSwitch::new().map_err(StartError::host("eventfd"))?;
    let mut manager = DeviceManager::default();
    let serial = add_legacy(&mut manager, &plan.console, &power)?;
    if let Some(since) = plan.boot_timer {
        manager.add_mmio(layout::BOOT_TIMER, 1, BootTimer(Some(since)))?;
    }
    let root = add_virtio(&mut manager, &memory, &mut plan)?;

    let kernel = load(&memory, &source, &plan, root, &manager, serial.is_some())?;
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(StartError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let vcpus = (0..plan.machine.vcpu_count)
        .map(|id| make_vcpu(&vm, id, &plan.machine, &supported, &memory, &kernel.entry))
        .collect::<Result<Vec<_>, _>>()?;
    manager.connect(&vm)?;

    let buses = Buses { pio: Arc::new(manager.pio), mmio: Arc::new(manager.mmio) };
    let ready = Arc::new(Barrier::new(vcpus.len()));
    for (id, fd) in (0..).zip(vcpus) {
        vcpu::spawn(id, fd, memory.clone(), buses.clone(), halt.clone(), ready.clone())?;
    }
    Ok(Running { _vm: vm, subscribers: manager.subscribers, power, halt, serial })
}

fn open_kvm() -> Result<Kvm, StartError> {
    let kvm = Kvm::new().map_err(StartError::OpenKvm)?;
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(StartError::KvmVersion);
    }
    Ok(kvm)
}

fn set_memory_slots(vm: &VmFd, memory: &GuestMemory) -> Result<(), StartError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a mapping of guest memory that lives as long as `memory`, which every
        // vCPU's thread holds for the rest of the process (a machine need not have a device that
        // would); slots do not overlap, and are not changed.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(StartError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

fn add_legacy(
    manager: &mut DeviceManager,
    console: &Console,
    power: &Arc<PowerSwitch>,
) -> Result<Option<Arc<Mutex<SerialPort>>>, StartError> {
    let acpi = AcpiPower::new(power.clone(), acpi::SLEEP_TYPE_OFF, acpi::RESET_VALUE);
    manager.add_pio(layout::POWER_PORT, 3, Arc::new(Mutex::new(acpi)))?;
    let keyboard = I8042::new(power.clone());
    manager.add_pio(layout::I8042_PORT, 5, Arc::new(Mutex::new(keyboard)))?;
    if !console.serial {
        return Ok(None);
    }
    let serial =
        SerialPort::new(Box::new(std::io::stdout())).map_err(StartError::device("serial port"))?;
    let interrupt = serial.interrupt_event().try_clone();
    manager
        .add_interrupt(interrupt.map_err(StartError::device("serial port"))?, layout::SERIAL_GSI);
    let serial = Arc::new(Mutex::new(serial));
    manager.add_pio(layout::SERIAL_PORT, 8, serial.clone())?;
    Ok(Some(serial))
}

/// What the command line says of the root device.
struct RootDevice {
    partuuid: Option<String>,
    read_only: bool,
}

fn add_virtio(
    manager: &mut DeviceManager,
    memory: &GuestMemory,
    plan: &mut Plan,
) -> Result<Option<RootDevice>, StartError> {
    check_sharing(&plan.drives)?;
    let mut root = None;
    // The guest names drives in the order in which it finds them; the root device is /dev/vda.
    let (roots, others): (Vec<_>, Vec<_>) =
        plan.drives.iter().partition(|drive| drive.is_root_device);
    for drive in roots.into_iter().chain(others) {
        let id = &drive.drive_id;
        let path = drive.check().map_err(StartError::device(format!("drive {id}")))?;
        let disk = Disk::open(path, drive.is_read_only)
            .map_err(|error| StartError::Drive { id: id.clone(), error })?;
        let options = BlockOptions {
            id: id.clone(),
            flush: drive.cache_type == CacheType::Writeback,
            ..BlockOptions::default()
        };
        let block = Block::new(options, disk).map_err(StartError::device(id))?;
        manager.add_virtio(memory, id, block)?;
        if drive.is_root_device {
            let partuuid = drive.partuuid.clone();
            root = Some(RootDevice { partuuid, read_only: drive.is_read_only });
        }
    }
    for (interface, tap) in &mut plan.interfaces {
        let id = &interface.iface_id;
        let mac = interface.check().map_err(StartError::device(format!("interface {id}")))?;
        let tap = match tap.take() {
            Some(descriptor) => Tap::from_descriptor(descriptor),
            None => Tap::open(&interface.host_dev_name),
        };
        let name = format!("interface {id}: TAP {}", interface.host_dev_name);
        let tap = tap.map_err(StartError::device::<std::io::Error>(name))?;
        let options =
            NetOptions { id: id.clone(), mac, mtu: interface.mtu, ..NetOptions::default() };
        let net = Net::new(options, tap).map_err(StartError::device(id))?;
        manager.add_virtio(memory, id, net)?;
    }
    if let Some(vsock) = &plan.vsock {
        let name = format!("vsock: {}", vsock.uds_path.display());
        let vsock =
            VsockDevice::new(vsock.guest_cid, &vsock.uds_path).map_err(StartError::device(name))?;
        manager.add_virtio(memory, "vsock", vsock)?;
    }
    if plan.entropy.is_some() {
        let rng = Rng::new(RngOptions::default()).map_err(StartError::device("entropy"))?;
        manager.add_virtio(memory, "entropy", rng)?;
    }
    if let Some(path) = &plan.console.output_path {
        let output = append_to(path)?;
        let console = devices::virtio::console::Console::new(Box::new(output), CONSOLE_LIMIT)
            .map_err(StartError::device("console"))?;
        manager.add_virtio(memory, "console", console)?;
    }
    Ok(root)
}

/// Refuses one file behind two drives unless both only read it: two writers, or a writer behind the
/// back of a reader's cache, ruin a file system.
fn check_sharing(drives: &[Drive]) -> Result<(), StartError> {
    let mut seen: Vec<(u64, u64, &Drive)> = Vec::new();
    for drive in drives {
        // What cannot be looked at cannot be opened either, and is refused then.
        let Some(file) = drive.path_on_host.as_ref().and_then(|path| path.metadata().ok()) else {
            continue;
        };
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

fn append_to(path: &Path) -> Result<impl Write + Send + 'static, StartError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        // A FIFO without a reader must not hang the machine.
        .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| StartError::Open { what: "console output", path: path.to_owned(), error })
}

fn open(what: &'static str, path: &Path) -> Result<File, StartError> {
    let failed = |error| StartError::Open { what, path: path.to_owned(), error };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            "not a regular file",
        )));
    }
    Ok(file)
}

fn load(
    memory: &GuestMemory,
    source: &BootSource,
    plan: &Plan,
    root: Option<RootDevice>,
    manager: &DeviceManager,
    serial: bool,
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
    if let Some(root) = root {
        let device = root.partuuid.map_or("/dev/vda".to_owned(), |id| format!("PARTUUID={id}"));
        let mode = if root.read_only { "ro" } else { "rw" };
        command_line += &format!(" root={device} {mode}");
    }
    let platform =
        Platform { vcpus: plan.machine.vcpu_count, virtio: manager.virtio.clone(), serial };
    let rsdp = acpi::write(memory, &platform)?;
    boot::write_parameters(memory, &kernel, initramfs, &command_line, rsdp)
        .map_err(failed(path))?;
    Ok(kernel)
}

fn make_vcpu(
    vm: &VmFd,
    id: u8,
    machine: &MachineConfig,
    supported: &CpuId,
    memory: &GuestMemory,
    entry: &Entry,
) -> Result<VcpuFd, StartError> {
    let vcpu = vm.create_vcpu(id.into()).map_err(StartError::kvm("KVM_CREATE_VCPU"))?;
    let threads_per_core = if machine.smt && machine.vcpu_count > 1 { 2 } else { 1 };
    let topology = Topology { vcpus: machine.vcpu_count, threads_per_core };
    let leaves = cpuid::of_vcpu(supported, id, topology)?;
    vcpu.set_cpuid2(&leaves).map_err(StartError::kvm("KVM_SET_CPUID2"))?;
    // The others wait for the boot processor's INIT and SIPI in the state KVM made them in.
    if id != 0 {
        return Ok(vcpu);
    }
    let msrs = registers::model_specific();
    let wanted = msrs.len();
    let msrs = Msrs::from_entries(&msrs).map_err(StartError::device("MSRs"))?;
    let set = vcpu.set_msrs(&msrs).map_err(StartError::kvm("KVM_SET_MSRS"))?;
    if set != wanted {
        let index = msrs.as_slice().get(set).map_or(0, |entry| entry.index);
        tracing::debug!("KVM does not take MSR {index:#x}");
    }
    vcpu.set_fpu(&registers::floating_point()).map_err(StartError::kvm("KVM_SET_FPU"))?;
    let mut special = vcpu.get_sregs().map_err(StartError::kvm("KVM_GET_SREGS"))?;
    registers::special(memory, entry, &mut special)?;
    vcpu.set_sregs(&special).map_err(StartError::kvm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&registers::general(entry)).map_err(StartError::kvm("KVM_SET_REGS"))?;
    Ok(vcpu)
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
