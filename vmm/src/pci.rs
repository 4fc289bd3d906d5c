//! The PCI bus of a machine: devices on it, their interrupts and notifications, and hot-plug.
//!
//! Locks are taken in this order: hot-plug registers, bus, function, device. What is behind the sinks
//! is locked last, and only for a moment.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use arch::acpi::PciHost;
use arch::layout;
use devices::GuestMemory;
use devices::pci::hotplug::{HotPlug, HotPlugState};
use devices::pci::{BarSink, Ecam, MemoryWindow, PciBus};
use devices::virtio::VirtioDevice;
use devices::virtio::pci::{BAR, PciTransport};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::StartError;
use crate::device_manager::DeviceManager;
use crate::machine::lock;
use crate::msi::{Routing, Vectors};

/// The bus's part of a snapshot, beside its functions.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct PciState {
    /// Begin of the window above 4 GiB, which the guest was told.
    pub memory_64: u64,
    /// What the guest has not read yet.
    pub hot_plug: HotPlugState,
}

/// A device's place on the bus.
pub struct PciSlot {
    /// The slot.
    pub number: u8,
    /// The function in it.
    pub transport: Arc<Mutex<PciTransport>>,
}

/// The bus.
pub struct Pci {
    bus: Arc<Mutex<PciBus>>,
    hot_plug: Arc<Mutex<HotPlug>>,
    routing: Arc<Routing>,
    notifications: Arc<Notifications>,
    memory_64: u64,
}

impl Pci {
    /// A bus without devices, at the layout's addresses; its window above 4 GiB begins at `memory_64`
    /// (see [`layout::pci_memory_64`]).
    pub fn new(
        vm: &Arc<VmFd>,
        memory_64: u64,
        manager: &mut DeviceManager,
    ) -> Result<Pci, StartError> {
        let notifications = Arc::new(Notifications { vm: vm.clone(), slots: Mutex::default() });
        let windows = [
            (layout::PCI_MEMORY, layout::PCI_MEMORY_SIZE),
            (memory_64, layout::PCI_MEMORY_64_SIZE),
        ];
        let ranges = windows.map(|(start, size)| start..start.saturating_add(size));
        let bus = PciBus::new(ranges.to_vec(), notifications.clone());
        let bus = Arc::new(Mutex::new(bus));
        manager.add_mmio(layout::ECAM, Ecam::SIZE, Ecam(bus.clone()))?;
        for (start, size) in windows {
            manager.add_mmio(start, size, MemoryWindow { bus: bus.clone(), start })?;
        }
        let hot_plug = HotPlug::new(bus.clone()).map_err(StartError::host("eventfd"))?;
        let interrupt = hot_plug.interrupt_event().try_clone();
        manager
            .add_interrupt(interrupt.map_err(StartError::host("eventfd"))?, layout::HOT_PLUG_GSI);
        let hot_plug = Arc::new(Mutex::new(hot_plug));
        manager.add_pio(layout::HOT_PLUG_PORT, layout::HOT_PLUG_SIZE.into(), hot_plug.clone())?;
        let routing = Arc::new(Routing::new(vm.clone()));
        Ok(Pci { bus, hot_plug, routing, notifications, memory_64 })
    }

    /// For the ACPI tables.
    pub fn host(&self) -> PciHost {
        PciHost { memory_64: self.memory_64, hot_plug_gsi: Some(layout::HOT_PLUG_GSI) }
    }

    /// Puts a device into a slot, the first free one by default. No guest runs.
    pub fn insert(
        &self,
        memory: &GuestMemory,
        name: &str,
        slot: Option<u8>,
        device: Arc<Mutex<dyn VirtioDevice>>,
    ) -> Result<PciSlot, StartError> {
        let failed = StartError::device::<std::io::Error>;
        let count = PciTransport::vector_count(&*lock(&device));
        let vectors = Arc::new(Vectors::new(self.routing.clone(), count)?);
        let transport = PciTransport::new(memory.clone(), device, vectors).map_err(failed(name))?;
        let notifications = transport.queue_notifications().map_err(failed(name))?;
        let transport = Arc::new(Mutex::new(transport));
        // Both under one lock: the guest may find the function at once.
        let mut bus = lock(&self.bus);
        let number = bus.insert(slot, transport.clone()).map_err(StartError::device(name))?;
        lock(&self.notifications.slots).insert(number, notifications);
        Ok(PciSlot { number, transport })
    }

    /// Puts a device into a slot and tells the running guest. Also returns the slots that were ejected
    /// before, as [`take_ejected`](Self::take_ejected) does: the one that is filled may be among them.
    pub fn plug(
        &self,
        memory: &GuestMemory,
        name: &str,
        device: Arc<Mutex<dyn VirtioDevice>>,
    ) -> (Vec<u8>, Result<PciSlot, StartError>) {
        let mut hot_plug = lock(&self.hot_plug);
        let ejected = self.forget(hot_plug.take_ejected());
        let slot = self.insert(memory, name, None, device);
        if let Ok(slot) = &slot {
            hot_plug.plugged(slot.number);
        }
        (ejected, slot)
    }

    /// Asks the guest to let go of the device in a slot.
    pub fn request_eject(&self, slot: u8) {
        lock(&self.hot_plug).request_eject(slot);
    }

    /// Readable once the guest has let go of a device.
    pub fn ejection_event(&self) -> std::io::Result<EventFd> {
        lock(&self.hot_plug).ejection_event().try_clone()
    }

    /// Slots that the guest let go of since this was last asked; their functions are off the bus.
    pub fn take_ejected(&self) -> Vec<u8> {
        self.forget(lock(&self.hot_plug).take_ejected())
    }

    fn forget(&self, ejected: Vec<u8>) -> Vec<u8> {
        let mut slots = lock(&self.notifications.slots);
        for slot in &ejected {
            slots.remove(slot);
        }
        ejected
    }

    /// The bus's state, for a snapshot. What was ejected has been taken before.
    pub fn save(&self) -> PciState {
        PciState { memory_64: self.memory_64, hot_plug: lock(&self.hot_plug).save() }
    }

    /// The function in this slot was taken out of a snapshot.
    pub fn restored(&self, slot: u8) {
        lock(&self.bus).restored(slot);
    }

    /// Takes the registers out of a snapshot, after all functions.
    pub fn restore(&self, state: &PciState) {
        lock(&self.hot_plug).restore(state.hot_plug);
    }
}

/// The queues' eventfds of the functions, to be ioeventfds where their BARs are.
struct Notifications {
    vm: Arc<VmFd>,
    slots: Mutex<HashMap<u8, Vec<(EventFd, u64)>>>,
}

impl Notifications {
    /// Calls KVM for each address of a slot.
    fn each(
        &self,
        slot: u8,
        bar: u8,
        address: u64,
        call: impl Fn(&EventFd, &IoEventAddress) -> Result<(), kvm_ioctls::Error>,
    ) {
        if bar != BAR {
            return;
        }
        for (event, offset) in lock(&self.slots).get(&slot).into_iter().flatten() {
            let at = address.saturating_add(*offset);
            // A guest may have put another BAR there. It only loses speed.
            if let Err(error) = call(event, &IoEventAddress::Mmio(at)) {
                tracing::debug!(slot, at, %error, "KVM_IOEVENTFD");
            }
        }
    }
}

impl BarSink for Notifications {
    fn mapped(&self, slot: u8, bar: u8, address: u64) {
        self.each(slot, bar, address, |event, at| self.vm.register_ioevent(event, at, NoDatamatch));
    }

    fn unmapped(&self, slot: u8, bar: u8, address: u64) {
        self.each(slot, bar, address, |event, at| {
            self.vm.unregister_ioevent(event, at, NoDatamatch)
        });
    }
}
