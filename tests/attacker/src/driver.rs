//! A driver of any virtio device, with its rings and buffers in scratch memory; more or less right.

use crate::Orders;
use crate::machine::{SCRATCH, fill, read, write};
use crate::queues::Counts;
use crate::random::Random;
use crate::transport::{ACKNOWLEDGE, DRIVER, DRIVER_OK, Device, FEATURES_OK};

/// Queues of a device that are looked at.
pub const QUEUES: usize = 8;
/// Each queue's rings and buffers.
const AREA: u64 = 1 << 20;
pub const AVAILABLE: u64 = 0x4000;
pub const USED: u64 = 0x8000;
pub const TABLES: u64 = 0x1_0000;
pub const BUFFERS: u64 = 0x2_0000;
const BUFFERS_SIZE: u64 = 0xc_0000;

const NEXT: u64 = 1;
pub const WRITABLE: u64 = 2;
const INDIRECT: u64 = 4;

/// Device type of the balloon (virtio 1.2, 5).
pub const BALLOON: u64 = 5;

#[derive(Clone, Copy, Default)]
pub struct Queue {
    pub size: u64,
    available: u64,
}

pub struct Driver<'a> {
    pub device: Device,
    pub queues: [Queue; QUEUES],
    pub random: &'a mut Random,
    end: u64,
    /// How rarely something is wrong: of a driver that is wrong all the time a device sees little.
    calm: u64,
}

impl<'a> Driver<'a> {
    pub fn new(
        device: Device,
        random: &'a mut Random,
        orders: &Orders<'_>,
        calm: u64,
    ) -> Driver<'a> {
        Driver { device, queues: Default::default(), random, end: orders.end, calm }
    }

    /// Resets the device, whatever it is doing.
    pub fn reset(&self) {
        self.device.set_status(0);
        let mut patience = 1_000_000;
        while self.device.status() != 0 && patience > 0 {
            patience -= 1;
        }
        assert!(patience > 0, "a device of type {} does not reset", self.device.kind);
    }

    /// Puts one buffer into a queue, and waits so many times where the queue is full.
    pub fn buffer(&mut self, number: u64, at: u64, length: u64, flags: u64, mut patience: u32) {
        let (area, queue) = (area(number), &mut self.queues[number as usize]);
        if queue.size == 0 {
            return;
        }
        while patience > 0
            && queue.available.wrapping_sub(read(area + USED + 2, 2)) & 0xffff >= queue.size
        {
            self.device.status();
            patience -= 1;
        }
        if patience == 0 {
            return;
        }
        let slot = queue.available % queue.size;
        set_descriptor(area + 16 * slot, at, length, flags, 0);
        write(area + AVAILABLE + 4 + 2 * slot, 2, slot);
        queue.available = (queue.available + 1) & 0xffff;
        write(area + AVAILABLE + 2, 2, queue.available);
    }

    /// As a driver should.
    pub fn start(&mut self) {
        let device = self.device;
        device.set_status(0);
        device.set_status(ACKNOWLEDGE);
        device.set_status(ACKNOWLEDGE | DRIVER);
        let offered = device.features();
        // Version 1, and any of the others.
        let chosen = offered & (self.random.next() | self.random.next() | 1 << 32);
        device.set_features(chosen);
        device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        for queue in 0..QUEUES as u64 {
            let most = device.select(queue);
            if most == 0 || most > 32768 {
                continue;
            }
            let size = most.min(1 << self.random.below(9)).min(256);
            let area = area(queue);
            for offset in (0..USED + 0x1000).step_by(8) {
                // Rings begin empty; descriptors are what they were.
                if offset >= AVAILABLE {
                    write(area + offset, 8, 0);
                }
            }
            device.set_queue(size, area, area + AVAILABLE, area + USED);
            self.queues[queue as usize] = Queue { size, available: 0 };
        }
        device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// With queues of sizes and at places that cannot be.
    pub fn start_wrongly(&mut self) {
        let device = self.device;
        device.set_status(0);
        device.set_status(ACKNOWLEDGE | DRIVER);
        let offered = device.features();
        let chosen = if self.random.once_in(4) { self.random.next() } else { offered };
        device.set_features(chosen);
        device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        for queue in 0..QUEUES as u64 {
            let most = device.select(queue);
            let size = self.random.of(&[0, 3, 7, most, most + 1, most * 2, 1, 0xffff, 0x8000]);
            let area = area(queue);
            let mut place = |usual: u64| match self.random.below(10) {
                0 => area + 1,
                1 => area,
                2 => self.end - 8,
                3 => self.end,
                4 => 0xd000_0000,
                5 => 1 << 40,
                6 => 0u64.wrapping_sub(16),
                _ => usual,
            };
            let places = (place(area), place(area + AVAILABLE), place(area + USED));
            device.set_queue(size, places.0, places.1, places.2);
            self.queues[queue as usize] = Queue { size: size.clamp(1, 256), available: 0 };
        }
        device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        // Too late for either.
        device.set_features(self.random.next());
        device.select(self.random.below(4));
        device.set_queue(self.random.value(), self.random.value(), self.end, SCRATCH);
    }

    /// Notified before it is ready, status bits in any order.
    pub fn start_out_of_order(&mut self) {
        let device = self.device;
        for _ in 0..8 {
            match self.random.below(4) {
                0 => device.set_status(self.random.below(256)),
                1 => device.notify(self.random.below(QUEUES as u64)),
                2 => device.set_features(self.random.value()),
                _ => {
                    let queue = self.random.value() & 0xffff;
                    let most = device.select(queue);
                    let area = area(queue);
                    device.set_queue(most, area, area + AVAILABLE, area + USED);
                    self.queues[(queue % QUEUES as u64) as usize] =
                        Queue { size: most.clamp(1, 256), available: 0 };
                }
            }
        }
    }

    /// Whether to do something wrong that is done once in so many times.
    fn wrong(&mut self, times: u64) -> bool {
        self.random.once_in(times * self.calm)
    }

    /// A few chains, more or less right, in one queue.
    pub fn send(&mut self, counts: &mut Counts) {
        let number = self.random.below(QUEUES as u64);
        let queue = self.queues[number as usize];
        if queue.size == 0 {
            self.device.notify(number);
            return;
        }
        let area = area(number);
        let mut available = queue.available;
        for _ in 0..=self.random.below(4) {
            let head = self.chain(area, queue.size);
            write(area + AVAILABLE + 4 + 2 * (available % queue.size), 2, head);
            available += 1;
            counts.chains += 1;
        }
        if self.wrong(24) {
            // Jumps, or goes back.
            available = available.wrapping_add(self.random.value());
        }
        let ring = area + AVAILABLE;
        // Interrupts suppressed or not; the used event anywhere.
        write(ring, 2, self.random.below(2));
        write(ring + 4 + 2 * queue.size, 2, self.random.value());
        write(ring + 2, 2, available);
        self.device.notify(number);
        if self.wrong(8) {
            // Changing while it is read.
            for _ in 0..8 {
                write(ring + 2, 2, self.random.next());
                let at = self.random_index(queue.size);
                self.descriptor(area, at, queue.size);
            }
            self.device.notify(number);
        }
        self.queues[number as usize].available = available & 0xffff;
    }

    fn random_index(&mut self, size: u64) -> u64 {
        self.random.below(size)
    }

    /// A chain that begins with what the device understands, and its head.
    fn chain(&mut self, area: u64, size: u64) -> u64 {
        let head = self.random_index(size);
        let length = 1 + self.random.below(5);
        let table = if self.random.once_in(5) { Some(self.table(area, length)) } else { None };
        let place = area + BUFFERS + 0x1000 * self.random.below(64);
        let written = self.message(place);
        if let Some(flags) = table {
            let wrong = [0, 15, 16 * length + 1, 1 << 20];
            let bytes = if self.wrong(2) { self.random.of(&wrong) } else { 16 * length };
            let at = if self.wrong(8) { self.place() } else { area + TABLES };
            set_descriptor(area + 16 * head, at, bytes, flags, self.random.below(size));
            return head;
        }
        for index in 0..length {
            let at = (head + index) % size;
            let more = if index + 1 < length { NEXT } else { 0 };
            let next = (at + 1) % size;
            match index {
                0 if !self.wrong(6) => {
                    set_descriptor(area + 16 * at, place, written, more, next);
                }
                _ if self.wrong(8) => self.descriptor(area, at, size),
                _ => {
                    let buffer = area + BUFFERS + self.random.below(BUFFERS_SIZE);
                    let bytes = self.random.of(&[1, 4, 16, 512, 4096, 1526, 65562]);
                    let flags = if self.wrong(5) { 0 } else { WRITABLE };
                    set_descriptor(area + 16 * at, buffer, bytes, flags | more, next);
                }
            }
        }
        if self.wrong(30) { self.random.value() } else { head }
    }

    /// An indirect table; the flags of the descriptor that names it.
    fn table(&mut self, area: u64, length: u64) -> u64 {
        for index in 0..length {
            let more = if index + 1 < length { NEXT } else { 0 };
            let wrong = if self.wrong(6) { INDIRECT } else { 0 };
            let at = if self.wrong(6) { self.place() } else { area + BUFFERS };
            let flags = more | wrong | if index > 0 { WRITABLE } else { 0 };
            set_descriptor(area + TABLES + 16 * index, at, 512, flags, index + 1);
        }
        INDIRECT | if self.wrong(4) { self.random.of(&[NEXT, WRITABLE]) } else { 0 }
    }

    /// A descriptor with nothing right about it.
    fn descriptor(&mut self, area: u64, at: u64, size: u64) {
        let place = self.place();
        let lengths = [0, 1, 4096, 0xffff_ffff, 0x8000_0000, 1 << 24];
        // A balloon takes pages away: none but those that it finds where it is led to.
        let known = if self.device.kind == BALLOON && place < self.end { 3 } else { lengths.len() };
        let length = self.random.of(&lengths[..known]);
        let next = self.random.of(&[at, 0, size, 0xffff, (at + 1) % size]);
        set_descriptor(area + 16 * at, place, length, self.random.below(8), next);
    }

    fn place(&mut self) -> u64 {
        elsewhere(self.device.kind, self.end, self.random)
    }

    /// Writes a request of the device's kind, and tells its length.
    fn message(&mut self, at: u64) -> u64 {
        let mut bytes = [0u8; 64];
        for byte in &mut bytes {
            *byte = self.random.next() as u8;
        }
        let mut put = |offset: usize, size: usize, value: u64| {
            bytes[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
        };
        let random = &mut *self.random;
        let length = match self.device.kind {
            // Network: header and a frame.
            1 => {
                put(0, 1, random.of(&[0, 1, 2, 7, 255]));
                put(1, 1, random.of(&[0, 1, 3, 4, 5, 0x80, 255]));
                for offset in [2, 4, 6, 8] {
                    let value = random.value();
                    put(offset, 2, value);
                }
                put(12 + 12, 2, random.of(&[0x0008, 0x0608, 0xdd86, 0xffff]));
                random.of(&[0, 1, 11, 12, 13, 64, 64, 1526, 9000, 65562, 70000])
            }
            // Block: type and sector.
            2 => {
                put(0, 4, random.of(&[0, 0, 1, 1, 4, 8, 11, 13, 14, 0x8000_0000, 0xffff_ffff]));
                let value = random.value();
                put(8, 8, random.of(&[0, 1, 7, 2047, 2048, 1 << 55, u64::MAX, value]));
                random.of(&[16, 16, 16, 15, 17, 64])
            }
            // Entropy has no requests.
            4 => 64,
            // Balloon: numbers of pages, none of them this program's.
            BALLOON => {
                for offset in (0..64).step_by(4) {
                    let inside = (SCRATCH >> 12) + random.below(0x4000);
                    put(offset, 4, random.of(&[inside, inside, 0xffff_ffff, 0xd_0000, 0x10_0000]));
                }
                random.of(&[4, 64, 3, 0, 1024, 4096])
            }
            // Socket: a header (virtio 1.2, 5.10.6).
            19 => {
                put(0, 8, random.of(&[3, 3, 3, 2, 0, u64::MAX]));
                put(8, 8, random.of(&[2, 2, 2, 3, u64::MAX]));
                let ports = [random.below(64), random.of(&[1024, 1024, 5000, 0, 0xffff_ffff])];
                put(16, 4, ports[0]);
                put(20, 4, ports[1]);
                put(24, 4, random.of(&[0, 0, 20, 1 << 16, 0xffff_ffff]));
                put(28, 2, random.of(&[1, 1, 1, 2, 0]));
                put(30, 2, random.below(10));
                put(32, 4, random.below(8));
                put(36, 4, random.of(&[0, 1, 1 << 18, 0xffff_ffff]));
                let value = random.value();
                put(40, 4, value);
                random.of(&[44, 44, 44, 43, 64])
            }
            // Memory: type, address, blocks.
            24 => {
                put(0, 2, random.below(5));
                let value = random.value();
                put(8, 8, random.of(&[1 << 32, (1 << 32) + (2 << 20), 0, u64::MAX - 1, value]));
                put(16, 2, random.of(&[1, 64, 0, 0xffff]));
                random.of(&[24, 24, 8, 64])
            }
            // Persistent memory: a flush, or another.
            27 => {
                put(0, 4, random.of(&[0, 0, 1]));
                random.of(&[4, 4, 3, 8])
            }
            _ => random.of(&[1, 8, 64, 4096]),
        };
        if self.device.kind == BALLOON || !self.wrong(6) {
            fill(at, &bytes);
        }
        length
    }

    /// What devices have put into used rings of this driver's queues.
    pub fn used(&self) -> u64 {
        let rings = (0..QUEUES as u64).filter(|queue| self.queues[*queue as usize].size > 0);
        rings.map(|queue| read(area(queue) + USED + 2, 2) & 0xfff).sum()
    }

    /// Garbage in the device's own configuration.
    pub fn configure(&mut self) {
        for _ in 0..16 {
            let at = self.device.configuration() + self.random.below(0x100);
            let size = self.random.of(&[1, 2, 4, 8]);
            if self.random.once_in(2) {
                read(at, size);
            } else {
                write(at, size, self.random.value());
            }
        }
    }

    /// Fails where the device writes after its reset read back.
    pub fn stays_away(&self) {
        let sum = || {
            let rings = (0..QUEUES as u64).map(|queue| area(queue) + USED + 2);
            rings.fold(0u64, |sum, at| sum.wrapping_mul(31).wrapping_add(read(at, 2)))
        };
        let before = sum();
        for _ in 0..20 {
            self.device.status();
        }
        assert_eq!(before, sum(), "a device of type {} writes after its reset", self.device.kind);
    }
}

/// Rings and buffers of a queue.
pub fn area(queue: u64) -> u64 {
    SCRATCH + AREA * (queue % QUEUES as u64)
}

/// An address where no buffer of a device of this kind should be. Never of this program's own: what a
/// device writes there would be an attack on the attacker.
pub fn elsewhere(kind: u64, end: u64, random: &mut Random) -> u64 {
    match random.below(10) {
        0 => 0xc000_0000 + random.below(0x4000_0000),
        1 => end - 1 - random.below(16),
        2 => end,
        3 => 1 << (36 + random.below(27)),
        4 => 0u64.wrapping_sub(1 + random.below(4096)),
        5 => 0xd000_0000,
        _ if kind == BALLOON => {
            area(random.below(QUEUES as u64)) + BUFFERS + random.below(BUFFERS_SIZE)
        }
        // Its own rings.
        6 => SCRATCH,
        7 => SCRATCH + USED,
        _ => SCRATCH + random.below(end - SCRATCH),
    }
}

/// Fills all buffers with numbers of pages that are scratch memory's or none at all, also to who reads
/// them in the middle of one: else a balloon would take away this program's own.
pub fn lead_astray() {
    for queue in 0..QUEUES as u64 {
        let buffers = SCRATCH + AREA * queue + BUFFERS;
        for offset in (0..AREA - BUFFERS).step_by(8) {
            write(buffers + offset, 8, 0x1234_0000_1234);
        }
    }
}

fn set_descriptor(at: u64, address: u64, length: u64, flags: u64, next: u64) {
    write(at, 8, address);
    write(at + 8, 4, length);
    write(at + 12, 2, flags);
    write(at + 14, 2, next);
}
