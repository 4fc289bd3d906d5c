//! What goes wrong while a machine is set up, told in one line.

use agent_protocol::StartFailure;

/// A step that failed, and what that means for the one who asked for it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SetupError {
    /// Decides the exit status of `vmrun run`.
    pub kind: StartFailure,
    /// For a user.
    pub message: String,
}

impl SetupError {
    /// The machine could not be set up.
    pub fn setup(message: impl Into<String>) -> SetupError {
        SetupError { kind: StartFailure::Setup, message: message.into() }
    }
}

/// Says what was being done when something failed.
pub trait Context<T> {
    /// `what: error`.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, SetupError>;
}

impl<T, E: std::fmt::Display> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, SetupError> {
        self.map_err(|error| SetupError::setup(format!("{}: {error}", what())))
    }
}
