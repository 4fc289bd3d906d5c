//! Virtio devices by their registers, behind MMIO windows or on the PCI bus (virtio 1.2, 4.1 and 4.2).

use crate::machine::{read, write};

/// First window, the distance to the next, and the most there are.
pub const WINDOWS: u64 = 0xd000_0000;
pub const WINDOW: u64 = 0x1000;
pub const MOST: usize = 17;
/// Configuration space of the PCI bus: 4 KiB for each of eight functions in each of 32 slots.
pub const ECAM: u64 = 0xe000_0000;
pub const ECAM_SIZE: u64 = 0x10_0000;

const MAGIC: u64 = 0x7472_6976;
const VENDOR: u64 = 0x1af4;
const FIRST_DEVICE: u64 = 0x1040;

pub const ACKNOWLEDGE: u64 = 1;
pub const DRIVER: u64 = 2;
pub const DRIVER_OK: u64 = 4;
pub const FEATURES_OK: u64 = 8;
pub const NEEDS_RESET: u64 = 64;

/// A device: its registers, and where its queues are told of buffers.
#[derive(Clone, Copy)]
pub struct Device {
    pub kind: u64,
    registers: u64,
    /// Distance of the notification registers of two queues; that of MMIO is one for all.
    notify: Option<(u64, u64)>,
    configuration: u64,
    pci: bool,
    /// Where its configuration space has its BAR, of 64 bits; zero where it has none.
    bar: u64,
}

/// Registers by their offsets: those of MMIO, those of PCI, and bytes on PCI.
#[derive(Clone, Copy)]
struct Register(u64, u64, u8);

const DEVICE_FEATURES: Register = Register(0x10, 0x04, 4);
const DEVICE_FEATURES_PAGE: Register = Register(0x14, 0x00, 4);
const DRIVER_FEATURES: Register = Register(0x20, 0x0c, 4);
const DRIVER_FEATURES_PAGE: Register = Register(0x24, 0x08, 4);
const QUEUE_SELECT: Register = Register(0x30, 0x16, 2);
const QUEUE_SIZE: Register = Register(0x38, 0x18, 2);
const QUEUE_READY: Register = Register(0x44, 0x1c, 2);
const STATUS: Register = Register(0x70, 0x14, 1);
const DESCRIPTORS: Register = Register(0x80, 0x20, 4);
const AVAILABLE: Register = Register(0x90, 0x28, 4);
const USED: Register = Register(0xa0, 0x30, 4);
const MAX_SIZE: u64 = 0x34;
const NOTIFY: u64 = 0x50;
const CONFIGURATION: u64 = 0x100;

/// The devices there are.
pub fn devices(pci: bool) -> ([Device; MOST], usize) {
    let none = Device { kind: 0, registers: 0, notify: None, configuration: 0, pci, bar: 0 };
    let (mut found, mut count) = ([none; MOST], 0);
    if pci {
        for function in 0..ECAM_SIZE / WINDOW {
            if count < MOST
                && let Some(device) = on_bus(ECAM + function * WINDOW)
            {
                found[count] = device;
                count += 1;
            }
        }
        return (found, count);
    }
    for window in 0..MOST as u64 {
        let base = WINDOWS + window * WINDOW;
        let kind = read(base + 8, 4);
        if read(base, 4) == MAGIC && kind != 0 {
            found[count] =
                Device { kind, registers: base, configuration: base + CONFIGURATION, ..none };
            count += 1;
        }
    }
    (found, count)
}

/// The virtio device of this function.
fn on_bus(space: u64) -> Option<Device> {
    const CAPABILITIES: u64 = 0x34;
    const VENDOR_CAPABILITY: u64 = 9;
    let kind = read(space + 2, 2).checked_sub(FIRST_DEVICE)?;
    if read(space, 2) != VENDOR {
        return None;
    }
    // Memory and bus master.
    write(space + 4, 2, 6);
    let mut device =
        Device { kind, registers: 0, notify: None, configuration: 0, pci: true, bar: 0 };
    let mut at = read(space + CAPABILITIES, 1);
    for _ in 0..48 {
        if at == 0 {
            break;
        }
        let capability = space + at;
        if read(capability, 1) == VENDOR_CAPABILITY {
            device.bar = space + 0x10 + 4 * (read(capability + 4, 1) & 7);
            let place = device.place() + read(capability + 8, 4);
            match read(capability + 3, 1) {
                1 => device.registers = place,
                2 => device.notify = Some((place, read(capability + 16, 4))),
                4 => device.configuration = place,
                _ => {}
            }
        }
        at = read(capability + 1, 1);
    }
    (device.registers != 0).then_some(device)
}

impl Device {
    fn get(&self, register: Register) -> u64 {
        match self.pci {
            true => read(self.registers + register.1, register.2),
            false => read(self.registers + register.0, 4),
        }
    }

    fn set(&self, register: Register, value: u64) {
        match self.pci {
            true => write(self.registers + register.1, register.2, value),
            false => write(self.registers + register.0, 4, value),
        }
    }

    fn set_address(&self, Register(mmio, pci, _): Register, value: u64) {
        let register = self.registers + if self.pci { pci } else { mmio };
        write(register, 4, value & 0xffff_ffff);
        write(register + 4, 4, value >> 32);
    }

    /// Where its BAR is.
    pub fn place(&self) -> u64 {
        (read(self.bar, 4) & !0xf) | read(self.bar + 4, 4) << 32
    }

    /// Moves its BAR. What knows this device still looks for it where it was.
    pub fn set_place(&self, address: u64) {
        write(self.bar, 4, address & 0xffff_ffff);
        write(self.bar + 4, 4, address >> 32);
    }

    /// First and past the last address of its registers.
    pub fn window(&self) -> (u64, u64) {
        (self.registers, self.registers + if self.pci { 0x8000 } else { WINDOW })
    }

    /// Its configuration.
    pub fn configuration(&self) -> u64 {
        self.configuration
    }

    pub fn status(&self) -> u64 {
        self.get(STATUS)
    }

    pub fn set_status(&self, value: u64) {
        self.set(STATUS, value);
    }

    pub fn features(&self) -> u64 {
        self.set(DEVICE_FEATURES_PAGE, 0);
        let low = self.get(DEVICE_FEATURES);
        self.set(DEVICE_FEATURES_PAGE, 1);
        low | self.get(DEVICE_FEATURES) << 32
    }

    pub fn set_features(&self, value: u64) {
        self.set(DRIVER_FEATURES_PAGE, 0);
        self.set(DRIVER_FEATURES, value & 0xffff_ffff);
        self.set(DRIVER_FEATURES_PAGE, 1);
        self.set(DRIVER_FEATURES, value >> 32);
    }

    /// Selects a queue; its largest size, zero where there is none.
    pub fn select(&self, queue: u64) -> u64 {
        self.set(QUEUE_SELECT, queue);
        match self.pci {
            true => self.get(QUEUE_SIZE),
            false => read(self.registers + MAX_SIZE, 4),
        }
    }

    /// Makes the queue that is selected ready.
    pub fn set_queue(&self, size: u64, descriptors: u64, available: u64, used: u64) {
        self.set(QUEUE_SIZE, size);
        self.set_address(DESCRIPTORS, descriptors);
        self.set_address(AVAILABLE, available);
        self.set_address(USED, used);
        self.set(QUEUE_READY, 1);
    }

    /// Tells of buffers in a queue.
    pub fn notify(&self, queue: u64) {
        match self.notify {
            Some((base, distance)) => write(base + queue * distance, 2, queue),
            None => write(self.registers + NOTIFY, 4, queue),
        }
    }
}
