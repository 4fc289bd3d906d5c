//! Requests while a guest boots, while it ends, after that, and several at once.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use e2e::api::Vmm;
use e2e::guest;
use nix::sys::signal::Signal;
use serde_json::json;

const START: &str = r#"{"action_type": "InstanceStart"}"#;

/// docs/hostile.md 24: whoever asks while a machine starts is answered, by what was before or after; of
/// two who start it, or stop it, at once, each is told what became of it.
#[test]
fn hostile_24_requests_during_the_boot_and_at_once_are_all_answered() {
    let folder = tempfile::tempdir().unwrap();
    let initrd = guest::initramfs(folder.path(), "echo up; while :; do $b sleep 1; done\n");
    let socket = folder.path().join("api");
    let mut vmm = Vmm::start(&socket, &[]);
    vmm.done("PUT", "/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 128 }));
    vmm.done("PUT", "/boot-source", &guest::boot_source(&initrd));
    let (booted, asked) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        for path in ["/", "/machine-config", "/vm/config"] {
            let (vmm, booted, asked) = (&vmm, &booted, &asked);
            scope.spawn(move || {
                while !booted.load(Ordering::SeqCst) {
                    let answer = vmm.told(path);
                    if path == "/" {
                        let state = answer["state"].as_str().unwrap();
                        let expected = ["Not started", "Running", "Paused"];
                        assert!(expected.contains(&state), "{answer}");
                    }
                    asked.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let starts = [0; 3].map(|_| scope.spawn(|| vmm.ask("PUT", "/actions", START)));
        let answers = starts.map(|start| start.join().unwrap());
        let done = answers.iter().filter(|(code, _)| *code == 204).count();
        assert_eq!(done, 1, "{answers:?}");
        for (code, answer) in answers.iter().filter(|(code, _)| *code != 204) {
            assert_eq!(*code, 400);
            let message = answer["fault_message"].as_str().unwrap();
            assert!(message.contains("after starting the microVM"), "{message}");
        }
        // The kernel is about to boot; it can be made to stand still in that.
        let states = ["Paused", "Resumed", "Paused", "Resumed"].map(|state| {
            let body = json!({ "state": state }).to_string();
            scope.spawn(|| {
                let body = body;
                vmm.ask("PATCH", "/vm", &body)
            })
        });
        for change in states {
            let (code, answer) = change.join().unwrap();
            assert!(code == 204 || code == 400 && answer["fault_message"].is_string(), "{answer}");
        }
        vmm.ask("PATCH", "/vm", r#"{"state": "Resumed"}"#);
        assert_eq!(vmm.told("/")["state"], json!("Running"));
        booted.store(true, Ordering::SeqCst);
    });
    assert!(asked.load(Ordering::SeqCst) >= 3);
    vmm.process.wait_for("up");
    // One right after the other, on one connection, as no client of its own for each can be.
    let mut connection = UnixStream::connect(&socket).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(100))).unwrap();
    for state in ["Resumed", "Resumed", "Paused", "Resumed"].into_iter().cycle().take(1200) {
        let body = json!({ "state": state }).to_string();
        let length = body.len();
        write!(connection, "PATCH /vm HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            connection.read_exact(&mut byte).unwrap();
            answer.extend(byte);
        }
        assert!(answer.starts_with(b"HTTP/1.1 204"), "{}", String::from_utf8_lossy(&answer));
    }
    vmm.process.signal(Signal::SIGTERM);
    vmm.process.finish().exits(143);
}

/// docs/hostile.md 24: whoever asks while the machine ends, by the guest or by a signal, has an answer,
/// be it that the machine has ended, or the end of the connection; then there is no socket any more.
#[test]
fn hostile_24_requests_at_the_end_and_after_it_do_not_hang() {
    for (orders, signal, status) in
        [("attack=off", None, 0), ("attack=halt", Some(Signal::SIGTERM), 143)]
    {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let vmm = Vmm::start(&socket, &[]);
        let source = json!({ "kernel_image_path": guest::attacker(), "boot_args": orders });
        vmm.done("PUT", "/boot-source", &source);
        let answered = AtomicU32::new(0);
        thread::scope(|scope| {
            for (method, path, body) in [
                ("GET", "/vm/config", ""),
                ("GET", "/", ""),
                ("PATCH", "/vm", r#"{"state": "Resumed"}"#),
            ] {
                let (vmm, answered) = (&vmm, &answered);
                scope.spawn(move || {
                    while let Some((code, answer)) = vmm.ask_the_dying(method, path, body) {
                        let ended = code == 500 && answer.contains("the machine has ended");
                        assert!(
                            ended || [200, 204, 400].contains(&code),
                            "{method} {path}: {answer}"
                        );
                        answered.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
            let more = |count| {
                let before = answered.load(Ordering::SeqCst);
                while answered.load(Ordering::SeqCst) < before + count {
                    thread::yield_now();
                }
            };
            more(10);
            let started = vmm.ask_the_dying("PUT", "/actions", START);
            if let Some(signal) = signal {
                assert_eq!(started.map(|(code, _)| code), Some(204));
                more(20);
                vmm.process.signal(signal);
            }
        });
        assert_eq!(vmm.ask_the_dying("GET", "/", ""), None);
        vmm.process.finish().exits(status);
        assert!(!socket.exists());
    }
}
