//! Ways for a guest to end: ACPI's sleep and reset registers, and what other devices ask for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// Soft off.
    Off,
    /// Reset.
    Reset,
}

/// Where a request is left, and an eventfd that tells of it.
pub struct PowerSwitch {
    request: AtomicU8,
    event: EventFd,
}

impl PowerSwitch {
    /// A switch that nobody has touched.
    pub fn new() -> io::Result<Arc<PowerSwitch>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Arc::new(PowerSwitch { request: AtomicU8::new(0), event }))
    }

    /// Readable once something was asked for.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The first request made, if any.
    pub fn request(&self) -> Option<PowerRequest> {
        match self.request.load(Ordering::SeqCst) {
            1 => Some(PowerRequest::Off),
            2 => Some(PowerRequest::Reset),
            _ => None,
        }
    }

    /// Leaves a request, if it is the first one.
    pub(super) fn ask(&self, request: PowerRequest) {
        let value = match request {
            PowerRequest::Off => 1,
            PowerRequest::Reset => 2,
        };
        // The first one counts.
        let first = self.request.compare_exchange(0, value, Ordering::SeqCst, Ordering::SeqCst);
        if first.is_ok() {
            let _ = self.event.write(1);
        }
    }
}

/// ACPI's registers (ACPI 6.5, 4.8.3.7): sleep control, sleep status, reset; a byte each.
pub struct AcpiPower {
    switch: Arc<PowerSwitch>,
    sleep_type_off: u8,
    reset_value: u8,
}

impl AcpiPower {
    /// Registers that understand this sleep type as off and this value as reset.
    pub fn new(switch: Arc<PowerSwitch>, sleep_type_off: u8, reset_value: u8) -> AcpiPower {
        AcpiPower { switch, sleep_type_off, reset_value }
    }
}

impl BusDevice for AcpiPower {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Awake.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        const SLEEP_ENABLE: u8 = 1 << 5;
        let [value] = data else { return };
        let sleep_type = (value >> 2) & 7;
        match offset {
            0 if value & SLEEP_ENABLE != 0 && sleep_type == self.sleep_type_off => {
                self.switch.ask(PowerRequest::Off);
            }
            2 if *value == self.reset_value => self.switch.ask(PowerRequest::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// docs/hostile.md 14: registers hammered with anything but the right value do nothing.
    #[test]
    fn hostile_14_only_the_right_value_ends_the_guest() {
        let switch = PowerSwitch::new().unwrap();
        let mut power = AcpiPower::new(switch.clone(), 5, 1);
        for value in 0..=255u8 {
            for offset in 0..5 {
                if (offset, value) != (2, 1) && !(offset == 0 && value & 0x3c == 0x34) {
                    power.write(offset, &[value]);
                }
            }
        }
        power.write(2, &[1, 0]);
        assert_eq!(switch.request(), None);
        power.write(0, &[0x34]);
        power.write(2, &[1]);
        assert_eq!(switch.request(), Some(PowerRequest::Off));
        assert_eq!(switch.event().read().unwrap(), 1);
    }
}
