//! Gives devices their window, interrupt and events.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use arch::acpi::VirtioMmio;
use arch::layout;
use devices::GuestMemory;
use devices::bus::{Bus, BusDevice};
use devices::virtio::mmio::MmioTransport;
use devices::virtio::{RestoreError, VirtioDevice};
use event_manager::MutEventSubscriber;
use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vmm_sys_util::eventfd::EventFd;

use crate::StartError;
use crate::machine::lock;
use crate::pci::{Pci, PciSlot};
use crate::snapshot::{SavedDevice, SavedRegisters};

/// What waits for events; shared with the device's registers.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// A virtio device behind its registers.
pub struct VirtioSlot {
    /// Its name: an API id, or what it is.
    pub name: String,
    /// Its registers.
    pub registers: Registers,
    /// The device itself.
    pub device: Arc<Mutex<dyn VirtioDevice>>,
}

/// What a driver finds a device by.
pub enum Registers {
    /// A window of addresses.
    Mmio(Arc<Mutex<MmioTransport>>),
    /// A function of the PCI bus.
    Pci(PciSlot),
}

impl VirtioSlot {
    /// Its virtio device type (virtio 1.2, 5).
    pub fn device_type(&self) -> u32 {
        lock(&self.device).device_type()
    }

    /// Its slot on the PCI bus.
    pub fn pci_slot(&self) -> Option<u8> {
        match &self.registers {
            Registers::Mmio(_) => None,
            Registers::Pci(slot) => Some(slot.number),
        }
    }

    /// Its state, for a snapshot.
    pub fn save(&self) -> SavedDevice {
        let registers = match &self.registers {
            Registers::Mmio(transport) => SavedRegisters::Mmio(lock(transport).save()),
            Registers::Pci(slot) => {
                SavedRegisters::Pci { slot: slot.number, state: lock(&slot.transport).save() }
            }
        };
        let device = lock(&self.device);
        let device_type = device.device_type();
        SavedDevice { name: self.name.clone(), device_type, registers, device: device.save() }
    }

    /// Takes up the state out of a snapshot, of a device on the same transport.
    pub fn restore(&self, saved: &SavedDevice, pci: Option<&Pci>) -> Result<(), StartError> {
        let failed = || StartError::device::<RestoreError>(self.name.clone());
        lock(&self.device).restore(saved.device.clone()).map_err(failed())?;
        match (&self.registers, &saved.registers, pci) {
            (Registers::Mmio(transport), SavedRegisters::Mmio(state), _) => {
                lock(transport).restore(state).map_err(failed())
            }
            (Registers::Pci(slot), SavedRegisters::Pci { state, .. }, Some(pci)) => {
                lock(&slot.transport).restore(state).map_err(failed())?;
                pci.restored(slot.number);
                Ok(())
            }
            _ => Err(failed()(RestoreError("it has another transport".to_owned()))),
        }
    }
}

/// The devices of a machine that is being built.
#[derive(Default)]
pub struct DeviceManager {
    /// Ports.
    pub pio: Bus,
    /// Addresses.
    pub mmio: Bus,
    /// For the event loop.
    pub subscribers: Vec<Subscriber>,
    /// For the ACPI tables.
    pub virtio: Vec<VirtioMmio>,
    /// The bus that virtio devices are put on, in place of windows of addresses.
    pub pci: Option<Pci>,
    /// In which slot of that bus each device was, by type and name, where it comes from a snapshot.
    pub pci_slots: HashMap<(u32, String), u8>,
    /// All virtio devices, in the order in which the guest shall find them.
    pub slots: Vec<VirtioSlot>,
    interrupts: Vec<(EventFd, u32)>,
    notifications: Vec<(EventFd, u64, u32)>,
}

impl DeviceManager {
    /// Adds a virtio device on the PCI bus, or where there is none at the next window, with the next
    /// interrupt.
    pub fn add_virtio<D: VirtioDevice + 'static>(
        &mut self,
        memory: &GuestMemory,
        name: &str,
        device: D,
    ) -> Result<Arc<Mutex<D>>, StartError> {
        let device = Arc::new(Mutex::new(device));
        let registers = match &self.pci {
            Some(pci) => {
                let place = (lock(&device).device_type(), name.to_owned());
                let slot = self.pci_slots.get(&place).copied();
                Registers::Pci(pci.insert(memory, name, slot, device.clone())?)
            }
            None => Registers::Mmio(self.add_mmio_transport(memory, name, device.clone())?),
        };
        self.subscribers.push(device.clone());
        self.slots.push(VirtioSlot { name: name.to_owned(), registers, device: device.clone() });
        Ok(device)
    }

    fn add_mmio_transport(
        &mut self,
        memory: &GuestMemory,
        name: &str,
        device: Arc<Mutex<dyn VirtioDevice>>,
    ) -> Result<Arc<Mutex<MmioTransport>>, StartError> {
        let index = self.virtio.len() as u32;
        let gsi = layout::FIRST_GSI + index;
        if gsi > layout::LAST_GSI {
            let most = layout::LAST_GSI - layout::FIRST_GSI + 1;
            return Err(StartError::TooManyDevices(most as usize));
        }
        let address = layout::VIRTIO_MMIO + u64::from(index) * layout::VIRTIO_MMIO_SIZE;
        let failed = StartError::device::<std::io::Error>;
        let transport = MmioTransport::new(memory.clone(), device).map_err(failed(name))?;
        let interrupt = transport.interrupt_event().try_clone().map_err(failed(name))?;
        self.interrupts.push((interrupt, gsi));
        let notify = address + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY);
        for (queue, event) in
            transport.queue_events().map_err(failed(name))?.into_iter().enumerate()
        {
            self.notifications.push((event, notify, queue as u32));
        }
        let registers = Arc::new(Mutex::new(transport));
        self.mmio
            .insert(address, layout::VIRTIO_MMIO_SIZE, registers.clone())
            .map_err(StartError::device("MMIO"))?;
        self.virtio.push(VirtioMmio { address: address as u32, gsi });
        Ok(registers)
    }

    /// Lets a device answer at these addresses.
    pub fn add_mmio(
        &mut self,
        start: u64,
        size: u64,
        device: impl BusDevice + 'static,
    ) -> Result<(), StartError> {
        let device = Arc::new(Mutex::new(device));
        self.mmio.insert(start, size, device).map_err(StartError::device("MMIO"))
    }

    /// Lets a device answer at these ports.
    pub fn add_pio(
        &mut self,
        start: u16,
        size: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), StartError> {
        self.pio.insert(start.into(), size, device).map_err(StartError::device("port I/O"))
    }

    /// An interrupt line of a device that is not virtio.
    pub fn add_interrupt(&mut self, event: EventFd, gsi: u32) {
        self.interrupts.push((event, gsi));
    }

    /// Tells KVM of interrupts and, last of all, of notifications: each of those costs a grace
    /// period of the host's kernel at the next change of memory slots.
    pub fn connect(&mut self, vm: &VmFd) -> Result<(), StartError> {
        for (event, gsi) in self.interrupts.drain(..) {
            vm.register_irqfd(&event, gsi).map_err(StartError::kvm("KVM_IRQFD"))?;
        }
        for (event, address, queue) in self.notifications.drain(..) {
            let address = IoEventAddress::Mmio(address);
            vm.register_ioevent(&event, &address, queue)
                .map_err(StartError::kvm("KVM_IOEVENTFD"))?;
        }
        Ok(())
    }
}
