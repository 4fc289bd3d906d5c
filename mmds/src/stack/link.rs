//! The wire between the guest and the stack: two queues of frames.

use std::collections::VecDeque;

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use super::MAX_FRAME;

/// Frames of the guest, and their bytes, that wait at most. One alone may be as long as IPv4 allows,
/// when the guest leaves segmentation to the device.
const MAX_INCOMING: usize = 256;
const MAX_INCOMING_BYTES: usize = 256 << 10;
/// Frames for the guest that wait at most.
const MAX_OUTGOING: usize = 64;

/// Both queues.
#[derive(Default)]
pub struct Link {
    incoming: VecDeque<Vec<u8>>,
    incoming_bytes: usize,
    outgoing: VecDeque<Vec<u8>>,
}

impl Link {
    /// Adds a frame of the guest, or drops it where there is no room.
    pub fn push(&mut self, frame: Vec<u8>) {
        let bytes = self.incoming_bytes + frame.len();
        if self.incoming.len() < MAX_INCOMING && bytes <= MAX_INCOMING_BYTES {
            self.incoming_bytes = bytes;
            self.incoming.push_back(frame);
        }
    }

    /// Takes a frame for the guest.
    pub fn pop(&mut self) -> Option<Vec<u8>> {
        self.outgoing.pop_front()
    }

    /// Whether there is a frame for the guest.
    pub fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether there is no room for another frame for the guest.
    pub fn is_full(&self) -> bool {
        self.outgoing.len() >= MAX_OUTGOING
    }
}

impl Device for Link {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        // What comes in may have to be answered.
        if self.is_full() {
            return None;
        }
        let frame = self.incoming.pop_front()?;
        self.incoming_bytes -= frame.len();
        Some((Incoming(frame), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Outgoing<'_>> {
        (!self.is_full()).then_some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MAX_FRAME;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

/// A frame of the guest.
pub struct Incoming(Vec<u8>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

/// Room for a frame for the guest.
pub struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}
