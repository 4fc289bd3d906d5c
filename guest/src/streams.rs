//! Copies between a process's pipes or terminal and its vsock connections, a thread each way.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::thread::{self, JoinHandle};

use nix::sys::socket::{Shutdown, shutdown};

/// Bytes moved at a time; a pipe is made as large.
pub const CHUNK: usize = 256 << 10;

/// Output of a process, to the host. Ends at the end of the output, or when the host has gone, and
/// then takes the rest so that the process is not stopped by it.
pub fn output(mut from: File, to: Option<File>) -> std::io::Result<JoinHandle<()>> {
    thread::Builder::new().stack_size(256 << 10).spawn(move || {
        let mut buffer = vec![0; CHUNK];
        let mut to = to;
        loop {
            let count = match from.read(&mut buffer) {
                // EIO is how a terminal says that nobody has it open any more.
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            if let Some(host) = &mut to
                && host.write_all(&buffer[..count]).is_err()
            {
                to = None;
            }
        }
        if let Some(host) = to {
            let _ = shutdown(host.as_raw_fd(), Shutdown::Write);
        }
    })
}

/// Input from the host, to a process. When the process takes no more, the host is told.
pub fn input(mut from: File, mut to: File) -> std::io::Result<()> {
    let pump = move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    if to.write_all(&buffer[..count]).is_err() {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        let _ = shutdown(from.as_raw_fd(), Shutdown::Both);
    };
    thread::Builder::new().stack_size(256 << 10).spawn(pump).map(drop)
}
