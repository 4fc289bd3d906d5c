//! The 16550 serial port, for early messages.

use std::io::{self, Write};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
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

/// A serial port that writes what it is sent to `output`. What cannot be written is lost: a guest's
/// messages must not stop the guest.
pub struct SerialPort {
    port: Serial<Line, NoEvents, Lossy>,
    interrupt: EventFd,
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
    pub fn new(output: Box<dyn Write + Send>) -> io::Result<SerialPort> {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let port = Serial::new(Line(interrupt.try_clone()?), Lossy(output));
        Ok(SerialPort { port, interrupt })
    }

    /// Written when the port interrupts: to be made an irqfd.
    pub fn interrupt_event(&self) -> &EventFd {
        &self.interrupt
    }

    /// How many bytes of input there is room for.
    pub fn input_capacity(&self) -> usize {
        self.port.fifo_capacity()
    }

    /// Gives the guest bytes to read, as many as there is room for.
    pub fn input(&mut self, bytes: &[u8]) {
        let fits = bytes.len().min(self.input_capacity());
        if self.port.enqueue_raw_bytes(&bytes[..fits]).is_err() {
            tracing::debug!("serial input lost");
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data {
            *byte = self.port.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data
            && let Err(error) = self.port.write(offset as u8, *byte)
        {
            tracing::debug!(?error, "serial port");
        }
    }
}
