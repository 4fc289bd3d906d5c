//! What a process has open.

#![allow(unsafe_code, reason = "closes descriptors by their numbers")]

use std::io;
use std::os::fd::RawFd;

/// Closes all descriptors but the standard streams and these.
///
/// # Safety
///
/// No object in this process owns an open descriptor that is not among these.
pub unsafe fn close_others(kept: impl IntoIterator<Item = RawFd>) -> io::Result<()> {
    let mut kept: Vec<RawFd> = kept.into_iter().filter(|number| *number > 2).collect();
    kept.sort_unstable();
    kept.dedup();
    let mut from = 3;
    for number in kept {
        // SAFETY: none of them is kept, so the caller says that nothing owns them.
        unsafe { close_range(from, number - 1)? };
        from = number + 1;
    }
    // SAFETY: as above.
    unsafe { close_range(from, RawFd::MAX) }
}

/// # Safety
///
/// No object in this process owns a descriptor from the first to the last.
unsafe fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: the call takes numbers only, and the caller says that nothing relies on them.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
