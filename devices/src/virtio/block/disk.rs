//! A raw file as a disk.

#![allow(unsafe_code, reason = "preadv and pwritev of guest memory")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use vm_memory::GuestMemoryError;

use super::request::{HEADER, ID, Operation};
use crate::virtio::queue::Chain;
use crate::virtio::vectored;
use crate::{GuestMemory, GuestSlice, host_file};

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
        let (file, size) = host_file::open(path, read_only)
            .map_err(failed)?
            .ok_or_else(|| DiskError::Kind(path.to_owned()))?;
        // Opened not to block, it may block from now on. Before Linux 5.12 io_uring would fail with EAGAIN where it has to
        // wait for such a file, and on some file systems it still does.
        fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).map_err(|error| failed(error.into()))?;
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

    /// Carries out a request.
    pub fn run(
        &self,
        request: &Operation,
        memory: &GuestMemory,
        chain: &Chain,
        id: &str,
    ) -> io::Result<()> {
        if let Operation::GetId = request {
            let mut bytes = [0; ID];
            for (to, from) in bytes.iter_mut().zip(id.bytes()) {
                *to = from;
            }
            return chain.writable.write(memory, 0, &bytes).map(drop).map_err(io::Error::other);
        }
        let mut index = 0;
        while let Some(step) = self.step(request, index)? {
            self.perform(step, memory, chain)?;
            index += 1;
        }
        Ok(())
    }

    /// What a request does to the file first, second, and so on; none where it is complete. Fails
    /// where that is not on the disk, or the disk must not be written.
    pub fn step(&self, request: &Operation, index: usize) -> io::Result<Option<Step>> {
        let (action, sector, length) = match request {
            Operation::Read { sector, length } => (Action::Read, *sector, *length as u64),
            Operation::Write { sector, length } => (Action::Write, *sector, *length as u64),
            Operation::Flush if index == 0 && !self.read_only => {
                return Ok(Some(Step { action: Action::Sync, position: 0, offset: 0, length: 0 }));
            }
            Operation::Flush | Operation::GetId => return Ok(None),
            Operation::Discard(ranges) | Operation::WriteZeroes(ranges) => {
                self.writable()?;
                // One of no sectors asks for nothing, and for fallocate it would be an error.
                let mut ranges = ranges.iter().filter(|range| range.count > 0);
                let Some(range) = ranges.nth(index) else { return Ok(None) };
                if range.count > super::MAX_RANGE_SECTORS {
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, "range too long"));
                }
                let action = match request {
                    Operation::Discard(_) => Action::Discard,
                    _ if range.unmap => Action::Unmap,
                    _ => Action::Zero,
                };
                let length = u64::from(range.count) * SECTOR;
                let offset = self.place(range.sector, length)?;
                return Ok(Some(Step { action, position: 0, offset, length }));
            }
        };
        let position = if let Action::Write = action {
            self.writable()?;
            HEADER
        } else {
            0
        };
        let offset = self.place(sector, length)?;
        Ok((index == 0 && length > 0).then_some(Step { action, position, offset, length }))
    }

    /// The open file.
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

    /// Takes a step, all of it.
    fn perform(&self, step: Step, memory: &GuestMemory, chain: &Chain) -> io::Result<()> {
        let Step { action, offset, length, .. } = step;
        match action {
            Action::Read | Action::Write | Action::Fill => self.transfer(step, memory, chain),
            Action::Sync => self.file.sync_data(),
            Action::Discard | Action::Unmap | Action::Zero => {
                // Both were checked to be inside a file whose size is an off_t.
                let (offset, length) = (offset as libc::off_t, length as libc::off_t);
                match fallocate(&self.file, action.mode(), offset, length).map_err(io::Error::from)
                {
                    Err(error) if unsupported(&error) => match action.instead() {
                        Some(action) => self.perform(Step { action, ..step }, memory, chain),
                        None => Ok(()),
                    },
                    result => result,
                }
            }
        }
    }

    /// Moves bytes between the file and memory, without a copy in between.
    fn transfer(&self, mut step: Step, memory: &GuestMemory, chain: &Chain) -> io::Result<()> {
        let mut iovecs = Vec::new();
        while step.length > 0 {
            step.pieces(memory, chain, &mut iovecs)?;
            let (fd, count) = (self.file.as_raw_fd(), iovecs.len() as libc::c_int);
            let offset = step.offset as libc::off_t;
            // SAFETY: every iovec is a range of guest memory that vm-memory has checked, and that
            // `memory` keeps mapped during the call, or zeroes that are static and only read. The
            // guest may change its memory meanwhile; the kernel only copies bytes, so no Rust
            // reference to it exists.
            let done = unsafe {
                match step.action {
                    Action::Read => libc::preadv(fd, iovecs.as_ptr(), count, offset),
                    _ => libc::pwritev(fd, iovecs.as_ptr(), count, offset),
                }
            };
            match usize::try_from(done) {
                Ok(done) => step.advance(done, memory, chain)?,
                Err(_) => {
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

/// Zeroes to write where a file system cannot make any.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// One thing to do to the file, or what is left of it. Its range is on the disk.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// What to do.
    pub action: Action,
    /// Where in the part of the chain that is read or written the data begins.
    pub position: usize,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// How many bytes are left; zero for a flush.
    pub length: u64,
}

/// What is done to a range of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Into the chain's writable part.
    Read,
    /// Out of the chain's readable part.
    Write,
    /// Make all that was written durable.
    Sync,
    /// Forget what is there, if that can be.
    Discard,
    /// Zeroes, and the space given back.
    Unmap,
    /// Zeroes, and the space kept.
    Zero,
    /// Zeroes, by writing them.
    Fill,
}

impl Action {
    /// Of fallocate, for the three actions that are its.
    pub fn mode(self) -> FallocateFlags {
        let mode = match self {
            Action::Zero => FallocateFlags::FALLOC_FL_ZERO_RANGE,
            _ => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
        };
        mode | FallocateFlags::FALLOC_FL_KEEP_SIZE
    }

    /// What to do where the file system does not support the action. A discard is a hint: one that
    /// cannot be is none the worse.
    pub fn instead(self) -> Option<Action> {
        (self != Action::Discard).then_some(Action::Fill)
    }
}

impl Step {
    /// The memory that the next system call reads or writes.
    pub fn pieces(
        &self,
        memory: &GuestMemory,
        chain: &Chain,
        pieces: &mut Vec<libc::iovec>,
    ) -> io::Result<()> {
        pieces.clear();
        if let Action::Fill = self.action {
            // The kernel only reads it.
            let iov_base = ZEROES.as_ptr().cast_mut().cast();
            let mut left = self.length;
            while left > 0 && pieces.len() < MAX_IOVECS {
                let iov_len = left.min(ZEROES.len() as u64) as usize;
                pieces.push(libc::iovec { iov_base, iov_len });
                left -= iov_len as u64;
            }
            return Ok(());
        }
        for slice in self.slices(memory, chain).take(MAX_IOVECS) {
            let slice = slice.map_err(io::Error::other)?;
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            pieces.push(libc::iovec { iov_base, iov_len: slice.len() });
        }
        Ok(())
    }

    /// So many bytes have been moved.
    pub fn advance(&mut self, done: usize, memory: &GuestMemory, chain: &Chain) -> io::Result<()> {
        if done == 0 {
            // The file was cut off under us.
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        if let Action::Read = self.action {
            vectored::mark_written(self.slices(memory, chain), done);
        }
        self.position += done;
        self.offset += done as u64;
        self.length = self.length.saturating_sub(done as u64);
        Ok(())
    }

    fn slices<'a>(
        &self,
        memory: &'a GuestMemory,
        chain: &'a Chain,
    ) -> impl Iterator<Item = Result<GuestSlice<'a>, GuestMemoryError>> + 'a {
        let buffers = match self.action {
            Action::Read => &chain.writable,
            _ => &chain.readable,
        };
        buffers.slices(memory, self.position..self.position + self.length as usize)
    }
}

/// Whether the file system does not know how, rather than failed.
pub fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV))
}
