//! KVM's memory slots: which numbers are whose, and those that come and go.

#![allow(unsafe_code, reason = "makes mappings memory slots of KVM")]

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use devices::GuestMemory;
use devices::virtio::mem::{MemOptions, SlotSink};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::machine::lock;
use crate::{StartError, memory};

/// Slots of persistent memory count from here; those before are RAM's.
pub const FIRST_PMEM: u32 = 8;
/// Slots of memory that is plugged in count from here.
pub const FIRST_HOTPLUG: u32 = 64;

/// Gives the guest its RAM: all of memory but a region that is plugged in later.
pub fn set_ram(vm: &VmFd, ram: &GuestMemory) -> Result<(), StartError> {
    for (slot, region) in (0..).zip(ram.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: tracking(ram, region.start_addr()),
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a mapping of guest memory that lives as long as `ram`, which every
        // vCPU's thread holds for the rest of the process (a machine need not have a device that
        // would); slots do not overlap, and are not changed.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|error| {
            let bytes: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
            // More than KVM has room for, or a processor has addresses for.
            let reason = format!("KVM: KVM_SET_USER_MEMORY_REGION: {error}");
            StartError::Memory { mib: (bytes >> 20) as usize, reason }
        })?;
    }
    Ok(())
}

/// Gives the guest the file behind its persistent memory with this number.
///
/// # Safety
///
/// `size` bytes from `host_address` on stay mapped as long as the guest can run.
pub unsafe fn set_pmem(
    vm: &VmFd,
    number: u32,
    guest_address: GuestAddress,
    (host_address, size): (u64, u64),
    read_only: bool,
) -> Result<(), StartError> {
    let slot = kvm_userspace_memory_region {
        slot: FIRST_PMEM + number,
        flags: if read_only { KVM_MEM_READONLY } else { 0 },
        guest_phys_addr: guest_address.0,
        memory_size: size,
        userspace_addr: host_address,
    };
    // SAFETY: the caller says that the mapping stays; its addresses are no other slot's.
    unsafe { vm.set_user_memory_region(slot) }
        .map_err(StartError::kvm("KVM_SET_USER_MEMORY_REGION"))
}

/// Takes the file of persistent memory with this number away from the guest.
pub fn remove_pmem(vm: &VmFd, number: u32) -> Result<(), StartError> {
    // A slot of no size is none.
    let slot = kvm_userspace_memory_region { slot: FIRST_PMEM + number, ..Default::default() };
    // SAFETY: nothing becomes reachable by it.
    unsafe { vm.set_user_memory_region(slot) }
        .map_err(StartError::kvm("KVM_SET_USER_MEMORY_REGION"))
}

fn tracking(memory: &GuestMemory, address: GuestAddress) -> u32 {
    let region = memory.find_region(address);
    let tracked = region.is_some_and(|region| memory::written(region).is_tracking());
    if tracked { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }
}

/// The slots of the region of guest memory that is plugged in part by part.
#[derive(Clone)]
pub struct HotplugSlots {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    start: GuestAddress,
    options: MemOptions,
    plugged: Arc<Mutex<BTreeSet<usize>>>,
}

impl HotplugSlots {
    /// Slots of the region of `memory` that begins at `start`, none of which is there yet.
    pub fn new(
        vm: Arc<VmFd>,
        memory: GuestMemory,
        start: GuestAddress,
        options: MemOptions,
    ) -> HotplugSlots {
        HotplugSlots { vm, memory, start, options, plugged: Arc::default() }
    }

    /// The address of the region.
    pub fn start(&self) -> GuestAddress {
        self.start
    }

    /// The pages of the region that the guest wrote since this was last asked, one bit each.
    pub fn take_dirty_pages(&self) -> Result<Vec<u64>, StartError> {
        const PAGES_PER_WORD: u64 = 64 * 4096;
        let mut pages = vec![0; (self.options.region_size() / PAGES_PER_WORD) as usize];
        for index in lock(&self.plugged).iter() {
            let Some((address, size)) = self.options.slot(self.start, *index) else { continue };
            let log = self
                .vm
                .get_dirty_log(FIRST_HOTPLUG + *index as u32, size as usize)
                .map_err(StartError::kvm("KVM_GET_DIRTY_LOG"))?;
            let first = ((address.0 - self.start.0) / PAGES_PER_WORD) as usize;
            for (page, own) in pages[first..].iter_mut().zip(log) {
                *page |= own;
            }
        }
        Ok(pages)
    }
}

impl SlotSink for HotplugSlots {
    fn set_slot(&mut self, index: usize, plugged: bool) -> io::Result<()> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let (address, size) = self.options.slot(self.start, index).ok_or_else(outside)?;
        let slice = self.memory.get_slice(address, size as usize).map_err(io::Error::other)?;
        let slot = kvm_userspace_memory_region {
            slot: FIRST_HOTPLUG + u32::try_from(index).map_err(|_| outside())?,
            flags: tracking(&self.memory, address),
            guest_phys_addr: address.0,
            // A slot of no size is none.
            memory_size: if plugged { size } else { 0 },
            userspace_addr: slice.ptr_guard_mut().as_ptr() as u64,
        };
        // SAFETY: the range is part of a mapping of guest memory, which every vCPU's thread holds
        // for the rest of the process; the region is in no other slot.
        unsafe { self.vm.set_user_memory_region(slot) }.map_err(io::Error::from)?;
        let mut all = lock(&self.plugged);
        if plugged {
            all.insert(index)
        } else {
            all.remove(&index)
        };
        Ok(())
    }
}
