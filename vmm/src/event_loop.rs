//! The loop that serves devices until the machine ends.

use std::io::IsTerminal;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use api_server::machine::exit_status;
use devices::legacy::power::{PowerRequest, PowerSwitch};
use devices::legacy::serial::SerialPort;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::StartError;
use crate::device_manager::Subscriber;
use crate::machine::Running;
use crate::vcpu::{Halt, HaltSwitch};

/// Serves the machine and returns the exit status that says why it ended.
pub fn run(mut running: Running) -> Result<i32, StartError> {
    let mut events = EventManager::<Subscriber>::new().map_err(|error| StartError::Device {
        device: "event loop".into(),
        reason: format!("{error:?}"),
    })?;
    let end = Arc::new(Mutex::new(End::new(&running)?));
    events.add_subscriber(end.clone());
    for device in running.subscribers.drain(..) {
        events.add_subscriber(device);
    }
    let _terminal = running.serial.take().map(|serial| {
        events.add_subscriber(Arc::new(Mutex::new(SerialInput::new(serial))));
        RawTerminal::enter()
    });
    loop {
        if let Err(error) = events.run() {
            tracing::error!(?error, "event loop");
        }
        let status = end.lock().unwrap_or_else(PoisonError::into_inner).status;
        if let Some(status) = status {
            return Ok(status);
        }
    }
}

/// Watches all that ends a machine.
struct End {
    power: Arc<PowerSwitch>,
    halt: Arc<HaltSwitch>,
    signals: SignalFd,
    status: Option<i32>,
}

impl End {
    fn new(running: &Running) -> Result<End, StartError> {
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&ending_signals(), flags)
            .map_err(|error| StartError::Host { what: "signalfd", error: error.into() })?;
        Ok(End { power: running.power.clone(), halt: running.halt.clone(), signals, status: None })
    }
}

/// The signals that end a machine; to be blocked before any thread is made.
pub fn ending_signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT].into_iter().collect()
}

impl MutEventSubscriber for End {
    fn init(&mut self, ops: &mut EventOps) {
        let descriptors = [
            self.power.event().as_raw_fd(),
            self.halt.event().as_raw_fd(),
            self.signals.as_raw_fd(),
        ];
        for descriptor in descriptors {
            if let Err(error) = ops.add(Events::new(&Descriptor(descriptor), EventSet::IN)) {
                tracing::error!(?error, "cannot watch for the machine's end");
            }
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let (status, why) = if let Ok(Some(signal)) = self.signals.read_signal() {
            match signal.ssi_signo as i32 {
                libc::SIGINT => (exit_status::INTERRUPTED, "SIGINT"),
                _ => (exit_status::TERMINATED, "SIGTERM"),
            }
        } else if let Some(request) = self.power.request() {
            match request {
                PowerRequest::Off => (exit_status::POWER_OFF, "the guest switched itself off"),
                PowerRequest::Reset => (exit_status::REBOOT, "the guest asked for a reset"),
            }
        } else if let Some(halt) = self.halt.halt() {
            match halt {
                Halt::Reset => (exit_status::REBOOT, "the guest asked for a reset"),
                Halt::Crash => (exit_status::GUEST_CRASH, "the guest crashed"),
            }
        } else {
            return;
        };
        tracing::info!("ending with status {status}: {why}");
        self.status = Some(status);
    }
}

struct Descriptor(RawFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// Standard input as the serial port's input. It is waited for only while the port has room: what
/// the guest has not read yet stays with whoever sent it.
struct SerialInput {
    serial: Arc<Mutex<SerialPort>>,
    room: RawFd,
    input: Input,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Input {
    Waiting,
    Full,
    Closed,
}

impl SerialInput {
    fn new(serial: Arc<Mutex<SerialPort>>) -> SerialInput {
        let room = serial.lock().unwrap_or_else(PoisonError::into_inner).room_event().as_raw_fd();
        SerialInput { serial, room, input: Input::Waiting }
    }

    fn stdin() -> Events {
        Events::new(&Descriptor(libc::STDIN_FILENO), EventSet::IN)
    }
}

impl MutEventSubscriber for SerialInput {
    fn init(&mut self, ops: &mut EventOps) {
        // A regular file cannot be waited for; nothing is lost by not reading one.
        if ops.add(Self::stdin()).is_err() {
            self.input = Input::Closed;
            return;
        }
        if let Err(error) = ops.add(Events::new(&Descriptor(self.room), EventSet::IN)) {
            tracing::error!(?error, "cannot watch the serial port");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
        if events.fd() == self.room {
            let _ = serial.room_event().read();
            if self.input == Input::Full && ops.add(Self::stdin()).is_ok() {
                self.input = Input::Waiting;
            }
            return;
        }
        let mut bytes = [0; 64];
        let room = serial.input_capacity().min(bytes.len());
        // Not through std's standard input: that would read ahead, and wait with what it has until
        // more comes.
        let stdin = std::io::stdin();
        let next = match bytes.get_mut(..room) {
            None | Some([]) => Input::Full,
            Some(bytes) => match nix::unistd::read(&stdin, bytes) {
                Ok(0) => Input::Closed,
                Ok(count) => {
                    serial.input(bytes.get(..count).unwrap_or_default());
                    if serial.input_capacity() == 0 { Input::Full } else { Input::Waiting }
                }
                Err(Errno::EINTR | Errno::EAGAIN) => Input::Waiting,
                Err(_) => Input::Closed,
            },
        };
        // Removed, not masked: an end that hung up is reported whatever the mask says.
        if next != Input::Waiting {
            let _ = ops.remove(events);
        }
        self.input = next;
    }
}

/// Standard input as a terminal without line editing, until dropped.
struct RawTerminal(Option<nix::sys::termios::Termios>);

impl RawTerminal {
    fn enter() -> RawTerminal {
        use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return RawTerminal(None);
        }
        let Ok(before) = tcgetattr(&stdin) else { return RawTerminal(None) };
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        // Ctrl-C still ends the machine.
        raw.local_flags |= nix::sys::termios::LocalFlags::ISIG;
        raw.output_flags |= nix::sys::termios::OutputFlags::OPOST;
        let entered = tcsetattr(&stdin, SetArg::TCSANOW, &raw).is_ok();
        RawTerminal(entered.then_some(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = nix::sys::termios::tcsetattr(
                std::io::stdin(),
                nix::sys::termios::SetArg::TCSANOW,
                before,
            );
        }
    }
}
