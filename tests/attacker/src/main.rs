//! A guest that attacks its monitor, in one of the ways that its command line names:
//! `attack=NAME seed=N rounds=N [pci] [second]`. What it says on the serial port ends with `attack over`; then
//! the processor halts for ever, unless the attack is how to end.

#![no_std]
#![no_main]

mod bars;
mod driver;
mod machine;
mod ports;
mod queues;
mod random;
mod registers;
mod second;
mod transport;

use machine::{read, say};
use random::Random;

/// What the command line says.
struct Orders<'a> {
    attack: &'a [u8],
    seed: u64,
    rounds: u64,
    pci: bool,
    /// There is a second processor.
    second: bool,
    /// First address past the memory below the hole.
    end: u64,
}

/// Entered from `boot.s` with the start info of PVH.
#[unsafe(no_mangle)]
extern "C" fn main(start_info: u64) -> ! {
    machine::catch_faults();
    let mut line = [0; 512];
    let orders = orders(start_info, &mut line);
    let random = &mut Random::new(orders.seed);
    match orders.attack {
        b"registers" => registers::attack(&orders, random),
        b"queues" => queues::attack(&orders, random),
        b"together" => queues::together(&orders, random),
        b"flood" => queues::flood(&orders, random),
        b"storm" => queues::storm(&orders),
        b"bars" => bars::attack(&orders, random),
        b"ports" => ports::attack(random),
        b"msrs" => ports::model_specific(&orders, random),
        b"tables" => registers::firmware(random),
        b"reset" => ports::reset(),
        b"off" => ports::switch_off(),
        b"triple" => machine::triple_fault(),
        b"spin" => {
            say(format_args!("attack over"));
            loop {
                core::hint::spin_loop();
            }
        }
        b"halt" => {}
        _ => panic!("no such attack"),
    }
    say(format_args!("attack over"));
    machine::halt()
}

/// Reads the command line (Xen's `struct hvm_start_info`).
fn orders(start_info: u64, line: &mut [u8; 512]) -> Orders<'_> {
    let text = read(start_info + 24, 8);
    let mut length = 0;
    while length < line.len() {
        let byte = read(text + length as u64, 1) as u8;
        if byte == 0 {
            break;
        }
        line[length] = byte;
        length += 1;
    }
    let (map, entries) = (read(start_info + 40, 8), read(start_info + 48, 4));
    let ends = (0..entries)
        .map(|index| read(map + 24 * index, 8) + read(map + 24 * index + 8, 8))
        .filter(|end| *end <= 0xc000_0000);
    let mut orders = Orders {
        attack: b"",
        seed: 1,
        rounds: 1,
        pci: false,
        second: false,
        end: ends.max().unwrap_or(machine::SCRATCH),
    };
    for word in line[..length].split(|byte| *byte == b' ') {
        let number = |text: &[u8]| {
            text.iter().fold(0u64, |sum, byte| sum * 10 + u64::from(byte.wrapping_sub(b'0') % 10))
        };
        match word {
            [b'a', b't', b't', b'a', b'c', b'k', b'=', name @ ..] => orders.attack = name,
            [b's', b'e', b'e', b'd', b'=', text @ ..] => orders.seed = number(text),
            [b'r', b'o', b'u', b'n', b'd', b's', b'=', text @ ..] => orders.rounds = number(text),
            b"pci" => orders.pci = true,
            b"second" => orders.second = true,
            _ => {}
        }
    }
    orders
}
