//! Hot-plug: how a running guest learns that a slot was filled or is to be emptied, and says that it
//! let go of one.
//!
//! Registers of 32 bits, a bit for each slot, that the guest's ACPI methods use (`arch::acpi`):
//!
//! ```text
//!  0  plugged    read: slots filled since the last read, which forgets them
//!  4  unplug     read: slots that are to be emptied, since the last read, which forgets them
//!  8  eject      write: these slots are the guest's no more
//! ```
//!
//! Something in the first two raises the interrupt of the guest's Generic Event Device (ACPI 6.5,
//! 5.6.9), whose method reads both and notifies the slots' devices.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::bus::{PciBus, SLOTS};
use crate::bus::BusDevice;

/// Bytes of the registers.
pub const SIZE: u64 = 12;

const PLUGGED: u64 = 0;
const UNPLUG: u64 = 4;
const EJECT: u64 = 8;

/// What the guest has not read yet, for a snapshot; a bit for each slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotPlugState {
    /// Slots that were filled.
    pub plugged: u32,
    /// Slots that are to be emptied.
    pub unplug: u32,
}

/// The registers.
pub struct HotPlug {
    bus: Arc<Mutex<PciBus>>,
    state: HotPlugState,
    ejected: u32,
    interrupt: EventFd,
    ejection: EventFd,
}

impl HotPlug {
    /// Registers for the slots of this bus. Fails where no eventfd can be made.
    pub fn new(bus: Arc<Mutex<PciBus>>) -> std::io::Result<HotPlug> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let (interrupt, ejection) = (event()?, event()?);
        Ok(HotPlug { bus, state: HotPlugState::default(), ejected: 0, interrupt, ejection })
    }

    /// Written to raise the Generic Event Device's interrupt: to be made an irqfd.
    pub fn interrupt_event(&self) -> &EventFd {
        &self.interrupt
    }

    /// Readable once the guest has ejected something: see [`take_ejected`](Self::take_ejected).
    pub fn ejection_event(&self) -> &EventFd {
        &self.ejection
    }

    /// Tells the guest that a function was put into this slot. A guest that has enumerated the bus,
    /// but does not wait for the interrupt yet, hears of it with the next one.
    pub fn plugged(&mut self, slot: u8) {
        self.state.plugged |= bit(slot);
        self.raise();
    }

    /// Asks the guest to let go of what is in this slot. It may take its time, or never do it.
    pub fn request_eject(&mut self, slot: u8) {
        self.state.unplug |= bit(slot);
        self.raise();
    }

    /// Slots that the guest let go of since this was last asked. Their functions are off the bus
    /// already (the guest may not find them again) and hold no queue, but still wait for events.
    /// A guest may let go of what it was not asked for.
    pub fn take_ejected(&mut self) -> Vec<u8> {
        let _ = self.ejection.read();
        let ejected = std::mem::take(&mut self.ejected);
        slots(ejected).collect()
    }

    /// What the guest has not read yet, for a snapshot. What it ejected is to be taken before that.
    pub fn save(&self) -> HotPlugState {
        self.state
    }

    /// Takes that out of a snapshot, and tells the guest of it if there is something.
    pub fn restore(&mut self, state: HotPlugState) {
        self.state = state;
        if state != HotPlugState::default() {
            self.raise();
        }
    }

    fn raise(&self) {
        // Where the counter is full the interrupt is pending anyway.
        let _ = self.interrupt.write(1);
    }

    fn eject(&mut self, wanted: u32) {
        let mut bus = self.bus.lock().unwrap_or_else(PoisonError::into_inner);
        // The host bridge stays.
        for slot in slots(wanted).filter(|slot| *slot != 0) {
            if bus.remove(slot).is_some() {
                self.ejected |= bit(slot);
                self.state.plugged &= !bit(slot);
                self.state.unplug &= !bit(slot);
                let _ = self.ejection.write(1);
            }
        }
    }
}

fn bit(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0)
}

fn slots(bits: u32) -> impl Iterator<Item = u8> {
    (0..SLOTS).filter(move |slot| bits & bit(*slot) != 0)
}

impl BusDevice for HotPlug {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // A part of a register is none: it would forget the other parts.
        if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = match offset {
                PLUGGED => std::mem::take(&mut self.state.plugged),
                UNPLUG => std::mem::take(&mut self.state.unplug),
                _ => 0,
            }
            .to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (EJECT, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) {
            self.eject(u32::from_le_bytes(word));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::bus::tests::{Map, WINDOW, function};

    fn hot_plug() -> (HotPlug, Arc<Mutex<PciBus>>) {
        let bus = Arc::new(Mutex::new(PciBus::new(vec![WINDOW], Arc::new(Map::default()))));
        (HotPlug::new(bus.clone()).unwrap(), bus)
    }

    fn get(registers: &mut HotPlug, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_guest_is_told_of_what_is_plugged_and_lets_it_go() {
        let (mut registers, bus) = hot_plug();
        let plugged = function(&[]);
        let slot = bus.lock().unwrap().insert(Some(5), plugged.clone()).unwrap();
        registers.plugged(slot);
        assert_eq!(registers.interrupt_event().read().unwrap(), 1);
        assert_eq!([0, 4, 0].map(|at| get(&mut registers, at)), [1 << 5, 0, 0]);
        registers.request_eject(slot);
        assert_eq!(registers.interrupt_event().read().unwrap(), 1);
        assert_eq!([0, 4, 4].map(|at| get(&mut registers, at)), [0, 1 << 5, 0]);
        assert!(registers.take_ejected().is_empty());
        registers.write(EJECT, &(1u32 << 5).to_le_bytes());
        assert_eq!(registers.ejection_event().read().unwrap(), 1);
        assert!(plugged.lock().unwrap().unplugged);
        assert!(bus.lock().unwrap().function(slot).is_none());
        assert_eq!((registers.take_ejected(), registers.take_ejected()), (vec![5], vec![]));
        assert!(registers.ejection_event().read().is_err());
    }

    #[test]
    fn what_was_not_read_before_a_snapshot_is_read_after_it() {
        let (mut before, _) = hot_plug();
        before.request_eject(3);
        let (mut after, _) = hot_plug();
        after.restore(HotPlugState::default());
        assert!(after.interrupt_event().read().is_err());
        after.restore(before.save());
        assert_eq!(after.interrupt_event().read().unwrap(), 1);
        assert_eq!([0, 4].map(|at| get(&mut after, at)), [0, 1 << 3]);
    }

    #[test]
    fn hostile_9_nothing_but_a_whole_register_is_one_and_the_host_bridge_stays() {
        let (mut registers, bus) = hot_plug();
        bus.lock().unwrap().insert(Some(31), function(&[])).unwrap();
        registers.plugged(31);
        registers.plugged(32);
        registers.plugged(255);
        for offset in (0..0x20).chain([u64::MAX]) {
            for size in 0..=9 {
                let mut data = vec![0xff; size];
                if size != 4 || offset % 4 != 0 {
                    registers.write(offset, &data);
                    registers.read(offset, &mut data);
                    assert_eq!(data, vec![0; size]);
                }
            }
        }
        assert_eq!(get(&mut registers, PLUGGED), 1 << 31);
        registers.write(EJECT, &[0xff; 4]);
        assert_eq!(registers.take_ejected(), [31]);
        assert!(bus.lock().unwrap().function(0).is_some());
        registers.write(EJECT, &[0xff; 4]);
        assert!(registers.ejection_event().read().is_err());
    }
}
