//! The file that a machine's state is in.
//!
//! ```text
//!  0  "VMRUNSNP"
//!  8  version, 16 bits: files of a greater one are refused
//! 10  reserved, zero
//! 12  CRC-32 of the payload
//! 16  length of the payload, 64 bits
//! 24  payload: MessagePack, structures as maps, so that a field can be added
//! ```
//!
//! Numbers are little-endian.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use devices::host_file::{self, Access};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Version that is written.
pub const VERSION: u16 = 1;
const MAGIC: [u8; 8] = *b"VMRUNSNP";
const HEADER: usize = 24;
/// Most bytes of a payload; 32 processors and all devices take less than 1 MiB.
const MOST: u64 = 16 << 20;

/// Why a file holds no state.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The host says so.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// It is something else, or damaged.
    #[error("{path} is not a usable snapshot: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How that shows.
        reason: String,
    },
    /// It was written by a newer monitor.
    #[error("{path} has version {version}, this monitor reads up to {VERSION}")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u16,
    },
}

/// Writes a state so that the file is there as a whole or not at all.
pub fn write(path: &Path, state: &impl Serialize) -> Result<(), FileError> {
    let failed = |error| FileError::Io { path: path.to_owned(), error };
    let bytes = encode(state).map_err(failed)?;
    if let Some(descriptor) = host_file::handed_over(path).map_err(failed)? {
        // Whoever handed it over gives it a name once it is whole.
        let mut file = File::from(descriptor);
        return file.set_len(0).and_then(|()| file.write_all(&bytes)).map_err(failed);
    }
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let fresh = PathBuf::from(name);
    let result = (|| {
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(&fresh)?;
        file.write_all(&bytes)?;
        std::fs::rename(&fresh, path)
    })();
    if result.is_err() {
        let _ = std::fs::remove_file(&fresh);
    }
    result.map_err(failed)
}

/// Reads the state from a file.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, FileError> {
    let failed = |error| FileError::Io { path: path.to_owned(), error };
    let file =
        host_file::open_with(path, Access::Read, File::options().read(true)).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(HEADER as u64 + MOST + 1).read_to_end(&mut bytes).map_err(failed)?;
    decode(&bytes).map_err(|error| match error {
        DecodeError::Damaged(reason) => FileError::Damaged { path: path.to_owned(), reason },
        DecodeError::Newer(version) => FileError::Newer { path: path.to_owned(), version },
    })
}

/// The version of a state file.
pub fn version(path: &Path) -> Result<u16, FileError> {
    #[derive(serde::Deserialize)]
    struct Anything {}
    read::<Anything>(path).map(|_| VERSION)
}

fn encode(state: &impl Serialize) -> io::Result<Vec<u8>> {
    let payload = rmp_serde::to_vec_named(state).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(crc32fast::hash(&payload).to_le_bytes());
    bytes.extend((payload.len() as u64).to_le_bytes());
    bytes.extend(payload);
    Ok(bytes)
}

/// Why bytes are no state.
#[derive(Debug)]
pub enum DecodeError {
    /// They are something else, or damaged.
    Damaged(String),
    /// They are of this later version.
    Newer(u16),
}

/// The state that the bytes of a file stand for.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let damaged = |reason: &str| DecodeError::Damaged(reason.to_owned());
    let (header, payload) =
        bytes.split_first_chunk::<HEADER>().ok_or_else(|| damaged("it is too short"))?;
    let word = |at: usize, size: usize| {
        header[at..at + size].iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    if header[..8] != MAGIC {
        return Err(damaged("it does not begin as one"));
    }
    let version = word(8, 2) as u16;
    if version > VERSION {
        return Err(DecodeError::Newer(version));
    }
    if version == 0 {
        return Err(damaged("there is no version 0"));
    }
    if word(16, 8) != payload.len() as u64 {
        return Err(damaged("its length is wrong: it was cut off or added to"));
    }
    if word(12, 4) != u64::from(crc32fast::hash(payload)) {
        return Err(damaged("its checksum is wrong"));
    }
    rmp_serde::from_slice(payload).map_err(|error| damaged(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        encode(&("some state", vec![1u64, 2, 3])).unwrap()
    }

    fn read_back(bytes: &[u8]) -> Result<(String, Vec<u64>), DecodeError> {
        decode(bytes)
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        write(&path, &("some state", vec![1u64])).unwrap();
        let state: (String, Vec<u64>) = read(&path).unwrap();
        assert_eq!(state, ("some state".to_owned(), vec![1]));
        assert!(write(&folder.path().join("no/such"), &1).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    /// docs/hostile.md 25: truncated, corrupted, of a later version.
    #[test]
    fn hostile_25_damage_is_seen_wherever_it_is() {
        let good = sample();
        assert!(read_back(&good).is_ok());
        for length in 0..good.len() {
            assert!(read_back(&good[..length]).is_err(), "{length}");
        }
        for place in 0..good.len() {
            let mut bytes = good.clone();
            bytes[place] ^= 1;
            // The reserved bytes mean nothing.
            assert!(read_back(&bytes).is_err() || (10..12).contains(&place), "{place}");
        }
        let mut longer = good.clone();
        longer.push(0);
        assert!(read_back(&longer).is_err());
        let mut newer = good;
        newer[8] = 2;
        assert!(matches!(read_back(&newer), Err(DecodeError::Newer(2))));
    }

    /// docs/hostile.md 25: lengths inside the payload that promise more than there is.
    #[test]
    fn hostile_25_a_payload_cannot_make_us_allocate() {
        for payload in [&[0xdd, 0xff, 0xff, 0xff, 0xff][..], &[0x92, 0xdb, 0x7f, 0xff, 0xff, 0xff]]
        {
            let mut bytes = sample()[..HEADER].to_vec();
            bytes[12..16].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
            bytes[16..24].copy_from_slice(&(payload.len() as u64).to_le_bytes());
            bytes.extend(payload);
            assert!(read_back(&bytes).is_err());
        }
    }
}
