//! A vsock device between a mock driver and real Unix sockets.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;
use crate::virtio::testing::{Driver, survives_broken_queues};

const CID: u64 = 3;
const ROOM: u32 = 64 << 10;

struct Bench {
    driver: Driver<Vsock>,
    folder: tempfile::TempDir,
    received: usize,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let device = Vsock::new(CID as u32, &folder.path().join("v")).unwrap();
        let mut bench = Bench { driver: Driver::new(device), folder, received: 0 };
        for _ in 0..12 {
            let buffer = bench.driver.buffer(&[0; 512]);
            bench.driver.send(RX, &[], &[(buffer, 512)]);
        }
        bench.driver.notify(RX);
        bench
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("v")
    }

    /// Sends a packet as the guest.
    fn send(&mut self, header: Header, data: &[u8]) {
        let mut bytes = vec![0; HEADER];
        let buffers = self.driver.buffer(&bytes);
        // The device's own writer makes the bytes.
        let mut chain = crate::virtio::queue::Buffers::default();
        chain.push_for_tests(buffers, HEADER as u32);
        assert!(header.write(&self.driver.memory, &chain));
        bytes = self.driver.read(buffers, HEADER);
        bytes.extend_from_slice(data);
        let buffer = self.driver.buffer(&bytes);
        self.driver.send(TX, &[(buffer, bytes.len() as u32)], &[]);
        self.driver.notify(TX);
    }

    fn packet(&self, op: Op, host_port: u32, length: usize) -> Header {
        Header {
            source_cid: CID,
            destination_cid: HOST_CID,
            source_port: 1024,
            destination_port: host_port,
            length: length as u32,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: ROOM,
            fwd_cnt: 0,
        }
    }

    /// The next packet to the guest: what it is for, and its data.
    fn next(&mut self) -> Option<(Op, u32, Vec<u8>)> {
        self.driver.run();
        let (head, length) = *self.driver.used(RX).get(self.received)?;
        self.received += 1;
        // Each receive buffer is one descriptor, and they were made one after the other.
        let address = 0x2_0000 + u64::from(head) * 512;
        let bytes = self.driver.read(address, length as usize);
        let op = Op::from_number_for_tests(u16::from_le_bytes([bytes[30], bytes[31]]));
        let port = u32::from_le_bytes(bytes[16..20].try_into().unwrap());
        Some((op, port, bytes[HEADER..].to_vec()))
    }

    /// A host program's connection to the guest, accepted.
    fn open(&mut self) -> (UnixStream, u32) {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(b"CONNECT 1024\n").unwrap();
        let (op, port, _) = self.next().unwrap();
        assert_eq!(op, Op::Request);
        self.send(self.packet(Op::Response, port, 0), &[]);
        let mut line = vec![0; format!("OK {port}\n").len()];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {port}\n").as_bytes());
        (stream, port)
    }
}

#[test]
fn a_host_program_connects_talks_and_each_way_ends_by_itself() {
    let mut bench = Bench::new();
    let (mut stream, port) = bench.open();
    stream.write_all(b"to the guest").unwrap();
    assert_eq!(bench.next().unwrap(), (Op::Data, port, b"to the guest".to_vec()));
    bench.send(bench.packet(Op::Data, port, 9), b"from it..");
    let mut back = [0; 9];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"from it..");
    // The host ends its way; the guest's stays open.
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(bench.next().unwrap().0, Op::Shutdown);
    bench.send(bench.packet(Op::Data, port, 4), b"more");
    let mut end = bench.packet(Op::Shutdown, port, 0);
    end.flags = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    bench.send(end, &[]);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"more");
    assert_eq!(bench.next().unwrap().0, Op::Reset);
}

#[test]
fn a_guest_reaches_a_listening_host_program_and_no_other() {
    let mut bench = Bench::new();
    let listener = UnixListener::bind(bench.folder.path().join("v_52")).unwrap();
    bench.send(bench.packet(Op::Request, 52, 0), &[]);
    assert_eq!(bench.next().unwrap().0, Op::Response);
    let _accepted = listener.accept().unwrap();
    bench.send(bench.packet(Op::Request, 53, 0), &[]);
    assert_eq!(bench.next().unwrap(), (Op::Reset, 53, vec![]));
}

#[test]
fn a_guest_without_room_is_sent_nothing_until_it_has_some() {
    let mut bench = Bench::new();
    let (mut stream, port) = bench.open();
    let mut update = bench.packet(Op::CreditUpdate, port, 0);
    update.buf_alloc = 4;
    bench.send(update, &[]);
    stream.write_all(b"0123456789").unwrap();
    assert_eq!(bench.next().unwrap().2, b"0123");
    assert_eq!(bench.next(), None);
    update.fwd_cnt = 4;
    bench.send(update, &[]);
    assert_eq!(bench.next().unwrap().2, b"4567");
}

#[test]
fn hostile_12_lies_end_the_connection_they_are_told_on() {
    // More than the window, data before a connection, an unknown operation, a length above the data.
    let mut bench = Bench::new();
    let (_stream, port) = bench.open();
    bench.send(bench.packet(Op::Data, 99, 3), b"abc");
    assert_eq!(bench.next().unwrap(), (Op::Reset, 99, vec![]));
    bench.send(bench.packet(Op::Unknown(77), port, 0), &[]);
    assert_eq!(bench.next().unwrap(), (Op::Reset, port, vec![]));

    let mut bench = Bench::new();
    let (_stream, port) = bench.open();
    // Nothing is said to a packet that announces more than it has, and none of it is taken.
    bench.send(bench.packet(Op::Data, port, 100), b"abc");
    assert_eq!(bench.next(), None);
    let mut kind = bench.packet(Op::CreditRequest, port, 0);
    kind.kind = 9;
    bench.send(kind, &[]);
    assert_eq!(bench.next().unwrap().0, Op::Reset);
    // A forged source is not answered at all.
    let mut forged = bench.packet(Op::Request, 52, 0);
    forged.source_cid = 4;
    bench.send(forged, &[]);
    assert_eq!(bench.next(), None);
}

#[test]
fn hostile_12_credit_that_runs_backwards_or_is_zero_stops_the_flow_only() {
    let mut bench = Bench::new();
    let (mut stream, port) = bench.open();
    for (buf_alloc, fwd_cnt) in [(0, 0), (0, u32::MAX), (16, 1 << 31)] {
        let mut update = bench.packet(Op::CreditUpdate, port, 0);
        (update.buf_alloc, update.fwd_cnt) = (buf_alloc, fwd_cnt);
        bench.send(update, &[]);
    }
    stream.write_all(b"x").unwrap();
    assert_eq!(bench.next(), None);
    bench.send(bench.packet(Op::CreditUpdate, port, 0), &[]);
    assert_eq!(bench.next().unwrap().2, b"x");
}

#[test]
fn hostile_1_broken_queues_are_survived() {
    let folder = tempfile::tempdir().unwrap();
    let count = std::cell::Cell::new(0);
    survives_broken_queues(|| {
        count.set(count.get() + 1);
        Vsock::new(3, &folder.path().join(count.get().to_string())).unwrap()
    });
}
