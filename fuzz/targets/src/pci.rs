//! A PCI bus as a guest reaches it: configuration spaces, BARs wherever they are moved, MSI-X, slots
//! that are plugged and ejected.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use arbitrary::Unstructured;
use devices::GuestMemory;
use devices::bus::Bus;
use devices::pci::hotplug::{self, HotPlug};
use devices::pci::msix::MsiSink;
use devices::pci::{BarSink, Ecam, MemoryWindow, PciBus, SLOTS};
use devices::virtio::pci::{PciTransport, PciTransportState};
use event_manager::{EventManager, MutEventSubscriber, SubscriberId, SubscriberOps};
use vm_memory::{Bytes, FileOffset, GuestAddress};

use crate::driver::{Device, Kind, MEMORY};
use crate::memory_file;

/// Where things are for the guest.
const ECAM: u64 = 0xe000_0000;
const LOW: Range<u64> = 0xe100_0000..0xe110_0000;
const HIGH: Range<u64> = 0x40_0000_0000..0x40_1000_0000;
const HOT_PLUG: u64 = 0xf000_0000;
/// The size of a device's BAR, and what is where in it (virtio-pci's layout).
const BAR_SIZE: u64 = 0x8000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
/// Registers of the configuration space.
const COMMAND: u64 = 4;
const BAR: u64 = 0x10;
/// Rings of a slot's queues: three pages for each of three queues.
const RINGS: u64 = 0x1_0000;
const PAGE: u64 = 0x1000;
/// Most devices plugged in an input: to make one takes long.
const PLUGGED: u32 = 4;
const SNAPSHOTS: u32 = 3;
const EVENTS: usize = 10_000;
const KINDS: [Kind; 4] = [Kind::Rng, Kind::Block, Kind::Console, Kind::Balloon];

/// Steps of a guest on a bus of four devices. Each BAR is where the bus said that it is, messages
/// are described before they are sent, and what the guest does not eject works after a reset.
pub fn pci_bus(input: &[u8]) {
    let mut machine = Machine::new();
    let _ = machine.run(&mut Unstructured::new(input));
    machine.check();
}

/// Which BARs answer, as the bus said.
#[derive(Default)]
struct Places(Mutex<BTreeSet<(u8, u8, u64)>>);

impl BarSink for Places {
    fn mapped(&self, slot: u8, bar: u8, address: u64) {
        assert!(address.is_multiple_of(BAR_SIZE) && slot > 0 && slot < SLOTS);
        let inside = |window: &Range<u64>| {
            window.start <= address && address.saturating_add(BAR_SIZE) <= window.end
        };
        assert!([LOW, HIGH].iter().any(inside), "a BAR outside the windows");
        assert!(self.0.lock().unwrap().insert((slot, bar, address)), "mapped twice");
    }

    fn unmapped(&self, slot: u8, bar: u8, address: u64) {
        assert!(self.0.lock().unwrap().remove(&(slot, bar, address)), "was not mapped");
    }
}

/// Which vectors have a message.
struct Vectors {
    count: u16,
    routed: Mutex<BTreeSet<u16>>,
}

impl MsiSink for Vectors {
    fn route(&self, vector: u16, address: u64, _data: u32) {
        assert!(vector < self.count && address.is_multiple_of(4));
        self.routed.lock().unwrap().insert(vector);
    }

    fn trigger(&self, vector: u16) {
        assert!(self.routed.lock().unwrap().contains(&vector), "a message without an address");
    }
}

type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

struct Plugged {
    kind: Kind,
    device: Device,
    transport: Arc<Mutex<PciTransport>>,
    subscriber: SubscriberId,
    /// Index of each queue's available ring.
    available: [u16; 3],
}

struct Machine {
    memory: GuestMemory,
    mmio: Bus,
    bus: Arc<Mutex<PciBus>>,
    hot_plug: Arc<Mutex<HotPlug>>,
    places: Arc<Places>,
    events: EventManager<Subscriber>,
    slots: Vec<Option<Plugged>>,
}

impl Machine {
    fn new() -> Machine {
        let backing = memory_file();
        backing.set_len(MEMORY).unwrap();
        let region = (GuestAddress(0), MEMORY as usize, Some(FileOffset::new(backing, 0)));
        let memory = GuestMemory::from_ranges_with_files([region]).unwrap();
        let places = Arc::new(Places::default());
        let bus = Arc::new(Mutex::new(PciBus::new(vec![LOW, HIGH], places.clone())));
        let hot_plug = Arc::new(Mutex::new(HotPlug::new(bus.clone()).unwrap()));
        let mut mmio = Bus::default();
        mmio.insert(ECAM, Ecam::SIZE, Arc::new(Mutex::new(Ecam(bus.clone())))).unwrap();
        mmio.insert(HOT_PLUG, hotplug::SIZE, hot_plug.clone()).unwrap();
        for window in [LOW, HIGH] {
            let view = MemoryWindow { bus: bus.clone(), start: window.start };
            mmio.insert(window.start, window.end - window.start, Arc::new(Mutex::new(view)))
                .unwrap();
        }
        let events = EventManager::new().unwrap();
        let slots = (0..SLOTS).map(|_| None).collect();
        let mut machine = Machine { memory, mmio, bus, hot_plug, places, events, slots };
        for kind in KINDS {
            machine.plug(kind, None);
        }
        machine
    }

    fn transport(&self, device: &Device) -> PciTransport {
        let shared = device.shared();
        let count = PciTransport::vector_count(&*shared.lock().unwrap());
        let sink = Arc::new(Vectors { count, routed: Mutex::default() });
        PciTransport::new(self.memory.clone(), shared, sink).unwrap()
    }

    fn plug(&mut self, kind: Kind, slot: Option<u8>) {
        let device = Device::new(kind);
        let transport = Arc::new(Mutex::new(self.transport(&device)));
        let Ok(slot) = self.bus.lock().unwrap().insert(slot, transport.clone()) else { return };
        let subscriber = self.events.add_subscriber(device.subscriber());
        let available = [0; 3];
        let plugged = Plugged { kind, device, transport, subscriber, available };
        assert!(self.slots[usize::from(slot)].replace(plugged).is_none());
        self.hot_plug.lock().unwrap().plugged(slot);
    }

    /// Lets go of what the guest has ejected, as the monitor does.
    fn take_ejected(&mut self) {
        let ejected = self.hot_plug.lock().unwrap().take_ejected();
        for slot in ejected {
            let plugged = self.slots[usize::from(slot)].take().expect("there was something");
            self.events.remove_subscriber(plugged.subscriber).unwrap();
            assert!(self.places.0.lock().unwrap().iter().all(|(other, ..)| *other != slot));
        }
    }

    /// Puts another device with what this one knew into its place, as after a snapshot.
    fn restore(&mut self, slot: u8) {
        let Some(plugged) = &mut self.slots[usize::from(slot)] else { return };
        // One that was ejected, but not noticed yet, is no more in a snapshot.
        if self.bus.lock().unwrap().function(slot).is_none() {
            return;
        }
        plugged.device.shared().lock().unwrap().drain();
        let saved = (
            plugged.transport.lock().unwrap().save(),
            plugged.device.shared().lock().unwrap().save(),
        );
        let bytes = rmp_serde::to_vec_named(&saved).unwrap();
        let (registers, state): (PciTransportState, _) = rmp_serde::from_slice(&bytes).unwrap();
        let (kind, available) = (plugged.kind, plugged.available);
        self.events.remove_subscriber(plugged.subscriber).unwrap();
        self.slots[usize::from(slot)] = None;
        self.bus.lock().unwrap().remove(slot);
        self.plug(kind, Some(slot));
        let plugged = self.slots[usize::from(slot)].as_mut().expect("the slot was free");
        plugged.available = available;
        plugged.device.shared().lock().unwrap().restore(state).unwrap();
        plugged.transport.lock().unwrap().restore(&registers).unwrap();
        self.bus.lock().unwrap().restored(slot);
        let after =
            self.slots[usize::from(slot)].as_ref().unwrap().transport.lock().unwrap().save();
        assert_eq!(after.configuration, registers.configuration);
    }

    fn settle(&mut self) {
        for _ in 0..EVENTS {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the devices do not come to rest");
    }

    fn get(&self, address: u64, size: usize) -> u32 {
        let mut word = [0; 4];
        self.mmio.read(address, &mut word[..size]);
        u32::from_le_bytes(word)
    }

    fn set(&self, address: u64, size: usize, value: u64) {
        self.mmio.write(address, &value.to_le_bytes()[..size]);
    }

    fn register(slot: u8, offset: u64) -> u64 {
        ECAM + (u64::from(slot) << 15) + offset
    }

    /// Where a slot's BAR is now, answered at or not.
    fn bar(&self, slot: u8) -> u64 {
        let half = |at| u64::from(self.get(Self::register(slot, BAR + at), 4));
        (half(0) | half(4) << 32) & !(BAR_SIZE - 1)
    }

    fn place_bar(&self, slot: u8, address: u64) {
        self.set(Self::register(slot, COMMAND), 2, 0);
        self.set(Self::register(slot, BAR), 4, address & 0xffff_ffff);
        self.set(Self::register(slot, BAR + 4), 4, address >> 32);
        self.set(Self::register(slot, COMMAND), 2, 6);
    }

    /// A driver's way from a reset to `DRIVER_OK`, with MSI-X.
    fn set_up(&mut self, slot: u8, features: u64, size: u64) {
        let bar = self.bar(slot);
        let rings = RINGS + u64::from(slot % 8) * 9 * PAGE;
        for page in 0..9 {
            let _ = self.memory.write_slice(&[0; PAGE as usize], GuestAddress(rings + page * PAGE));
        }
        if let Some(plugged) = &mut self.slots[usize::from(slot)] {
            plugged.available = [0; 3];
        }
        self.set(bar + 0x14, 1, 0);
        for status in [1, 3] {
            self.set(bar + 0x14, 1, status);
        }
        for page in 0..2 {
            self.set(bar, 4, page);
            let offered = u64::from(self.get(bar + 4, 4));
            self.set(bar + 8, 4, page);
            self.set(bar + 0xc, 4, offered & (features >> (32 * page)));
        }
        self.set(bar + 0x14, 1, 11);
        let capability = self.msix(slot);
        self.set(capability + 2, 2, 0xc000);
        for vector in 0..4 {
            for (at, value) in [(0, 0xfee0_0000), (4, 0), (8, 0x4020 + vector), (12, 0)] {
                self.set(bar + TABLE + 16 * vector + at, 4, value);
            }
        }
        self.set(capability + 2, 2, 0x8000);
        self.set(bar + 0x10, 2, 0);
        for queue in 0..3 {
            self.set(bar + 0x16, 2, queue);
            let max = u64::from(self.get(bar + 0x18, 2));
            if max == 0 {
                continue;
            }
            self.set(bar + 0x18, 2, size.next_power_of_two().min(max).min(256));
            self.set(bar + 0x1a, 2, queue + 1);
            for (ring, register) in (0..).zip([0x20, 0x28, 0x30]) {
                let address = rings + (3 * queue + ring) * PAGE;
                self.set(bar + register, 4, address);
                self.set(bar + register + 4, 4, 0);
            }
            self.set(bar + 0x1c, 2, 1);
        }
        self.set(bar + 0x14, 1, 15);
    }

    /// Where the capability of MSI-X is; the header where a guest finds none.
    fn msix(&self, slot: u8) -> u64 {
        let mut at = u64::from(self.get(Self::register(slot, 0x34), 1) & 0xfc);
        for _ in 0..64 {
            let head = self.get(Self::register(slot, at), 4);
            if at != 0 && head & 0xff == 0x11 {
                return Self::register(slot, at);
            }
            at = u64::from(head >> 8 & 0xfc);
        }
        Self::register(slot, 0)
    }

    fn run(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let (mut plugged, mut snapshots) = (0, 0);
        while !input.is_empty() {
            match input.arbitrary::<u8>()? % 14 {
                0 => {
                    let (slot, features, size): (u8, u32, u8) = input.arbitrary()?;
                    let features = u64::from(features) | u64::MAX << 32;
                    self.set_up(slot % SLOTS, features, size.into());
                }
                // Anything of what a slot has, in any size.
                kind @ 1..=4 => {
                    let (slot, offset, size): (u8, u16, u8) = input.arbitrary()?;
                    let slot = slot % 8;
                    let address = match kind {
                        1 | 2 => Self::register(slot, u64::from(offset) & 0x1fff),
                        _ => self.bar(slot).wrapping_add(u64::from(offset) & 0x7fff),
                    };
                    let mut data: [u8; 8] = if kind % 2 == 0 { input.arbitrary()? } else { [0; 8] };
                    let data = &mut data[..usize::from(size % 9)];
                    match kind {
                        2 | 4 => self.mmio.write(address, data),
                        _ => self.mmio.read(address, data),
                    }
                }
                5 => {
                    let (slot, high, place): (u8, bool, u16) = input.arbitrary()?;
                    let window = if high { HIGH } else { LOW };
                    // Also before the windows, behind them, and on another one's.
                    let address = (window.start - BAR_SIZE) + u64::from(place) * 0x1000;
                    self.place_bar(slot % 8, address);
                }
                6 => {
                    let (slot, address): (u8, u64) = input.arbitrary()?;
                    self.place_bar(slot % 8, address);
                }
                7 => {
                    let (slot, queue, head): (u8, u8, u16) = input.arbitrary()?;
                    self.offer(slot % 8, queue % 3, head);
                }
                8 => {
                    let (slot, queue, index): (u8, u8, u16) = input.arbitrary()?;
                    let (address, length, flags, next): (u16, u16, u16, u16) = input.arbitrary()?;
                    let table =
                        RINGS + u64::from(slot % 8) * 9 * PAGE + u64::from(queue % 3) * 3 * PAGE;
                    let at = GuestAddress(table + 16 * u64::from(index % 256));
                    let rest = u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48;
                    let _ = self.memory.write_obj(u64::from(address) << 4, at);
                    let _ = self.memory.write_obj(rest, GuestAddress(at.0 + 8));
                }
                9 => {
                    let (register, size, value): (u8, u8, u32) = input.arbitrary()?;
                    let address = HOT_PLUG + u64::from(register % 16);
                    let size = usize::from(size % 5);
                    self.set(address, size, value.into());
                    let mut data = [0; 4];
                    self.mmio.read(address, &mut data[..size]);
                }
                10 => {
                    let (kind, slot): (u8, u8) = input.arbitrary()?;
                    plugged += 1;
                    if plugged <= PLUGGED {
                        self.take_ejected();
                        self.plug(KINDS[usize::from(kind) % KINDS.len()], Some(slot % 8));
                    }
                }
                11 => {
                    let slot: u8 = input.arbitrary()?;
                    self.hot_plug.lock().unwrap().request_eject(slot % SLOTS);
                }
                12 => {
                    let slot: u8 = input.arbitrary()?;
                    snapshots += 1;
                    if snapshots <= SNAPSHOTS {
                        self.take_ejected();
                        self.restore(slot % 8);
                    }
                }
                _ => self.take_ejected(),
            }
            self.settle();
        }
        Ok(())
    }

    /// Makes a head available, and says so.
    fn offer(&mut self, slot: u8, queue: u8, head: u16) {
        let bar = self.bar(slot);
        let Some(plugged) = &mut self.slots[usize::from(slot)] else { return };
        let index = &mut plugged.available[usize::from(queue)];
        let ring = RINGS + (u64::from(slot) * 9 + u64::from(queue) * 3 + 1) * PAGE;
        // Right for a queue of 16, and some head or other for another one.
        let place = ring + 4 + 2 * u64::from(*index % 16);
        *index = index.wrapping_add(1);
        let _ = self.memory.write_obj(head, GuestAddress(place));
        let _ = self.memory.write_obj(*index, GuestAddress(ring + 2));
        self.set(bar + NOTIFY + 4 * u64::from(queue), 2, queue.into());
    }

    /// Whatever was before: a device that is there can be put where it answers, and works.
    fn check(&mut self) {
        self.take_ejected();
        for slot in 1..SLOTS {
            self.set(Self::register(slot, COMMAND), 2, 0);
        }
        assert!(self.places.0.lock().unwrap().is_empty());
        for slot in 1..SLOTS {
            if self.slots[usize::from(slot)].is_none() {
                continue;
            }
            let address = LOW.start + u64::from(slot) * BAR_SIZE;
            self.place_bar(slot, address);
            assert_eq!(self.places.0.lock().unwrap().last(), Some(&(slot, 0, address)));
            self.set_up(slot, u64::MAX, 16);
            self.settle();
            assert_eq!(self.get(address + 0x14, 1), 15);
        }
    }
}
