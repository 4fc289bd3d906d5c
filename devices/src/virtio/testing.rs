//! A driver for tests: builds descriptor chains in a few words, and breaks every rule there is.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, SubscriberOps};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{Activation, Interrupt, VirtioDevice};
use crate::GuestMemory;

/// Size of each queue.
pub const SIZE: u16 = 16;
/// Size of guest memory.
const MEMORY: u64 = 1 << 20;
/// Each queue's rings have a page for each.
const RINGS: u64 = 0x1000;
const DATA: u64 = 0x2_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Counts what a device signals.
#[derive(Default)]
pub struct Recorder {
    pub used: AtomicU32,
    pub configured: AtomicU32,
    pub reset_wanted: AtomicBool,
}

impl Interrupt for Recorder {
    fn used_buffers(&self, _index: u16) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {
        self.configured.fetch_add(1, Ordering::SeqCst);
    }
    fn needs_reset(&self) {
        self.reset_wanted.store(true, Ordering::SeqCst);
    }
}

/// A descriptor as it stands in the table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

/// A device with its driver and event loop.
pub struct Driver<D: VirtioDevice + 'static> {
    pub memory: GuestMemory,
    pub device: Arc<Mutex<D>>,
    pub interrupt: Arc<Recorder>,
    events: EventManager<Arc<Mutex<D>>>,
    free: u64,
    next_descriptor: Vec<u16>,
    available: Vec<u16>,
}

impl<D: VirtioDevice + 'static> Driver<D> {
    /// A driver that has set its device up with all that it offers, but for event indices.
    pub fn new(device: D) -> Driver<D> {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let queues = device.queue_max_sizes().len();
        let device = Arc::new(Mutex::new(device));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone());
        let mut driver = Driver {
            memory,
            device,
            interrupt: Arc::default(),
            events,
            free: DATA,
            next_descriptor: vec![0; queues],
            available: vec![0; queues],
        };
        driver.activate();
        driver
    }

    /// Where a queue's descriptors, available and used ring are.
    fn rings(queue: usize) -> (u64, u64, u64) {
        let base = RINGS + queue as u64 * 3 * 0x1000;
        (base, base + 0x1000, base + 0x2000)
    }

    fn activate(&mut self) {
        let mut device = self.device.lock().unwrap();
        let queues = (0..device.queue_max_sizes().len()).map(|index| {
            let (table, available, used) = Self::rings(index);
            let mut queue = Queue::new(SIZE).unwrap();
            queue.set_desc_table_address(Some(table as u32), None);
            queue.set_avail_ring_address(Some(available as u32), None);
            queue.set_used_ring_address(Some(used as u32), None);
            queue.set_ready(true);
            Some(queue)
        });
        let queues = queues.collect();
        let features = device.features() & !(1 << 29);
        let (memory, interrupt) = (self.memory.clone(), self.interrupt.clone());
        device.activate(Activation { memory, queues, features, interrupt }).unwrap();
    }

    /// Resets the device and sets it up again, its rings empty.
    pub fn start_again(&mut self) {
        self.device.lock().unwrap().reset();
        let queues = self.available.len();
        self.memory.write_slice(&vec![0; queues * 0x3000], GuestAddress(RINGS)).unwrap();
        self.next_descriptor.fill(0);
        self.available.fill(0);
        self.interrupt.reset_wanted.store(false, Ordering::SeqCst);
        self.activate();
        self.run();
    }

    /// Room for a buffer, filled with `bytes`.
    pub fn buffer(&mut self, bytes: &[u8]) -> u64 {
        let address = self.free;
        self.free += (bytes.len() as u64).next_multiple_of(64);
        assert!(self.free < MEMORY);
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        address
    }

    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Writes one descriptor of a queue's table.
    pub fn put(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let (table, ..) = Self::rings(queue);
        self.put_at(table + 16 * u64::from(index), descriptor);
    }

    pub fn put_at(&self, address: u64, descriptor: Descriptor) {
        let mut bytes = descriptor.address.to_le_bytes().to_vec();
        bytes.extend_from_slice(&descriptor.length.to_le_bytes());
        bytes.extend_from_slice(&descriptor.flags.to_le_bytes());
        bytes.extend_from_slice(&descriptor.next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
    }

    /// Makes a head available.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let (_, ring, _) = Self::rings(queue);
        let slot = ring + 4 + 2 * u64::from(self.available[queue] % SIZE);
        self.memory.write_slice(&head.to_le_bytes(), GuestAddress(slot)).unwrap();
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.set_available(queue, self.available[queue]);
    }

    pub fn set_available(&self, queue: usize, index: u16) {
        let (_, ring, _) = Self::rings(queue);
        self.memory.write_slice(&index.to_le_bytes(), GuestAddress(ring + 2)).unwrap();
    }

    /// Offers a chain of buffers the device may read, then write; (address, length) each.
    pub fn send(&mut self, queue: usize, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let head = self.next_descriptor[queue];
        let count = (readable.len() + writable.len()) as u16;
        let all =
            readable.iter().map(|part| (part, 0)).chain(writable.iter().map(|part| (part, WRITE)));
        for (offset, (&(address, length), flags)) in (0..).zip(all) {
            let last = offset + 1 == count;
            let flags = flags | if last { 0 } else { NEXT };
            let descriptor = Descriptor { address, length, flags, next: head + offset + 1 };
            self.put(queue, head + offset, descriptor);
        }
        self.next_descriptor[queue] = head + count;
        self.offer(queue, head);
        head
    }

    /// Notifies the device, and lets the event loop run until nothing is left to do.
    pub fn notify(&mut self, queue: usize) {
        self.device.lock().unwrap().queue_events()[queue].write(1).unwrap();
        self.run();
    }

    /// Lets the event loop run until nothing is left to do, nor in flight.
    pub fn run(&mut self) {
        // Bounded: a device that always finds more to do is a busy loop.
        for _ in 0..1000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                self.device.lock().unwrap().drain();
                if self.events.run_with_timeout(0).unwrap() == 0 {
                    return;
                }
            }
        }
        panic!("the device does not come to rest");
    }

    /// What the device has returned: heads and lengths.
    pub fn used(&self, queue: usize) -> Vec<(u32, u32)> {
        let (.., ring) = Self::rings(queue);
        let word = |at: u64| self.memory.read_obj::<u32>(GuestAddress(ring + at)).unwrap();
        let count = self.memory.read_obj::<u16>(GuestAddress(ring + 2)).unwrap();
        (0..u64::from(count)).map(|slot| (word(4 + 8 * slot), word(8 + 8 * slot))).collect()
    }

    pub fn wants_reset(&self) -> bool {
        self.interrupt.reset_wanted.load(Ordering::SeqCst)
    }
}

/// docs/hostile.md 1 to 4 and 6: every broken chain and ring on every queue. The device comes to rest,
/// returns nothing it was not given, and works again after a reset.
pub fn survives_broken_queues<D: VirtioDevice + 'static>(make: impl Fn() -> D) {
    let queues = make().queue_max_sizes().len();
    let one = |address, length, flags, next| vec![Descriptor { address, length, flags, next }];
    let cases: Vec<(&str, Vec<Descriptor>, bool)> = vec![
        ("next outside the queue", one(DATA, 16, NEXT, SIZE), true),
        ("next far outside", one(DATA, 16, NEXT, u16::MAX), true),
        ("a loop of one", one(DATA, 16, NEXT, 0), true),
        ("address zero is memory", one(0, 16, 0, 0), false),
        ("beyond memory", one(MEMORY, 1, 0, 0), true),
        ("across the end of memory", one(MEMORY - 1, 2, 0, 0), true),
        ("address and length past 2^64", one(u64::MAX, 16, 0, 0), true),
        ("4 GiB - 1 long", one(0, u32::MAX, WRITE, 0), true),
        ("length zero", one(DATA, 0, 0, 0), false),
        ("nothing but length zero to write", one(DATA, 0, WRITE, 0), false),
        ("one byte", one(DATA, 1, 0, 0), false),
        ("one byte to write", one(DATA, 1, WRITE, 0), false),
        ("indirect table of odd length", one(DATA, 17, INDIRECT, 0), true),
        ("empty indirect table", one(DATA, 0, INDIRECT, 0), true),
        ("indirect table outside memory", one(MEMORY, 64, INDIRECT, 0), true),
        ("huge indirect table", one(0, 0xffff_fff0, INDIRECT, 0), true),
        ("both indirect and next", one(MEMORY, 16, INDIRECT | NEXT, 1), true),
        (
            "readable after writable",
            vec![
                Descriptor { address: DATA, length: 16, flags: WRITE | NEXT, next: 1 },
                Descriptor { address: DATA, length: 16, flags: 0, next: 0 },
            ],
            true,
        ),
    ];
    for queue in 0..queues {
        for (name, descriptors, broken) in &cases {
            let mut driver = Driver::new(make());
            driver.run();
            for (index, descriptor) in (0..).zip(descriptors) {
                driver.put(queue, index, *descriptor);
            }
            driver.offer(queue, 0);
            driver.notify(queue);
            check(&mut driver, queue, name, *broken);
        }
        for (name, head) in [("head outside the queue", SIZE), ("head far outside", u16::MAX)] {
            let mut driver = Driver::new(make());
            driver.offer(queue, head);
            driver.notify(queue);
            check(&mut driver, queue, name, true);
        }
        for (name, index) in [("index jumps", SIZE + 1), ("index runs backwards", u16::MAX)] {
            let mut driver = Driver::new(make());
            driver.set_available(queue, index);
            driver.notify(queue);
            check(&mut driver, queue, name, true);
        }
        // A nested indirect table, and one longer than the queue.
        let mut driver = Driver::new(make());
        driver.put_at(DATA, Descriptor { address: DATA, length: 16, flags: INDIRECT, next: 0 });
        driver.put(queue, 0, Descriptor { address: DATA, length: 16, flags: INDIRECT, next: 0 });
        driver.offer(queue, 0);
        driver.notify(queue);
        check(&mut driver, queue, "nested indirect table", true);
        let mut driver = Driver::new(make());
        for index in 0..SIZE + 1 {
            let flags = if index == SIZE { 0 } else { NEXT };
            let entry = Descriptor { address: DATA, length: 1, flags, next: index + 1 };
            driver.put_at(DATA + 16 * u64::from(index), entry);
        }
        let length = 16 * u32::from(SIZE + 1);
        driver.put(queue, 0, Descriptor { address: DATA, length, flags: INDIRECT, next: 0 });
        driver.offer(queue, 0);
        driver.notify(queue);
        check(&mut driver, queue, "chain longer than the queue", true);
    }
}

/// A broken ring on a queue the device looks at must be reported; one it never looks at need not be.
fn check<D: VirtioDevice + 'static>(
    driver: &mut Driver<D>,
    queue: usize,
    name: &str,
    broken: bool,
) {
    let used = driver.used(queue);
    if broken {
        assert!(used.is_empty(), "queue {queue}, {name}: returned {used:?}");
    } else {
        assert!(!driver.wants_reset(), "queue {queue}, {name}: a reset for nothing");
        assert!(used.iter().all(|(head, _)| *head == 0), "queue {queue}, {name}: {used:?}");
    }
    driver.start_again();
    assert!(!driver.wants_reset(), "queue {queue}, {name}: no good after a reset");
}
