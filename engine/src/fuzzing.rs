//! What fuzz targets need of what is otherwise our own.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use agent_protocol::{Process, Root, Start, Writable};

use crate::agent::Control;
use crate::conversation::{Conversation, Exit};
use crate::run::RunError;
use crate::stdio::Forwarding;

/// The talk about a process without streams, over a connection that was greeted, with a machine of
/// this pidfd.
pub fn converse(stream: UnixStream, machine: OwnedFd) -> Result<Exit, RunError> {
    let mut control = Control::over(stream);
    let forwarding = Forwarding::idle(machine.try_clone().map_err(RunError::Stdio)?);
    let conversation = Conversation {
        vsock: Path::new(""),
        machine: machine.as_fd(),
        forwarding: &forwarding,
        outputs: &mut Vec::new(),
        on_start: &|| {},
    };
    let start = Start {
        root: Root { device: "/dev/vda".to_owned(), writable: Writable::No },
        mounts: Vec::new(),
        hostname: String::new(),
        network: None,
        time_ns: 0,
        entropy: Vec::new(),
        machine_id: String::new(),
        process: Process {
            id: 0,
            argv: vec!["x".to_owned()],
            env: Vec::new(),
            cwd: "/".to_owned(),
            user: String::new(),
            groups: Vec::new(),
            terminal: None,
            streams: Vec::new(),
            rlimits: Vec::new(),
        },
    };
    conversation.run(&mut control, start)
}
