//! The agent protocol, as each end reads what a hostile other one says.

use std::fmt::Debug;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::LazyLock;
use std::thread;

use agent_protocol::{Hello, HelloReply, Message, Request, Start, Stream, read_frame, write_frame};
use engine::agent::{Control, attach};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A byte for the kind of frames, and a stream of them. What is read is written so that it is read
/// the same.
pub fn agent_frames(input: &[u8]) {
    let Some((kind, stream)) = input.split_first() else { return };
    match kind % 5 {
        0 => frames::<Hello>(stream),
        1 => frames::<HelloReply>(stream),
        2 => frames::<Request>(stream),
        3 => frames::<Message>(stream),
        _ => frames::<Start>(stream),
    }
}

fn frames<T: Serialize + DeserializeOwned + PartialEq + Debug>(mut stream: &[u8]) {
    while let Ok(Some(frame)) = read_frame::<T>(&mut stream) {
        let mut written = Vec::new();
        write_frame(&mut written, &frame).expect("what fits in a frame does so again");
        let mut written = written.as_slice();
        assert_eq!(read_frame::<T>(&mut written).unwrap().as_ref(), Some(&frame));
        assert!(written.is_empty());
    }
}

/// An agent, or whoever is in its place, that says these bytes to the engine and then hangs up: on a
/// stream's connection, on a control connection from its beginning, and in the middle of a
/// conversation about a process.
pub fn agent_conversation(input: &[u8]) {
    let (machine, _held): (OwnedFd, OwnedFd) = nix::unistd::pipe().unwrap();
    // Over a connection that was greeted, there is no wait for anything.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    say(&mut theirs, input);
    let result = engine::fuzzing::converse(ours, machine.try_clone().unwrap());
    // Without the machine's word there is no status.
    if let Ok(exit) = &result {
        assert!(input.len() >= 4, "{exit:?}");
    }
    let greeted = |which: &dyn Fn()| {
        thread::scope(|scope| {
            let agent = scope.spawn(|| {
                let Ok((mut stream, _)) = AGENT.listener.accept() else { return };
                say(&mut stream, input);
            });
            which();
            // The scope ends while a thread still clears up; what that has would count as a leak.
            agent.join().unwrap();
        });
    };
    if input.first().is_some_and(|byte| *byte == b'O') {
        greeted(&|| {
            let Ok(mut control) = Control::open(&AGENT.path, machine.as_fd()) else { return };
            while control.receive().is_ok() {}
        });
        greeted(&|| drop(attach(&AGENT.path, 0, Stream::Stdout, machine.as_fd())));
    }
}

/// Says everything that fits into a socket, and hangs up.
fn say(stream: &mut UnixStream, bytes: &[u8]) {
    stream.set_nonblocking(true).unwrap();
    let _ = stream.write(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    stream.set_nonblocking(false).unwrap();
}

struct Agent {
    _folder: tempfile::TempDir,
    path: std::path::PathBuf,
    listener: UnixListener,
}

static AGENT: LazyLock<Agent> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v");
    let listener = UnixListener::bind(&path).unwrap();
    Agent { _folder: folder, path, listener }
});

#[cfg(test)]
mod tests {
    use std::path::Path;

    use agent_protocol::{
        Identity, Mount, MountSource, Network, Process, Purpose, Rlimit, Root, StartFailure,
        WindowSize, Writable,
    };

    use super::*;

    fn save(target: &str, name: &str, start: &[u8], frames: &[Vec<u8>]) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../seeds").join(target);
        std::fs::write(folder.join(name), [start, &frames.concat()].concat()).unwrap();
    }

    fn frame<T: Serialize>(value: T) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &value).unwrap();
        bytes
    }

    fn start() -> Start {
        let target = "/v".to_owned();
        let tmpfs = MountSource::Tmpfs { size: 1 << 20, mode: 0o1777, no_exec: true };
        let device = MountSource::Device {
            device: "/dev/vdc".to_owned(),
            fs_type: "ext4".to_owned(),
            copy_up: true,
        };
        Start {
            root: Root { device: "/dev/vda".to_owned(), writable: Writable::Tmpfs { size: 0 } },
            mounts: vec![
                Mount { source: tmpfs, target: target.clone(), read_only: false },
                Mount { source: device, target, read_only: true },
            ],
            hostname: "h".to_owned(),
            network: Some(network()),
            time_ns: 1,
            entropy: vec![1, 2, 3],
            machine_id: "0".repeat(32),
            process: Process {
                id: 0,
                argv: vec!["sh".to_owned()],
                env: vec!["A=1".to_owned()],
                cwd: "/".to_owned(),
                user: "a:b".to_owned(),
                groups: vec!["c".to_owned()],
                terminal: Some(WindowSize { rows: 24, columns: 80 }),
                streams: vec![Stream::Stdin, Stream::Stdout],
                rlimits: vec![Rlimit { resource: 7, soft: 1, hard: u64::MAX }],
            },
        }
    }

    fn network() -> Network {
        Network {
            mac: [2, 0, 0, 0, 0, 1],
            address: ([10, 0, 0, 2], 24),
            gateway: Some([10, 0, 0, 1]),
            mtu: 1500,
            dns: vec!["10.0.0.1".to_owned()],
            dns_search: vec!["x".to_owned()],
            dns_options: Vec::new(),
            extra_hosts: vec![("a".to_owned(), "b".to_owned())],
        }
    }

    /// Makes the seeds anew, for when the protocol has changed.
    #[test]
    #[ignore = "writes the seeds"]
    fn write_seeds() {
        let identity = Identity {
            hostname: "h".to_owned(),
            network: Some(network()),
            time_ns: 1,
            entropy: vec![1],
            machine_id: String::new(),
            streams: vec![Stream::Stderr],
        };
        let purposes = [
            Purpose::Control,
            Purpose::Stream { process: 1, stream: Stream::Stdout },
            Purpose::Snapshot,
        ];
        let hellos = purposes.map(|purpose| frame(Hello { version: 2, purpose }));
        save("agent_frames", "hello", &[0], &hellos);
        let replies = [
            HelloReply::Accepted,
            HelloReply::WrongVersion(3),
            HelloReply::Refused("no".to_owned()),
        ];
        save("agent_frames", "reply", &[1], &replies.map(frame));
        let requests = [
            Request::Start(Box::new(start())),
            Request::Signal { process: 0, signal: 15, group: true },
            Request::Resize { process: 0, size: WindowSize { rows: 1, columns: 2 } },
            Request::PowerOff,
            Request::Identity(Box::new(identity)),
        ];
        save("agent_frames", "request", &[2], &requests.map(frame));
        let failed = |message: &str| Message::StartFailed {
            kind: StartFailure::NotFound,
            message: message.to_owned(),
        };
        let started = Message::Started { process: 0 };
        let exited = Message::Exited { process: 0, status: 3, out_of_memory: false };
        let identified = Message::Identified { process: Some(0) };
        let messages = [started, failed("x"), exited, identified];
        save("agent_frames", "message", &[3], &messages.clone().map(frame));
        save("agent_frames", "start", &[4], &[frame(start())]);
        let [started, failed, exited, identified] = messages.map(frame);
        let talk = [started.clone(), exited.clone()];
        save("agent_conversation", "runs", b"", &talk);
        save("agent_conversation", "restored", b"", &[identified, exited]);
        save("agent_conversation", "fails", b"", &[failed]);
        let greeting = [b"OK 1024\n".to_vec(), frame(HelloReply::Accepted), started];
        save("agent_conversation", "greeted", b"", &greeting);
        let refusal = [b"OK 1\n".to_vec(), frame(HelloReply::Refused("a\x1b[2J".to_owned()))];
        save("agent_conversation", "refused", b"", &refusal);
    }
}
