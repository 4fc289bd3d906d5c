//! The host's side: its sockets, and the connections that they and the guest have.
//!
//! Nothing here knows queues or the event loop. Packets come one at a time and go one at a time;
//! sockets to be watched, or no longer, are noted for the device to do.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::connection::{BUFFER, Connection, State};
use super::handshake::{self, Handshake, Progress};
use super::metrics::VsockMetrics;
use super::packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, STREAM};
use crate::GuestMemory;
use crate::virtio::queue::Buffers;

/// Most connections at once; a request above it is refused.
pub const MAX_CONNECTIONS: usize = 1023;
/// Most host programs that have connected and not yet said where to.
pub const MAX_HANDSHAKES: usize = 128;
/// Packets without data that may wait for the guest to make room before we take none from it.
pub const MAX_PENDING: usize = 1024;
/// Most data in one packet.
pub const MAX_DATA: usize = 64 << 10;
/// Ports given to host programs count from here.
pub const FIRST_HOST_PORT: u32 = 1 << 30;
/// Numbers of watched sockets count from here.
pub const FIRST_TOKEN: u32 = 16;
/// Most programs let in for one event.
const ACCEPTS: usize = 16;

/// A connection's name: the host's port and the guest's.
type Key = (u32, u32);

/// What an event said of a socket.
#[derive(Clone, Copy, Debug, Default)]
pub struct SocketNews {
    /// There may be bytes, or an end of file.
    pub readable: bool,
    /// The other end sends no more.
    pub ended: bool,
    /// The other end is gone, or both ways are shut down.
    pub hung_up: bool,
}

/// The host's side of a vsock device.
pub struct Host {
    guest_cid: u64,
    path: PathBuf,
    /// The file at the path is this device's.
    made_here: bool,
    listener: UnixListener,
    /// There may be programs to let in. The listener is watched edge-triggered too: one that
    /// cannot be let in for want of descriptors must not make the loop spin.
    callers: bool,
    warned: bool,
    handshakes: HashMap<u32, Handshake>,
    connections: HashMap<Key, Connection>,
    /// The guest has done with these in order; what it sent is still being handed to the host.
    draining: BTreeMap<u32, Connection>,
    tokens: HashMap<u32, Key>,
    next_token: u32,
    /// The port that the next program of the host gets, unless it is taken.
    pub next_host_port: u32,
    /// Packets without data that the guest must get.
    pending: VecDeque<Header>,
    /// Connections that may have data for the guest, in turn.
    ready: VecDeque<Key>,
    /// Sockets to be watched under these numbers.
    pub opened: Vec<u32>,
    /// Sockets not to be watched any more; then they can be closed.
    pub closed: Vec<UnixStream>,
    /// What was done; the device counts what it does itself.
    pub metrics: VsockMetrics,
}

impl Host {
    /// Listens at this path.
    pub fn listen(path: &Path) -> io::Result<UnixListener> {
        UnixListener::bind(path).map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => io::Error::new(
                error.kind(),
                "the path exists: another machine listens there, or one that was killed left it \
                 behind (then remove it)",
            ),
            _ => error,
        })
    }

    /// The guest's peers, with the socket that listens at this path, whose file is removed in the end
    /// if it was made here.
    pub fn new(
        guest_cid: u64,
        path: &Path,
        listener: UnixListener,
        made_here: bool,
    ) -> io::Result<Host> {
        listener.set_nonblocking(true)?;
        Ok(Host {
            guest_cid,
            path: path.to_owned(),
            made_here,
            listener,
            callers: false,
            warned: false,
            handshakes: HashMap::new(),
            connections: HashMap::new(),
            draining: BTreeMap::new(),
            tokens: HashMap::new(),
            next_token: FIRST_TOKEN,
            next_host_port: FIRST_HOST_PORT,
            pending: VecDeque::new(),
            ready: VecDeque::new(),
            opened: Vec::new(),
            closed: Vec::new(),
            metrics: VsockMetrics::default(),
        })
    }

    /// The listening socket, to be watched.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The socket that is to be watched under this number.
    pub fn socket(&self, token: u32) -> Option<&UnixStream> {
        if let Some(handshake) = self.handshakes.get(&token) {
            return Some(handshake.socket());
        }
        self.connections.get(self.tokens.get(&token)?).map(Connection::socket)
    }

    /// Whether there is something for the guest.
    pub fn has_packets(&self) -> bool {
        !(self.pending.is_empty() && self.ready.is_empty())
    }

    /// Whether the guest leaves so many answers unread that no more questions are taken from it.
    pub fn is_congested(&self) -> bool {
        self.pending.len() >= MAX_PENDING
    }

    /// Number of connections that take up a place.
    fn count(&self) -> usize {
        self.connections.len() + self.draining.len()
    }

    /// Whether there is a place for one more connection. The oldest of those that the guest has
    /// done with makes room: the host's program has had its time.
    fn has_place(&mut self) -> bool {
        if self.count() >= MAX_CONNECTIONS
            && let Some((_, connection)) = self.draining.pop_first()
        {
            self.close(connection);
        }
        self.count() < MAX_CONNECTIONS
    }

    fn close(&mut self, connection: Connection) {
        self.metrics.conns_removed += 1;
        self.tokens.remove(&connection.token);
        self.closed.push(connection.into_socket());
    }

    fn token(&mut self) -> u32 {
        loop {
            let token = self.next_token;
            self.next_token = self.next_token.checked_add(1).unwrap_or(FIRST_TOKEN);
            let taken = self.tokens.contains_key(&token)
                || self.handshakes.contains_key(&token)
                || self.draining.contains_key(&token);
            // There are more numbers than sockets.
            if !taken {
                return token;
            }
        }
    }

    /// Somebody wants to be let in.
    pub fn called(&mut self) {
        self.callers = true;
    }

    /// Lets in who waits; true where there may be more that can be let in at once.
    pub fn accept(&mut self) -> bool {
        for _ in 0..ACCEPTS {
            if !self.callers {
                return false;
            }
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => {
                        self.callers = false;
                        return false;
                    }
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => continue,
                    _ => {
                        // Too many open files, most likely: tried again at the next event.
                        if !std::mem::replace(&mut self.warned, true) {
                            tracing::warn!(%error, "vsock: cannot let a host program in");
                        }
                        return false;
                    }
                },
            };
            self.warned = false;
            if self.handshakes.len() >= MAX_HANDSHAKES || socket.set_nonblocking(true).is_err() {
                telemetry::limited_warning!("vsock: a host program was refused: too many at once");
                continue;
            }
            let token = self.token();
            self.handshakes.insert(token, Handshake::new(socket));
            self.opened.push(token);
        }
        self.callers
    }

    /// A socket has news.
    pub fn event(&mut self, token: u32, news: SocketNews) {
        if self.handshakes.contains_key(&token) {
            return self.handshake(token, news);
        }
        if let Some(connection) = self.draining.get_mut(&token) {
            connection.flush();
            if connection.flushed()
                && let Some(connection) = self.draining.remove(&token)
            {
                self.close(connection);
            }
            return;
        }
        let Some(&key) = self.tokens.get(&token) else { return };
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if news.hung_up && connection.state == State::Connecting {
            return self.withdraw(key);
        }
        if news.hung_up {
            connection.hang_up();
        } else {
            if news.readable || news.ended {
                connection.set_readable();
            }
            connection.flush();
        }
        self.settle(key);
    }

    fn handshake(&mut self, token: u32, news: SocketNews) {
        let Some(handshake) = self.handshakes.get_mut(&token) else { return };
        let progress = handshake.advance(news.ended || news.hung_up);
        if matches!(progress, Progress::More) {
            return;
        }
        let Some(handshake) = self.handshakes.remove(&token) else { return };
        let socket = handshake.into_socket();
        match progress {
            // One that has gone by now is not worth the guest's trouble.
            Progress::Connect(guest_port) if !news.hung_up && self.has_place() => {
                let key = (self.free_host_port(guest_port), guest_port);
                self.connections.insert(key, Connection::new(socket, token, State::Connecting));
                self.metrics.conns_added += 1;
                self.tokens.insert(token, key);
                self.tell(key, Op::Request, 0);
            }
            _ => self.closed.push(socket),
        }
    }

    /// A port of the host that is in no connection with this one of the guest.
    pub fn free_host_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let port = self.next_host_port;
            self.next_host_port = self.next_host_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            // There are more ports than connections.
            if !self.connections.contains_key(&(port, guest_port)) {
                return port;
            }
        }
    }

    /// The host's program gave up before the guest has answered.
    fn withdraw(&mut self, key: Key) {
        let before = self.pending.len();
        self.pending.retain(|header| {
            (header.source_port, header.destination_port) != key || header.op != Op::Request
        });
        if self.pending.len() == before {
            // The guest has heard of it.
            self.reset(key);
        } else {
            self.drop_connection(key);
        }
    }

    /// A guest program connects to a port of the host.
    fn connect(&mut self, key: Key) -> bool {
        if !self.has_place() {
            return false;
        }
        let mut path = OsString::from(&self.path);
        path.push(format!("_{}", key.0));
        let socket = match handshake::connect(Path::new(&path)) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::debug!(port = key.0, %error, "vsock: nobody listens on the host");
                return false;
            }
        };
        let token = self.token();
        self.connections.insert(key, Connection::new(socket, token, State::Open));
        self.metrics.conns_added += 1;
        self.tokens.insert(token, key);
        self.opened.push(token);
        true
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

    /// Leaves a packet without data for the guest.
    fn tell(&mut self, key: Key, op: Op, flags: u32) {
        let fwd_cnt = self.connections.get_mut(&key).map_or(0, Connection::announce);
        let header = self.header(key, op);
        self.pending.push_back(Header { flags, fwd_cnt, ..header });
    }

    fn drop_connection(&mut self, key: Key) {
        if let Some(connection) = self.connections.remove(&key) {
            self.close(connection);
        }
    }

    /// Drops a connection and tells the guest.
    fn reset(&mut self, key: Key) {
        self.metrics.conns_killed += u64::from(self.connections.contains_key(&key));
        self.drop_connection(key);
        self.tell(key, Op::Reset, 0);
    }

    /// Acts on one packet from the guest, which is in these buffers.
    pub fn packet(&mut self, header: &Header, memory: &GuestMemory, buffers: &Buffers) {
        if header.source_cid != self.guest_cid {
            tracing::debug!("vsock: a packet with a forged source");
            return;
        }
        if header.kind != STREAM || header.destination_cid != HOST_CID {
            if header.op != Op::Reset {
                self.pending.push_back(header.refusal());
            }
            return;
        }
        let key = (header.destination_port, header.source_port);
        let length = header.length as usize;
        let known = self.connections.contains_key(&key);
        if length > MAX_DATA || length > buffers.len().saturating_sub(super::packet::HEADER) {
            tracing::debug!("vsock: a packet shorter than it says, or too long");
            return self.reset(key);
        }
        match (header.op, known) {
            (Op::Reset, _) => self.forget(key),
            (Op::Request, false) if self.connect(key) => {
                if let Some(connection) = self.connections.get_mut(&key) {
                    connection.credit(header.buf_alloc, header.fwd_cnt);
                }
                self.tell(key, Op::Response, 0);
                self.settle(key);
            }
            (Op::Request, _) | (_, false) => self.reset(key),
            _ if self.accepts(key, header, memory, buffers) => self.settle(key),
            _ => self.reset(key),
        }
    }

    /// Acts on a packet for a connection that exists; false where it is against the rules.
    fn accepts(
        &mut self,
        key: Key,
        header: &Header,
        memory: &GuestMemory,
        buffers: &Buffers,
    ) -> bool {
        let Some(connection) = self.connections.get_mut(&key) else { return false };
        connection.credit(header.buf_alloc, header.fwd_cnt);
        match (header.op, connection.state) {
            (Op::Response, State::Connecting) => {
                connection.state = State::Open;
                connection.confirm(key.0).is_ok()
            }
            (Op::Data, State::Open) => {
                let taken = connection.send(memory, buffers, header.length as usize).is_ok();
                self.metrics.tx_bytes_count += if taken { header.length.into() } else { 0 };
                taken
            }
            (Op::CreditUpdate, State::Open) => true,
            (Op::CreditRequest, State::Open) => {
                self.tell(key, Op::CreditUpdate, 0);
                true
            }
            (Op::Shutdown, State::Open) => {
                connection.guest_shuts_down(header.flags);
                true
            }
            _ => false,
        }
    }

    /// The guest resets a connection. After an orderly end the host still gets what was sent
    /// before it.
    fn forget(&mut self, key: Key) {
        let Some(connection) = self.connections.remove(&key) else { return };
        if connection.guest_is_done() && !connection.flushed() {
            self.tokens.remove(&connection.token);
            self.draining.insert(connection.token, connection);
        } else {
            self.close(connection);
        }
    }

    /// Ends what is over, and tells the guest what it may be waiting for.
    fn settle(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if connection.guest_is_done() && connection.flushed() {
            return self.reset(key);
        }
        if let Some(flags) = connection.take_shutdown() {
            self.tell(key, Op::Shutdown, flags);
            if flags == SHUTDOWN_BOTH {
                // There is nothing left to do for it. What the guest may still send is answered
                // by a reset.
                return self.drop_connection(key);
            }
        }
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let (update, request) = (connection.owes_credit_update(), connection.wants_credit());
        let send = connection.wants_to_send() && !std::mem::replace(&mut connection.queued, true);
        if update {
            self.tell(key, Op::CreditUpdate, 0);
        }
        if request {
            self.tell(key, Op::CreditRequest, 0);
        }
        if send {
            self.ready.push_back(key);
        }
    }

    /// The next packet for the guest, with its data put into these buffers behind the header;
    /// packets without data go first.
    pub fn next_packet(&mut self, memory: &GuestMemory, buffers: &Buffers) -> Option<Header> {
        loop {
            if let Some(mut header) = self.pending.pop_front() {
                let key = (header.source_port, header.destination_port);
                if let Some(connection) = self.connections.get_mut(&key) {
                    header.fwd_cnt = connection.announce();
                }
                return Some(header);
            }
            let key = self.ready.pop_front()?;
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.queued = false;
            let received = connection.receive(memory, buffers, MAX_DATA);
            let fwd_cnt = connection.announce();
            // To the end of the line: every connection has its turn.
            self.settle(key);
            if let Some(length) = received {
                let header = self.header(key, Op::Data);
                return Some(Header { length: length as u32, fwd_cnt, ..header });
            }
        }
    }

    /// Removes the socket's file, if it was made here.
    pub fn remove_socket(&mut self) {
        if std::mem::take(&mut self.made_here) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Ends all connections: their driver is gone.
    pub fn abandon(&mut self) {
        let connections = std::mem::take(&mut self.connections).into_values();
        for connection in connections.chain(std::mem::take(&mut self.draining).into_values()) {
            let socket = connection.into_socket();
            // Programs hear of it now; the descriptor is closed when it is not watched any more.
            let _ = socket.shutdown(Shutdown::Both);
            self.closed.push(socket);
            self.metrics.conns_removed += 1;
        }
        self.tokens.clear();
        self.pending.clear();
        self.ready.clear();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.remove_socket();
    }
}
