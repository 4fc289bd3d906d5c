//! A TCP/IP stack in memory, one for each network interface that leads to the service.
//!
//! It answers ARP requests for the service's address and TCP on its port 80, and nothing else.
//! Everything it reads is a guest's: what it holds is bounded, and what it does not understand it
//! drops.
//!
//! Checksums of the guest's packets are not looked at, as they may have been left to the device
//! (VIRTIO_NET_F_CSUM). Nor is the address of the Ethernet frame a packet comes in: it is the
//! gateway's where the guest has no route to link-local addresses. In turn an answer goes where the
//! packet came from; a guest that filters ARP is not asked for what is known.
//!
//! A machine that is restored from a snapshot gets a new stack. What its guest still sends on old
//! connections is answered by a reset.

mod link;
#[cfg(test)]
mod tests;

use std::net::Ipv4Addr;
use std::time::Duration;

use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet,
};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, IpCidr, IpProtocol, Ipv4Packet,
};

use crate::http;
use crate::metrics::MmdsMetrics;
use crate::service::{AddressError, DEFAULT_ADDRESS, Mmds, check_address};
use link::Link;

/// Bytes of a frame's beginning that [`Stack::wants`] needs: the Ethernet header and an ARP packet.
pub const HEAD: usize = ETHERNET + 28;
/// Bytes of the longest frame for the guest: an MTU of 1500 and the Ethernet header.
pub const MAX_FRAME: usize = 1500 + ETHERNET;
/// Connections at a time, those that are being closed among them. Firecracker has as many.
pub const MAX_CONNECTIONS: usize = 30;
/// How long a connection is kept on which nothing moves.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
const HTTP_PORT: u16 = 80;
/// Buffers of a connection in bytes: requests are short, answers are not.
const RECEIVE_BUFFER: usize = 4096;
const SEND_BUFFER: usize = 16384;

/// How a stack is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackConfig {
    /// The address of the service.
    pub ipv4_address: Ipv4Addr,
    /// The MAC address that belongs to it.
    pub mac: [u8; 6],
}

impl Default for StackConfig {
    /// As Firecracker has it.
    fn default() -> StackConfig {
        StackConfig { ipv4_address: DEFAULT_ADDRESS, mac: [0x06, 0x01, 0x23, 0x45, 0x67, 0x01] }
    }
}

/// Why there is no stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StackError {
    /// Not an address for the service.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Not the address of one station.
    #[error("{0:02x?} is not a unicast MAC address")]
    Mac([u8; 6]),
    /// The system has no random numbers.
    #[error("cannot choose sequence numbers: {0}")]
    Random(#[from] rustix::io::Errno),
}

/// The service's end of a network interface.
///
/// Frames of the guest go in by [`receive`](Stack::receive), those for it come out by
/// [`transmit`](Stack::transmit), and in between is [`poll`](Stack::poll).
pub struct Stack {
    address: Ipv4Addr,
    mac: EthernetAddress,
    interface: Interface,
    sockets: SocketSet<'static>,
    link: Link,
    connections: Vec<Connection>,
    deadline: Option<Duration>,
    /// What the service does not know of yet.
    metrics: MmdsMetrics,
}

/// A connection, or the one that is to be.
struct Connection {
    handle: SocketHandle,
    http: http::Connection,
    /// When something last moved, and what then was: the state, and how much was unacknowledged.
    moved: Duration,
    seen: (State, usize),
}

impl Stack {
    /// A stack at these addresses.
    pub fn new(config: StackConfig) -> Result<Stack, StackError> {
        check_address(config.ipv4_address)?;
        let mac = EthernetAddress(config.mac);
        if !mac.is_unicast() {
            return Err(StackError::Mac(config.mac));
        }
        let mut link = Link::default();
        let mut settings = Config::new(mac.into());
        let mut seed = [0; 8];
        crate::random::fill(&mut seed)?;
        settings.random_seed = u64::from_ne_bytes(seed);
        let mut interface = Interface::new(settings, &mut link, Instant::ZERO);
        // All guests are neighbours, whatever their address.
        let network = IpCidr::new(config.ipv4_address.into(), 0);
        interface.update_ip_addrs(|addresses| {
            // There is room for two.
            let _ = addresses.push(network);
        });
        Ok(Stack {
            address: config.ipv4_address,
            mac,
            interface,
            sockets: SocketSet::new(Vec::new()),
            link,
            connections: Vec::new(),
            deadline: None,
            metrics: MmdsMetrics::default(),
        })
    }

    /// Whether this frame of the guest, of which the first [`HEAD`] bytes are enough, is for the
    /// service: ARP or IPv4 for its address. It then must not reach the TAP.
    pub fn wants(&self, frame: &[u8]) -> bool {
        let Ok(ethernet) = EthernetFrame::new_checked(frame) else { return false };
        let at = match ethernet.ethertype() {
            EthernetProtocol::Arp => 24,
            EthernetProtocol::Ipv4 => 16,
            _ => return false,
        };
        ethernet.payload().get(at..at + 4) == Some(&self.address.octets())
    }

    /// Takes a frame of the guest, to be looked at by the next [`poll`](Stack::poll). What is not
    /// for the service, makes no sense, or is too much is dropped, as on a wire.
    pub fn receive(&mut self, frame: &[u8]) {
        if !self.wants(frame) {
            return;
        }
        self.metrics.rx_accepted += 1;
        let Ok(ethernet) = EthernetFrame::new_checked(frame) else { return };
        if ethernet.ethertype() == EthernetProtocol::Arp {
            self.link.push(frame.to_vec());
            return;
        }
        let Ok(packet) = Ipv4Packet::new_checked(ethernet.payload()) else { return };
        let (mac, address) = (ethernet.src_addr(), packet.src_addr());
        let is_unicast = mac.is_unicast()
            && !(address.is_unspecified() || address.is_multicast() || address.is_broadcast());
        if !is_unicast || address == self.address || packet.next_header() != IpProtocol::Tcp {
            return;
        }
        let mut readdressed = frame.to_vec();
        EthernetFrame::new_unchecked(&mut readdressed).set_dst_addr(self.mac);
        self.link.push(self.introduction(mac, address));
        self.link.push(readdressed);
    }

    /// An ARP reply, from which the stack learns where the sender of a packet is.
    fn introduction(&self, mac: EthernetAddress, address: Ipv4Addr) -> Vec<u8> {
        let arp = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: mac,
            source_protocol_addr: address,
            target_hardware_addr: self.mac,
            target_protocol_addr: self.address,
        };
        let ethernet =
            EthernetRepr { src_addr: mac, dst_addr: self.mac, ethertype: EthernetProtocol::Arp };
        let mut bytes = vec![0; HEAD];
        let mut frame = EthernetFrame::new_unchecked(&mut bytes);
        ethernet.emit(&mut frame);
        arp.emit(&mut ArpPacket::new_unchecked(frame.payload_mut()));
        bytes
    }

    /// Writes the next frame for the guest into `buffer` and says how long it is; `None` where
    /// there is none. What does not fit into a buffer of less than [`MAX_FRAME`] bytes is cut off.
    pub fn transmit(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let frame = self.link.pop()?;
        let length = frame.len().min(buffer.len());
        buffer[..length].copy_from_slice(&frame[..length]);
        self.metrics.tx_frames += 1;
        self.metrics.tx_bytes += length as u64;
        Some(length)
    }

    /// Whether there is a frame for the guest.
    pub fn has_frames(&self) -> bool {
        self.link.has_outgoing()
    }

    /// Does what is to be done: after [`receive`](Stack::receive), at
    /// [`next_deadline`](Stack::next_deadline), and when [`transmit`](Stack::transmit) has no more
    /// frames, since further ones may have waited for room.
    pub fn poll(&mut self, now: Duration, mmds: &mut Mmds) {
        let time = Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX));
        loop {
            self.listen(now);
            // Frame by frame, so that there is somebody who listens for each that opens a
            // connection.
            let ingress =
                self.interface.poll_ingress_single(time, &mut self.link, &mut self.sockets);
            for connection in &mut self.connections {
                let listened = connection.is_listening();
                connection.serve(self.sockets.get_mut(connection.handle), now, mmds);
                let opened = listened && !connection.is_listening();
                self.metrics.connections_created += u64::from(opened);
            }
            while self.interface.poll_egress(time, &mut self.link, &mut self.sockets)
                != PollResult::None
            {}
            self.forget_closed(now);
            if matches!(ingress, PollIngressSingleResult::None) {
                break;
            }
        }
        let idle = self.connections.iter().filter(|connection| !connection.is_listening());
        let idle = idle.map(|connection| connection.moved + IDLE_TIMEOUT).min();
        // When the guest takes no frames, nothing can be done about what is to be sent.
        let timers = if self.link.is_full() {
            None
        } else {
            let at = self.interface.poll_at(time, &self.sockets);
            at.map(|at| Duration::from_micros(u64::try_from(at.total_micros()).unwrap_or(0)))
        };
        self.deadline = [idle, timers].into_iter().flatten().min();
        mmds.metrics.add(&std::mem::take(&mut self.metrics));
    }

    /// When [`poll`](Stack::poll) is to be called, if nothing happens before: a time counted as its
    /// `now` is, perhaps one that has passed.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// Sees to it that somebody listens, if there may be one more connection.
    fn listen(&mut self, now: Duration) {
        if self.connections.iter().any(Connection::is_listening) {
            return;
        }
        if self.connections.len() >= MAX_CONNECTIONS {
            // On this link no segment of an old connection is under way any more, for which
            // TIME-WAIT would have to wait.
            let done = self.connections.iter().position(|old| old.seen.0 == State::TimeWait);
            let Some(done) = done else { return };
            self.sockets.remove(self.connections.swap_remove(done).handle);
            self.metrics.connections_destroyed += 1;
        }
        let buffer = |size| SocketBuffer::new(vec![0; size]);
        let mut socket = Socket::new(buffer(RECEIVE_BUFFER), buffer(SEND_BUFFER));
        // The last segment of an answer is not to wait for what the guest says of the one before.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        if socket.listen(HTTP_PORT).is_ok() {
            let handle = self.sockets.add(socket);
            let seen = (State::Listen, 0);
            let http = http::Connection::default();
            self.connections.push(Connection { handle, http, moved: now, seen });
        }
    }

    /// Forgets connections that are closed.
    fn forget_closed(&mut self, now: Duration) {
        let (sockets, metrics) = (&mut self.sockets, &mut self.metrics);
        let mut is_listened = false;
        self.connections.retain_mut(|connection| {
            let socket = sockets.get_mut(connection.handle);
            let was_open = !connection.is_listening();
            connection.look(socket, now);
            let is_over = match connection.seen.0 {
                // A reset that is not sent for long will never be.
                State::Closed => socket.remote_endpoint().is_none() || connection.is_idle(now),
                // A connection that was reset before it was open listens again, beside its heir.
                State::Listen => std::mem::replace(&mut is_listened, true),
                _ => false,
            };
            if is_over {
                sockets.remove(connection.handle);
            }
            let ended = was_open && (is_over || connection.is_listening());
            metrics.connections_destroyed += u64::from(ended);
            !is_over
        });
    }
}

impl Connection {
    fn is_listening(&self) -> bool {
        self.seen.0 == State::Listen
    }

    /// Whether it is to be reset. `next_deadline` has this time.
    fn is_idle(&self, now: Duration) -> bool {
        now.saturating_sub(self.moved) >= IDLE_TIMEOUT
    }

    /// Notes whether something has moved.
    fn look(&mut self, socket: &Socket<'_>, now: Duration) {
        let seen = (socket.state(), socket.send_queue());
        if seen != self.seen {
            self.seen = seen;
            self.moved = now;
        }
    }

    /// Takes requests from the socket and gives it the answers. Ends it where nothing moves.
    fn serve(&mut self, socket: &mut Socket<'_>, now: Duration, mmds: &mut Mmds) {
        loop {
            let taken = socket.recv(|bytes| {
                let taken = self.http.receive(bytes);
                (taken, taken)
            });
            self.http.advance(mmds, now);
            let sent = socket.send_slice(self.http.pending()).unwrap_or(0);
            self.http.sent(sent);
            let taken = taken.unwrap_or(0);
            if taken > 0 {
                self.moved = now;
            }
            if taken == 0 && sent == 0 {
                break;
            }
        }
        // The guest may have said that it sends no more, and still wait for answers.
        let is_last = !socket.may_recv() && self.http.pending().is_empty();
        if socket.may_send() && (self.http.is_done() || is_last) {
            socket.close();
        }
        self.look(socket, now);
        if self.is_idle(now) && socket.is_active() {
            socket.abort();
            self.look(socket, now);
        }
    }
}
