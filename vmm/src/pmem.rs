//! Where files are in guest memory, as persistent memory.

#![allow(unsafe_code, reason = "makes a mapping a memory slot of KVM")]

use std::ops::Range;
use std::sync::Arc;

use api_server::machine::Pmem;
use devices::virtio::pmem::{ALIGNMENT, Pmem as PmemDevice, PmemFile};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use crate::{StartError, slots};

/// Most files: each has a memory slot of KVM.
const MOST: u32 = slots::FIRST_HOTPLUG - slots::FIRST_PMEM;

/// Where one file is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemPlace {
    id: String,
    number: u32,
    addresses: Range<u64>,
}

impl PmemPlace {
    fn size(&self) -> u64 {
        self.addresses.end.saturating_sub(self.addresses.start)
    }
}

/// The places of a machine's files.
pub struct PmemPlaces {
    vm: Arc<VmFd>,
    /// Where there may be any.
    addresses: Range<u64>,
    places: Vec<PmemPlace>,
}

impl PmemPlaces {
    /// Places behind all other memory, which ends at this address.
    pub fn new(vm: Arc<VmFd>, end: GuestAddress) -> PmemPlaces {
        let start = end.0.next_multiple_of(1 << 30);
        PmemPlaces { vm, addresses: start..i64::MAX as u64, places: Vec::new() }
    }

    /// End of what there is by now.
    pub fn end(&self) -> u64 {
        let ends = self.places.iter().map(|place| place.addresses.end);
        ends.max().unwrap_or(self.addresses.start)
    }

    /// Nothing may be above this from now on.
    pub fn set_limit(&mut self, limit: u64) {
        self.addresses.end = limit;
    }

    /// All places, for a snapshot.
    pub fn save(&self) -> Vec<PmemPlace> {
        self.places.clone()
    }

    /// Makes a file memory of the guest: at the lowest free place, or where a snapshot has it. The
    /// device must not be dropped before [`remove`](Self::remove) succeeded or the guest has ended.
    pub fn add(&mut self, config: &Pmem, saved: &[PmemPlace]) -> Result<PmemDevice, StartError> {
        let id = &config.id;
        let failed = |reason: &str| StartError::device(format!("pmem {id}"))(reason);
        let file = PmemFile::open(&config.path_on_host, config.read_only)
            .map_err(StartError::device(format!("pmem {id}")))?;
        let place = match saved.iter().find(|place| place.id == *id) {
            // KVM itself refuses one place for two.
            Some(place) if place.number >= MOST || place.addresses.start < self.addresses.start => {
                return Err(failed("a snapshot has it where it cannot be"));
            }
            Some(place) if place.size() != file.size() => {
                return Err(failed("its file has another size than in the snapshot"));
            }
            Some(place) => place.clone(),
            None => free(&self.places, &self.addresses, id, file.size())
                .ok_or_else(|| failed("no room in the guest's address space"))?,
        };
        let address = GuestAddress(place.addresses.start);
        let host = (file.host_address(), file.size());
        let device = PmemDevice::new(id, file, address).map_err(StartError::device(id))?;
        // SAFETY: the device keeps the mapping; it is returned, and the caller keeps it until
        // `remove` has taken the slot away.
        unsafe { slots::set_pmem(&self.vm, place.number, address, host, config.read_only) }?;
        self.places.push(place);
        Ok(device)
    }

    /// The number that the guest's kernel gives this file, where it finds all in order.
    pub fn number(&self, id: &str) -> Option<u32> {
        self.places.iter().find(|place| place.id == id).map(|place| place.number)
    }

    /// Takes a file out of guest memory; its device can be dropped after that.
    pub fn remove(&mut self, id: &str) -> Result<(), StartError> {
        let Some(index) = self.places.iter().position(|place| place.id == id) else {
            return Ok(());
        };
        slots::remove_pmem(&self.vm, self.places[index].number)?;
        self.places.remove(index);
        Ok(())
    }
}

/// The lowest free number, and the lowest place in these addresses that is free.
fn free(places: &[PmemPlace], within: &Range<u64>, id: &str, size: u64) -> Option<PmemPlace> {
    let number = (0..MOST).find(|number| places.iter().all(|other| other.number != *number))?;
    // Begin, and behind each file: one of these is the lowest place.
    let starts = places.iter().map(|place| place.addresses.end).chain([within.start]);
    let start = starts
        .filter_map(|start| start.checked_next_multiple_of(ALIGNMENT))
        .filter(|start| {
            let Some(end) = start.checked_add(size) else { return false };
            let clear =
                |other: &PmemPlace| end <= other.addresses.start || other.addresses.end <= *start;
            end <= within.end && places.iter().all(clear)
        })
        .min()?;
    Some(PmemPlace { id: id.to_owned(), number, addresses: start..start + size })
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    proptest! {
        /// Whatever comes and goes, no two files have a number or an address in common, and one is
        /// only refused where there is no room.
        #[test]
        fn files_are_apart_and_inside(
            start in 0u64..1000,
            room in 0u64..64,
            steps in vec((any::<bool>(), 1u64..20, any::<u8>()), 0..100),
        ) {
            let within = start * MIB..start * MIB + room * MIB;
            let mut places: Vec<PmemPlace> = Vec::new();
            for (adds, size, which) in steps {
                if !adds && !places.is_empty() {
                    places.swap_remove(usize::from(which) % places.len());
                    continue;
                }
                let size = size * MIB;
                let fits = |start: u64| {
                    let apart = |other: &PmemPlace| {
                        start + size <= other.addresses.start || other.addresses.end <= start
                    };
                    start + size <= within.end && places.iter().all(apart)
                };
                let mut starts = (within.start.next_multiple_of(ALIGNMENT)..within.end)
                    .step_by(ALIGNMENT as usize);
                let lowest = starts.find(|start| fits(*start));
                let numbers: Vec<u32> = places.iter().map(|place| place.number).collect();
                let lowest = lowest.filter(|_| places.len() < MOST as usize);
                let found = free(&places, &within, "x", size);
                prop_assert_eq!(found.as_ref().map(|place| place.addresses.start), lowest);
                if let Some(found) = found {
                    prop_assert_eq!(found.size(), size);
                    prop_assert!(found.number < MOST && !numbers.contains(&found.number));
                    places.push(found);
                }
            }
        }
    }

    #[test]
    fn files_are_put_one_behind_the_other_and_into_gaps() {
        let within = 0x1_0000_0000..0x1_0000_0000 + 16 * MIB;
        let mut places = Vec::new();
        for (id, size) in [("a", 4 * MIB), ("b", 2 * MIB), ("c", 4 * MIB)] {
            places.push(free(&places, &within, id, size).unwrap());
        }
        let starts: Vec<_> =
            places.iter().map(|place| place.addresses.start - within.start).collect();
        assert_eq!(starts, [0, 4 * MIB, 6 * MIB]);
        places.remove(1);
        let found = free(&places, &within, "d", 2 * MIB).unwrap();
        assert_eq!((found.number, found.addresses.start), (1, within.start + 4 * MIB));
        let behind = free(&places, &within, "e", 4 * MIB).unwrap();
        assert_eq!((behind.number, behind.addresses.start), (1, within.start + 10 * MIB));
        assert_eq!(free(&places, &within, "f", 8 * MIB), None);
    }

    #[test]
    fn there_are_as_many_files_as_memory_slots() {
        let within = 0..u64::MAX;
        let mut places = Vec::new();
        while let Some(place) = free(&places, &within, "x", ALIGNMENT) {
            places.push(place);
        }
        assert_eq!(places.len(), MOST as usize);
    }
}
