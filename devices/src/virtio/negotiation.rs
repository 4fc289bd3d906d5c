//! What a driver and its device settle before they work together (virtio 1.2, 2 and 3.1): status,
//! features and queues. The same behind every transport; a transport only says at which addresses.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Interrupt, QueuePosition, RestoreError, VirtioDevice};
use crate::GuestMemory;

pub(super) const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
pub(super) const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
pub(super) const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
pub(super) const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
pub(super) const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
pub(super) const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// Cause of an interrupt: used buffers (virtio 1.2, 4.1.4.5 and 4.2.2).
pub(super) const USED_BUFFERS: u32 = 1;
/// Cause of an interrupt: the configuration changed.
pub(super) const CONFIG_CHANGED: u32 = 2;

/// What the transport shares with its device's threads.
#[derive(Default)]
pub(super) struct Signals {
    /// Interrupt status: [`USED_BUFFERS`] and [`CONFIG_CHANGED`].
    pub causes: AtomicU32,
    /// `DEVICE_NEEDS_RESET`, merged into the device status register.
    pub broken: AtomicU32,
}

impl Signals {
    /// The device cannot go on without a reset.
    pub fn set_broken(&self) {
        self.broken.store(NEEDS_RESET, Ordering::SeqCst);
    }

    fn reset(&self) {
        self.causes.store(0, Ordering::SeqCst);
        self.broken.store(0, Ordering::SeqCst);
    }
}

/// What the driver says of one queue, as it says it: whether that can be is decided when the device
/// starts, so that no value the driver did not write ever takes the place of one that it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// Largest size the device takes.
    pub max_size: u16,
    /// Number of descriptors.
    pub size: u32,
    /// Whether the driver has set it up.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
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

/// All that a driver has told its device, but for what the transport adds to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverRegisters {
    /// Device status (virtio 1.2, 2.1), without `DEVICE_NEEDS_RESET`.
    pub status: u32,
    /// Which 32 of the device's features can be read.
    pub device_features_page: u32,
    /// Which 32 of the driver's features can be written.
    pub driver_features_page: u32,
    /// The features the driver wants.
    pub driver_features: u64,
    /// The queue whose registers can be accessed.
    pub selected_queue: u32,
    /// The queues.
    pub queues: Vec<QueueRegisters>,
}

/// A transport's registers as a snapshot keeps them, with what its device has signalled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NegotiationState {
    /// What the driver said.
    pub registers: DriverRegisters,
    /// Interrupt status: bit 0 used buffers, bit 1 configuration change.
    pub causes: u32,
    /// Whether `DEVICE_NEEDS_RESET` is set.
    pub broken: bool,
    /// The configuration's generation; the next one read is another.
    pub generation: u32,
    /// Where the device is in its queues; none where it was not active.
    pub positions: Vec<Option<QueuePosition>>,
}

/// Replaces one half of a 64-bit register.
pub(super) fn set_half(register: &mut u64, high: bool, value: u32) {
    let shift = if high { 32 } else { 0 };
    *register = (*register & !(u64::from(u32::MAX) << shift)) | (u64::from(value) << shift);
}

/// One half of a 64-bit register.
pub(super) fn half(register: u64, high: bool) -> u32 {
    (register >> if high { 32 } else { 0 }) as u32
}

/// A device whose lock is poisoned had a bug in another thread; its registers still answer.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As much of a device's configuration as is compared to tell whether it changed. No device that we
/// have has more.
const CONFIG_COMPARED: usize = 256;

/// A device with the registers its driver set.
pub(super) struct Negotiation {
    pub device: Arc<Mutex<dyn VirtioDevice>>,
    memory: GuestMemory,
    pub registers: DriverRegisters,
    pub signals: Arc<Signals>,
    interrupt: Arc<dyn Interrupt>,
    generation: u32,
    config_seen: [u8; CONFIG_COMPARED],
}

impl Negotiation {
    /// Fails where the device declares a queue size that is no power of two.
    pub fn new(
        memory: GuestMemory,
        device: Arc<Mutex<dyn VirtioDevice>>,
        signals: Arc<Signals>,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Negotiation> {
        let queues = lock(&device)
            .queue_max_sizes()
            .iter()
            .map(|size| match Queue::new(*size) {
                Ok(_) => Ok(QueueRegisters::new(*size)),
                Err(error) => Err(io::Error::other(error)),
            })
            .collect::<io::Result<_>>()?;
        Ok(Negotiation {
            device,
            memory,
            registers: DriverRegisters {
                status: 0,
                device_features_page: 0,
                driver_features_page: 0,
                driver_features: 0,
                selected_queue: 0,
                queues,
            },
            signals,
            interrupt,
            generation: 0,
            config_seen: [0; CONFIG_COMPARED],
        })
    }

    /// Copies of the eventfds of the device's queues, in order.
    pub fn queue_events(&self) -> io::Result<Vec<EventFd>> {
        lock(&self.device).queue_events().iter().map(EventFd::try_clone).collect()
    }

    /// The device status register.
    pub fn status(&self) -> u32 {
        self.registers.status | self.signals.broken.load(Ordering::SeqCst)
    }

    /// The features offered, of the page that the driver selected.
    pub fn device_features(&self) -> u32 {
        match self.registers.device_features_page {
            page @ 0..=1 => half(lock(&self.device).features(), page == 1),
            _ => 0,
        }
    }

    /// The features wanted, of the page that the driver selected.
    pub fn driver_features(&self) -> u32 {
        match self.registers.driver_features_page {
            page @ 0..=1 => half(self.registers.driver_features, page == 1),
            _ => 0,
        }
    }

    /// The driver wants these features of the selected page.
    pub fn set_driver_features(&mut self, value: u32) {
        if self.registers.status & FEATURES_OK == 0
            && let page @ 0..=1 = self.registers.driver_features_page
        {
            set_half(&mut self.registers.driver_features, page == 1, value);
        }
    }

    /// The selected queue.
    pub fn queue(&self) -> Option<&QueueRegisters> {
        self.registers.queues.get(self.registers.selected_queue as usize)
    }

    /// The selected queue, while its registers may be written: not before `FEATURES_OK`, and not
    /// once the device runs (a queue is frozen at activation).
    pub fn queue_mut(&mut self) -> Option<&mut QueueRegisters> {
        let registers = &mut self.registers;
        if registers.status & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            tracing::debug!("queue register written in device status {:#x}", registers.status);
            return None;
        }
        registers.queues.get_mut(registers.selected_queue as usize)
    }

    /// A notification that came as an exit, because no ioeventfd is registered for it.
    pub fn notify(&self, queue: u32) {
        if let Some(event) = lock(&self.device).queue_events().get(queue as usize) {
            let _ = event.write(1);
        }
    }

    /// Reads the device's configuration space.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        lock(&self.device).read_config(offset, data);
    }

    /// Writes the device's configuration space, once the driver knows the device.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.registers.status & DRIVER != 0 && self.registers.status & FAILED == 0 {
            lock(&self.device).write_config(offset, data);
        }
    }

    /// The configuration's generation (virtio 1.2, 2.5.1): another one whenever the configuration is
    /// not what it was when this was last asked. It is compared rather than counted, since a device
    /// changes its configuration before it says so.
    pub fn config_generation(&mut self) -> u32 {
        let mut config = [0; CONFIG_COMPARED];
        self.read_config(0, &mut config);
        if config != self.config_seen {
            self.config_seen = config;
            self.generation = self.generation.wrapping_add(1);
        }
        self.generation
    }

    /// The driver writes the device status register (virtio 1.2, 3.1.1).
    pub fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let status = self.registers.status;
        let added = value & !status;
        // Bits are only ever added, one step after the other (virtio 1.2, 3.1.1).
        if status & !value & !NEEDS_RESET != 0 {
            tracing::debug!("driver took status bits back: {status:#x} to {value:#x}");
            return;
        }
        // A driver that gave up has nothing left but a reset (virtio 1.2, 3.1.1).
        if value & FAILED != 0 {
            self.registers.status |= FAILED;
            return;
        }
        for (bit, before) in [
            (ACKNOWLEDGE, 0),
            (DRIVER, ACKNOWLEDGE),
            (FEATURES_OK, ACKNOWLEDGE | DRIVER),
            (DRIVER_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK),
        ] {
            if added & bit == 0 || self.registers.status & before != before {
                continue;
            }
            match bit {
                FEATURES_OK if !self.features_agree() => {}
                DRIVER_OK => self.activate(),
                _ => self.registers.status |= bit,
            }
        }
    }

    fn features_agree(&self) -> bool {
        let (asked, offered) = (self.registers.driver_features, lock(&self.device).features());
        let agreed = asked & !offered == 0 && asked & (1 << VIRTIO_F_VERSION_1) != 0;
        if !agreed {
            guest_warning!("driver asks for features {asked:#x}, offered are {offered:#x}");
        }
        agreed
    }

    fn activate(&mut self) {
        self.registers.status |= DRIVER_OK;
        let started = self.build_queues().and_then(|queues| {
            let activation = self.activation(queues);
            lock(&self.device).activate(activation).map_err(|error| error.to_string())
        });
        if let Err(reason) = started {
            guest_warning!("{reason}");
            self.interrupt.needs_reset();
        }
    }

    /// The queues that the registers describe, or why there can be none such.
    fn build_queues(&self) -> Result<Vec<Option<Queue>>, String> {
        let event_idx = self.registers.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
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
        self.registers.queues.iter().enumerate().map(build).collect()
    }

    fn activation(&self, queues: Vec<Option<Queue>>) -> Activation {
        Activation {
            memory: self.memory.clone(),
            queues,
            features: self.registers.driver_features,
            interrupt: self.interrupt.clone(),
        }
    }

    /// Resets the device and forgets its driver.
    pub fn reset(&mut self) {
        lock(&self.device).reset();
        let registers = &mut self.registers;
        for queue in &mut registers.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
        self.signals.reset();
        registers.status = 0;
        registers.device_features_page = 0;
        registers.driver_features_page = 0;
        registers.driver_features = 0;
        registers.selected_queue = 0;
    }

    /// What goes into a snapshot. Nothing may be in flight.
    pub fn save(&self) -> NegotiationState {
        NegotiationState {
            registers: self.registers.clone(),
            causes: self.signals.causes.load(Ordering::SeqCst),
            broken: self.signals.broken.load(Ordering::SeqCst) != 0,
            generation: self.generation,
            positions: lock(&self.device).queue_positions(),
        }
    }

    /// Takes up what a snapshot has, in place of what the driver would do step by step, and starts
    /// the device if it ran. It has taken up its own state before.
    pub fn restore(&mut self, state: &NegotiationState) -> Result<(), RestoreError> {
        let refused = |reason: &str| Err(RestoreError(reason.to_owned()));
        let sizes = |registers: &DriverRegisters| -> Vec<u16> {
            registers.queues.iter().map(|queue| queue.max_size).collect()
        };
        if sizes(&state.registers) != sizes(&self.registers) {
            return refused("it has other queues");
        }
        self.registers = state.registers.clone();
        self.signals.causes.store(state.causes, Ordering::SeqCst);
        let broken = if state.broken { NEEDS_RESET } else { 0 };
        self.signals.broken.store(broken, Ordering::SeqCst);
        self.generation = state.generation;
        self.config_seen = [0; CONFIG_COMPARED];
        let status = self.registers.status;
        if status & FEATURES_OK != 0 && !self.features_agree() {
            return refused("its driver uses features that are not offered");
        }
        // A device that was not active, or had stopped, stays so.
        if status & DRIVER_OK == 0 || state.positions.is_empty() {
            return Ok(());
        }
        let mut queues = self.build_queues().map_err(RestoreError)?;
        if queues.len() != state.positions.len() {
            return refused("it has other queues");
        }
        for (queue, position) in queues.iter_mut().zip(&state.positions) {
            match (queue, position) {
                (Some(queue), Some(position)) => {
                    queue.set_next_avail(position.next_available);
                    queue.set_next_used(position.next_used);
                }
                // One that the driver set up and the device does not use.
                (Some(_), None) | (None, None) => {}
                (None, Some(_)) => return refused("a queue in use is not set up"),
            }
        }
        let activation = self.activation(queues);
        lock(&self.device).activate(activation).map_err(|error| RestoreError(error.to_string()))
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
