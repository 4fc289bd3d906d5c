//! virtio-mmio, the transport of memory-mapped registers (virtio 1.2, 4.2), without its legacy
//! interface.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_mmio::*;
use vmm_sys_util::eventfd::EventFd;

use super::negotiation::{
    CONFIG_CHANGED, Negotiation, NegotiationState, Signals, USED_BUFFERS, lock, set_half,
};
use super::{Interrupt, RestoreError, VirtioDevice};
use crate::GuestMemory;
use crate::bus::BusDevice;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// Any number that is not zero; this one spells the project.
const VENDOR: u32 = u32::from_le_bytes(*b"vmrn");

/// The interrupt line, with the register that tells why it was raised.
struct Line {
    event: EventFd,
    signals: Arc<Signals>,
}

impl Line {
    fn raise(&self, cause: u32) {
        self.signals.causes.fetch_or(cause, Ordering::SeqCst);
        if let Err(error) = self.event.write(1) {
            // The counter is full: the interrupt is pending anyway.
            tracing::debug!(%error, "interrupt not written");
        }
    }
}

impl Interrupt for Line {
    fn used_buffers(&self, _index: u16) {
        self.raise(USED_BUFFERS);
    }

    fn config_changed(&self) {
        self.raise(CONFIG_CHANGED);
    }

    fn needs_reset(&self) {
        self.signals.set_broken();
        self.config_changed();
    }
}

/// One device's registers.
pub struct MmioTransport {
    negotiation: Negotiation,
    line: Arc<Line>,
}

impl MmioTransport {
    /// Puts a device behind registers. Fails where no eventfd can be made, or where the device
    /// declares a queue size that is no power of two.
    pub fn new(
        memory: GuestMemory,
        device: Arc<Mutex<dyn VirtioDevice>>,
    ) -> io::Result<MmioTransport> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let signals = Arc::new(Signals::default());
        let line = Arc::new(Line { event, signals: signals.clone() });
        let negotiation = Negotiation::new(memory, device, signals, line.clone())?;
        Ok(MmioTransport { negotiation, line })
    }

    /// Written when the device interrupts: to be made an irqfd.
    pub fn interrupt_event(&self) -> &EventFd {
        &self.line.event
    }

    /// Copies of the eventfds of the device's queues, in order: to be made ioeventfds on the queue
    /// notification register with the queue's index as the value.
    pub fn queue_events(&self) -> io::Result<Vec<EventFd>> {
        self.negotiation.queue_events()
    }

    /// The registers, for a snapshot.
    pub fn save(&self) -> NegotiationState {
        self.negotiation.save()
    }

    /// Takes registers out of a snapshot, and starts the device if it ran. It has taken up its own
    /// state before.
    pub fn restore(&mut self, state: &NegotiationState) -> Result<(), RestoreError> {
        self.negotiation.restore(state)
    }

    fn read_register(&mut self, offset: u32) -> u32 {
        let negotiation = &mut self.negotiation;
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => lock(&negotiation.device).device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => negotiation.device_features(),
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                negotiation.queue().map_or(0, |queue| queue.max_size.into())
            }
            VIRTIO_MMIO_QUEUE_READY => negotiation.queue().map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => negotiation.signals.causes.load(Ordering::SeqCst),
            VIRTIO_MMIO_STATUS => negotiation.status(),
            // Shared memory regions: there are none, which a length of all ones says.
            VIRTIO_MMIO_SHM_LEN_LOW..=0xbc => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => negotiation.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        let negotiation = &mut self.negotiation;
        let registers = &mut negotiation.registers;
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES => negotiation.set_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => registers.selected_queue = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => negotiation.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => {
                negotiation.signals.causes.fetch_and(!value, Ordering::SeqCst);
            }
            VIRTIO_MMIO_STATUS => negotiation.set_status(value),
            _ => {
                let Some(queue) = negotiation.queue_mut() else { return };
                match offset {
                    VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
                    VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
                    VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.descriptors, false, value),
                    VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, true, value),
                    VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.available, false, value),
                    VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.available, true, value),
                    VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.used, false, value),
                    VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.used, true, value),
                    _ => tracing::debug!("write to unknown or read-only register {offset:#x}"),
                }
            }
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let config = u64::from(VIRTIO_MMIO_CONFIG);
        if offset >= config {
            return self.negotiation.read_config(offset - config, data);
        }
        // Registers are 32 bits wide and aligned (virtio 1.2, 4.2.2.2); other accesses read zero.
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) if offset.is_multiple_of(4) => {
                *word = self.read_register(offset as u32).to_le_bytes();
            }
            _ => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let config = u64::from(VIRTIO_MMIO_CONFIG);
        if offset >= config {
            return self.negotiation.write_config(offset - config, data);
        }
        if let Ok(word) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset as u32, u32::from_le_bytes(word));
        }
    }
}

#[cfg(test)]
mod tests;
