//! The guest's physical address space and its interrupts: the one table of both.
//!
//! ```text
//!  0x0000_0000 ┬──────────────────────────────┐
//!              │ RAM: boot structures         │  GDT, page tables, PVH start info, zero page,
//!  0x0002_0000 │                              │  command line
//!  0x0009_fc00 ├──────────────────────────────┤
//!              │ (the PC's video and ROM area)│
//!  0x000e_0000 ├──────────────────────────────┤
//!              │ ACPI tables                  │  RAM, reported as ACPI data; the generation ID
//!  0x000f_f000 │                              │  is in their last page
//!  0x0010_0000 ├──────────────────────────────┤
//!              │ RAM: kernel, then initramfs  │
//!              │ at its very end              │
//!  0xc000_0000 ├──────────────────────────────┤  at most 3 GiB of RAM below
//!              │ MMIO hole                    │
//!  0xd000_0000 │   virtio-mmio, 4 KiB each    │
//!  0xe000_0000 │   PCI configuration (ECAM)   │  one bus
//!  0xe100_0000 │   PCI memory                 │  BARs, where the monitor puts them
//!  0xfec0_0000 │   I/O APIC                   │  in the kernel (KVM)
//!  0xfee0_0000 │   local APICs                │  in the kernel (KVM)
//!  0xfffb_c000 │   KVM's TSS and identity map │
//!  0x1_0000_0000 ├────────────────────────────┤
//!              │ RAM: the rest                │
//!              ├──────────────────────────────┤
//!              │ (nothing)                    │
//!  0x40_0000_0000 ├───────────────────────────┤  higher where RAM reaches it
//!              │ PCI memory of 64 bits        │  BARs, where Linux moves them
//!              └──────────────────────────────┘
//! ```
//!
//! Every address is a guest physical one, in bytes.

/// GDT that the boot processor starts with under the 64-bit boot protocol.
pub const GDT: u64 = 0x500;
/// PVH start info (`struct hvm_start_info`).
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH module list.
pub const PVH_MODULES: u64 = 0x6040;
/// PVH memory map; it may grow up to [`PAGE_TABLES`].
pub const PVH_MEMORY_MAP: u64 = 0x6100;
/// The zero page of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Three pages of tables that map the first GiB, for the 64-bit boot protocol.
pub const PAGE_TABLES: u64 = 0x9000;
/// Top of the stack that an entry point may use.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Largest command line in bytes, its terminator included (`COMMAND_LINE_SIZE` of Linux on x86).
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of the memory below the PC's video area.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, the RSDP first, where Linux also looks for it unasked.
pub const ACPI: u64 = 0xe_0000;
/// Space for the ACPI tables, in bytes.
pub const ACPI_SIZE: u64 = 0x2_0000;
/// The page of the generation ID, the last one of the ACPI tables' space.
pub const GENERATION_ID: u64 = ACPI + ACPI_SIZE - 0x1000;
/// Where the kernel may be loaded from.
pub const HIGH_RAM: u64 = 0x10_0000;

/// Begin of the hole in RAM below 4 GiB.
pub const MMIO_HOLE: u64 = 0xc000_0000;
/// End of the hole, and where the rest of the RAM begins.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;
/// First virtio-mmio window.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Size of one window, in bytes.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Configuration of PCI bus 0 (ECAM).
pub const ECAM: u64 = 0xe000_0000;
/// Size of that, in bytes: 4 KiB for each of eight functions in each of 32 slots.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// The PCI host bridge's window below 4 GiB.
pub const PCI_MEMORY: u64 = 0xe100_0000;
/// Size of that window, in bytes.
pub const PCI_MEMORY_SIZE: u64 = 0xf00_0000;
/// The PCI host bridge's window above 4 GiB, unless RAM reaches it: see [`pci_memory_64`]. Far above
/// RAM, but where a processor of 39 physical address bits reaches it.
pub const PCI_MEMORY_64: u64 = 1 << 38;
/// Size of that window, in bytes.
pub const PCI_MEMORY_64_SIZE: u64 = 1 << 36;
/// Where Firecracker's kernels write a byte to when their user space begins.
pub const BOOT_TIMER: u64 = 0xcfff_f000;
/// The I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel processors (KVM API, `KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page more of the same kind (KVM API, `KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// Interrupt of the keyboard controller.
pub const KEYBOARD_GSI: u32 = 1;
/// Interrupt of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// First interrupt for virtio devices. Those below are the PC's own.
pub const FIRST_GSI: u32 = 5;
/// Last interrupt for virtio devices.
pub const LAST_GSI: u32 = 21;
/// Interrupt of PCI hot-plug.
pub const HOT_PLUG_GSI: u32 = 22;
/// Interrupt that tells of another generation ID.
pub const GENERATION_GSI: u32 = 23;
/// Last interrupt of KVM's I/O APIC; messages (MSI) come after it.
pub const LAST_PIN: u32 = 23;

/// The serial port's eight registers.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The keyboard controller's data port; that of commands and status is four above it.
pub const I8042_PORT: u16 = 0x60;
/// ACPI's sleep control, sleep status and reset register, a byte each.
pub const POWER_PORT: u16 = 0x600;
/// The hot-plug registers of the PCI bus.
pub const HOT_PLUG_PORT: u16 = 0x620;
/// Size of those, in bytes.
pub const HOT_PLUG_SIZE: u8 = 12;

/// Most virtual processors of one VM.
pub const MAX_VCPUS: u8 = 32;

/// Where the PCI host bridge's window above 4 GiB begins, for RAM (such as may be added later
/// included) that ends at this address.
pub const fn pci_memory_64(ram_end: u64) -> u64 {
    if ram_end <= PCI_MEMORY_64 {
        PCI_MEMORY_64
    } else {
        ram_end.next_multiple_of(PCI_MEMORY_64_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_memory_of_64_bits_is_aligned_and_above_all_ram() {
        for (ram_end, start) in [
            (0, 1 << 38),
            (1 << 38, 1 << 38),
            ((1 << 38) + 1, (1 << 38) + (1 << 36)),
            (1 << 40, 1 << 40),
        ] {
            assert_eq!(pci_memory_64(ram_end), start);
        }
    }
}
