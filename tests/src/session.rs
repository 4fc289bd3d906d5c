//! Running `vmrun` as a user does, with a limit on time.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a command may take before the test gives up. Not a measure of anything: the lab is
/// slow, and a hang must end.
const LIMIT: Duration = Duration::from_secs(200);
/// Status that tells `xtask test` that the machine under the tests is to blame.
const MACHINE_STALLED: i32 = 125;

/// A state directory with the test images in it, and commands run against it.
pub struct Session {
    root: PathBuf,
    // Removed at the end; absent for the session on the prepared root.
    _folder: Option<tempfile::TempDir>,
}

impl Session {
    /// On the root that `prepare` filled, shared by all tests: images and kernels are there.
    pub fn prepared() -> Session {
        Session { root: crate::images::assets().join("root"), _folder: None }
    }

    /// On an empty root of its own.
    pub fn empty() -> Session {
        let folder = tempfile::Builder::new().prefix("vmrun-e2e").tempdir().unwrap();
        Session { root: folder.path().join("root"), _folder: Some(folder) }
    }

    /// The state directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `vmrun ARGUMENTS`, ready to be changed further.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new("vmrun");
        command.args(arguments).env("VMRUN_ROOT", &self.root).stdin(Stdio::null());
        command
    }

    /// Runs `vmrun ARGUMENTS` to its end.
    pub fn vmrun<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Finished {
        Running::start(&mut self.command(arguments)).finish()
    }

    /// Runs `vmrun run --rm ARGUMENTS` to its end: most tests are one of these.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Finished {
        Running::start(self.command(["run", "--rm"]).args(arguments)).finish()
    }

    /// Starts `vmrun run --rm ARGUMENTS`.
    pub fn start<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Running {
        Running::start(self.command(["run", "--rm"]).args(arguments))
    }
}

/// A command under way, its output being collected.
pub struct Running {
    child: Child,
    name: String,
    stdin: Option<ChildStdin>,
    stdout: Collected,
    stderr: Collected,
}

type Collected = (std::sync::Arc<std::sync::Mutex<Vec<u8>>>, JoinHandle<()>);

fn collect(mut from: impl Read + Send + 'static) -> Collected {
    let bytes = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let into = bytes.clone();
    let thread = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            into.lock().unwrap().extend_from_slice(&buffer[..count]);
        }
    });
    (bytes, thread)
}

impl Running {
    /// Starts any command with its output collected.
    pub fn start(command: &mut Command) -> Running {
        let name = format!("{command:?}");
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let stdout = collect(child.stdout.take().unwrap());
        let stderr = collect(child.stderr.take().unwrap());
        let stdin = child.stdin.take();
        Running { child, name, stdin, stdout, stderr }
    }

    /// Process id of the command.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Sends the command a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Writes to the command's standard input, which must be piped.
    pub fn write(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// What the command has written to standard output by now.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout.0.lock().unwrap()).into_owned()
    }

    fn said(&self) -> String {
        format!("stdout: {}\nstderr: {}", self.stdout(), self.stderr())
    }

    /// An emulated machine in which time stands still tells nothing of the program, so the group
    /// begins again on another machine. A program that hangs hangs there too. (The cause of all such
    /// machines that were looked at is gone: see the lab's `tsc`.)
    fn took_too_long(&self, what: &str) -> ! {
        let message = format!("{}: {what} in {LIMIT:?}\n{}", self.name, self.said());
        if std::env::var_os("VMRUN_LAB").is_some_and(|lab| lab == "vm") {
            // Not by eprintln, which a test captures.
            let _ = std::io::stderr().write_all(message.as_bytes());
            std::process::exit(MACHINE_STALLED);
        }
        panic!("{message}");
    }

    fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.0.lock().unwrap()).into_owned()
    }

    /// Waits until standard output contains `text`; fails when the command ends without it.
    pub fn wait_for(&mut self, text: &str) {
        let since = Instant::now();
        loop {
            let ended = self.child.try_wait().unwrap();
            if self.stdout().contains(text) {
                return;
            }
            if ended.is_some() {
                panic!("{}: no {text:?} ({ended:?})\n{}", self.name, self.said());
            }
            if since.elapsed() > LIMIT {
                self.took_too_long(&format!("no {text:?}"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Closes standard input and waits for the end; a command that takes too long is killed.
    pub fn finish(mut self) -> Finished {
        drop(self.stdin.take());
        let since = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if since.elapsed() > LIMIT {
                self.child.kill().unwrap();
                self.took_too_long("no end");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        self.stdout.1.join().unwrap();
        self.stderr.1.join().unwrap();
        let stdout = std::mem::take(&mut *self.stdout.0.lock().unwrap());
        let stderr = std::mem::take(&mut *self.stderr.0.lock().unwrap());
        Finished { name: self.name, status, stdout, stderr }
    }
}

/// A command that ended.
pub struct Finished {
    name: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All it wrote to standard output.
    pub stdout: Vec<u8>,
    /// All it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Fails the test unless the command ended with `code`.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        let got = self.status.code().unwrap_or(-self.status.signal().unwrap_or(0));
        assert_eq!(got, code, "{}\nstdout: {}\nstderr: {}", self.name, self.out(), self.err());
        self
    }

    /// Fails the test unless standard output is exactly `text`.
    #[track_caller]
    pub fn prints(self, text: &str) -> Self {
        assert_eq!(self.out(), text, "{}\nstderr: {}", self.name, self.err());
        self
    }

    /// Fails the test unless standard error is one line that contains each of `parts`.
    #[track_caller]
    pub fn complains(self, parts: &[&str]) -> Self {
        let err = self.err();
        assert_eq!(err.trim_end().lines().count(), 1, "{}: not one line: {err}", self.name);
        for part in parts {
            assert!(err.contains(part), "{}: no {part:?} in: {err}", self.name);
        }
        self
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}
