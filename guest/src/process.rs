//! The image's process: PID 1 of a PID namespace of its own, as it would be in a container.

#![allow(unsafe_code, reason = "ioctls, and code between fork and exec")]

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use agent_protocol::{
    Identity as MachineIdentity, Network, Process as Description, Start, StartFailure, Stream,
    WindowSize,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::pty::{Winsize, openpty};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::error::{Context, SetupError};
use crate::mounts::{DecidedFiles, Mounted, Volume};
use crate::streams::{Inlet, Outlet};
use crate::users::Identity;
use crate::{early, mounts, network, streams, users};

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, Winsize);
// RNDADDENTROPY, `_IOW('R', 3, int[2])`.
nix::ioctl_write_ptr!(add_to_pool, b'R', 3, [libc::c_int; 2]);
// RNDRESEEDCRNG, `_IO('R', 7)`.
nix::ioctl_none!(reseed_generator, b'R', 7);
nix::ioctl_write_int_bad!(set_controlling_terminal, libc::TIOCSCTTY);

/// Where programs are sought when the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process that runs.
pub struct Process {
    id: u32,
    pid: Pid,
    terminal: Option<File>,
    inlet: Option<Inlet>,
    outlets: HashMap<Stream, Outlet>,
    pumps: Mutex<Vec<JoinHandle<()>>>,
    killed_before: u64,
    volumes: Mutex<Vec<Volume>>,
    files: DecidedFiles,
    network: Mutex<Option<Network>>,
}

/// How a process ended.
pub struct End {
    /// Its status as a shell tells it.
    pub status: u8,
    /// The kernel killed it for want of memory.
    pub out_of_memory: bool,
}

/// Sets the machine up as `start` says, and starts its process.
pub fn start_machine(start: &Start, streams: HashMap<Stream, File>) -> Result<Process, SetupError> {
    set_clock(start.time_ns);
    add_entropy(&start.entropy);
    nix::unistd::sethostname(&start.hostname).context(|| "hostname".to_owned())?;
    network::set_up(start.network.as_ref())?;
    let mounted = mounts::enter(start)?;
    // Others go first when memory runs out.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    spawn(start, streams, mounted)
}

/// Makes a restored machine one of its own. Its process, where it has one, does not run meanwhile.
pub fn identify(
    identity: &MachineIdentity,
    main: Option<&Process>,
    mut streams: HashMap<Stream, File>,
) -> Result<(), SetupError> {
    set_clock(identity.time_ns);
    add_entropy(&identity.entropy);
    reseed();
    nix::unistd::sethostname(&identity.hostname).context(|| "hostname".to_owned())?;
    let Some(main) = main else {
        // The rest comes with its start.
        return identity.network.as_ref().map_or(Ok(()), |network| network::rename(network.mac));
    };
    let mut before = main.network.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(network) = &identity.network {
        network::replace(before.as_ref(), network)?;
        *before = Some(network.clone());
    }
    main.files.write(&identity.hostname, before.as_ref())?;
    mounts::write_machine_id(&identity.machine_id);
    match (&main.inlet, streams.remove(&Stream::Stdin)) {
        (Some(inlet), Some(stdin)) => inlet.connect(stdin).context(|| "stdin".to_owned())?,
        (Some(inlet), None) if main.terminal.is_none() => inlet.close(),
        _ => {}
    }
    for (stream, outlet) in &main.outlets {
        outlet.connect(streams.remove(stream));
    }
    Ok(())
}

/// Gives the kernel's pool the host's bytes, and credit for them: the guest trusts its host, and a
/// processor or kernel without a source of its own would keep programs waiting.
fn add_entropy(bytes: &[u8]) {
    // `struct rand_pool_info` (random(4)): bits, bytes, and the bytes.
    let Ok(count) = i32::try_from(bytes.len()) else { return };
    if count == 0 {
        return;
    }
    let mut pool = Vec::with_capacity(8 + bytes.len());
    pool.extend_from_slice(&count.saturating_mul(8).to_ne_bytes());
    pool.extend_from_slice(&count.to_ne_bytes());
    pool.extend_from_slice(bytes);
    let given = fs::OpenOptions::new().write(true).open("/dev/random").and_then(|random| {
        // SAFETY: the descriptor is open, and the call reads the two numbers and as many bytes
        // behind them as the second says, all of which the vector holds.
        Ok(unsafe { add_to_pool(random.as_raw_fd(), pool.as_ptr().cast()) }?)
    });
    if let Err(error) = given {
        early::log(&format!("entropy: {error}"));
    }
}

/// Has the kernel's generator begin anew from its pool, into which the host's bytes went: until then
/// it gives what it would give in every machine of the snapshot.
fn reseed() {
    let done = fs::OpenOptions::new().write(true).open("/dev/random").and_then(|random| {
        // SAFETY: the descriptor is open, and the call takes no argument.
        Ok(unsafe { reseed_generator(random.as_raw_fd()) }?)
    });
    if let Err(error) = done {
        early::log(&format!("random numbers: {error}"));
    }
}

fn set_clock(nanoseconds: u64) {
    let time = nix::sys::time::TimeSpec::new(
        (nanoseconds / 1_000_000_000) as libc::time_t,
        (nanoseconds % 1_000_000_000) as libc::c_long,
    );
    if let Err(error) = nix::time::clock_settime(nix::time::ClockId::CLOCK_REALTIME, time) {
        early::log(&format!("clock: {error}"));
    }
}

/// What the lock guards, also where a thread has panicked with it.
fn taken<T: Default>(lock: &Mutex<T>) -> T {
    std::mem::take(&mut *lock.lock().unwrap_or_else(|error| error.into_inner()))
}

fn spawn(
    start: &Start,
    streams: HashMap<Stream, File>,
    mounted: Mounted,
) -> Result<Process, SetupError> {
    let description = &start.process;
    let Some((program, arguments)) = description.argv.split_first() else {
        return Err(SetupError::setup("no command specified"));
    };
    let identity = users::resolve(&description.user, &description.groups)?;
    let cwd = PathBuf::from(&description.cwd);
    let mut environment: Vec<(&str, &str)> =
        description.env.iter().filter_map(|entry| entry.split_once('=')).collect();
    if !environment.iter().any(|(name, _)| *name == "HOME") {
        environment.push(("HOME", &identity.home));
    }
    let path = environment.iter().rev().find(|(name, _)| *name == "PATH");
    let executable = find(program, path.map_or(DEFAULT_PATH, |(_, path)| path), &cwd)?;

    let image = Executable::new(&executable, program, arguments, &environment)?;
    let mut command = Command::new(&executable);
    command.current_dir("/");
    let io = Io::prepare(&mut command, description, &streams)?;

    let killed_before = out_of_memory_kills();
    let child = Child {
        identity,
        cwd,
        rlimits: description.rlimits.clone(),
        terminal: io.terminal.is_some(),
        image,
    };
    // SAFETY: between fork and exec the closure makes system calls with data that was made before;
    // it takes no lock that another thread could have held, but the allocator's, which glibc's fork
    // leaves free.
    unsafe { command.pre_exec(move || child.become_it()) };
    // Children of a thread that has left its PID namespace are made in the new one, and the first is
    // its PID 1. Such a thread can start no other threads, so it does nothing else.
    let maker = std::thread::Builder::new()
        .spawn(move || {
            unshare(CloneFlags::CLONE_NEWPID)?;
            command.spawn()
        })
        .context(|| "PID namespace".to_owned())?;
    let spawned = match maker.join() {
        Ok(spawned) => spawned.map_err(|error| cannot_execute(program, &error))?,
        Err(_) => return Err(SetupError::setup("the program could not be started")),
    };
    let pid = Pid::from_raw(spawned.id() as i32);
    let Connected { terminal, inlet, outlets, pumps } = io.connect(streams)?;
    Ok(Process {
        id: description.id,
        pid,
        terminal,
        inlet,
        outlets,
        pumps: Mutex::new(pumps),
        killed_before,
        volumes: Mutex::new(mounted.volumes),
        files: mounted.files,
        network: Mutex::new(start.network.clone()),
    })
}

fn cannot_execute(program: &str, error: &io::Error) -> SetupError {
    let kind = match error.raw_os_error() {
        Some(libc::ENOENT) => StartFailure::NotFound,
        Some(libc::EACCES | libc::ENOEXEC | libc::EISDIR | libc::EPERM | libc::ETXTBSY) => {
            StartFailure::CannotExecute
        }
        _ => StartFailure::Setup,
    };
    let reason = error.raw_os_error().map_or_else(
        || error.to_string(),
        |number| nix::errno::Errno::from_raw(number).desc().to_lowercase(),
    );
    SetupError { kind, message: format!("exec {program}: {reason}") }
}

/// The file to execute, by the rules of a shell, with errors as other container engines tell them.
fn find(program: &str, path: &str, cwd: &Path) -> Result<PathBuf, SetupError> {
    let fail = |kind, reason: &str| {
        Err(SetupError { kind, message: format!("exec: {program:?}: {reason}") })
    };
    if program.contains('/') {
        let file = cwd.join(program);
        return match fs::metadata(&file) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                fail(StartFailure::CannotExecute, "permission denied")
            }
            Err(_) => {
                fail(StartFailure::NotFound, &format!("stat {program}: no such file or directory"))
            }
            Ok(metadata) if metadata.is_dir() => {
                fail(StartFailure::CannotExecute, "is a directory")
            }
            Ok(metadata) if metadata.permissions().mode() & 0o111 == 0 => {
                fail(StartFailure::CannotExecute, "permission denied")
            }
            Ok(_) => Ok(file),
        };
    }
    let mut forbidden = false;
    for folder in path.split(':') {
        let file = cwd.join(folder).join(program);
        match fs::metadata(&file) {
            Ok(metadata) if metadata.is_file() => {
                if metadata.permissions().mode() & 0o111 != 0 && !program.is_empty() {
                    return Ok(file);
                }
                forbidden = true;
            }
            _ => {}
        }
    }
    if forbidden {
        fail(StartFailure::CannotExecute, "permission denied")
    } else {
        fail(StartFailure::NotFound, "executable file not found in $PATH")
    }
}

/// Kills for want of memory since the machine began.
fn out_of_memory_kills() -> u64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

/// A program with its arguments and environment, as the kernel takes them. The C library's own way,
/// which `Command` goes, gives what is no program to a shell.
struct Executable {
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Executable {
    fn new(
        path: &Path,
        program: &str,
        arguments: &[String],
        environment: &[(&str, &str)],
    ) -> Result<Executable, SetupError> {
        let text = |text: Vec<u8>| CString::new(text).context(|| "a NUL byte".to_owned());
        let mut latest: Vec<(&str, &str)> = Vec::new();
        for (name, value) in environment {
            match latest.iter_mut().find(|(other, _)| other == name) {
                Some(entry) => entry.1 = value,
                None => latest.push((name, value)),
            }
        }
        let words = std::iter::once(program).chain(arguments.iter().map(String::as_str));
        Ok(Executable {
            path: text(path.as_os_str().as_bytes().to_vec())?,
            arguments: words.map(|word| text(word.into())).collect::<Result<_, _>>()?,
            environment: latest
                .iter()
                .map(|(name, value)| text(format!("{name}={value}").into()))
                .collect::<Result<_, _>>()?,
        })
    }
}

/// Pointers to strings, with the null that ends them.
fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// What the child does to itself before it executes the program.
struct Child {
    identity: Identity,
    cwd: PathBuf,
    rlimits: Vec<agent_protocol::Rlimit>,
    terminal: bool,
    image: Executable,
}

impl Child {
    /// Becomes the process; returns only where that fails.
    fn become_it(&self) -> io::Result<()> {
        self.prepare()?;
        let (arguments, environment) =
            (pointers(&self.image.arguments), pointers(&self.image.environment));
        // SAFETY: the path and both lists end with a null, and point to strings that `self` holds.
        unsafe {
            libc::execve(self.image.path.as_ptr(), arguments.as_ptr(), environment.as_ptr());
        }
        Err(io::Error::last_os_error())
    }

    fn prepare(&self) -> io::Result<()> {
        nix::unistd::setsid()?;
        if self.terminal {
            // SAFETY: standard input is the terminal, and the argument is a number.
            unsafe { set_controlling_terminal(0, 0) }?;
        }
        // Its own /proc, which shows its own PIDs.
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_PRIVATE | MsFlags::MS_REC,
            None::<&str>,
        )?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)?;
        for limit in &self.rlimits {
            let value = libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard };
            // SAFETY: the structure outlives the call, which only reads it.
            if unsafe { libc::setrlimit64(limit.resource, &raw const value) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: a write of a constant to a file of /proc by plain system calls.
        unsafe {
            let file =
                libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if file >= 0 {
                libc::write(file, c"0".as_ptr().cast(), 1);
                libc::close(file);
            }
        }
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
        let id = &self.identity;
        // SAFETY: the pointer and the count describe the vector; the calls only change this
        // process, which has one thread.
        let changed = unsafe {
            libc::syscall(libc::SYS_setgroups, id.groups.len(), id.groups.as_ptr()) == 0
                && libc::syscall(libc::SYS_setresgid, id.gid, id.gid, id.gid) == 0
        };
        if !changed {
            return Err(io::Error::last_os_error());
        }
        // As root where root may go and the user may not: what other engines do too.
        nix::unistd::chdir(self.cwd.as_os_str().as_bytes())?;
        // SAFETY: as above.
        if unsafe { libc::syscall(libc::SYS_setresuid, id.uid, id.uid, id.uid) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// Our ends of a process's standard streams.
#[derive(Default)]
struct Io {
    terminal: Option<File>,
    stdin: Option<File>,
    stdout: Option<File>,
    stderr: Option<File>,
}

impl Io {
    fn prepare(
        command: &mut Command,
        description: &Description,
        streams: &HashMap<Stream, File>,
    ) -> Result<Io, SetupError> {
        let mut io = Io::default();
        if let Some(size) = description.terminal {
            let pair = openpty(&winsize(size), None).context(|| "terminal".to_owned())?;
            let slave =
                || pair.slave.try_clone().map(Stdio::from).context(|| "terminal".to_owned());
            command.stdin(slave()?).stdout(slave()?).stderr(slave()?);
            io.terminal = Some(File::from(pair.master));
            return Ok(io);
        }
        let attached = |stream| streams.contains_key(&stream);
        if attached(Stream::Stdin) {
            let (ours, theirs) = pipe(OurEnd::Write)?;
            command.stdin(theirs);
            io.stdin = Some(ours);
        } else {
            command.stdin(Stdio::null());
        }
        // Output is always taken: a process must not die of a closed pipe because nobody looks.
        let (ours, theirs) = pipe(OurEnd::Read)?;
        command.stdout(theirs);
        io.stdout = Some(ours);
        let (ours, theirs) = pipe(OurEnd::Read)?;
        command.stderr(theirs);
        io.stderr = Some(ours);
        Ok(io)
    }

    /// Starts the copying.
    fn connect(self, mut streams: HashMap<Stream, File>) -> Result<Connected, SetupError> {
        let failed = || "cannot start copying output".to_owned();
        let mut connected = Connected::default();
        let mut outputs = vec![(self.stdout, Stream::Stdout), (self.stderr, Stream::Stderr)];
        let mut stdin = self.stdin;
        if let Some(master) = self.terminal {
            let clone = || master.try_clone().context(failed);
            (stdin, outputs) = (Some(clone()?), vec![(Some(clone()?), Stream::Stdout)]);
            connected.terminal = Some(master);
        }
        if let Some(to) = stdin {
            let inlet = Inlet::new(to);
            if let Some(stdin) = streams.remove(&Stream::Stdin) {
                inlet.connect(stdin).context(failed)?;
            }
            connected.inlet = Some(inlet);
        }
        for (from, stream) in outputs {
            let Some(from) = from else { continue };
            let (outlet, pump) = Outlet::carry(from, streams.remove(&stream)).context(failed)?;
            connected.outlets.insert(stream, outlet);
            connected.pumps.push(pump);
        }
        Ok(connected)
    }
}

/// What becomes of [`Io`] when it is in use.
#[derive(Default)]
struct Connected {
    terminal: Option<File>,
    inlet: Option<Inlet>,
    outlets: HashMap<Stream, Outlet>,
    /// They end with the output.
    pumps: Vec<JoinHandle<()>>,
}

enum OurEnd {
    Read,
    Write,
}

/// A pipe: our end of it, and the process's.
fn pipe(ours: OurEnd) -> Result<(File, OwnedFd), SetupError> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context(|| "pipe".to_owned())?;
    // Larger pipes mean fewer switches; a refusal costs nothing else.
    let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(streams::CHUNK as i32));
    Ok(match ours {
        OurEnd::Read => (File::from(read), write),
        OurEnd::Write => (File::from(write), read),
    })
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Process {
    /// The host's name for it.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Sends a signal to it, or to the process group it leads. By number: real-time signals have no
    /// name.
    pub fn signal(&self, signal: i32, group: bool) {
        let pid = if group { -self.pid.as_raw() } else { self.pid.as_raw() };
        // SAFETY: the call takes numbers only. It fails for what is no signal, and for a process that
        // has just ended.
        let _ = unsafe { libc::kill(pid, signal) };
    }

    /// Forgets connections that are lost.
    pub fn disconnect(&self) {
        self.outlets.values().for_each(|outlet| outlet.connect(None));
    }

    /// Tells its terminal a new size.
    pub fn resize(&self, size: WindowSize) {
        if let Some(terminal) = &self.terminal {
            let size = winsize(size);
            // SAFETY: the descriptor is open, and the call reads one Winsize.
            let _ = unsafe { set_window_size(terminal.as_raw_fd(), &raw const size) };
        }
    }

    /// Waits for its end, reaping all that comes to us as PID 1 meanwhile, leaves its volumes clean,
    /// and waits for its output to be with the host. With it the kernel ends every process of its
    /// namespace, so the output ends.
    pub fn wait(&self) -> End {
        let (status, killed) = loop {
            match waitpid(None, None) {
                Ok(WaitStatus::Exited(pid, status)) if pid == self.pid => {
                    break (status as u8, false);
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == self.pid => {
                    break (128u8.wrapping_add(signal as i32 as u8), signal == Signal::SIGKILL);
                }
                Ok(_) | Err(nix::Error::EINTR) => {}
                // Without a child there is none to wait for.
                Err(_) => break (255, false),
            }
        };
        // Before the output, which a host that does not read may keep for long.
        drop(taken(&self.volumes));
        let pumps = taken(&self.pumps);
        for pump in pumps {
            let _ = pump.join();
        }
        let out_of_memory = killed && out_of_memory_kills() > self.killed_before;
        End { status, out_of_memory }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_and_missing_ones_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("bin")).unwrap();
        for (name, mode) in [("bin/tool", 0o755), ("bin/plain", 0o644)] {
            fs::write(path(name), "").unwrap();
            fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let look = |program: &str| {
            let search = format!("/none:{}", path("bin").display());
            find(program, &search, folder.path()).map_err(|error| error.kind)
        };
        assert_eq!(look("tool").unwrap(), path("bin/tool"));
        assert_eq!(look("./bin/tool").unwrap(), path("./bin/tool"));
        assert_eq!(look("plain"), Err(StartFailure::CannotExecute));
        assert_eq!(look("bin/plain"), Err(StartFailure::CannotExecute));
        assert_eq!(look("/"), Err(StartFailure::CannotExecute));
        assert_eq!(look("none"), Err(StartFailure::NotFound));
        assert_eq!(look("/none"), Err(StartFailure::NotFound));
        assert_eq!(look(""), Err(StartFailure::NotFound));
    }
}
