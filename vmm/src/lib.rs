//! One micro-VM on KVM: guest memory, virtual processors, devices and the loop that serves them.

pub mod controller;
mod cpu_template;
mod device_manager;
mod error;
pub mod event_loop;
mod generation;
pub mod isolation;
mod limits;
pub mod logger;
mod machine;
mod memory;
mod metadata;
pub mod metrics;
mod msi;
mod output_file;
mod pci;
mod pmem;
pub mod seccomp;
mod slots;
pub mod snapshot;
mod vcpu;

pub use error::StartError;
pub use machine::Handed;
