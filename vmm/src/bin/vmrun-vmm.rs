//! `vmrun-vmm`: one micro-VM, described by a Firecracker configuration file.

use std::collections::HashMap;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use api_server::machine::config_file::ConfigFile;
use api_server::machine::{Level, Logger, Machine, MachineError, exit_status};
use clap::Parser;
use vmm::controller::Controller;

/// Run one micro-VM.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The machine, as a JSON file in Firecracker's format.
    #[arg(long, value_name = "PATH")]
    config_file: Option<PathBuf>,
    /// Do not serve the API. (There is none yet: without this, --config-file does the same.)
    #[arg(long)]
    no_api: bool,
    /// Serve the API on this Unix socket. Not supported yet.
    #[arg(long, value_name = "PATH")]
    api_sock: Option<PathBuf>,
    /// A name for the machine in messages and process lists.
    #[arg(long, default_value = "anonymous-instance")]
    id: String,
    /// Write messages to this file or FIFO.
    #[arg(long, value_name = "PATH")]
    log_path: Option<PathBuf>,
    /// The least important messages to write.
    #[arg(long, value_enum, ignore_case = true)]
    level: Option<LogLevel>,
    /// Name the level of each message.
    #[arg(long)]
    show_level: bool,
    /// Name the source file and line of each message.
    #[arg(long)]
    show_log_origin: bool,
    /// Log how long the guest takes to reach its user space, when it tells.
    #[arg(long)]
    boot_timer: bool,
    /// Use this inherited descriptor as the TAP of an interface.
    #[arg(long, value_name = "IFACE_ID=FD")]
    tap_fd: Vec<String>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum LogLevel {
    Off,
    Error,
    #[value(alias = "warn")]
    Warning,
    Info,
    Debug,
    Trace,
}

fn main() -> ExitCode {
    let started = Instant::now();
    let options = Options::parse();
    match run(options, started) {
        // The guest's memory and KVM's structures go with the process; nothing waits for it.
        Ok(status) => std::process::exit(status),
        Err(error) => {
            eprintln!("vmrun-vmm: {error}");
            ExitCode::from(exit_status::START_FAILED as u8)
        }
    }
}

fn run(options: Options, started: Instant) -> Result<i32, MachineError> {
    let refuse = |message: &str| Err(MachineError(message.to_owned()));
    if options.api_sock.is_some() {
        return refuse("--api-sock is not supported yet; use --config-file");
    }
    let Some(path) = &options.config_file else {
        return refuse("nothing to run: name a machine with --config-file");
    };
    // Before any thread is made, so that all inherit it.
    vmm::event_loop::ending_signals()
        .thread_block()
        .map_err(|error| MachineError(format!("cannot block signals: {error}")))?;
    let unreadable = |error| MachineError(format!("{}: {error}", path.display()));
    let text = std::fs::read(path).map_err(unreadable)?;
    let mut config = ConfigFile::parse(&text)
        .map_err(|MachineError(error)| MachineError(format!("{}: {error}", path.display())))?;
    config.logger = Some(logger(&options, config.logger.take().unwrap_or_default()));
    let taps = options.tap_fd.iter().map(|text| tap(text)).collect::<Result<HashMap<_, _>, _>>()?;
    let mut machine = Controller::new(taps, options.boot_timer.then_some(started));
    for request in config.into_requests() {
        machine.handle(request)?;
    }
    tracing::info!("{}: started after {} us", options.id, started.elapsed().as_micros());
    machine.serve()
}

/// What the file says of messages, and where it says nothing, what the command line does.
fn logger(options: &Options, file: Logger) -> Logger {
    let level = options.level.map(|level| match level {
        LogLevel::Off => Level::Off,
        LogLevel::Error => Level::Error,
        LogLevel::Warning => Level::Warning,
        LogLevel::Info => Level::Info,
        LogLevel::Debug => Level::Debug,
        LogLevel::Trace => Level::Trace,
    });
    Logger {
        log_path: file.log_path.or_else(|| options.log_path.clone()),
        level: file.level.or(level),
        show_level: file.show_level || options.show_level,
        show_log_origin: file.show_log_origin || options.show_log_origin,
        module: file.module,
    }
}

/// `IFACE_ID=FD`.
fn tap(text: &str) -> Result<(String, OwnedFd), MachineError> {
    let wrong = || MachineError(format!("--tap-fd {text}: not of the form IFACE_ID=FD"));
    let (name, descriptor) = text.split_once('=').ok_or_else(wrong)?;
    let descriptor: RawFd = descriptor.parse().ok().filter(|fd| *fd > 2).ok_or_else(wrong)?;
    let open = nix::fcntl::FdFlag::FD_CLOEXEC;
    // SAFETY: the descriptor is only borrowed for a call that fails where it is not open.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) };
    nix::fcntl::fcntl(borrowed, nix::fcntl::FcntlArg::F_SETFD(open))
        .map_err(|error| MachineError(format!("--tap-fd {text}: {error}")))?;
    // SAFETY: it is open, as just seen; it was inherited, and nothing else in this process knows
    // its number, which the caller gave away with this option.
    Ok((name.to_owned(), unsafe { OwnedFd::from_raw_fd(descriptor) }))
}
