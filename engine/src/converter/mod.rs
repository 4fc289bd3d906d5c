//! Reading the layers and archives of strangers in a process that has nothing but these files: one
//! for each task, of this program's own code, in a jail and under a filter of system calls.
//!
//! It is handed the files to read, the file to write, and three pipes: its task, what it says, and
//! its last words. It has no network, sees no other process and an empty root, and is a user of its
//! own where that is possible. A cgroup it has none of its own, since those without privileges can
//! seldom have one: limits of setrlimit(2) bound its memory and the size of its file.

mod child;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use images::Store;
use images::conversion::{self, ConversionError, Converter, Message, Task};
use jail::{Step, User};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::confined::{Confined, StartError, signal_name};
use crate::paths::Paths;

/// The name that the program is called by when it is to be a converter.
const NAME: &str = "vmrun-converter";
/// Bytes of memory that a converter may map. It keeps the tree of all entries: a million of them, with
/// paths of sixty bytes, took 270 MiB, and four million are allowed; beside that a Zstandard window
/// of 128 MiB. Three times as much as those leaves room for long names and attributes.
const MEMORY: u64 = 4 << 30;
/// How long a process that has closed its pipe may take to end.
const END: Duration = Duration::from_secs(10);
/// Bytes of its last words that are repeated.
const LAST_WORDS: u64 = 512;

/// The image store, with a converter that is confined but for these parts.
pub fn store(paths: &Paths, unconfined: &[Step]) -> Result<Store, images::Error> {
    let converter = ConfinedConverter { unconfined: unconfined.to_vec() };
    Ok(Store::open(&paths.images())?.with_converter(Arc::new(converter)))
}

/// To be called first by a program that uses [`store`]: where the process is to be a converter it
/// becomes one, and this does not return.
pub fn become_converter(mut arguments: impl Iterator<Item = OsString>) {
    if arguments.next().is_some_and(|name| name == NAME) {
        std::process::exit(child::live(arguments.next()));
    }
}

/// What a converter is told before it is confined.
#[derive(Debug, Serialize, Deserialize)]
struct Cell {
    uid: u32,
    gid: u32,
    /// Bytes that a file may have.
    file_size: u64,
    /// Bytes of memory that may be mapped.
    memory: u64,
    inputs: Vec<RawFd>,
    output: RawFd,
    /// For the confined process's id.
    pid_pipe: RawFd,
    /// Names of the steps to leave out.
    without: Vec<String>,
}

/// Starts a confined process for each task.
#[derive(Debug)]
struct ConfinedConverter {
    unconfined: Vec<Step>,
}

impl Converter for ConfinedConverter {
    fn run(
        &self,
        task: &Task,
        inputs: Vec<File>,
        output: &File,
        tell: &mut dyn FnMut(Message),
    ) -> Result<(), ConversionError> {
        let failed = |what: &'static str| {
            move |error: io::Error| ConversionError::Process(format!("{what}: {error}"))
        };
        let root = nix::unistd::geteuid().is_root();
        // Held until the process has ended.
        let user = root.then(User::take).transpose().map_err(failed("a user for the converter"))?;
        let pipes = (|| Ok((pipe()?, pipe()?, pipe()?)))();
        let ((task_end, tasks), (mut said, says), (words, last_words)) =
            pipes.map_err(failed("a pipe"))?;
        let numbers: Vec<RawFd> = inputs.iter().map(AsRawFd::as_raw_fd).collect();
        let inherited: Vec<RawFd> = numbers.iter().copied().chain([output.as_raw_fd()]).collect();
        let started = Confined::start(&inherited, |pid_pipe| {
            let cell = Cell {
                uid: user.as_ref().map_or(nix::unistd::geteuid().as_raw(), User::id),
                gid: user.as_ref().map_or(nix::unistd::getegid().as_raw(), User::id),
                file_size: task.output_limit(),
                memory: MEMORY,
                inputs: numbers,
                output: output.as_raw_fd(),
                pid_pipe,
                without: self.unconfined.iter().map(|step| step.name().to_owned()).collect(),
            };
            let mut command = Command::new("/proc/self/exe");
            command.arg0(NAME).arg(serde_json::to_string(&cell).map_err(io::Error::from)?);
            command.stdin(Stdio::from(OwnedFd::from(task_end)));
            command.stdout(Stdio::from(OwnedFd::from(says)));
            command.stderr(Stdio::from(OwnedFd::from(last_words)));
            Ok(command)
        });
        let mut process = match started {
            Ok(process) => process,
            Err(StartError::Program(error)) => return Err(failed("/proc/self/exe")(error)),
            Err(StartError::Refused) => {
                let silent = || "it ended before it was confined".to_owned();
                return Err(conversion::first_word(&mut said)
                    .unwrap_or_else(|| ConversionError::Process(silent())));
            }
        };
        let end = conversion::ask(tasks, &mut said, task, tell);
        if !matches!(end, Err(None)) {
            // Nothing that it does from now on is of use, and it must not touch the file any more.
            process.kill();
        }
        let status = process.wait(END).map_err(failed("waiting for the converter"))?;
        end.map_err(|error| {
            error.unwrap_or_else(|| ConversionError::Process(describe(status, words)))
        })
    }
}

/// The ends to read from and to write to.
fn pipe() -> io::Result<(File, File)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    Ok((read.into(), write.into()))
}

/// What became of a converter that ended without a result.
fn describe(status: ExitStatus, words: File) -> String {
    let what = match (status.signal(), status.code()) {
        (Some(signal), _) => {
            let why = match Signal::try_from(signal) {
                Ok(Signal::SIGSYS) => ", for a system call that it may not make",
                Ok(Signal::SIGKILL) => ", by somebody or because the host's memory was short",
                _ => "",
            };
            format!("its process was killed by {}{why}", signal_name(signal))
        }
        (None, Some(code)) => format!("its process ended with status {code} and without a result"),
        (None, None) => "its process ended without a result".to_owned(),
    };
    let mut bytes = Vec::new();
    // It has ended, and nobody else has the other end.
    let _ = words.take(LAST_WORDS).read_to_end(&mut bytes);
    let text: String = String::from_utf8_lossy(&bytes).trim().replace(char::is_control, " ");
    if text.is_empty() { what } else { format!("{what}; it said: {text}") }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn an_end_is_told_with_the_last_words() {
        let ended = |status, said: &str| {
            let (words, mut says) = pipe().unwrap();
            says.write_all(said.as_bytes()).unwrap();
            drop(says);
            describe(ExitStatus::from_raw(status), words)
        };
        assert!(ended(31, "").contains("system call that it may not make"));
        assert!(ended(9, "").contains("SIGKILL"));
        let text = ended(6, "\x1b[2Jmemory allocation\nfailed\n");
        assert!(text.contains("SIGABRT"), "{text}");
        assert!(text.ends_with("[2Jmemory allocation failed"), "{text}");
        assert!(ended(3 << 8, "").contains("status 3"));
        assert!(ended(6, &"x".repeat(60_000)).len() < 1000);
    }
}
