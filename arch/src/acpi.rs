//! ACPI tables of a platform without firmware (ACPI 6.5, 4.1 hardware-reduced).
//!
//! They exist because distribution kernels do not take virtio-mmio devices from the command line, and
//! because PCI without firmware's ports is only found through them.
//!
//! The namespace below `\\_SB_`:
//!
//! ```text
//!  V000…   virtio-mmio devices
//!  COM1    the serial port
//!  KBD_    the keyboard
//!  MBRD    what is reserved: PCI's configuration space, which Linux does not use otherwise
//!  PCI0    the PCI host bridge
//!   S01_…    its slots, where there is hot-plug; _EJ0 gives one back
//!   SCAN     reads the hot-plug registers and notifies slots
//!  VGEN    the generation ID
//!  GED_    the Generic Event Device, which calls SCAN and notifies VGEN
//! ```

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress};

use crate::{GuestMemory, layout};

const OEM: [u8; 6] = *b"VMRUN ";
const OEM_TABLE: [u8; 8] = *b"VMRUNVM ";
const OEM_REVISION: u32 = 1;

/// Value written to the reset register, by the FADT.
pub const RESET_VALUE: u8 = 1;
/// Sleep type of the soft-off state, by the DSDT's `_S5_`.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// A virtio-mmio device to announce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// Its window; 32 bits, since windows are in the hole.
    pub address: u32,
    /// Its interrupt.
    pub gsi: u32,
}

/// A PCI host bridge to announce: bus 0, its configuration at [`layout::ECAM`], its memory at
/// [`layout::PCI_MEMORY`] and above 4 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciHost {
    /// Begin of its window above 4 GiB, by [`layout::pci_memory_64`].
    pub memory_64: u64,
    /// Interrupt of the hot-plug registers at [`layout::HOT_PLUG_PORT`]; none where nothing is ever
    /// plugged into the running machine.
    pub hot_plug_gsi: Option<u32>,
}

/// The generation ID (Microsoft, "Virtual Machine Generation ID"): 16 random bytes that are others in
/// every machine made from one snapshot, so that the guest seeds its random numbers anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerationId {
    /// Guest physical address of the 16 bytes: [`layout::GENERATION_ID`].
    pub address: u64,
    /// Interrupt that says that they are others now.
    pub gsi: u32,
}

/// What the tables describe.
#[derive(Clone, Debug, Default)]
pub struct Platform {
    /// Number of virtual processors; their APIC ids count from zero.
    pub vcpus: u8,
    /// Virtio devices, in the order in which the guest shall find them.
    pub virtio: Vec<VirtioMmio>,
    /// Whether there is a serial port.
    pub serial: bool,
    /// Whether to tell of the keyboard, which takes some kernels long to look at.
    pub keyboard: bool,
    /// The PCI bus, if there is one.
    pub pci: Option<PciHost>,
    /// The generation ID, if there is one.
    pub generation_id: Option<GenerationId>,
}

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They outgrow their place.
    #[error("ACPI tables of {0} bytes do not fit; use fewer devices")]
    TooLarge(usize),
    /// Guest memory ends before them.
    #[error("cannot write ACPI tables to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Writes the tables and returns the address of the RSDP.
pub fn write(memory: &GuestMemory, platform: &Platform) -> Result<GuestAddress, AcpiError> {
    let start = layout::ACPI;
    let mut tables = Tables { bytes: vec![0; Rsdp::len().next_multiple_of(16)] };
    let dsdt = tables.add(&dsdt(platform));
    let fadt = tables.add(&fadt(dsdt, platform));
    let madt = tables.add(&madt(platform));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if platform.pci.is_some() {
        let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
        mcfg.add_ecam(layout::ECAM, 0, 0, 0);
        xsdt.add_entry(tables.add(&mcfg));
    }
    let xsdt = tables.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    if tables.bytes.len() as u64 > layout::GENERATION_ID - start {
        return Err(AcpiError::TooLarge(tables.bytes.len()));
    }
    memory.write_slice(&tables.bytes, GuestAddress(start))?;
    memory.write_slice(&rsdp, GuestAddress(start))?;
    Ok(GuestAddress(start))
}

struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table and returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let address = layout::ACPI + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        address
    }
}

fn power_register(offset: u16) -> GAS {
    let address = u64::from(layout::POWER_PORT + offset);
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64, platform: &Platform) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::PerformanceServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.sleep_control_reg = power_register(0);
    fadt.sleep_status_reg = power_register(1);
    fadt.reset_reg = power_register(2);
    fadt.reset_value = RESET_VALUE;
    // No VGA and no CMOS clock to probe (ACPI 6.5, table 5.10).
    const HAS_8042: u16 = 1 << 1;
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;
    let keyboard = if platform.keyboard { HAS_8042 } else { 0 };
    fadt.iapc_boot_arch = (keyboard | VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT).into();
    fadt.finalize()
}

fn madt(platform: &Platform) -> impl Aml {
    let controller = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, controller);
    for id in 0..platform.vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn dsdt(platform: &Platform) -> Sdt {
    let mut body = Vec::new();
    // The fifth sleep state is off.
    let off = aml::Package::new(vec![&SLEEP_TYPE_OFF, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    aml::Name::new("_S5_".into(), &off).to_aml_bytes(&mut body);

    let mut devices = Vec::new();
    for (number, device) in platform.virtio.iter().enumerate() {
        virtio_device(number, device).append_to(&mut devices);
    }
    if platform.serial {
        serial_port(&mut devices);
    }
    if platform.keyboard {
        keyboard(&mut devices);
    }
    if let Some(pci) = &platform.pci {
        motherboard(pci, &mut devices);
        pci_host(pci, &mut devices);
    }
    if let Some(generation_id) = &platform.generation_id {
        generation_counter(generation_id, &mut devices);
    }
    event_device(platform, &mut devices);
    // The children are encoded already; a scope only adds its header around them.
    let devices = Raw(devices);
    aml::Scope::new("_SB_".into(), vec![&devices]).to_aml_bytes(&mut body);

    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt.update_checksum();
    dsdt
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

struct NumberedDevice {
    name: String,
    number: usize,
    device: VirtioMmio,
}

fn virtio_device(number: usize, device: &VirtioMmio) -> NumberedDevice {
    NumberedDevice { name: format!("V{number:03}"), number, device: *device }
}

impl NumberedDevice {
    fn append_to(&self, into: &mut Vec<u8>) {
        let size = layout::VIRTIO_MMIO_SIZE as u32;
        aml::Device::new(
            self.name.as_str().into(),
            vec![
                &aml::Name::new("_HID".into(), &"LNRO0005"),
                &aml::Name::new("_UID".into(), &self.number),
                // The device sees memory as the processors do.
                &aml::Name::new("_CCA".into(), &aml::ONE),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![
                        &aml::Memory32Fixed::new(true, self.device.address, size),
                        &aml::Interrupt::new(true, true, false, false, self.device.gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(into);
    }
}

fn serial_port(into: &mut Vec<u8>) {
    let port = layout::SERIAL_PORT;
    aml::Device::new(
        "COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(port, port, 0, 8),
                    &aml::Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(into);
}

/// The keyboard behind the keyboard controller. There is no mouse, and so none is looked for.
fn keyboard(into: &mut Vec<u8>) {
    let (data, command) = (layout::I8042_PORT, layout::I8042_PORT + 4);
    aml::Device::new(
        "KBD_".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0303")),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(data, data, 0, 1),
                    &aml::IO::new(command, command, 0, 1),
                    &aml::Interrupt::new(true, true, false, false, layout::KEYBOARD_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(into);
}

/// Addresses that belong to no device. Linux only uses memory-mapped PCI configuration that is
/// reserved here.
fn motherboard(pci: &PciHost, into: &mut Vec<u8>) {
    let ecam = aml::Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_SIZE as u32);
    let port = layout::HOT_PLUG_PORT;
    let registers = aml::IO::new(port, port, 0, layout::HOT_PLUG_SIZE);
    let mut resources: Vec<&dyn Aml> = vec![&ecam];
    if pci.hot_plug_gsi.is_some() {
        resources.push(&registers);
    }
    aml::Device::new(
        "MBRD".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(into);
}

/// The PCI host bridge (ACPI 6.5, 6.1.5 and 6.2; PCI Firmware 3.2, 4). Interrupts are MSI-X only, so
/// that there is no routing table; no `_OSC`, so that hot-plug stays ACPI's.
fn pci_host(pci: &PciHost, into: &mut Vec<u8>) {
    let memory = layout::PCI_MEMORY as u32;
    let memory_end = memory + (layout::PCI_MEMORY_SIZE - 1) as u32;
    let memory_64_end = pci.memory_64.saturating_add(layout::PCI_MEMORY_64_SIZE - 1);
    let uncached = aml::AddressSpaceCacheable::NotCacheable;
    let mut hot_plug = Vec::new();
    if pci.hot_plug_gsi.is_some() {
        slots(&mut hot_plug);
    }
    aml::Device::new(
        "PCI0".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08")),
            &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_SEG".into(), &aml::ZERO),
            &aml::Name::new("_BBN".into(), &aml::ZERO),
            // Devices see memory as the processors do.
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::AddressSpace::<u16>::new_bus_number(0, 0),
                    &aml::AddressSpace::<u32>::new_memory(uncached, true, memory, memory_end, None),
                    &aml::AddressSpace::<u64>::new_memory(
                        uncached,
                        true,
                        pci.memory_64,
                        memory_64_end,
                        None,
                    ),
                ]),
            ),
            &Raw(hot_plug),
        ],
    )
    .to_aml_bytes(into);
}

/// Slots that devices are plugged into and removed from, and what notifies them (ACPI 6.5, 5.6.6 and
/// 6.3.3). Slot 0 is the host bridge's. The registers are described in `devices::pci::hotplug`.
fn slots(into: &mut Vec<u8>) {
    const DEVICE_CHECK: u8 = 1;
    const EJECT_REQUEST: u8 = 3;
    let (plugged, unplug) = (aml::Local(0), aml::Local(1));
    let (port, size) = (layout::HOT_PLUG_PORT, layout::HOT_PLUG_SIZE);
    aml::OpRegion::new("HPRG".into(), aml::OpRegionSpace::SystemIO, &port, &size)
        .to_aml_bytes(into);
    let register = |name: &[u8; 4]| aml::FieldEntry::Named(*name, 32);
    aml::Field::new(
        "HPRG".into(),
        // Reading a register forgets what is in it: each is read once, and whole.
        aml::FieldAccessType::DWord,
        aml::FieldLockRule::NoLock,
        aml::FieldUpdateRule::WriteAsZeroes,
        vec![register(b"PLUG"), register(b"UNPL"), register(b"EJCT")],
    )
    .to_aml_bytes(into);

    let mut scan = Vec::new();
    aml::Store::new(&plugged, &aml::Path::new("PLUG")).to_aml_bytes(&mut scan);
    aml::Store::new(&unplug, &aml::Path::new("UNPL")).to_aml_bytes(&mut scan);
    for slot in 1..32u32 {
        let bit = 1u32 << slot;
        let name = format!("S{slot:02}_");
        aml::Device::new(
            name.as_str().into(),
            vec![
                &aml::Name::new("_ADR".into(), &(slot << 16)),
                &aml::Name::new("_SUN".into(), &slot),
                &aml::Method::new(
                    "_EJ0".into(),
                    1,
                    true,
                    vec![&aml::Store::new(&aml::Path::new("EJCT"), &bit)],
                ),
            ],
        )
        .to_aml_bytes(into);
        for (slots, value) in [(&plugged, DEVICE_CHECK), (&unplug, EJECT_REQUEST)] {
            // The result of the conjunction is stored nowhere, which a zero says.
            aml::If::new(
                &aml::And::new(&aml::ZERO, slots, &bit),
                vec![&aml::Notify::new(&aml::Path::new(&name), &value)],
            )
            .to_aml_bytes(&mut scan);
        }
    }
    aml::Method::new("SCAN".into(), 0, true, vec![&Raw(scan)]).to_aml_bytes(into);
}

fn generation_counter(generation_id: &GenerationId, into: &mut Vec<u8>) {
    let (low, high) = (generation_id.address as u32, (generation_id.address >> 32) as u32);
    aml::Device::new(
        "VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"VMRN0001"),
            // Drivers know it by this one, which the interpreter reads in capitals.
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(into);
}

/// The Generic Event Device (ACPI 6.5, 5.6.9): interrupts that mean something to other devices. It is
/// given the interrupt's number.
fn event_device(platform: &Platform, into: &mut Vec<u8>) {
    const CHANGED: u8 = 0x80;
    let (mut interrupts, mut events) = (Vec::new(), Vec::new());
    let mut on = |gsi: u32, action: &dyn Aml| {
        aml::Interrupt::new(true, true, false, false, gsi).to_aml_bytes(&mut interrupts);
        aml::If::new(&aml::Equal::new(&aml::Arg(0), &gsi), vec![action]).to_aml_bytes(&mut events);
    };
    if let Some(gsi) = platform.pci.and_then(|pci| pci.hot_plug_gsi) {
        on(gsi, &aml::MethodCall::new("\\_SB_.PCI0.SCAN".into(), vec![]));
    }
    if let Some(generation_id) = &platform.generation_id {
        let device = aml::Path::new("\\_SB_.VGEN");
        on(generation_id.gsi, &aml::Notify::new(&device, &CHANGED));
    }
    if events.is_empty() {
        return;
    }
    aml::Device::new(
        "GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&Raw(interrupts)])),
            &aml::Method::new("_EVT".into(), 1, true, vec![&Raw(events)]),
        ],
    )
    .to_aml_bytes(into);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(platform: &Platform) -> Vec<u8> {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let rsdp = write(&memory, platform).unwrap();
        let mut bytes = vec![0; layout::ACPI_SIZE as usize];
        memory.read_slice(&mut bytes, rsdp).unwrap();
        bytes
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_chain_from_rsdp_to_each_table_holds_and_sums_to_zero() {
        let virtio =
            (0..19).map(|n| VirtioMmio { address: 0xd000_0000 + n * 0x1000, gsi: 5 + n }).collect();
        let platform = Platform { vcpus: 32, virtio, serial: true, ..Platform::default() };
        let bytes = tables(&platform);
        assert_eq!(&bytes[..8], b"RSD PTR ");
        let table = |address: u64| {
            let from = (address - layout::ACPI) as usize;
            let table = &bytes[from..from + u32_at(&bytes, from + 4) as usize];
            assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            table
        };
        let xsdt = table(u64_at(&bytes, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (b"XSDT".as_slice(), 36 + 16));
        let fadt = table(u64_at(xsdt, 36));
        assert_eq!(&fadt[..4], b"FACP");
        assert_ne!(u32_at(fadt, 112) & (1 << 20), 0, "not hardware-reduced");
        let madt = table(u64_at(xsdt, 44));
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        let dsdt = table(u64_at(fadt, 140));
        let count = dsdt.windows(8).filter(|window| window == b"LNRO0005").count();
        assert_eq!((&dsdt[..4], count), (b"DSDT".as_slice(), 19));
        assert!(!dsdt.windows(8).any(|window| window == b"ACPI0013"));
    }

    #[test]
    fn the_keyboard_is_told_of_where_it_is_wanted() {
        for keyboard in [false, true] {
            let platform = Platform { vcpus: 1, keyboard, ..Platform::default() };
            let bytes = tables(&platform);
            let fadt = bytes.windows(4).position(|window| window == b"FACP").unwrap();
            assert_eq!(bytes[fadt + 109] & 2 != 0, keyboard);
            // PNP0303 as an EISA id.
            let id = [0x41, 0xd0, 0x03, 0x03];
            assert_eq!(bytes.windows(4).any(|window| window == id), keyboard);
            let Some(text) = disassembly(&platform) else { continue };
            assert_eq!(text.contains("Device (KBD)"), keyboard, "{text}");
        }
    }

    fn with_pci() -> Platform {
        Platform {
            vcpus: 1,
            pci: Some(PciHost {
                memory_64: layout::pci_memory_64(1 << 30),
                hot_plug_gsi: Some(22),
            }),
            generation_id: Some(GenerationId { address: layout::GENERATION_ID, gsi: 23 }),
            ..Platform::default()
        }
    }

    #[test]
    fn the_configuration_space_of_pci_is_announced_and_reserved() {
        let bytes = tables(&with_pci());
        let at = bytes.windows(4).position(|window| window == b"MCFG").unwrap();
        let mcfg = &bytes[at..at + u32_at(&bytes, at + 4) as usize];
        assert_eq!(mcfg.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        // One entry: address, segment, first and last bus.
        assert_eq!((mcfg.len(), u64_at(mcfg, 44), u64_at(mcfg, 52)), (60, layout::ECAM, 0));
        // The reserved range begins and ends where the announced one does.
        let mut reserved = vec![0x86, 9, 0, 1];
        reserved.extend((layout::ECAM as u32).to_le_bytes());
        reserved.extend(0x10_0000u32.to_le_bytes());
        assert!(bytes.windows(reserved.len()).any(|window| window == reserved));
        // In the tables' space, the generation ID's page is not theirs.
        assert_eq!(&bytes[(layout::GENERATION_ID - layout::ACPI) as usize..], [0; 0x1000]);
    }

    /// What ACPICA, the interpreter that Linux has, makes of the tables; nothing where its compiler is
    /// not installed.
    fn disassembly(platform: &Platform) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        let mut table = Vec::new();
        dsdt(platform).to_aml_bytes(&mut table);
        std::fs::write(folder.path().join("dsdt.aml"), table).unwrap();
        let iasl = |arguments: &[&str]| {
            std::process::Command::new("iasl").args(arguments).current_dir(&folder).output()
        };
        let output = match iasl(&["-d", "dsdt.aml"]) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            output => output.unwrap(),
        };
        assert!(output.status.success(), "{output:?}");
        // It takes its own words back, as it would not with a table that is broken.
        let again = iasl(&["dsdt.dsl"]).unwrap();
        assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stdout));
        let text = std::fs::read_to_string(folder.path().join("dsdt.dsl")).unwrap();
        Some(text.split_whitespace().collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn an_interpreter_finds_slots_and_events() {
        let Some(text) = disassembly(&with_pci()) else { return };
        for expected in [
            "Name (_HID, EisaId (\"PNP0A08\") /* PCI Express Bus */)",
            "Memory32Fixed (ReadWrite, 0xE0000000, // Address Base 0x00100000, // Address Length )",
            "OperationRegion (HPRG, SystemIO, 0x0620, 0x0C)",
            "Field (HPRG, DWordAcc, NoLock, WriteAsZeros) { PLUG, 32, UNPL, 32, EJCT, 32 }",
            "Device (S31) { Name (_ADR, 0x001F0000) // _ADR: Address Name (_SUN, 0x1F)",
            "{ EJCT = 0x80000000 }",
            "Local0 = PLUG",
            "Local1 = UNPL",
            "If ((Local0 & 0x80000000)) { Notify (S31, One) // Device Check }",
            "If ((Local1 & 0x02)) { Notify (S01, 0x03) // Eject Request }",
            "If ((Arg0 == 0x16)) { \\_SB.PCI0.SCAN () }",
            "If ((Arg0 == 0x17)) { Notify (\\_SB.VGEN, 0x80)",
            "Name (ADDR, Package (0x02) { 0x000FF000, Zero })",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
    }

    #[test]
    fn without_hot_plug_there_are_no_slots_and_no_events() {
        let pci = PciHost { memory_64: layout::PCI_MEMORY_64, hot_plug_gsi: None };
        let platform = Platform { pci: Some(pci), ..Platform::default() };
        let mut table = Vec::new();
        dsdt(&platform).to_aml_bytes(&mut table);
        for absent in [b"GED_", b"S01_", b"SCAN", b"HPRG"] {
            assert!(!table.windows(4).any(|window| window == absent));
        }
        assert!(disassembly(&platform).is_none_or(|text| text.contains("Device (PCI0)")));
    }
}
