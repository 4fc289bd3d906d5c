//! `vmrun run`.

use std::io::IsTerminal;
use std::net::IpAddr;
use std::path::Path;

use engine::kernel::Kernels;
use engine::network::Dns;
use engine::paths::Paths;
use engine::run::{self, NetworkMode, Origin, RunError, RunOptions};
use engine::snapshot::Snapshot;
use engine::spec::{self, ProcessOptions};
use engine::stdio;
use images::{PullOptions, PullPolicy};

use crate::bars::Bars;
use crate::command::{Pull, RunArguments};
use crate::{FAILURE, Failure, store};

/// Runs an image, or what a snapshot has; the process's exit status.
pub fn run(
    paths: &Paths,
    policy: Option<&Path>,
    mut arguments: RunArguments,
    debug: bool,
) -> Result<u8, Failure> {
    refuse_unsupported(&arguments)?;
    let snapshot = arguments.from.as_deref().map(|name| Snapshot::open(paths, name)).transpose()?;
    if let Some(snapshot) = &snapshot {
        refuse_with_snapshot(&arguments, snapshot)?;
        // With --from there is no image: its place is the command's first word.
        let first = arguments.image.replace(snapshot.manifest.image.clone());
        arguments.command.splice(0..0, first);
    }
    let mut options = options(&arguments, debug)?;
    if let Some(snapshot) = &snapshot {
        take_over(&mut options, snapshot);
        // Before any thread is made, so that signals wait for the one that forwards them.
        stdio::block_signals()?;
        let store = store::open(paths, policy, &arguments.confinement.unconfined)?;
        let found = store.find(&snapshot.manifest.image_id)?;
        let image = found.ok_or_else(|| snapshot.image_error("removed"))?;
        let _lease = store.hold(&image)?;
        let device = store.root_device(&image, &Bars::new(true))?;
        return told(run::run(paths, &image, &device, Origin::Snapshot(snapshot), &options));
    }
    // What is missing is said before an image is waited for.
    let kernel = Kernels::open(paths.state()).resolve(arguments.kernel.as_deref())?;
    stdio::block_signals()?;

    let store = store::open(paths, policy, &arguments.confinement.unconfined)?;
    let bars = Bars::new(arguments.quiet);
    let policy = match arguments.pull {
        Pull::Always => PullPolicy::Always,
        Pull::Missing => PullPolicy::Missing,
        Pull::Never => PullPolicy::Never,
    };
    let image = interruptible(|| {
        store.obtain(&options.image, policy, &pull_options(arguments.plain_http), &bars)
    })?;
    let _lease = store.hold(&image)?;
    let device = store.root_device(&image, &bars)?;
    told(run::run(paths, &image, &device, Origin::Kernel(&kernel), &options))
}

/// An error as a user is told it.
pub fn told<T>(result: Result<T, RunError>) -> Result<T, Failure> {
    result.map_err(|error| Failure {
        code: error.exit_code(),
        message: match &error {
            RunError::Start { .. } => format!("cannot start the process: {error}"),
            _ => error.to_string(),
        },
    })
}

/// Refuses what a snapshot has decided.
fn refuse_with_snapshot(arguments: &RunArguments, snapshot: &Snapshot) -> Result<(), Failure> {
    let name = &snapshot.name;
    let of_machine = [
        ("--memory", arguments.memory.is_some()),
        ("--cpus", arguments.cpus.is_some()),
        ("--read-only", arguments.read_only),
        ("--volume", !arguments.volume.is_empty()),
        ("--storage-opt", !arguments.storage_opt.is_empty()),
        ("--network", arguments.network.is_some()),
        ("--kernel", arguments.kernel.is_some()),
        ("--platform", arguments.platform.is_some()),
    ];
    if let Some((flag, _)) = of_machine.iter().find(|(_, given)| *given) {
        return Err(Failure::new(format!(
            "{flag} cannot be given with --from: snapshot {name} has its own"
        )));
    }
    if arguments.ip.is_some() && !snapshot.manifest.network {
        return Err(Failure::new(format!("--ip: snapshot {name} has no network")));
    }
    let of_process = [
        ("a command", arguments.image.is_some()),
        ("--env", !arguments.env.is_empty()),
        ("--env-file", !arguments.env_file.is_empty()),
        ("--workdir", arguments.workdir.is_some()),
        ("--user", arguments.user.is_some()),
        ("--group-add", !arguments.group_add.is_empty()),
        ("--entrypoint", arguments.entrypoint.is_some()),
        ("--tmpfs", !arguments.tmpfs.is_empty()),
        ("--ulimit", !arguments.ulimit.is_empty()),
        ("--tty", arguments.tty),
    ];
    if snapshot.manifest.main.is_some()
        && let Some((what, _)) = of_process.iter().find(|(_, given)| *given)
    {
        return Err(Failure::new(format!(
            "{what} cannot be given: in snapshot {name} a process runs"
        )));
    }
    Ok(())
}

/// What the snapshot says where the user does not.
fn take_over(options: &mut RunOptions, snapshot: &Snapshot) {
    let manifest = &snapshot.manifest;
    let Dns { servers, search, options: resolver } = manifest.dns.clone();
    let dns = &mut options.dns;
    for (own, other) in
        [(&mut dns.servers, servers), (&mut dns.search, search), (&mut dns.options, resolver)]
    {
        if own.is_empty() {
            *own = other;
        }
    }
    options.extra_hosts.extend(manifest.extra_hosts.iter().cloned());
    // A terminal sends its signals itself.
    options.no_signals |= manifest.main.as_ref().is_some_and(|main| main.terminal);
}

/// Lets signals end the program while it does something that knows nothing of them.
fn interruptible<T>(work: impl FnOnce() -> T) -> T {
    let _ = stdio::unblock_signals();
    let result = work();
    let _ = stdio::block_signals();
    result
}

/// How images are pulled.
pub fn pull_options(plain_http: bool) -> PullOptions {
    let mut options = PullOptions::default();
    options.registry.plain_http = plain_http;
    options
}

fn refuse_unsupported(arguments: &RunArguments) -> Result<(), Failure> {
    if arguments.detach {
        return Err(Failure::new("--detach is not supported yet; run it in the foreground"));
    }
    if !arguments.publish.is_empty() {
        return Err(Failure::new(
            "--publish is not supported yet; reach the machine by its address, or from another one",
        ));
    }
    if !arguments.mount.is_empty() {
        return Err(Failure::new("--mount is not supported yet; use -v NAME:/dir or --tmpfs"));
    }
    if arguments.network.as_deref() == Some("none") {
        let used = [
            ("--dns", !arguments.dns.is_empty()),
            ("--dns-search", !arguments.dns_search.is_empty()),
            ("--dns-option", !arguments.dns_option.is_empty()),
            ("--add-host", !arguments.add_host.is_empty()),
            ("--ip", arguments.ip.is_some()),
        ];
        if let Some((flag, _)) = used.iter().find(|(_, used)| *used) {
            return Err(Failure::new(format!(
                "{flag} has no effect with --network none; leave one of them away"
            )));
        }
    }
    match arguments.platform.as_deref() {
        None | Some("linux/amd64" | "linux/x86_64" | "linux") => Ok(()),
        Some(other) => Err(Failure::new(format!(
            "platform {other} is not supported: this host runs linux/amd64 images"
        ))),
    }
}

fn options(arguments: &RunArguments, debug: bool) -> Result<RunOptions, Failure> {
    let mut env = Vec::new();
    for path in &arguments.env_file {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
        env.extend(spec::parse_env_file(&text)?);
    }
    env.extend(arguments.env.iter().cloned());
    if env.iter().any(|entry| entry.is_empty() || entry.starts_with('=')) {
        return Err(Failure::new("an environment variable needs a name"));
    }
    if arguments.tty && arguments.interactive && !std::io::stdin().is_terminal() {
        return Err(Failure::new("the input device is not a TTY; leave -t away"));
    }
    let terminal = arguments.tty.then(|| {
        let fallback = agent_size(24, 80);
        stdio::window_size().unwrap_or(fallback)
    });
    let memory = memory(arguments.memory.as_deref())?;
    if let Some(name) = &arguments.name {
        spec::check_name("--name", name)?;
    }
    Ok(RunOptions {
        image: arguments.image.clone().unwrap_or_default(),
        name: arguments.name.clone().unwrap_or_default(),
        remove: arguments.rm,
        labels: arguments.label.clone(),
        process: ProcessOptions {
            command: arguments.command.clone(),
            entrypoint: arguments.entrypoint.clone(),
            env,
            workdir: arguments.workdir.clone(),
            user: arguments.user.clone(),
            groups: arguments.group_add.clone(),
            rlimits: each(&arguments.ulimit, spec::parse_ulimit)?,
            terminal,
            interactive: arguments.interactive,
        },
        hostname: arguments.hostname.clone().map(check_hostname).transpose()?,
        memory,
        cpus: cpus(arguments.cpus.as_deref())?,
        read_only: arguments.read_only,
        disk: disk(&arguments.storage_opt)?,
        tmpfs: each(&arguments.tmpfs, spec::parse_tmpfs)?,
        volumes: each(&arguments.volume, |text| {
            let volume = spec::parse_volume(text)?;
            engine::volume::refuse_directory(&volume)?;
            Ok::<_, Failure>(volume)
        })?,
        network: network(arguments.network.as_deref())?,
        ip: arguments.ip,
        dns: Dns {
            servers: each(&arguments.dns, |text| match text.parse::<IpAddr>() {
                Ok(_) => Ok(text.to_owned()),
                Err(_) => Err(Failure::new(format!("--dns: {text} is not an IP address"))),
            })?,
            search: arguments.dns_search.clone(),
            options: arguments.dns_option.clone(),
        },
        extra_hosts: each(&arguments.add_host, add_host)?,
        cidfile: arguments.cidfile.clone(),
        no_signals: !arguments.sig_proxy || arguments.tty,
        confinement: arguments.confinement.policy(),
        debug,
    })
}

fn agent_size(rows: u16, columns: u16) -> engine::WindowSize {
    engine::WindowSize { rows, columns }
}

fn each<T, E>(texts: &[String], parse: impl Fn(&str) -> Result<T, E>) -> Result<Vec<T>, Failure>
where
    Failure: From<E>,
{
    texts.iter().map(|text| parse(text).map_err(Failure::from)).collect()
}

/// Bytes of memory.
pub fn memory(text: Option<&str>) -> Result<u64, Failure> {
    let memory = match text {
        Some(text) => spec::parse_size("--memory", text)?,
        None => run::DEFAULT_MEMORY,
    };
    if memory < run::MIN_MEMORY {
        let least = run::MIN_MEMORY >> 20;
        return Err(Failure::new(format!("--memory: a machine needs at least {least}m")));
    }
    Ok(memory)
}

/// The network of this name.
pub fn network(text: Option<&str>) -> Result<NetworkMode, Failure> {
    match text {
        None | Some("default" | "bridge") => Ok(NetworkMode::Default),
        Some("none") => Ok(NetworkMode::None),
        Some(other) => {
            Err(Failure::new(format!("network {other} not found: there are default and none")))
        }
    }
}

/// Number of processors.
pub fn cpus(text: Option<&str>) -> Result<u8, Failure> {
    const MAX: u8 = 32;
    let Some(text) = text else { return Ok(1) };
    match text.parse::<f64>() {
        Ok(number) if number.fract() != 0.0 && number > 0.0 => Err(Failure::new(format!(
            "--cpus {text}: fractions of a CPU are not supported yet; give a whole number"
        ))),
        Ok(number) if (1.0..=f64::from(MAX)).contains(&number) => Ok(number as u8),
        _ => Err(Failure::new(format!("--cpus {text}: a machine has 1 to {MAX} CPUs"))),
    }
}

/// Bytes of the writable layer.
pub fn disk(options: &[String]) -> Result<u64, Failure> {
    let mut size = run::DEFAULT_DISK;
    for option in options {
        match option.split_once('=') {
            Some(("size", text)) => size = spec::parse_size("--storage-opt", text)?,
            _ => {
                return Err(Failure::new(format!(
                    "--storage-opt {option}: only size=SIZE is known"
                )));
            }
        }
    }
    Ok(size)
}

fn add_host(text: &str) -> Result<(String, String), Failure> {
    let split = text.split_once([':', '=']).filter(|(name, _)| !name.is_empty());
    let (name, address) =
        split.ok_or_else(|| Failure::new(format!("--add-host {text}: it is NAME:ADDRESS")))?;
    match address.parse::<IpAddr>() {
        Ok(_) if !name.contains(char::is_whitespace) => Ok((name.to_owned(), address.to_owned())),
        _ => Err(Failure::new(format!("--add-host {text}: {address} is not an IP address"))),
    }
}

fn check_hostname(name: String) -> Result<String, Failure> {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    // Linux keeps 64 bytes.
    if name.len() > 64 || !name.split('.').all(label) {
        return Err(Failure { message: format!("invalid hostname {name:?}"), code: FAILURE });
    }
    Ok(name)
}
