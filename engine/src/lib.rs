//! What runs containers on this host: images become micro-VMs with a network, volumes and a state.

pub mod agent;
pub mod container;
mod conversation;
pub mod disk;
pub mod doctor;
pub mod kernel;
mod names;
pub mod network;
pub mod paths;
pub mod programs;
mod random;
pub mod run;
pub mod spec;
pub mod stdio;
mod vmm;
pub mod volume;

pub use agent_protocol::WindowSize;
