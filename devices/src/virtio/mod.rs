//! Virtio devices (virtio 1.2, modern only) and their transports.

pub mod balloon;
pub mod block;
pub mod console;
mod device;
pub mod mem;
pub mod mmio;
pub mod negotiation;
pub mod net;
pub mod pci;
pub mod pmem;
pub mod queue;
pub mod rng;
mod state;
#[cfg(test)]
mod test_driver;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod transport_rules;
mod vectored;
pub mod vsock;

use std::os::fd::AsRawFd;
use std::time::Instant;

use event_manager::{EventOps, EventSet, Events};

pub use device::{ActivateError, Activation, Interrupt, VirtioDevice};
pub use state::{DeviceState, QueuePosition, RestoreError};

use crate::rate_limiter::{RateLimiter, RateLimiterState};
use queue::{DeviceQueue, QueueError};

/// Takes the queues of a device all of whose queues must be there.
fn take_queues<const N: usize>(
    device: &str,
    activation: Activation,
) -> Result<[DeviceQueue; N], ActivateError> {
    let missing = |index: usize| ActivateError {
        device: device.to_owned(),
        reason: format!("queue {index} was not set up"),
    };
    let mut queues = Vec::with_capacity(N);
    for (index, queue) in activation.queues.into_iter().enumerate() {
        let queue = queue.ok_or_else(|| missing(index))?;
        let (memory, interrupt) = (activation.memory.clone(), activation.interrupt.clone());
        queues.push(DeviceQueue::new(queue, index as u16, memory, interrupt));
    }
    let have = queues.len();
    queues.try_into().map_err(|_| missing(have))
}

/// Waits for `events` on a descriptor, to be told of with this number.
fn register(ops: &mut EventOps, descriptor: &impl AsRawFd, data: u32, events: EventSet) {
    if let Err(error) = ops.add(Events::with_data(descriptor, data, events)) {
        tracing::error!(?error, "cannot wait for a device's events");
    }
}

/// Waits for a limiter's timer, to be told of with this number. A limiter that was given its first
/// limit while the machine runs has one only now: this is for every event, before a device does
/// anything that may be refused.
fn register_timer(ops: &mut EventOps, limiter: &mut RateLimiter, data: u32) {
    if let Some(timer) = limiter.timer_to_watch() {
        register(ops, &timer, data, EventSet::IN);
    }
}

/// Limits as a snapshot has them, from now on.
fn restore_limits(state: &RateLimiterState) -> Result<RateLimiter, RestoreError> {
    RateLimiter::restore(state, Instant::now()).map_err(|error| RestoreError(error.to_string()))
}

/// Stops a device whose driver broke the rules, until that driver resets it.
fn broken(device: &str, queue: &mut Option<DeviceQueue>, error: &QueueError) {
    guest_warning!(device, %error, "device needs a reset");
    if let Some(queue) = queue.take() {
        queue.needs_reset();
    }
}

/// The same for a device of several queues.
fn broken_all<const N: usize>(
    device: &str,
    queues: &mut Option<[DeviceQueue; N]>,
    error: &QueueError,
) {
    guest_warning!(device, %error, "device needs a reset");
    if let Some([queue, ..]) = queues.take().as_ref().map(|queues| queues.as_slice()) {
        queue.needs_reset();
    }
}

/// Reads from a configuration space that ends where `bytes` do.
fn read_bytes(bytes: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(from) = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)) else {
        return;
    };
    for (to, from) in data.iter_mut().zip(from) {
        *to = *from;
    }
}
