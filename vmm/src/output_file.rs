//! Files and FIFOs that lines are appended to, without ever waiting.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use devices::host_file::{self, Access};

/// Opens a file or FIFO to append to; a file is made where there is none, for its owner only.
///
/// A FIFO needs no reader: it is opened for reading too, so that what is written waits in it, and
/// once it is full, writing fails with [`io::ErrorKind::WouldBlock`].
pub fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600);
    host_file::open_with(path, Access::Append, &options)
}
