//! What a transport needs of a device, and a device of its transport.

use std::sync::Arc;

use event_manager::MutEventSubscriber;
use telemetry::Readings;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::{DeviceState, QueuePosition, RestoreError};
use crate::GuestMemory;

/// How a device interrupts its driver. Implemented by transports; shared with other threads.
pub trait Interrupt: Send + Sync {
    /// Used buffers are in queue `index` (virtio 1.2, 2.7.10). The caller has asked the queue
    /// whether the driver wants to hear of it.
    fn used_buffers(&self, index: u16);
    /// The configuration space changed (virtio 1.2, 2.3).
    fn config_changed(&self);
    /// The device cannot go on without a reset: sets `DEVICE_NEEDS_RESET` and tells the driver
    /// (virtio 1.2, 2.1.2).
    fn needs_reset(&self);
}

/// What a device gets when its driver sets `DRIVER_OK`.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The queues, in the device's order, validated and frozen: a later write to a queue's
    /// registers does not reach them. A queue the driver left unready is `None`.
    pub queues: Vec<Option<Queue>>,
    /// The features both sides agreed on.
    pub features: u64,
    /// The way to the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device did not start; its transport then reports `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
#[error("{device}: cannot start: {reason}")]
pub struct ActivateError {
    /// The device's name, for example `drive rootfs`.
    pub device: String,
    /// What is missing.
    pub reason: String,
}

/// One virtio device, behind any transport.
///
/// # Lifecycle
///
/// 1. Made, then added to the event loop: `init` registers its [`queue_events`] (and what else it
///    waits for) at once. An event that arrives while the device is not active is drained and ignored.
/// 2. [`activate`] at `DRIVER_OK`, on a vCPU thread. From here the device may touch guest memory,
///    always on the event-loop thread and under the device's lock.
/// 3. [`reset`] at any time, on a vCPU thread. When it returns, no request is in flight and the
///    device holds no queue, so nothing touches guest memory until the next `activate`.
/// 4. [`drain`] on the event-loop thread, before [`queue_positions`] and [`save`]: those are only
///    right while nothing is in flight.
///
/// A device never panics, whatever the queues contain, and caps its work for one event (it signals
/// its own eventfd to go on).
///
/// [`drain`]: VirtioDevice::drain
/// [`queue_events`]: VirtioDevice::queue_events
/// [`activate`]: VirtioDevice::activate
/// [`queue_positions`]: VirtioDevice::queue_positions
/// [`reset`]: VirtioDevice::reset
/// [`save`]: VirtioDevice::save
pub trait VirtioDevice: MutEventSubscriber + Send {
    /// Virtio device type (virtio 1.2, 5).
    fn device_type(&self) -> u32;

    /// Largest size of each queue; its length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// One eventfd per queue, written by the transport (by ioeventfd, not by an exit) when the
    /// driver notifies that queue.
    fn queue_events(&self) -> &[EventFd];

    /// Features offered, `VIRTIO_F_VERSION_1` among them.
    fn features(&self) -> u64;

    /// Reads the configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space; what is read-only or past its end is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver is ready. See the lifecycle above.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops and forgets the driver. See the lifecycle above.
    fn reset(&mut self);

    /// Finishes what is in flight, before a snapshot. New requests are not taken.
    fn drain(&mut self) {}

    /// Where the device is in each of its queues, for a snapshot; nothing where it is not active.
    /// A chain that was taken and not returned counts as not taken.
    fn queue_positions(&self) -> Vec<Option<QueuePosition>>;

    /// What the device has counted since it was made. Reading changes nothing.
    fn metrics(&self) -> Option<Readings> {
        None
    }

    /// What the device knows beside that, for a snapshot.
    fn save(&self) -> DeviceState {
        DeviceState::Plain
    }

    /// Takes up what another device with the same configuration knew; before activation.
    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Plain => Ok(()),
            other => Err(other.mismatch()),
        }
    }
}
