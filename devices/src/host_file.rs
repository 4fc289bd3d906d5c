//! Files of the host behind devices.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Opens a regular file or block device, with its size in bytes; none where it is something else.
/// One that is read-only for the guest is opened so: the guest's word is not needed.
pub fn open(path: &Path, read_only: bool) -> io::Result<Option<(File, u64)>> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        // A FIFO would block here for ever.
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Ok(None);
    }
    // A block device has no length among its metadata.
    let size = file.seek(SeekFrom::End(0))?;
    Ok(Some((file, size)))
}
