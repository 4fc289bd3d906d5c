//! `vmrun-vmm` under its API, by way of a real HTTP client.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Running;

/// A monitor and its API socket.
pub struct Vmm {
    /// The process.
    pub process: Running,
    socket: PathBuf,
}

/// An answer: status code and body.
pub type Answer = (u16, Value);

impl Vmm {
    /// Starts one that nothing is known of yet, and waits for its socket.
    pub fn start(socket: &Path, arguments: &[&str]) -> Vmm {
        let mut command = Command::new("vmrun-vmm");
        command.arg("--api-sock").arg(socket).args(arguments);
        let process = Running::start(command.stdin(Stdio::null()));
        let since = Instant::now();
        while !socket.exists() {
            assert!(since.elapsed() < Duration::from_secs(60), "no API socket");
            std::thread::sleep(Duration::from_millis(2));
        }
        Vmm::over(socket, process)
    }

    /// One that listens already.
    pub fn over(socket: &Path, process: Running) -> Vmm {
        Vmm { process, socket: socket.to_owned() }
    }

    /// What the API answers to a request; an empty body is none.
    pub fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        let (code, text) = self.ask_text(method, path, body);
        let body = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() };
        (code, body)
    }

    /// The same, where the answer is not JSON.
    pub fn ask_text(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--max-time", "100", "--unix-socket"])
            .arg(&self.socket)
            .args(["-X", method, "-w", "\n%{http_code}"])
            .arg(format!("http://localhost{path}"));
        if !body.is_empty() {
            curl.args(["--data", body]);
        }
        let output = curl.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let (body, code) = text.rsplit_once('\n').unwrap_or_else(|| {
            panic!("{method} {path}: {}", String::from_utf8_lossy(&output.stderr))
        });
        (code.parse().unwrap(), body.to_owned())
    }

    /// The same of a monitor that may be about to end, with the answer as text: none where it has ended,
    /// or has not had the time to answer. It is not waited for any longer than an answer may take.
    pub fn ask_the_dying(&self, method: &str, path: &str, body: &str) -> Option<(u16, String)> {
        let mut stream = UnixStream::connect(&self.socket).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(100))).unwrap();
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = Vec::new();
        if let Err(error) = stream.read_to_end(&mut answer) {
            assert_eq!(
                error.kind(),
                std::io::ErrorKind::ConnectionReset,
                "{method} {path}: no end"
            );
        }
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let code = answer.split(' ').nth(1)?.parse().ok()?;
        Some((code, answer))
    }

    /// Asks for what must be done.
    #[track_caller]
    pub fn done(&self, method: &str, path: &str, body: &Value) {
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let answer = self.ask(method, path, &text);
        assert_eq!(answer, (204, Value::Null), "{method} {path} {body}");
    }

    /// Asks for what must be refused, with a message that contains `why`.
    #[track_caller]
    pub fn refused(&self, method: &str, path: &str, body: &str, why: &str) {
        let (code, answer) = self.ask(method, path, body);
        let message = answer["fault_message"].as_str().unwrap_or_default();
        assert_eq!(code, 400, "{method} {path} {body}: {answer}");
        assert!(message.contains(why), "{method} {path} {body}: {message:?}, not {why:?}");
    }

    /// What the API tells of.
    #[track_caller]
    pub fn told(&self, path: &str) -> Value {
        let (code, answer) = self.ask("GET", path, "");
        assert_eq!(code, 200, "GET {path}: {answer}");
        answer
    }
}
