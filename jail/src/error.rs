//! Why a process is not confined.

use std::fmt;
use std::io;

/// A part of the confinement that a user can go on without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The share of the host's processors, memory and process ids.
    Cgroup,
    /// User, mount, process id, network, IPC, UTS and cgroup namespaces, and with them the root.
    Namespaces,
    /// Landlock.
    Landlock,
    /// Filters of system calls. These are each thread's own business; see the program.
    Seccomp,
}

impl Step {
    /// All there are.
    pub const ALL: [Step; 4] = [Step::Cgroup, Step::Namespaces, Step::Landlock, Step::Seccomp];

    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Step::Cgroup => "cgroup",
            Step::Namespaces => "namespaces",
            Step::Landlock => "landlock",
            Step::Seccomp => "seccomp",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl std::str::FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Step, String> {
        let known = Step::ALL.into_iter().find(|step| step.name() == text);
        known.ok_or_else(|| {
            let names = Step::ALL.map(Step::name).join(", ");
            format!("no such part of the jail: {text}; there are {names}")
        })
    }
}

/// Why a process is not confined. Nothing of what it was to do has happened.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A step that can be left out was not possible.
    #[error("the jail's {step}: {what}: {error}; --unconfined {step} goes on without")]
    Step {
        /// Which.
        step: Step,
        /// What was tried.
        what: String,
        /// What the host says.
        error: io::Error,
    },
    /// Something that every confinement has was not possible.
    #[error("the jail: {what}: {error}")]
    Host {
        /// What was tried.
        what: String,
        /// What the host says.
        error: io::Error,
    },
    /// What was asked for makes no sense.
    #[error("the jail: {0}")]
    Senseless(String),
}

impl JailError {
    pub(crate) fn step<E: Into<io::Error>>(
        step: Step,
        what: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |error| JailError::Step { step, what, error: error.into() }
    }

    pub(crate) fn host<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |error| JailError::Host { what, error: error.into() }
    }
}
