//! The 16550 serial port, for early messages.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use telemetry::Readings;
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Raises the port's interrupt.
pub struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells when the guest has read all of its input.
struct Room(EventFd);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        let _ = self.0.write(1);
    }
}

telemetry::metrics! {
    /// What was done with a serial port.
    pub struct SerialMetrics("uart", Counter) {
        /// Accesses that failed, and input that was lost.
        error_count,
        /// Reads that are not of one byte.
        missed_read_count,
        /// Writes that are not of one byte.
        missed_write_count,
        /// Bytes read from its registers.
        read_count,
        /// Bytes written to its registers.
        write_count,
    }
}

/// A serial port that writes what it is sent to `output`. What cannot be written is lost: a guest's
/// messages must not stop the guest.
pub struct SerialPort {
    port: Serial<Line, Room, Lossy>,
    interrupt: EventFd,
    room: EventFd,
    metrics: SerialMetrics,
}

/// The port's registers and the input that the guest has not read, for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialPortState {
    registers: [u8; 9],
    input: Vec<u8>,
}

impl From<SerialState> for SerialPortState {
    fn from(state: SerialState) -> SerialPortState {
        SerialPortState {
            registers: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            input: state.in_buffer,
        }
    }
}

impl From<&SerialPortState> for SerialState {
    fn from(state: &SerialPortState) -> SerialState {
        let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] =
            state.registers;
        SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: state.input.clone(),
        }
    }
}

/// A writer that never fails.
struct Lossy(Box<dyn Write + Send>);

impl Write for Lossy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.0.flush();
        Ok(())
    }
}

impl SerialPort {
    /// A port with nothing connected to its input yet.
    pub fn new(output: impl Write + Send + 'static) -> io::Result<SerialPort> {
        SerialPort::restore(output, &SerialPortState::from(SerialState::default()))
    }

    /// The port that was saved, with another output.
    pub fn restore(
        output: impl Write + Send + 'static,
        state: &SerialPortState,
    ) -> io::Result<SerialPort> {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let room = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let line = Line(interrupt.try_clone()?);
        let events = Room(room.try_clone()?);
        let port = Serial::from_state(&state.into(), line, events, Lossy(Box::new(output)))
            .map_err(|error| io::Error::other(format!("{error:?}")))?;
        Ok(SerialPort { port, interrupt, room, metrics: SerialMetrics::default() })
    }

    /// What goes into a snapshot.
    pub fn save(&self) -> SerialPortState {
        self.port.state().into()
    }

    /// Written when the port interrupts: to be made an irqfd.
    pub fn interrupt_event(&self) -> &EventFd {
        &self.interrupt
    }

    /// Written when the guest has read all input, so that there is room for more.
    pub fn room_event(&self) -> &EventFd {
        &self.room
    }

    /// How many bytes of input there is room for.
    pub fn input_capacity(&self) -> usize {
        self.port.fifo_capacity()
    }

    /// Gives the guest bytes to read, as many as there is room for.
    pub fn input(&mut self, bytes: &[u8]) {
        let fits = bytes.len().min(self.input_capacity());
        if self.port.enqueue_raw_bytes(&bytes[..fits]).is_err() {
            self.metrics.error_count += 1;
            tracing::debug!("serial input lost");
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data {
            *byte = self.port.read(offset as u8);
            self.metrics.read_count += 1;
        } else {
            self.metrics.missed_read_count += 1;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let [byte] = data else {
            self.metrics.missed_write_count += 1;
            return;
        };
        self.metrics.write_count += 1;
        if let Err(error) = self.port.write(offset as u8, *byte) {
            self.metrics.error_count += 1;
            tracing::debug!(?error, "serial port");
        }
    }

    fn metrics(&self) -> Option<Readings> {
        Some(self.metrics.readings())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_waits_for_room_and_room_is_told_once_all_is_read() {
        let mut port = SerialPort::new(io::sink()).unwrap();
        let sent: Vec<u8> = (0..=255).collect();
        let fits = port.input_capacity();
        port.input(&sent);
        assert_eq!(port.input_capacity(), 0);
        let mut byte = [0];
        for expected in &sent[..fits] {
            assert!(port.room_event().read().is_err(), "room told before all was read");
            port.read(0, &mut byte);
            assert_eq!(byte, [*expected]);
        }
        assert_eq!(port.room_event().read().unwrap(), 1);
        assert_eq!(port.input_capacity(), fits);
    }

    #[test]
    fn a_restored_port_has_the_registers_and_the_input_of_the_other() {
        let mut port = SerialPort::new(io::sink()).unwrap();
        port.write(7, &[0x5a]);
        port.input(b"not read yet");
        let state = port.save();
        let mut other = SerialPort::restore(io::sink(), &state).unwrap();
        let mut byte = [0];
        other.read(7, &mut byte);
        assert_eq!(byte, [0x5a]);
        other.read(0, &mut byte);
        assert_eq!(byte, *b"n");
        let state = SerialPortState { input: vec![0; 1 << 20], ..state };
        assert!(SerialPort::restore(io::sink(), &state).is_err());
    }

    /// docs/hostile.md 14: every register with every value and size.
    #[test]
    fn hostile_14_hammered_registers_do_not_panic() {
        let mut port = SerialPort::new(io::sink()).unwrap();
        for offset in 0..8 {
            for value in 0..=255u8 {
                for size in [1, 2, 4, 8] {
                    port.write(offset, &vec![value; size]);
                    port.read(offset, &mut vec![0; size]);
                }
            }
        }
        assert!(port.input_capacity() > 0);
    }
}
