//! Copies between a process's pipes or terminal and its vsock connections, a thread each way. A
//! machine restored from a snapshot gets other connections in place of those.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use nix::sys::socket::{Shutdown, shutdown};

/// Bytes moved at a time; a pipe is made as large.
pub const CHUNK: usize = 256 << 10;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where output of a process goes.
#[derive(Clone)]
pub struct Outlet(Arc<Mutex<Host>>);

enum Host {
    Reads(Arc<File>),
    /// Output is dropped.
    Gone,
    /// There is no more output.
    Told,
}

impl Outlet {
    /// Starts a thread that carries output to the host. It ends at the end of the output; when the
    /// host has gone, it takes the rest so that the process is not stopped by it.
    pub fn carry(mut from: File, to: Option<File>) -> std::io::Result<(Outlet, JoinHandle<()>)> {
        let host = to.map_or(Host::Gone, |to| Host::Reads(Arc::new(to)));
        let outlet = Outlet(Arc::new(Mutex::new(host)));
        let own = outlet.clone();
        let pump = move || {
            let mut buffer = vec![0; CHUNK];
            loop {
                match from.read(&mut buffer) {
                    // EIO is how a terminal says that nobody has it open any more.
                    Ok(0) => break,
                    Ok(count) => own.write(&buffer[..count]),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            if let Host::Reads(host) = std::mem::replace(&mut *lock(&own.0), Host::Told) {
                hang_up(&host);
            }
        };
        Ok((outlet, thread::Builder::new().stack_size(256 << 10).spawn(pump)?))
    }

    /// Sends the output to another connection from now on, or nowhere. What it went to before is
    /// lost: a word about its end could be taken for one about another of the same ports.
    pub fn connect(&self, to: Option<File>) {
        let mut host = lock(&self.0);
        match (&*host, to) {
            (Host::Told, Some(to)) => hang_up(&to),
            (Host::Told, None) => {}
            (_, to) => *host = to.map_or(Host::Gone, |to| Host::Reads(Arc::new(to))),
        }
    }

    /// Without the lock: a host that does not read must not keep another from taking its place.
    fn write(&self, bytes: &[u8]) {
        let Some(host) = self.reader() else { return };
        if (&*host).write_all(bytes).is_err() {
            let mut current = lock(&self.0);
            if matches!(&*current, Host::Reads(other) if Arc::ptr_eq(other, &host)) {
                *current = Host::Gone;
            }
        }
    }

    fn reader(&self) -> Option<Arc<File>> {
        match &*lock(&self.0) {
            Host::Reads(host) => Some(host.clone()),
            Host::Gone | Host::Told => None,
        }
    }
}

fn hang_up(host: &File) {
    let _ = shutdown(host.as_raw_fd(), Shutdown::Write);
}

/// What input goes to, until it ends.
#[derive(Clone)]
pub struct Inlet(Arc<Mutex<Option<File>>>);

impl Inlet {
    /// Input for this pipe or terminal.
    pub fn new(to: File) -> Inlet {
        Inlet(Arc::new(Mutex::new(Some(to))))
    }

    /// Carries input from the host, on a thread. When the process takes no more, the host is told;
    /// when a restore has cut the connection off, the input has not ended.
    pub fn connect(&self, mut from: File) -> std::io::Result<()> {
        let to = lock(&self.0).as_ref().map(File::try_clone).transpose()?;
        let own = self.clone();
        let pump = move || {
            let mut buffer = vec![0; CHUNK];
            while let Some(mut to) = to.as_ref() {
                match from.read(&mut buffer) {
                    Ok(0) => {
                        own.close();
                        break;
                    }
                    Ok(count) => {
                        if to.write_all(&buffer[..count]).is_err() {
                            own.close();
                            break;
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => return,
                }
            }
            let _ = shutdown(from.as_raw_fd(), Shutdown::Both);
        };
        thread::Builder::new().stack_size(256 << 10).spawn(pump).map(drop)
    }

    /// Ends the input.
    pub fn close(&self) {
        drop(lock(&self.0).take());
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, File) {
        let (one, other) = UnixStream::pair().unwrap();
        (one, File::from(OwnedFd::from(other)))
    }

    fn receive(from: &mut UnixStream, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        from.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn output_goes_to_the_newest_connection_and_its_end_is_told() {
        let (mut process, output) = pair();
        let (mut first, connection) = pair();
        let (outlet, pump) = Outlet::carry(output, Some(connection)).unwrap();
        process.write_all(b"one").unwrap();
        assert_eq!(receive(&mut first, 3), b"one");
        // The host has gone: the process writes on and is not stopped.
        drop(first);
        process.write_all(&[0; 3 * CHUNK]).unwrap();
        outlet.connect(None);
        let (mut second, connection) = pair();
        outlet.connect(Some(connection));
        while process.write_all(b"two").is_ok() {
            // What was left of before may come first.
            let mut bytes = vec![0; CHUNK];
            let count = second.read(&mut bytes).unwrap();
            if bytes[..count].ends_with(b"two") {
                break;
            }
        }
        drop(process);
        second.read_to_end(&mut Vec::new()).unwrap();
        pump.join().unwrap();
        let (mut late, connection) = pair();
        outlet.connect(Some(connection));
        assert_eq!(late.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn input_ends_with_the_hosts_and_not_with_a_lost_connection() {
        let (mut process, input) = pair();
        let inlet = Inlet::new(input);
        // A folder cannot be read: an error as a reset is one.
        inlet.connect(File::open("/").unwrap()).unwrap();
        let (mut host, connection) = pair();
        inlet.connect(connection).unwrap();
        host.write_all(b"text").unwrap();
        assert_eq!(receive(&mut process, 4), b"text");
        drop(host);
        assert_eq!(process.read(&mut [0]).unwrap(), 0);
        let (mut late, connection) = pair();
        inlet.connect(connection).unwrap();
        assert_eq!(late.read(&mut [0]).unwrap(), 0);
    }
}
