//! What fuzz targets need of what is otherwise our own.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::agent::Control;
use crate::conversation::{self, Conversation, Exit};
use crate::run::RunError;
use crate::stdio::Forwarding;

/// The talk about a process without streams, over a connection that was greeted, with a machine of
/// this pidfd.
pub fn converse(stream: UnixStream, machine: OwnedFd) -> Result<Exit, RunError> {
    let mut control = Control::over(stream);
    let forwarding = Forwarding::idle(machine.try_clone().map_err(RunError::Stdio)?);
    let talk = Conversation {
        vsock: Path::new(""),
        machine: machine.as_fd(),
        forwarding: &forwarding,
        outputs: &mut Vec::new(),
        on_start: &|| {},
    };
    talk.run(&mut control, conversation::sample(Vec::new()))
}
