//! What the end-to-end tests share: a user's session with the `vmrun` command.
//!
//! The tests run in the lab, as root, with the built programs on PATH and with images that
//! `prepare` made on the host. See `cargo xtask test`.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test harness fails by panicking")]

pub mod api;
pub mod attacker;
pub mod break_in;
pub mod guest;
pub mod images;
pub mod session;
pub mod steps;
pub mod user;

pub use session::{Finished, Running, Session};

/// Runs a program of the host's, which must succeed; what it prints.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A path as an argument.
pub fn text(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}
