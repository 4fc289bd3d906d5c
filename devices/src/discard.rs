//! Giving guest memory back to the host.

#![allow(unsafe_code, reason = "madvise on guest memory")]

use std::ptr::NonNull;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MmapAdvise, madvise};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};

use crate::{GuestMemory, GuestRegion};

/// Bytes of a page, of the host and of the guest.
pub const PAGE: u64 = 4096;

/// Why a range of guest memory was not given back.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DiscardError {
    /// Not all of it is guest memory. Nothing was given back.
    #[error("{length} bytes at {start:#x} are not all guest memory")]
    Outside {
        /// First address.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// The host did not take it. What came before may have been given back.
    #[error("the host did not take back {length} bytes at {start:#x}: {error}")]
    Host {
        /// First address of the part that it refused.
        start: u64,
        /// Bytes of it.
        length: u64,
        /// What it says.
        error: Errno,
    },
}

/// Gives the whole pages in `length` bytes from `start` on back to the host. What the guest finds
/// there afterwards is not defined: zeroes, or, where memory is a private mapping of a snapshot's
/// file, what is in that file.
///
/// Neither KVM's dirty log nor anything else records this as a write to memory.
pub fn discard(memory: &GuestMemory, start: GuestAddress, length: u64) -> Result<(), DiscardError> {
    let outside = || DiscardError::Outside { start: start.0, length };
    let end = start.checked_add(length).ok_or_else(outside)?.0;
    if !memory.check_range(start, usize::try_from(length).map_err(|_| outside())?) {
        return Err(outside());
    }
    let mut at = start.0.checked_next_multiple_of(PAGE).ok_or_else(outside)?;
    let end = end - end % PAGE;
    // A range may go on in the next region.
    while at < end {
        let region = memory.find_region(GuestAddress(at)).ok_or_else(outside)?;
        let offset = at - region.start_addr().0;
        let part = (region.len() - offset).min(end - at);
        discard_in(region, offset, part).map_err(|error| DiscardError::Host {
            start: at,
            length: part,
            error,
        })?;
        at += part;
    }
    Ok(())
}

/// The same for so many bytes from this offset into a region on. Both are whole pages.
fn discard_in(region: &GuestRegion, offset: u64, length: u64) -> Result<(), Errno> {
    if region.flags() & libc::MAP_SHARED != 0
        && let Some(file) = region.file_offset()
    {
        // The pages are the file's: unmapping them would free nothing.
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let start = file.start().checked_add(offset).ok_or(Errno::EOVERFLOW)?;
        let place = |value: u64| libc::off_t::try_from(value).map_err(|_| Errno::EOVERFLOW);
        return fallocate(file.file(), mode, place(start)?, place(length)?);
    }
    let slice = region
        .get_slice(MemoryRegionAddress(offset), length as usize)
        .map_err(|_| Errno::EFAULT)?;
    let guard = slice.ptr_guard_mut();
    let start = NonNull::new(guard.as_ptr().cast()).ok_or(Errno::EFAULT)?;
    // SAFETY: vm-memory has checked that the range is inside one mapping, which `region` keeps alive,
    // and it begins and ends between pages. The mapping stays: only what is read from it changes, as
    // it does whenever the guest writes, and so nothing holds references into guest memory.
    unsafe { madvise(start, slice.len(), MmapAdvise::MADV_DONTNEED) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::sync::Arc;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, FileOffset};

    use super::*;

    const BASE: u64 = 0x10_0000;
    const PAGES: u64 = 8;

    /// Guest memory of two regions side by side, every byte 1, shared with a file.
    fn shared() -> (GuestMemory, Arc<File>) {
        let file = memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap();
        let file = Arc::new(File::from(file));
        file.set_len((PAGES + 1) * PAGE).unwrap();
        let half = PAGES / 2 * PAGE;
        // The first page of the file is not guest memory.
        let place = |offset| Some(FileOffset::from_arc(file.clone(), PAGE + offset));
        let memory = GuestMemory::from_ranges_with_files([
            (GuestAddress(BASE), half as usize, place(0)),
            (GuestAddress(BASE + half), half as usize, place(half)),
        ]);
        file.write_all_at(&[1; PAGE as usize], 0).unwrap();
        (filled(memory.unwrap()), file)
    }

    fn filled(memory: GuestMemory) -> GuestMemory {
        memory.write_slice(&vec![1; (PAGES * PAGE) as usize], GuestAddress(BASE)).unwrap();
        memory
    }

    /// The first byte of each page.
    fn pages(memory: &GuestMemory) -> Vec<u8> {
        let at = |page| GuestAddress(BASE + page * PAGE);
        (0..PAGES).map(|page| memory.read_obj(at(page)).unwrap()).collect()
    }

    #[test]
    fn shared_memory_leaves_the_file_across_regions() {
        let (memory, file) = shared();
        let before = file.metadata().unwrap().blocks();
        discard(&memory, GuestAddress(BASE + 3 * PAGE), 3 * PAGE).unwrap();
        // Before anything is read: that would put an empty page there.
        assert_eq!(before - file.metadata().unwrap().blocks(), 3 * PAGE / 512);
        assert_eq!(pages(&memory), [1, 1, 1, 0, 0, 0, 1, 1]);
        assert_eq!(file.metadata().unwrap().len(), (PAGES + 1) * PAGE);
        // The guest may use the page again.
        memory.write_obj(7u8, GuestAddress(BASE + 3 * PAGE)).unwrap();
        assert_eq!(pages(&memory)[3], 7);
    }

    #[test]
    fn anonymous_memory_is_emptied() {
        let regions = [(GuestAddress(BASE), (PAGES * PAGE) as usize)];
        let memory = filled(GuestMemory::from_ranges(&regions).unwrap());
        discard(&memory, GuestAddress(BASE), 2 * PAGE).unwrap();
        discard(&memory, GuestAddress(BASE + (PAGES - 1) * PAGE), PAGE).unwrap();
        assert_eq!(pages(&memory), [0, 0, 1, 1, 1, 1, 1, 0]);
    }

    #[test]
    fn a_private_mapping_forgets_and_its_file_stays() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![9; (PAGES * PAGE) as usize], 0).unwrap();
        let region = MmapRegionBuilder::new((PAGES * PAGE) as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file.try_clone().unwrap(), 0))
            .build()
            .unwrap();
        let region = GuestRegion::new(region, GuestAddress(BASE)).unwrap();
        let memory = filled(GuestMemory::from_regions(vec![region]).unwrap());
        discard(&memory, GuestAddress(BASE + PAGE), PAGE).unwrap();
        assert_eq!(pages(&memory), [1, 9, 1, 1, 1, 1, 1, 1]);
        let mut bytes = vec![0; (PAGES * PAGE) as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 9));
    }

    #[test]
    fn pages_of_which_a_part_is_kept_are_kept() {
        let (memory, _file) = shared();
        discard(&memory, GuestAddress(BASE + 1), 3 * PAGE).unwrap();
        assert_eq!(pages(&memory), [1, 0, 0, 1, 1, 1, 1, 1]);
        for (start, length) in [(PAGE - 1, PAGE), (PAGE, PAGE - 1), (5, 0), (4 * PAGE - 1, 2)] {
            discard(&memory, GuestAddress(BASE + 3 * PAGE + start), length).unwrap();
        }
        assert_eq!(pages(&memory), [1, 0, 0, 1, 1, 1, 1, 1]);
    }

    #[test]
    fn hostile_13_what_is_not_all_memory_is_refused_and_untouched() {
        let (memory, _file) = shared();
        for (start, length) in [
            (0, PAGE),
            (BASE - PAGE, 2 * PAGE),
            (BASE, (PAGES + 1) * PAGE),
            (BASE, u64::MAX),
            (u64::MAX, 1),
            (u64::MAX - PAGE, PAGE),
            (BASE + PAGES * PAGE, PAGE),
        ] {
            let refused = Err(DiscardError::Outside { start, length });
            assert_eq!(discard(&memory, GuestAddress(start), length), refused);
        }
        assert_eq!(pages(&memory), [1; PAGES as usize]);
    }

    #[test]
    fn what_the_host_refuses_is_said() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(PAGE).unwrap();
        // Read-only: the file cannot be punched.
        let readable = File::open(file.path()).unwrap();
        let region = MmapRegionBuilder::new(PAGE as usize)
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_SHARED)
            .with_file_offset(FileOffset::new(readable, 0))
            .build()
            .unwrap();
        let region = GuestRegion::new(region, GuestAddress(0)).unwrap();
        let memory = GuestMemory::from_regions(vec![region]).unwrap();
        let error = discard(&memory, GuestAddress(0), PAGE).unwrap_err();
        assert_eq!(error, DiscardError::Host { start: 0, length: PAGE, error: Errno::EBADF });
    }
}
