//! `vmrun-vmm`: one micro-VM, described by a Firecracker configuration file or over Firecracker's API.

#![allow(unsafe_code, reason = "takes over descriptors named by the parent")]

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use api_server::machine::config_file::ConfigFile;
use api_server::machine::requests::RequestMetrics;
use api_server::machine::{
    Level, Logger, Machine, MachineError, MachineRequest, Metrics, exit_status, server,
};
use clap::Parser;
use vmm::Handed;
use vmm::controller::Controller;
use vmm::event_loop::{self, Calls};
use vmm::logger::Log;
use vmm::snapshot::file;

/// Run one micro-VM.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Serve the API on this Unix socket, which must not exist
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    api_sock: PathBuf,
    /// Do not serve the API; the machine is all in --config-file
    #[arg(long, requires = "config_file")]
    no_api: bool,
    /// The machine, as a JSON file in Firecracker's format, started at once
    #[arg(long, value_name = "PATH")]
    config_file: Option<PathBuf>,
    /// A name for the machine: letters, digits and hyphens, 64 at most
    #[arg(long, default_value = "anonymous-instance", value_parser = instance_id)]
    id: String,
    /// Write messages to this file or FIFO
    #[arg(long, value_name = "PATH")]
    log_path: Option<PathBuf>,
    /// The least important messages to write
    #[arg(long, value_enum, ignore_case = true)]
    level: Option<LogLevel>,
    /// Write messages of this module only
    #[arg(long)]
    module: Option<String>,
    /// Name the level of each message
    #[arg(long)]
    show_level: bool,
    /// Name the source file and line of each message
    #[arg(long)]
    show_log_origin: bool,
    /// Write metrics to this file or FIFO
    #[arg(long, value_name = "PATH")]
    metrics_path: Option<PathBuf>,
    /// Log how long the guest takes to reach its user space, when it tells
    #[arg(long)]
    boot_timer: bool,
    /// Most bytes of a request's body
    #[arg(long, value_name = "BYTES", default_value_t = server::DEFAULT_PAYLOAD_LIMIT)]
    http_api_max_payload_size: usize,
    /// Put the JSON object in this file into the metadata service
    #[arg(long, value_name = "PATH")]
    metadata: Option<PathBuf>,
    /// Most bytes that the metadata service holds [default: --http-api-max-payload-size]
    #[arg(long, value_name = "BYTES")]
    mmds_size_limit: Option<usize>,
    /// Print the version of a snapshot's state file and end
    #[arg(long, value_name = "PATH")]
    describe_snapshot: Option<PathBuf>,
    /// Print the version of state files that are written and end
    #[arg(long)]
    snapshot_version: bool,
    /// Put virtio devices on a PCI bus, where devices can also be plugged in while the guest runs
    #[arg(long)]
    enable_pci: bool,
    /// Use this inherited descriptor as the TAP of an interface
    #[arg(long, value_name = "IFACE_ID=FD")]
    tap_fd: Vec<String>,
}

fn instance_id(text: &str) -> Result<String, String> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    // vmrun's own machines are named after containers, which may have these two.
    let known = |byte: u8| known(byte) || byte == b'_' || byte == b'.';
    if text.is_empty() || text.len() > 64 || !text.bytes().all(known) {
        return Err("only letters, digits and hyphens, 1 to 64 of them".to_owned());
    }
    Ok(text.to_owned())
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
    if options.snapshot_version {
        println!("v{}.0.0", file::VERSION);
        return ExitCode::SUCCESS;
    }
    let result = match &options.describe_snapshot {
        Some(path) => file::version(path).map(|version| println!("v{version}.0.0")).map_err(failed),
        // The guest's memory and KVM's structures go with the process; nothing waits for it.
        None => run(options, started).map(|status| std::process::exit(status)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmrun-vmm: {error}");
            ExitCode::from(exit_status::START_FAILED as u8)
        }
    }
}

/// An error of any kind, as one line.
fn failed(error: impl ToString) -> MachineError {
    MachineError::new(&error.to_string())
}

fn run(options: Options, started: Instant) -> Result<i32, MachineError> {
    let log = Log::init(&logger(&options)).map_err(failed)?;
    // Before any thread is made, so that all inherit it.
    vmm::event_loop::ending_signals()
        .thread_block()
        .map_err(|error| failed(format!("cannot block signals: {error}")))?;
    let taps = options.tap_fd.iter().map(|text| tap(text)).collect::<Result<HashMap<_, _>, _>>()?;
    let boot_timer = options.boot_timer.then_some(started);
    let pci = options.enable_pci;
    let handed = Handed { taps, boot_timer, pci, ..Handed::default() };
    let limit = options.mmds_size_limit.unwrap_or(options.http_api_max_payload_size);
    let mut machine = Controller::new(options.id.clone(), handed, limit);
    machine.set_log(log);
    if let Some(path) = &options.metadata {
        let named = |error: &dyn std::fmt::Display| failed(format!("{}: {error}", path.display()));
        let text = std::fs::read(path).map_err(|error| named(&error))?;
        let contents = serde_json::from_slice(&text).map_err(|error| named(&error))?;
        machine.handle(MachineRequest::PutMmds(contents)).map_err(|error| named(&error))?;
    }
    let config = match &options.config_file {
        None => ConfigFile::default(),
        Some(path) => {
            let named =
                |error: &dyn std::fmt::Display| failed(format!("{}: {error}", path.display()));
            let text = std::fs::read(path).map_err(|error| named(&error))?;
            ConfigFile::parse(&text).map_err(|error| named(&error))?
        }
    };
    if let Some(path) = &options.metrics_path {
        let metrics_path = path.clone();
        let metrics = Metrics { metrics_path, emit_id: false, properties: BTreeMap::new() };
        machine.handle(MachineRequest::PutMetrics(metrics))?;
    }
    let requests = machine.metrics().requests.clone();
    let calls = if options.no_api { None } else { Some(serve_api(&options, requests)?) };
    machine.metrics().started(started);
    if options.config_file.is_some() {
        for request in config.into_requests() {
            machine.handle(request)?;
        }
        tracing::info!("{}: started after {} us", options.id, started.elapsed().as_micros());
    }
    let status = event_loop::run(machine, calls).map_err(failed)?;
    if options.no_api {
        return Ok(status);
    }
    let _ = std::fs::remove_file(&options.api_sock);
    // A reset is how guests of Firecracker switch themselves off, and its clients expect 0.
    Ok(if status == exit_status::REBOOT { exit_status::POWER_OFF } else { status })
}

/// Listens on the socket and serves it on a thread of its own.
fn serve_api(
    options: &Options,
    metrics: Arc<Mutex<RequestMetrics>>,
) -> Result<Calls, MachineError> {
    let path = &options.api_sock;
    let listener = UnixListener::bind(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => failed(format!(
            "API socket {}: the path exists; another machine listens there, or one that was \
             killed left it behind (then remove it)",
            path.display()
        )),
        _ => failed(format!("API socket {}: {error}", path.display())),
    })?;
    let (caller, calls) = Calls::new().map_err(failed)?;
    let limit = options.http_api_max_payload_size;
    std::thread::Builder::new()
        .name("api".to_owned())
        .spawn(move || {
            let Err(error) =
                server::serve(listener, limit, metrics, move |call| caller.submit(call));
            tracing::error!(%error, "the API is not served any more");
        })
        .map_err(failed)?;
    Ok(calls)
}

/// What the command line says of messages.
fn logger(options: &Options) -> Logger {
    let level = options.level.map(|level| match level {
        LogLevel::Off => Level::Off,
        LogLevel::Error => Level::Error,
        LogLevel::Warning => Level::Warning,
        LogLevel::Info => Level::Info,
        LogLevel::Debug => Level::Debug,
        LogLevel::Trace => Level::Trace,
    });
    Logger {
        log_path: options.log_path.clone(),
        level,
        show_level: options.show_level.then_some(true),
        show_log_origin: options.show_log_origin.then_some(true),
        module: options.module.clone(),
    }
}

/// `IFACE_ID=FD`.
fn tap(text: &str) -> Result<(String, OwnedFd), MachineError> {
    let wrong = || failed(format!("--tap-fd {text}: not of the form IFACE_ID=FD"));
    let (name, descriptor) = text.split_once('=').ok_or_else(wrong)?;
    let descriptor: RawFd = descriptor.parse().ok().filter(|fd| *fd > 2).ok_or_else(wrong)?;
    let open = nix::fcntl::FdFlag::FD_CLOEXEC;
    // SAFETY: the descriptor is only borrowed for a call that fails where it is not open.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) };
    nix::fcntl::fcntl(borrowed, nix::fcntl::FcntlArg::F_SETFD(open))
        .map_err(|error| failed(format!("--tap-fd {text}: {error}")))?;
    // SAFETY: it is open, as just seen; it was inherited, and nothing else in this process knows
    // its number, which the caller gave away with this option.
    Ok((name.to_owned(), unsafe { OwnedFd::from_raw_fd(descriptor) }))
}
