//! Ports of a PC's legacy devices, at which a guest may write anything.

use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use arbitrary::Unstructured;
use devices::bus::Bus;
use devices::legacy::i8042::I8042;
use devices::legacy::power::{AcpiPower, PowerSwitch};
use devices::legacy::serial::{SerialPort, SerialPortState};

const SERIAL: u64 = 0x3f8;
const KEYBOARD: u64 = 0x60;
const POWER: u64 = 0x600;
const SLEEP_TYPE: u8 = 5;
const RESET: u8 = 6;

/// Accesses of ports, and input for the serial port. Only what means the end is one; the serial port
/// writes no more bytes than it was given, and its state survives a snapshot.
pub fn legacy_ports(input: &[u8]) {
    let _ = run(&mut Unstructured::new(input));
}

/// Counts what is written.
struct Counter(Arc<AtomicUsize>);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.fetch_add(bytes.len(), Ordering::SeqCst);
        // Something that cannot be written must not matter.
        if bytes.first().is_some_and(|byte| *byte == 0xff) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let written = Arc::new(AtomicUsize::new(0));
    let switch = PowerSwitch::new().unwrap();
    let mut serial = Arc::new(Mutex::new(SerialPort::new(Counter(written.clone())).unwrap()));
    let keyboard = Arc::new(Mutex::new(I8042::new(switch.clone()).unwrap()));
    let power = Arc::new(Mutex::new(AcpiPower::new(switch.clone(), SLEEP_TYPE, RESET)));
    let bus_with = |serial: &Arc<Mutex<SerialPort>>| {
        let mut bus = Bus::default();
        bus.insert(SERIAL, 8, serial.clone()).unwrap();
        bus.insert(KEYBOARD, 5, keyboard.clone()).unwrap();
        bus.insert(POWER, 3, power.clone()).unwrap();
        bus
    };
    let mut bus = bus_with(&serial);
    let (mut sent, mut may_end, mut output_port) = (0, false, false);
    while !input.is_empty() {
        match input.arbitrary::<u8>()? % 8 {
            0..=2 => {
                let (device, offset, size): (u8, u8, u8) = input.arbitrary()?;
                let data: [u8; 8] = input.arbitrary()?;
                let data = &data[..usize::from(size % 9)];
                let address = port(device, offset);
                sent += usize::from(address == SERIAL && data.len() == 1);
                output_port |= address == KEYBOARD + 4 && data.first() == Some(&0xd1);
                // What these devices are there for.
                may_end |= match address {
                    POWER => data.first().is_some_and(|byte| byte & 0x3c == 0x20 | SLEEP_TYPE << 2),
                    address if address == POWER + 2 => data.first() == Some(&RESET),
                    address if address == KEYBOARD + 4 => data.first() == Some(&0xfe),
                    // The output port's lowest bit is the reset line.
                    KEYBOARD => output_port && data.first().is_some_and(|byte| byte & 1 == 0),
                    _ => false,
                };
                bus.write(address, data);
            }
            3 | 4 => {
                let (device, offset, size): (u8, u8, u8) = input.arbitrary()?;
                bus.read(port(device, offset), &mut [0; 8][..usize::from(size % 9)]);
            }
            5 => {
                let count: u8 = input.arbitrary()?;
                let mut port = serial.lock().unwrap();
                port.input(&vec![count; count.into()]);
                assert!(port.input_capacity() <= 64);
                drop(port);
                let mut keyboard = keyboard.lock().unwrap();
                // Full of what the guest does not read, it refuses.
                let _ = keyboard.press_ctrl_alt_del();
                let state = keyboard.save();
                assert!(keyboard.restore(&state).is_ok() && keyboard.save() == state);
            }
            6 => {
                let state = serial.lock().unwrap().save();
                let bytes = rmp_serde::to_vec_named(&state).unwrap();
                let state: SerialPortState = rmp_serde::from_slice(&bytes).unwrap();
                let restored = SerialPort::restore(Counter(written.clone()), &state).unwrap();
                assert_eq!(restored.save(), state);
                serial = Arc::new(Mutex::new(restored));
                bus = bus_with(&serial);
            }
            // A state that somebody has made.
            _ => {
                let count = usize::from(input.arbitrary::<u8>()?).min(input.len());
                let Ok(state) = rmp_serde::from_slice(input.bytes(count)?) else { continue };
                let Ok(made) = SerialPort::restore(Counter(written.clone()), &state) else {
                    continue;
                };
                serial = Arc::new(Mutex::new(made));
                bus = bus_with(&serial);
            }
        }
        assert!(may_end || switch.request().is_none(), "a guest ended without asking");
        assert!(written.load(Ordering::SeqCst) <= sent);
        let _ = serial.lock().unwrap().interrupt_event().read();
    }
    Ok(())
}

/// A port of a device, or one near it.
fn port(device: u8, offset: u8) -> u64 {
    [SERIAL, KEYBOARD, POWER, 0][usize::from(device % 4)] + u64::from(offset % 12)
}
