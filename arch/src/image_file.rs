//! A kernel or an initramfs on its way into guest memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    FileOffset, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile, VolatileMemoryError,
    VolatileSlice,
};

use crate::GuestMemory;

/// A file that is read into guest memory without touching the mapping of that memory: the host
/// copies from one file's pages into the other's. Reading through the mapping would fault on each
/// page, and have it filled with zeroes first.
pub(crate) struct ImageFile<'a> {
    pub(crate) file: &'a File,
    pub(crate) memory: &'a GuestMemory,
}

impl ImageFile<'_> {
    /// The file behind guest memory at this host address, and the offset in it in bytes.
    fn behind(&self, address: *const u8) -> Option<(&FileOffset, u64)> {
        self.memory.iter().find_map(|region| {
            let offset = (address as usize).checked_sub(region.as_ptr() as usize)? as u64;
            let file = region.file_offset().filter(|_| offset < region.len())?;
            Some((file, file.start() + offset))
        })
    }

    fn send(&mut self, buffer: &VolatileSlice<impl BitmapSlice>) -> Option<usize> {
        let (target, offset) = self.behind(buffer.ptr_guard().as_ptr())?;
        let mut to = target.file();
        to.seek(SeekFrom::Start(offset)).ok()?;
        rustix::fs::sendfile(to, self.file, None, buffer.len()).ok()
    }
}

impl Read for ImageFile<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl Seek for ImageFile<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl ReadVolatile for ImageFile<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        // What has no pages of its own, or fails, is read as any file, which then says why.
        match self.send(buffer) {
            Some(count) => Ok(count),
            None => self.file.read_volatile(buffer),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn both_kinds_of_memory_get_the_same_bytes() {
        let bytes: Vec<u8> = (0..70_000u32).map(|number| (number % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        // As the VMM has it: two regions in one file.
        let backing = Arc::new(tempfile::tempfile().unwrap());
        backing.set_len(8 << 20).unwrap();
        let region = |address, offset| {
            let place = FileOffset::from_arc(backing.clone(), offset);
            (GuestAddress(address), 4 << 20, Some(place))
        };
        let in_file =
            GuestMemory::from_ranges_with_files([region(0, 0), region(1 << 30, 4 << 20)]).unwrap();
        let anonymous = GuestMemory::from_ranges(&[
            (GuestAddress(0), 4 << 20),
            (GuestAddress(1 << 30), 4 << 20),
        ])
        .unwrap();
        for memory in [in_file, anonymous] {
            for start in [0, 123, (1 << 30) + 4095] {
                file.seek(SeekFrom::Start(7)).unwrap();
                let mut image = ImageFile { file: &file, memory: &memory };
                let length = bytes.len() - 7;
                memory.read_exact_volatile_from(GuestAddress(start), &mut image, length).unwrap();
                let mut read = vec![0; length + 1];
                memory.read_slice(&mut read, GuestAddress(start)).unwrap();
                assert!(read[..length] == bytes[7..] && read[length] == 0, "at {start:#x}");
                // The file has ended.
                let again = memory.read_exact_volatile_from(GuestAddress(start), &mut image, 1);
                assert!(again.is_err());
            }
        }
    }
}
