//! The loop that serves devices until the machine ends.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use api_server::machine::exit_status;
use api_server::machine::server::Call;
use devices::legacy::power::{PowerRequest, PowerSwitch};
use devices::legacy::serial::SerialPort;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vmm_sys_util::eventfd::EventFd;

use crate::StartError;
use crate::controller::Controller;
use crate::device_manager::Subscriber;
use crate::machine::lock;
use crate::seccomp::{Seccomp, Thread};
use crate::vcpu::{Halt, HaltSwitch};

/// Time between two lines of metrics.
const METRICS_INTERVAL: Duration = Duration::from_secs(60);

/// Requests on their way from the API's thread.
pub struct Calls {
    calls: mpsc::Receiver<Call>,
    event: EventFd,
}

/// The API's thread's end of [`Calls`].
pub struct Caller {
    calls: mpsc::Sender<Call>,
    event: EventFd,
}

impl Calls {
    /// A way from one thread to the other.
    pub fn new() -> std::io::Result<(Caller, Calls)> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let (sender, receiver) = mpsc::channel();
        Ok((Caller { calls: sender, event: event.try_clone()? }, Calls { calls: receiver, event }))
    }
}

impl Caller {
    /// Hands a request over. Where the machine has ended, its client is told so by the lost reply.
    pub fn submit(&self, call: Call) {
        let _ = self.calls.send(call);
        let _ = self.event.write(1);
    }
}

/// Only wakes the loop.
struct Wake(EventFd);

impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.0.as_raw_fd());
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.0.read();
    }
}

fn watch(ops: &mut EventOps, descriptor: RawFd) {
    if let Err(error) = ops.add(Events::new(&Descriptor(descriptor), EventSet::IN)) {
        tracing::error!(?error, "cannot wait for events");
    }
}

/// Serves the machine, and requests where there are any, and returns the exit status that says why
/// it ended. Before it looks at anything that a guest did, its thread is confined.
pub fn run(
    mut controller: Controller,
    calls: Option<Calls>,
    seccomp: &Seccomp,
) -> Result<i32, StartError> {
    let mut events = EventManager::<Subscriber>::new().map_err(|error| StartError::Device {
        device: "event loop".into(),
        reason: format!("{error:?}"),
    })?;
    let end = Arc::new(Mutex::new(End::new()?));
    events.add_subscriber(end.clone());
    if let Some(calls) = &calls {
        let event = calls.event.try_clone().map_err(StartError::host("eventfd"))?;
        events.add_subscriber(Arc::new(Mutex::new(Wake(event))));
    }
    let metrics = Arc::new(Mutex::new(Metronome::new(METRICS_INTERVAL)?));
    events.add_subscriber(metrics.clone());
    let mut terminal = None;
    let mut served = HashMap::new();
    loop {
        if let Some(running) = controller.take_up() {
            seccomp.install(Thread::EventLoop)?;
            let guest = GuestEnd {
                power: running.power.clone(),
                halt: running.halt.clone(),
                end: end.clone(),
            };
            events.add_subscriber(Arc::new(Mutex::new(guest)));
            if let Some(serial) = running.serial.clone() {
                events.add_subscriber(Arc::new(Mutex::new(SerialInput::new(serial))));
                terminal = Some(RawTerminal::enter());
            }
            if let Some(event) = running.ejection_event() {
                let event = event.map_err(StartError::host("eventfd"))?;
                events.add_subscriber(Arc::new(Mutex::new(Wake(event))));
            }
        }
        controller.settle();
        let (unplugged, plugged) = controller.take_changes();
        for device in unplugged {
            if let Some(id) = served.remove(&address(&device)) {
                let _ = events.remove_subscriber(id);
            }
        }
        for device in plugged {
            served.insert(address(&device), events.add_subscriber(device));
        }
        controller.answer();
        match events.run_with_timeout(controller.patience()) {
            Ok(count) => controller.metrics().served_events(count),
            Err(error) => tracing::error!(?error, "event loop"),
        }
        let beat = std::mem::take(&mut lock(&metrics).beat);
        let status = lock(&end).status;
        if let Some(status) = status {
            drop(terminal);
            controller.finish();
            return Ok(status);
        }
        if beat {
            controller.write_metrics();
        }
        for call in calls.iter().flat_map(|calls| calls.calls.try_iter()) {
            controller.call(call);
        }
    }
}

/// What a device is known by, as long as it is served.
fn address(device: &Subscriber) -> *const () {
    Arc::as_ptr(device).cast()
}

/// Tells when it is time for another line of metrics.
struct Metronome {
    timer: TimerFd,
    /// It is.
    beat: bool,
}

impl Metronome {
    fn new(interval: Duration) -> Result<Metronome, StartError> {
        let failed = |error: Errno| StartError::Host { what: "timerfd", error: error.into() };
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(failed)?;
        let every = Expiration::Interval(interval.into());
        timer.set(every, TimerSetTimeFlags::empty()).map_err(failed)?;
        Ok(Metronome { timer, beat: false })
    }
}

impl MutEventSubscriber for Metronome {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.timer.as_fd().as_raw_fd());
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.beat |= self.timer.wait().is_ok();
    }
}

/// Why the machine ends; and the signals that end it.
struct End {
    signals: SignalFd,
    status: Option<i32>,
}

impl End {
    fn new() -> Result<End, StartError> {
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&ending_signals(), flags)
            .map_err(|error| StartError::Host { what: "signalfd", error: error.into() })?;
        Ok(End { signals, status: None })
    }

    fn set(&mut self, status: i32, why: &str) {
        tracing::info!("ending with status {status}: {why}");
        self.status.get_or_insert(status);
    }
}

/// The guest's ways to end the machine.
struct GuestEnd {
    power: Arc<PowerSwitch>,
    halt: Arc<HaltSwitch>,
    end: Arc<Mutex<End>>,
}

impl MutEventSubscriber for GuestEnd {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.power.event().as_raw_fd());
        watch(ops, self.halt.event().as_raw_fd());
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let (status, why) = match (self.power.request(), self.halt.halt()) {
            (Some(PowerRequest::Off), _) => {
                (exit_status::POWER_OFF, "the guest switched itself off")
            }
            (Some(PowerRequest::Reset), _) | (None, Some(Halt::Reset)) => {
                (exit_status::REBOOT, "the guest asked for a reset")
            }
            (None, Some(Halt::Crash)) => (exit_status::GUEST_CRASH, "the guest crashed"),
            (None, None) => return,
        };
        lock(&self.end).set(status, why);
    }
}

/// The signals that end a machine; to be blocked before any thread is made.
pub fn ending_signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT].into_iter().collect()
}

impl MutEventSubscriber for End {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.signals.as_raw_fd());
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let Ok(Some(signal)) = self.signals.read_signal() else { return };
        match signal.ssi_signo as i32 {
            libc::SIGINT => self.set(exit_status::INTERRUPTED, "SIGINT"),
            _ => self.set(exit_status::TERMINATED, "SIGTERM"),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metronome_beats_again_and_again() {
        let metronome = Metronome::new(Duration::from_millis(1)).unwrap();
        let metronome = Arc::new(Mutex::new(metronome));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(metronome.clone());
        for _ in 0..3 {
            assert_eq!(events.run_with_timeout(10_000).unwrap(), 1);
            assert!(std::mem::take(&mut lock(&metronome).beat));
        }
    }
}
