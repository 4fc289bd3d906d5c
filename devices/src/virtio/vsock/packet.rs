//! Headers of vsock packets (virtio 1.2, 5.10.6), however the driver lays them out.

use crate::GuestMemory;
use crate::virtio::queue::Buffers;

/// Bytes of a header.
pub const HEADER: usize = 44;
/// The host's address.
pub const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`
pub const STREAM: u16 = 1;
/// Of a shutdown: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Of a shutdown: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Open a connection.
    Request,
    /// It is open.
    Response,
    /// It is not, or not any more.
    Reset,
    /// One or both ways are closed.
    Shutdown,
    /// Data.
    Data,
    /// How much may be sent.
    CreditUpdate,
    /// How much may I send?
    CreditRequest,
    /// Anything else.
    Unknown(u16),
}

impl Op {
    fn from_number(number: u16) -> Op {
        match number {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::Data,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            other => Op::Unknown(other),
        }
    }

    fn number(self) -> u16 {
        match self {
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
}

/// A packet's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Sender's address.
    pub source_cid: u64,
    /// Receiver's address.
    pub destination_cid: u64,
    /// Sender's port.
    pub source_port: u32,
    /// Receiver's port.
    pub destination_port: u32,
    /// Bytes of data behind the header.
    pub length: u32,
    /// Stream or sequenced packets.
    pub kind: u16,
    /// What the packet is for.
    pub op: Op,
    /// Of a shutdown: which ways.
    pub flags: u32,
    /// Bytes the sender has room for, in all.
    pub buf_alloc: u32,
    /// Bytes the sender has consumed, counted modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the header of a packet from the guest; `None` where the buffers are shorter than one.
    /// Whether the data it announces is there is not looked at.
    pub fn read(memory: &GuestMemory, from: &Buffers) -> Option<Header> {
        let mut bytes = [0; HEADER];
        if from.read(memory, 0, &mut bytes).ok()? != HEADER {
            return None;
        }
        let word = |at: usize, size: usize| {
            bytes[at..at + size].iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
        };
        Some(Header {
            source_cid: word(0, 8),
            destination_cid: word(8, 8),
            source_port: word(16, 4) as u32,
            destination_port: word(20, 4) as u32,
            length: word(24, 4) as u32,
            kind: word(28, 2) as u16,
            op: Op::from_number(word(30, 2) as u16),
            flags: word(32, 4) as u32,
            buf_alloc: word(36, 4) as u32,
            fwd_cnt: word(40, 4) as u32,
        })
    }

    /// The header of an answer that says no.
    pub fn refusal(&self) -> Header {
        Header {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            length: 0,
            kind: self.kind,
            op: Op::Reset,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// Writes the header of a packet to the guest; false where there is no room.
    pub fn write(&self, memory: &GuestMemory, to: &Buffers) -> bool {
        let mut bytes = [0; HEADER];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.source_cid.to_le_bytes());
        put(8, &self.destination_cid.to_le_bytes());
        put(16, &self.source_port.to_le_bytes());
        put(20, &self.destination_port.to_le_bytes());
        put(24, &self.length.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.number().to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        to.write(memory, 0, &bytes).is_ok_and(|written| written == HEADER)
    }
}
