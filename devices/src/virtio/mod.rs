//! Virtio devices (virtio 1.2, modern only) and their transports.

mod device;

pub use device::{ActivateError, Activation, Interrupt, VirtioDevice};
