//! One stream between a port of the guest and a Unix socket of the host: its state and its credit.
//!
//! Sockets are watched edge-triggered: `readable` and `writable` remember what the last edge said,
//! so that nothing is asked of the kernel twice and no socket can make the loop spin.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes we take from the guest for one connection before the host has read them.
pub const BUFFER: u32 = 256 << 10;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The guest was asked to accept it.
    Connecting,
    /// Data flows.
    Open,
    /// The guest is done with it; what it sent is still being handed to the host.
    Draining,
}

/// A connection.
pub struct Connection {
    socket: UnixStream,
    /// How far it is.
    pub state: State,
    /// The socket may have bytes for the guest, or an end of file.
    pub readable: bool,
    /// In the queue of those that have bytes for the guest.
    pub queued: bool,
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
    /// What the guest has shut down.
    guest_shutdown: u32,
    /// The host sends no more, and the guest was told.
    host_ended: bool,
    write_closed: bool,
}

/// What reading for the guest gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes.
    Data(usize),
    /// Nothing now.
    Nothing,
    /// The host will send no more; told once.
    End,
    /// The socket is broken.
    Broken,
}

impl Connection {
    /// A connection over this non-blocking socket.
    pub fn new(socket: UnixStream, state: State) -> Connection {
        Connection {
            socket,
            state,
            readable: true,
            queued: false,
            outgoing: VecDeque::new(),
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            sent: 0,
            forwarded: 0,
            announced: 0,
            guest_shutdown: 0,
            host_ended: false,
            write_closed: false,
        }
    }

    /// The socket, to be watched.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Takes the guest's word on its buffer. A count that runs backwards only ever lowers what we
    /// send: credit is never taken to be more than the buffer.
    pub fn credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_buf_alloc = buf_alloc;
        self.guest_fwd_cnt = fwd_cnt;
    }

    /// Bytes the guest has room for.
    pub fn room(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(in_flight)
    }

    /// Whether there may be something to send to the guest, and it may be sent.
    pub fn wants_to_send(&self) -> bool {
        self.state == State::Open
            && self.readable
            && !self.host_ended
            && (self.room() > 0 || self.guest_shutdown & SHUTDOWN_RECEIVE != 0)
    }

    /// Reads bytes for the guest, no more than it has room for.
    pub fn receive(&mut self, into: &mut [u8]) -> Received {
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            // Nobody listens there any more.
            self.host_ended = true;
            return Received::Nothing;
        }
        let fits = into.len().min(self.room() as usize);
        if fits == 0 {
            return Received::Nothing;
        }
        loop {
            return match self.socket.read(&mut into[..fits]) {
                Ok(0) => {
                    self.host_ended = true;
                    Received::End
                }
                Ok(count) => {
                    self.sent = self.sent.wrapping_add(count as u32);
                    Received::Data(count)
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => continue,
                    ErrorKind::WouldBlock => {
                        self.readable = false;
                        Received::Nothing
                    }
                    _ => Received::Broken,
                },
            };
        }
    }

    /// Takes bytes from the guest. An error means that the guest sent what it may not, or that the
    /// host's end is gone.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let held = self.outgoing.len() + bytes.len();
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || held > BUFFER as usize {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut rest = bytes;
        if self.outgoing.is_empty() {
            let written = write_some(&mut self.socket, bytes)?;
            self.forwarded = self.forwarded.wrapping_add(written as u32);
            rest = &bytes[written..];
        }
        self.outgoing.extend(rest);
        Ok(())
    }

    /// Hands the host what it has room for now, and the end when there is no more.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            let (front, _) = self.outgoing.as_slices();
            let written = write_some(&mut self.socket, front)?;
            if written == 0 {
                return Ok(());
            }
            self.outgoing.drain(..written);
            self.forwarded = self.forwarded.wrapping_add(written as u32);
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.write_closed {
            self.write_closed = true;
            // The host may have gone first.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// Whether all that the guest sent is with the host.
    pub fn flushed(&self) -> bool {
        self.outgoing.is_empty()
    }

    /// The guest closes one or both ways; true when both are closed.
    pub fn guest_shuts_down(&mut self, flags: u32) -> bool {
        self.guest_shutdown |= flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
        self.guest_shutdown == SHUTDOWN_RECEIVE | SHUTDOWN_SEND
    }

    /// Whether the guest has closed both ways.
    pub fn guest_is_done(&self) -> bool {
        self.guest_shutdown == SHUTDOWN_RECEIVE | SHUTDOWN_SEND
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
        let line = format!("OK {host_port}\n");
        // An empty socket buffer has room for a line.
        match write_some(&mut self.socket, line.as_bytes())? {
            written if written == line.len() => Ok(()),
            _ => Err(ErrorKind::WriteZero.into()),
        }
    }
}

/// Writes what there is room for; no room is zero bytes.
fn write_some(socket: &mut UnixStream, bytes: &[u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match socket.write(&bytes[done..]) {
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
