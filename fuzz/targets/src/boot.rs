//! Kernels, which are whatever file the user names.

use std::io::Write;
use std::sync::Arc;

use arch::GuestMemory;
use arch::boot::{load_initramfs, load_kernel, write_parameters};
use vm_memory::{FileOffset, GuestAddress};

use crate::memory_file;

/// Bytes of guest memory.
const MEMORY: u64 = 8 << 20;

/// A kernel, ELF or bzImage. One that is taken begins and ends in memory, and can be told all that
/// a kernel is told.
pub fn elf_kernel(input: &[u8]) {
    let backing = Arc::new(memory_file());
    backing.set_len(MEMORY).unwrap();
    let region = (GuestAddress(0), MEMORY as usize, Some(FileOffset::from_arc(backing, 0)));
    let memory = GuestMemory::from_ranges_with_files([region]).unwrap();
    let mut image = memory_file();
    image.write_all(input).unwrap();
    let Ok(kernel) = load_kernel(&memory, &mut image) else { return };
    let initramfs = load_initramfs(&memory, &kernel, &mut image).ok();
    if let Some(initramfs) = initramfs {
        assert!(initramfs.address.0 >= kernel.end);
        assert!(initramfs.address.0 + initramfs.size <= MEMORY);
    }
    let rsdp = GuestAddress(arch::layout::ACPI);
    write_parameters(&memory, &kernel, initramfs, "console=hvc0", rsdp).unwrap();
}
