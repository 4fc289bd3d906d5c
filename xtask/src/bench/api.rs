//! A monitor under its API: how soon it listens, and how soon a snapshot runs again.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::monitor::{CMDLINE, MEMORY_MIB, Memory, Monitor, READY_PORT, memory_of};

const LIMIT: Duration = Duration::from_secs(60);

/// A monitor that serves its API, alone with what it is told.
pub struct Served<'a> {
    monitor: &'a Monitor,
    work: &'a Path,
    process: Child,
    /// From the start of the process until it took a connection.
    pub to_socket: Duration,
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a restored machine took, from the request on.
pub struct Load {
    /// Until the request was answered.
    pub to_answer: Duration,
    /// Until the guest answered on a connection over vsock.
    pub to_guest: Duration,
}

impl<'a> Served<'a> {
    /// Starts one; none for a monitor that has no such API.
    pub fn start(monitor: &'a Monitor, work: &'a Path) -> Result<Option<Served<'a>>> {
        let (program, more) = match monitor {
            Monitor::Vmrun(program) => (program, [].as_slice()),
            Monitor::Firecracker(program) => (program, ["--no-seccomp"].as_slice()),
            Monitor::Qemu(_) => return Ok(None),
        };
        let socket = work.join("api");
        for path in [&socket, &work.join("v")] {
            let _ = fs::remove_file(path);
        }
        let mut command = Command::new(program);
        command.arg("--api-sock").arg(&socket).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let started = Instant::now();
        let process = command.spawn()?;
        let mut served = Served { monitor, work, process, to_socket: Duration::ZERO };
        while UnixStream::connect(&socket).is_err() {
            ensure!(started.elapsed() < LIMIT, "{} does not listen", monitor.name());
            thread::sleep(Duration::from_micros(20));
        }
        served.to_socket = started.elapsed();
        Ok(Some(served))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.work.join(name)
    }

    /// Asks for something that answers nothing.
    fn done(&self, method: &str, path: &str, body: &Value) -> Result<()> {
        let body = body.to_string();
        let mut stream = UnixStream::connect(self.path("api"))?;
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: l\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all((head + &body).as_bytes())?;
        let mut answer = [0; 1024];
        let got = stream.read(&mut answer)?;
        let text = String::from_utf8_lossy(&answer[..got]);
        ensure!(text.starts_with("HTTP/1.1 204"), "{method} {path}: {text}");
        Ok(())
    }

    /// Boots a guest to its init; the time from `InstanceStart` on.
    pub fn boot(&self, kernel: &Path, initrd: &Path) -> Result<Duration> {
        let notice = self.path(&format!("v_{READY_PORT}"));
        let _ = fs::remove_file(&notice);
        let listener = UnixListener::bind(notice)?;
        let source =
            json!({ "kernel_image_path": kernel, "initrd_path": initrd, "boot_args": CMDLINE });
        self.done("PUT", "/boot-source", &source)?;
        self.done(
            "PUT",
            "/machine-config",
            &json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB }),
        )?;
        self.done("PUT", "/vsock", &json!({ "guest_cid": 3, "uds_path": self.path("v") }))?;
        self.done("PUT", "/entropy", &json!({}))?;
        let started = Instant::now();
        self.done("PUT", "/actions", &json!({ "action_type": "InstanceStart" }))?;
        listener.accept()?;
        Ok(started.elapsed())
    }

    /// Puts the machine into files; the bytes of its state.
    pub fn save(&self) -> Result<u64> {
        self.done("PATCH", "/vm", &json!({ "state": "Paused" }))?;
        self.done(
            "PUT",
            "/snapshot/create",
            &json!({ "snapshot_path": self.path("state"), "mem_file_path": self.path("memory") }),
        )?;
        Ok(fs::metadata(self.path("state"))?.len())
    }

    /// Takes it out of them and lets it run.
    pub fn load(&self) -> Result<Load> {
        let file = json!({ "backend_type": "File", "backend_path": self.path("memory") });
        let load = json!({
            "snapshot_path": self.path("state"), "mem_backend": file, "resume_vm": true,
        });
        let started = Instant::now();
        self.done("PUT", "/snapshot/load", &load)?;
        let to_answer = started.elapsed();
        // The guest's init listens; its kernel accepts, and the monitor says so.
        let mut stream = UnixStream::connect(self.path("v"))?;
        stream.write_all(format!("CONNECT {READY_PORT}\n").as_bytes())?;
        let mut answer = [0; 3];
        stream.set_read_timeout(Some(LIMIT))?;
        stream.read_exact(&mut answer).context("the restored guest does not answer")?;
        ensure!(answer == *b"OK ", "{}: {answer:?}", self.monitor.name());
        Ok(Load { to_answer, to_guest: started.elapsed() })
    }

    /// Memory of the process now.
    pub fn memory(&self) -> Result<Memory> {
        memory_of(self.process.id())
    }
}
