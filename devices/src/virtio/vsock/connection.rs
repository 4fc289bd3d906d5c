//! One stream between a port of the guest and a Unix socket of the host: its state and its credit.
//!
//! Sockets are watched edge-triggered: `readable` remembers what the last edge said, so that
//! nothing is asked of the kernel twice and no socket can make the loop spin.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{HEADER, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::GuestMemory;
use crate::virtio::queue::Buffers;
use crate::virtio::vectored;

/// Bytes we take from the guest for one connection before the host has read them.
pub const BUFFER: u32 = 256 << 10;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The guest was asked to accept it.
    Connecting,
    /// Data flows.
    Open,
}

/// The guest sent what it may not: more than there is room for, or after it said it was done.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation;

/// A connection.
pub struct Connection {
    socket: UnixStream,
    /// Under which number its socket is watched.
    pub token: u32,
    /// How far it is.
    pub state: State,
    /// In the queue of those that have bytes for the guest.
    pub queued: bool,
    /// The socket may have bytes for the guest, or an end of file.
    readable: bool,
    /// Bytes from the guest that the host has not taken.
    outgoing: VecDeque<u8>,
    /// What the guest said it has room for, and has consumed.
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    /// Bytes sent to the guest, and taken from it by the host, modulo 2^32.
    sent: u32,
    forwarded: u32,
    /// What the guest last heard of `forwarded`.
    announced: u32,
    /// The guest was asked for credit since it last gave some.
    asked: bool,
    /// What the guest has shut down, and the host, and what the guest has heard of the latter.
    guest_shutdown: u32,
    host_shutdown: u32,
    told_shutdown: u32,
    /// The end of what the guest sent was passed on.
    write_closed: bool,
}

impl Connection {
    /// A connection over this non-blocking socket.
    pub fn new(socket: UnixStream, token: u32, state: State) -> Connection {
        Connection {
            socket,
            token,
            state,
            queued: false,
            readable: true,
            outgoing: VecDeque::new(),
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            sent: 0,
            forwarded: 0,
            announced: 0,
            asked: false,
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
            write_closed: false,
        }
    }

    /// The socket, to be watched.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The socket, to be closed. What the host sent and nobody will read is taken out of it first,
    /// where the guest has ended in order: the host would get an error instead of an end of file.
    pub fn into_socket(mut self) -> UnixStream {
        if self.guest_is_done() {
            let mut scrap = [0; 4096];
            // Nothing is added, since the guest's shutdown has become the socket's.
            while matches!(self.socket.read(&mut scrap), Ok(1..)) {}
        }
        self.socket
    }

    /// The socket may be read again.
    pub fn set_readable(&mut self) {
        self.readable = true;
    }

    /// The host's program is gone, or both ways are shut down. What it sent before can still be
    /// read, and nothing can be written.
    pub fn hang_up(&mut self) {
        self.readable = true;
        self.go_deaf();
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.host_shutdown = SHUTDOWN_BOTH;
        }
    }

    /// The host takes no more: what it has not taken is lost, as if it had.
    fn go_deaf(&mut self) {
        self.forwarded = self.forwarded.wrapping_add(self.outgoing.len() as u32);
        self.outgoing = VecDeque::new();
        self.host_shutdown |= SHUTDOWN_RECEIVE;
    }

    /// Takes the guest's word on its buffer. A count that runs backwards, or ahead, only ever
    /// lowers what we send: credit is never taken to be more than the buffer.
    pub fn credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_buf_alloc = buf_alloc;
        self.guest_fwd_cnt = fwd_cnt;
        self.asked &= self.room() == 0;
    }

    /// Bytes the guest has room for.
    pub fn room(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(in_flight)
    }

    fn has_something(&self) -> bool {
        self.state == State::Open
            && self.readable
            && self.host_shutdown & SHUTDOWN_SEND == 0
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// Whether there may be something for the guest, and it may be sent.
    pub fn wants_to_send(&self) -> bool {
        self.has_something() && self.room() > 0
    }

    /// Whether to ask the guest for credit; once, until it has given some.
    pub fn wants_credit(&mut self) -> bool {
        self.has_something() && self.room() == 0 && !std::mem::replace(&mut self.asked, true)
    }

    /// Reads at most so many bytes for the guest, into its buffers behind the header, and no more
    /// than it has room for. None where there is nothing now, or nothing any more.
    pub fn receive(&mut self, memory: &GuestMemory, into: &Buffers, most: usize) -> Option<usize> {
        let fits = into.len().saturating_sub(HEADER).min(most).min(self.room() as usize);
        if fits == 0 || !self.has_something() {
            return None;
        }
        loop {
            let range = HEADER..HEADER + fits;
            match vectored::read(&self.socket, memory, std::iter::once((into, range))) {
                Ok(0) => self.host_shutdown |= SHUTDOWN_SEND,
                Ok(count) => {
                    self.sent = self.sent.wrapping_add(count as u32);
                    return Some(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                // The host's program went away without reading all that was there for it.
                Err(_) => {
                    self.go_deaf();
                    self.host_shutdown = SHUTDOWN_BOTH;
                }
            }
            return None;
        }
    }

    /// Takes so many bytes from the guest, which are behind the header.
    pub fn send(
        &mut self,
        memory: &GuestMemory,
        from: &Buffers,
        length: usize,
    ) -> Result<(), Violation> {
        let held = self.outgoing.len() + length;
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || held > BUFFER as usize {
            return Err(Violation);
        }
        let end = HEADER + length;
        let mut at = HEADER;
        while self.outgoing.is_empty() && at < end && self.host_shutdown & SHUTDOWN_RECEIVE == 0 {
            match vectored::write(&self.socket, &[], memory, from, at..end) {
                Ok(count) => at += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.go_deaf(),
            }
        }
        self.forwarded = self.forwarded.wrapping_add((at - HEADER) as u32);
        let mut part = [0; 4096];
        while at < end {
            let most = part.len().min(end - at);
            let count = from.read(memory, at, &mut part[..most]).unwrap_or(0);
            if count == 0 {
                return Err(Violation);
            }
            self.outgoing.extend(&part[..count]);
            at += count;
        }
        if self.host_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.go_deaf();
        }
        Ok(())
    }

    /// Hands the host what it has room for now, and the end when there is no more.
    pub fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            let (front, back) = self.outgoing.as_slices();
            match self.socket.write_vectored(&[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(count) => {
                    self.outgoing.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.go_deaf(),
            }
        }
        // A connection that once had a slow reader does not keep the memory.
        self.outgoing = VecDeque::new();
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.write_closed {
            self.write_closed = true;
            // The host may have gone first.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// Whether all that the guest sent is with the host.
    pub fn flushed(&self) -> bool {
        self.outgoing.is_empty()
    }

    /// The guest closes one or both ways.
    pub fn guest_shuts_down(&mut self, flags: u32) {
        let before = self.guest_shutdown;
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & !before & SHUTDOWN_RECEIVE != 0 {
            // A program that goes on sending hears of it.
            let _ = self.socket.shutdown(Shutdown::Read);
        }
        self.flush();
    }

    /// Whether the guest has closed both ways.
    pub fn guest_is_done(&self) -> bool {
        self.guest_shutdown == SHUTDOWN_BOTH
    }

    /// What the host has shut down, if the guest has not heard of all of it; it is then taken to
    /// have.
    pub fn take_shutdown(&mut self) -> Option<u32> {
        let news = self.host_shutdown & !self.told_shutdown != 0;
        self.told_shutdown = self.host_shutdown;
        (self.state == State::Open && news).then_some(self.host_shutdown)
    }

    /// Whether the guest may be waiting to hear that its bytes were consumed.
    pub fn owes_credit_update(&self) -> bool {
        self.state == State::Open && self.forwarded.wrapping_sub(self.announced) >= BUFFER / 2
    }

    /// The count to put into a packet that now goes to the guest.
    pub fn announce(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.forwarded
    }

    /// Tells the host that its connection is open, as Firecracker does.
    pub fn confirm(&mut self, host_port: u32) -> io::Result<()> {
        // An empty socket buffer has room for a line.
        self.socket.write_all(format!("OK {host_port}\n").as_bytes())
    }
}
