//! virtio-vsock (virtio 1.2, 5.10) with Unix sockets as the host's side.
//!
//! A host program reaches a port of the guest by connecting to the socket at `uds_path` and sending
//! `CONNECT <port>\n`; it gets `OK <port>\n` when the guest has accepted, and an end of file when it
//! has not. A guest program that connects to port P of the host (CID 2) reaches the socket at
//! `<uds_path>_<P>`. Firecracker has the same convention.

mod connection;
mod handshake;
mod packet;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use connection::{BUFFER, Connection, Received, State};
use handshake::{Handshake, Progress};
use packet::{HEADER, HOST_CID, Header, Op, SHUTDOWN_SEND, STREAM};

use super::queue::{BUDGET, Chain, DeviceQueue, QueueError};
use super::{ActivateError, Activation, VirtioDevice};

const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;
/// Events of the listening socket.
const LISTENER: u32 = 3;
/// Events of connections and handshakes count from here.
const FIRST_TOKEN: u32 = 16;

/// Most connections at once; a request above it is refused.
const MAX_CONNECTIONS: usize = 1023;
/// Most host programs that have connected and not yet said where to.
const MAX_HANDSHAKES: usize = 128;
/// Most packets without data that wait for the guest to make room.
const MAX_PENDING: usize = 4 * MAX_CONNECTIONS;
/// Ports given to host programs count from here.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Most data in one packet to the guest.
const MAX_DATA: usize = 64 << 10;

/// A connection's name: the host's port and the guest's.
type Key = (u32, u32);

/// A vsock device.
pub struct Vsock {
    guest_cid: u64,
    path: PathBuf,
    listener: UnixListener,
    events: [EventFd; 3],
    queues: Option<[DeviceQueue; 3]>,
    chain: Chain,
    connections: HashMap<Key, Connection>,
    handshakes: HashMap<u32, Handshake>,
    tokens: HashMap<u32, Key>,
    next_token: u32,
    next_host_port: u32,
    /// Packets without data that the guest must get: connection, what for, shutdown flags.
    pending: VecDeque<(Key, Op, u32)>,
    /// Connections that may have data for the guest, in turn.
    ready: VecDeque<Key>,
    buffer: Vec<u8>,
}

impl Vsock {
    /// A device with this address, listening at `path`, which must not exist.
    pub fn new(guest_cid: u32, path: &Path) -> io::Result<Vsock> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Vsock {
            guest_cid: guest_cid.into(),
            path: path.to_owned(),
            listener,
            events: [event()?, event()?, event()?],
            queues: None,
            chain: Chain::default(),
            connections: HashMap::new(),
            handshakes: HashMap::new(),
            tokens: HashMap::new(),
            next_token: FIRST_TOKEN,
            next_host_port: FIRST_HOST_PORT,
            pending: VecDeque::new(),
            ready: VecDeque::new(),
            buffer: vec![0; MAX_DATA],
        })
    }

    fn header(&self, (host_port, guest_port): Key, op: Op) -> Header {
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: host_port,
            destination_port: guest_port,
            length: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: BUFFER,
            fwd_cnt: 0,
        }
    }

    /// Leaves a packet without data for the guest. A guest that makes us owe it too many has
    /// stopped reading; it loses them.
    fn tell(&mut self, key: Key, op: Op, flags: u32) {
        if self.pending.len() < MAX_PENDING {
            self.pending.push_back((key, op, flags));
        }
    }

    fn token(&mut self) -> u32 {
        loop {
            let token = self.next_token;
            self.next_token = self.next_token.checked_add(1).unwrap_or(FIRST_TOKEN);
            if !self.tokens.contains_key(&token) && !self.handshakes.contains_key(&token) {
                return token;
            }
        }
    }

    fn watch(ops: &mut EventOps, socket: &impl AsRawFd, token: u32) {
        let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        super::register(ops, socket, token, set);
    }

    fn unwatch(ops: &mut EventOps, socket: &impl AsRawFd) {
        // Closing the socket would do; this keeps the event manager's books.
        let _ = ops.remove(Events::empty(socket));
    }

    fn accept(&mut self, ops: &mut EventOps) {
        // The listener is level-triggered: what is left comes with the next event.
        for _ in 0..16 {
            let Ok((socket, _)) = self.listener.accept() else { return };
            if self.handshakes.len() >= MAX_HANDSHAKES || socket.set_nonblocking(true).is_err() {
                tracing::warn!("vsock: a connection from the host was refused: too many at once");
                continue;
            }
            let token = self.token();
            Self::watch(ops, &socket, token);
            self.handshakes.insert(token, Handshake::new(socket));
        }
    }

    fn handshake(&mut self, token: u32, ops: &mut EventOps) {
        let Some(handshake) = self.handshakes.get_mut(&token) else { return };
        match handshake.advance() {
            Progress::More => {}
            Progress::Failed => {
                if let Some(handshake) = self.handshakes.remove(&token) {
                    Self::unwatch(ops, handshake.socket());
                }
            }
            Progress::Connect(guest_port) => {
                let Some(handshake) = self.handshakes.remove(&token) else { return };
                if self.connections.len() >= MAX_CONNECTIONS {
                    Self::unwatch(ops, handshake.socket());
                    return;
                }
                let key = (self.free_host_port(guest_port), guest_port);
                let connection = Connection::new(handshake.into_socket(), State::Connecting);
                self.connections.insert(key, connection);
                self.tokens.insert(token, key);
                self.tell(key, Op::Request, 0);
            }
        }
    }

    fn free_host_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let port = self.next_host_port;
            self.next_host_port = self.next_host_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            // There are more ports than connections.
            if !self.connections.contains_key(&(port, guest_port)) {
                return port;
            }
        }
    }

    /// A guest program connects to a port of the host.
    fn connect(&mut self, key: Key, ops: &mut EventOps) -> bool {
        if self.connections.contains_key(&key) || self.connections.len() >= MAX_CONNECTIONS {
            return false;
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", key.0));
        let socket = match handshake::connect(Path::new(&path)) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::debug!(port = key.0, %error, "vsock: nobody listens on the host");
                return false;
            }
        };
        let token = self.token();
        Self::watch(ops, &socket, token);
        self.connections.insert(key, Connection::new(socket, State::Open));
        self.tokens.insert(token, key);
        true
    }

    fn drop_connection(&mut self, key: Key, ops: &mut EventOps) {
        if let Some(connection) = self.connections.remove(&key) {
            Self::unwatch(ops, connection.socket());
            self.tokens.retain(|_, other| *other != key);
        }
    }

    /// Drops a connection and tells the guest.
    fn reset_connection(&mut self, key: Key, ops: &mut EventOps) {
        let guest_knows =
            self.connections.get(&key).is_none_or(|connection| connection.state != State::Draining);
        self.drop_connection(key, ops);
        if guest_knows {
            self.tell(key, Op::Reset, 0);
        }
    }

    /// Takes packets from the guest.
    fn transmit(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        for _ in 0..BUDGET {
            let Some(queues) = self.queues.as_mut() else { return Ok(()) };
            let queue = &mut queues[TX];
            if !queue.pop(&mut self.chain)? {
                return queue.signal();
            }
            let header = Header::parse(queue.memory(), &self.chain);
            let mut data = 0;
            if let Some(header) = &header {
                data = (header.length as usize).min(self.buffer.len());
                let got =
                    self.chain.readable.read(queue.memory(), HEADER, &mut self.buffer[..data]);
                data = got.unwrap_or(0);
            }
            queue.push(&self.chain, 0)?;
            match header {
                Some(header) if header.length as usize == data => self.packet(&header, ops),
                Some(header) => self.refuse(&header, ops),
                None => tracing::debug!("vsock: a packet shorter than it says"),
            }
        }
        // The rest in the next round of the event loop.
        let _ = self.events[TX].write(1);
        match self.queues.as_mut() {
            Some(queues) => queues[TX].signal(),
            None => Ok(()),
        }
    }

    fn refuse(&mut self, header: &Header, ops: &mut EventOps) {
        let key = (header.destination_port, header.source_port);
        if header.source_cid == self.guest_cid && header.op != Op::Reset {
            self.reset_connection(key, ops);
        }
    }

    /// Acts on one packet, whose data is at the begin of the buffer.
    fn packet(&mut self, header: &Header, ops: &mut EventOps) {
        if header.source_cid != self.guest_cid {
            tracing::debug!("vsock: a packet with a forged source");
            return;
        }
        let key = (header.destination_port, header.source_port);
        if header.kind != STREAM || header.destination_cid != HOST_CID {
            return self.refuse(header, ops);
        }
        if header.op == Op::Request {
            if self.connect(key, ops) {
                if let Some(connection) = self.connections.get_mut(&key) {
                    connection.credit(header.buf_alloc, header.fwd_cnt);
                }
                self.tell(key, Op::Response, 0);
                self.enqueue(key);
            } else {
                self.refuse(header, ops);
            }
            return;
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            return self.refuse(header, ops);
        };
        connection.credit(header.buf_alloc, header.fwd_cnt);
        let allowed = match header.op {
            Op::Response if connection.state == State::Connecting => {
                connection.state = State::Open;
                connection.confirm(key.0).is_ok()
            }
            Op::Data if connection.state == State::Open => {
                let sent = connection.send(&self.buffer[..header.length as usize]);
                sent.is_ok()
            }
            Op::CreditUpdate if connection.state == State::Open => true,
            Op::CreditRequest if connection.state == State::Open => {
                self.tell(key, Op::CreditUpdate, 0);
                true
            }
            Op::Shutdown if connection.state == State::Open => {
                connection.guest_shuts_down(header.flags);
                connection.flush().is_ok()
            }
            Op::Reset => {
                // After an orderly end the host still gets what was sent before it.
                if connection.guest_is_done() && !connection.flushed() {
                    connection.state = State::Draining;
                } else {
                    self.drop_connection(key, ops);
                }
                return;
            }
            _ => false,
        };
        if allowed {
            self.settle(key, ops);
            self.enqueue(key);
        } else {
            self.reset_connection(key, ops);
        }
    }

    /// Ends what is over, and tells the guest of room it may be waiting for.
    fn settle(&mut self, key: Key, ops: &mut EventOps) {
        let Some(connection) = self.connections.get(&key) else { return };
        if connection.guest_is_done() && connection.flushed() {
            self.reset_connection(key, ops);
        } else if connection.owes_credit_update() {
            self.tell(key, Op::CreditUpdate, 0);
            // Not again before it was sent.
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.announce();
            }
        }
    }

    fn enqueue(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key)
            && !connection.queued
            && connection.wants_to_send()
        {
            connection.queued = true;
            self.ready.push_back(key);
        }
    }

    /// A connection's socket has news.
    fn socket_event(&mut self, token: u32, set: EventSet, ops: &mut EventOps) {
        let Some(&key) = self.tokens.get(&token) else { return };
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if set
            .intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR)
        {
            connection.readable = true;
        }
        if connection.state != State::Connecting && connection.flush().is_err() {
            return self.reset_connection(key, ops);
        }
        self.settle(key, ops);
        self.enqueue(key);
    }

    /// Gives the guest what there is for it.
    fn receive(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        let mut budget = BUDGET;
        while !(self.pending.is_empty() && self.ready.is_empty()) {
            let Some(queues) = self.queues.as_mut() else { return Ok(()) };
            let queue = &mut queues[RX];
            if budget == 0 {
                let _ = self.events[RX].write(1);
                break;
            }
            budget -= 1;
            if !queue.pop(&mut self.chain)? {
                break;
            }
            if self.chain.writable.len() < HEADER {
                tracing::debug!("vsock: a receive buffer without room for a header");
                queue.push(&self.chain, 0)?;
                continue;
            }
            match self.next_packet(ops) {
                Some((header, data)) => {
                    let Some(queues) = self.queues.as_mut() else { return Ok(()) };
                    let queue = &mut queues[RX];
                    let buffers = &self.chain.writable;
                    let whole = header.write(queue.memory(), buffers)
                        && buffers.write(queue.memory(), HEADER, &self.buffer[..data]).is_ok();
                    queue.push(&self.chain, if whole { HEADER + data } else { 0 })?;
                }
                None => {
                    let Some(queues) = self.queues.as_mut() else { return Ok(()) };
                    queues[RX].undo_pop();
                }
            }
        }
        match self.queues.as_mut() {
            Some(queues) => queues[RX].signal(),
            None => Ok(()),
        }
    }

    /// The next packet for the guest, with its data in the buffer; packets without data go first.
    fn next_packet(&mut self, ops: &mut EventOps) -> Option<(Header, usize)> {
        if let Some((key, op, flags)) = self.pending.pop_front() {
            let mut header = self.header(key, op);
            header.flags = flags;
            if let Some(connection) = self.connections.get_mut(&key) {
                header.fwd_cnt = connection.announce();
            }
            return Some((header, 0));
        }
        while let Some(key) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.queued = false;
            let fits = (self.chain.writable.len() - HEADER).min(self.buffer.len());
            let received = connection.receive(&mut self.buffer[..fits]);
            let forwarded = connection.announce();
            match received {
                Received::Data(count) => {
                    // To the end of the line: every connection has its turn.
                    self.enqueue(key);
                    let mut header = self.header(key, Op::Data);
                    header.length = count as u32;
                    header.fwd_cnt = forwarded;
                    return Some((header, count));
                }
                Received::Nothing => {}
                Received::End => {
                    let mut header = self.header(key, Op::Shutdown);
                    header.flags = SHUTDOWN_SEND;
                    header.fwd_cnt = forwarded;
                    return Some((header, 0));
                }
                Received::Broken => {
                    self.drop_connection(key, ops);
                    return Some((self.header(key, Op::Reset), 0));
                }
            }
        }
        None
    }

    fn forget_all(&mut self, ops: Option<&mut EventOps>) {
        if let Some(ops) = ops {
            for connection in self.connections.values() {
                Self::unwatch(ops, connection.socket());
            }
        }
        self.connections.clear();
        self.tokens.clear();
        self.pending.clear();
        self.ready.clear();
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE]
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.queues = Some(super::take_queues("vsock", activation)?);
        // Host programs may have connected before the driver was there.
        let _ = self.events[RX].write(1);
        let _ = self.events[TX].write(1);
        Ok(())
    }

    fn reset(&mut self) {
        // A driver resets its device before it first uses it; those who wait for it stay.
        if self.queues.take().is_some() {
            self.forget_all(None);
        }
    }
}

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps) {
        for (index, event) in self.events.iter().enumerate() {
            super::register(ops, event, index as u32, EventSet::IN);
        }
        super::register(ops, &self.listener, LISTENER, EventSet::IN);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let mut result = Ok(());
        match events.data() {
            LISTENER => self.accept(ops),
            token @ FIRST_TOKEN.. if self.handshakes.contains_key(&token) => {
                self.handshake(token, ops);
            }
            token @ FIRST_TOKEN.. => self.socket_event(token, events.event_set(), ops),
            queue => {
                if let Some(event) = self.events.get(queue as usize) {
                    let _ = event.read();
                }
                if queue as usize == TX {
                    result = self.transmit(ops);
                }
                // The third queue's buffers wait for a transport reset, which only a restored
                // machine sends.
            }
        }
        if let Err(error) = result.and_then(|()| self.receive(ops)) {
            super::broken_all("vsock", &mut self.queues, &error);
            self.forget_all(Some(ops));
        }
    }
}

#[cfg(test)]
mod tests;
