//! Devices that come and go while the guest runs. They do on the PCI bus only: a kernel looks for
//! virtio-mmio devices once.

use std::sync::{Arc, Mutex};

use api_server::machine::{Drive, MmdsConfig, NetworkInterface, Pmem};
use devices::virtio::VirtioDevice;
use mmds::Mmds;
use virtio_bindings::virtio_ids::{
    VIRTIO_ID_BALLOON, VIRTIO_ID_BLOCK, VIRTIO_ID_MEM, VIRTIO_ID_NET, VIRTIO_ID_PMEM,
    VIRTIO_ID_VSOCK,
};
use vmm_sys_util::eventfd::EventFd;

use super::{Running, check_sharing, make_block, make_net};
use crate::StartError;
use crate::device_manager::{Registers, VirtioSlot};

impl Running {
    /// Whether devices can come and go.
    pub fn has_hot_plug(&self) -> bool {
        self.pci.is_some()
    }

    /// Plugs in a drive, in a machine that has these.
    pub fn plug_drive(&mut self, drive: &Drive, others: &[Drive]) -> Result<(), StartError> {
        let mut all = others.to_vec();
        all.push(drive.clone());
        check_sharing(&all)?;
        let id = &drive.drive_id;
        let block = self.plug(id, make_block(drive)?)?;
        self.devices.drives.insert(id.clone(), block);
        Ok(())
    }

    /// Plugs in an interface; with the metadata service, where its configuration names it.
    pub fn plug_interface(
        &mut self,
        interface: &NetworkInterface,
        metadata: Option<(&MmdsConfig, &Arc<Mutex<Mmds>>)>,
    ) -> Result<(), StartError> {
        let id = &interface.iface_id;
        let net = self.plug(id, make_net(interface, None, metadata)?)?;
        self.devices.interfaces.insert(id.clone(), net);
        Ok(())
    }

    /// Plugs in persistent memory.
    pub fn plug_pmem(&mut self, config: &Pmem) -> Result<(), StartError> {
        let device = Arc::new(Mutex::new(self.pmem.add(config, &[])?));
        let plugged = self.plug_shared(&config.id, device.clone());
        if plugged.is_err() {
            self.remove_pmem(&config.id, device);
        }
        plugged
    }

    fn plug<D: VirtioDevice + 'static>(
        &mut self,
        name: &str,
        device: D,
    ) -> Result<Arc<Mutex<D>>, StartError> {
        let device = Arc::new(Mutex::new(device));
        self.plug_shared(name, device.clone())?;
        Ok(device)
    }

    fn plug_shared<D: VirtioDevice + 'static>(
        &mut self,
        name: &str,
        device: Arc<Mutex<D>>,
    ) -> Result<(), StartError> {
        let missing = || StartError::device(name)("there is no PCI bus");
        let pci = self.pci.as_ref().ok_or_else(missing)?;
        let (ejected, slot) = pci.plug(&self.memory, name, device.clone());
        self.let_go(ejected);
        let registers = Registers::Pci(slot?);
        self.subscribers.push(device.clone());
        self.slots.push(VirtioSlot { name: name.to_owned(), registers, device });
        Ok(())
    }

    /// Asks the guest to let go of the device of this type and name; false where there is none.
    pub fn request_eject(&self, device_type: u32, name: &str) -> bool {
        let same = |slot: &&VirtioSlot| slot.name == name && slot.device_type() == device_type;
        let slot = self.slots.iter().find(same).and_then(VirtioSlot::pci_slot);
        let (Some(pci), Some(slot)) = (&self.pci, slot) else { return false };
        pci.request_eject(slot);
        true
    }

    /// Readable once the guest has let go of a device, where it can.
    pub fn ejection_event(&self) -> Option<std::io::Result<EventFd>> {
        self.pci.as_ref().map(|pci| pci.ejection_event())
    }

    /// Parts with what the guest let go of, asked or not: see [`ejected`](Self::ejected).
    pub fn take_ejected(&mut self) {
        let ejected = self.pci.as_ref().map(|pci| pci.take_ejected());
        self.let_go(ejected.unwrap_or_default());
    }

    fn let_go(&mut self, ejected: Vec<u8>) {
        let is_ejected =
            |slot: &mut VirtioSlot| slot.pci_slot().is_some_and(|number| ejected.contains(&number));
        let gone: Vec<_> = self.slots.extract_if(.., is_ejected).collect();
        for slot in gone {
            let (device_type, name) = (slot.device_type(), slot.name);
            tracing::info!(device_type, name, "the guest let go of a device");
            match device_type {
                VIRTIO_ID_BLOCK => drop(self.devices.drives.remove(&name)),
                VIRTIO_ID_NET => drop(self.devices.interfaces.remove(&name)),
                VIRTIO_ID_BALLOON => self.devices.balloon = None,
                VIRTIO_ID_VSOCK => self.devices.vsock = None,
                VIRTIO_ID_MEM => self.devices.hotplug = None,
                VIRTIO_ID_PMEM => self.remove_pmem(&name, slot.device.clone()),
                _ => {}
            }
            self.unplugged.push(slot.device);
            self.ejected.push((device_type, name));
        }
    }

    fn remove_pmem(&mut self, id: &str, device: Arc<Mutex<dyn VirtioDevice>>) {
        if let Err(error) = self.pmem.remove(id) {
            tracing::error!(id, %error, "the guest keeps persistent memory");
            // So the mapping has to stay.
            std::mem::forget(device);
        }
    }
}
