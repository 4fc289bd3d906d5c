//! What runs containers on this host: images become micro-VMs with a network, volumes and a state.

pub mod agent;
pub mod container;
pub mod disk;
pub mod kernel;
mod names;
pub mod network;
pub mod paths;
mod random;
pub mod spec;
