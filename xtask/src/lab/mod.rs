//! `cargo xtask lab`: a command, as root, on a Linux with working KVM.
//!
//! Where the host's KVM can boot Linux that is the host itself. Elsewhere it is a machine that QEMU
//! emulates, with AMD SVM: the host's whole file system is its root, read-only below a tmpfs, so
//! that what was built outside runs inside at the same path.

mod keeper;
mod machine;
mod probe;
mod tsc;

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::build;

pub use keeper::keep as keep_vm;
pub use machine::prepare;

/// Exit status of the lab's own failures.
pub const FAILURE: u8 = 125;
/// Exit status when the command took too long.
pub const TIMED_OUT: u8 = 124;

#[derive(clap::Args, Clone)]
pub struct Arguments {
    /// Show this folder of the host, read-only, at the same path
    #[arg(long, value_name = "DIR")]
    pub share: Vec<PathBuf>,
    /// Show this folder of the host, writable, at the same path
    #[arg(long, value_name = "DIR")]
    pub rw: Vec<PathBuf>,
    /// Memory of the machine
    #[arg(long, value_name = "MiB", default_value_t = 3072)]
    pub mem: u32,
    /// Processors of the machine; several are emulated with now and then a fault
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Count instructions instead of time: 1 ns each, on one processor
    #[arg(long)]
    pub count: bool,
    /// Use the machine even where the host's KVM works
    #[arg(long)]
    pub force_vm: bool,
    /// End the command after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    pub timeout: u64,
    /// The command
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

impl Arguments {
    /// This command with everything else as it is by default.
    pub fn new(command: Vec<String>) -> Arguments {
        Arguments {
            share: Vec::new(),
            rw: Vec::new(),
            mem: 3072,
            cpus: 1,
            count: false,
            force_vm: false,
            timeout: 1800,
            command,
        }
    }
}

/// Whether commands run on a machine of their own.
pub fn needs_machine() -> bool {
    !probe::host_boots_linux()
}

/// Runs the command; its exit status.
pub fn run(arguments: &Arguments) -> Result<u8> {
    if arguments.force_vm || arguments.count || needs_machine() {
        return machine::run(arguments);
    }
    let path = std::env::var("PATH").unwrap_or_default();
    let (program, rest) = arguments.command.split_first().context("no command")?;
    let status = Command::new("timeout")
        .arg(arguments.timeout.to_string())
        .arg(program)
        .args(rest)
        .env("PATH", format!("{}:{path}", build::dist().display()))
        .env("VMRUN_LAB", "host")
        .status()?;
    Ok(status.code().map_or(128 + status.signal().unwrap_or(0), |code| code) as u8)
}
