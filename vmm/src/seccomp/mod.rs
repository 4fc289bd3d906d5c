//! Which system calls each kind of thread may make: seccomp(2). Any other ends the process by
//! SIGSYS. The policy is `resources/seccomp/x86_64.json`; docs/seccomp.md has more.
//!
//! A filter lasts as long as its thread, is inherited by threads that it makes, and adds to those that
//! are there: what one of them does not allow is not allowed. So the main thread has two: one that
//! lets it make the machine and its threads, and a narrower one from when the guest runs.

mod policy;

use std::io;
use std::sync::Arc;

use nix::sys::prctl;
use seccompiler::{BpfProgram, sock_filter};

pub use policy::PolicyError;

include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));

/// What a thread does from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// The main thread until there is a machine.
    Start,
    /// The main thread from then on.
    EventLoop,
    /// Runs a virtual processor.
    Vcpu,
    /// Serves the API's clients.
    Api,
}

/// Filters for the threads of this process; by default none.
#[derive(Clone, Default)]
pub struct Seccomp(Option<Arc<Filters>>);

struct Filters {
    start: BpfProgram,
    event_loop: BpfProgram,
    vcpu: BpfProgram,
    api: BpfProgram,
    refused: BpfProgram,
}

/// A thread cannot be filtered.
#[derive(Debug, thiserror::Error)]
#[error("cannot install a seccomp filter: {0}; --no-seccomp goes on without")]
pub struct InstallError(io::Error);

impl Seccomp {
    /// The filters that the program comes with.
    pub fn built_in() -> Seccomp {
        Seccomp(Some(Arc::new(Filters {
            start: program(START),
            event_loop: program(EVENT_LOOP),
            vcpu: program(VCPU),
            api: program(API),
            refused: program(REFUSED),
        })))
    }

    /// Those of another policy.
    pub fn from_policy(text: &[u8]) -> Result<Seccomp, PolicyError> {
        let mut programs = policy::compile(text)?;
        let mut program = |name| programs.remove(name).ok_or(PolicyError::Names);
        Ok(Seccomp(Some(Arc::new(Filters {
            start: program(policy::START)?,
            event_loop: program(policy::EVENT_LOOP)?,
            vcpu: program(policy::VCPU)?,
            api: program(policy::API)?,
            refused: program(policy::REFUSED)?,
        }))))
    }

    /// Filters the calling thread, and all that it makes from now on.
    pub fn install(&self, thread: Thread) -> Result<(), InstallError> {
        let Some(filters) = &self.0 else { return Ok(()) };
        // Which name a thread has says which filter: for whoever looks at what they do.
        if let Some(name) = thread.name() {
            prctl::set_name(name).map_err(|error| InstallError(error.into()))?;
        }
        match thread {
            Thread::Start => {
                apply(&filters.refused)?;
                apply(&filters.start)
            }
            Thread::EventLoop => apply(&filters.event_loop),
            Thread::Vcpu => apply(&filters.vcpu),
            Thread::Api => apply(&filters.api),
        }
    }
}

impl Thread {
    /// The name of the main thread; others have theirs from who makes them.
    fn name(self) -> Option<&'static std::ffi::CStr> {
        match self {
            Thread::Start => Some(c"vmrun-vmm start"),
            Thread::EventLoop => Some(c"vmrun-vmm loop"),
            Thread::Vcpu | Thread::Api => None,
        }
    }
}

fn apply(program: &BpfProgram) -> Result<(), InstallError> {
    seccompiler::apply_filter(program).map_err(|error| {
        InstallError(match error {
            seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => error,
            error => io::Error::other(error.to_string()),
        })
    })
}

/// Instructions as the build script writes them.
fn program(instructions: &[(u16, u8, u8, u32)]) -> BpfProgram {
    instructions.iter().map(|&(code, jt, jf, k)| sock_filter { code, jt, jf, k }).collect()
}

#[cfg(test)]
mod tests;
