//! The guest's end of a stream over vsock: sends back all that it is sent, and when the stream is
//! reset says so and makes another.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

/// The host, to a guest (virtio 1.2, 5.10.4).
const HOST: u32 = 2;

fn main() {
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok()).unwrap_or_default();
    for number in 1.. {
        let mut stream = open(port);
        println!("stream {number}: open");
        let (sent, ended) = send_back(&mut stream);
        println!("stream {number}: sent back {sent} bytes, then {ended}");
    }
}

/// A stream to this port of the host, which may not be there yet.
fn open(port: u32) -> std::fs::File {
    loop {
        let kind = (AddressFamily::Vsock, SockType::Stream);
        let made = socket(kind.0, kind.1, SockFlag::SOCK_CLOEXEC, None).and_then(|socket| {
            connect(socket.as_raw_fd(), &VsockAddr::new(HOST, port))?;
            Ok(socket)
        });
        match made {
            Ok(socket) => return socket.into(),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// How many bytes it was, and how it ended.
fn send_back(stream: &mut std::fs::File) -> (u64, String) {
    let mut buffer = vec![0; 4096];
    // Taken, and not sent back yet.
    let mut rest = 0..0;
    let mut sent = 0;
    loop {
        let done = if rest.is_empty() {
            stream.read(&mut buffer).map(|count| rest = 0..count)
        } else {
            stream.write(&buffer[rest.clone()]).map(|count| {
                rest.start += count;
                sent += count as u64;
            })
        };
        match done {
            Ok(()) if rest.end == 0 => return (sent, "the end".to_owned()),
            Ok(()) => {}
            Err(error) => return (sent, error.to_string()),
        }
    }
}
