//! One micro-VM on KVM: guest memory, virtual processors, devices and the loop that serves them.

pub mod controller;
mod device_manager;
mod error;
pub mod event_loop;
pub mod logger;
mod machine;
mod memory;
mod vcpu;

pub use error::StartError;
