//! What a descriptor chain asks of memory, and the answer. Parsing touches nothing but the chain.

use serde::{Deserialize, Serialize};

use crate::GuestMemory;
use crate::virtio::queue::Chain;

/// Bytes of a request (`struct virtio_mem_req`).
const REQUEST: usize = 24;
/// Bytes of an answer (`struct virtio_mem_resp`).
pub const ANSWER: usize = 10;

/// Consecutive blocks, as the driver names them: they may be anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks {
    /// Guest address of the first.
    pub address: u64,
    /// How many.
    pub count: u16,
}

/// A request (virtio 1.2, 5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Plug blocks that are not.
    Plug(Blocks),
    /// Unplug blocks that are plugged.
    Unplug(Blocks),
    /// Unplug all there are.
    UnplugAll,
    /// Say which are plugged.
    State(Blocks),
}

impl Request {
    /// Reads a request; `None` where it is too short or of an unknown type.
    pub fn parse(memory: &GuestMemory, chain: &Chain) -> Option<Request> {
        let mut bytes = [0; REQUEST];
        if chain.readable.read(memory, 0, &mut bytes).ok()? != REQUEST {
            return None;
        }
        // The type, the address and the number of blocks, with padding behind the first and the
        // last.
        let [kind, address, count] = *bytes.as_chunks().0 else { return None };
        let low = |word: [u8; 8]| u16::from_le_bytes([word[0], word[1]]);
        let blocks = Blocks { address: u64::from_le_bytes(address), count: low(count) };
        match low(kind) {
            0 => Some(Request::Plug(blocks)),
            1 => Some(Request::Unplug(blocks)),
            2 => Some(Request::UnplugAll),
            3 => Some(Request::State(blocks)),
            _ => None,
        }
    }
}

/// An answer (virtio 1.2, 5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ack,
    /// Done: the state that was asked for.
    State(State),
    /// More than is requested.
    Nack,
    /// Not now: the driver tries again later.
    Busy,
    /// Not at all.
    Error,
}

/// Of consecutive blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// All of them are.
    Plugged,
    /// None of them is.
    Unplugged,
    /// Some are, some are not.
    Mixed,
}

impl Answer {
    /// As the driver reads it.
    pub fn bytes(self) -> [u8; ANSWER] {
        let (kind, state) = match self {
            Answer::Ack => (0, 0),
            Answer::State(state) => (0, state as u8),
            Answer::Nack => (1, 0),
            Answer::Busy => (2, 0),
            Answer::Error => (3, 0),
        };
        let mut bytes = [0; ANSWER];
        (bytes[0], bytes[8]) = (kind, state);
        bytes
    }
}
