//! What runs containers on this host: images become micro-VMs with a network, volumes and a state.

pub mod agent;
pub mod clones;
mod confined;
pub mod confinement;
pub mod container;
mod conversation;
pub mod converter;
pub mod disk;
pub mod doctor;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod gift;
pub mod kernel;
mod machine_api;
mod making;
mod names;
pub mod network;
pub mod paths;
pub mod programs;
mod random;
pub mod run;
pub mod snapshot;
pub mod spec;
pub mod stdio;
mod vmm;
pub mod volume;

pub use agent_protocol::WindowSize;
