//! Port and memory-mapped I/O: who answers at which address.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use telemetry::Readings;

/// Answers accesses to a range of addresses.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes (1, 2, 4 or 8) at `offset` into the range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` into the range.
    fn write(&mut self, offset: u64, data: &[u8]);
    /// What the device has counted since it was made. Reading changes nothing.
    fn metrics(&self) -> Option<Readings> {
        None
    }
}

/// Two devices would answer at one address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("address range {start:#x}, {size:#x} bytes, is empty or taken")]
pub struct Overlap {
    /// First address of the range that was refused.
    pub start: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// Devices by address. Filled before the guest runs, then shared by all vCPU threads unchanged.
#[derive(Default)]
pub struct Bus {
    devices: BTreeMap<u64, (u64, Arc<Mutex<dyn BusDevice>>)>,
}

impl Bus {
    /// Lets `device` answer at `size` bytes from `start`.
    pub fn insert(
        &mut self,
        start: u64,
        size: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), Overlap> {
        let refused = Overlap { start, size };
        let end =
            start.checked_add(size).filter(|end| *end > start).ok_or(Overlap { start, size })?;
        let before = self.devices.range(..end).next_back();
        if before.is_some_and(|(other, (other_size, _))| other + other_size > start) {
            return Err(refused);
        }
        self.devices.insert(start, (size, device));
        Ok(())
    }

    /// What the devices have counted.
    pub fn metrics(&self) -> impl Iterator<Item = Readings> {
        self.devices.values().filter_map(|(_, device)| {
            device.lock().unwrap_or_else(PoisonError::into_inner).metrics()
        })
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let (start, (size, device)) = self.devices.range(..=address).next_back()?;
        let offset = address - start;
        (offset.checked_add(length as u64)? <= *size).then_some((offset, &**device))
    }

    /// Reads; where nobody answers, or the access leaves a device's range, all bits are one.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes; where nobody answers, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&mut self, _offset: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    #[test]
    fn ranges_do_not_overlap_and_each_answers_for_its_own() {
        let mut bus = Bus::default();
        let echo = |value| -> Arc<Mutex<dyn BusDevice>> { Arc::new(Mutex::new(Echo(value))) };
        bus.insert(0x10, 8, echo(1)).unwrap();
        bus.insert(0x18, 8, echo(2)).unwrap();
        for (start, size) in [(0x10, 1), (0x17, 1), (0, 0x11), (0x1f, 9), (0x30, 0), (u64::MAX, 2)]
        {
            assert_eq!(bus.insert(start, size, echo(9)), Err(Overlap { start, size }));
        }
        let read = |address, length| {
            let mut data = vec![0; length];
            bus.read(address, &mut data);
            data
        };
        assert_eq!(read(0x12, 2), [3, 3]);
        assert_eq!(read(0x18, 1), [2]);
        // Across the end of a device, between devices, and at the end of the address space.
        assert_eq!(read(0x17, 2), [0xff, 0xff]);
        assert_eq!(read(0xf, 1), [0xff]);
        assert_eq!(read(u64::MAX, 8), [0xff; 8]);
        bus.write(0x10, &[7]);
        assert_eq!(read(0x10, 1), [7]);
        bus.write(0x5000, &[7]);
    }
}
