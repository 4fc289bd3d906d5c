//! Drivers that break every rule of virtqueues: docs/hostile.md 1 to 8, and 10 to 13 by what they send.

use crate::Orders;
use crate::driver::{BALLOON, BUFFERS, Driver, USED, WRITABLE, area, lead_astray};
use crate::machine::{fill, read, say};
use crate::random::Random;
use crate::second::{self, Work};
use crate::transport::{Device, NEEDS_RESET, devices};

/// Counts over one device.
#[derive(Default)]
pub struct Counts {
    /// Chains that were sent.
    pub chains: u64,
    used: u64,
    broken: u64,
}

impl Counts {
    fn tell(&self, device: &Device) {
        let Counts { chains, used, broken } = self;
        let kind = device.kind;
        say(format_args!("device {kind}: {chains} chains, {used} used, {broken} times broken"));
    }
}

/// Each device in turn: half of the times set up right and then lied to, half of the times set up
/// wrong.
pub fn attack(orders: &Orders<'_>, random: &mut Random) {
    let (found, count) = devices(orders.pci);
    say(format_args!("{count} devices"));
    for device in &found[..count] {
        let mut counts = Counts::default();
        if device.kind == BALLOON {
            lead_astray();
        }
        for round in 0..orders.rounds {
            let calm = if round % 4 == 0 { 50 } else { 2 };
            let mut driver = Driver::new(*device, random, orders, calm);
            match round % 4 {
                0..=1 => driver.start(),
                2 => driver.start_wrongly(),
                _ => driver.start_out_of_order(),
            }
            for _ in 0..16 {
                driver.send(&mut counts);
                if driver.device.status() & NEEDS_RESET != 0 {
                    counts.broken += 1;
                    break;
                }
            }
            counts.used += driver.used();
            driver.configure();
            // With requests in flight; nothing may be written after it reads back.
            driver.reset();
            driver.stays_away();
        }
        counts.tell(device);
    }
}

/// Each device set up right and used right by this processor, while the other one writes to its rings,
/// tables and buffers. Not the balloon, which would be told to take this program's memory away.
pub fn together(orders: &Orders<'_>, random: &mut Random) {
    let (found, count) = devices(orders.pci);
    second::start(orders);
    for device in found[..count].iter().filter(|device| device.kind != BALLOON) {
        let mut counts = Counts::default();
        for round in 0..orders.rounds {
            let mut driver = Driver::new(*device, random, orders, 50);
            driver.start();
            second::set_sizes(driver.queues.iter().map(|queue| queue.size));
            second::order(match round % 3 {
                0 => Work::Requests,
                1 => Work::Descriptors,
                _ => Work::Rings,
            });
            for _ in 0..16 {
                driver.send(&mut counts);
                if device.status() & NEEDS_RESET != 0 {
                    counts.broken += 1;
                    break;
                }
            }
            counts.used += driver.used();
            driver.reset();
            second::order(Work::Rest);
            driver.stays_away();
        }
        counts.tell(device);
    }
    say(format_args!("{} writes beside", second::done()));
}

/// Whether a device does what it is asked: the source of entropy gives some, and the others start.
pub fn serves(device: &Device, orders: &Orders<'_>, random: &mut Random) -> bool {
    const ENTROPY: u64 = 4;
    let mut driver = Driver::new(*device, random, orders, 1);
    driver.start();
    let mut served = device.status() & NEEDS_RESET == 0;
    if device.kind == ENTROPY {
        driver.buffer(0, area(0) + BUFFERS, 64, WRITABLE, 1);
        device.notify(0);
        let mut patience = 1_000_000;
        while driver.used() == 0 && patience > 0 {
            device.status();
            patience -= 1;
        }
        served &= patience > 0;
    }
    driver.reset();
    served
}

/// Notifications as fast as they can be made, of queues that are ready and such that are not there.
pub fn storm(orders: &Orders<'_>) {
    let (found, count) = devices(orders.pci);
    let mut random = Random::new(orders.seed);
    for device in &found[..count] {
        Driver::new(*device, &mut random, orders, 1).start();
    }
    if orders.second {
        second::start(orders);
        second::order(Work::Storm);
        say(format_args!("two processors notify"));
    }
    for round in 0..orders.rounds {
        let device = found[(round % count.max(1) as u64) as usize];
        device.notify(round / 16 % 4);
        if round % 64 == 0 {
            device.notify(random.value() & 0xffff);
        }
    }
    if orders.second {
        second::order(Work::Rest);
    }
    say(format_args!("{} notifications", orders.rounds + second::done()));
}

/// Well-formed, and more than anybody wants: frames of all sizes from all addresses, and connections
/// and data for ports with and without a listener.
pub fn flood(orders: &Orders<'_>, random: &mut Random) {
    const NET: u64 = 1;
    const SOCKET: u64 = 19;
    /// Where frames and packets go in, and come out (virtio 1.2, 5.1.2 and 5.10.2).
    const RECEIVE: u64 = 0;
    const TRANSMIT: u64 = 1;
    let (found, count) = devices(orders.pci);
    for device in found[..count].iter().filter(|device| [NET, SOCKET].contains(&device.kind)) {
        let mut driver = Driver::new(*device, random, orders, 1);
        driver.start();
        for round in 0..orders.rounds {
            let random = &mut *driver.random;
            let mut bytes = [0u8; 128];
            let mut put = |offset: usize, size: usize, value: u64| {
                bytes[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
            };
            let length = if device.kind == NET {
                // To all, from whoever.
                put(12, 6, u64::MAX);
                put(18, 6, random.next());
                put(24, 2, random.of(&[0x0008, 0x0608, 0x0081]));
                put(26, 8, random.next());
                random.of(&[26, 72, 128, 1526, 9012, 65562])
            } else {
                const REQUEST: u64 = 1;
                let operation = if round % 4 == 3 { 5 } else { REQUEST };
                put(0, 8, 3);
                put(8, 8, 2);
                put(16, 4, 1024 + round / 2);
                put(20, 4, random.of(&[5000, 5000, 5001]));
                put(28, 2, 1);
                put(30, 2, operation);
                put(36, 4, 1 << 16);
                if operation == REQUEST {
                    44
                } else {
                    put(24, 4, 4096);
                    44 + 4096
                }
            };
            let out = area(TRANSMIT) + BUFFERS;
            fill(out, &bytes);
            driver.buffer(TRANSMIT, out, length, 0, 200);
            driver.buffer(RECEIVE, area(RECEIVE) + BUFFERS, 65562, WRITABLE, 1);
            device.notify(RECEIVE);
            device.notify(TRANSMIT);
        }
        let sent = read(area(TRANSMIT) + USED + 2, 2);
        say(format_args!("device {}: {} sent, ring at {sent}", device.kind, orders.rounds));
    }
}
