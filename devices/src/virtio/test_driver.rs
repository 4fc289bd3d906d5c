//! A driver for tests that keeps the rules, as `testing` breaks them: it goes round its rings for as
//! long as a test likes, and notifies only where an event index asks it to.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{Activation, Interrupt, VirtioDevice};
use crate::GuestMemory;

/// Bytes of guest memory.
pub const MEMORY: u64 = 4 << 20;
/// Where tests may put buffers.
pub const BUFFERS: u64 = 1 << 20;
/// Distance of the rings of one queue from those of the next.
const RINGS: u64 = 0x10000;

/// What came out of the interrupt line.
#[derive(Default)]
pub struct Line {
    used: AtomicUsize,
    broken: AtomicBool,
}

impl Interrupt for Line {
    fn used_buffers(&self, _index: u16) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }

    fn config_changed(&self) {}

    fn needs_reset(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }
}

/// Part of a chain: address, length, and whether the device may write it.
pub type Part = (u64, u32, bool);

/// For the device to read.
pub fn readable(address: u64, length: u32) -> Part {
    (address, length, false)
}

/// For the device to write.
pub fn writable(address: u64, length: u32) -> Part {
    (address, length, true)
}

#[derive(Clone, Default)]
struct Ring {
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

/// A device with its driver.
pub struct Driver<D> {
    pub memory: GuestMemory,
    device: Arc<Mutex<D>>,
    events: EventManager<Arc<Mutex<D>>>,
    line: Arc<Line>,
    rings: Vec<Ring>,
    event_idx: bool,
}

impl<D: VirtioDevice + MutEventSubscriber> Driver<D> {
    /// A driver that has not yet begun.
    pub fn new(device: D) -> Driver<D> {
        let sizes = device.queue_max_sizes().to_vec();
        let device = Arc::new(Mutex::new(device));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone());
        Driver {
            memory: GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap(),
            device,
            events,
            line: Arc::default(),
            rings: sizes.iter().map(|size| Ring { size: *size, ..Ring::default() }).collect(),
            event_idx: false,
        }
    }

    /// The device itself.
    pub fn device(&self) -> MutexGuard<'_, D> {
        self.device.lock().unwrap()
    }

    fn descriptors(queue: usize) -> u64 {
        RINGS * (queue as u64 + 1)
    }

    fn available(queue: usize) -> u64 {
        Self::descriptors(queue) + 0x4000
    }

    fn used_ring(queue: usize) -> u64 {
        Self::descriptors(queue) + 0x8000
    }

    /// `DRIVER_OK` with these features, and queues of this size.
    pub fn activate(&mut self, features: u64, size: u16) {
        self.event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::new();
        for (index, ring) in self.rings.iter_mut().enumerate() {
            *ring = Ring { size, ..Ring::default() };
            let bases = [Self::descriptors(index), Self::available(index), Self::used_ring(index)];
            self.memory.write_slice(&[0; 0xc000], GuestAddress(bases[0])).unwrap();
            let mut queue = Queue::new(size).unwrap();
            queue.set_size(size);
            queue.set_desc_table_address(Some(bases[0] as u32), None);
            queue.set_avail_ring_address(Some(bases[1] as u32), None);
            queue.set_used_ring_address(Some(bases[2] as u32), None);
            queue.set_event_idx(self.event_idx);
            queue.set_ready(true);
            assert!(queue.is_valid(&self.memory));
            queues.push(Some(queue));
        }
        let (memory, interrupt) = (self.memory.clone(), self.line.clone());
        self.device().activate(Activation { memory, queues, features, interrupt }).unwrap();
        self.run();
    }

    /// Makes a chain available, without a notification; returns its head.
    pub fn add(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let ring = &mut self.rings[queue];
        let head = ring.next_descriptor;
        for (index, (address, length, write)) in parts.iter().enumerate() {
            let slot = ring.next_descriptor;
            ring.next_descriptor = (slot + 1) % ring.size;
            let more = index + 1 < parts.len();
            let flags = u64::from(more) | u64::from(*write) << 1;
            let at = Self::descriptors(queue) + 16 * u64::from(slot);
            self.memory.write_obj(*address, GuestAddress(at)).unwrap();
            let rest = u64::from(*length) | flags << 32 | u64::from(ring.next_descriptor) << 48;
            self.memory.write_obj(rest, GuestAddress(at + 8)).unwrap();
        }
        let slot = u64::from(ring.available % ring.size);
        self.memory.write_obj(head, GuestAddress(Self::available(queue) + 4 + 2 * slot)).unwrap();
        ring.available = ring.available.wrapping_add(1);
        let index = ring.available;
        self.memory.write_obj(index, GuestAddress(Self::available(queue) + 2)).unwrap();
        head
    }

    /// Notifies the device as Linux does: with EVENT_IDX only where the device asked for it.
    pub fn notify(&mut self, queue: usize) {
        let ring = &self.rings[queue];
        let at = Self::used_ring(queue) + 4 + 8 * u64::from(ring.size);
        let event: u16 = self.memory.read_obj(GuestAddress(at)).unwrap();
        // One chain at a time is added and notified of.
        if !self.event_idx || event == ring.available.wrapping_sub(1) {
            self.device().queue_events()[queue].write(1).unwrap();
        }
        self.run();
    }

    /// Adds a chain and notifies.
    pub fn send(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let head = self.add(queue, parts);
        self.notify(queue);
        head
    }

    /// Lets the event loop run until nothing is left to do, nor in flight. A device that always has
    /// something to do fails the test.
    pub fn run(&mut self) {
        for _ in 0..10_000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                self.device().drain();
                if self.events.run_with_timeout(0).unwrap() == 0 {
                    return;
                }
            }
        }
        panic!("the device does not come to rest");
    }

    /// Waits for events, until so many chains have come back.
    pub fn wait(&mut self, queue: usize, count: usize) -> Vec<(u16, u32)> {
        let mut came = Vec::new();
        let begin = Instant::now();
        while came.len() < count {
            assert!(begin.elapsed() < Duration::from_secs(10), "{} came", came.len());
            // May end for nothing: io_uring interrupts the thread whose requests complete.
            self.events.run_with_timeout(1000).unwrap();
            came.extend(self.used(queue));
        }
        came
    }

    /// Chains that came back since the last call: head and length written.
    pub fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let index: u16 = self.memory.read_obj(GuestAddress(Self::used_ring(queue) + 2)).unwrap();
        let mut found = Vec::new();
        while ring.used != index {
            let slot = u64::from(ring.used % ring.size);
            let at = GuestAddress(Self::used_ring(queue) + 4 + 8 * slot);
            let element: u64 = self.memory.read_obj(at).unwrap();
            found.push((element as u16, (element >> 32) as u32));
            ring.used = ring.used.wrapping_add(1);
        }
        if self.event_idx {
            // Wants to hear of the next one.
            let at = Self::available(queue) + 4 + 2 * u64::from(ring.size);
            self.memory.write_obj(ring.used, GuestAddress(at)).unwrap();
        }
        found
    }

    /// Interrupts since the last call.
    pub fn interrupts(&self) -> usize {
        self.line.used.swap(0, Ordering::SeqCst)
    }

    /// Whether the device has reported `DEVICE_NEEDS_RESET`, since the last call.
    pub fn is_broken(&self) -> bool {
        self.line.broken.swap(false, Ordering::SeqCst)
    }

    /// Writes bytes into guest memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Reads bytes from guest memory.
    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}
