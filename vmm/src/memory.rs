//! Guest memory: one memfd, mapped shared, touched only as the guest touches it.

use std::fs::File;
use std::sync::Arc;

use devices::GuestMemory;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress};

use crate::StartError;

/// Makes guest memory of so many MiB.
pub fn create(mib: usize) -> Result<GuestMemory, StartError> {
    let failed = |reason: String| StartError::Memory { mib, reason };
    let size = (mib as u64)
        .checked_mul(1 << 20)
        .filter(|size| *size <= i64::MAX as u64 / 2)
        .ok_or_else(|| failed("too large".to_owned()))?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = memfd_create("guest-memory", flags).map_err(|error| failed(error.to_string()))?;
    let file = Arc::new(File::from(file));
    file.set_len(size).map_err(|error| failed(error.to_string()))?;
    // Nobody may cut the file off under the mapping: that would be a SIGBUS.
    nix::fcntl::fcntl(
        &*file,
        nix::fcntl::FcntlArg::F_ADD_SEALS(
            nix::fcntl::SealFlag::F_SEAL_SHRINK | nix::fcntl::SealFlag::F_SEAL_GROW,
        ),
    )
    .map_err(|error| failed(error.to_string()))?;
    let mut offset = 0;
    let ranges: Vec<(GuestAddress, usize, Option<FileOffset>)> = arch::memory::regions(size)
        .into_iter()
        .map(|(start, length)| {
            let place = FileOffset::from_arc(file.clone(), offset);
            offset += length as u64;
            (start, length, Some(place))
        })
        .collect();
    GuestMemory::from_ranges_with_files(ranges).map_err(|error| failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    #[test]
    fn five_gib_are_two_regions_and_cost_nothing_untouched() {
        let memory = create(5 << 10).unwrap();
        assert_eq!(memory.num_regions(), 2);
        let last = GuestAddress((6 << 30) - 8);
        memory.write_obj(7u64, last).unwrap();
        assert_eq!(memory.read_obj::<u64>(last).unwrap(), 7);
        assert!(memory.write_obj(7u8, GuestAddress(6 << 30)).is_err());
        assert!(memory.write_obj(7u8, GuestAddress(3 << 30)).is_err());
    }

    #[test]
    fn hostile_23_absurd_sizes_are_errors() {
        for mib in [usize::MAX, usize::MAX >> 20, 1 << 43] {
            assert!(create(mib).is_err(), "{mib}");
        }
    }
}
