//! Garbage in registers: docs/hostile.md 9 and 14.

use crate::Orders;
use crate::machine::{MAPPED, SCRATCH, read, say, write, write_vector};
use crate::random::Random;
use crate::transport::{ECAM, ECAM_SIZE, MOST, WINDOW, WINDOWS, devices};

/// The window of BARs below 4 GiB.
pub const BARS: u64 = 0xe100_0000;
pub const BARS_SIZE: u64 = 0xf00_0000;

/// Accesses of all sizes, aligned and not, in all windows, across their ends and beside them.
pub fn attack(orders: &Orders<'_>, random: &mut Random) {
    let (found, count) = devices(orders.pci);
    say(format_args!("{count} devices"));
    let (mut sum, mut places) = (0u64, 0u64);
    for _ in 0..orders.rounds {
        let device = random.of(&found[..count.max(1)]);
        let (start, end) = device.window();
        let address = match random.below(if orders.pci { 8 } else { 5 }) {
            // Where registers are, most of all.
            0..=1 => start + random.below(0x110),
            2 => start + random.below(end - start),
            3 => end - random.below(16),
            4 => elsewhere(orders, random),
            5..=6 => ECAM + random.below(40) * 0x1000 + random.below(256),
            _ => ECAM + random.below(ECAM_SIZE + 16),
        };
        let size = random.of(&[1, 2, 4, 8]);
        match random.below(5) {
            0..=1 => sum = sum.wrapping_add(read(address, size)),
            2 => write_vector(address),
            _ => {
                let value = random.value();
                // Ends of BARs are put onto RAM, each other, and everywhere.
                let onto = [value, SCRATCH, start, ECAM, 0xfee0_0000, 0xffff_ffff, 0];
                write(address, size, random.of(&onto));
            }
        }
        places ^= address;
    }
    say(format_args!("sum {sum:#x} of places {places:#x}"));
}

/// Addresses where there is nothing, or another kind of thing.
fn elsewhere(orders: &Orders<'_>, random: &mut Random) -> u64 {
    match random.below(7) {
        0 => WINDOWS - 1 - random.below(16),
        1 => WINDOWS + WINDOW * MOST as u64 + random.below(0x1000),
        2 => orders.end.max(0xc000_0000) + random.below(1 << 20),
        3 => BARS + random.below(BARS_SIZE),
        4 => 0xcfff_f000 + random.below(0x1008),
        // Above all memory.
        5 => MAPPED - 16 - random.below(1 << 32),
        _ => 0xfed0_0000 + random.below(0x1_0000),
    }
}

/// Garbage over the tables that firmware would have made.
pub fn firmware(random: &mut Random) {
    let mut landed = 0;
    for address in (0xe_0000..0x10_0000).step_by(8) {
        let value = random.next();
        write(address, 8, value);
        landed += u64::from(read(address, 8) == value);
    }
    say(format_args!("{landed} words of tables"));
}
