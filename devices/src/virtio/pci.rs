//! virtio-pci, the transport over PCI (virtio 1.2, 4.1), without its legacy interface: structures in
//! one BAR, that capabilities tell the places of, and interrupts by MSI-X.
//!
//! ```text
//!  0x0000  common configuration    status, features, queues
//!  0x1000  ISR status
//!  0x2000  device configuration
//!  0x3000  notifications           four bytes for each queue
//!  0x4000  MSI-X table
//!  0x5000  MSI-X pending bits
//! ```
//!
//! Each has a page for itself, so that a guest may map them differently. There is no interrupt pin:
//! a driver without MSI-X has to poll.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::{
    VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_VSOCK,
};
use vmm_sys_util::eventfd::EventFd;

use super::negotiation::{
    CONFIG_CHANGED, Negotiation, NegotiationState, Signals, USED_BUFFERS, half, lock, set_half,
};
use super::{Interrupt, RestoreError, VirtioDevice};
use crate::GuestMemory;
use crate::pci::PciFunction;
use crate::pci::configuration::{ConfigurationSpace, Identity};
use crate::pci::msix::{self, MsiSink, Msix};

/// The only BAR, of 64 bits.
pub const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;

const COMMON: u64 = 0;
const COMMON_SIZE: u64 = 0x38;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const PAGE: u64 = 0x1000;

/// Distance between the notification addresses of queues, in bytes.
const NOTIFY_MULTIPLIER: u64 = 4;
/// As many queues as have vectors in a page, of which the configuration takes one.
const MAX_QUEUES: usize = (PAGE / msix::ENTRY_SIZE) as usize - 1;

/// A queue's or the configuration's vector where it has none (virtio 1.2, 4.1.4.3).
const NO_VECTOR: u16 = 0xffff;

/// Virtio's vendor ID, and the device ID of type 0 (virtio 1.2, 4.1.2).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;

/// Kinds of capabilities (virtio 1.2, 4.1.4).
mod kind {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const ACCESS: u8 = 5;
}
/// Identifier of a vendor's own capabilities.
const VENDOR_CAPABILITY: u8 = 9;
/// Where BAR, offset, length and data are in a capability.
const CAPABILITY_BAR: u16 = 4;
const CAPABILITY_OFFSET: u16 = 8;
const CAPABILITY_LENGTH: u16 = 12;
const CAPABILITY_DATA: u16 = 16;

/// Registers of the common configuration (virtio 1.2, 4.1.4.3).
mod common {
    pub const DEVICE_FEATURES_PAGE: u64 = 0x00;
    pub const DEVICE_FEATURES: u64 = 0x04;
    pub const DRIVER_FEATURES_PAGE: u64 = 0x08;
    pub const DRIVER_FEATURES: u64 = 0x0c;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const QUEUES: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFFSET: u64 = 0x1e;
    pub const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub const QUEUE_AVAILABLE: u64 = 0x28;
    pub const QUEUE_USED: u64 = 0x30;
}

/// Which vector tells of what.
struct Vectors {
    msix: Msix,
    config: u16,
    queues: Vec<u16>,
}

impl Vectors {
    /// A vector that a driver may choose: one that is there, or none.
    fn check(&self, vector: u16) -> u16 {
        if vector < self.msix.count() { vector } else { NO_VECTOR }
    }
}

/// What the transport shares with its device's threads.
struct Messages {
    signals: Arc<Signals>,
    vectors: Mutex<Vectors>,
}

impl Interrupt for Messages {
    fn used_buffers(&self, index: u16) {
        self.signals.causes.fetch_or(USED_BUFFERS, Ordering::SeqCst);
        let mut vectors = lock(&self.vectors);
        if let Some(vector) = vectors.queues.get(usize::from(index)).copied() {
            vectors.msix.trigger(vector);
        }
    }

    fn config_changed(&self) {
        self.signals.causes.fetch_or(CONFIG_CHANGED, Ordering::SeqCst);
        let mut vectors = lock(&self.vectors);
        let vector = vectors.config;
        vectors.msix.trigger(vector);
    }

    fn needs_reset(&self) {
        self.signals.set_broken();
        self.config_changed();
    }
}

/// The transport's part of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciTransportState {
    /// What driver and device settled.
    pub negotiation: NegotiationState,
    /// The configuration space.
    pub configuration: Vec<u8>,
    /// The MSI-X table.
    pub vectors: Vec<msix::Vector>,
    /// Vector of configuration changes.
    pub config_vector: u16,
    /// Vector of each queue.
    pub queue_vectors: Vec<u16>,
}

/// One device as a PCI function.
pub struct PciTransport {
    negotiation: Negotiation,
    messages: Arc<Messages>,
    configuration: ConfigurationSpace,
    msix_capability: u8,
    access_capability: u16,
}

impl PciTransport {
    /// How many MSI-X vectors a device has: one for each queue and one for its configuration. Its
    /// [`MsiSink`] must have as many.
    pub fn vector_count(device: &dyn VirtioDevice) -> u16 {
        u16::try_from(device.queue_max_sizes().len()).unwrap_or(u16::MAX).saturating_add(1)
    }

    /// Makes a device a function, to be put on a bus. Fails where the device declares a queue size
    /// that is no power of two, or more queues than there is room for.
    pub fn new(
        memory: GuestMemory,
        device: Arc<Mutex<dyn VirtioDevice>>,
        sink: Arc<dyn MsiSink>,
    ) -> io::Result<PciTransport> {
        let (device_type, vectors, queues) = {
            let device = lock(&device);
            (device.device_type(), Self::vector_count(&*device), device.queue_max_sizes().len())
        };
        if queues > MAX_QUEUES {
            return Err(io::Error::other(format!("{queues} queues are too many for virtio-pci")));
        }
        let msix = Msix::new(vectors, sink);
        let (configuration, msix_capability, access_capability) =
            describe(device_type, &msix).map_err(io::Error::other)?;
        let signals = Arc::new(Signals::default());
        let messages = Arc::new(Messages {
            signals: signals.clone(),
            vectors: Mutex::new(Vectors {
                msix,
                config: NO_VECTOR,
                queues: vec![NO_VECTOR; queues],
            }),
        });
        let negotiation = Negotiation::new(memory, device, signals, messages.clone())?;
        Ok(PciTransport {
            negotiation,
            messages,
            configuration,
            msix_capability,
            access_capability: access_capability.into(),
        })
    }

    /// Copies of the eventfds of the device's queues, in order, each with its offset in [`BAR`]: to be
    /// made ioeventfds there, for a write of any size and any value.
    pub fn queue_notifications(&self) -> io::Result<Vec<(EventFd, u64)>> {
        let offsets = (NOTIFY..).step_by(NOTIFY_MULTIPLIER as usize);
        Ok(self.negotiation.queue_events()?.into_iter().zip(offsets).collect())
    }

    /// The transport's state, for a snapshot.
    pub fn save(&self) -> PciTransportState {
        let vectors = lock(&self.messages.vectors);
        PciTransportState {
            negotiation: self.negotiation.save(),
            configuration: self.configuration.save(),
            vectors: vectors.msix.save(),
            config_vector: vectors.config,
            queue_vectors: vectors.queues.clone(),
        }
    }

    /// Takes the state out of a snapshot, tells the [`MsiSink`] of all messages, and starts the device
    /// if it ran; it has taken up its own state before. The bus has to be told by
    /// [`restored`](crate::pci::PciBus::restored).
    pub fn restore(&mut self, state: &PciTransportState) -> Result<(), RestoreError> {
        let refused = |reason: &str| Err(RestoreError(reason.to_owned()));
        {
            let mut vectors = lock(&self.messages.vectors);
            if state.queue_vectors.len() != vectors.queues.len() {
                return refused("it has other queues");
            }
            if !vectors.msix.restore(&state.vectors) {
                return refused("it has other MSI-X vectors");
            }
            vectors.config = vectors.check(state.config_vector);
            vectors.queues =
                state.queue_vectors.iter().map(|vector| vectors.check(*vector)).collect();
            self.configuration.restore(&state.configuration);
            vectors.msix.set_control(self.configuration.word(self.msix_capability + 2));
        }
        // A device that starts may interrupt at once.
        self.negotiation.restore(&state.negotiation)
    }

    /// A register of the common configuration, by offset and size.
    fn read_common(&mut self, offset: u64, size: usize) -> u32 {
        use common::*;
        let negotiation = &mut self.negotiation;
        let registers = &negotiation.registers;
        let queue = negotiation.queue();
        match (offset, size) {
            (DEVICE_FEATURES_PAGE, 4) => registers.device_features_page,
            (DEVICE_FEATURES, 4) => negotiation.device_features(),
            (DRIVER_FEATURES_PAGE, 4) => registers.driver_features_page,
            (DRIVER_FEATURES, 4) => negotiation.driver_features(),
            (CONFIG_VECTOR, 2) => lock(&self.messages.vectors).config.into(),
            (QUEUES, 2) => registers.queues.len() as u32,
            (STATUS, 1) => negotiation.status(),
            (CONFIG_GENERATION, 1) => negotiation.config_generation(),
            (QUEUE_SELECT, 2) => registers.selected_queue,
            (QUEUE_SIZE, 2) => queue.map_or(0, |queue| queue.size),
            (QUEUE_VECTOR, 2) => {
                let vectors = lock(&self.messages.vectors);
                let vector = vectors.queues.get(registers.selected_queue as usize);
                vector.copied().unwrap_or(NO_VECTOR).into()
            }
            (QUEUE_ENABLE, 2) => queue.map_or(0, |queue| queue.ready.into()),
            (QUEUE_NOTIFY_OFFSET, 2) => queue.map_or(0, |_| registers.selected_queue),
            (QUEUE_DESCRIPTORS..COMMON_SIZE, 4) if offset.is_multiple_of(4) => {
                queue.map_or(0, |queue| {
                    let register = match offset & !7 {
                        QUEUE_DESCRIPTORS => queue.descriptors,
                        QUEUE_AVAILABLE => queue.available,
                        QUEUE_USED => queue.used,
                        _ => 0,
                    };
                    half(register, offset & 4 != 0)
                })
            }
            _ => 0,
        }
    }

    fn write_common(&mut self, offset: u64, size: usize, value: u32) {
        use common::*;
        let negotiation = &mut self.negotiation;
        let registers = &mut negotiation.registers;
        match (offset, size) {
            (DEVICE_FEATURES_PAGE, 4) => registers.device_features_page = value,
            (DRIVER_FEATURES_PAGE, 4) => registers.driver_features_page = value,
            (DRIVER_FEATURES, 4) => negotiation.set_driver_features(value),
            (CONFIG_VECTOR, 2) => {
                let mut vectors = lock(&self.messages.vectors);
                vectors.config = vectors.check(value as u16);
            }
            (STATUS, 1) => self.set_status(value),
            (QUEUE_SELECT, 2) => registers.selected_queue = value,
            (QUEUE_VECTOR, 2) => {
                let mut vectors = lock(&self.messages.vectors);
                let vector = vectors.check(value as u16);
                if let Some(entry) = vectors.queues.get_mut(registers.selected_queue as usize) {
                    *entry = vector;
                }
            }
            (QUEUE_SIZE | QUEUE_ENABLE, 2) | (QUEUE_DESCRIPTORS..COMMON_SIZE, 4) => {
                let Some(queue) = negotiation.queue_mut() else { return };
                let high = offset & 4 != 0;
                match (offset, offset & !7) {
                    (QUEUE_SIZE, _) => queue.size = value,
                    // A driver cannot take it back (virtio 1.2, 4.1.4.3.2).
                    (QUEUE_ENABLE, _) => queue.ready |= value == 1,
                    _ if !offset.is_multiple_of(4) => {}
                    (_, QUEUE_DESCRIPTORS) => set_half(&mut queue.descriptors, high, value),
                    (_, QUEUE_AVAILABLE) => set_half(&mut queue.available, high, value),
                    (_, QUEUE_USED) => set_half(&mut queue.used, high, value),
                    _ => {}
                }
            }
            _ => tracing::debug!("write to unknown or read-only register {offset:#x}"),
        }
    }

    fn set_status(&mut self, value: u32) {
        self.negotiation.set_status(value);
        if value == 0 {
            let mut vectors = lock(&self.messages.vectors);
            vectors.config = NO_VECTOR;
            vectors.queues.fill(NO_VECTOR);
        }
    }

    /// Where the window of the configuration access capability is, if the driver made it one
    /// (virtio 1.2, 4.1.4.9): a part of the BAR, of 1, 2 or 4 bytes.
    fn window(&self) -> Option<(u64, usize)> {
        let register = |at| {
            let mut data = [0; 4];
            self.configuration.read(self.access_capability + at, &mut data);
            u32::from_le_bytes(data)
        };
        let bar = register(CAPABILITY_BAR) as u8;
        let (offset, length) = (register(CAPABILITY_OFFSET), register(CAPABILITY_LENGTH));
        let aligned = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        (bar == BAR && aligned && u64::from(offset) < BAR_SIZE)
            .then_some((offset.into(), length as usize))
    }

    /// Whether an access of the configuration space is one of what is behind that window.
    fn is_windowed(&self, offset: u16, size: usize) -> bool {
        let data = usize::from(self.access_capability + CAPABILITY_DATA);
        let offset = usize::from(offset);
        offset < data + 4 && data < offset.saturating_add(size)
    }
}

/// The configuration space of a device of this type, and where in it the capabilities of MSI-X and of
/// configuration access are.
fn describe(
    device_type: u32,
    msix: &Msix,
) -> Result<(ConfigurationSpace, u8, u8), crate::pci::configuration::LayoutError> {
    let class = match device_type {
        VIRTIO_ID_NET => 0x02_0000,
        // Mass storage and communication, neither of the kinds that have a name.
        VIRTIO_ID_BLOCK => 0x01_8000,
        VIRTIO_ID_CONSOLE | VIRTIO_ID_VSOCK => 0x07_8000,
        _ => 0xff_0000,
    };
    let mut space = ConfigurationSpace::new(&Identity {
        vendor: VENDOR,
        device: FIRST_DEVICE.wrapping_add(device_type as u16),
        // From 1 on there is no legacy interface (virtio 1.2, 4.1.2.1).
        revision: 1,
        class,
        subsystem_vendor: VENDOR,
        subsystem: 0x40,
    });
    space.add_bar(BAR, BAR_SIZE)?;
    let (body, writable) = msix.capability(BAR, TABLE as u32, PENDING as u32);
    let msix = space.add_capability(msix::CAPABILITY, &body, &writable)?;
    let notifications = (NOTIFY_MULTIPLIER as u32).to_le_bytes();
    for (kind, offset, length, more) in [
        (kind::COMMON, COMMON, COMMON_SIZE, [].as_slice()),
        (kind::ISR, ISR, 1, &[]),
        (kind::DEVICE, DEVICE, PAGE, &[]),
        (kind::NOTIFY, NOTIFY, PAGE, &notifications),
    ] {
        let body = capability(kind, offset as u32, length as u32, more);
        space.add_capability(VENDOR_CAPABILITY, &body, &[])?;
    }
    let body = capability(kind::ACCESS, 0, 0, &[0; 4]);
    // The BAR, then offset, length and data.
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    let access = space.add_capability(VENDOR_CAPABILITY, &body, &writable)?;
    Ok((space, msix, access))
}

/// Where a structure is (virtio 1.2, 4.1.4), behind the capability's identifier and link.
fn capability(kind: u8, offset: u32, length: u32, more: &[u8]) -> Vec<u8> {
    let size = 16 + more.len() as u8;
    let mut body = vec![size, kind, BAR, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(more);
    body
}

impl PciFunction for PciTransport {
    fn configuration(&self) -> &ConfigurationSpace {
        &self.configuration
    }

    fn configuration_mut(&mut self) -> &mut ConfigurationSpace {
        &mut self.configuration
    }

    fn read_configuration(&mut self, offset: u16, data: &mut [u8]) {
        if self.is_windowed(offset, data.len())
            && let Some((at, length)) = self.window()
        {
            let mut bytes = [0; 4];
            self.read_bar(BAR, at, &mut bytes[..length]);
            let register = self.access_capability + CAPABILITY_DATA;
            self.configuration.write(register, &bytes[..length]);
        }
        self.configuration.read(offset, data);
    }

    fn write_configuration(&mut self, offset: u16, data: &[u8]) {
        self.configuration.write(offset, data);
        if self.is_windowed(offset, data.len())
            && let Some((at, length)) = self.window()
        {
            let mut bytes = [0; 4];
            self.configuration.read(self.access_capability + CAPABILITY_DATA, &mut bytes);
            self.write_bar(BAR, at, &bytes[..length]);
        }
        let control = self.configuration.word(self.msix_capability + 2);
        lock(&self.messages.vectors).msix.set_control(control);
    }

    fn read_bar(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = offset % PAGE;
        match offset - at {
            COMMON => match data.len() {
                size @ (1 | 2 | 4) => {
                    let value = self.read_common(at, size).to_le_bytes();
                    data.copy_from_slice(&value[..size]);
                }
                // Only registers of 64 bits may be read in one go.
                8 if at >= common::QUEUE_DESCRIPTORS && at.is_multiple_of(8) => {
                    for (at, to) in (at..).step_by(4).zip(data.as_chunks_mut().0) {
                        *to = self.read_common(at, 4).to_le_bytes();
                    }
                }
                _ => {}
            },
            // Reading acknowledges (virtio 1.2, 4.1.4.5).
            ISR if at == 0 => {
                if let [first, ..] = data {
                    *first = self.negotiation.signals.causes.swap(0, Ordering::SeqCst) as u8;
                }
            }
            DEVICE => self.negotiation.read_config(at, data),
            TABLE => lock(&self.messages.vectors).msix.read_table(at, data),
            PENDING => lock(&self.messages.vectors).msix.read_pending(at, data),
            _ => {}
        }
    }

    fn write_bar(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        let at = offset % PAGE;
        match offset - at {
            COMMON => match data.len() {
                size @ (1 | 2 | 4) => {
                    let mut value = [0; 4];
                    value[..size].copy_from_slice(data);
                    self.write_common(at, size, u32::from_le_bytes(value));
                }
                8 if at >= common::QUEUE_DESCRIPTORS && at.is_multiple_of(8) => {
                    for (at, word) in (at..).step_by(4).zip(data.as_chunks().0) {
                        self.write_common(at, 4, u32::from_le_bytes(*word));
                    }
                }
                _ => {}
            },
            DEVICE => self.negotiation.write_config(at, data),
            NOTIFY if at.is_multiple_of(NOTIFY_MULTIPLIER) => {
                self.negotiation.notify((at / NOTIFY_MULTIPLIER) as u32);
            }
            TABLE => lock(&self.messages.vectors).msix.write_table(at, data),
            _ => {}
        }
    }

    fn unplugged(&mut self) {
        self.set_status(0);
    }
}

#[cfg(test)]
mod tests;
