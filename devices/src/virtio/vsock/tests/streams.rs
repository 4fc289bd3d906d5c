//! What well-behaved programs on both sides see.

use std::net::Shutdown;

use super::*;

#[test]
fn a_host_program_reaches_a_port_of_the_guest() {
    let mut guest = Guest::booted();
    let (mut socket, header) = guest.called(1024, 1 << 20);
    socket.write_all(b"to the guest").unwrap();
    let (got, bytes) = guest.one();
    assert_eq!(got.op, Op::Data);
    assert_eq!((got.source_cid, got.destination_cid), (HOST_CID, CID));
    assert_eq!(bytes, b"to the guest");
    guest.send(data(header, b"to the host"), b"to the host");
    let mut bytes = [0; 11];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the host");
}

#[test]
fn what_is_sent_before_the_answer_is_the_beginning_of_the_stream() {
    let mut guest = Guest::booted();
    let mut socket = guest.call(5);
    socket.write_all(b"early").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    let (request, _) = guest.one();
    guest.send(answer(&request, Op::Response), b"");
    let packets = guest.received();
    assert_eq!(packets[0].1, b"early");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (Op::Shutdown, SHUTDOWN_SEND));
    // It still listens.
    guest.send(data(answer(&request, Op::Data), b"late"), b"late");
    guest.send(Header { flags: SHUTDOWN_BOTH, ..answer(&request, Op::Shutdown) }, b"");
    assert_eq!(guest.ops(), [Op::Reset]);
    let line = format!("OK {}\nlate", request.source_port);
    assert_eq!(rest(&mut socket), line.as_bytes());
}

#[test]
fn a_port_where_nobody_listens_in_the_guest_closes_the_connection() {
    let mut guest = Guest::booted();
    let mut socket = guest.call(5);
    let (request, _) = guest.one();
    guest.send(answer(&request, Op::Reset), b"");
    assert_eq!(rest(&mut socket), b"");
    assert_eq!(guest.ops(), []);
}

#[test]
fn a_call_before_the_driver_is_there_waits_for_it() {
    let mut guest = Guest::new();
    let mut socket = guest.call(5);
    socket.write_all(b"early").unwrap();
    guest.driver.run();
    // As a driver begins.
    guest.driver.device().reset();
    guest.boot();
    let (request, _) = guest.one();
    assert_eq!(request.op, Op::Request);
    guest.send(answer(&request, Op::Response), b"");
    assert_eq!(guest.one().1, b"early");
}

#[test]
fn a_guest_program_reaches_a_socket_of_the_host() {
    let mut guest = Guest::booted();
    let listener = guest.listen(99);
    guest.send(packet(Op::Request, 99), b"");
    let (response, _) = guest.one();
    assert_eq!(response.op, Op::Response);
    assert_eq!((response.source_port, response.destination_port), (99, 7000));
    assert_eq!(response.buf_alloc, BUFFER);
    let (mut socket, _) = listener.accept().unwrap();
    guest.send(data(packet(Op::Data, 99), b"hello"), b"hello");
    socket.write_all(b"world").unwrap();
    assert_eq!(guest.one().1, b"world");
    // The host's program goes: the guest hears that nobody is there either way.
    let mut bytes = [0; 5];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    drop(socket);
    let (end, _) = guest.received().pop().unwrap();
    assert_eq!((end.op, end.flags, end.fwd_cnt), (Op::Shutdown, SHUTDOWN_BOTH, 5));
    guest.send(packet(Op::Reset, 99), b"");
    assert_eq!(guest.ops(), []);
}

#[test]
fn packets_bytes_and_connections_are_counted() {
    let mut guest = Guest::booted();
    let listener = guest.listen(99);
    guest.send(packet(Op::Request, 99), b"");
    guest.one();
    let (mut socket, _) = listener.accept().unwrap();
    guest.send(data(packet(Op::Data, 99), b"hello"), b"hello");
    socket.write_all(b"wide world").unwrap();
    guest.one();
    let counted = |guest: &Guest| guest.driver.device().host.metrics;
    let metrics = counted(&guest);
    assert_eq!((metrics.tx_packets_count, metrics.tx_bytes_count), (2, 5));
    assert_eq!((metrics.rx_packets_count, metrics.rx_bytes_count), (2, 10));
    assert_eq!((metrics.conns_added, metrics.conns_removed, metrics.conns_killed), (1, 0, 0));
    assert_eq!(counted(&guest), metrics);
    // One that the guest ends, one that is ended by us, one that never was.
    guest.send(packet(Op::Reset, 99), b"");
    guest.send(packet(Op::Request, 99), b"");
    guest.send(packet(Op::Response, 99), b"");
    guest.send(packet(Op::Request, 98), b"");
    let metrics = counted(&guest);
    assert_eq!((metrics.conns_added, metrics.conns_removed, metrics.conns_killed), (2, 2, 1));
}

#[test]
fn a_port_where_nobody_listens_on_the_host_is_refused() {
    let mut guest = Guest::booted();
    guest.send(packet(Op::Request, 98), b"");
    let (reset, _) = guest.one();
    assert_eq!((reset.op, reset.source_port, reset.destination_port), (Op::Reset, 98, 7000));
    // A file that is no socket, and one that nobody listens on any more.
    std::fs::write(guest.folder.0.join("v_98"), "").unwrap();
    drop(guest.listen(97));
    for port in [98, 97] {
        guest.send(packet(Op::Request, port), b"");
        assert_eq!(guest.ops(), [Op::Reset]);
    }
}

#[test]
fn each_way_is_closed_for_itself() {
    let mut guest = Guest::booted();
    // The guest ends what it sends.
    let (mut socket, header) = guest.called(1, 1 << 20);
    guest.send(data(header, b"last"), b"last");
    guest.send(Header { op: Op::Shutdown, flags: SHUTDOWN_SEND, ..header }, b"");
    assert_eq!(rest(&mut socket), b"last");
    socket.write_all(b"still").unwrap();
    assert_eq!(guest.one().1, b"still");
    // And then what it receives.
    guest.send(Header { op: Op::Shutdown, flags: SHUTDOWN_RECEIVE, ..header }, b"");
    assert_eq!(guest.ops(), [Op::Reset]);
    assert!(socket.write_all(b"nobody").is_err());

    // The guest does not listen any more: who goes on sending hears of it.
    let (mut socket, header) = guest.called(2, 1 << 20);
    guest.send(Header { op: Op::Shutdown, flags: SHUTDOWN_RECEIVE, ..header }, b"");
    assert!(socket.write_all(b"nobody").is_err());
    guest.send(data(header, b"on"), b"on");
    let mut bytes = [0; 2];
    socket.read_exact(&mut bytes).unwrap();

    // The host does not listen any more.
    let (mut socket, header) = guest.called(3, 1 << 20);
    socket.shutdown(Shutdown::Read).unwrap();
    guest.send(data(header, b"in vain"), b"in vain");
    let (end, _) = guest.one();
    assert_eq!((end.op, end.flags), (Op::Shutdown, SHUTDOWN_RECEIVE));
    socket.write_all(b"but this").unwrap();
    assert_eq!(guest.one().1, b"but this");
}

#[test]
fn what_the_host_sent_before_it_went_arrives_before_the_end() {
    let mut guest = Guest::booted();
    let (mut socket, header) = guest.called(1, 6);
    // Bytes for a reader who never comes do not keep the guest from reading.
    guest.send(data(header, b"unread"), b"unread");
    socket.write_all(b"0123456789").unwrap();
    drop(socket);
    let packets = guest.received();
    assert_eq!(packets.len(), 3);
    assert_eq!(packets.iter().find(|packet| packet.0.op == Op::Data).unwrap().1, b"012345");
    assert!(packets.iter().any(|packet| packet.0.op == Op::CreditRequest));
    let deaf = packets.iter().find(|packet| packet.0.op == Op::Shutdown).unwrap();
    assert_eq!(deaf.0.flags, SHUTDOWN_RECEIVE);
    guest.send(Header { op: Op::CreditUpdate, buf_alloc: 6, fwd_cnt: 6, ..header }, b"");
    let packets = guest.received();
    assert_eq!(packets[0].1, b"6789");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (Op::Shutdown, SHUTDOWN_BOTH));
}

/// A reader on the host gets an end of file, not an error, when the guest has not read all that he
/// sent.
#[test]
fn an_orderly_end_stays_one_with_bytes_left_unread() {
    let mut guest = Guest::booted();
    let (mut socket, header) = guest.called(1, 4);
    socket.write_all(&[1; 10_000]).unwrap();
    guest.received();
    guest.send(data(header, b"result"), b"result");
    guest.send(Header { op: Op::Shutdown, flags: SHUTDOWN_BOTH, ..header }, b"");
    assert_eq!(guest.ops(), [Op::Reset]);
    assert_eq!(rest(&mut socket), b"result");
}

#[test]
fn a_slow_reader_gets_everything_after_the_guest_has_gone() {
    let mut guest = Guest::booted();
    let (mut socket, mut header) = guest.called(1, 1 << 20);
    let mut sent = Vec::new();
    // As much as we announced: part of it fits the socket, the rest is kept.
    while sent.len() < BUFFER as usize {
        let part: Vec<u8> = (0..4096).map(|at| ((at + sent.len()) % 251) as u8).collect();
        guest.send(data(header, &part), &part);
        sent.extend(part);
    }
    header.flags = SHUTDOWN_BOTH;
    guest.send(Header { op: Op::Shutdown, ..header }, b"");
    guest.received();
    // It does not wait.
    guest.send(Header { op: Op::Reset, ..header }, b"");
    let reader = std::thread::spawn(move || rest(&mut socket));
    while !reader.is_finished() {
        guest.driver.run();
    }
    assert!(reader.join().unwrap() == sent);
    assert_eq!(guest.ops(), []);
}

#[test]
fn packets_are_understood_however_they_are_cut_up() {
    let mut guest = Guest::booted();
    let (mut socket, header) = guest.called(1, 1 << 20);
    for cuts in [&[44][..], &[1, 43, 3], &[20, 20, 5], &[0, 44, 0], &[43, 1]] {
        let parts = guest.lay_out(data(header, b"payload"), b"payload", cuts);
        guest.driver.send(TX, &parts);
        let mut bytes = [0; 7];
        socket.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"payload", "{cuts:?}");
    }
    // Receive buffers in pieces: as Linux had them, a header and then a page.
    guest.driver.device().reset();
    guest.driver.activate(FEATURES, SIZE);
    let (head, page) = (BUFFERS, BUFFERS + 8192);
    let mut socket = guest.call(2);
    guest.driver.send(RX, &[writable(head, 44), writable(page, 4096)]);
    let request = decode(&guest.driver.read(head, 44));
    guest.send(answer(&request, Op::Response), b"");
    socket.write_all(&[7; 5000]).unwrap();
    guest.driver.send(RX, &[writable(head, 40), writable(head + 40, 4), writable(page, 4096)]);
    guest.driver.run();
    assert_eq!(guest.driver.used(RX).last().unwrap().1, 44 + 4096);
    assert_eq!(decode(&guest.driver.read(head, 44)).length, 4096);
    assert_eq!(guest.driver.read(page, 4096), [7; 4096]);
}

/// Bytes both ways at once, checked one by one, with buffers of every size and credit that comes in
/// drops: a simple guest that echoes what it gets.
#[test]
fn a_long_conversation_arrives_unchanged() {
    const LENGTH: usize = 3 << 20;
    let mut guest = Guest::booted();
    let window = 10_000;
    let (socket, mut header) = guest.called(1, window);
    let pattern = |at: usize| (at.wrapping_mul(2_654_435_761) >> 13) as u8;
    let mut writer = socket.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        let bytes: Vec<u8> = (0..LENGTH).map(pattern).collect();
        for chunk in bytes.chunks(7777) {
            writer.write_all(chunk).unwrap();
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut reader = socket;
    let reading = std::thread::spawn(move || rest(&mut reader));
    // What we know of the device's room, and what is waiting for it.
    let (mut sent, mut peer_fwd, mut peer_buf) = (0u32, 0u32, BUFFER);
    let mut backlog = std::collections::VecDeque::new();
    let mut ended = false;
    let mut done = false;
    while !done {
        for (got, bytes) in guest.received() {
            (peer_fwd, peer_buf) = (got.fwd_cnt, got.buf_alloc);
            header.fwd_cnt = header.fwd_cnt.wrapping_add(bytes.len() as u32);
            assert!(bytes.len() <= window as usize);
            match got.op {
                Op::Data => backlog.extend(bytes),
                Op::Shutdown => ended = true,
                Op::CreditUpdate => {}
                // Answered, as everything is, below.
                Op::CreditRequest => {}
                Op::Reset => done = true,
                other => panic!("{other:?}"),
            }
        }
        if done {
            break;
        }
        let room = peer_buf - sent.wrapping_sub(peer_fwd);
        let part: Vec<u8> = backlog.drain(..backlog.len().min(room as usize).min(9000)).collect();
        if part.is_empty() {
            guest.send(Header { op: Op::CreditUpdate, ..header }, b"");
        } else {
            sent = sent.wrapping_add(part.len() as u32);
            guest.send(data(header, &part), &part);
        }
        if ended && backlog.is_empty() {
            guest.send(Header { op: Op::Shutdown, flags: SHUTDOWN_BOTH, ..header }, b"");
            ended = false;
        }
    }
    writing.join().unwrap();
    let echoed = reading.join().unwrap();
    assert_eq!(echoed.len(), LENGTH);
    assert!(echoed.iter().enumerate().all(|(at, byte)| *byte == pattern(at)));
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::booted();
    let (mut first, one) = guest.called(1, 1 << 20);
    let (mut second, two) = guest.called(2, 1 << 20);
    let mut fill = || {
        for socket in [&mut first, &mut second] {
            socket.set_nonblocking(true).unwrap();
            while socket.write(&[1; 4096]).is_ok() {}
        }
    };
    // More than all receive buffers hold, so that both are waiting when there are some again.
    fill();
    guest.driver.run();
    assert_eq!(guest.driver.used(RX).len(), usize::from(SIZE));
    fill();
    guest.driver.run();
    let mut turns = Vec::new();
    for _ in 0..10 {
        guest.offer(BUFFERS);
        turns.push(decode(&guest.driver.read(BUFFERS, HEADER)).source_port);
    }
    assert!(turns.windows(2).all(|pair| pair[0] != pair[1]), "{turns:?}");
    assert!([one, two].iter().all(|header| turns.contains(&header.destination_port)));
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let mut guest = Guest::booted();
    let (mut socket, header) = guest.called(1, 1 << 20);
    guest.driver.device().transport_reset();
    guest.driver.run();
    assert_eq!(rest(&mut socket), b"");
    // The driver adds its buffer later.
    guest.driver.write(BUFFERS - 4096, &[0xee; 8]);
    guest.driver.send(EVENT, &[writable(BUFFERS - 4096, 8)]);
    assert_eq!(guest.driver.used(EVENT).iter().map(|used| used.1).collect::<Vec<_>>(), [4]);
    assert_eq!(guest.driver.read(BUFFERS - 4096, 5), [0, 0, 0, 0, 0xee]);
    guest.driver.send(EVENT, &[writable(BUFFERS - 4096, 8)]);
    assert_eq!(guest.driver.used(EVENT), []);
    guest.send(data(header, b"x"), b"x");
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn the_path_is_taken_only_when_free_and_given_back() {
    let guest = Guest::new();
    let error = Vsock::new(4, &guest.path()).map(drop).unwrap_err();
    assert!(error.to_string().contains("the path exists"), "{error}");
    let path = guest.path();
    assert!(path.exists());
    drop(guest);
    assert!(!path.exists());
}

#[test]
fn the_configuration_is_the_address() {
    let guest = Guest::new();
    let mut config = [0xee; 12];
    guest.driver.device().read_config(0, &mut config);
    assert_eq!(config, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}
