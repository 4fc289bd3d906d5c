//! Guest memory: its pieces as mappings of this process.

#![allow(unsafe_code, reason = "madvise on guest memory")]

use std::fs::File;
use std::sync::Arc;

use api_server::machine::HugePages;
use arch::memory::DirtyBitmap;
use devices::{GuestMemory, GuestRegion};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MmapAdvise, madvise};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::StartError;

/// What guest memory is like.
#[derive(Clone, Copy, Debug)]
pub struct MemoryOptions {
    /// Its size in MiB.
    pub mib: usize,
    /// Its pages.
    pub pages: HugePages,
    /// Bytes that can be plugged in, above the rest.
    pub hotplug: u64,
    /// Whether to record what the monitor writes; KVM records the rest.
    pub track_dirty_pages: bool,
}

impl MemoryOptions {
    /// Bytes of RAM.
    pub fn bytes(&self) -> Result<u64, StartError> {
        (self.mib as u64)
            .checked_mul(1 << 20)
            .filter(|size| *size <= i64::MAX as u64 / 2)
            .ok_or_else(|| self.failed("too large"))
    }

    fn failed(&self, reason: impl ToString) -> StartError {
        StartError::Memory { mib: self.mib, reason: reason.to_string() }
    }
}

/// Makes guest memory that is touched only as the guest touches it.
///
/// Pages of 4 KiB, and those of hugetlbfs, are a memfd's: a file's pages can be filled without
/// mapping them. The host's transparent huge pages are for anonymous memory.
pub fn create(options: &MemoryOptions) -> Result<GuestMemory, StartError> {
    let size = options.bytes()? + options.hotplug;
    let shared = libc::MAP_SHARED | libc::MAP_NORESERVE;
    match options.pages {
        HugePages::None => {
            let file = memfd(options, size, MFdFlags::empty())?;
            map(options, shared, Some(&file))
        }
        HugePages::Explicit => {
            let file = memfd(options, size, MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB)?;
            // Pages that are not there now would be a SIGBUS later.
            map(options, libc::MAP_SHARED, Some(&file))
        }
        HugePages::Transparent => {
            let memory = anonymous(options)?;
            advise_huge(options, &memory)?;
            Ok(memory)
        }
    }
}

/// Anonymous memory, all of it still to be touched.
pub fn anonymous(options: &MemoryOptions) -> Result<GuestMemory, StartError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    map(options, flags, None)
}

/// Memory that begins as what is in a file, read as far as it is touched, and never written back.
/// The file must not become shorter while the machine lives.
pub fn from_file(options: &MemoryOptions, file: File) -> Result<GuestMemory, StartError> {
    let size = options.bytes()? + options.hotplug;
    let length = file.metadata().map_err(|error| options.failed(error))?.len();
    if length != size {
        let reason = format!("the memory file has {length} bytes, the machine {size}");
        return Err(options.failed(reason));
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let memory = map(options, flags, Some(&Arc::new(file)))?;
    if options.pages == HugePages::Transparent {
        advise_huge(options, &memory)?;
    }
    Ok(memory)
}

/// Memory without the part that is plugged in later.
pub fn ram(memory: &GuestMemory, options: &MemoryOptions) -> Result<GuestMemory, StartError> {
    if options.hotplug == 0 {
        return Ok(memory.clone());
    }
    let start = arch::memory::above(options.bytes()?);
    let (ram, _) =
        memory.remove_region(start, options.hotplug).map_err(|error| options.failed(error))?;
    Ok(ram)
}

/// The record of what the monitor wrote to this piece of memory.
pub fn written(region: &GuestRegion) -> &DirtyBitmap {
    (**region).bitmap()
}

fn memfd(options: &MemoryOptions, size: u64, more: MFdFlags) -> Result<Arc<File>, StartError> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | more;
    let file = memfd_create("guest-memory", flags).map_err(|error| options.failed(error))?;
    let file = Arc::new(File::from(file));
    file.set_len(size).map_err(|error| options.failed(error))?;
    // Nobody may cut the file off under the mapping: that would be a SIGBUS.
    nix::fcntl::fcntl(
        &*file,
        nix::fcntl::FcntlArg::F_ADD_SEALS(
            nix::fcntl::SealFlag::F_SEAL_SHRINK | nix::fcntl::SealFlag::F_SEAL_GROW,
        ),
    )
    .map_err(|error| options.failed(error))?;
    Ok(file)
}

/// Maps the pieces of memory one after the other from a file, or without one.
fn map(
    options: &MemoryOptions,
    flags: i32,
    file: Option<&Arc<File>>,
) -> Result<GuestMemory, StartError> {
    let mut offset = 0;
    let region = |(start, length): (GuestAddress, usize)| {
        let bitmap = if options.track_dirty_pages {
            DirtyBitmap::tracking(length)
        } else {
            DirtyBitmap::default()
        };
        let mut builder = MmapRegionBuilder::new_with_bitmap(length, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags);
        if let Some(file) = file {
            builder = builder.with_file_offset(FileOffset::from_arc(file.clone(), offset));
        }
        offset += length as u64;
        let mapping = builder.build().map_err(|error| options.failed(error))?;
        GuestRegion::new(mapping, start).ok_or_else(|| options.failed("addresses overflow"))
    };
    let size = options.bytes()?;
    let mut places = arch::memory::regions(size);
    if options.hotplug > 0 {
        places.push((arch::memory::above(size), options.hotplug as usize));
    }
    let regions = places.into_iter().map(region).collect::<Result<_, _>>()?;
    GuestMemory::from_regions(regions).map_err(|error| options.failed(error))
}

fn advise_huge(options: &MemoryOptions, memory: &GuestMemory) -> Result<(), StartError> {
    for region in memory.iter() {
        let start = std::ptr::NonNull::new(region.as_ptr().cast())
            .ok_or_else(|| options.failed("no mapping"))?;
        // SAFETY: the range is one whole mapping of guest memory, which this call only gives a
        // property; its contents stay.
        unsafe { madvise(start, region.len() as usize, MmapAdvise::MADV_HUGEPAGE) }
            .map_err(|error| options.failed(format!("transparent huge pages: {error}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    fn options(mib: usize) -> MemoryOptions {
        MemoryOptions { mib, pages: HugePages::None, hotplug: 0, track_dirty_pages: false }
    }

    #[test]
    fn five_gib_are_two_regions_and_cost_nothing_untouched() {
        for pages in [HugePages::None, HugePages::Transparent] {
            let memory = create(&MemoryOptions { pages, ..options(5 << 10) }).unwrap();
            assert_eq!(memory.num_regions(), 2);
            let last = GuestAddress((6 << 30) - 8);
            memory.write_obj(7u64, last).unwrap();
            assert_eq!(memory.read_obj::<u64>(last).unwrap(), 7);
            assert!(memory.write_obj(7u8, GuestAddress(6 << 30)).is_err());
            assert!(memory.write_obj(7u8, GuestAddress(3 << 30)).is_err());
        }
    }

    #[test]
    fn hostile_25_memory_from_a_file_is_as_long_as_the_file_and_leaves_it_alone() {
        let file = tempfile::tempfile().unwrap();
        file.set_len((1 << 20) - 1).unwrap();
        assert!(from_file(&options(1), file.try_clone().unwrap()).is_err());
        file.set_len(1 << 20).unwrap();
        let memory = from_file(&options(1), file.try_clone().unwrap()).unwrap();
        memory.write_obj(7u8, GuestAddress(5)).unwrap();
        let mut byte = [1];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 5).unwrap();
        assert_eq!(byte, [0]);
    }

    #[test]
    fn hostile_23_absurd_sizes_are_errors() {
        for mib in [usize::MAX, usize::MAX >> 20, 1 << 43] {
            assert!(create(&options(mib)).is_err(), "{mib}");
        }
    }
}
