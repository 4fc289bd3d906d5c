//! The second processor: it writes what devices read, or notifies them, while the first one uses them
//! (docs/hostile.md 6 and 7).

use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::Orders;
use crate::driver::{AVAILABLE, BUFFERS, QUEUES, TABLES, USED, area, elsewhere};
use crate::machine::{self, write};
use crate::random::Random;
use crate::transport::devices;

/// What the second processor does.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Work {
    /// Nothing.
    Rest = 1,
    /// Writes requests and lengths: chains stay such as a device can follow.
    Requests = 2,
    /// Writes descriptors and indirect tables too.
    Descriptors = 3,
    /// Writes rings and indices too.
    Rings = 4,
    /// Notifies all devices.
    Storm = 5,
}

static WANTED: AtomicU64 = AtomicU64::new(Work::Rest as u64);
static DOING: AtomicU64 = AtomicU64::new(0);
/// Writes and notifications until now.
static DONE: AtomicU64 = AtomicU64::new(0);
static PCI: AtomicBool = AtomicBool::new(false);
/// First address past memory.
static END: AtomicU64 = AtomicU64::new(0);
/// Sizes of the queues of the device that is attacked.
static SIZES: [AtomicU64; QUEUES] = [const { AtomicU64::new(0) }; QUEUES];

/// Starts it, at rest.
pub fn start(orders: &Orders<'_>) {
    PCI.store(orders.pci, Ordering::SeqCst);
    END.store(orders.end, Ordering::SeqCst);
    machine::start_second_processor();
    order(Work::Rest);
}

/// Gives it something to do. Of what it did before it does nothing any more.
pub fn order(work: Work) {
    WANTED.store(work as u64, Ordering::SeqCst);
    while DOING.load(Ordering::SeqCst) != work as u64 {
        spin_loop();
    }
}

/// The queues that it writes to.
pub fn set_sizes(sizes: impl Iterator<Item = u64>) {
    for (known, size) in SIZES.iter().zip(sizes) {
        known.store(size, Ordering::SeqCst);
    }
}

/// Writes and notifications until now.
pub fn done() -> u64 {
    DONE.load(Ordering::SeqCst)
}

/// Entered from `boot.s`.
#[unsafe(no_mangle)]
extern "C" fn second() -> ! {
    let (found, count) = devices(PCI.load(Ordering::SeqCst));
    let random = &mut Random::new(2);
    loop {
        let work = WANTED.load(Ordering::SeqCst);
        DOING.store(work, Ordering::SeqCst);
        match work {
            work if work == Work::Storm as u64 => {
                for device in &found[..count] {
                    device.notify(random.below(4));
                }
                DONE.fetch_add(count as u64, Ordering::SeqCst);
            }
            work if work > Work::Rest as u64 => {
                for _ in 0..32 {
                    scribble(work, random);
                }
                DONE.fetch_add(32, Ordering::SeqCst);
            }
            _ => spin_loop(),
        }
    }
}

/// One write where a device may be reading.
fn scribble(work: u64, random: &mut Random) {
    let queue = random.below(QUEUES as u64);
    let size = SIZES[queue as usize].load(Ordering::SeqCst);
    if size == 0 {
        return;
    }
    let area = area(queue);
    let choices = match work {
        work if work == Work::Requests as u64 => 2,
        work if work == Work::Descriptors as u64 => 5,
        _ => 8,
    };
    match random.below(choices) {
        // A header: the driver's, or in its place.
        0 => {
            let at = area + BUFFERS + 0x1000 * random.below(64) + 4 * random.below(16);
            write(at, random.of(&[1, 2, 4, 8]), random.value());
        }
        // A length that is still inside memory.
        1 => write(area + 16 * random.below(size) + 8, 4, random.of(&[1, 15, 16, 512, 4096])),
        2..=3 => field(area + 16 * random.below(size), random),
        4 => field(area + TABLES + 16 * random.below(8), random),
        5 => {
            let head = if random.once_in(4) { random.value() } else { random.below(size) };
            write(area + AVAILABLE + 4 + 2 * random.below(size), 2, head);
        }
        // Rarely: the next look at the queue breaks it.
        6 if random.once_in(64) => write(area + AVAILABLE + 2, 2, random.value()),
        6 => write(area + AVAILABLE, 2, random.below(4)),
        // What the device wrote, and must not believe.
        _ => write(area + USED + 4 + 8 * random.below(size), 4, random.value()),
    }
}

/// A descriptor with another address, length, flags or next one than it had.
fn field(at: u64, random: &mut Random) {
    match random.below(4) {
        0 => write(at, 8, elsewhere(0, END.load(Ordering::SeqCst), random)),
        1 => write(at + 8, 4, random.of(&[0, 1, 4096, 0xffff_ffff, 0x8000_0000, 1 << 24])),
        2 => write(at + 12, 2, random.below(8)),
        _ => write(at + 14, 2, random.of(&[0, 1, 0xff, 0x100, 0xffff])),
    }
}
