//! Good and hostile kernels, made by hand.

use std::io::Write;

use proptest::prelude::*;

use super::*;

fn memory(size: u64) -> GuestMemory {
    GuestMemory::from_ranges(&memory::regions(size)).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An ELF file of one segment and one note, as many bytes as it takes.
struct ElfFile {
    entry: u64,
    segment: (u64, u64, u64), // offset, address, size in the file
    note: Vec<u8>,
}

impl Default for ElfFile {
    fn default() -> Self {
        let mut note = Vec::new();
        for word in [4u32, 4, 18] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        note.extend_from_slice(b"Xen\0");
        note.extend_from_slice(&0x10_0010u32.to_le_bytes());
        ElfFile { entry: 0x10_0000, segment: (0x200, 0x10_0000, 64), note }
    }
}

impl ElfFile {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; 0x240];
        bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        bytes[16..20].copy_from_slice(&[2, 0, 62, 0]);
        bytes[24..32].copy_from_slice(&self.entry.to_le_bytes());
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[52..58].copy_from_slice(&[64, 0, 56, 0, 2, 0]);
        let mut header = |at: usize, kind: u32, offset: u64, address: u64, size: u64| {
            bytes[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            for (index, word) in [offset, address, address, size, size].iter().enumerate() {
                let at = at + 8 + index * 8;
                bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
        };
        header(64, 1, self.segment.0, self.segment.1, self.segment.2);
        header(64 + 56, 4, 0x100, 0, self.note.len() as u64);
        bytes[0x100..0x100 + self.note.len()].copy_from_slice(&self.note);
        bytes
    }
}

#[test]
fn an_elf_kernel_is_entered_by_its_pvh_note() {
    let memory = memory(64 << 20);
    let kernel = load_kernel(&memory, &mut file(&ElfFile::default().bytes())).unwrap();
    assert_eq!(kernel.entry, Entry::Pvh(GuestAddress(0x10_0010)));
    let initramfs = load_initramfs(&memory, &kernel, &mut file(&[7; 5000])).unwrap();
    assert_eq!(initramfs.address.0, (64 << 20) - 0x2000);
    write_parameters(&memory, &kernel, Some(initramfs), "quiet", GuestAddress(layout::ACPI))
        .unwrap();
    let info: hvm_start_info = memory.read_obj(GuestAddress(layout::PVH_START_INFO)).unwrap();
    assert_eq!((info.nr_modules, info.memmap_entries, info.rsdp_paddr), (1, 3, layout::ACPI));
    let mut text = [0; 6];
    memory.read_slice(&mut text, GuestAddress(layout::COMMAND_LINE)).unwrap();
    assert_eq!(&text, b"quiet\0");
}

#[test]
fn hostile_22_segments_and_entries_outside_memory_are_refused() {
    let memory = memory(64 << 20);
    for segment in [
        (0x200, 0, u64::MAX),
        (0x200, u64::MAX, 64),
        (0x200, 64 << 20, 64),
        (0x200, (64 << 20) - 1, 64),
        (u64::MAX, 0x10_0000, 64),
        (0x10_0000, 0x10_0000, 64),
        (0x200, 0x10_0000, 0x10_0000),
    ] {
        let elf = ElfFile { segment, ..Default::default() };
        assert!(load_kernel(&memory, &mut file(&elf.bytes())).is_err(), "{segment:x?}");
    }
    let mut elf = ElfFile { entry: 0x1000, ..Default::default() };
    assert!(load_kernel(&memory, &mut file(&elf.bytes())).is_err());
    elf = ElfFile::default();
    for entry in [0u32, 0x1000, u32::MAX] {
        elf.note[16..20].copy_from_slice(&entry.to_le_bytes());
        let error = load_kernel(&memory, &mut file(&elf.bytes())).unwrap_err();
        assert!(matches!(error, BootError::EntryOutside(_)), "{error}");
    }
}

#[test]
fn hostile_22_a_note_of_odd_size_is_refused() {
    let memory = memory(64 << 20);
    for size in [0usize, 1, 11, 12, 15] {
        let mut elf = ElfFile::default();
        elf.note.truncate(size);
        assert!(load_kernel(&memory, &mut file(&elf.bytes())).is_err(), "{size}");
    }
    for (at, value) in [(0, u32::MAX), (4, u32::MAX), (4, 5), (0, 3)] {
        let mut elf = ElfFile::default();
        elf.note[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let _ = load_kernel(&memory, &mut file(&elf.bytes()));
    }
}

fn bzimage() -> Vec<u8> {
    let mut bytes = vec![0; 512 * 5 + 4096];
    bytes[0x1f1] = 4;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    bytes[0x211] = 1;
    bytes[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    bytes[0x236..0x238].copy_from_slice(&1u16.to_le_bytes());
    bytes[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    bytes[0x260..0x264].copy_from_slice(&0x200_0000u32.to_le_bytes());
    bytes
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry() {
    let memory = memory(64 << 20);
    let kernel = load_kernel(&memory, &mut file(&bzimage())).unwrap();
    assert_eq!(kernel.entry, Entry::Linux64(GuestAddress(0x10_0200)));
    assert_eq!(kernel.end, 0x300_0000);
    write_parameters(&memory, &kernel, None, "x", GuestAddress(layout::ACPI)).unwrap();
    let page: boot_params = memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
    assert_eq!({ page.e820_entries }, 3);
}

#[test]
fn hostile_22_bad_bzimages_are_refused() {
    let memory = memory(64 << 20);
    let with = |at: usize, bytes: &[u8]| {
        let mut image = bzimage();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        load_kernel(&memory, &mut file(&image))
    };
    // setup_sects 0 means 4.
    assert!(with(0x1f1, &[0]).is_ok());
    assert!(with(0x1f1, &[0xff]).is_err());
    assert!(with(0x202, b"HdrX").is_err());
    assert!(with(0x206, &[0, 1]).is_err());
    assert!(with(0x236, &[0, 0]).is_err());
    assert!(with(0x258, &[0xff; 8]).is_err());
    assert!(with(0x260, &[0xff; 4]).is_err());
    assert!(load_kernel(&memory, &mut file(&bzimage()[..0x210])).is_err());
    assert!(load_kernel(&memory, &mut file(b"")).is_err());
    assert!(load_kernel(&memory, &mut file(b"text")).is_err());
}

#[test]
fn hostile_22_an_initramfs_larger_than_memory_is_refused() {
    let memory = memory(64 << 20);
    let kernel = load_kernel(&memory, &mut file(&ElfFile::default().bytes())).unwrap();
    let mut image = tempfile::tempfile().unwrap();
    for size in [64u64 << 20, 63 << 20 | 0xfffff, 1 << 40] {
        image.set_len(size).unwrap();
        let error = load_initramfs(&memory, &kernel, &mut image).unwrap_err();
        assert!(matches!(error, BootError::InitramfsTooLarge { .. }), "{error}");
    }
}

#[test]
fn hostile_22_a_command_line_must_fit_and_be_ascii() {
    assert!(check_command_line(&"x".repeat(2047)).is_ok());
    assert!(check_command_line(&"x".repeat(2048)).is_err());
    assert!(check_command_line("naïve").is_err());
    assert!(check_command_line("a\nb").is_err());
    assert!(check_command_line("a\0b").is_err());
}

proptest! {
    /// docs/hostile.md 22: whatever a header says, the loader returns.
    #[test]
    fn hostile_22_mangled_headers_never_panic(
        at in 0usize..0x240, bytes in proptest::collection::vec(any::<u8>(), 1..9), elf: bool,
    ) {
        let mut image = if elf { ElfFile::default().bytes() } else { bzimage() };
        for (to, from) in image[at..].iter_mut().zip(bytes) {
            *to = from;
        }
        let memory = memory(16 << 20);
        if let Ok(kernel) = load_kernel(&memory, &mut file(&image)) {
            let _ = load_initramfs(&memory, &kernel, &mut file(&[1; 100]));
            let _ = write_parameters(&memory, &kernel, None, "x", GuestAddress(layout::ACPI));
        }
    }
}
