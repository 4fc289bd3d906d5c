//! Getting a kernel into memory and telling it where things are.
//!
//! An ELF kernel is entered by PVH (Xen's x86/HVM direct boot ABI), a bzImage by the 64-bit entry of
//! the Linux boot protocol. Which of the two an image is, is seen from its first bytes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::image_file::ImageFile;
use crate::{GuestMemory, layout, memory};

/// How the boot processor enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit, without paging, with a PVH start info.
    Pvh(GuestAddress),
    /// 64-bit, with a zero page.
    Linux64(GuestAddress),
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct LoadedKernel {
    /// Where to begin.
    pub entry: Entry,
    /// First address past it; it may use more once it runs.
    pub end: u64,
    setup: Option<Box<linux_loader::loader::bootparam::setup_header>>,
}

/// Why a guest cannot be booted from these files.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file could not be read.
    #[error("cannot read the kernel: {0}")]
    Read(std::io::Error),
    /// Neither of the formats.
    #[error("not a kernel: neither an ELF file nor a bzImage")]
    UnknownFormat,
    /// linux-loader refused it.
    #[error("cannot load the kernel: {0}")]
    Load(linux_loader::loader::Error),
    /// An ELF file without the note that names its PVH entry.
    #[error("the ELF kernel has no PVH entry; build it with CONFIG_PVH=y")]
    NoPvh,
    /// The entry is not in memory above 1 MiB.
    #[error("the kernel's entry {0:#x} is outside the guest's memory")]
    EntryOutside(u64),
    /// A bzImage for another processor mode or of an old protocol.
    #[error("the bzImage has no 64-bit entry (boot protocol {0:#x})")]
    No64BitEntry(u16),
    /// More memory is needed to unpack it.
    #[error("the kernel needs {needed} MiB of memory to start, the guest has {available} MiB")]
    NeedsMemory {
        /// MiB it says it needs.
        needed: u64,
        /// MiB below the MMIO hole.
        available: u64,
    },
    /// The initramfs does not fit behind the kernel.
    #[error("the initramfs of {size} bytes does not fit into the guest's memory")]
    InitramfsTooLarge {
        /// Its size in bytes.
        size: u64,
    },
    /// The initramfs could not be read.
    #[error("cannot read the initramfs: {0}")]
    ReadInitramfs(String),
    /// Longer than Linux takes.
    #[error("the kernel command line has {0} bytes, at most {max} fit", max = layout::COMMAND_LINE_MAX - 1)]
    CommandLineTooLong(usize),
    /// Bytes that a kernel would not take.
    #[error("the kernel command line has a byte that is not printable ASCII")]
    CommandLineNotAscii,
    /// The memory map has more ranges than the tables have room for.
    #[error("cannot write boot parameters: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Loads a kernel, ELF or bzImage, where it asks to be.
pub fn load_kernel(memory: &GuestMemory, image: &mut File) -> Result<LoadedKernel, BootError> {
    let mut magic = [0; 4];
    image.rewind().map_err(BootError::Read)?;
    image.read_exact(&mut magic).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => BootError::UnknownFormat,
        _ => BootError::Read(error),
    })?;
    let mut header = [0; 4];
    let is_bzimage = image.seek(SeekFrom::Start(0x202)).is_ok()
        && image.read_exact(&mut header).is_ok()
        && &header == b"HdrS";
    let mut image = ImageFile { file: image, memory };
    if &magic == b"\x7fELF" {
        load_elf(memory, &mut image)
    } else if is_bzimage {
        load_bzimage(memory, &mut image)
    } else {
        Err(BootError::UnknownFormat)
    }
}

fn load_elf(memory: &GuestMemory, image: &mut ImageFile) -> Result<LoadedKernel, BootError> {
    let high = GuestAddress(layout::HIGH_RAM);
    let loaded = Elf::load(memory, None, image, Some(high)).map_err(BootError::Load)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvh);
    };
    if entry < high || !memory.address_in_range(entry) {
        return Err(BootError::EntryOutside(entry.0));
    }
    Ok(LoadedKernel { entry: Entry::Pvh(entry), end: loaded.kernel_end, setup: None })
}

fn load_bzimage(memory: &GuestMemory, image: &mut ImageFile) -> Result<LoadedKernel, BootError> {
    /// First protocol version that tells of a 64-bit entry.
    const VERSION: u16 = 0x020c;
    /// `XLF_KERNEL_64`.
    const ENTRY_64: u16 = 1;
    let high = GuestAddress(layout::HIGH_RAM);
    let loaded = BzImage::load(memory, Some(high), image, None).map_err(BootError::Load)?;
    let Some(setup) = loaded.setup_header else { return Err(BootError::UnknownFormat) };
    if setup.version < VERSION || setup.xloadflags & ENTRY_64 == 0 {
        return Err(BootError::No64BitEntry(setup.version));
    }
    // It unpacks itself at the preferred address, and needs so much room there.
    let end = setup.pref_address.saturating_add(setup.init_size.into()).max(loaded.kernel_end);
    let available = memory::low_end(total(memory));
    if end > available {
        return Err(BootError::NeedsMemory {
            needed: end.div_ceil(1 << 20),
            available: available >> 20,
        });
    }
    let entry = GuestAddress(loaded.kernel_load.0 + 0x200);
    Ok(LoadedKernel { entry: Entry::Linux64(entry), end, setup: Some(Box::new(setup)) })
}

fn total(memory: &GuestMemory) -> u64 {
    memory.iter().map(vm_memory::GuestMemoryRegion::len).sum()
}

/// An initramfs in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initramfs {
    /// Its first address.
    pub address: GuestAddress,
    /// Its size in bytes.
    pub size: u64,
}

/// Loads an initramfs at the end of the memory below the MMIO hole, behind the kernel.
pub fn load_initramfs(
    memory: &GuestMemory,
    kernel: &LoadedKernel,
    image: &mut File,
) -> Result<Initramfs, BootError> {
    let unreadable = |error: std::io::Error| BootError::ReadInitramfs(error.to_string());
    let size = image.seek(SeekFrom::End(0)).map_err(unreadable)?;
    image.rewind().map_err(unreadable)?;
    let mut end = memory::low_end(total(memory));
    if let Some(setup) = &kernel.setup {
        end = end.min(u64::from(setup.initrd_addr_max).saturating_add(1));
    }
    let address = end
        .checked_sub(size)
        .map(|address| address & !0xfff)
        .filter(|address| *address >= kernel.end && size <= u32::MAX.into())
        .ok_or(BootError::InitramfsTooLarge { size })?;
    let address = GuestAddress(address);
    memory
        .read_exact_volatile_from(address, &mut ImageFile { file: image, memory }, size as usize)
        .map_err(|error| BootError::ReadInitramfs(error.to_string()))?;
    Ok(Initramfs { address, size })
}

/// Refuses what Linux would cut off or misread.
pub fn check_command_line(text: &str) -> Result<(), BootError> {
    if text.len() >= layout::COMMAND_LINE_MAX {
        return Err(BootError::CommandLineTooLong(text.len()));
    }
    if !text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Err(BootError::CommandLineNotAscii);
    }
    Ok(())
}

/// Writes what the kernel reads first: command line, memory map, initramfs and ACPI addresses.
pub fn write_parameters(
    memory: &GuestMemory,
    kernel: &LoadedKernel,
    initramfs: Option<Initramfs>,
    command_line: &str,
    rsdp: GuestAddress,
) -> Result<(), BootError> {
    check_command_line(command_line)?;
    memory.write_slice(command_line.as_bytes(), GuestAddress(layout::COMMAND_LINE))?;
    let end = layout::COMMAND_LINE + command_line.len() as u64;
    memory.write_obj(0u8, GuestAddress(end))?;
    match &kernel.setup {
        None => write_pvh(memory, initramfs, rsdp),
        Some(setup) => write_zero_page(memory, setup, initramfs, command_line.len() as u32, rsdp),
    }
}

fn write_pvh(
    memory: &GuestMemory,
    initramfs: Option<Initramfs>,
    rsdp: GuestAddress,
) -> Result<(), BootError> {
    const MAGIC: u32 = 0x336e_c578;
    let map = memory::map(total(memory));
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: rsdp.0,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some(initramfs) = initramfs {
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
        let module = hvm_modlist_entry {
            paddr: initramfs.address.0,
            size: initramfs.size,
            ..Default::default()
        };
        memory.write_obj(module, GuestAddress(layout::PVH_MODULES))?;
    }
    let entry_size = size_of::<hvm_memmap_table_entry>() as u64;
    for (index, range) in map.iter().enumerate() {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.size,
            type_: range.kind as u32,
            reserved: 0,
        };
        let address = layout::PVH_MEMORY_MAP + index as u64 * entry_size;
        memory.write_obj(entry, GuestAddress(address))?;
    }
    memory.write_obj(info, GuestAddress(layout::PVH_START_INFO))?;
    Ok(())
}

fn write_zero_page(
    memory: &GuestMemory,
    setup: &linux_loader::loader::bootparam::setup_header,
    initramfs: Option<Initramfs>,
    command_line_size: u32,
    rsdp: GuestAddress,
) -> Result<(), BootError> {
    /// A loader without a number of its own.
    const LOADER: u8 = 0xff;
    let mut page = boot_params { hdr: *setup, ..Default::default() };
    page.hdr.type_of_loader = LOADER;
    page.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    page.hdr.cmdline_size = command_line_size;
    page.acpi_rsdp_addr = rsdp.0;
    if let Some(initramfs) = initramfs {
        page.hdr.ramdisk_image = initramfs.address.0 as u32;
        page.hdr.ramdisk_size = initramfs.size as u32;
    }
    let map = memory::map(total(memory));
    page.e820_entries = map.len() as u8;
    for (entry, range) in page.e820_table.iter_mut().zip(&map) {
        entry.addr = range.start;
        entry.size = range.size;
        entry.r#type = range.kind as u32;
    }
    memory.write_obj(page, GuestAddress(layout::ZERO_PAGE))?;
    Ok(())
}

#[cfg(test)]
mod tests;
