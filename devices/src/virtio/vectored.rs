//! One system call between a descriptor of the host and buffers of the guest, without a copy in
//! between.

#![allow(unsafe_code, reason = "readv and writev of guest memory")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::GuestMemoryError;
use vm_memory::bitmap::Bitmap;

use super::queue::Buffers;
use crate::{GuestMemory, GuestSlice};

/// Most pieces of guest memory in one call: the descriptors of a full queue, and ours.
pub const MAX_PIECES: usize = 264;

const NOTHING: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// Reads into these ranges of buffers, one after the other; the number of bytes there were. What is
/// beyond [`MAX_PIECES`] is left alone.
pub fn read<'a>(
    from: &impl AsFd,
    memory: &'a GuestMemory,
    into: impl Iterator<Item = (&'a Buffers, Range<usize>)> + Clone,
) -> io::Result<usize> {
    let mut pieces = [NOTHING; MAX_PIECES];
    let mut count = 0;
    let slices = || into.clone().flat_map(|(buffers, range)| buffers.slices(memory, range));
    for slice in slices() {
        let Some(piece) = pieces.get_mut(count) else { break };
        let slice = slice.map_err(io::Error::other)?;
        piece.iov_base = slice.ptr_guard_mut().as_ptr().cast();
        piece.iov_len = slice.len();
        count += 1;
    }
    let descriptor = from.as_fd().as_raw_fd();
    // SAFETY: every piece is a range of guest memory that vm-memory has checked, and that `memory`
    // keeps mapped during the call. The guest may change it meanwhile; the kernel only copies
    // bytes, so no Rust reference to it exists.
    let done = result(unsafe { libc::readv(descriptor, pieces.as_ptr(), count as libc::c_int) })?;
    mark_written(slices(), done);
    Ok(done)
}

/// Records that the host's kernel wrote so many bytes into these pieces of guest memory: nobody saw
/// it but us.
pub fn mark_written<'a>(
    slices: impl Iterator<Item = Result<GuestSlice<'a>, GuestMemoryError>>,
    mut bytes: usize,
) {
    for slice in slices.flatten() {
        let Some(bitmap) = slice.bitmap().as_ref().filter(|_| bytes > 0) else { return };
        let part = slice.len().min(bytes);
        bitmap.mark_dirty(0, part);
        bytes -= part;
    }
}

/// Writes these bytes of ours, and then this range of buffers; the number of bytes that were taken.
/// Fails with `E2BIG` where it lies in too many pieces.
pub fn write(
    to: &impl AsFd,
    ours: &[u8],
    memory: &GuestMemory,
    buffers: &Buffers,
    range: Range<usize>,
) -> io::Result<usize> {
    let mut pieces = [NOTHING; MAX_PIECES];
    pieces[0].iov_base = ours.as_ptr().cast_mut().cast();
    pieces[0].iov_len = ours.len();
    let mut count = 1;
    for slice in buffers.slices(memory, range) {
        let Some(piece) = pieces.get_mut(count) else {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        };
        let slice = slice.map_err(io::Error::other)?;
        piece.iov_base = slice.ptr_guard_mut().as_ptr().cast();
        piece.iov_len = slice.len();
        count += 1;
    }
    let descriptor = to.as_fd().as_raw_fd();
    // SAFETY: as above; the first piece is a slice that is borrowed for this call, which only
    // reads.
    result(unsafe { libc::writev(descriptor, pieces.as_ptr(), count as libc::c_int) })
}

fn result(done: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}
