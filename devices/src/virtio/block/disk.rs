//! A raw file as a disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

use super::request::{HEADER, ID, Operation, SectorRange};
use crate::GuestMemory;
use crate::virtio::queue::{Buffers, Chain};
use crate::virtio::vectored;

const SECTOR: u64 = 512;
/// Most pieces of guest memory handed to one system call (Linux: `UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
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
    /// Less than a sector.
    #[error("{0} is smaller than one sector of 512 bytes")]
    TooSmall(PathBuf),
}

/// A disk, as long as the file was when it was opened.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Disk {
    /// Opens a file. A read-only disk is opened so on the host too: the guest's word is not needed.
    /// Bytes behind the last whole sector are out of reach.
    pub fn open(path: &Path, read_only: bool) -> Result<Disk, DiskError> {
        let failed = |error| DiskError::Open { path: path.to_owned(), error };
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            // A FIFO would block here for ever.
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let size = if metadata.is_file() {
            metadata.len()
        } else if metadata.file_type().is_block_device() {
            use std::io::{Seek, SeekFrom};
            (&file).seek(SeekFrom::End(0)).map_err(failed)?
        } else {
            return Err(DiskError::Kind(path.to_owned()));
        };
        if size < SECTOR {
            return Err(DiskError::TooSmall(path.to_owned()));
        }
        if !size.is_multiple_of(SECTOR) {
            tracing::warn!(
                "{}: the last {} bytes are no whole sector",
                path.display(),
                size % SECTOR
            );
        }
        Ok(Disk { file, sectors: size / SECTOR, read_only })
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether nothing can be written.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Carries out a request; the number of bytes written to the guest.
    pub fn run(
        &self,
        request: &Operation,
        memory: &GuestMemory,
        chain: &Chain,
        id: &str,
    ) -> io::Result<usize> {
        match request {
            Operation::Read { sector, length } => {
                let offset = self.place(*sector, *length as u64)?;
                self.transfer(memory, &chain.writable, 0, *length, offset, Direction::FromFile)?;
                Ok(*length)
            }
            Operation::Write { sector, length } => {
                self.writable()?;
                let offset = self.place(*sector, *length as u64)?;
                let buffers = &chain.readable;
                self.transfer(memory, buffers, HEADER, *length, offset, Direction::ToFile)?;
                Ok(0)
            }
            Operation::Flush if self.read_only => Ok(0),
            Operation::Flush => self.file.sync_data().map(|()| 0),
            Operation::GetId => {
                let mut bytes = [0; ID];
                for (to, from) in bytes.iter_mut().zip(id.bytes()) {
                    *to = from;
                }
                chain.writable.write(memory, 0, &bytes).map_err(io::Error::other)
            }
            Operation::Discard(ranges) => self.each(ranges, |offset, length, _| {
                self.allocate(
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
                    offset,
                    length,
                )
                // A discard is a hint; a file system that cannot is none the worse.
                .or_else(|error| if unsupported(&error) { Ok(()) } else { Err(error) })
            }),
            Operation::WriteZeroes(ranges) => self.each(ranges, |offset, length, unmap| {
                let mode = if unmap {
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE
                } else {
                    FallocateFlags::FALLOC_FL_ZERO_RANGE
                };
                self.allocate(mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, length).or_else(
                    |error| {
                        if unsupported(&error) { self.zero(offset, length) } else { Err(error) }
                    },
                )
            }),
        }
    }

    /// The open file, for tests to look at.
    #[cfg(test)]
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    fn writable(&self) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem));
        }
        Ok(())
    }

    /// Offset in the file of `length` bytes from this sector on, if they are on the disk.
    fn place(&self, sector: u64, length: u64) -> io::Result<u64> {
        let size = self.sectors * SECTOR;
        sector
            .checked_mul(SECTOR)
            .filter(|offset| offset.checked_add(length).is_some_and(|end| end <= size))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "past the end of the disk"))
    }

    fn each(
        &self,
        ranges: &[SectorRange],
        act: impl Fn(u64, u64, bool) -> io::Result<()>,
    ) -> io::Result<usize> {
        self.writable()?;
        for range in ranges {
            let length = u64::from(range.count) * SECTOR;
            let offset = self.place(range.sector, length)?;
            if range.count > super::MAX_RANGE_SECTORS {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "range too long"));
            }
            if length > 0 {
                act(offset, length, range.unmap)?;
            }
        }
        Ok(0)
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        // Both were checked to be inside a file whose size is an off_t.
        Ok(fallocate(&self.file, mode, offset as libc::off_t, length as libc::off_t)?)
    }

    fn zero(&self, mut offset: u64, mut length: u64) -> io::Result<()> {
        let zeroes = [0; 1 << 16];
        while length > 0 {
            let part = length.min(zeroes.len() as u64);
            self.file.write_all_at(&zeroes[..part as usize], offset)?;
            offset += part;
            length -= part;
        }
        Ok(())
    }

    /// Moves `length` bytes between the file and guest memory, without a copy in between.
    fn transfer(
        &self,
        memory: &GuestMemory,
        buffers: &Buffers,
        mut from: usize,
        length: usize,
        mut offset: u64,
        direction: Direction,
    ) -> io::Result<()> {
        let end = from + length;
        let mut iovecs = Vec::new();
        while from < end {
            iovecs.clear();
            for slice in buffers.slices(memory, from..end).take(MAX_IOVECS) {
                let slice = slice.map_err(io::Error::other)?;
                iovecs.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
            let (fd, count) = (self.file.as_raw_fd(), iovecs.len() as libc::c_int);
            let offset_now = offset as libc::off_t;
            // SAFETY: every iovec is a range of guest memory that vm-memory has checked, and that
            // `memory` keeps mapped during the call. The guest may change it meanwhile; the kernel
            // only copies bytes, so no Rust reference to it exists.
            let done = unsafe {
                match direction {
                    Direction::FromFile => libc::preadv(fd, iovecs.as_ptr(), count, offset_now),
                    Direction::ToFile => libc::pwritev(fd, iovecs.as_ptr(), count, offset_now),
                }
            };
            match done {
                // The file was cut off under us.
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                1.. => {
                    if let Direction::FromFile = direction {
                        let written = buffers.slices(memory, from..end);
                        vectored::mark_written(written, done as usize);
                    }
                    from += done as usize;
                    offset += done as u64;
                }
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Direction {
    FromFile,
    ToFile,
}

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV))
}
