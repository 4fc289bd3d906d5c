//! The bus: which function is in which slot, and which answers at which address.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::configuration::ConfigurationSpace;
use crate::bus::BusDevice;

/// Slots of the bus. The first is the host bridge's.
pub const SLOTS: u8 = 32;

/// A function: what a slot holds.
pub trait PciFunction: Send {
    /// Its configuration space.
    fn configuration(&self) -> &ConfigurationSpace;
    /// The same, to be placed by the bus.
    fn configuration_mut(&mut self) -> &mut ConfigurationSpace;
    /// The guest reads the configuration space, at any offset in any size.
    fn read_configuration(&mut self, offset: u16, data: &mut [u8]) {
        self.configuration().read(offset, data);
    }
    /// The guest writes the configuration space, at any offset in any size.
    fn write_configuration(&mut self, offset: u16, data: &[u8]) {
        self.configuration_mut().write(offset, data);
    }
    /// The guest reads a BAR, inside its size.
    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]);
    /// The guest writes a BAR, inside its size.
    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]);
    /// The function leaves the bus: nothing it does reaches the guest any more.
    fn unplugged(&mut self);
}

/// Told of where BARs are, to have ioeventfds there.
///
/// Called with the bus locked, on the thread of the vCPU whose guest changed it (Linux does so once
/// for each device it starts, and places those that are hot-plugged anew); it must not use the bus.
/// Who does nothing here only makes notifications slower: one that no ioeventfd catches arrives as an
/// access to the BAR.
pub trait BarSink: Send + Sync {
    /// The function in this slot now answers at this address.
    fn mapped(&self, slot: u8, bar: u8, address: u64);
    /// It does not any more.
    fn unmapped(&self, slot: u8, bar: u8, address: u64);
}

/// A function cannot be put on the bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InsertError {
    /// The slot is taken or not there.
    #[error("no such PCI slot, or it is taken")]
    Slot,
    /// Any slot would do, and all are taken.
    #[error("too many devices: the PCI bus has slots for {}", SLOTS - 1)]
    Full,
    /// No window has room for a BAR of the function.
    #[error("no room for a PCI BAR of {0:#x} bytes")]
    Memory(u64),
}

type Function = Arc<Mutex<dyn PciFunction>>;

/// A BAR that a function answers at.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    slot: u8,
    bar: u8,
    addresses: Range<u64>,
}

/// A bus and its host bridge.
pub struct PciBus {
    functions: [Option<Function>; SLOTS as usize],
    windows: Vec<Range<u64>>,
    mappings: Vec<Mapping>,
    sink: Arc<dyn BarSink>,
}

struct HostBridge(ConfigurationSpace);

impl PciFunction for HostBridge {
    fn configuration(&self) -> &ConfigurationSpace {
        &self.0
    }
    fn configuration_mut(&mut self) -> &mut ConfigurationSpace {
        &mut self.0
    }
    fn read_bar(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write_bar(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}
    fn unplugged(&mut self) {}
}

fn lock(function: &Function) -> MutexGuard<'_, dyn PciFunction + 'static> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PciBus {
    /// A bus whose functions may be at addresses of these windows, and nowhere else: those that ACPI
    /// says. New functions are put in the first one that has room.
    pub fn new(windows: Vec<Range<u64>>, sink: Arc<dyn BarSink>) -> PciBus {
        let mut functions = [const { None }; SLOTS as usize];
        let bridge: Function = Arc::new(Mutex::new(HostBridge(ConfigurationSpace::host_bridge())));
        functions[0] = Some(bridge);
        PciBus { functions, windows, mappings: Vec::new(), sink }
    }

    /// Puts a function into a slot, the first free one by default, and its BARs where there is room.
    /// Returns the slot. A running guest is to be told by [`HotPlug::plugged`].
    ///
    /// [`HotPlug::plugged`]: super::hotplug::HotPlug::plugged
    pub fn insert(
        &mut self,
        slot: Option<u8>,
        function: Arc<Mutex<dyn PciFunction>>,
    ) -> Result<u8, InsertError> {
        let mut free = (0..SLOTS).zip(&self.functions).filter(|(_, function)| function.is_none());
        let found = free.find(|(free, _)| slot.is_none_or(|slot| slot == *free));
        let none = || if slot.is_some() { InsertError::Slot } else { InsertError::Full };
        let slot = found.ok_or_else(none)?.0;
        let mut taken = self.taken();
        let mut locked = lock(&function);
        let bars: Vec<_> = locked.configuration().bars().collect();
        for (bar, addresses) in bars {
            let size = addresses.end - addresses.start;
            let start = self.room(size, &taken).ok_or(InsertError::Memory(size))?;
            taken.push(start..start + size);
            locked.configuration_mut().set_bar(bar, start);
        }
        drop(locked);
        if let Some(place) = self.functions.get_mut(usize::from(slot)) {
            *place = Some(function);
        }
        self.update_mappings(slot);
        Ok(slot)
    }

    /// Takes the function out of a slot. The guest finds nothing there any more, and nothing the
    /// function does reaches it.
    pub fn remove(&mut self, slot: u8) -> Option<Arc<Mutex<dyn PciFunction>>> {
        let function = self.functions.get_mut(usize::from(slot))?.take()?;
        lock(&function).unplugged();
        self.update_mappings(slot);
        Some(function)
    }

    /// The function in a slot.
    pub fn function(&self, slot: u8) -> Option<&Arc<Mutex<dyn PciFunction>>> {
        self.functions.get(usize::from(slot))?.as_ref()
    }

    /// Looks at a function's configuration again, after it was taken out of a snapshot.
    pub fn restored(&mut self, slot: u8) {
        self.update_mappings(slot);
    }

    /// Addresses of all BARs, answered at or not.
    fn taken(&self) -> Vec<Range<u64>> {
        let functions = self.functions.iter().flatten();
        functions
            .flat_map(|function| {
                lock(function).configuration().bars().map(|(_, at)| at).collect::<Vec<_>>()
            })
            .collect()
    }

    /// The lowest place for a BAR of `size` bytes, which is aligned to its size.
    fn room(&self, size: u64, taken: &[Range<u64>]) -> Option<u64> {
        self.windows.iter().find_map(|window| {
            // Begin of the window, and behind each BAR: one of these is the lowest place.
            let ends = taken.iter().map(|range| range.end);
            let candidates = ends.filter(|end| window.contains(end)).chain([window.start]);
            candidates
                .filter_map(|start| start.checked_next_multiple_of(size))
                .filter(|start| {
                    let Some(end) = start.checked_add(size) else { return false };
                    let free = |other: &Range<u64>| end <= other.start || other.end <= *start;
                    end <= window.end && taken.iter().all(free)
                })
                .min()
        })
    }

    /// The function in this slot may answer elsewhere than before.
    fn update_mappings(&mut self, slot: u8) {
        let now = self.function(slot).map_or(Vec::new(), |function| {
            let function = lock(function);
            let configuration = function.configuration();
            if !configuration.memory_enabled() {
                return Vec::new();
            }
            let inside = |addresses: &Range<u64>| {
                let within = |window: &Range<u64>| {
                    window.start <= addresses.start && addresses.end <= window.end
                };
                self.windows.iter().any(within)
            };
            let bars = configuration.bars().filter(|(_, addresses)| inside(addresses));
            bars.map(|(bar, addresses)| Mapping { slot, bar, addresses }).collect()
        });
        let sink = self.sink.clone();
        self.mappings.retain(|old| {
            let stays = old.slot != slot || now.contains(old);
            if !stays {
                sink.unmapped(slot, old.bar, old.addresses.start);
            }
            stays
        });
        for new in now {
            if !self.mappings.contains(&new) {
                sink.mapped(slot, new.bar, new.addresses.start);
                self.mappings.push(new);
            }
        }
    }

    /// Who answers at an address, and at which offset of which BAR.
    fn find(&self, address: u64, size: usize) -> Option<(&Function, u8, u64)> {
        let end = address.checked_add(size as u64)?;
        let mapping = self
            .mappings
            .iter()
            .find(|mapping| mapping.addresses.start <= address && end <= mapping.addresses.end)?;
        Some((self.function(mapping.slot)?, mapping.bar, address - mapping.addresses.start))
    }

    /// Slot and register of an offset into ECAM; none for another bus, or a function but the first.
    fn place(offset: u64) -> Option<(u8, u16)> {
        let slot = u8::try_from(offset >> 15).ok().filter(|slot| *slot < SLOTS)?;
        ((offset >> 12) & 7 == 0).then_some((slot, (offset & 0xfff) as u16))
    }
}

/// Configuration spaces of a bus by address, [`Ecam::SIZE`] bytes of them: for the MMIO bus.
pub struct Ecam(pub Arc<Mutex<PciBus>>);

impl Ecam {
    /// Bytes of one bus: 4 KiB for each of eight functions of each slot.
    pub const SIZE: u64 = 1 << 20;
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let bus = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = PciBus::place(offset);
        match place.and_then(|(slot, register)| Some((bus.function(slot)?, register))) {
            Some((function, register)) => lock(function).read_configuration(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut bus = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((slot, register)) = PciBus::place(offset) else { return };
        let Some(function) = bus.function(slot) else { return };
        lock(function).write_configuration(register, data);
        bus.update_mappings(slot);
    }
}

/// A window of the host bridge, through which BARs are reached: for the MMIO bus.
pub struct MemoryWindow {
    /// The bus behind it.
    pub bus: Arc<Mutex<PciBus>>,
    /// Guest physical address that the window begins at.
    pub start: u64,
}

impl BusDevice for MemoryWindow {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let bus = self.bus.lock().unwrap_or_else(PoisonError::into_inner);
        match bus.find(self.start.saturating_add(offset), data.len()) {
            Some((function, bar, offset)) => lock(function).read_bar(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let bus = self.bus.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((function, bar, offset)) =
            bus.find(self.start.saturating_add(offset), data.len())
        {
            lock(function).write_bar(bar, offset, data);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::pci::configuration::Identity;

    pub(crate) const WINDOW: Range<u64> = 0xe100_0000..0xe110_0000;
    const HIGH: Range<u64> = 0x40_0000_0000..0x41_0000_0000;

    /// Remembers where BARs are.
    #[derive(Default)]
    pub(crate) struct Map(Mutex<Vec<(u8, u8, u64)>>);

    impl Map {
        pub(crate) fn get(&self) -> Vec<(u8, u8, u64)> {
            self.0.lock().unwrap().clone()
        }
    }

    impl BarSink for Map {
        fn mapped(&self, slot: u8, bar: u8, address: u64) {
            self.0.lock().unwrap().push((slot, bar, address));
        }
        fn unmapped(&self, slot: u8, bar: u8, address: u64) {
            let mut map = self.0.lock().unwrap();
            let at = map.iter().position(|entry| *entry == (slot, bar, address)).unwrap();
            map.remove(at);
        }
    }

    /// A function whose BARs are bytes.
    pub(crate) struct Memory {
        configuration: ConfigurationSpace,
        bytes: Vec<u8>,
        pub(crate) unplugged: bool,
    }

    pub(crate) fn function(bars: &[(u8, u64)]) -> Arc<Mutex<Memory>> {
        let mut configuration = ConfigurationSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_8000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        for (bar, size) in bars {
            configuration.add_bar(*bar, *size).unwrap();
        }
        Arc::new(Mutex::new(Memory { configuration, bytes: vec![0; 0x1000], unplugged: false }))
    }

    impl PciFunction for Memory {
        fn configuration(&self) -> &ConfigurationSpace {
            &self.configuration
        }
        fn configuration_mut(&mut self) -> &mut ConfigurationSpace {
            &mut self.configuration
        }
        fn read_bar(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
            data.copy_from_slice(&self.bytes[offset as usize..][..data.len()]);
        }
        fn write_bar(&mut self, _bar: u8, offset: u64, data: &[u8]) {
            self.bytes[offset as usize..][..data.len()].copy_from_slice(data);
        }
        fn unplugged(&mut self) {
            self.unplugged = true;
        }
    }

    struct Guest {
        bus: Arc<Mutex<PciBus>>,
        map: Arc<Map>,
        mmio: crate::bus::Bus,
    }

    const ECAM: u64 = 0xe000_0000;

    impl Guest {
        fn new() -> Guest {
            let map = Arc::new(Map::default());
            let bus = PciBus::new(vec![WINDOW, HIGH], map.clone());
            let bus = Arc::new(Mutex::new(bus));
            let mut mmio = crate::bus::Bus::default();
            mmio.insert(ECAM, Ecam::SIZE, Arc::new(Mutex::new(Ecam(bus.clone())))).unwrap();
            for window in [WINDOW, HIGH] {
                let view = MemoryWindow { bus: bus.clone(), start: window.start };
                let size = window.end - window.start;
                mmio.insert(window.start, size, Arc::new(Mutex::new(view))).unwrap();
            }
            Guest { bus, map, mmio }
        }

        fn insert(&self, function: Arc<Mutex<Memory>>) -> Result<u8, InsertError> {
            self.bus.lock().unwrap().insert(None, function)
        }

        fn get(&self, address: u64) -> u32 {
            let mut data = [0; 4];
            self.mmio.read(address, &mut data);
            u32::from_le_bytes(data)
        }

        fn set(&self, address: u64, value: u32) {
            self.mmio.write(address, &value.to_le_bytes());
        }
    }

    fn register(slot: u64, offset: u64) -> u64 {
        ECAM + (slot << 15) + offset
    }

    proptest! {
        /// Whatever comes and goes, and wherever a guest moves BARs in between: a new function's are
        /// in a window, aligned, on no other one's, and as low as they can be there.
        #[test]
        fn bars_are_put_where_there_is_room(
            steps in vec((0u8..4, 0u8..32, 12u32..21, any::<u16>()), 0..60)
        ) {
            let guest = Guest::new();
            for (what, slot, bits, place) in steps {
                let size = 1u64 << bits;
                let mut bus = guest.bus.lock().unwrap();
                let taken = bus.taken();
                match what {
                    0 if slot > 0 => drop(bus.remove(slot)),
                    1 if slot > 0 => {
                        let Some(function) = bus.function(slot).cloned() else { continue };
                        let address = WINDOW.start + (u64::from(place) << 12);
                        lock(&function).configuration_mut().set_bar(0, address);
                        bus.update_mappings(slot);
                    }
                    _ => {
                        let free = |start: u64| {
                            taken.iter().all(|at| start + size <= at.start || at.end <= start)
                        };
                        let mut starts = [WINDOW, HIGH].into_iter().flat_map(|window| {
                            let end = window.end.min(window.start + (1 << 30));
                            (window.start.next_multiple_of(size)..end)
                                .step_by(size as usize)
                                .filter(move |start| start + size <= window.end)
                        });
                        let lowest = starts.find(|start| free(*start));
                        match bus.insert(None, function(&[(0, size)])) {
                            Ok(slot) => {
                                let function = bus.function(slot).unwrap().clone();
                                let at = lock(&function).configuration().bars().next().unwrap().1;
                                prop_assert_eq!((Some(at.start), at.end - at.start), (lowest, size));
                            }
                            Err(InsertError::Full) => {
                                prop_assert!(bus.functions.iter().all(Option::is_some));
                            }
                            Err(error) => prop_assert!(false, "{}", error),
                        }
                    }
                }
                // What answers is what the sink was told.
                let mut mapped: Vec<_> = bus
                    .mappings
                    .iter()
                    .map(|mapping| (mapping.slot, mapping.bar, mapping.addresses.start))
                    .collect();
                let mut told = guest.map.get();
                mapped.sort_unstable();
                told.sort_unstable();
                prop_assert_eq!(mapped, told);
            }
        }
    }

    #[test]
    fn functions_are_found_in_their_slots_and_nowhere_else() {
        let guest = Guest::new();
        assert_eq!(guest.insert(function(&[])), Ok(1));
        let mut bus = guest.bus.lock().unwrap();
        assert_eq!(bus.insert(Some(31), function(&[])), Ok(31));
        for slot in [0, 1, 31, 32, 255] {
            assert_eq!(bus.insert(Some(slot), function(&[])), Err(InsertError::Slot));
        }
        drop(bus);
        for slot in 0..32 {
            let expected = match slot {
                0 => 0x0008_1b36,
                1 | 31 => 0x1042_1af4,
                _ => u32::MAX,
            };
            assert_eq!(guest.get(register(slot, 0)), expected);
            // Other functions of the slot; the extended configuration.
            assert_eq!(guest.get(register(slot, 0x1000)), u32::MAX);
            let extended = if expected == u32::MAX { u32::MAX } else { 0 };
            assert_eq!(guest.get(register(slot, 0x100)), extended);
        }
        for slot in 2..31 {
            assert_eq!(guest.insert(function(&[])), Ok(slot));
        }
        assert_eq!(guest.insert(function(&[])), Err(InsertError::Full));
    }

    #[test]
    fn a_bar_answers_where_the_guest_puts_it_while_the_guest_lets_it() {
        let guest = Guest::new();
        let other = function(&[(0, 0x4000)]);
        guest.insert(other.clone()).unwrap();
        guest.insert(function(&[(0, 0x1000)])).unwrap();
        let address = WINDOW.start + 0x4000;
        assert_eq!(guest.get(register(2, 0x10)), address as u32 | 4);
        guest.set(address, 7);
        assert_eq!(guest.get(address), u32::MAX);
        guest.set(register(2, 4), 2);
        guest.set(address + 0xffc, 7);
        assert_eq!((guest.get(address + 0xffc), guest.get(address + 0x1000)), (7, u32::MAX));
        assert_eq!(guest.map.get(), [(2, 0, address)]);
        // Across its end.
        assert_eq!(guest.get(address + 0xffe), u32::MAX);
        // Moved as Linux does it: not answering meanwhile.
        guest.set(register(2, 4), 0);
        assert_eq!(guest.map.get(), []);
        let moved = HIGH.end - 0x1000;
        guest.set(register(2, 0x10), moved as u32);
        guest.set(register(2, 0x14), (moved >> 32) as u32);
        guest.set(register(2, 4), 2);
        assert_eq!(guest.map.get(), [(2, 0, moved)]);
        assert_eq!((guest.get(moved + 0xffc), guest.get(address + 0xffc)), (7, u32::MAX));
        // A new function takes the place that is free now.
        assert_eq!(guest.insert(function(&[(2, 0x4000)])), Ok(3));
        assert_eq!(guest.get(register(3, 0x18)), address as u32 | 4);
        // Outside every window: over memory, at the top.
        for outside in [0, 0xe110_0000, 0x3f_ffff_f000, u64::MAX] {
            guest.set(register(2, 0x10), outside as u32);
            guest.set(register(2, 0x14), (outside >> 32) as u32);
            assert_eq!(guest.map.get(), []);
        }
        assert!(!other.lock().unwrap().unplugged);
    }

    #[test]
    fn a_removed_function_is_gone_at_once() {
        let guest = Guest::new();
        let removed = function(&[(0, 0x1000)]);
        guest.insert(removed.clone()).unwrap();
        guest.set(register(1, 4), 2);
        assert!(guest.bus.lock().unwrap().remove(1).is_some());
        assert!(removed.lock().unwrap().unplugged);
        assert_eq!(guest.map.get(), []);
        assert_eq!(guest.get(register(1, 0)), u32::MAX);
        assert_eq!(guest.get(WINDOW.start), u32::MAX);
        for slot in [1, 32, 255] {
            assert!(guest.bus.lock().unwrap().remove(slot).is_none());
        }
        assert_eq!(guest.insert(removed), Ok(1));
    }

    #[test]
    fn bars_that_have_no_room_are_refused() {
        let guest = Guest::new();
        let size = WINDOW.end - WINDOW.start;
        assert_eq!(guest.insert(function(&[(0, size), (2, 1 << 31)])), Ok(1));
        assert_eq!(guest.get(register(1, 0x1c)), 0x40);
        assert_eq!(guest.insert(function(&[(0, 1 << 31)])), Ok(2));
        assert_eq!(guest.get(register(2, 0x10)), 0x8000_0004);
        let refused = Err(InsertError::Memory(16));
        assert_eq!(guest.insert(function(&[(0, 16)])), refused);
        assert_eq!(guest.get(register(3, 0)), u32::MAX);
    }

    /// docs/hostile.md 9: every offset and size, and BARs on top of each other.
    #[test]
    fn hostile_9_every_configuration_register_in_every_size() {
        let guest = Guest::new();
        guest.insert(function(&[(0, 0x1000)])).unwrap();
        guest.insert(function(&[(0, 0x1000)])).unwrap();
        let mut ecam = Ecam(guest.bus.clone());
        for offset in (0..0x1_9000).step_by(3).chain([Ecam::SIZE - 1, Ecam::SIZE, u64::MAX]) {
            for size in 0..=9 {
                for value in [0, 0xff, 0xe1, 2] {
                    ecam.write(offset, &vec![value; size]);
                    ecam.read(offset, &mut vec![0; size]);
                    guest.mmio.read(WINDOW.start + 0xffe, &mut vec![0; size]);
                }
            }
        }
        for slot in [1, 2] {
            guest.set(register(slot, 4), 2);
            guest.set(register(slot, 0x10), WINDOW.start as u32);
            guest.set(register(slot, 0x14), 0);
        }
        guest.set(WINDOW.start, 5);
        assert_eq!(guest.get(WINDOW.start), 5);
        assert_eq!(guest.map.get().len(), 2);
    }
}
