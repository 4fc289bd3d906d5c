//! The keyboard controller (an Intel 8042, IBM PS/2 Technical Reference) with a keyboard that has
//! three keys, to be pressed at once: Ctrl, Alt and Del. Its reset command is a way for the guest to
//! end.
//!
//! Two ports at offsets 0 (data) and 4 (commands and status). What the controller or the keyboard
//! says waits in one short buffer, a byte at a time at the data port.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use telemetry::Readings;
use vmm_sys_util::eventfd::EventFd;

use super::power::{PowerRequest, PowerSwitch};
use crate::bus::BusDevice;

/// Most bytes that wait for the guest. A keyboard's own buffer is of that size; the three keys take
/// eleven.
const CAPACITY: usize = 16;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

// Status.
const OUTPUT_FULL: u8 = 1;
const LAST_WAS_COMMAND: u8 = 1 << 3;
/// No key locks the keyboard.
const UNLOCKED: u8 = 1 << 4;

// The controller's command byte.
const INTERRUPT: u8 = 1;
/// The controller has passed its test, which the status says too.
const PASSED_TEST: u8 = 1 << 2;
const KEYBOARD_OFF: u8 = 1 << 4;
const TRANSLATE: u8 = 1 << 6;

// Commands to the controller.
const READ_COMMAND_BYTE: u8 = 0x20;
const WRITE_COMMAND_BYTE: u8 = 0x60;
const TEST_CONTROLLER: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const DISABLE_KEYBOARD: u8 = 0xad;
const ENABLE_KEYBOARD: u8 = 0xae;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const PULSE_RESET: u8 = 0xfe;
/// Output port: the processor is not held in reset, the address line A20 is on.
const OUTPUT_PORT: u8 = 0x03;

// Commands to the keyboard, and its answers.
const SET_LIGHTS: u8 = 0xed;
const ECHO: u8 = 0xee;
const SCAN_CODE_SET: u8 = 0xf0;
const IDENTIFY: u8 = 0xf2;
const SET_RATE: u8 = 0xf3;
const SCAN: u8 = 0xf4;
const STOP_SCANNING: u8 = 0xf5;
const SET_DEFAULTS: u8 = 0xf6;
const RESET: u8 = 0xff;
const ACKNOWLEDGE: u8 = 0xfa;
const AGAIN: u8 = 0xfe;
const TEST_PASSED: u8 = 0xaa;
/// A keyboard with the keys of an MF2.
const IDENTITY: [u8; 2] = [0xab, 0x83];

/// Ctrl, Alt and Del, pressed and let go of again, as a keyboard says it (scan code set 2).
const KEYS: [u8; 11] = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];
/// The same, as the controller translates it (scan code set 1).
const TRANSLATED_KEYS: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];

telemetry::metrics! {
    /// What was done with the keyboard controller.
    pub struct I8042Metrics("i8042", Counter) {
        /// Keys that could not be pressed.
        error_count,
        /// Reads that mean nothing to it.
        missed_read_count,
        /// Reads of its registers.
        read_count,
        /// Writes to its registers.
        write_count,
        /// Writes that mean nothing to it.
        missed_write_count,
        /// Resets asked for.
        reset_count,
    }
}

/// Why keys could not be pressed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeyError {
    /// The guest has no driver of it, or has switched it off.
    #[error("the guest does not use its keyboard")]
    Unused,
    /// The guest has not read what was said before.
    #[error("the guest has not read the keys pressed before")]
    Full,
}

/// What the controller or the keyboard takes the next byte at the data port for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Next {
    /// A command to the keyboard.
    #[default]
    Keyboard,
    /// The controller's command byte.
    CommandByte,
    /// The controller's output port.
    OutputPort,
    /// The keyboard's lights or rate.
    Ignored,
    /// Which scan codes the keyboard has, or that it is to tell.
    ScanCodeSet,
}

/// What goes into a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    command_byte: u8,
    last_was_command: bool,
    scanning: bool,
    next: Next,
    output: Vec<u8>,
}

/// A snapshot whose keyboard controller holds more than one can.
#[derive(Debug, thiserror::Error)]
#[error("a keyboard controller cannot hold {0} bytes")]
pub struct TooMuchOutput(usize);

/// The keyboard controller and its keyboard.
pub struct I8042 {
    switch: Arc<PowerSwitch>,
    interrupt: EventFd,
    command_byte: u8,
    last_was_command: bool,
    /// Whether the keyboard says which keys are pressed.
    scanning: bool,
    next: Next,
    /// Never more than [`CAPACITY`].
    output: VecDeque<u8>,
    metrics: I8042Metrics,
}

impl I8042 {
    /// A controller as firmware leaves it, that resets by this switch. Fails where no eventfd can be
    /// made.
    pub fn new(switch: Arc<PowerSwitch>) -> io::Result<I8042> {
        Ok(I8042 {
            switch,
            interrupt: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            command_byte: PASSED_TEST | TRANSLATE,
            last_was_command: false,
            scanning: true,
            next: Next::default(),
            output: VecDeque::with_capacity(CAPACITY),
            metrics: I8042Metrics::default(),
        })
    }

    /// Written when a byte waits and the guest wants to hear of it: to be made an irqfd.
    pub fn interrupt_event(&self) -> &EventFd {
        &self.interrupt
    }

    /// Presses Ctrl, Alt and Del, and lets go of them. All of it waits for the guest, or nothing.
    pub fn press_ctrl_alt_del(&mut self) -> Result<(), KeyError> {
        let used = self.command_byte & INTERRUPT != 0 && self.command_byte & KEYBOARD_OFF == 0;
        let keys =
            if self.command_byte & TRANSLATE != 0 { &TRANSLATED_KEYS[..] } else { &KEYS[..] };
        let result = if !used || !self.scanning {
            Err(KeyError::Unused)
        } else if self.output.len() + keys.len() > CAPACITY {
            Err(KeyError::Full)
        } else {
            self.say(keys);
            Ok(())
        };
        self.metrics.error_count += u64::from(result.is_err());
        result
    }

    /// What goes into a snapshot.
    pub fn save(&self) -> I8042State {
        I8042State {
            command_byte: self.command_byte,
            last_was_command: self.last_was_command,
            scanning: self.scanning,
            next: self.next,
            output: self.output.iter().copied().collect(),
        }
    }

    /// Takes up the state out of a snapshot.
    pub fn restore(&mut self, state: &I8042State) -> Result<(), TooMuchOutput> {
        if state.output.len() > CAPACITY {
            return Err(TooMuchOutput(state.output.len()));
        }
        self.command_byte = state.command_byte;
        self.last_was_command = state.last_was_command;
        self.scanning = state.scanning;
        self.next = state.next;
        self.output = state.output.iter().copied().collect();
        // Whether the guest had heard of the first byte is not known; hearing twice does no harm.
        self.signal();
        Ok(())
    }

    /// Has bytes wait for the guest. What there is no room for is lost, as in a keyboard.
    fn say(&mut self, bytes: &[u8]) {
        let was_empty = self.output.is_empty();
        let room = CAPACITY.saturating_sub(self.output.len());
        self.output.extend(bytes.iter().take(room));
        if was_empty {
            self.signal();
        }
    }

    /// Each byte that comes to wait at the data port is one interrupt.
    fn signal(&self) {
        if !self.output.is_empty() && self.command_byte & INTERRUPT != 0 {
            // Fails only where 2^64 of them were not taken.
            let _ = self.interrupt.write(1);
        }
    }

    fn status(&self) -> u8 {
        let full = if self.output.is_empty() { 0 } else { OUTPUT_FULL };
        let command = if self.last_was_command { LAST_WAS_COMMAND } else { 0 };
        full | command | (self.command_byte & PASSED_TEST) | UNLOCKED
    }

    fn set_command_byte(&mut self, value: u8) {
        let had_interrupt = self.command_byte & INTERRUPT != 0;
        self.command_byte = value;
        if !had_interrupt {
            self.signal();
        }
    }

    /// Carries out a command to the controller; false where it is none.
    fn command(&mut self, command: u8) -> bool {
        self.next = Next::Keyboard;
        match command {
            READ_COMMAND_BYTE => self.say(&[self.command_byte]),
            WRITE_COMMAND_BYTE => self.next = Next::CommandByte,
            TEST_CONTROLLER => {
                self.command_byte |= PASSED_TEST;
                self.say(&[0x55]);
            }
            TEST_KEYBOARD => self.say(&[0]),
            DISABLE_KEYBOARD => self.command_byte |= KEYBOARD_OFF,
            ENABLE_KEYBOARD => self.command_byte &= !KEYBOARD_OFF,
            READ_OUTPUT_PORT => self.say(&[OUTPUT_PORT]),
            WRITE_OUTPUT_PORT => self.next = Next::OutputPort,
            PULSE_RESET => self.reset(),
            _ => return false,
        }
        true
    }

    /// Takes a byte for the controller or the keyboard; false where it means nothing.
    fn data(&mut self, byte: u8) -> bool {
        match std::mem::take(&mut self.next) {
            Next::Keyboard => {
                // A command switches the keyboard on again.
                self.command_byte &= !KEYBOARD_OFF;
                return self.keyboard(byte);
            }
            Next::CommandByte => self.set_command_byte(byte),
            // Bit 0 is the processor's reset line.
            Next::OutputPort if byte & 1 == 0 => self.reset(),
            Next::OutputPort => {}
            Next::Ignored => self.say(&[ACKNOWLEDGE]),
            Next::ScanCodeSet if byte == 0 => self.say(&[ACKNOWLEDGE, 2]),
            Next::ScanCodeSet => self.say(&[ACKNOWLEDGE]),
        }
        true
    }

    /// Carries out a command to the keyboard; false where it is none.
    fn keyboard(&mut self, command: u8) -> bool {
        match command {
            SET_LIGHTS | SET_RATE => self.next = Next::Ignored,
            SCAN_CODE_SET => self.next = Next::ScanCodeSet,
            SCAN | SET_DEFAULTS => self.scanning = true,
            STOP_SCANNING => self.scanning = false,
            IDENTIFY => {
                self.say(&[ACKNOWLEDGE]);
                self.say(&IDENTITY);
                return true;
            }
            RESET => {
                self.scanning = true;
                self.say(&[ACKNOWLEDGE, TEST_PASSED]);
                return true;
            }
            ECHO => {
                self.say(&[ECHO]);
                return true;
            }
            _ => {
                self.say(&[AGAIN]);
                return false;
            }
        }
        self.say(&[ACKNOWLEDGE]);
        true
    }

    fn reset(&mut self) {
        self.metrics.reset_count += 1;
        self.switch.ask(PowerRequest::Reset);
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let [byte] = data else {
            self.metrics.missed_read_count += 1;
            return;
        };
        match offset {
            DATA => {
                *byte = self.output.pop_front().unwrap_or(0);
                self.signal();
            }
            COMMAND => *byte = self.status(),
            _ => {
                self.metrics.missed_read_count += 1;
                return;
            }
        }
        self.metrics.read_count += 1;
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let known = match (offset, data) {
            (DATA, &[byte]) => {
                self.last_was_command = false;
                self.data(byte)
            }
            (COMMAND, &[command]) => {
                self.last_was_command = true;
                self.command(command)
            }
            _ => false,
        };
        self.metrics.write_count += 1;
        self.metrics.missed_write_count += u64::from(!known);
    }

    fn metrics(&self) -> Option<Readings> {
        Some(self.metrics.readings())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller() -> (I8042, Arc<PowerSwitch>) {
        let switch = PowerSwitch::new().unwrap();
        (I8042::new(switch.clone()).unwrap(), switch)
    }

    fn read(controller: &mut I8042, offset: u64) -> u8 {
        let mut byte = [0xff];
        controller.read(offset, &mut byte);
        byte[0]
    }

    /// All that waits at the data port.
    fn all(controller: &mut I8042) -> Vec<u8> {
        let mut bytes = Vec::new();
        while read(controller, COMMAND) & OUTPUT_FULL != 0 {
            bytes.push(read(controller, DATA));
        }
        bytes
    }

    fn set_command_byte(controller: &mut I8042, value: u8) {
        controller.write(COMMAND, &[WRITE_COMMAND_BYTE]);
        controller.write(DATA, &[value]);
    }

    #[test]
    fn the_reset_command_and_the_reset_line_end_the_guest() {
        for writes in [&[(COMMAND, PULSE_RESET)][..], &[(COMMAND, 0xd1), (DATA, 0xfe)]] {
            let (mut controller, switch) = controller();
            for (offset, value) in writes {
                assert_eq!(switch.request(), None);
                controller.write(*offset, &[*value]);
            }
            assert_eq!(switch.request(), Some(PowerRequest::Reset));
        }
    }

    /// What Linux's drivers i8042 and atkbd do before a key can be pressed.
    #[test]
    fn drivers_find_a_controller_and_a_keyboard() {
        let (mut controller, _) = controller();
        assert_eq!(read(&mut controller, COMMAND), PASSED_TEST | UNLOCKED);
        controller.write(COMMAND, &[READ_COMMAND_BYTE]);
        assert_eq!(all(&mut controller), [PASSED_TEST | TRANSLATE]);
        assert_eq!(read(&mut controller, COMMAND), PASSED_TEST | UNLOCKED | LAST_WAS_COMMAND);
        controller.write(COMMAND, &[TEST_CONTROLLER]);
        controller.write(COMMAND, &[TEST_KEYBOARD]);
        assert_eq!(all(&mut controller), [0x55, 0]);
        set_command_byte(&mut controller, TRANSLATE | INTERRUPT);
        controller.write(COMMAND, &[READ_COMMAND_BYTE]);
        assert_eq!(all(&mut controller), [TRANSLATE | INTERRUPT]);
        for (sent, said) in [
            (&[RESET][..], &[ACKNOWLEDGE, TEST_PASSED][..]),
            (&[IDENTIFY], &[ACKNOWLEDGE, 0xab, 0x83]),
            (&[SET_LIGHTS, 2], &[ACKNOWLEDGE, ACKNOWLEDGE]),
            (&[SET_RATE, 0], &[ACKNOWLEDGE, ACKNOWLEDGE]),
            (&[SCAN_CODE_SET, 0], &[ACKNOWLEDGE, ACKNOWLEDGE, 2]),
            (&[SCAN], &[ACKNOWLEDGE]),
            (&[ECHO], &[ECHO]),
            (&[0], &[AGAIN]),
        ] {
            for byte in sent {
                controller.write(DATA, &[*byte]);
            }
            assert_eq!(all(&mut controller), said, "{sent:x?}");
        }
    }

    #[test]
    fn keys_wait_and_each_byte_is_an_interrupt() {
        let (mut controller, _) = controller();
        let heard = |controller: &I8042| controller.interrupt_event().read().is_ok();
        assert_eq!(controller.press_ctrl_alt_del(), Err(KeyError::Unused));
        set_command_byte(&mut controller, INTERRUPT | TRANSLATE);
        assert!(!heard(&controller));
        controller.press_ctrl_alt_del().unwrap();
        for key in TRANSLATED_KEYS {
            assert!(heard(&controller));
            assert!(!heard(&controller));
            assert_eq!(read(&mut controller, DATA), key);
        }
        assert!(!heard(&controller));
        assert_eq!(read(&mut controller, DATA), 0);
        set_command_byte(&mut controller, INTERRUPT);
        controller.press_ctrl_alt_del().unwrap();
        assert_eq!(controller.press_ctrl_alt_del(), Err(KeyError::Full));
        assert_eq!(all(&mut controller), KEYS);
        // A driver that went away, a keyboard that was told to be quiet.
        set_command_byte(&mut controller, INTERRUPT | KEYBOARD_OFF);
        assert_eq!(controller.press_ctrl_alt_del(), Err(KeyError::Unused));
        controller.write(COMMAND, &[ENABLE_KEYBOARD]);
        controller.write(DATA, &[STOP_SCANNING]);
        assert_eq!(all(&mut controller), [ACKNOWLEDGE]);
        assert_eq!(controller.press_ctrl_alt_del(), Err(KeyError::Unused));
    }

    #[test]
    fn what_waited_while_nobody_wanted_to_hear_of_it_is_told_later() {
        let (mut controller, _) = controller();
        controller.write(DATA, &[ECHO]);
        assert!(controller.interrupt_event().read().is_err());
        set_command_byte(&mut controller, INTERRUPT);
        assert_eq!(controller.interrupt_event().read().unwrap(), 1);
    }

    #[test]
    fn a_restored_controller_goes_on() {
        let (mut one, _) = controller();
        set_command_byte(&mut one, INTERRUPT | TRANSLATE);
        one.press_ctrl_alt_del().unwrap();
        read(&mut one, DATA);
        one.write(COMMAND, &[WRITE_COMMAND_BYTE]);
        let state = one.save();
        let (mut other, _) = controller();
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        assert_eq!(other.interrupt_event().read().unwrap(), 1);
        other.write(DATA, &[TRANSLATE]);
        assert_eq!(all(&mut other), TRANSLATED_KEYS[1..]);
        assert_eq!(other.press_ctrl_alt_del(), Err(KeyError::Unused));
        let state = I8042State { output: vec![0; CAPACITY + 1], ..state };
        assert!(other.restore(&state).is_err());
    }

    /// docs/hostile.md 14: every register with every value and size, and nobody reads.
    #[test]
    fn hostile_14_hammered_registers_hold_little_and_reset_by_the_right_value_only() {
        let (mut controller, switch) = controller();
        for _ in 0..3 {
            for value in 0..=255u8 {
                for offset in 0..5 {
                    if (offset, value) != (COMMAND, PULSE_RESET)
                        && !(controller.next == Next::OutputPort && value & 1 == 0)
                    {
                        controller.write(offset, &[value]);
                    }
                    for size in [2, 4, 8] {
                        controller.write(offset, &vec![value; size]);
                        controller.read(offset, &mut vec![0; size]);
                    }
                    read(&mut controller, COMMAND);
                    assert!(controller.output.len() <= CAPACITY);
                    let _ = controller.press_ctrl_alt_del();
                }
            }
        }
        assert_eq!(switch.request(), None);
        assert_eq!(controller.output.len(), CAPACITY);
    }
}
