//! The generation ID (Microsoft's "Virtual Machine Generation ID"): 16 random bytes in the guest's
//! memory, which are others after every restore. A guest that is told so knows that it may be one of
//! several, and makes its random numbers anew.

use devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::StartError;
use crate::device_manager::DeviceManager;
use arch::layout;

/// Tells the guest of another ID.
pub struct Generation(EventFd);

impl Generation {
    /// With an interrupt of its own.
    pub fn new(manager: &mut DeviceManager) -> Result<Generation, StartError> {
        let failed = StartError::host;
        let event =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed("eventfd"))?;
        let line = event.try_clone().map_err(failed("eventfd"))?;
        manager.add_interrupt(line, layout::GENERATION_GSI);
        Ok(Generation(event))
    }

    /// Another ID, of which the guest hears when it runs.
    pub fn renew(&self, memory: &GuestMemory) -> Result<(), StartError> {
        write(memory)?;
        self.0.write(1).map_err(StartError::host("eventfd"))
    }
}

/// Writes an ID that no machine had before.
pub fn write(memory: &GuestMemory) -> Result<(), StartError> {
    let mut id = [0; 16];
    mmds::random::fill(&mut id).map_err(StartError::device("generation ID"))?;
    Ok(memory.write_slice(&id, GuestAddress(layout::GENERATION_ID))?)
}
