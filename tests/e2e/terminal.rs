//! What a user at a terminal sees: `-t` and `-it`.

#![allow(unsafe_code, reason = "runs code between fork and exec")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use e2e::Session;
use nix::pty::{OpenptyResult, openpty};
use nix::sys::termios::{LocalFlags, tcgetattr};
use rustix::termios::{Winsize, tcsetwinsize};

const BASE: &str = "localhost/base";
/// A hang must end; this measures nothing.
const LIMIT: Duration = Duration::from_secs(300);

/// A command at a terminal of its own, which it controls.
struct AtTerminal {
    child: Child,
    keyboard: File,
    /// The user's side, kept to see how it is left.
    terminal: OwnedFd,
    screen: Arc<Mutex<Vec<u8>>>,
}

impl AtTerminal {
    fn start(mut command: Command, rows: u16, columns: u16) -> AtTerminal {
        let OpenptyResult { master, slave } = openpty(None, None).unwrap();
        tcsetwinsize(&slave, size(rows, columns)).unwrap();
        for set in [Command::stdin, Command::stdout, Command::stderr] {
            set(&mut command, slave.try_clone().unwrap());
        }
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                let stdin = std::io::stdin();
                Ok(rustix::process::ioctl_tiocsctty(stdin.as_fd())?)
            });
        }
        let child = command.spawn().unwrap();
        let screen = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, into) = (File::from(master.try_clone().unwrap()), screen.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                into.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        AtTerminal { child, keyboard: master.into(), terminal: slave, screen }
    }

    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    fn type_keys(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until `text` is on the screen, as often as `times`.
    #[track_caller]
    fn shows(&mut self, text: &str, times: usize) {
        let since = Instant::now();
        while self.screen().matches(text).count() < times {
            let ended = self.child.try_wait().unwrap();
            let waiting = ended.is_none() && since.elapsed() < LIMIT;
            assert!(waiting, "no {text:?} ({ended:?}) on the screen: {:?}", self.screen());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal).unwrap().local_flags.contains(LocalFlags::ICANON)
    }

    #[track_caller]
    fn ends(&mut self) -> ExitStatus {
        let since = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(since.elapsed() < LIMIT, "no end; on the screen: {:?}", self.screen());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for AtTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

#[test]
fn a_shell_at_a_terminal() {
    let session = Session::prepared();
    let mut shell = AtTerminal::start(session.command(["run", "-it", "--rm", BASE]), 31, 97);
    shell.shows("# ", 1);
    assert!(shell.is_raw());
    // What is typed is shown once, by the guest, and so are the ends of lines.
    shell
        .type_keys("test -t 0 && test -t 1 && test -t 2 && echo all-$((3 + 4)); tty; echo $TERM\n");
    shell.shows("all-7\r\n/dev/pts/0\r\nxterm\r\n", 1);
    assert_eq!(shell.screen().matches("all-$((3").count(), 1, "{:?}", shell.screen());
    shell.type_keys("stty size\n");
    shell.shows("31 97\r\n", 1);

    // The kernel tells the terminal's foreground, which is the command, of a new size.
    tcsetwinsize(&shell.keyboard, size(12, 40)).unwrap();
    let since = Instant::now();
    while !shell.screen().contains("12 40\r\n") {
        assert!(since.elapsed() < LIMIT, "{:?}", shell.screen());
        shell.type_keys("stty size\n");
        std::thread::sleep(Duration::from_millis(300));
    }

    // Ctrl-C ends what runs in the shell, neither the shell nor the command.
    shell.type_keys("echo be''gun; sleep 600; echo status $?\n");
    shell.shows("begun\r\n", 1);
    shell.type_keys("\x03");
    shell.shows("^C", 1);
    shell.type_keys("echo al''ive $?\n");
    shell.shows("alive 130\r\n", 1);
    // Ctrl-D ends the shell, with the status of the last command.
    shell.type_keys("(exit 5)\n");
    // Not before the shell reads keys itself again: its terminal would take it for the end of a line.
    shell.shows("(exit 5)\r\n/ # \u{1b}[6n", 1);
    shell.type_keys("\x04");
    assert_eq!(shell.ends().code(), Some(5), "{:?}", shell.screen());
    assert!(!shell.is_raw(), "the terminal was left raw");
}

#[test]
fn a_killed_shell_leaves_the_terminal_as_it_was() {
    let session = Session::prepared();
    let mut shell = AtTerminal::start(session.command(["run", "-it", "--rm", BASE]), 24, 80);
    shell.shows("# ", 1);
    assert!(shell.is_raw());
    let pid = nix::unistd::Pid::from_raw(shell.child.id() as i32);
    // A shell at a terminal does not heed SIGTERM; SIGHUP ends it, as when a window closes.
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    assert_eq!(shell.ends().code(), Some(129), "{:?}", shell.screen());
    assert!(!shell.is_raw(), "the terminal was left raw");
}

#[test]
fn a_terminal_for_output_alone_gets_no_keys() {
    let session = Session::prepared();
    let script = "test -t 1 && echo re''ady; read key; echo \"read $key\"; sleep 600";
    let command = session.command(["run", "-t", "--rm", BASE, "sh", "-c", script]);
    let mut run = AtTerminal::start(command, 24, 80);
    run.shows("ready", 1);
    assert!(!run.is_raw());
    // docs/run.md: with a terminal, a signal to the command ends the machine.
    run.type_keys("not for the guest\n\x03");
    assert_eq!(run.ends().code(), Some(130), "{:?}", run.screen());
    assert!(!run.screen().contains("read not"), "{:?}", run.screen());
}

#[test]
fn input_that_is_no_terminal_is_refused() {
    let session = Session::prepared();
    session.run(["-it", BASE, "true"]).exits(125).complains(&["the input device is not a TTY"]);
    // Without -i the terminal is the guest's own affair: standard error joins its output.
    let done = session.run(["-t", BASE, "sh", "-c", "test -t 1 && echo out; echo err >&2"]);
    let done = done.exits(0).prints("out\r\nerr\r\n");
    assert_eq!(done.err(), "");
}

#[test]
fn the_streams_of_a_command_at_a_terminal_stay_apart_without_t() {
    let session = Session::prepared();
    // As at a prompt: input from the terminal, output into a file.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    let mut shell = Command::new("sh");
    shell
        .env("VMRUN_ROOT", session.root())
        .args(["-c", "exec vmrun run -i --rm \"$1\" cat >\"$2\""]);
    shell.args(["sh", BASE]).arg(&path);
    let mut run = AtTerminal::start(shell, 24, 80);
    run.type_keys("typed\n\x04");
    assert_eq!(run.ends().code(), Some(0), "{:?}", run.screen());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "typed\n");
}
