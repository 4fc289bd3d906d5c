//! ACPI tables of a platform without firmware (ACPI 6.5, 4.1 hardware-reduced).
//!
//! They exist because distribution kernels do not take virtio-mmio devices from the command line.

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
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

/// What the tables describe.
#[derive(Clone, Debug, Default)]
pub struct Platform {
    /// Number of virtual processors; their APIC ids count from zero.
    pub vcpus: u8,
    /// Virtio devices, in the order in which the guest shall find them.
    pub virtio: Vec<VirtioMmio>,
    /// Whether there is a serial port.
    pub serial: bool,
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
    let fadt = tables.add(&fadt(dsdt));
    let madt = tables.add(&madt(platform));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    if tables.bytes.len() as u64 > layout::ACPI_SIZE {
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

fn fadt(dsdt: u64) -> impl Aml {
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
    // No VGA, no CMOS clock and no keyboard controller to probe (ACPI 6.5, table 5.10).
    const NO_8042: u16 = 0;
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;
    fadt.iapc_boot_arch = (NO_8042 | VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT).into();
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
        let bytes = tables(&Platform { vcpus: 32, virtio, serial: true });
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
    }
}
