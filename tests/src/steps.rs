//! A command followed at each step: a system call, of it or of the processes it starts, that changes
//! something outside of a process, and may stay when that is gone. At any step the command can be
//! killed, or the call refused.
//!
//! Nothing in the program knows of this: its threads and children stop at their system calls for
//! ptrace(2). A child is let go when it becomes another program than vmrun's, or installs its filter of
//! system calls: then it is a machine or a converter at work.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc::{self, c_long, user_regs_struct};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(200);
/// How long those that the command leaves may take to be let go.
const LEFT: Duration = Duration::from_secs(2);
/// Of steps with one name that are told apart by a number, at most so many are.
const NUMBERED: usize = 12;
const PROGRAM: &str = "vmrun";

/// What is done at the step of this name, the first time that it is about to be made.
#[derive(Clone, Debug)]
pub enum Deed {
    /// Nothing, at none.
    Watch,
    /// The command is killed instead; where a child of it was about to, that does so afterwards.
    Kill(String),
    /// The call fails with this error, each time.
    Refuse(String, Errno),
}

/// How it went.
#[derive(Debug)]
pub struct Followed {
    /// Names of the steps, in the order in which they were first made.
    pub steps: Vec<String>,
    /// Whether the step of the deed was reached.
    pub reached: bool,
    /// How the command ended.
    pub end: WaitStatus,
    /// What it wrote to standard output.
    pub out: String,
    /// What it wrote to standard error.
    pub err: String,
}

/// Runs the command to its end, with /dev/null as standard input. In names of steps `root` is `ROOT`.
pub fn follow(command: &Command, root: &Path, deed: &Deed) -> Followed {
    // Only the thread that traces can; and it is to wait for no other thread's children.
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| Follower::start(command, root, deed).run());
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

struct Follower<'a> {
    root: String,
    deed: &'a Deed,
    main: Pid,
    /// Those that are traced, each with its process.
    tasks: BTreeMap<Pid, Pid>,
    /// What processes are called.
    roles: BTreeMap<Pid, String>,
    /// Whether the command is vmrun by now.
    begun: bool,
    seen: BTreeSet<String>,
    numbers: BTreeMap<String, usize>,
    steps: Vec<String>,
    reached: bool,
    /// Whose call is being refused.
    refused: BTreeSet<Pid>,
    /// Stands at the step until the command is gone.
    held: Option<Pid>,
    output: File,
    errors: File,
}

impl<'a> Follower<'a> {
    #[allow(clippy::zombie_processes, reason = "`watch` waits for it")]
    fn start(command: &Command, root: &Path, deed: &'a Deed) -> Follower<'a> {
        // It waits until it is traced.
        let mut shell = Command::new("sh");
        shell.args(["-c", "read go && exec \"$@\" </dev/null", "sh"]);
        shell.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            shell.env(name, value.unwrap());
        }
        let (output, errors) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        shell.stdout(output.try_clone().unwrap()).stderr(errors.try_clone().unwrap());
        let mut child = shell.stdin(Stdio::piped()).spawn().unwrap();
        let main = Pid::from_raw(child.id() as i32);
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACEEXEC
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK;
        ptrace::seize(main, options).unwrap();
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        Follower {
            root: root.to_str().unwrap().to_owned(),
            deed,
            main,
            tasks: BTreeMap::from([(main, main)]),
            roles: BTreeMap::new(),
            begun: false,
            seen: BTreeSet::new(),
            numbers: BTreeMap::new(),
            steps: Vec::new(),
            reached: false,
            refused: BTreeSet::new(),
            held: None,
            output,
            errors,
        }
    }

    fn run(mut self) -> Followed {
        let ended = AtomicBool::new(false);
        let main = self.main;
        let end = std::thread::scope(|scope| {
            scope.spawn(|| {
                let since = Instant::now();
                while !ended.load(Ordering::Relaxed) {
                    if since.elapsed() > LIMIT {
                        let _ = kill(main, Signal::SIGKILL);
                    }
                    std::thread::park_timeout(Duration::from_millis(20));
                }
            });
            let end = self.watch();
            ended.store(true, Ordering::Relaxed);
            end
        });
        self.let_go();
        let text = |mut file: &File| {
            let mut bytes = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (out, err) = (text(&self.output), text(&self.errors));
        Followed { steps: self.steps, reached: self.reached, end, out, err }
    }

    /// Until the command has ended.
    fn watch(&mut self) -> WaitStatus {
        loop {
            let status = wait(WaitPidFlag::empty()).unwrap();
            let pid = status.pid().unwrap();
            match status {
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                    self.tasks.remove(&pid);
                    if pid == self.main {
                        return status;
                    }
                }
                _ => self.stopped(pid, status),
            }
        }
    }

    /// Leaves those alone that go on without the command.
    fn let_go(&mut self) {
        if let Some(held) = self.held.take()
            && ptrace::detach(held, None).is_ok()
        {
            self.tasks.remove(&held);
        }
        for task in self.tasks.keys() {
            let _ = ptrace::interrupt(*task);
        }
        let since = Instant::now();
        while !self.tasks.is_empty() && since.elapsed() < LEFT {
            match wait(WaitPidFlag::WNOHANG) {
                Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(1)),
                Ok(status) => {
                    let pid = status.pid().unwrap();
                    let signal = match status {
                        WaitStatus::Stopped(_, signal) => Some(signal),
                        _ => None,
                    };
                    let _ = ptrace::detach(pid, signal);
                    self.tasks.remove(&pid);
                }
                Err(_) => return,
            }
        }
    }

    fn stopped(&mut self, pid: Pid, status: WaitStatus) {
        self.tasks.entry(pid).or_insert_with(|| process_of(pid).unwrap_or(pid));
        let mut signal = None;
        let mut follows = true;
        match status {
            WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_EXEC) => follows = self.became(pid),
            WaitStatus::PtraceSyscall(_) => {
                let entered = ptrace::syscall_info(pid)
                    .is_ok_and(|info| info.op == libc::PTRACE_SYSCALL_INFO_ENTRY);
                if let Ok(registers) = ptrace::getregs(pid) {
                    match entered {
                        true => follows = self.enters(pid, registers),
                        false => self.leaves(pid, registers),
                    }
                }
            }
            WaitStatus::Stopped(_, delivered) => signal = Some(delivered),
            _ => {}
        }
        if self.held == Some(pid) {
            return;
        }
        // One that was killed meanwhile is no error.
        if follows {
            let _ = ptrace::syscall(pid, signal);
        } else if ptrace::detach(pid, signal).is_ok() {
            self.tasks.remove(&pid);
        }
    }

    /// It is another program now: whether that is one of ours.
    fn became(&mut self, pid: Pid) -> bool {
        let program = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let program =
            String::from_utf8_lossy(program.split(|byte| *byte == 0).next().unwrap_or(&[]))
                .into_owned();
        let name =
            Path::new(&program).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let ours = name.starts_with(PROGRAM);
        if pid == self.main {
            self.begun |= ours;
            return true;
        }
        self.roles.insert(pid, name);
        ours
    }

    /// At the begin of a system call: whether it is to be followed further.
    fn enters(&mut self, pid: Pid, registers: user_regs_struct) -> bool {
        let process = self.tasks[&pid];
        let call = registers.orig_rax as c_long;
        if call == libc::SYS_seccomp && process != self.main {
            return false;
        }
        let Some(name) = self.begun.then(|| self.name(pid, call, &registers)).flatten() else {
            return true;
        };
        let name = format!("{}: {name}", self.role(process));
        let Some(step) = self.numbered(name) else { return true };
        if self.seen.insert(step.clone()) {
            self.steps.push(step.clone());
        }
        match self.deed {
            Deed::Kill(at) if *at == step && !self.reached => {
                self.reached = true;
                kill(self.main, Signal::SIGKILL).unwrap();
                self.held = (process != self.main).then_some(pid);
                true
            }
            Deed::Refuse(at, _) if *at == step => {
                self.reached = true;
                self.refused.insert(pid);
                // No system call has this number.
                let _ = ptrace::setregs(pid, user_regs_struct { orig_rax: u64::MAX, ..registers });
                true
            }
            _ => true,
        }
    }

    fn leaves(&mut self, pid: Pid, registers: user_regs_struct) {
        if let (Deed::Refuse(_, error), true) = (self.deed, self.refused.remove(&pid)) {
            let rax = (-i64::from(*error as i32)) as u64;
            let _ = ptrace::setregs(pid, user_regs_struct { rax, ..registers });
        }
    }

    fn role(&mut self, process: Pid) -> &str {
        if process == self.main {
            return "command";
        }
        // Between fork and exec.
        self.roles.entry(process).or_insert_with(|| {
            let parent = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            format!("child of {}", parent.trim())
        })
    }

    /// Steps of which one is like the other only by name have numbers.
    fn numbered(&mut self, name: String) -> Option<String> {
        let alike = ["socket:", "clone", "fork", "kill", "signal"];
        if !alike.iter().any(|part| name.contains(part)) {
            return Some(name);
        }
        let number = self.numbers.entry(name.clone()).or_default();
        *number += 1;
        (*number <= NUMBERED).then(|| format!("{name} #{number}"))
    }

    /// What a step is called; none where the call changes nothing outside.
    fn name(&self, pid: Pid, call: c_long, registers: &user_regs_struct) -> Option<String> {
        let arguments = [
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
            registers.r9,
        ];
        let path = |at: usize| self.plain(&text_at(pid, arguments[at]));
        let beneath = |folder: usize, name: usize| {
            let name = text_at(pid, arguments[name]);
            let folder = match arguments[folder] as i32 {
                libc::AT_FDCWD => PathBuf::new(),
                number => descriptor(pid, number as u64),
            };
            self.plain(&folder.join(name).to_string_lossy())
        };
        let file = |at: usize| self.plain(&descriptor(pid, arguments[at]).to_string_lossy());
        const CHANGES: i32 = libc::O_CREAT | libc::O_TRUNC;
        Some(match call {
            libc::SYS_openat if arguments[2] as i32 & CHANGES != 0 => {
                let path = beneath(0, 1);
                // Those are always there, and not cut off.
                if path.starts_with("/proc/") || path.starts_with("/sys/") {
                    return None;
                }
                format!("openat {path}")
            }
            libc::SYS_open if arguments[1] as i32 & CHANGES != 0 => format!("open {}", path(0)),
            libc::SYS_creat => format!("creat {}", path(0)),
            libc::SYS_mkdir => format!("mkdir {}", path(0)),
            libc::SYS_mkdirat => {
                let path = beneath(0, 1);
                // A root that nobody else sees is made there.
                if path.starts_with("/proc") {
                    return None;
                }
                format!("mkdirat {path}")
            }
            libc::SYS_mknod => format!("mknod {}", path(0)),
            libc::SYS_mknodat => format!("mknodat {}", beneath(0, 1)),
            libc::SYS_rmdir => format!("rmdir {}", path(0)),
            libc::SYS_unlink => format!("unlink {}", path(0)),
            libc::SYS_unlinkat => format!("unlinkat {}", beneath(0, 1)),
            libc::SYS_rename => format!("rename {}", path(1)),
            libc::SYS_renameat | libc::SYS_renameat2 => format!("renameat {}", beneath(2, 3)),
            libc::SYS_link => format!("link {}", path(1)),
            libc::SYS_linkat => format!("linkat {}", beneath(2, 3)),
            libc::SYS_symlink => format!("symlink {}", path(1)),
            libc::SYS_symlinkat => format!("symlinkat {}", beneath(1, 2)),
            libc::SYS_chmod => format!("chmod {}", path(0)),
            libc::SYS_fchmodat => format!("fchmodat {}", beneath(0, 1)),
            libc::SYS_chown | libc::SYS_lchown => format!("chown {}", path(0)),
            libc::SYS_fchownat => format!("fchownat {}", beneath(0, 1)),
            libc::SYS_truncate => format!("truncate {}", path(0)),
            libc::SYS_ftruncate => format!("ftruncate {}", file(0)),
            libc::SYS_fallocate => format!("fallocate {}", file(0)),
            libc::SYS_fchmod => format!("fchmod {}", file(0)),
            libc::SYS_fchown => format!("fchown {}", file(0)),
            libc::SYS_write
            | libc::SYS_writev
            | libc::SYS_pwrite64
            | libc::SYS_pwritev
            | libc::SYS_pwritev2
            | libc::SYS_sendto
            | libc::SYS_sendmsg
            | libc::SYS_sendmmsg
            | libc::SYS_sendfile => {
                let file = file(0);
                // An event of its own.
                if file.starts_with("anon_inode:") {
                    return None;
                }
                format!("write {file}")
            }
            libc::SYS_copy_file_range => format!("copy_file_range {}", file(2)),
            libc::SYS_ioctl => match arguments[1] {
                // FICLONE and TUNSETIFF.
                0x4004_9409 => format!("ioctl FICLONE {}", file(0)),
                0x4004_54ca => format!("ioctl TUNSETIFF {}", path(2)),
                _ => return None,
            },
            libc::SYS_bind => format!("bind {}", self.plain(&address(pid, arguments[1]))),
            libc::SYS_connect => format!("connect {}", self.plain(&address(pid, arguments[1]))),
            libc::SYS_clone => "clone".to_owned(),
            libc::SYS_clone3 => "clone3".to_owned(),
            libc::SYS_fork => "fork".to_owned(),
            libc::SYS_vfork => "vfork".to_owned(),
            // It is sought in one folder after the other.
            libc::SYS_execve => {
                let path = PathBuf::from(path(0));
                format!("execve {}", path.file_name().unwrap_or_default().display())
            }
            libc::SYS_kill | libc::SYS_tgkill => "kill".to_owned(),
            libc::SYS_pidfd_send_signal => "signal".to_owned(),
            libc::SYS_pidfd_open => "pidfd_open".to_owned(),
            libc::SYS_prctl => match arguments[0] as i32 {
                libc::PR_SET_PDEATHSIG => "prctl PR_SET_PDEATHSIG".to_owned(),
                _ => return None,
            },
            libc::SYS_setgroups => "setgroups".to_owned(),
            libc::SYS_setresuid => "setresuid".to_owned(),
            libc::SYS_setresgid => "setresgid".to_owned(),
            libc::SYS_unshare => "unshare".to_owned(),
            libc::SYS_setns => "setns".to_owned(),
            libc::SYS_sethostname => "sethostname".to_owned(),
            libc::SYS_mount => format!("mount {}", path(1)),
            libc::SYS_move_mount => format!("move_mount {}", beneath(2, 3)),
            libc::SYS_pivot_root => "pivot_root".to_owned(),
            libc::SYS_exit_group => "exit_group".to_owned(),
            _ => return None,
        })
    }

    /// A name without what is different each time.
    fn plain(&self, text: &str) -> String {
        plain(&text.replace(&self.root, "ROOT"))
    }
}

/// Numbers are `N`, ids of hexadecimal digits `ID`, and random ends of temporary files `*`.
fn plain(text: &str) -> String {
    let mut result = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix(".tmp")
            && after.len() >= 6
            && after.as_bytes()[..6].iter().all(u8::is_ascii_alphanumeric)
        {
            result += ".tmp*";
            rest = &after[6..];
            continue;
        }
        let length = |is: fn(u8) -> bool| rest.bytes().take_while(|byte| is(*byte)).count();
        let (digits, hex) =
            (length(|byte| byte.is_ascii_digit()), length(|byte| byte.is_ascii_hexdigit()));
        let (name, length) = match (digits, hex) {
            (_, 12..) => ("ID", hex),
            (1.., _) => ("N", digits),
            _ => ("", 0),
        };
        if length == 0 {
            result.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            result += name;
            rest = &rest[length..];
        }
    }
    result
}

/// The state of any child of this thread's, or of what it traces.
fn wait(flags: WaitPidFlag) -> nix::Result<WaitStatus> {
    let own = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
    loop {
        match waitpid(None, Some(own | flags)) {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// The process that a task is of.
fn process_of(task: Pid) -> Option<Pid> {
    let status = fs::read_to_string(format!("/proc/{task}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    line.trim().parse().ok().map(Pid::from_raw)
}

fn descriptor(pid: Pid, number: u64) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap_or_default()
}

fn bytes_at(pid: Pid, address: u64, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; most];
    let Ok(memory) = File::open(format!("/proc/{pid}/mem")) else { return Vec::new() };
    let count = memory.read_at(&mut bytes, address).unwrap_or(0);
    bytes.truncate(count);
    bytes
}

fn text_at(pid: Pid, address: u64) -> String {
    let bytes = bytes_at(pid, address, 4096);
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or(&[]);
    String::from_utf8_lossy(text).into_owned()
}

/// A socket's address: of Unix sockets the path.
fn address(pid: Pid, at: u64) -> String {
    let bytes = bytes_at(pid, at, 110);
    match bytes.first().map(|family| i32::from(*family)) {
        Some(libc::AF_UNIX) => {
            let path = bytes[2..].split(|byte| *byte == 0).next().unwrap_or(&[]);
            String::from_utf8_lossy(path).into_owned()
        }
        Some(family) => format!("family {family}"),
        None => String::new(),
    }
}
