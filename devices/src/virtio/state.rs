//! What of a device goes into a snapshot, described once for each device.

use serde::{Deserialize, Serialize};

use super::balloon::BalloonState;
use super::mem::MemState;
use crate::rate_limiter::RateLimiterState;

/// Where a device is in a queue: all that its registers do not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePosition {
    /// Index of the next chain to take from the available ring.
    pub next_available: u16,
    /// Index of the next element of the used ring.
    pub next_used: u16,
}

/// What a device knows beside its configuration, its registers and its queues.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Nothing.
    Plain,
    /// A drive: what is left of its limits.
    Block(RateLimiterState),
    /// An interface: what is left of its limits.
    Net {
        /// On what the guest receives.
        rx: RateLimiterState,
        /// On what the guest sends.
        tx: RateLimiterState,
    },
    /// An entropy device: what is left of its limits.
    Rng(RateLimiterState),
    /// A console: the bytes that it may still write.
    Console {
        /// Bytes.
        left: u64,
    },
    /// A vsock device: the port that the next program of the host gets. A restored one goes on
    /// from there, so that no new connection has the ports of one that the guest still remembers.
    Vsock {
        /// The port.
        next_host_port: u32,
    },
    /// A balloon.
    Balloon(BalloonState),
    /// Memory that is plugged in block by block.
    Mem(MemState),
}

/// The state is none that this device can take up.
#[derive(Debug, thiserror::Error)]
#[error("a device cannot take up its state: {0}")]
pub struct RestoreError(pub String);

impl DeviceState {
    /// The error of a device that finds another's state.
    pub fn mismatch(&self) -> RestoreError {
        RestoreError(format!("it is another device's: {self:?}"))
    }
}
