//! A guest's driver on one side, real Unix sockets on the other.

mod hostile;
mod streams;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::connection::BUFFER;
use super::packet::{HOST_CID, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM};
use super::*;
use crate::virtio::test_driver::{BUFFERS, Driver, Part, readable, writable};

const CID: u64 = 3;
/// Length of a receive buffer, as Linux 6.1 has them.
const RX_BUFFER: u32 = 4096;
const FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const SIZE: u16 = 64;

/// A folder of its own for each test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let next = NEXT.fetch_add(1, Ordering::SeqCst);
        let path = std::env::temp_dir().join(format!("vsock-{}-{next}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The guest.
struct Guest {
    driver: Driver<Vsock>,
    folder: Folder,
    /// Where the receive buffer of each chain is.
    offered: HashMap<u16, u64>,
}

/// A packet as the guest gets it.
type Packet = (Header, Vec<u8>);

impl Guest {
    /// A guest whose driver is not there yet.
    fn new() -> Guest {
        let folder = Folder::new();
        let device = Vsock::new(CID as u32, &folder.0.join("v")).unwrap();
        Guest { driver: Driver::new(device), folder, offered: HashMap::new() }
    }

    /// A guest that is up.
    fn booted() -> Guest {
        let mut guest = Guest::new();
        guest.boot();
        guest
    }

    fn boot(&mut self) {
        self.driver.activate(FEATURES, SIZE);
        self.offered.clear();
        for slot in 0..SIZE {
            self.offer(BUFFERS + u64::from(slot) * u64::from(RX_BUFFER));
        }
    }

    fn offer(&mut self, address: u64) {
        let head = self.driver.send(RX, &[writable(address, RX_BUFFER)]);
        self.offered.insert(head, address);
    }

    /// What has arrived. The buffers go back to the device.
    fn received(&mut self) -> Vec<Packet> {
        self.driver.run();
        let mut packets = Vec::new();
        for (head, length) in self.driver.used(RX) {
            let address = self.offered.remove(&head).unwrap();
            let bytes = self.driver.read(address, length as usize);
            let header = decode(&bytes);
            assert_eq!(header.length as usize, bytes.len() - HEADER);
            packets.push((header, bytes[HEADER..].to_vec()));
            self.offer(address);
        }
        packets
    }

    /// The one packet that has arrived.
    fn one(&mut self) -> Packet {
        let mut packets = self.received();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    /// The operations that have arrived.
    fn ops(&mut self) -> Vec<Op> {
        self.received().iter().map(|(header, _)| header.op).collect()
    }

    /// Sends a packet in one piece.
    fn send(&mut self, header: Header, data: &[u8]) {
        let parts = self.lay_out(header, data, &[]);
        self.driver.send(TX, &parts);
        assert_eq!(self.driver.used(TX).len(), 1);
    }

    /// Puts a packet into memory, cut up after these lengths.
    fn lay_out(&mut self, header: Header, data: &[u8], cuts: &[u32]) -> Vec<Part> {
        let at = BUFFERS + (2 << 20);
        let mut bytes = encode(&header);
        bytes.extend_from_slice(data);
        self.driver.write(at, &bytes);
        let mut parts = Vec::new();
        let mut done = 0;
        for length in cuts {
            parts.push(readable(at + u64::from(done), *length));
            done += length;
        }
        parts.push(readable(at + u64::from(done), bytes.len() as u32 - done));
        parts
    }

    fn path(&self) -> PathBuf {
        self.folder.0.join("v")
    }

    /// A host program that listens where a guest program can reach it.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.0.join(format!("v_{port}"))).unwrap()
    }

    /// A host program that asks for a port of the guest.
    fn call(&self, port: u32) -> UnixStream {
        let mut socket = UnixStream::connect(self.path()).unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        socket.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        socket
    }

    /// A connection that a host program made, and its other end in the guest.
    fn called(&mut self, port: u32, buf_alloc: u32) -> (UnixStream, Header) {
        let mut socket = self.call(port);
        let (request, _) = self.one();
        assert_eq!((request.op, request.destination_port), (Op::Request, port));
        let mut header = answer(&request, Op::Response);
        header.buf_alloc = buf_alloc;
        self.send(header, b"");
        let line = format!("OK {}\n", request.source_port);
        let mut told = vec![0; line.len()];
        socket.read_exact(&mut told).unwrap();
        assert_eq!(told, line.as_bytes());
        header.op = Op::Data;
        (socket, header)
    }
}

/// A packet that goes the other way.
fn answer(header: &Header, op: Op) -> Header {
    Header { op, buf_alloc: 1 << 20, fwd_cnt: 0, ..header.refusal() }
}

/// A packet of the guest to a port of the host.
fn packet(op: Op, port: u32) -> Header {
    Header {
        source_cid: CID,
        destination_cid: HOST_CID,
        source_port: 7000,
        destination_port: port,
        length: 0,
        kind: STREAM,
        op,
        flags: 0,
        buf_alloc: 1 << 20,
        fwd_cnt: 0,
    }
}

/// The same with so much data.
fn data(header: Header, bytes: &[u8]) -> Header {
    Header { op: Op::Data, length: bytes.len() as u32, ..header }
}

fn number(op: Op) -> u16 {
    match op {
        Op::Request => 1,
        Op::Response => 2,
        Op::Reset => 3,
        Op::Shutdown => 4,
        Op::Data => 5,
        Op::CreditUpdate => 6,
        Op::CreditRequest => 7,
        Op::Unknown(other) => other,
    }
}

fn encode(header: &Header) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(header.source_cid.to_le_bytes());
    bytes.extend(header.destination_cid.to_le_bytes());
    bytes.extend(header.source_port.to_le_bytes());
    bytes.extend(header.destination_port.to_le_bytes());
    bytes.extend(header.length.to_le_bytes());
    bytes.extend(header.kind.to_le_bytes());
    bytes.extend(number(header.op).to_le_bytes());
    bytes.extend(header.flags.to_le_bytes());
    bytes.extend(header.buf_alloc.to_le_bytes());
    bytes.extend(header.fwd_cnt.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Header {
    let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
    let ops = [
        Op::Request,
        Op::Response,
        Op::Reset,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ];
    Header {
        source_cid: long(0),
        destination_cid: long(8),
        source_port: word(16),
        destination_port: word(20),
        length: word(24),
        kind: half(28),
        op: ops[usize::from(half(30)) - 1],
        flags: word(32),
        buf_alloc: word(36),
        fwd_cnt: word(40),
    }
}

/// Everything until the end of file.
fn rest(socket: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).unwrap();
    bytes
}

/// A guest may remember connections of before for a moment: none of them must be met again.
#[test]
fn a_restored_device_gives_out_other_ports_than_the_one_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let device = |name: &str| Vsock::new(3, &folder.path().join(name)).unwrap();
    let mut before = device("before");
    let first = before.host.free_host_port(1024);
    let state = VirtioDevice::save(&before);
    let mut after = device("after");
    after.restore(state).unwrap();
    assert_ne!(after.host.free_host_port(1024), first);
    assert!(after.restore(DeviceState::Plain).is_err());
}
