//! x86_64: where things are in a guest's address space, how a kernel is entered, and what the
//! processor and the platform tell it about themselves.
//!
//! Nothing here knows devices or containers. KVM appears only as the types of its registers.

#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod cpuid;
mod image_file;
pub mod layout;
pub mod memory;
pub mod registers;

/// Guest memory, as the whole monitor uses it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<memory::DirtyBitmap>;
/// A contiguous piece of guest memory.
pub type GuestRegion = vm_memory::GuestRegionMmap<memory::DirtyBitmap>;
/// Bytes of guest memory in the host's address space.
pub type GuestSlice<'a> =
    vm_memory::VolatileSlice<'a, vm_memory::bitmap::BS<'a, memory::DirtyBitmap>>;
