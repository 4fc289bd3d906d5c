//! Devices that come and go while the guest runs. What is plugged in is there at once; what is to go
//! does so when the guest has let go of it, and whoever asked hears of it then.

use std::time::{Duration, Instant};

use api_server::machine::server::Call;
use api_server::machine::{MachineAnswer, MachineError, MachineRequest};
use tokio::sync::oneshot;
use virtio_bindings::virtio_ids::{
    VIRTIO_ID_BALLOON, VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_PMEM,
    VIRTIO_ID_RNG, VIRTIO_ID_VSOCK,
};

use super::{AFTER_START, BEFORE_START, Controller, readable, refused};
use crate::device_manager::Subscriber;

/// How long a guest may take to let go of a device.
const PATIENCE: Duration = Duration::from_secs(5);

/// A device that the guest was asked to let go of, and who wants to know.
pub(super) struct Removal {
    device_type: u32,
    name: String,
    deadline: Instant,
    reply: oneshot::Sender<Result<MachineAnswer, MachineError>>,
}

impl Controller {
    /// Carries out a request, and answers it now or later.
    pub fn call(&mut self, call: Call) {
        let (device_type, name) = match call.request {
            MachineRequest::DeleteDrive(id) => (VIRTIO_ID_BLOCK, id),
            MachineRequest::DeleteNetworkInterface(id) => (VIRTIO_ID_NET, id),
            MachineRequest::DeletePmem(id) => (VIRTIO_ID_PMEM, id),
            request => {
                // A client that has gone does not hear of it.
                let answer = self.serve(request, call.received);
                let _ = call.reply.send(answer);
                return;
            }
        };
        match self.request_eject(device_type, &name) {
            Ok(()) => {
                let deadline = Instant::now() + PATIENCE;
                self.removals.push(Removal { device_type, name, deadline, reply: call.reply });
            }
            Err(error) => drop(call.reply.send(Err(error))),
        }
    }

    /// Milliseconds until somebody has to be told that the guest does not let go; -1 for never.
    pub fn patience(&self) -> i32 {
        let Some(first) = self.removals.iter().map(|removal| removal.deadline).min() else {
            return -1;
        };
        let left = first.saturating_duration_since(Instant::now());
        // Rounded up, so as not to wake before the time has come.
        i32::try_from(left.as_millis()).map_or(i32::MAX, |left| left.saturating_add(1))
    }

    /// Devices that the event loop is to serve no more, and those that it is to serve from now on.
    pub fn take_changes(&mut self) -> (Vec<Subscriber>, Vec<Subscriber>) {
        let Some(running) = &mut self.running else { return Default::default() };
        (std::mem::take(&mut running.unplugged), std::mem::take(&mut running.subscribers))
    }

    /// Forgets what the guest let go of. Its files and TAPs are free once the event loop has taken up
    /// the change; those who wait for it hear of it then, by [`answer`](Self::answer).
    pub fn settle(&mut self) {
        let Some(running) = &mut self.running else { return };
        running.take_ejected();
        for (device_type, name) in std::mem::take(&mut running.ejected) {
            self.forget(device_type, &name);
            let same =
                |removal: &mut Removal| removal.device_type == device_type && removal.name == name;
            self.removed.extend(self.removals.extract_if(.., same));
        }
    }

    /// Answers those whose device is gone, and those who have waited too long.
    pub fn answer(&mut self) {
        for removal in self.removed.drain(..) {
            // A client that has gone does not hear of it.
            let _ = removal.reply.send(Ok(MachineAnswer::Done));
        }
        let now = Instant::now();
        for removal in self.removals.extract_if(.., |removal| removal.deadline <= now) {
            let name = &removal.name;
            let error = refused(format!("{name}: the guest has not let go of it; it stays"));
            let _ = removal.reply.send(Err(error));
        }
    }

    fn forget(&mut self, device_type: u32, name: &str) {
        let description = &mut self.description;
        match device_type {
            VIRTIO_ID_BLOCK => description.drives.retain(|drive| drive.drive_id != name),
            VIRTIO_ID_NET => {
                description.network_interfaces.retain(|interface| interface.iface_id != name);
            }
            VIRTIO_ID_PMEM => description.pmem.retain(|pmem| pmem.id != name),
            VIRTIO_ID_VSOCK => description.vsock = None,
            VIRTIO_ID_BALLOON => description.balloon = None,
            VIRTIO_ID_RNG => description.entropy = None,
            VIRTIO_ID_CONSOLE => {
                if let Some(console) = &mut description.console {
                    console.output_path = None;
                }
            }
            // The memory that was plugged in stays, and so does what describes it.
            _ => {}
        }
    }

    fn request_eject(&self, device_type: u32, name: &str) -> Result<(), MachineError> {
        let running = self.running.as_ref().ok_or_else(|| MachineError::new(BEFORE_START))?;
        if !running.has_hot_plug() {
            return Err(MachineError::new(AFTER_START));
        }
        let description = &self.description;
        let mut roots = description.drives.iter().filter(|drive| drive.is_root_device);
        let mut pmem_roots = description.pmem.iter().filter(|pmem| pmem.root_device);
        let is_root = match device_type {
            VIRTIO_ID_BLOCK => roots.any(|drive| drive.drive_id == name),
            VIRTIO_ID_PMEM => pmem_roots.any(|pmem| pmem.id == name),
            _ => false,
        };
        if is_root {
            return Err(refused(format!("{name}: the root device cannot be unplugged")));
        }
        if !running.request_eject(device_type, name) {
            return Err(refused(format!("{name}: there is no such device")));
        }
        Ok(())
    }

    /// Plugs a device into the running machine; refused where that is not possible, or the request
    /// is none for that.
    pub(super) fn plug(&mut self, request: MachineRequest) -> Result<(), MachineError> {
        // A device that is gone already does not stand in the way of one of its name.
        self.settle();
        let description = &mut self.description;
        let Some(running) = self.running.as_mut().filter(|running| running.has_hot_plug()) else {
            return Err(MachineError::new(AFTER_START));
        };
        let taken = |id: &str| refused(format!("{id}: there is a device of this name"));
        let root = || MachineError::new("A root device cannot be plugged into a running machine.");
        match request {
            MachineRequest::PutDrive(drive) => {
                readable(drive.check()?)?;
                if drive.is_root_device {
                    return Err(root());
                }
                if description.drives.iter().any(|other| other.drive_id == drive.drive_id) {
                    return Err(taken(&drive.drive_id));
                }
                running.plug_drive(&drive, &description.drives).map_err(refused)?;
                description.drives.push(drive);
            }
            MachineRequest::PutNetworkInterface(interface) => {
                interface.check()?;
                let id = &interface.iface_id;
                if description.network_interfaces.iter().any(|other| other.iface_id == *id) {
                    return Err(taken(id));
                }
                super::check_mac(description, &interface)?;
                let metadata = description.mmds_config.as_ref().zip(self.metadata.as_ref());
                running.plug_interface(&interface, metadata).map_err(refused)?;
                description.network_interfaces.push(interface);
            }
            MachineRequest::PutPmem(pmem) => {
                pmem.check()?;
                if pmem.root_device {
                    return Err(root());
                }
                if description.pmem.iter().any(|other| other.id == pmem.id) {
                    return Err(taken(&pmem.id));
                }
                running.plug_pmem(&pmem).map_err(refused)?;
                description.pmem.push(pmem);
            }
            _ => return Err(MachineError::new(AFTER_START)),
        }
        Ok(())
    }
}
