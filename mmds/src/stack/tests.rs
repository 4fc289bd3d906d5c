//! The stack against a guest: another smoltcp interface, or frames made by hand.

use proptest::prelude::*;
use serde_json::json;
use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities};
use smoltcp::wire::{
    ArpRepr, EthernetRepr, IpAddress, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
};

use super::link::{Incoming, Outgoing};
use super::*;
use crate::{DEFAULT_SIZE_LIMIT, MmdsState, MmdsVersion};

const GUEST_MAC: EthernetAddress = EthernetAddress([0xaa, 0xfc, 0, 0, 0, 1]);
const GUEST: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);
const SERVICE: Ipv4Addr = DEFAULT_ADDRESS;

/// A guest's end of the wire. It looks at our checksums, and leaves its own to the device.
#[derive(Default)]
struct GuestLink(Link);

impl Device for GuestLink {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, now: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        self.0.receive(now)
    }

    fn transmit(&mut self, now: Instant) -> Option<Outgoing<'_>> {
        self.0.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = self.0.capabilities();
        capabilities.checksum.ipv4 = Checksum::Rx;
        capabilities.checksum.tcp = Checksum::Rx;
        capabilities
    }
}

/// A guest, the stack and the service, and the time they all live in.
struct World {
    interface: Interface,
    sockets: SocketSet<'static>,
    link: GuestLink,
    port: u16,
    stack: Stack,
    mmds: Mmds,
    now: Duration,
}

impl World {
    fn new(version: MmdsVersion) -> World {
        let state = MmdsState { version, ..MmdsState::default() };
        let mut mmds = Mmds::new(state, DEFAULT_SIZE_LIMIT).unwrap();
        mmds.put(json!({"a": "b"})).unwrap();
        let mut link = GuestLink::default();
        let settings = Config::new(GUEST_MAC.into());
        let mut interface = Interface::new(settings, &mut link, Instant::ZERO);
        let network = IpCidr::new(GUEST.into(), 0);
        interface.update_ip_addrs(|addresses| addresses.push(network).unwrap());
        World {
            interface,
            sockets: SocketSet::new(Vec::new()),
            link,
            port: 1024,
            stack: Stack::new(StackConfig::default()).unwrap(),
            mmds,
            now: Duration::from_secs(3),
        }
    }

    fn time(&self) -> Instant {
        Instant::from_micros(self.now.as_micros() as i64)
    }

    /// Moves frames to and fro until none moves any more.
    fn settle(&mut self) {
        loop {
            self.interface.poll(self.time(), &mut self.link, &mut self.sockets);
            let mut moved = false;
            while let Some(frame) = self.link.0.pop() {
                assert!(self.stack.wants(&frame));
                assert!(self.stack.wants(&frame[..frame.len().min(HEAD)]));
                self.stack.receive(&frame);
                moved = true;
            }
            self.stack.poll(self.now, &mut self.mmds);
            let mut buffer = [0; MAX_FRAME + 1];
            while let Some(length) = self.stack.transmit(&mut buffer) {
                assert!(length <= MAX_FRAME);
                self.link.0.push(buffer[..length].to_vec());
                moved = true;
            }
            if !moved {
                return;
            }
        }
    }

    /// Lets time pass, with everything done in time.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now = (self.now + Duration::from_millis(50)).min(end);
            self.settle();
        }
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 8192]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        self.port += 1;
        let server = (IpAddress::from(SERVICE), HTTP_PORT);
        socket.connect(self.interface.context(), server, self.port).unwrap();
        let handle = self.sockets.add(socket);
        self.settle();
        handle
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn send(&mut self, handle: SocketHandle, text: &str) {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let sent = self.socket(handle).send_slice(rest).unwrap();
            rest = &rest[sent..];
            self.settle();
        }
    }

    /// All that comes until nothing more does.
    fn read(&mut self, handle: SocketHandle) -> String {
        let mut bytes = Vec::new();
        loop {
            let taken = self.socket(handle).recv(|part| {
                bytes.extend_from_slice(part);
                (part.len(), part.len())
            });
            self.settle();
            if taken.unwrap_or(0) == 0 {
                return String::from_utf8(bytes).unwrap();
            }
        }
    }

    fn ask(&mut self, handle: SocketHandle, request: &str) -> String {
        self.send(handle, request);
        self.read(handle)
    }

    /// One request on a connection of its own, which the guest closes.
    fn fetch(&mut self, request: &str) -> String {
        let handle = self.connect();
        let answer = self.ask(handle, request);
        self.socket(handle).close();
        self.settle();
        self.sockets.remove(handle);
        answer
    }
}

fn body(answer: &str) -> &str {
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    answer.split_once("\r\n\r\n").unwrap().1
}

const GET: &str = "GET /a HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n";

#[test]
fn a_guest_gets_a_value() {
    let mut world = World::new(MmdsVersion::V1);
    let answer = world.fetch(GET);
    assert_eq!(body(&answer), "b");
}

#[test]
fn a_guest_gets_a_token_and_with_it_a_value() {
    let mut world = World::new(MmdsVersion::V2);
    let refused = world.fetch(GET);
    assert!(refused.starts_with("HTTP/1.1 401 Unauthorized\r\n"), "{refused}");
    let answer = world.fetch(
        "PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n",
    );
    assert!(answer.contains("\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n"), "{answer}");
    let get = format!("GET /a HTTP/1.1\r\nX-metadata-token: {}\r\n\r\n", body(&answer));
    assert_eq!(body(&world.fetch(&get)), "b");
    world.pass(Duration::from_secs(60));
    assert!(world.fetch(&get).contains("MMDS token not valid."));
}

#[test]
fn frames_requests_and_connections_are_counted() {
    let mut world = World::new(MmdsVersion::V2);
    world.fetch("GET /a HTTP/1.0\r\n\r\n");
    world.fetch("GET /a HTTP/1.0\r\nX-metadata-token: x\r\n\r\n");
    world.connect();
    world.settle();
    let metrics = world.mmds.metrics();
    assert_eq!((metrics.rx_count, metrics.rx_no_token, metrics.rx_invalid_token), (2, 1, 1));
    assert_eq!(metrics.connections_created, 3);
    assert!(metrics.rx_accepted > 6 && metrics.tx_frames > 6 && metrics.tx_bytes > 6 * 40);
    assert!(metrics.connections_destroyed <= 2);
    world.pass(2 * IDLE_TIMEOUT);
    assert_eq!(world.mmds.metrics().connections_destroyed, 3);
}

#[test]
fn a_connection_serves_one_request_after_the_other() {
    let mut world = World::new(MmdsVersion::V1);
    let handle = world.connect();
    for _ in 0..5 {
        assert_eq!(body(&world.ask(handle, GET)), "b");
        world.pass(IDLE_TIMEOUT / 2);
    }
    let answers = world.ask(handle, &GET.repeat(200));
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 200);
    assert_eq!(world.socket(handle).state(), State::Established);
    assert_eq!(world.stack.connections.len(), 2);
}

#[test]
fn a_long_answer_takes_many_segments() {
    let mut world = World::new(MmdsVersion::V1);
    let text: String = ('a'..='z').cycle().take(DEFAULT_SIZE_LIMIT - 20).collect();
    world.mmds.put(json!({"a": text})).unwrap();
    let handle = world.connect();
    let answer = world.ask(handle, GET);
    assert_eq!(body(&answer), text);
    // The guest closes its window in the middle of it, and opens it again.
    world.send(handle, GET);
    world.pass(Duration::from_secs(5));
    assert_eq!(body(&world.read(handle)), text);
}

#[test]
fn a_long_answer_survives_losses() {
    let mut world = World::new(MmdsVersion::V1);
    let text: String = ('a'..='z').cycle().take(20_000).collect();
    world.mmds.put(json!({"a": text})).unwrap();
    let handle = world.connect();
    world.socket(handle).send_slice(GET.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut count = 0;
    let mut buffer = [0; MAX_FRAME];
    for _ in 0..1000 {
        world.interface.poll(world.time(), &mut world.link, &mut world.sockets);
        let _ = world.socket(handle).recv(|part| {
            answer.extend_from_slice(part);
            (part.len(), ())
        });
        while let Some(frame) = world.link.0.pop() {
            world.stack.receive(&frame);
        }
        world.stack.poll(world.now, &mut world.mmds);
        while let Some(length) = world.stack.transmit(&mut buffer) {
            count += 1;
            if count % 4 != 0 {
                world.link.0.push(buffer[..length].to_vec());
            }
        }
        world.now += Duration::from_millis(50);
    }
    assert_eq!(body(&String::from_utf8(answer).unwrap()), text);
}

#[test]
fn thirty_connections_are_served_and_more_are_refused() {
    let mut world = World::new(MmdsVersion::V1);
    let handles: Vec<_> = (0..40).map(|_| world.connect()).collect();
    for (index, handle) in handles.iter().enumerate() {
        if index < MAX_CONNECTIONS {
            assert_eq!(body(&world.ask(*handle, GET)), "b");
        } else {
            assert_eq!(world.socket(*handle).state(), State::Closed, "{index}");
        }
    }
    assert_eq!(world.stack.connections.len(), MAX_CONNECTIONS);
    world.socket(handles[0]).abort();
    world.settle();
    assert_eq!(body(&world.fetch(GET)), "b");
}

#[test]
fn connections_opened_in_one_moment_are_all_served() {
    let mut world = World::new(MmdsVersion::V1);
    for port in 0..20 {
        let (mut socket, server) = (
            Socket::new(SocketBuffer::new(vec![0; 4096]), SocketBuffer::new(vec![0; 4096])),
            (IpAddress::from(SERVICE), HTTP_PORT),
        );
        socket.connect(world.interface.context(), server, 5000 + port).unwrap();
        world.sockets.add(socket);
    }
    world.settle();
    assert!(world.sockets.iter().all(|(_, socket)| match socket {
        smoltcp::socket::Socket::Tcp(socket) => socket.state() == State::Established,
    }));
}

#[test]
fn connections_that_the_service_closes_do_not_use_up_the_places() {
    let mut world = World::new(MmdsVersion::V1);
    for _ in 0..3 * MAX_CONNECTIONS {
        assert_eq!(body(&world.fetch("GET /a HTTP/1.0\r\n\r\n")), "b");
    }
    world.pass(Duration::from_secs(15));
    assert_eq!(world.stack.connections.len(), 1);
}

#[test]
fn what_is_closed_or_reset_is_forgotten_at_once() {
    let mut world = World::new(MmdsVersion::V1);
    world.fetch(GET);
    assert_eq!(world.stack.connections.len(), 1);
    let handle = world.connect();
    world.send(handle, "GET /a HT");
    world.socket(handle).abort();
    world.settle();
    assert_eq!(world.stack.connections.len(), 1);
    assert_eq!(world.stack.next_deadline(), None);
}

#[test]
fn a_guest_that_has_said_all_it_has_to_say_still_gets_its_answers() {
    let mut world = World::new(MmdsVersion::V1);
    let handle = world.connect();
    world.socket(handle).send_slice(GET.repeat(2).as_bytes()).unwrap();
    world.socket(handle).close();
    world.settle();
    assert_eq!(world.read(handle).matches("200 OK").count(), 2);
    assert!(matches!(world.socket(handle).state(), State::TimeWait | State::Closed));
    assert_eq!(world.stack.connections.len(), 1);
}

#[test]
fn garbage_is_answered_and_the_connection_closed_however_much_follows() {
    let mut world = World::new(MmdsVersion::V1);
    let handle = world.connect();
    let answer = world.ask(handle, &format!("garbage\r\n\r\n{}", "x".repeat(100_000)));
    assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer}");
    assert_eq!(world.socket(handle).state(), State::CloseWait);
    world.socket(handle).close();
    world.settle();
    assert_eq!(world.socket(handle).state(), State::Closed);
}

#[test]
fn a_connection_on_which_nothing_moves_is_reset() {
    let mut world = World::new(MmdsVersion::V1);
    let handle = world.connect();
    assert_eq!(body(&world.ask(handle, GET)), "b");
    assert_eq!(world.stack.next_deadline(), Some(world.now + IDLE_TIMEOUT));
    world.pass(IDLE_TIMEOUT - Duration::from_millis(100));
    assert_eq!(world.socket(handle).state(), State::Established);
    world.pass(Duration::from_millis(100));
    assert_eq!(world.socket(handle).state(), State::Closed);
    assert_eq!(world.stack.connections.len(), 1);
    assert_eq!(world.stack.next_deadline(), None);
}

#[test]
fn connections_from_before_a_restore_are_reset() {
    let mut world = World::new(MmdsVersion::V1);
    let handle = world.connect();
    world.stack = Stack::new(StackConfig::default()).unwrap();
    world.send(handle, GET);
    assert_eq!(world.socket(handle).state(), State::Closed);
    assert_eq!(body(&world.fetch(GET)), "b");
}

#[test]
fn a_guest_that_takes_no_frames_is_not_worked_for() {
    let mut world = World::new(MmdsVersion::V1);
    let text = "x".repeat(DEFAULT_SIZE_LIMIT - 20);
    world.mmds.put(json!({"a": text})).unwrap();
    let handles: Vec<_> = (0..20).map(|_| world.connect()).collect();
    for handle in &handles {
        world.socket(*handle).send_slice(GET.as_bytes()).unwrap();
    }
    for _ in 0..10 {
        world.now += Duration::from_secs(1);
        world.interface.poll(world.time(), &mut world.link, &mut world.sockets);
        while let Some(frame) = world.link.0.pop() {
            world.stack.receive(&frame);
        }
        world.stack.poll(world.now, &mut world.mmds);
        assert!(world.stack.link.is_full());
        assert!(world.stack.next_deadline() > Some(world.now));
    }
    // And when it does, all goes on.
    for handle in &handles {
        let mut answer = world.read(*handle);
        while answer.len() < text.len() {
            world.pass(Duration::from_millis(100));
            answer += &world.read(*handle);
        }
        assert_eq!(body(&answer), text);
    }
}

// Frames made by hand.

/// A frame with an IPv4 packet of a guest at this address.
fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let ethernet = EthernetRepr {
        src_addr: GUEST_MAC,
        dst_addr: EthernetAddress(StackConfig::default().mac),
        ethertype: EthernetProtocol::Ipv4,
    };
    let ip = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header: protocol,
        payload_len: payload.len(),
        hop_limit: 64,
    };
    let mut bytes = vec![0; ETHERNET + ip.buffer_len() + payload.len()];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes);
    ethernet.emit(&mut frame);
    let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
    ip.emit(&mut packet, &ChecksumCapabilities::ignored());
    packet.payload_mut().copy_from_slice(payload);
    bytes
}

fn segment<'a>(control: TcpControl, seq: i32, ack: Option<i32>, payload: &'a [u8]) -> TcpRepr<'a> {
    TcpRepr {
        src_port: 4000,
        dst_port: HTTP_PORT,
        control,
        seq_number: TcpSeqNumber(seq),
        ack_number: ack.map(TcpSeqNumber),
        window_len: 60_000,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    }
}

/// A frame with a segment, without checksums.
fn tcp(segment: &TcpRepr<'_>) -> Vec<u8> {
    let mut bytes = vec![0; segment.buffer_len()];
    let (from, to) = (IpAddress::from(GUEST), IpAddress::from(SERVICE));
    let mut packet = TcpPacket::new_unchecked(&mut bytes);
    segment.emit(&mut packet, &from, &to, &ChecksumCapabilities::ignored());
    ipv4(GUEST, SERVICE, IpProtocol::Tcp, &bytes)
}

fn arp(operation: ArpOperation, target: Ipv4Addr) -> Vec<u8> {
    let arp = ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: GUEST_MAC,
        source_protocol_addr: GUEST,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: target,
    };
    let ethernet = EthernetRepr {
        src_addr: GUEST_MAC,
        dst_addr: EthernetAddress::BROADCAST,
        ethertype: EthernetProtocol::Arp,
    };
    let mut bytes = vec![0; HEAD];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes);
    ethernet.emit(&mut frame);
    arp.emit(&mut ArpPacket::new_unchecked(frame.payload_mut()));
    bytes
}

impl World {
    /// What the stack answers to this frame.
    fn exchange(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        self.stack.receive(frame);
        self.stack.poll(self.now, &mut self.mmds);
        let mut buffer = [0; MAX_FRAME];
        let mut frames = Vec::new();
        while let Some(length) = self.stack.transmit(&mut buffer) {
            frames.push(buffer[..length].to_vec());
        }
        self.stack.poll(self.now, &mut self.mmds);
        frames
    }
}

/// The segment in a frame of the stack, its flag, sequence number and payload.
fn parse_tcp(frame: &[u8]) -> (TcpControl, i32, Vec<u8>) {
    let ethernet = EthernetFrame::new_checked(frame).unwrap();
    assert_eq!(ethernet.dst_addr(), GUEST_MAC);
    assert_eq!(ethernet.src_addr(), EthernetAddress(StackConfig::default().mac));
    let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
    assert_eq!((ip.src_addr(), ip.dst_addr()), (SERVICE, GUEST));
    let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
    let all = ChecksumCapabilities::default();
    let tcp = TcpRepr::parse(&tcp, &SERVICE.into(), &GUEST.into(), &all).unwrap();
    (tcp.control, tcp.seq_number.0, tcp.payload.to_vec())
}

#[test]
fn only_what_is_for_the_address_is_taken_from_the_tap() {
    let stack = Stack::new(StackConfig::default()).unwrap();
    let other = Ipv4Addr::new(169, 254, 169, 253);
    assert!(stack.wants(&arp(ArpOperation::Request, SERVICE)));
    assert!(!stack.wants(&arp(ArpOperation::Request, other)));
    assert!(stack.wants(&ipv4(GUEST, SERVICE, IpProtocol::Tcp, b"")));
    assert!(stack.wants(&ipv4(GUEST, SERVICE, IpProtocol::Udp, b"")));
    assert!(!stack.wants(&ipv4(GUEST, other, IpProtocol::Tcp, b"")));
    assert!(!stack.wants(&ipv4(SERVICE, GUEST, IpProtocol::Tcp, b"")));
    let mut ipv6 = ipv4(GUEST, SERVICE, IpProtocol::Tcp, b"");
    ipv6[12..14].copy_from_slice(&[0x86, 0xdd]);
    assert!(!stack.wants(&ipv6));
    for length in [0, 1, 13, 14, 30, 33] {
        assert!(!stack.wants(&ipv4(GUEST, SERVICE, IpProtocol::Tcp, b"")[..length]));
    }
    let config = StackConfig { ipv4_address: other, ..StackConfig::default() };
    let stack = Stack::new(config).unwrap();
    assert!(stack.wants(&arp(ArpOperation::Request, other)));
    assert!(!stack.wants(&arp(ArpOperation::Request, SERVICE)));
}

#[test]
fn service_and_stack_can_be_given_to_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Mmds>();
    is_send::<Stack>();
}

#[test]
fn a_stack_has_addresses_of_one_station() {
    let new = |ipv4_address, mac| Stack::new(StackConfig { ipv4_address, mac }).err();
    let mac = StackConfig::default().mac;
    let bad = Ipv4Addr::BROADCAST;
    assert_eq!(new(bad, mac), Some(StackError::Address(AddressError(bad))));
    for mac in [[0xff; 6], [1, 0, 0, 0, 0, 1]] {
        assert_eq!(new(SERVICE, mac), Some(StackError::Mac(mac)));
    }
}

#[test]
fn who_asks_for_the_address_is_told_the_mac_address() {
    let mut world = World::new(MmdsVersion::V1);
    let frames = world.exchange(&arp(ArpOperation::Request, SERVICE));
    assert_eq!(frames.len(), 1);
    let ethernet = EthernetFrame::new_checked(&frames[0]).unwrap();
    assert_eq!(ethernet.dst_addr(), GUEST_MAC);
    let reply = ArpRepr::parse(&ArpPacket::new_checked(ethernet.payload()).unwrap()).unwrap();
    let expected = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]),
        source_protocol_addr: SERVICE,
        target_hardware_addr: GUEST_MAC,
        target_protocol_addr: GUEST,
    };
    assert_eq!(reply, expected);
}

#[test]
fn nothing_but_arp_and_tcp_is_answered() {
    let mut world = World::new(MmdsVersion::V1);
    let echo = [8, 0, 0, 0, 0, 1, 0, 1];
    let syn = tcp(&segment(TcpControl::Syn, 1, None, b""));
    let mut frames = vec![
        arp(ArpOperation::Reply, SERVICE),
        arp(ArpOperation::Unknown(9), SERVICE),
        arp(ArpOperation::Request, Ipv4Addr::new(169, 254, 1, 1)),
        ipv4(GUEST, SERVICE, IpProtocol::Icmp, &echo),
        ipv4(GUEST, SERVICE, IpProtocol::Udp, &[0; 20]),
        ipv4(GUEST, SERVICE, IpProtocol::Igmp, &[0; 20]),
        ipv4(GUEST, SERVICE, IpProtocol::Unknown(200), &[0; 20]),
        ipv4(GUEST, SERVICE, IpProtocol::Tcp, &[0; 20]),
        ipv4(GUEST, SERVICE, IpProtocol::Tcp, &[0; 3]),
        tcp(&segment(TcpControl::Rst, 1, None, b"")),
        syn[..syn.len() - 1].to_vec(),
    ];
    // From who is not one station, or we.
    for source in [[0, 0, 0, 0], [255, 255, 255, 255], [224, 0, 0, 1], SERVICE.octets()] {
        let mut frame = syn.clone();
        frame[ETHERNET + 12..ETHERNET + 16].copy_from_slice(&source);
        frames.push(frame);
    }
    let mut frame = syn.clone();
    frame[6] = 0xff;
    frames.push(frame);
    // A fragment.
    let mut frame = syn.clone();
    frame[ETHERNET + 6] = 0x20;
    frame[ETHERNET + 7] = 1;
    frames.push(frame);
    for (index, frame) in frames.into_iter().enumerate() {
        assert_eq!(world.exchange(&frame), Vec::<Vec<u8>>::new(), "{index}");
    }
}

#[test]
fn other_ports_refuse_connections() {
    let mut world = World::new(MmdsVersion::V1);
    let syn = segment(TcpControl::Syn, 1, None, b"");
    let frames = world.exchange(&tcp(&TcpRepr { dst_port: 8080, ..syn }));
    assert_eq!(frames.len(), 1);
    assert_eq!(parse_tcp(&frames[0]).0, TcpControl::Rst);
}

#[test]
fn a_guest_is_served_that_sends_by_its_gateway_and_answers_no_arp() {
    let mut world = World::new(MmdsVersion::V1);
    let by_gateway = |mut frame: Vec<u8>| {
        frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 99]);
        frame
    };
    let syn = world.exchange(&by_gateway(tcp(&segment(TcpControl::Syn, 10, None, b""))));
    assert_eq!(syn.len(), 1);
    let (control, seq, _) = parse_tcp(&syn[0]);
    assert_eq!(control, TcpControl::Syn);
    let get = segment(TcpControl::Psh, 11, Some(seq.wrapping_add(1)), GET.as_bytes());
    let answer = world.exchange(&by_gateway(tcp(&get)));
    assert_eq!(answer.len(), 1);
    assert!(parse_tcp(&answer[0]).2.ends_with(b"\r\n\r\nb"));
}

#[test]
fn a_segment_longer_than_the_mtu_is_taken() {
    let mut world = World::new(MmdsVersion::V1);
    let syn = world.exchange(&tcp(&segment(TcpControl::Syn, 10, None, b"")));
    let seq = parse_tcp(&syn[0]).1;
    let get = format!("GET /a HTTP/1.1\r\nPadding: {}\r\n\r\n", "x".repeat(3000));
    let get = segment(TcpControl::Psh, 11, Some(seq.wrapping_add(1)), get.as_bytes());
    let answer = world.exchange(&tcp(&get));
    assert!(parse_tcp(&answer[0]).2.starts_with(b"HTTP/1.1 200 OK"));
}

#[test]
fn a_flood_is_dropped_where_there_is_no_room() {
    let mut world = World::new(MmdsVersion::V1);
    let large = ipv4(GUEST, SERVICE, IpProtocol::Tcp, &[0; 60_000]);
    let small = arp(ArpOperation::Request, SERVICE);
    for frame in [large, small] {
        for _ in 0..10_000 {
            world.stack.receive(&frame);
        }
    }
    world.stack.poll(world.now, &mut world.mmds);
    for port in 0..10_000 {
        let syn = segment(TcpControl::Syn, 1, None, b"");
        world.exchange(&tcp(&TcpRepr { src_port: port, ..syn }));
    }
    assert_eq!(world.stack.connections.len(), MAX_CONNECTIONS);
    world.pass(2 * IDLE_TIMEOUT);
    assert_eq!(body(&world.fetch(GET)), "b");
}

/// One step of a hostile guest.
#[derive(Clone, Debug)]
enum Step {
    Bytes(Vec<u8>),
    Segment { port: u16, control: u8, seq: i32, ack: Option<i32>, window: u16, payload: Vec<u8> },
    Options(Vec<u8>),
    Changed { control: u8, at: usize, byte: u8, length: usize },
    Pass(u32),
}

fn control(number: u8) -> TcpControl {
    match number % 5 {
        0 => TcpControl::None,
        1 => TcpControl::Psh,
        2 => TcpControl::Syn,
        3 => TcpControl::Fin,
        _ => TcpControl::Rst,
    }
}

fn step() -> impl Strategy<Value = Step> {
    let payload = prop_oneof![
        Just(Vec::new()),
        Just(GET.as_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 0..3000),
    ];
    let near = prop_oneof![4 => Just(0), 1 => -5..5i32, 1 => 0..60_000i32, 1 => any::<i32>()];
    let ack = prop_oneof![4 => Just(0), 1 => -60_000..60_000i32, 1 => any::<i32>()];
    let ack = prop::option::weighted(0.8, ack);
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..200).prop_map(Step::Bytes),
        8 => (0..3u16, any::<u8>(), near, ack, any::<u16>(), payload).prop_map(
            |(port, control, seq, ack, window, payload)| Step::Segment {
                port, control, seq, ack, window, payload
            }
        ),
        1 => prop::collection::vec(any::<u8>(), 40).prop_map(Step::Options),
        4 => (any::<u8>(), 12..80usize, any::<u8>(), 0..80usize).prop_map(
            |(control, at, byte, length)| Step::Changed { control, at, byte, length }
        ),
        1 => (0..20_000u32).prop_map(Step::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Steps of a guest that keeps a TCP connection's numbers in mind, so as to get far, or not.
    #[test]
    fn a_hostile_guest_gets_nowhere(
        is_open: bool,
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut world = World::new(MmdsVersion::V1);
        world.mmds.put(json!({"a": "x".repeat(30_000)})).unwrap();
        // The numbers of the next segments of the guest, and of those of the stack that it knows.
        let (mut seq, mut ack) = (100i32, 0i32);
        if is_open {
            let syn = world.exchange(&tcp(&segment(TcpControl::Syn, seq, None, b"")));
            (seq, ack) = (seq + 1, parse_tcp(&syn[0]).1.wrapping_add(1));
            world.exchange(&tcp(&segment(TcpControl::None, seq, Some(ack), b"")));
        }
        for step in steps {
            let frame = match step {
                Step::Bytes(bytes) => bytes,
                Step::Segment { port, control: number, seq: near, ack: known, window, payload } => {
                    let control = control(number);
                    let repr = TcpRepr {
                        src_port: 4000 + port,
                        window_len: window,
                        ..segment(
                            control,
                            seq.wrapping_add(near),
                            known.map(|known| ack.wrapping_add(known)),
                            &payload,
                        )
                    };
                    if near == 0 {
                        let length = payload.len() as i32 + control.len() as i32;
                        seq = seq.wrapping_add(length);
                    }
                    tcp(&repr)
                }
                Step::Options(options) => {
                    let mut bytes = tcp(&segment(TcpControl::Syn, seq, None, &options));
                    // The payload becomes options.
                    bytes[ETHERNET + 20 + 12] = 15 << 4;
                    bytes
                }
                Step::Changed { control: number, at, byte, length } => {
                    let payload = GET.as_bytes();
                    let mut bytes = tcp(&segment(control(number), seq, Some(ack), payload));
                    if let Some(at) = bytes.get_mut(at) {
                        *at = byte;
                    }
                    bytes.truncate(bytes.len().saturating_sub(length));
                    bytes
                }
                Step::Pass(milliseconds) => {
                    world.now += Duration::from_millis(milliseconds.into());
                    Vec::new()
                }
            };
            for frame in world.exchange(&frame) {
                let ethernet = EthernetFrame::new_checked(&frame).unwrap();
                if ethernet.ethertype() == EthernetProtocol::Ipv4 {
                    let packet = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
                    let packet = TcpPacket::new_checked(packet.payload()).unwrap();
                    let length = packet.segment_len() as i32;
                    ack = packet.seq_number().0.wrapping_add(length);
                }
            }
            prop_assert!(world.stack.connections.len() <= MAX_CONNECTIONS);
            prop_assert!(world.stack.next_deadline().is_none_or(|at| at > world.now));
        }
        // It has harmed nobody, not even itself.
        world.now += 2 * IDLE_TIMEOUT;
        world.exchange(&[]);
        world.now += 2 * IDLE_TIMEOUT;
        world.exchange(&[]);
        prop_assert_eq!(world.stack.connections.len(), 1);
        prop_assert_eq!(world.fetch("GET /b HTTP/1.0\r\n\r\n").contains(" 404 "), true);
    }

    #[test]
    fn any_bytes_are_survived(
        mut frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 1..50),
        kinds in prop::collection::vec(0..4u8, 50),
    ) {
        let mut world = World::new(MmdsVersion::V1);
        for (frame, kind) in frames.iter_mut().zip(kinds) {
            // Most are made to look as if they were for us.
            if kind > 0 && frame.len() >= HEAD {
                let (ethertype, at) = if kind == 1 { (6, 38) } else { (0, 30) };
                frame[12..14].copy_from_slice(&[8, ethertype]);
                frame[at..at + 4].copy_from_slice(&SERVICE.octets());
                if kind == 3 {
                    frame[14] = 0x45;
                    frame[16..18].copy_from_slice(&[0, 28]);
                    frame[20..22].copy_from_slice(&[0, 0]);
                    frame[23] = 6;
                }
            }
            world.exchange(frame);
        }
    }
}
