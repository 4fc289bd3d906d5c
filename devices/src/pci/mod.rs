//! PCI (Local Bus Specification 3.0): one bus of 32 slots with a function each, reached by
//! memory-mapped configuration only (ECAM, PCI Express Base 3.0, 7.2.2), interrupts by MSI-X only.
//!
//! A guest learns of it from ACPI (`arch::acpi`): the MCFG table, a host bridge whose windows are
//! those of [`PciBus`], and the slots of [`hotplug`].
//!
//! Locks are taken in this order: the bus, a function, its device. [`BarSink`] and
//! [`msix::MsiSink`] are called with some of them held, and take none of them.

mod bus;
pub mod configuration;
pub mod hotplug;
pub mod msix;

pub use bus::{BarSink, Ecam, InsertError, MemoryWindow, PciBus, PciFunction, SLOTS};
