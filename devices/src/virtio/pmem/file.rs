//! A file mapped into memory, to be memory of the guest.

#![allow(unsafe_code, reason = "maps a file over reserved addresses")]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use vm_memory::MmapRegion;

use crate::host_file;

/// What size and address of persistent memory are a multiple of, in bytes: Linux makes nothing
/// smaller memory of its own.
pub const ALIGNMENT: u64 = 2 << 20;

/// Why a file cannot be persistent memory.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// It cannot be opened.
    #[error("cannot open {path}: {error}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// A FIFO, a directory, a socket.
    #[error("{0} is neither a regular file nor a block device")]
    Kind(PathBuf),
    /// Nothing to map.
    #[error("{0} is empty")]
    Empty(PathBuf),
    /// It cannot be mapped, or is larger than an address space.
    #[error("cannot map {path}: {error}")]
    Map {
        /// The file.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
}

/// A file mapped into memory, as long as it was when it was opened.
///
/// Nothing here reads or writes the mapping: a page that the host cannot provide is a `SIGBUS` to
/// whoever touches it, be it that the file was cut off meanwhile or that its disk is full. Where it
/// is the guest that touches it, `KVM_RUN` fails with `EFAULT`. For the same reason the mapping must
/// not become part of [`GuestMemory`](crate::GuestMemory), which devices write to.
#[derive(Debug)]
pub struct PmemFile {
    path: PathBuf,
    file: File,
    /// Bytes of the file.
    length: u64,
    mapping: MmapRegion,
    read_only: bool,
}

impl PmemFile {
    /// Opens and maps a file. Where it is read-only, so are the descriptor and the mapping: the
    /// guest's word is not needed.
    ///
    /// Its size is rounded up to 2 MiB. The guest may use what is behind the end of the file as
    /// memory; it reads as zero at first, and none of it is kept.
    pub fn open(path: &Path, read_only: bool) -> Result<PmemFile, PmemError> {
        let failed = |error| PmemError::Open { path: path.to_owned(), error };
        let (file, length) = host_file::open(path, read_only)
            .map_err(failed)?
            .ok_or_else(|| PmemError::Kind(path.to_owned()))?;
        if length == 0 {
            return Err(PmemError::Empty(path.to_owned()));
        }
        let mapping = map(&file, length, read_only)
            .map_err(|error| PmemError::Map { path: path.to_owned(), error })?;
        if !length.is_multiple_of(ALIGNMENT) {
            tracing::warn!(
                "{}: the guest has {} bytes behind the end of the file, which are not kept",
                path.display(),
                mapping.size() as u64 - length
            );
        }
        Ok(PmemFile { path: path.to_owned(), file, length, mapping, read_only })
    }

    /// Where it is mapped, for a memory slot of KVM. The mapping lasts as long as this value does.
    pub fn host_address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// Bytes of the mapping, a multiple of 2 MiB.
    pub fn size(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// Whether the guest cannot write, so that the memory slot must be read-only too.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes all that the guest has written durable. Fails where the file is shorter than what is
    /// mapped of it: what was behind its end is lost.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only {
            // Nothing can have been written.
            return Ok(());
        }
        if (&self.file).seek(SeekFrom::End(0))? < self.length {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file was cut off"));
        }
        self.file.sync_data()
    }
}

/// Maps a file of so many bytes, and zeroes behind it up to the next 2 MiB.
fn map(file: &File, length: u64, read_only: bool) -> io::Result<MmapRegion> {
    let too_large = || io::Error::from(Errno::EOVERFLOW);
    let size = length.checked_next_multiple_of(ALIGNMENT).ok_or_else(too_large)?;
    let size = usize::try_from(size).map_err(|_| too_large())?;
    let length = usize::try_from(length).ok().and_then(NonZeroUsize::new).ok_or_else(too_large)?;
    let writable = if read_only { ProtFlags::empty() } else { ProtFlags::PROT_WRITE };
    let protection = ProtFlags::PROT_READ | writable;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let mapping =
        MmapRegion::build(None, size, protection.bits(), flags).map_err(io::Error::other)?;
    let start = NonZeroUsize::new(mapping.as_ptr() as usize);
    // SAFETY: the file is mapped over pages that `mapping` has just got from the kernel and that
    // nobody else knows: `length`, rounded up to a page, is not more than `size`, which is a
    // multiple of it. When `mapping` unmaps them, it unmaps the file as well.
    unsafe {
        mmap(start, length, protection, MapFlags::MAP_SHARED | MapFlags::MAP_FIXED, file, 0)?
    };
    Ok(mapping)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use vm_memory::{Bytes, VolatileMemory};

    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn read(pmem: &PmemFile, offset: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0xff; length];
        pmem.mapping.as_volatile_slice().read_slice(&mut bytes, offset).unwrap();
        bytes
    }

    /// The permissions of the mapping, as the kernel shows them.
    fn permissions(pmem: &PmemFile, offset: u64) -> String {
        let at = pmem.host_address() + offset;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let found = maps.lines().find_map(|line| {
            let (range, rest) = line.split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let [start, end] = [start, end].map(|at| u64::from_str_radix(at, 16).unwrap());
            (start..end).contains(&at).then(|| rest[..4].to_owned())
        });
        found.unwrap()
    }

    #[test]
    fn a_file_is_memory_and_memory_is_the_file() {
        let file = file(&[7; 5000]);
        let pmem = PmemFile::open(file.path(), false).unwrap();
        assert_eq!(pmem.size(), ALIGNMENT);
        assert_eq!(pmem.path(), file.path());
        assert!(!pmem.read_only());
        assert_eq!(read(&pmem, 4999, 2), [7, 0]);
        pmem.mapping.as_volatile_slice().write_slice(&[1, 2, 3], 100).unwrap();
        pmem.flush().unwrap();
        let mut bytes = [0; 3];
        file.as_file().read_exact_at(&mut bytes, 100).unwrap();
        assert_eq!(bytes, [1, 2, 3]);
        // Nor has it grown.
        assert_eq!(file.as_file().metadata().unwrap().len(), 5000);
    }

    #[test]
    fn what_is_behind_the_file_is_zero_and_may_be_used() {
        for length in [1, 4095, 4096, 4097, ALIGNMENT - 1] {
            let file = file(&vec![7; length as usize]);
            let pmem = PmemFile::open(file.path(), false).unwrap();
            assert_eq!(pmem.size(), ALIGNMENT);
            let rest = (ALIGNMENT - length) as usize;
            assert_eq!(read(&pmem, length as usize, rest), vec![0; rest]);
            let last = ALIGNMENT as usize - 1;
            pmem.mapping.as_volatile_slice().write_slice(&[9], last).unwrap();
            assert_eq!(read(&pmem, last, 1), [9]);
            pmem.flush().unwrap();
            assert_eq!(std::fs::read(file.path()).unwrap(), vec![7; length as usize]);
        }
    }

    #[test]
    fn sizes_are_whole_multiples_of_two_mebibytes() {
        for (length, size) in [
            (1, ALIGNMENT),
            (ALIGNMENT, ALIGNMENT),
            (ALIGNMENT + 1, 2 * ALIGNMENT),
            (1 << 32, 1 << 32),
        ] {
            let file = file(&[]);
            file.as_file().set_len(length).unwrap();
            assert_eq!(PmemFile::open(file.path(), false).unwrap().size(), size);
        }
    }

    #[test]
    fn a_read_only_file_cannot_be_written_even_by_us() {
        let file = file(&[7; 5000]);
        let pmem = PmemFile::open(file.path(), true).unwrap();
        assert!(pmem.read_only());
        assert_eq!(read(&pmem, 4999, 2), [7, 0]);
        assert_eq!(permissions(&pmem, 0), "r--s");
        assert_eq!(permissions(&pmem, ALIGNMENT - 1), "r--p");
        assert!((&pmem.file).write_all(b"x").is_err());
        pmem.flush().unwrap();
        let pmem = PmemFile::open(file.path(), false).unwrap();
        assert_eq!(permissions(&pmem, 0), "rw-s");
        assert_eq!(permissions(&pmem, ALIGNMENT - 1), "rw-p");
    }

    #[test]
    fn hostile_26_a_file_that_was_cut_off_is_not_flushed() {
        let file = file(&[7; 8192]);
        let pmem = PmemFile::open(file.path(), false).unwrap();
        file.as_file().set_len(8191).unwrap();
        assert_eq!(pmem.flush().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        file.as_file().set_len(100_000).unwrap();
        pmem.flush().unwrap();
        assert_eq!(pmem.size(), ALIGNMENT);
    }

    #[test]
    fn hostile_23_what_is_no_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        for read_only in [false, true] {
            let open = |path: &Path| PmemFile::open(path, read_only).unwrap_err();
            let directory = open(folder.path());
            assert!(matches!(directory, PmemError::Kind(_) | PmemError::Open { .. }));
            assert!(matches!(open(&fifo), PmemError::Kind(_) | PmemError::Open { .. }));
            assert!(matches!(open(Path::new("/dev/null")), PmemError::Kind(_)));
            assert!(matches!(open(&folder.path().join("none")), PmemError::Open { .. }));
            assert!(matches!(open(file(&[]).path()), PmemError::Empty(_)));
        }
    }

    #[test]
    fn a_file_larger_than_an_address_space_is_refused() {
        let file = file(&[]);
        // Not every file system can hold one.
        if file.as_file().set_len(1 << 56).is_ok() {
            let error = PmemFile::open(file.path(), true).unwrap_err();
            assert!(matches!(error, PmemError::Map { .. }));
        }
    }
}
