//! Guest memory in a file: the pieces of memory one after the other, as Firecracker has it. Pages
//! that were never touched are holes.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use devices::host_file::{self, Access};
use devices::{GuestMemory, GuestRegion};
use rustix::fs::SeekFrom as Find;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, WriteVolatile};

const PAGE: usize = 4096;
/// Bytes looked at, or written, at once.
const STEP: usize = 64 * PAGE;

/// Pages of each region, in order, one bit each.
pub type DirtyPages = Vec<Vec<u64>>;

/// Writes all of memory.
pub fn write_full(memory: &GuestMemory, path: &Path) -> io::Result<()> {
    let mut target = open(path)?;
    // The very file that memory is mapped from must keep its length, and needs its zeroes too.
    let in_place = is_backing(memory, &target)?;
    if !in_place {
        target.set_len(0)?;
    }
    target.set_len(size(memory))?;
    let mut base = 0;
    for region in memory.iter() {
        for (offset, length) in touched(region)? {
            for at in (offset..offset + length).step_by(STEP) {
                let part = STEP.min(offset + length - at);
                if in_place || !is_zero(region, at, part)? {
                    copy(region, at, part, &mut target, base)?;
                }
            }
        }
        base += region.len();
    }
    Ok(())
}

/// Writes these pages only, into a file of the whole memory's size: one that has that size already
/// keeps what it has elsewhere, and so becomes the newer state.
pub fn write_diff(memory: &GuestMemory, pages: &DirtyPages, path: &Path) -> io::Result<()> {
    let mut target = open(path)?;
    if target.metadata()?.len() != size(memory) {
        target.set_len(0)?;
        target.set_len(size(memory))?;
    }
    let mut base = 0;
    for (region, dirty) in memory.iter().zip(pages) {
        for (offset, length) in runs(dirty) {
            let length = length.min((region.len() as usize).saturating_sub(offset));
            copy(region, offset, length, &mut target, base)?;
        }
        base += region.len();
    }
    Ok(())
}

/// Bytes of all of memory.
fn size(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = host_file::open_with(path, Access::ReadWrite, &options)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

fn is_backing(memory: &GuestMemory, file: &File) -> io::Result<bool> {
    let own = file.metadata()?;
    for region in memory.iter() {
        if let Some(place) = region.file_offset() {
            let other = place.file().metadata()?;
            if (own.dev(), own.ino()) == (other.dev(), other.ino()) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Ranges of a region, offset and length in bytes, that may be something else than zeroes: what its
/// file knows of, where all of it is the file's.
fn touched(region: &GuestRegion) -> io::Result<Vec<(usize, usize)>> {
    let whole = vec![(0, region.len() as usize)];
    let Some(place) = region.file_offset().filter(|_| region.flags() & libc::MAP_SHARED != 0)
    else {
        return Ok(whole);
    };
    let (start, end) = (place.start(), place.start() + region.len());
    let (mut ranges, mut at) = (Vec::new(), start);
    while at < end {
        let data = match rustix::fs::seek(place.file(), Find::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            // The file system does not tell.
            Err(_) => return Ok(whole),
        };
        if data >= end {
            break;
        }
        let hole = rustix::fs::seek(place.file(), Find::Hole(data))?.min(end);
        ranges.push(((data - start) as usize, (hole - data) as usize));
        at = hole;
    }
    Ok(ranges)
}

fn is_zero(region: &GuestRegion, offset: usize, length: usize) -> io::Result<bool> {
    let mut bytes = [0; PAGE];
    for at in (offset..offset + length).step_by(PAGE) {
        let slice = region
            .get_slice(MemoryRegionAddress(at as u64), PAGE.min(offset + length - at))
            .map_err(io::Error::other)?;
        slice.copy_to(&mut bytes[..slice.len()]);
        if bytes[..slice.len()].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn copy(
    region: &GuestRegion,
    offset: usize,
    length: usize,
    target: &mut File,
    base: u64,
) -> io::Result<()> {
    let slice =
        region.get_slice(MemoryRegionAddress(offset as u64), length).map_err(io::Error::other)?;
    target.seek(SeekFrom::Start(base + offset as u64))?;
    target.write_all_volatile(&slice).map_err(io::Error::other)
}

/// Runs of set bits, as offsets and lengths in bytes.
fn runs(bits: &[u64]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, word) in bits.iter().enumerate() {
        let mut left = *word;
        while left != 0 {
            let bit = left.trailing_zeros() as usize;
            left &= left - 1;
            let offset = (index * 64 + bit) * PAGE;
            match runs.last_mut() {
                Some((start, length)) if *start + *length == offset => *length += PAGE,
                _ => runs.push((offset, PAGE)),
            }
        }
    }
    runs
}

/// Puts pages back into the monitor's own record: they are to be in the next difference.
pub fn remember(memory: &GuestMemory, pages: &DirtyPages) {
    for (region, dirty) in memory.iter().zip(pages) {
        for (offset, length) in runs(dirty) {
            region.bitmap().mark_dirty(offset, length);
        }
    }
}

#[cfg(test)]
mod tests {
    use api_server::machine::HugePages;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{self, MemoryOptions};

    const OPTIONS: MemoryOptions =
        MemoryOptions { mib: 4, pages: HugePages::None, hotplug: 0, track_dirty_pages: true };

    fn load(path: &Path) -> GuestMemory {
        memory::from_file(&OPTIONS, File::open(path).unwrap()).unwrap()
    }

    fn get(memory: &GuestMemory, address: u64) -> u32 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn a_full_file_has_every_byte_and_no_page_that_was_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        // What was there before is gone.
        std::fs::write(&path, vec![1; 5 << 20]).unwrap();
        for pages in [HugePages::None, HugePages::Transparent] {
            let memory = memory::create(&MemoryOptions { pages, ..OPTIONS }).unwrap();
            for address in [0u32, 5000, 1 << 20, (4 << 20) - 4] {
                memory.write_obj(address + 1, GuestAddress(address.into())).unwrap();
            }
            write_full(&memory, &path).unwrap();
            let restored = load(&path);
            for address in [0, 5000, 1 << 20, (4 << 20) - 4] {
                assert_eq!(get(&restored, address), address as u32 + 1);
            }
            assert_eq!(get(&restored, 2 << 20), 0);
            let disk = std::fs::metadata(&path).unwrap().blocks() * 512;
            assert!(disk < 2 << 20, "{disk}");
        }
    }

    #[test]
    fn a_machine_can_be_written_over_the_file_it_came_from() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let memory = memory::create(&OPTIONS).unwrap();
        memory.write_obj(1u32, GuestAddress(0)).unwrap();
        memory.write_obj(2u32, GuestAddress(1 << 20)).unwrap();
        write_full(&memory, &path).unwrap();
        let restored = load(&path);
        restored.write_obj(0u32, GuestAddress(0)).unwrap();
        restored.write_obj(3u32, GuestAddress(2 << 20)).unwrap();
        write_full(&restored, &path).unwrap();
        let again = load(&path);
        let found = [0, 1 << 20, 2 << 20].map(|address| get(&again, address));
        assert_eq!(found, [0, 2, 3]);
    }

    #[test]
    fn a_difference_has_what_was_written_and_lies_over_what_there_was() {
        let folder = tempfile::tempdir().unwrap();
        let (base, diff) = (folder.path().join("base"), folder.path().join("diff"));
        let memory = memory::create(&OPTIONS).unwrap();
        memory.write_obj(1u32, GuestAddress(0)).unwrap();
        write_full(&memory, &base).unwrap();
        let taken = |memory: &GuestMemory| -> DirtyPages {
            memory.iter().map(|region| memory::written(region).take()).collect()
        };
        taken(&memory);
        memory.write_obj(2u32, GuestAddress(4096 * 70)).unwrap();
        memory.write_obj(3u32, GuestAddress(4096 * 71)).unwrap();
        let pages = taken(&memory);
        assert_eq!(runs(&pages[0]), [(4096 * 70, 4096 * 2)]);
        write_diff(&memory, &pages, &diff).unwrap();
        write_diff(&memory, &pages, &base).unwrap();
        let (alone, merged) = (load(&diff), load(&base));
        assert_eq!((get(&alone, 0), get(&alone, 4096 * 70)), (0, 2));
        assert_eq!((get(&merged, 0), get(&merged, 4096 * 71)), (1, 3));
        // What could not be written is in the next one.
        assert!(taken(&memory)[0].iter().all(|word| *word == 0));
        remember(&memory, &pages);
        assert_eq!(taken(&memory), pages);
    }
}
