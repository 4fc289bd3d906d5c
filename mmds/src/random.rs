//! Random numbers from the host's kernel, by its system call and nothing else: a confined monitor has
//! no `/dev/urandom` to fall back to.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// Fills a key, a seed or an ID; of those, which are no longer than 256 bytes, the kernel gives all
/// or an error (getrandom(2)).
pub fn fill(bytes: &mut [u8]) -> Result<(), Errno> {
    match getrandom(&mut *bytes, GetRandomFlags::empty())? {
        count if count == bytes.len() => Ok(()),
        _ => Err(Errno::AGAIN),
    }
}
