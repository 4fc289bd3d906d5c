//! `--core-scheduling`, by what the kernel says of the process.

#![allow(unsafe_code, reason = "prctl options that no crate knows")]
#![allow(clippy::unwrap_used)]

use std::io;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The cookie of a process (`PR_SCHED_CORE_GET`), 0 if it has none.
fn cookie(process: u32) -> io::Result<u64> {
    let mut cookie = 0u64;
    // SAFETY: the last argument points to the eight bytes that the kernel fills, which outlive the call.
    let result = unsafe {
        libc::prctl(62, 0, libc::c_ulong::from(process), 0, &raw mut cookie as libc::c_ulong)
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_machine_has_a_core_to_itself_or_does_not_start() {
    let folder = tempfile::tempdir().unwrap();
    let start = |name: &str, arguments: &[&str]| {
        let socket = folder.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmrun-vmm"));
        command.arg("--api-sock").arg(&socket).args(arguments);
        let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut running = Running(child);
        while !socket.exists() && running.0.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(10));
        }
        running
    };
    match cookie(0) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let mut refused = start("refused", &["--core-scheduling"]);
            let mut said = String::new();
            io::Read::read_to_string(&mut refused.0.stderr.take().unwrap(), &mut said).unwrap();
            assert!(said.contains("CONFIG_SCHED_CORE") && said.lines().count() == 1, "{said}");
            assert_eq!(refused.0.wait().unwrap().code(), Some(1));
        }
        // The processor has no SMT.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
            assert!(start("alone", &["--core-scheduling"]).0.try_wait().unwrap().is_none());
        }
        Err(error) => panic!("{error}"),
        Ok(own) => {
            let machines = [
                start("one", &["--core-scheduling"]),
                start("two", &["--core-scheduling"]),
                start("none", &[]),
            ];
            let [one, two, none] =
                machines.each_ref().map(|machine| cookie(machine.0.id()).unwrap());
            assert!(one != two && one != own && two != own && one != 0 && two != 0);
            assert_eq!(none, own);
        }
    }
}
