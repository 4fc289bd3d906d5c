//! What runs containers on this host: images become micro-VMs with a network, volumes and a state.

pub mod kernel;
pub mod network;
