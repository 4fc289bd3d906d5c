//! `vmrun-vmm`: one micro-VM, described by a Firecracker configuration file or over Firecracker's API.

#![allow(unsafe_code, reason = "one option of the allocator's")]

mod confinement;

use std::collections::{BTreeMap, HashMap};
use std::fs::OpenOptions;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use api_server::machine::config_file::ConfigFile;
use api_server::machine::requests::RequestMetrics;
use api_server::machine::{
    Level, Logger, Machine, MachineError, MachineRequest, Metrics, exit_status, server,
};
use clap::Parser;
use confinement::{JailOptions, inherited};
use devices::host_file::{self, Access};
use jail::Step;
use vmm::Handed;
use vmm::controller::Controller;
use vmm::event_loop::{self, Calls};
use vmm::logger::Log;
use vmm::seccomp::{Seccomp, Thread};
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
    /// Share no processor core with another process: take a core scheduling cookie
    #[arg(long)]
    core_scheduling: bool,
    /// Use this inherited descriptor as the TAP of an interface
    #[arg(long, value_name = "IFACE_ID=FD")]
    tap_fd: Vec<String>,
    /// Use this inherited descriptor, which listens, as the vsock device's socket
    #[arg(long, value_name = "FD")]
    vsock_fd: Option<String>,
    /// Let threads make any system call
    #[arg(long, conflicts_with = "seccomp_filter")]
    no_seccomp: bool,
    /// Let threads make the system calls of this policy instead of the program's own, a JSON file as
    /// resources/seccomp/x86_64.json
    #[arg(long, value_name = "PATH")]
    seccomp_filter: Option<PathBuf>,
    #[command(flatten)]
    jail: JailOptions,
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
    // One heap for all threads: the C library looks into /proc when it makes others smaller, which no
    // thread but the main one may do.
    // SAFETY: there are no other threads yet, and the call only sets a number.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // Firecracker's jailer has its own options first, then those of the program after two hyphens.
    let mut arguments: Vec<_> = std::env::args_os().collect();
    if let Some(index) = arguments.iter().position(|argument| argument == "--") {
        arguments.remove(index);
    }
    let options = Options::parse_from(arguments);
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
    options.jail.clear_environment()?;
    let taps = options.tap_fd.iter().map(|text| tap(text)).collect::<Result<HashMap<_, _>, _>>()?;
    let vsock = match &options.vsock_fd {
        Some(number) => Some(UnixListener::from(inherited("--vsock-fd", number)?)),
        None => None,
    };
    let kept = taps.values().map(AsRawFd::as_raw_fd).chain(vsock.as_ref().map(AsRawFd::as_raw_fd));
    let opened = options.jail.enter(&options.id, kept.collect())?;
    // Before any thread is made, so that all inherit it.
    vmm::isolation::refuse_merging().map_err(failed)?;
    if options.core_scheduling {
        vmm::isolation::take_core().map_err(failed)?;
    }
    let log = Log::init(&logger(&options)).map_err(failed)?;
    // Before any thread is made, so that all inherit it.
    vmm::event_loop::ending_signals()
        .thread_block()
        .map_err(|error| failed(format!("cannot block signals: {error}")))?;
    let boot_timer = options.boot_timer.then_some(started);
    let pci = options.enable_pci;
    let seccomp = seccomp(&options)?;
    let kvm = opened.map(|opened| opened.kvm);
    let handed =
        Handed { kvm, taps, vsock, boot_timer, pci, seccomp: seccomp.clone(), ..Handed::default() };
    let limit = options.mmds_size_limit.unwrap_or(options.http_api_max_payload_size);
    let mut machine = Controller::new(options.id.clone(), handed, limit);
    machine.set_log(log);
    if let Some(path) = &options.metadata {
        let contents = read(path, |text| serde_json::from_slice(text))?;
        machine.handle(MachineRequest::PutMmds(contents)).map_err(named(path))?;
    }
    let config = match &options.config_file {
        None => ConfigFile::default(),
        Some(path) => read(path, ConfigFile::parse)?,
    };
    if let Some(path) = &options.metrics_path {
        let metrics_path = path.clone();
        let metrics = Metrics { metrics_path, emit_id: false, properties: BTreeMap::new() };
        machine.handle(MachineRequest::PutMetrics(metrics))?;
    }
    let requests = machine.metrics().requests.clone();
    let calls =
        if options.no_api { None } else { Some(serve_api(&options, requests, seccomp.clone())?) };
    // From here on what is read may be a stranger's: kernels, and states of machines.
    seccomp.install(Thread::Start).map_err(failed)?;
    machine.metrics().started(started);
    if options.config_file.is_some() {
        for request in config.into_requests() {
            machine.handle(request)?;
        }
        tracing::info!("{}: started after {} us", options.id, started.elapsed().as_micros());
    }
    let status = event_loop::run(machine, calls, &seccomp).map_err(failed)?;
    if options.no_api {
        return Ok(status);
    }
    let _ = std::fs::remove_file(&options.api_sock);
    // A reset is how guests of Firecracker switch themselves off, and its clients expect 0.
    Ok(if status == exit_status::REBOOT { exit_status::POWER_OFF } else { status })
}

/// What threads may do.
fn seccomp(options: &Options) -> Result<Seccomp, MachineError> {
    if options.no_seccomp || options.jail.is_without(Step::Seccomp) {
        return Ok(Seccomp::default());
    }
    let Some(path) = &options.seccomp_filter else { return Ok(Seccomp::built_in()) };
    read(path, Seccomp::from_policy)
}

/// Listens on the socket and serves it on a thread of its own.
fn serve_api(
    options: &Options,
    metrics: Arc<Mutex<RequestMetrics>>,
    seccomp: Seccomp,
) -> Result<Calls, MachineError> {
    let path = &options.api_sock;
    let listener = listen(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => failed(format!(
            "API socket {}: the path exists; another machine listens there, or one that was \
             killed left it behind (then remove it)",
            path.display()
        )),
        _ => failed(format!("API socket {}: {error}", path.display())),
    })?;
    let (caller, calls) = Calls::new().map_err(failed)?;
    let limit = options.http_api_max_payload_size;
    let (begins, begun) = mpsc::channel();
    let tell = begins.clone();
    std::thread::Builder::new()
        .name("api".to_owned())
        .spawn(move || {
            if let Err(error) = seccomp.install(Thread::Api) {
                let _ = begins.send(Err(failed(error)));
                return;
            }
            let begin = move || drop(tell.send(Ok(())));
            let submit = move |call| caller.submit(call);
            let Err(error) = server::serve(listener, limit, metrics, begin, submit);
            tracing::error!(%error, "the API is not served any more");
            let _ = begins.send(Err(failed(format!("the API: {error}"))));
            // A thread that is confined like this one cannot end but with the process.
            loop {
                std::thread::park();
            }
        })
        .map_err(failed)?;
    begun.recv().map_err(failed)??;
    Ok(calls)
}

/// A socket at this path, or one that was handed over.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    match host_file::inherited(path)? {
        Some(descriptor) => Ok(UnixListener::from(descriptor)),
        None => UnixListener::bind(path),
    }
}

/// An error of this file's.
fn named<E: std::fmt::Display>(path: &Path) -> impl Fn(E) -> MachineError {
    move |error| failed(format!("{}: {error}", path.display()))
}

/// What a file holds.
fn read<T, E: std::fmt::Display>(
    path: &Path,
    parse: impl FnOnce(&[u8]) -> Result<T, E>,
) -> Result<T, MachineError> {
    let mut text = Vec::new();
    let options = OpenOptions::new().read(true).clone();
    let mut file = host_file::open_with(path, Access::Read, &options).map_err(named(path))?;
    file.read_to_end(&mut text).map_err(named(path))?;
    parse(&text).map_err(named(path))
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
    let (name, number) = text.split_once('=').ok_or_else(wrong)?;
    Ok((name.to_owned(), inherited(&format!("--tap-fd {text}"), number)?))
}
