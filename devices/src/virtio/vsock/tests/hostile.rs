//! docs/hostile.md 12, and what of the other lines concerns this device.

use super::*;

/// Nothing in it, or not what it says.
#[test]
fn hostile_12_lengths_that_lie_reset_the_connection() {
    let mut guest = Guest::booted();
    for length in [8, 100, 65_537, u32::MAX] {
        let (mut socket, header) = guest.called(1, 1 << 20);
        guest.send(Header { op: Op::Data, length, ..header }, b"seven..");
        assert_eq!(guest.ops(), [Op::Reset]);
        assert_eq!(rest(&mut socket), b"");
    }
    // More bytes than it says are not its own.
    let (mut socket, header) = guest.called(1, 1 << 20);
    guest.send(Header { op: Op::Data, length: 3, ..header }, b"abcdef");
    let mut bytes = [0; 3];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"abc");
    // No header at all.
    for length in [0, 1, 43] {
        guest.driver.send(TX, &[readable(BUFFERS, length)]);
    }
    guest.driver.send(TX, &[writable(BUFFERS, 100)]);
    assert_eq!(guest.driver.used(TX).len(), 4);
    assert_eq!(guest.ops(), []);
    guest.send(data(header, b"def"), b"def");
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"def");
}

#[test]
fn hostile_12_a_forged_source_is_not_answered() {
    let mut guest = Guest::booted();
    let listener = guest.listen(99);
    listener.set_nonblocking(true).unwrap();
    for source_cid in [0, 1, HOST_CID, 4, CID | 1 << 32, u64::MAX] {
        guest.send(Header { source_cid, ..packet(Op::Request, 99) }, b"");
        assert_eq!(guest.ops(), []);
        assert!(listener.accept().is_err());
    }
    // Nor does it harm a connection of the same ports.
    let (mut socket, header) = guest.called(1, 1 << 20);
    guest.send(Header { op: Op::Reset, source_cid: 4, ..header }, b"");
    guest.send(data(header, b"x"), b"x");
    socket.read_exact(&mut [0]).unwrap();
}

#[test]
fn hostile_12_other_addresses_and_kinds_are_refused() {
    let mut guest = Guest::booted();
    let (mut socket, header) = guest.called(1, 1 << 20);
    for wrong in [
        Header { destination_cid: 9, op: Op::Request, ..header },
        Header { destination_cid: u64::MAX, ..header },
        Header { kind: 2, op: Op::Request, ..header },
        Header { kind: 0xffff, op: Op::Shutdown, ..header },
    ] {
        guest.send(wrong, b"");
        let (reset, _) = guest.one();
        assert_eq!(reset.op, Op::Reset);
        assert_eq!((reset.source_cid, reset.kind), (wrong.destination_cid, wrong.kind));
        // One reset is not answered by another.
        guest.send(Header { op: Op::Reset, ..wrong }, b"");
        assert_eq!(guest.ops(), []);
    }
    guest.send(data(header, b"x"), b"x");
    socket.read_exact(&mut [0]).unwrap();
}

#[test]
fn hostile_12_packets_out_of_turn_reset_the_connection() {
    let mut guest = Guest::booted();
    // For no connection.
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
        Op::Unknown(0),
        Op::Unknown(8),
        Op::Unknown(0xffff),
    ] {
        guest.send(packet(op, 1), b"");
        assert_eq!(guest.ops(), [Op::Reset], "{op:?}");
    }
    // Before the guest has accepted.
    for op in [Op::Data, Op::Shutdown, Op::CreditUpdate, Op::Request, Op::Unknown(77)] {
        let mut socket = guest.call(1);
        let (request, _) = guest.one();
        guest.send(answer(&request, op), b"");
        assert_eq!(guest.ops(), [Op::Reset], "{op:?}");
        assert_eq!(rest(&mut socket), b"");
    }
    // On one that is open.
    for op in [Op::Response, Op::Request, Op::Unknown(0), Op::Unknown(0xffff)] {
        let (mut socket, header) = guest.called(1, 1 << 20);
        guest.send(Header { op, ..header }, b"");
        assert_eq!(guest.ops(), [Op::Reset], "{op:?}");
        assert_eq!(rest(&mut socket), b"");
    }
    // After the guest said that it sends no more.
    let (_socket, header) = guest.called(1, 1 << 20);
    guest.send(Header { op: Op::Shutdown, flags: SHUTDOWN_SEND, ..header }, b"");
    guest.send(data(header, b"x"), b"x");
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn hostile_12_credit_lies_get_the_guest_no_more_than_it_has_room_for() {
    let mut guest = Guest::booted();
    let (mut socket, header) = guest.called(1, 0);
    socket.write_all(&[1; 10_000]).unwrap();
    // No room at all: asked for once, however often it says so.
    assert_eq!(guest.ops(), [Op::CreditRequest]);
    for _ in 0..3 {
        guest.send(Header { op: Op::CreditUpdate, buf_alloc: 0, ..header }, b"");
        assert_eq!(guest.ops(), []);
    }
    let update = |buf_alloc, fwd_cnt| Header { op: Op::CreditUpdate, buf_alloc, fwd_cnt, ..header };
    guest.send(update(100, 0), b"");
    let packets = guest.received();
    assert_eq!(packets[0].1.len(), 100);
    assert_eq!(packets[1].0.op, Op::CreditRequest);
    // Consumed more than was sent; then running backwards; then a buffer that shrinks.
    for (buf_alloc, fwd_cnt) in [(100, 101), (100, u32::MAX), (100, 1 << 31), (100, 0), (50, 0)] {
        guest.send(update(buf_alloc, fwd_cnt), b"");
        let received: usize = guest.received().iter().map(|packet| packet.1.len()).sum();
        assert_eq!(received, 0, "{buf_alloc} {fwd_cnt}");
    }
    guest.send(update(100, 30), b"");
    let received: usize = guest.received().iter().map(|packet| packet.1.len()).sum();
    assert_eq!(received, 30);
    // All the room in the world is no more than there are buffers.
    guest.send(update(u32::MAX, 130), b"");
    let received: usize = guest.received().iter().map(|packet| packet.1.len()).sum();
    assert_eq!(received, 10_000 - 130);
}

#[test]
fn hostile_12_a_guest_that_ignores_our_credit_is_cut_off() {
    let mut guest = Guest::booted();
    let (socket, header) = guest.called(1, 1 << 20);
    let part = [5; 60_000];
    let mut packets = 0;
    while guest.ops().is_empty() {
        guest.send(data(header, &part), &part);
        packets += 1;
        // The socket's own buffer, and ours.
        assert!(packets < 40, "no end to it");
    }
    drop(socket);
}

/// Requests by the thousand from a guest that reads no answers: it is not heard until it does, and
/// then gets each answer.
#[test]
fn hostile_12_a_flood_of_requests_is_held_back() {
    let mut guest = Guest::new();
    guest.driver.activate(FEATURES, SIZE);
    let request = guest.lay_out(packet(Op::Request, 9), b"", &[]);
    let mut asked = 0;
    let mut back = 0;
    for _ in 0..100 {
        for _ in 0..SIZE {
            if asked - back == usize::from(SIZE) {
                break;
            }
            guest.driver.send(TX, &request);
            asked += 1;
        }
        back += guest.driver.used(TX).len();
    }
    assert_eq!(back, host::MAX_PENDING);
    assert_eq!(asked - back, usize::from(SIZE));
    let mut answers = 0;
    while answers < asked {
        guest.offer(BUFFERS);
        let used = guest.driver.used(RX);
        assert_eq!(used.len(), 1, "after {answers} of {asked}");
        answers += used.len();
    }
    assert_eq!(back + guest.driver.used(TX).len(), asked);
}

#[test]
fn hostile_12_no_more_connections_than_there_are_places() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if hard < 4096 {
        println!("skipped: at most {hard} open files");
        return;
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 16), hard).unwrap();
    let mut guest = Guest::booted();
    let listener = guest.listen(99);
    let mut sockets = Vec::new();
    for port in 0..host::MAX_CONNECTIONS as u32 {
        guest.send(Header { source_port: port, ..packet(Op::Request, 99) }, b"");
        assert_eq!(guest.ops(), [Op::Response], "{port}");
        sockets.push(listener.accept().unwrap());
    }
    guest.send(Header { source_port: 5000, ..packet(Op::Request, 99) }, b"");
    assert_eq!(guest.ops(), [Op::Reset]);
    let mut refused = guest.call(5);
    assert_eq!(guest.ops(), []);
    assert!(!matches!(refused.read(&mut [0]), Ok(1)));
    // One place is made.
    guest.send(Header { source_port: 77, ..packet(Op::Reset, 99) }, b"");
    guest.send(Header { source_port: 5000, ..packet(Op::Request, 99) }, b"");
    assert_eq!(guest.ops(), [Op::Response]);
    sockets.push(listener.accept().unwrap());

    // Those that the guest is done with give way when a reader leaves no place.
    let part = [5; 60_000];
    let slow = Header { source_port: 5000, ..packet(Op::Data, 99) };
    for _ in 0..4 {
        guest.send(data(slow, &part), &part);
    }
    guest.send(Header { op: Op::Shutdown, flags: SHUTDOWN_BOTH, ..slow }, b"");
    guest.send(Header { op: Op::Reset, ..slow }, b"");
    guest.received();
    guest.send(Header { source_port: 5001, ..packet(Op::Request, 99) }, b"");
    assert_eq!(guest.ops(), [Op::Response]);
}

/// The guest opens, both ends shut down, in every order and twice.
#[test]
fn hostile_12_half_closed_both_ways() {
    for flags in [
        &[SHUTDOWN_RECEIVE, SHUTDOWN_SEND][..],
        &[SHUTDOWN_SEND, SHUTDOWN_SEND, SHUTDOWN_RECEIVE],
        &[0, 0xffff_fffc, SHUTDOWN_BOTH],
        &[u32::MAX],
    ] {
        let mut guest = Guest::booted();
        let (mut socket, header) = guest.called(1, 1 << 20);
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(guest.ops(), [Op::Shutdown]);
        let (last, before) = flags.split_last().unwrap();
        for flags in before {
            guest.send(Header { op: Op::Shutdown, flags: *flags, ..header }, b"");
        }
        let mut told = guest.ops();
        if told.is_empty() {
            guest.send(Header { op: Op::Shutdown, flags: *last, ..header }, b"");
            told = guest.ops();
        }
        // However it came about, the guest knows that it is over, and the host does.
        assert!(matches!(told.last(), Some(Op::Reset | Op::Shutdown)), "{flags:x?} {told:?}");
        assert_eq!(rest(&mut socket), b"");
        guest.send(data(header, b"x"), b"x");
        assert_eq!(guest.ops(), [Op::Reset]);
    }
}

/// Programs that connect and say nothing, or nonsense, or go: there is a bound, and a place again
/// once they are gone.
#[test]
fn hostile_12_programs_that_never_say_where_to() {
    let mut guest = Guest::booted();
    let mut idle = Vec::new();
    for _ in 0..host::MAX_HANDSHAKES {
        idle.push(UnixStream::connect(guest.path()).unwrap());
        guest.driver.run();
    }
    let mut socket = guest.call(1);
    guest.driver.run();
    let mut byte = [0];
    // Closed, with or without its line having been read.
    assert!(!matches!(socket.read(&mut byte), Ok(1)));
    for socket in &mut idle {
        socket.write_all(b"CONN").unwrap();
    }
    guest.driver.run();
    drop(idle);
    guest.driver.run();
    let _open = guest.called(1, 1 << 20);
    for line in ["GET / HTTP/1.1\r\n", "CONNECT 99999999999\n", "CONNECT 1 1\n"] {
        let mut socket = UnixStream::connect(guest.path()).unwrap();
        socket.write_all(line.as_bytes()).unwrap();
        guest.driver.run();
        assert!(!matches!(socket.read(&mut byte), Ok(1)), "{line:?}");
    }
    assert_eq!(guest.ops(), []);
}

/// A program that gave up is not answered for, whether or not the guest has heard of it.
#[test]
fn a_caller_that_gives_up_leaves_nothing_behind() {
    let mut guest = Guest::new();
    for _ in 0..2000 {
        drop(guest.call(1));
        guest.driver.run();
    }
    guest.boot();
    assert_eq!(guest.ops(), []);
    let socket = guest.call(1);
    let (request, _) = guest.one();
    drop(socket);
    assert_eq!(guest.ops(), [Op::Reset]);
    guest.send(answer(&request, Op::Response), b"");
    assert_eq!(guest.ops(), [Op::Reset]);
}

/// docs/hostile.md 7: a reset ends everything, and the next driver can use the same descriptors.
#[test]
fn hostile_7_a_reset_drops_every_connection() {
    let mut guest = Guest::booted();
    for _ in 0..3 {
        let (mut socket, header) = guest.called(1, 1 << 20);
        guest.driver.write(BUFFERS, &[0xee; 4096]);
        guest.driver.device().reset();
        assert_eq!(rest(&mut socket), b"");
        let _ = socket.write(b"nobody");
        guest.driver.run();
        assert_eq!(guest.driver.read(BUFFERS, 4096), [0xee; 4096]);
        guest.boot();
        guest.send(data(header, b"x"), b"x");
        assert_eq!(guest.ops(), [Op::Reset]);
    }
}

/// docs/hostile.md 1 to 3: a broken chain on any queue, and then a fresh start.
#[test]
fn hostile_2_a_chain_outside_memory_needs_a_reset() {
    for queue in [RX, TX, EVENT] {
        let mut guest = Guest::new();
        guest.driver.activate(FEATURES, SIZE);
        // For each queue something to do.
        let mut socket = guest.call(1);
        guest.driver.device().transport_reset();
        guest.driver.run();
        guest.call(2);
        guest.driver.run();
        guest.driver.send(queue, &[(1 << 40, 100, queue != TX)]);
        assert!(guest.driver.is_broken(), "queue {queue}");
        assert_eq!(rest(&mut socket), b"");
        guest.driver.device().reset();
        guest.boot();
        guest.called(1, 1 << 20);
    }
}

/// docs/hostile.md 3: receive buffers too small for a header.
#[test]
fn hostile_3_useless_receive_buffers_come_back() {
    let mut guest = Guest::new();
    guest.driver.activate(FEATURES, SIZE);
    let _socket = guest.call(1);
    guest.driver.run();
    for part in [writable(BUFFERS, 0), writable(BUFFERS, 43), readable(BUFFERS, 4096)] {
        guest.driver.send(RX, &[part]);
    }
    let lengths: Vec<_> = guest.driver.used(RX).iter().map(|used| used.1).collect();
    assert_eq!(lengths, [0, 0, 0]);
    guest.driver.send(RX, &[writable(BUFFERS, 44)]);
    assert_eq!(guest.driver.used(RX).len(), 1);
    assert_eq!(decode(&guest.driver.read(BUFFERS, 44)).op, Op::Request);
    assert!(!guest.driver.is_broken());
}

#[test]
fn hostile_1_broken_queues_are_survived() {
    let folder = Folder::new();
    let count = std::cell::Cell::new(0);
    crate::virtio::testing::survives_broken_queues(|| {
        count.set(count.get() + 1);
        let mut device = Vsock::new(CID as u32, &folder.0.join(count.get().to_string())).unwrap();
        // Something to do for each queue.
        device.transport_reset();
        device
    });
}

/// docs/hostile.md 23: a socket's path that is too long, or in no folder; its folder stays as it is.
#[test]
fn hostile_23_sockets_that_cannot_be_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["x".repeat(200), "no/such/folder".to_owned()] {
        assert!(Vsock::new(CID as u32, &folder.path().join(name)).is_err());
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
