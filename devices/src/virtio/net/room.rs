//! The driver's receive buffers, taken from its queue before there is a frame to put into them:
//! only a read tells how long a frame is.

use std::collections::VecDeque;
use std::ops::Range;

use super::LARGEST;
use super::header::LENGTH;
use crate::GuestMemory;
use crate::virtio::queue::{Buffers, Chain, DeviceQueue, QueueError};
use crate::virtio::vectored::MAX_PIECES;

/// Where `num_buffers` is in a header.
const NUM_BUFFERS: usize = 10;

/// Buffers for the frames to come.
#[derive(Default)]
pub struct Room {
    /// Most chains that the driver can offer at once.
    most: usize,
    chains: VecDeque<Chain>,
    bytes: usize,
    pieces: usize,
    /// Chains that were used, for their allocations.
    spare: Vec<Chain>,
}

impl Room {
    /// None yet, of a queue of this size.
    pub fn new(queue_size: u16) -> Room {
        Room { most: queue_size.into(), ..Room::default() }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// Number of chains.
    pub fn len(&self) -> usize {
        self.chains.len()
    }

    /// Takes buffers until the largest frame fits, or there are no more; the next one only where
    /// frames are not spread over several. One too small for the header is given back, and counts
    /// for the budget.
    pub fn fill(
        &mut self,
        queue: &mut DeviceQueue,
        mergeable: bool,
        budget: &mut usize,
    ) -> Result<(), QueueError> {
        let enough = |room: &Room| if mergeable { room.bytes >= LARGEST } else { !room.is_empty() };
        while !enough(self) && *budget > 0 {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.pop(&mut chain)? {
                self.spare.push(chain);
                break;
            }
            if chain.writable.len() < LENGTH {
                *budget -= 1;
                queue.push(&chain, 0)?;
                self.spare.push(chain);
                continue;
            }
            self.bytes += chain.writable.len();
            self.pieces += pieces(&chain.writable, queue.memory());
            self.chains.push_back(chain);
        }
        Ok(())
    }

    /// Whether a frame of so many bytes has room.
    pub fn fits(&self, length: usize) -> bool {
        self.bytes >= length
    }

    /// Whether any frame has room, and one system call can write it there.
    pub fn fits_any(&self) -> bool {
        self.fits(LARGEST) && self.pieces <= MAX_PIECES
    }

    /// Whether waiting would not make it more.
    pub fn is_all_there_can_be(&self, mergeable: bool) -> bool {
        !mergeable || self.bytes >= LARGEST || self.chains.len() >= self.most
    }

    /// The buffers, in order.
    pub fn parts(&self) -> impl Iterator<Item = (&Buffers, Range<usize>)> + Clone {
        self.chains.iter().map(|chain| (&chain.writable, 0..chain.writable.len()))
    }

    /// Writes a frame that fits.
    pub fn write(&self, memory: &GuestMemory, mut frame: &[u8]) {
        for chain in &self.chains {
            // Cannot fail: the ranges were checked when the chain was taken.
            let written = chain.writable.write(memory, 0, frame).unwrap_or(frame.len());
            frame = &frame[written..];
            if frame.is_empty() {
                break;
            }
        }
    }

    /// Gives the driver the buffers that hold a frame of so many bytes; the others stay.
    pub fn give_back(&mut self, queue: &mut DeviceQueue, length: usize) -> Result<(), QueueError> {
        let mut left = length;
        let used = self
            .chains
            .iter()
            .take_while(|chain| {
                let more = left > 0;
                left = left.saturating_sub(chain.writable.len());
                more
            })
            .count();
        // Also without mergeable buffers, where it is 1 (virtio 1.2, 5.1.6.4.1).
        if let Some(first) = self.chains.front() {
            let count = (used as u16).to_le_bytes();
            let _ = first.writable.write(queue.memory(), NUM_BUFFERS, &count);
        }
        let mut left = length;
        queue.push_together(self.chains.iter().take(used).map(|chain| {
            let part = left.min(chain.writable.len());
            left -= part;
            (chain, part)
        }))?;
        for chain in self.chains.drain(..used) {
            self.bytes -= chain.writable.len();
            self.pieces -= pieces(&chain.writable, queue.memory());
            self.spare.push(chain);
        }
        Ok(())
    }
}

/// In how many pieces these buffers lie in our address space.
fn pieces(buffers: &Buffers, memory: &GuestMemory) -> usize {
    buffers.slices(memory, 0..buffers.len()).count()
}
