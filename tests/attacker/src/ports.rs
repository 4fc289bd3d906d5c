//! Ports and model-specific registers: docs/hostile.md 14.

use crate::Orders;
use crate::machine::{
    SCRATCH, fault_count, fill, msr_read, msr_write, port_read, port_write, port_write_string, say,
};
use crate::random::Random;

/// Of the keyboard controller, whose commands can end the machine, and ACPI's, which can too.
const COMMANDS: u16 = 0x64;
const POWER: core::ops::Range<u16> = 0x600..0x603;
/// The serial port, whose output is this program's voice.
const SERIAL: core::ops::Range<u16> = 0x3f8..0x400;

/// Every port by every width; then those with devices again and again.
pub fn attack(random: &mut Random) {
    let mut sum = 0u32;
    let mut hammer = |port: u16, random: &mut Random| {
        for size in [1, 2, 4] {
            sum = sum.wrapping_add(port_read(port, size));
            if port == COMMANDS || POWER.contains(&port) || SERIAL.contains(&port) {
                continue;
            }
            port_write(port, size, random.value() as u32);
        }
    };
    for port in 0..=u16::MAX {
        // All of those where a PC has something, and of the rest each 16th.
        if port < 0x1000 || port % 16 == 0 || port > 0xfff0 {
            hammer(port, random);
        }
    }
    for _ in 0..2000 {
        hammer(
            random.of(&[0x60, 0x61, 0x62, 0x63, 0x70, 0x71, 0x80, 0x620, 0x62b, 0xcf8, 0xcfc]),
            random,
        );
    }
    // All commands of the keyboard controller but the resets (0xf0 and up with bit 0 clear), each
    // with bytes for it; wide and at its ends.
    for command in 0..=0xffu32 {
        if command < 0xf0 || command & 1 == 1 {
            port_write(COMMANDS, 1, command);
            // Of 0xd1, the output port, whose bit 0 is the reset line: 1 does nothing.
            port_write(0x60, 1, random.value() as u32 | 1);
        }
    }
    for size in [2, 4] {
        port_write(COMMANDS, size, 0xfefe_fefe);
        port_write(POWER.start, size, 0);
    }
    for port in POWER {
        // Not a sleep (bit 5), nor the reset value.
        port_write(port, 1, 0x80);
    }
    // The serial port: what it is told to be, but not what it is told to say.
    for register in SERIAL.start + 1..SERIAL.end {
        for _ in 0..64 {
            port_write(register, 1, random.value() as u32);
            sum = sum.wrapping_add(port_read(SERIAL.start, 1));
        }
    }
    // No loopback, no divisor.
    port_write(SERIAL.start + 3, 1, 3);
    port_write(SERIAL.start + 4, 1, 8);
    fill(SCRATCH, &[b'.'; 4096]);
    port_write_string(SERIAL.start, 4096);
    port_write_string(0x80, 4096);
    say(format_args!("\nsum {sum:#x}"));
}

/// Registers that are there and such that are not, with garbage in them. Left out are those on which
/// this program stands, and time.
pub fn model_specific(orders: &Orders<'_>, random: &mut Random) {
    const EFER: u32 = 0xc000_0080;
    // KVM's own, which hold addresses to write to: `MSR_KVM_WALL_CLOCK_NEW` and on, and the old ones.
    const KVM: core::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4d08;
    let mut sum = 0u64;
    for round in 0..orders.rounds {
        let index = match random.below(6) {
            0 => 0xc000_0000 + random.below(0x200) as u32,
            1 => 0xc001_0000 + random.below(0x200) as u32,
            2 => 0x4b56_4d00 + random.below(16) as u32,
            3 => 0x4000_0000 + random.below(0x110) as u32,
            4 => random.next() as u32,
            _ => random.below(0xc00) as u32,
        };
        sum = sum.wrapping_add(msr_read(index));
        let value = match index {
            EFER | 0x17b | 0x200..=0x2ff => continue,
            0x11 | 0x12 => continue,
            _ if KVM.contains(&index) => {
                let beyond = [orders.end, 0xd000_0000, 0xfee0_0000, 1 << 40, u64::MAX << 12];
                let place = if random.once_in(2) {
                    SCRATCH + 0x1000 * (round % 16)
                } else {
                    random.of(&beyond)
                };
                place | random.below(64)
            }
            // The local APIC: nobody interrupts here. Its end would be that of x2APIC accesses.
            0x1b | 0x800..=0x8ff => continue,
            _ => random.value(),
        };
        msr_write(index, value);
    }
    say(format_args!("sum {sum:#x}, {} faults", fault_count()));
}

/// The reset by the keyboard controller.
pub fn reset() {
    port_write(COMMANDS, 1, 0xfe);
}

/// ACPI's sleep register: enable, type 5.
pub fn switch_off() {
    port_write(POWER.start, 1, 0x34);
}
