//! A virtual processor and the thread that runs it.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use devices::GuestMemory;
use devices::bus::Bus;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;

use crate::StartError;

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

/// Starts a thread that runs a processor once all of them are ready. The thread holds `memory` and
/// never ends, so what the slots map is there for as long as the guest can touch it.
pub fn spawn(
    id: u8,
    mut vcpu: VcpuFd,
    memory: GuestMemory,
    buses: Buses,
    halt: Arc<HaltSwitch>,
    ready: Arc<Barrier>,
) -> Result<(), StartError> {
    thread::Builder::new()
        .name(format!("vcpu{id}"))
        .stack_size(256 << 10)
        .spawn(move || {
            let _memory = memory;
            ready.wait();
            let reason = run(id, &mut vcpu, &buses);
            halt.set(reason);
            // The thread stays, and its processor with it, until the process ends: closing it
            // here would race with KVM calls of the others.
            loop {
                thread::park();
            }
        })
        .map(drop)
        .map_err(StartError::host("cannot start a vCPU thread"))
}

fn run(id: u8, vcpu: &mut VcpuFd, buses: &Buses) -> Halt {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => buses.pio.read(port.into(), data),
            Ok(VcpuExit::IoOut(port, data)) => buses.pio.write(port.into(), data),
            Ok(VcpuExit::MmioRead(address, data)) => buses.mmio.read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => buses.mmio.write(address, data),
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
            Ok(VcpuExit::Shutdown) => {
                tracing::error!(vcpu = id, "triple fault");
                return Halt::Crash;
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                tracing::info!(vcpu = id, kind, "system event");
                const RESET: u32 = 2;
                return if kind == RESET { Halt::Reset } else { Halt::Crash };
            }
            Ok(other) => {
                tracing::error!(vcpu = id, "KVM cannot go on: {other:?}");
                return Halt::Crash;
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => {
                tracing::error!(vcpu = id, %error, "KVM_RUN");
                return Halt::Crash;
            }
        }
    }
}
