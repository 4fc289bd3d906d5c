//! Devices of a micro-VM: virtio devices and the few legacy ones a PC guest expects.
//!
//! Nothing here knows KVM: interrupts leave through [`virtio::Interrupt`] and, as messages, through
//! [`pci::msix::MsiSink`], notifications arrive on eventfds, and guest memory is only touched through
//! vm-memory's checked accessors.

#[macro_use]
mod complaint;

pub mod bus;
pub mod discard;
pub mod host_file;
pub mod legacy;
pub mod pci;
pub mod rate_limiter;
pub mod virtio;

pub use arch::{GuestMemory, GuestRegion, GuestSlice};
