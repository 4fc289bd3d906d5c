//! virtio-mmio, the transport of memory-mapped registers (virtio 1.2, 4.2), without its legacy
//! interface.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Interrupt, QueuePosition, RestoreError, VirtioDevice};
use crate::GuestMemory;
use crate::bus::BusDevice;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// Any number that is not zero; this one spells the project.
const VENDOR: u32 = u32::from_le_bytes(*b"vmrn");

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// What the transport shares with its device's threads.
struct Line {
    event: EventFd,
    /// Interrupt status register: bit 0 used buffers, bit 1 configuration change.
    status: AtomicU32,
    /// `DEVICE_NEEDS_RESET`, merged into the device status register.
    broken: AtomicU32,
}

impl Line {
    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        if let Err(error) = self.event.write(1) {
            // The counter is full: the interrupt is pending anyway.
            tracing::debug!(%error, "interrupt not written");
        }
    }
}

impl Interrupt for Line {
    fn used_buffers(&self, _index: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn config_changed(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn needs_reset(&self) {
        self.broken.store(NEEDS_RESET, Ordering::SeqCst);
        self.config_changed();
    }
}

/// A transport's registers, for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    status: u32,
    interrupt_status: u32,
    device_features_page: u32,
    driver_features_page: u32,
    driver_features: u64,
    selected_queue: u32,
    queues: Vec<QueueRegisters>,
    /// Where the device is in its queues; none where it was not active.
    positions: Vec<Option<QueuePosition>>,
}

/// What the driver says of one queue, as it says it: whether that can be is decided when the device
/// starts, so that no value the driver did not write ever takes the place of one that it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    max_size: u16,
    size: u32,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> QueueRegisters {
        let size = max_size.into();
        QueueRegisters { max_size, size, ready: false, descriptors: 0, available: 0, used: 0 }
    }

    /// The queue that these registers describe (virtio 1.2, 2.7).
    fn queue(&self, memory: &GuestMemory, event_idx: bool) -> Result<Queue, virtio_queue::Error> {
        use virtio_queue::Error;
        let mut queue = Queue::new(self.max_size)?;
        queue.try_set_size(u16::try_from(self.size).map_err(|_| Error::InvalidSize)?)?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(self.available))?;
        queue.try_set_used_ring_address(GuestAddress(self.used))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err(Error::AddressOverflow);
        }
        Ok(queue)
    }
}

/// Replaces one half of a 64-bit register.
fn set_half(register: &mut u64, high: bool, value: u32) {
    let shift = if high { 32 } else { 0 };
    *register = (*register & !(u64::from(u32::MAX) << shift)) | (u64::from(value) << shift);
}

/// One device's registers.
pub struct MmioTransport {
    device: Arc<Mutex<dyn VirtioDevice>>,
    memory: GuestMemory,
    queues: Vec<QueueRegisters>,
    line: Arc<Line>,
    status: u32,
    device_features_page: u32,
    driver_features_page: u32,
    driver_features: u64,
    selected_queue: u32,
}

/// A device whose lock is poisoned had a bug in another thread; its registers still answer.
fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MmioTransport {
    /// Puts a device behind registers. Fails where no eventfd can be made, or where the device
    /// declares a queue size that is no power of two.
    pub fn new(
        memory: GuestMemory,
        device: Arc<Mutex<dyn VirtioDevice>>,
    ) -> io::Result<MmioTransport> {
        let queues = lock(&device)
            .queue_max_sizes()
            .iter()
            .map(|size| match Queue::new(*size) {
                Ok(_) => Ok(QueueRegisters::new(*size)),
                Err(error) => Err(io::Error::other(error)),
            })
            .collect::<io::Result<_>>()?;
        let line = Line {
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            status: AtomicU32::new(0),
            broken: AtomicU32::new(0),
        };
        Ok(MmioTransport {
            device,
            memory,
            queues,
            line: Arc::new(line),
            status: 0,
            device_features_page: 0,
            driver_features_page: 0,
            driver_features: 0,
            selected_queue: 0,
        })
    }

    /// Written when the device interrupts: to be made an irqfd.
    pub fn interrupt_event(&self) -> &EventFd {
        &self.line.event
    }

    /// Copies of the eventfds of the device's queues, in order: to be made ioeventfds on the queue
    /// notification register with the queue's index as the value.
    pub fn queue_events(&self) -> io::Result<Vec<EventFd>> {
        lock(&self.device).queue_events().iter().map(EventFd::try_clone).collect()
    }

    /// What goes into a snapshot. Nothing may be in flight.
    pub fn save(&self) -> MmioState {
        MmioState {
            status: self.status | self.line.broken.load(Ordering::SeqCst),
            interrupt_status: self.line.status.load(Ordering::SeqCst),
            device_features_page: self.device_features_page,
            driver_features_page: self.driver_features_page,
            driver_features: self.driver_features,
            selected_queue: self.selected_queue,
            queues: self.queues.clone(),
            positions: lock(&self.device).queue_positions(),
        }
    }

    /// Takes up what a snapshot has, in place of what the driver would do step by step. The device
    /// has taken up its own state before.
    pub fn restore(&mut self, state: MmioState) -> Result<(), RestoreError> {
        let refused = |reason: String| Err(RestoreError(reason));
        let as_made = self.queues.iter().map(|queue| queue.max_size);
        if !state.queues.iter().map(|queue| queue.max_size).eq(as_made) {
            return refused("it has other queues".to_owned());
        }
        self.status = state.status & !NEEDS_RESET;
        self.line.broken.store(state.status & NEEDS_RESET, Ordering::SeqCst);
        self.line.status.store(state.interrupt_status, Ordering::SeqCst);
        if state.interrupt_status != 0 {
            // It may have been on its way to a processor, and then no other state has it. One too
            // many finds a driver that has acknowledged its cause.
            self.line.raise(state.interrupt_status);
        }
        self.device_features_page = state.device_features_page;
        self.driver_features_page = state.driver_features_page;
        self.driver_features = state.driver_features;
        self.selected_queue = state.selected_queue;
        self.queues = state.queues;
        if self.status & FEATURES_OK != 0 && !self.features_agree() {
            return refused("its driver uses features that are not offered".to_owned());
        }
        // A device that was not active, or had stopped, stays so.
        if self.status & DRIVER_OK == 0 || state.positions.is_empty() {
            return Ok(());
        }
        let mut queues = self.build_queues().map_err(RestoreError)?;
        if queues.len() != state.positions.len() {
            return refused("it has other queues".to_owned());
        }
        for (queue, position) in queues.iter_mut().zip(state.positions) {
            match (queue, position) {
                (Some(queue), Some(position)) => {
                    queue.set_next_avail(position.next_available);
                    queue.set_next_used(position.next_used);
                }
                // One that the driver set up and the device does not use.
                (Some(_), None) | (None, None) => {}
                (None, Some(_)) => return refused("a queue in use is not set up".to_owned()),
            }
        }
        let activation = self.activation(queues);
        lock(&self.device).activate(activation).map_err(|error| RestoreError(error.to_string()))
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.selected_queue as usize)
    }

    /// The selected queue, while its registers may be written: not before `FEATURES_OK`, and not
    /// once the device runs (a queue is frozen at activation).
    fn queue_mut(&mut self) -> Option<&mut QueueRegisters> {
        if self.status & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            tracing::debug!("queue register written in device status {:#x}", self.status);
            return None;
        }
        self.queues.get_mut(self.selected_queue as usize)
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => lock(&self.device).device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_page {
                0 => lock(&self.device).features() as u32,
                1 => (lock(&self.device).features() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.max_size.into()),
            VIRTIO_MMIO_QUEUE_READY => self.queue().map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.line.status.load(Ordering::SeqCst),
            VIRTIO_MMIO_STATUS => self.status | self.line.broken.load(Ordering::SeqCst),
            // Shared memory regions: there are none, which a length of all ones says.
            VIRTIO_MMIO_SHM_LEN_LOW..=0xbc => u32::MAX,
            // The configuration only changes with an interrupt that the driver waits for.
            VIRTIO_MMIO_CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.status & FEATURES_OK == 0 => {
                if let page @ 0..=1 = self.driver_features_page {
                    set_half(&mut self.driver_features, page == 1, value);
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => self.selected_queue = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.line.status.fetch_and(!value, Ordering::SeqCst);
            }
            VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => {
                let Some(queue) = self.queue_mut() else { return };
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

    /// A notification that came as an exit, because no ioeventfd is registered for this value.
    fn notify(&self, queue: u32) {
        if let Some(event) = lock(&self.device).queue_events().get(queue as usize) {
            let _ = event.write(1);
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let added = value & !self.status;
        // Bits are only ever added, one step after the other (virtio 1.2, 3.1.1).
        if self.status & !value & !NEEDS_RESET != 0 {
            tracing::debug!("driver took status bits back: {:#x} to {value:#x}", self.status);
            return;
        }
        // A driver that gave up has nothing left but a reset (virtio 1.2, 3.1.1).
        if value & FAILED != 0 {
            self.status |= FAILED;
            return;
        }
        for (bit, before) in [
            (ACKNOWLEDGE, 0),
            (DRIVER, ACKNOWLEDGE),
            (FEATURES_OK, ACKNOWLEDGE | DRIVER),
            (DRIVER_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK),
        ] {
            if added & bit == 0 || self.status & before != before {
                continue;
            }
            match bit {
                FEATURES_OK if !self.features_agree() => {}
                DRIVER_OK => self.activate(),
                _ => self.status |= bit,
            }
        }
    }

    fn features_agree(&self) -> bool {
        let offered = lock(&self.device).features();
        let agreed = self.driver_features & !offered == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0;
        if !agreed {
            let asked = self.driver_features;
            guest_warning!("driver asks for features {asked:#x}, offered are {offered:#x}");
        }
        agreed
    }

    fn activate(&mut self) {
        self.status |= DRIVER_OK;
        let started = self.build_queues().and_then(|queues| {
            let activation = self.activation(queues);
            lock(&self.device).activate(activation).map_err(|error| error.to_string())
        });
        if let Err(reason) = started {
            guest_warning!("{reason}");
            self.line.needs_reset();
        }
    }

    /// The queues that the registers describe, or why there can be none such.
    fn build_queues(&self) -> Result<Vec<Option<Queue>>, String> {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let build = |(index, registers): (usize, &QueueRegisters)| {
            if !registers.ready {
                return Ok(None);
            }
            let reason = match registers.queue(&self.memory, event_idx) {
                Ok(queue) if !rings_overlap(&queue) => return Ok(Some(queue)),
                Ok(_) => "rings overlap".to_owned(),
                Err(error) => error.to_string(),
            };
            Err(format!("queue {index} cannot be: {reason}"))
        };
        self.queues.iter().enumerate().map(build).collect()
    }

    fn activation(&self, queues: Vec<Option<Queue>>) -> Activation {
        Activation {
            memory: self.memory.clone(),
            queues,
            features: self.driver_features,
            interrupt: self.line.clone(),
        }
    }

    fn reset(&mut self) {
        lock(&self.device).reset();
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
        self.line.status.store(0, Ordering::SeqCst);
        self.line.broken.store(0, Ordering::SeqCst);
        self.status = 0;
        self.device_features_page = 0;
        self.driver_features_page = 0;
        self.driver_features = 0;
        self.selected_queue = 0;
    }
}

/// Whether two of a queue's three rings share a byte. They would not harm us, since everything is
/// read with care, but no driver means it.
fn rings_overlap(queue: &Queue) -> bool {
    let size = u64::from(queue.size());
    // Sizes with the trailing event index (virtio 1.2, 2.7). No sum overflows: the rings were
    // checked to lie in memory.
    let rings = [
        (queue.desc_table(), 16 * size),
        (queue.avail_ring(), 6 + 2 * size),
        (queue.used_ring(), 6 + 8 * size),
    ];
    rings.iter().enumerate().any(|(index, (start, length))| {
        rings[index + 1..].iter().any(|(other, other_length)| {
            start < &(other + other_length) && other < &(start + length)
        })
    })
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let config = u64::from(VIRTIO_MMIO_CONFIG);
        if offset >= config {
            return lock(&self.device).read_config(offset - config, data);
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
            // The configuration may be written once the driver knows the device.
            if self.status & DRIVER != 0 && self.status & FAILED == 0 {
                lock(&self.device).write_config(offset - config, data);
            }
            return;
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
