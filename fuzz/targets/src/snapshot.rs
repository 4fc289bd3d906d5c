//! Files of a machine's state, which may be damaged, or made by somebody.

use devices::bus::BusDevice;
use devices::legacy::i8042::{I8042, I8042State};
use devices::legacy::power::PowerSwitch;
use devices::virtio::DeviceState;
use vmm::snapshot::file::decode;
use vmm::snapshot::{MachineState, SavedDevice, SavedRegisters};

use crate::driver::{Kind, Rig};

/// The payload of a state file. What is understood is understood the same when it is written anew,
/// and its devices are taken up or refused.
pub fn snapshot_state(input: &[u8]) {
    let Ok(state) = decode::<MachineState>(&with_header(input)) else { return };
    let payload = rmp_serde::to_vec_named(&state).unwrap();
    let again: MachineState = decode(&with_header(&payload)).expect("what was written is read");
    assert!(rmp_serde::to_vec_named(&again).unwrap() == payload);
    if let Some(state) = &state.keyboard {
        keyboard(state);
    }
    for SavedDevice { registers, device, .. } in state.devices.into_iter().take(8) {
        let kind = match &device {
            DeviceState::Block(_) => Kind::Block,
            DeviceState::Net { .. } => Kind::Net,
            DeviceState::Rng(_) => Kind::Rng,
            DeviceState::Console { .. } => Kind::Console,
            DeviceState::Balloon(_) => Kind::Balloon,
            DeviceState::Mem(_) => Kind::Mem,
            DeviceState::Vsock { .. } => Kind::Vsock,
            DeviceState::Plain => Kind::Pmem,
        };
        // The other transport's registers hold the same, and messages that need a bus to be sent.
        let registers = match registers {
            SavedRegisters::Mmio(registers) => registers,
            SavedRegisters::Pci { state, .. } => state.negotiation,
        };
        let mut rig = Rig::new(kind);
        let is_restored = rig.device.shared().lock().unwrap().restore(device).is_ok();
        if is_restored && rig.transport.restore(&registers).is_ok() {
            rig.settle();
        }
        rig.check_reset();
    }
}

/// A keyboard controller of this state comes to its end of words, and has keys to be pressed or not.
fn keyboard(state: &I8042State) {
    let mut keyboard = I8042::new(PowerSwitch::new().unwrap()).unwrap();
    if keyboard.restore(state).is_err() {
        return;
    }
    assert_eq!(&keyboard.save(), state);
    let _ = keyboard.press_ctrl_alt_del();
    let mut byte = [0];
    for _ in 0..16 {
        keyboard.read(0, &mut byte);
        keyboard.write(0, &byte);
        keyboard.write(4, &byte);
    }
    for _ in 0..16 {
        keyboard.read(0, &mut byte);
    }
    keyboard.read(4, &mut byte);
    assert!(byte[0] & 1 == 0, "more words than a keyboard controller holds");
}

/// A file with this payload.
fn with_header(payload: &[u8]) -> Vec<u8> {
    let mut file = b"VMRUNSNP\x01\0\0\0".to_vec();
    file.extend(crc32fast::hash(payload).to_le_bytes());
    file.extend((payload.len() as u64).to_le_bytes());
    file.extend_from_slice(payload);
    file
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use api_server::machine::config_file::ConfigFile;
    use kvm_ioctls::Kvm;
    use vmm::snapshot::{VcpuState, VmState};

    use super::*;

    /// Makes the seed anew, for when the state's form has changed: it needs KVM, which tests do
    /// not. `cargo test -p fuzz-targets -- --ignored`
    #[test]
    #[ignore = "writes the seed"]
    fn write_seed() {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let kinds = [
            ("block", Kind::Block),
            ("net", Kind::Net),
            ("rng", Kind::Rng),
            ("console", Kind::Console),
            ("balloon", Kind::Balloon),
            ("mem", Kind::Mem),
            ("pmem", Kind::Pmem),
        ];
        let devices = kinds.map(|(name, kind)| {
            let mut rig = Rig::new(kind);
            rig.set_up(u64::MAX, 16);
            let (device_type, device) = {
                let shared = rig.device.shared();
                let device = shared.lock().unwrap();
                (device.device_type(), device.save())
            };
            let registers = SavedRegisters::Mmio(rig.transport.save());
            SavedDevice { name: name.to_owned(), device_type, registers, device }
        });
        let mut keyboard = I8042::new(PowerSwitch::new().unwrap()).unwrap();
        // The command byte: interrupts, and keys as the first PCs had them.
        keyboard.write(4, &[0x60]);
        keyboard.write(0, &[0x45]);
        keyboard.press_ctrl_alt_del().unwrap();
        let description = r#"{"boot-source": {"kernel_image_path": "k"}}"#;
        let state = MachineState {
            description: ConfigFile::parse(description.as_bytes()).unwrap(),
            vcpus: vec![VcpuState::save(&vcpu, &[0x10]).unwrap()],
            vm: VmState::save(&vm).unwrap(),
            devices: devices.into(),
            pci: None,
            pmem: Vec::new(),
            serial: None,
            keyboard: Some(keyboard.save()),
        };
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../seeds/snapshot_state");
        std::fs::write(folder.join("all"), rmp_serde::to_vec_named(&state).unwrap()).unwrap();
    }
}
