//! BARs where they should not be: docs/hostile.md 9.

use crate::Orders;
use crate::machine::{LOCAL_APIC, MAPPED, SCRATCH, read, say, write};
use crate::queues::serves;
use crate::random::Random;
use crate::registers::{BARS, BARS_SIZE};
use crate::transport::{Device, ECAM, WINDOWS, devices};

const IO_APIC: u64 = 0xfec0_0000;
/// Of all BARs here: they are aligned to it.
const SIZE: u64 = 0x8000;
/// What KVM keeps for itself on some processors begins in there.
const KVM_PAGES: u64 = 0xfffb_8000;

/// Each function's BAR over memory, over each other function's, over all that answers at an address
/// beside, and to the ends of what there is; then back. After each move what is there answers as before.
pub fn attack(orders: &Orders<'_>, random: &mut Random) {
    let (found, count) = devices(true);
    let found = &found[..count];
    let mut moves = 0;
    let ram = SCRATCH + (8 << 20);
    for offset in (0..SIZE).step_by(8) {
        write(ram + offset, 8, ram ^ offset);
    }
    let apics = (read(LOCAL_APIC + 0x30, 4), io_apic());
    for device in found {
        let (home, features) = (device.place(), device.features());
        let places = [
            ram,
            0,
            0x20_0000,
            orders.end - SIZE,
            orders.end,
            0xc000_0000,
            WINDOWS,
            ECAM,
            BARS - SIZE,
            BARS + BARS_SIZE - SIZE,
            BARS + BARS_SIZE,
            IO_APIC,
            LOCAL_APIC,
            KVM_PAGES,
            1 << 32,
            MAPPED - SIZE,
            // Where the window above all memory begins, and where addresses end.
            1 << 38,
            0u64.wrapping_sub(SIZE),
        ];
        let others = found.iter().map(Device::place).filter(|other| *other != home);
        for place in places.into_iter().chain(others) {
            device.set_place(place);
            moves += 1;
            use_all(found, place, random);
            // Memory is memory, and what KVM answers for itself it still does.
            for offset in (0..SIZE).step_by(0x408) {
                assert_eq!(read(ram + offset, 8), ram ^ offset, "a BAR in place of memory");
            }
            assert_eq!(apics, (read(LOCAL_APIC + 0x30, 4), io_apic()), "a BAR in place of an APIC");
            device.set_place(home);
            assert_eq!(device.place(), home);
            assert_eq!(device.features(), features, "a device of type {} is lost", device.kind);
        }
    }
    // Two in each other's place.
    for pair in found.windows(2) {
        let [(one, at), (other, there)] =
            [(&pair[0], pair[0].place()), (&pair[1], pair[1].place())];
        let features = (one.features(), other.features());
        one.set_place(there);
        other.set_place(at);
        moves += 2;
        assert_eq!((other.features(), one.features()), features, "two devices in a third place");
        other.set_place(there);
        one.set_place(at);
        assert_eq!((one.features(), other.features()), features, "two devices are lost");
    }
    let served = found.iter().filter(|device| serves(device, orders, random)).count();
    say(format_args!("{moves} moves, {served} of {count} devices serve"));
}

/// Reads, and notifications, where devices are and where one is now, unless that is no device's.
fn use_all(found: &[Device], place: u64, random: &mut Random) {
    let mut sum = 0u64;
    for device in found {
        sum = sum.wrapping_add(device.status());
        device.notify(random.below(4));
    }
    if (WINDOWS..ECAM).contains(&place) || (BARS..BARS + BARS_SIZE).contains(&place) {
        for _ in 0..16 {
            let (at, size) = (place + random.below(SIZE), random.of(&[1, 2, 4, 8]));
            sum = sum.wrapping_add(read(at, size));
        }
        write(place + random.below(SIZE), 4, sum);
    }
}

/// The I/O APIC's version, by its two registers.
fn io_apic() -> u64 {
    write(IO_APIC, 4, 1);
    read(IO_APIC + 0x10, 4)
}
