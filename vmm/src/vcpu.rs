//! A virtual processor and the thread that runs it.
//!
//! The thread takes commands. One that comes while the guest runs reaches it by a signal, whose
//! handler sets `immediate_exit`: `KVM_RUN` then finishes the access that the guest was in and
//! returns (KVM API, 5), so that a processor always stands between two instructions.

#![allow(unsafe_code, reason = "a signal handler writes to the page shared with KVM")]

use std::cell::Cell;
use std::os::raw::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use devices::GuestMemory;
use devices::bus::Bus;
use kvm_ioctls::{VcpuExit, VcpuFd};
use telemetry::Readings;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::StartError;
use crate::seccomp::{self, Seccomp};
use crate::snapshot::VcpuState;

/// Where accesses that KVM hands to us go.
#[derive(Clone)]
pub struct Buses {
    /// Ports.
    pub pio: Arc<Bus>,
    /// Addresses.
    pub mmio: Arc<Bus>,
}

/// Why processors stopped, if they did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halt {
    /// The guest asked for a reset by a way that KVM sees itself.
    Reset,
    /// A triple fault, or a state KVM cannot run.
    Crash,
}

/// Set by the first processor that cannot go on.
pub struct HaltSwitch {
    state: AtomicU8,
    event: EventFd,
}

impl HaltSwitch {
    /// A switch that no processor has set.
    pub fn new() -> std::io::Result<Arc<HaltSwitch>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Arc::new(HaltSwitch { state: AtomicU8::new(0), event }))
    }

    /// Readable once a processor stopped.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// What stopped it.
    pub fn halt(&self) -> Option<Halt> {
        match self.state.load(Ordering::SeqCst) {
            1 => Some(Halt::Reset),
            2 => Some(Halt::Crash),
            _ => None,
        }
    }

    fn set(&self, halt: Halt) {
        let value = if halt == Halt::Reset { 1 } else { 2 };
        let _ = self.state.compare_exchange(0, value, Ordering::SeqCst, Ordering::SeqCst);
        let _ = self.event.write(1);
    }
}

telemetry::metrics! {
    /// What a processor has done since it was made.
    pub struct VcpuMetrics("vcpu", Counter) {
        /// Reads of a port that KVM handed to us.
        exit_io_in,
        /// Writes to a port that KVM handed to us.
        exit_io_out,
        /// Reads of memory that is none that KVM handed to us.
        exit_mmio_read,
        /// Writes to memory that is none that KVM handed to us.
        exit_mmio_write,
        /// Times that the processor could not go on.
        failures,
        /// Times that the guest could not be told that it stood still.
        kvmclock_ctrl_fails,
    }
}

/// [`VcpuMetrics`] as a processor's thread counts them. Only that thread writes; each processor has
/// cache lines of its own for it.
#[derive(Default)]
#[repr(align(64))]
struct Counters {
    io_in: Counter,
    io_out: Counter,
    mmio_read: Counter,
    mmio_write: Counter,
    failures: Counter,
    kvmclock_ctrl_fails: Counter,
}

/// A count that one thread writes and others read.
#[derive(Default)]
struct Counter(AtomicU64);

impl Counter {
    /// No more than a load and a store, since nobody else writes.
    fn increment(&self) {
        self.0.store(self.get().wrapping_add(1), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

enum Command {
    Run,
    Pause(mpsc::Sender<()>),
    Save(mpsc::Sender<Result<VcpuState, StartError>>),
}

/// A processor's thread, from outside.
pub struct Vcpu {
    commands: mpsc::Sender<Command>,
    thread: JoinHandle<()>,
    counters: Arc<Counters>,
}

/// The thread is gone, which it never is while the process lives.
fn gone<T>(_: T) -> StartError {
    StartError::Host { what: "vCPU thread", error: std::io::ErrorKind::BrokenPipe.into() }
}

impl Vcpu {
    /// Starts a thread for a processor, which stands still at first. The thread holds `memory` and
    /// never ends, so what the slots map is there for as long as the guest can touch it.
    /// [`prepare_signals`] was called before. The thread makes no system calls but those that
    /// `seccomp` has for it.
    pub fn spawn(
        id: u8,
        fd: VcpuFd,
        memory: GuestMemory,
        buses: Buses,
        halt: Arc<HaltSwitch>,
        saved_msrs: Arc<[u32]>,
        seccomp: &Seccomp,
    ) -> Result<Vcpu, StartError> {
        let (commands, receiver) = mpsc::channel();
        let (confined, ready) = mpsc::channel();
        let seccomp = seccomp.clone();
        let counters = Arc::<Counters>::default();
        let counted = counters.clone();
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(256 << 10)
            .spawn(move || {
                let _memory = memory;
                let installed = seccomp.install(seccomp::Thread::Vcpu);
                let failed = installed.is_err();
                let _ = confined.send(installed);
                if failed {
                    return;
                }
                let commands = receiver;
                Runner { id, fd, buses, halt, saved_msrs, commands, counters: counted }.serve();
            })
            .map_err(StartError::host("cannot start a vCPU thread"))?;
        ready.recv().map_err(gone)??;
        Ok(Vcpu { commands, thread, counters })
    }

    /// What the processor has done.
    pub fn metrics(&self) -> Readings {
        let counters = &self.counters;
        let metrics = VcpuMetrics {
            exit_io_in: counters.io_in.get(),
            exit_io_out: counters.io_out.get(),
            exit_mmio_read: counters.mmio_read.get(),
            exit_mmio_write: counters.mmio_write.get(),
            failures: counters.failures.get(),
            kvmclock_ctrl_fails: counters.kvmclock_ctrl_fails.get(),
        };
        metrics.readings()
    }

    fn tell(&self, command: Command) -> Result<(), StartError> {
        self.commands.send(command).map_err(gone)?;
        self.thread.kill(SIGRTMIN()).map_err(|error| StartError::Host {
            what: "cannot reach a vCPU thread",
            error: std::io::Error::from_raw_os_error(error.errno()),
        })
    }
}

/// Lets processors run.
pub fn run_all(vcpus: &[Vcpu]) -> Result<(), StartError> {
    vcpus.iter().try_for_each(|vcpu| vcpu.tell(Command::Run))
}

/// Has processors stand still, and returns when all of them do.
pub fn pause_all(vcpus: &[Vcpu]) -> Result<(), StartError> {
    let (done, stopped) = mpsc::channel();
    vcpus.iter().try_for_each(|vcpu| vcpu.tell(Command::Pause(done.clone())))?;
    vcpus.iter().try_for_each(|_| stopped.recv().map_err(gone))
}

/// The states of processors that stand still.
pub fn save_all(vcpus: &[Vcpu]) -> Result<Vec<VcpuState>, StartError> {
    let save = |vcpu: &Vcpu| {
        let (reply, state) = mpsc::channel();
        vcpu.tell(Command::Save(reply))?;
        state.recv().map_err(gone)?
    };
    vcpus.iter().map(save).collect()
}

thread_local! {
    /// `immediate_exit` of the processor that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn leave_guest(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: it points into the `kvm_run` structure of the processor that this very thread
        // runs, mapped until the thread ends. The kernel only reads the byte.
        unsafe { flag.write_volatile(1) };
    }
}

/// Has the signal handled by which processors are told to leave the guest. Once, before any is made.
pub fn prepare_signals() -> Result<(), StartError> {
    register_signal_handler(SIGRTMIN(), leave_guest).map_err(|error| StartError::Host {
        what: "cannot handle signals",
        error: std::io::Error::from_raw_os_error(error.errno()),
    })
}

struct Runner {
    id: u8,
    fd: VcpuFd,
    buses: Buses,
    halt: Arc<HaltSwitch>,
    saved_msrs: Arc<[u32]>,
    commands: mpsc::Receiver<Command>,
    counters: Arc<Counters>,
}

impl Runner {
    fn serve(mut self) {
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
        let (mut running, mut halted) = (false, false);
        loop {
            let command = match running {
                true => self.commands.try_recv().ok(),
                false => Some(self.next_command()),
            };
            match command {
                Some(Command::Run) if !halted && !running => {
                    running = true;
                    // The guest's watchdogs forgive the time it stood still; one that has no
                    // kvmclock has none of those either.
                    if self.fd.kvmclock_ctrl().is_err() {
                        self.counters.kvmclock_ctrl_fails.increment();
                    }
                }
                Some(Command::Run) => {}
                Some(Command::Pause(done)) => {
                    running = false;
                    let _ = done.send(());
                }
                Some(Command::Save(reply)) => {
                    let _ = reply.send(VcpuState::save(&self.fd, &self.saved_msrs));
                }
                // Only when there is no other command: one signal may have been for several.
                None => {
                    if let Some(reason) = self.run() {
                        if reason == Halt::Crash {
                            self.counters.failures.increment();
                        }
                        self.halt.set(reason);
                        (running, halted) = (false, true);
                    }
                }
            }
        }
    }

    /// Waits for a command. The thread stays, and its processor with it, until the process ends:
    /// closing it before would race with KVM calls of the others.
    fn next_command(&self) -> Command {
        match self.commands.recv() {
            Ok(command) => command,
            Err(_) => loop {
                thread::park();
            },
        }
    }

    /// Runs the guest until there may be a command, or it cannot go on.
    fn run(&mut self) -> Option<Halt> {
        let (id, buses, counters) = (self.id, &self.buses, &self.counters);
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => {
                    counters.io_in.increment();
                    buses.pio.read(port.into(), data);
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    counters.io_out.increment();
                    buses.pio.write(port.into(), data);
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    counters.mmio_read.increment();
                    buses.mmio.read(address, data);
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    counters.mmio_write.increment();
                    buses.mmio.write(address, data);
                }
                Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
                Ok(VcpuExit::Shutdown) => {
                    tracing::error!(vcpu = id, "triple fault");
                    return Some(Halt::Crash);
                }
                Ok(VcpuExit::SystemEvent(kind, _)) => {
                    tracing::info!(vcpu = id, kind, "system event");
                    const RESET: u32 = 2;
                    return Some(if kind == RESET { Halt::Reset } else { Halt::Crash });
                }
                Ok(VcpuExit::Intr) => return self.interrupted(),
                Ok(other) => {
                    tracing::error!(vcpu = id, "KVM cannot go on: {other:?}");
                    return Some(Halt::Crash);
                }
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) if error.errno() == libc::EINTR => return self.interrupted(),
                Err(error) if error.errno() == libc::EFAULT => {
                    // What a SIGBUS would be to the monitor itself.
                    tracing::error!(
                        vcpu = id,
                        "the host cannot provide a page of the guest's memory: was a file of \
                         persistent memory or a snapshot's cut off, or is its disk full?"
                    );
                    return Some(Halt::Crash);
                }
                Err(error) => {
                    tracing::error!(vcpu = id, %error, "KVM_RUN");
                    return Some(Halt::Crash);
                }
            }
        }
    }

    /// Before commands are looked at: one that comes later sets the flag again.
    fn interrupted(&mut self) -> Option<Halt> {
        self.fd.set_kvm_immediate_exit(0);
        None
    }
}
