//! Configuration space of a function: the type 0 header, memory BARs and capabilities (PCI 3.0, 6.1,
//! 6.2.5 and 6.7).
//!
//! A space is bytes, and for each byte the bits that a guest may change. That alone makes a BAR
//! answer to sizing: what is below its size cannot be set.

use std::ops::Range;

/// Bytes of a function's configuration space that mean something. Those of the extended space that
/// ECAM shows behind them read as zero: there is no extended capability.
pub const SIZE: usize = 256;

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const BARS: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
/// Where the header ends and capabilities begin.
const HEADER_END: usize = 0x40;

/// Command register: answer to accesses of memory.
const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: access memory, and send MSI-X messages by it.
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command register: no interrupt pin. There is none, but drivers set it.
const COMMAND_NO_INTX: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// A BAR of 64 bits, of memory that is not prefetchable.
const BAR_64_BITS: u64 = 0b100;
const BAR_FLAGS: u64 = 0xf;

/// What a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class, subclass and programming interface, a byte each from the highest.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A function's configuration cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// A BAR of 64 bits is two of the six registers, its size a power of two from 16 bytes.
    #[error("BAR {0} cannot be there, or not of that size")]
    Bar(u8),
    /// There is no room for one more capability.
    #[error("no room for capability {0:#x}")]
    Capability(u8),
}

/// A configuration space.
#[derive(Clone, Debug)]
pub struct ConfigurationSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Sizes of BARs; zero where there is none.
    bar_sizes: [u64; 6],
    last_capability: usize,
    end: usize,
}

impl ConfigurationSpace {
    /// A function without BARs or capabilities.
    pub fn new(identity: &Identity) -> ConfigurationSpace {
        let mut space = ConfigurationSpace {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_sizes: [0; 6],
            last_capability: 0,
            end: HEADER_END,
        };
        space.put(VENDOR, &identity.vendor.to_le_bytes());
        space.put(DEVICE, &identity.device.to_le_bytes());
        space.put(REVISION, &[identity.revision]);
        space.put(CLASS, &identity.class.to_le_bytes()[..3]);
        space.put(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_NO_INTX;
        space.let_write(COMMAND, &command.to_le_bytes());
        space
    }

    /// The bridge between processors and bus: a function that is only there to be seen.
    pub fn host_bridge() -> ConfigurationSpace {
        // "PCI Express host bridge" of Red Hat's, made for virtual machines; no driver cares.
        const HOST_BRIDGE: u32 = 0x06_0000;
        ConfigurationSpace::new(&Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: HOST_BRIDGE,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        })
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    fn let_write(&mut self, at: usize, bits: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(bits) {
            *to = *from;
        }
    }

    /// Adds a BAR of 64 bits, which takes two registers from `index`. It is at address zero until
    /// [`set_bar`](Self::set_bar).
    pub fn add_bar(&mut self, index: u8, size: u64) -> Result<(), LayoutError> {
        let slot = usize::from(index);
        let free = self.bar_sizes.get(slot..slot + 2).is_some_and(|sizes| sizes == [0, 0]);
        let follows = slot > 0 && self.bar_sizes.get(slot - 1).is_some_and(|size| *size != 0);
        if !free || follows || !size.is_power_of_two() || size <= BAR_FLAGS {
            return Err(LayoutError::Bar(index));
        }
        if let Some(entry) = self.bar_sizes.get_mut(slot) {
            *entry = size;
        }
        self.put(BARS + 4 * slot, &BAR_64_BITS.to_le_bytes());
        self.let_write(BARS + 4 * slot, &(!(size - 1)).to_le_bytes());
        Ok(())
    }

    /// Appends a capability; `body` follows its identifier and link, `writable` are the bits of the
    /// body that a guest may change (none where it ends). Returns the capability's offset.
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u8, LayoutError> {
        let at = self.end;
        let end = (at + 2 + body.len()).next_multiple_of(4);
        let offset = u8::try_from(at).map_err(|_| LayoutError::Capability(id))?;
        if end > SIZE {
            return Err(LayoutError::Capability(id));
        }
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.let_write(at + 2, &writable[..writable.len().min(body.len())]);
        let link = if self.last_capability == 0 { CAPABILITIES } else { self.last_capability + 1 };
        self.put(link, &[offset]);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.last_capability = at;
        self.end = end;
        Ok(offset)
    }

    /// Reads at any offset in any size; zeros where there is nothing.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(offset.into())) {
            *to = *from;
        }
    }

    /// Writes at any offset in any size; what a guest may not change stays.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, writable), value) in bytes.zip(data) {
            *byte = (*byte & !writable) | (value & writable);
        }
    }

    /// A register of 16 bits; zero past the end.
    pub fn word(&self, offset: u8) -> u16 {
        let mut data = [0; 2];
        self.read(offset.into(), &mut data);
        u16::from_le_bytes(data)
    }

    /// A register of 32 bits; zero past the end.
    pub fn dword(&self, offset: u8) -> u32 {
        let mut data = [0; 4];
        self.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    /// Every BAR: its index, and the addresses it was given, answered or not.
    pub fn bars(&self) -> impl Iterator<Item = (u8, Range<u64>)> + '_ {
        let present = (0u8..).zip(self.bar_sizes).filter(|(_, size)| *size != 0);
        present.map(|(index, size)| {
            let mut data = [0; 8];
            self.read(BARS as u16 + 4 * u16::from(index), &mut data);
            // Aligned to its size, so that only the topmost one ends past the address space.
            let start = u64::from_le_bytes(data) & !BAR_FLAGS;
            (index, start..start.saturating_add(size))
        })
    }

    /// Places a BAR, as firmware would.
    pub fn set_bar(&mut self, index: u8, address: u64) {
        self.write(BARS as u16 + 4 * u16::from(index), &address.to_le_bytes());
    }

    /// Whether the function answers at its BARs.
    pub fn memory_enabled(&self) -> bool {
        self.word(COMMAND as u8) & COMMAND_MEMORY != 0
    }

    /// The bytes, for a snapshot.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes what a guest may change out of a snapshot's bytes.
    pub fn restore(&mut self, bytes: &[u8]) {
        self.write(0, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_8000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        }
    }

    #[test]
    fn a_header_says_what_the_function_is_and_keeps_it() {
        let mut space = ConfigurationSpace::new(&identity());
        space.write(0, &[0xff; SIZE]);
        assert_eq!(space.dword(0), 0x1042_1af4);
        assert_eq!(space.dword(8), 0x0180_0001);
        assert_eq!(space.dword(0x2c), 0x0040_1af4);
        // Memory, bus master, no interrupt pin; no capability, no BAR.
        assert_eq!(space.dword(4), 0x0406);
        assert_eq!(space.dword(0x34), 0);
        assert_eq!(space.dword(0x10), 0);
        // One function of type 0, without an interrupt pin.
        assert_eq!(space.dword(0xc), 0);
        assert_eq!(space.dword(0x3c), 0);
    }

    #[test]
    fn a_bar_is_sized_and_moved_as_linux_does_it() {
        let mut space = ConfigurationSpace::new(&identity());
        space.add_bar(0, 0x8000).unwrap();
        space.add_bar(2, 1 << 33).unwrap();
        space.set_bar(0, 0xe100_0000);
        assert_eq!((space.dword(0x10), space.dword(0x14)), (0xe100_0004, 0));
        for offset in [0x10, 0x14, 0x18, 0x1c] {
            space.write(offset, &[0xff; 4]);
        }
        assert_eq!((space.dword(0x10), space.dword(0x14)), (0xffff_8004, u32::MAX));
        assert_eq!((space.dword(0x18), space.dword(0x1c)), (0x0000_0004, 0xffff_fffe));
        // The topmost address there is; its end is not past it.
        assert_eq!(space.bars().next(), Some((0, 0xffff_ffff_ffff_8000..u64::MAX)));
        space.write(0x10, &0x4000_1234u32.to_le_bytes());
        space.write(0x14, &0x40u32.to_le_bytes());
        assert_eq!(space.bars().next(), Some((0, 0x40_4000_0000..0x40_4000_8000)));
        for (index, size) in [(0, 16), (1, 16), (3, 16), (5, 16), (4, 8), (4, 24), (255, 16)] {
            assert_eq!(space.add_bar(index, size), Err(LayoutError::Bar(index)));
        }
    }

    #[test]
    fn capabilities_are_linked_until_there_is_no_room() {
        let mut space = ConfigurationSpace::new(&identity());
        let first = space.add_capability(0x09, &[1, 2, 3], &[]).unwrap();
        let second = space.add_capability(0x11, &[4; 10], &[0, 0x80]).unwrap();
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.word(0x34), 0x40);
        assert_eq!(space.word(6), 0x10);
        assert_eq!((space.word(0x40), space.word(0x48)), (0x4809, 0x0011));
        space.write(0x48, &[0xff; 12]);
        assert_eq!((space.word(0x48), space.word(0x4a)), (0x0011, 0x8404));
        let refused = Err(LayoutError::Capability(0x09));
        assert_eq!(space.add_capability(0x09, &[0; 200], &[]), refused);
        while space.add_capability(0x09, &[0; 30], &[0xff; 99]).is_ok() {}
        assert_eq!(space.add_capability(0x09, &[0; 30], &[]), refused);
    }

    /// docs/hostile.md 9: every offset and size.
    #[test]
    fn hostile_9_every_offset_and_size_of_the_configuration_is_answered() {
        let mut space = ConfigurationSpace::host_bridge();
        let before = space.save();
        for offset in (0..0x1000).chain([u16::MAX]) {
            for size in 0..=16 {
                let mut data = vec![0xee; size];
                space.write(offset, &data);
                space.read(offset, &mut data);
            }
        }
        // Nothing but the command register was writable.
        space.write(4, &[0; 4]);
        assert_eq!(space.save(), before);
    }
}
