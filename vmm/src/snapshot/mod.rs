//! A machine's state on its way into files and back.
//!
//! Nothing is in flight when it is taken: processors stand still between two instructions, and
//! devices do all they do on the thread that takes it.

pub mod file;
pub(crate) mod memory_file;
pub(crate) mod userfault;
mod vcpu_state;

use api_server::machine::config_file::ConfigFile;
use devices::legacy::i8042::I8042State;
use devices::legacy::serial::SerialPortState;
use devices::virtio::DeviceState;
use devices::virtio::negotiation::NegotiationState;
use devices::virtio::pci::PciTransportState;
use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

pub use vcpu_state::{VcpuState, saved_msrs};

use crate::StartError;
use crate::pci::PciState;
use crate::pmem::PmemPlace;

/// All of a machine but its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// What it is made of.
    pub description: ConfigFile,
    /// Its processors.
    pub vcpus: Vec<VcpuState>,
    /// What KVM keeps of the machine itself.
    pub vm: VmState,
    /// Its virtio devices.
    pub devices: Vec<SavedDevice>,
    /// Its PCI bus, which its devices are on where there is one.
    pub pci: Option<PciState>,
    /// Where its persistent memory is.
    pub pmem: Vec<PmemPlace>,
    /// Its serial port.
    pub serial: Option<SerialPortState>,
    /// Its keyboard; machines saved by older monitors had none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keyboard: Option<I8042State>,
}

/// A virtio device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedDevice {
    /// Its name, to find it again among those of its type.
    pub name: String,
    /// Its virtio device type (virtio 1.2, 5).
    pub device_type: u32,
    /// Its registers.
    pub registers: SavedRegisters,
    /// What it knows beside them.
    pub device: DeviceState,
}

/// A virtio device's registers, by transport.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum SavedRegisters {
    /// virtio-mmio.
    Mmio(NegotiationState),
    /// virtio-pci.
    Pci {
        /// Its slot on the bus.
        slot: u8,
        /// The function's state.
        state: PciTransportState,
    },
}

/// Interrupt controllers and the clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    irqchips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

impl VmState {
    /// Asks KVM.
    pub fn save(vm: &VmFd) -> Result<VmState, StartError> {
        let clock = vm.get_clock().map_err(StartError::kvm("KVM_GET_CLOCK"))?;
        let chips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
        let irqchips = chips
            .into_iter()
            .map(|chip_id| {
                let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                vm.get_irqchip(&mut chip).map_err(StartError::kvm("KVM_GET_IRQCHIP"))?;
                Ok(chip)
            })
            .collect::<Result<_, StartError>>()?;
        Ok(VmState { irqchips, clock })
    }

    /// Makes a new machine's interrupt controllers these.
    pub fn restore_irqchips(&self, vm: &VmFd) -> Result<(), StartError> {
        self.irqchips
            .iter()
            .try_for_each(|chip| vm.set_irqchip(chip))
            .map_err(StartError::kvm("KVM_SET_IRQCHIP"))
    }

    /// Sets the guest's clock: to what it was, or to what it would be by now (KVM API, 4.30).
    pub fn restore_clock(&self, vm: &VmFd, realtime: bool) -> Result<(), StartError> {
        let mut clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        if realtime {
            if self.clock.flags & KVM_CLOCK_REALTIME == 0 {
                return Err(StartError::Device {
                    device: "clock".to_owned(),
                    reason: "clock_realtime: the snapshot's host did not tell the time of day"
                        .to_owned(),
                });
            }
            clock.flags = KVM_CLOCK_REALTIME;
            clock.realtime = self.clock.realtime;
        }
        vm.set_clock(&clock).map_err(StartError::kvm("KVM_SET_CLOCK"))
    }
}
