//! A queue whose chains may be worth several events, and what is done with them.

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::GuestMemory;
use crate::discard::{PAGE, discard};
use crate::virtio::queue::{BUDGET, Chain, DeviceQueue, QueueError};

/// Most ranges given back for one event; a page in the balloon counts as one.
const RANGES_PER_EVENT: usize = 1024;
/// Most bytes given back for one event.
const BYTES_PER_EVENT: usize = 128 << 20;

/// A queue and how far its next chain was dealt with, in bytes: a chain may be worth several events.
pub struct Channel {
    pub queue: DeviceQueue,
    done: usize,
}

/// What one event may still do.
pub struct Allowance {
    ranges: usize,
    bytes: usize,
}

/// How a chain was left.
pub enum Progress {
    Finished,
    /// So many bytes of it are done; the rest is for another event.
    At(usize),
}

impl Channel {
    /// A queue of which nothing is done yet.
    pub fn new(queue: DeviceQueue) -> Channel {
        Channel { queue, done: 0 }
    }

    /// Lets `work` deal with chains, from an offset into each on, as far as one event goes; whether
    /// there may be more to do.
    pub fn serve(
        &mut self,
        chain: &mut Chain,
        mut work: impl FnMut(&GuestMemory, &Chain, usize, &mut Allowance) -> Progress,
    ) -> Result<bool, QueueError> {
        let mut allowance = Allowance { ranges: RANGES_PER_EVENT, bytes: BYTES_PER_EVENT };
        for _ in 0..BUDGET {
            if !self.queue.pop(chain)? {
                return Ok(false);
            }
            match work(self.queue.memory(), chain, self.done, &mut allowance) {
                Progress::Finished => {
                    self.done = 0;
                    self.queue.push(chain, 0)?;
                }
                Progress::At(offset) => {
                    // A driver that puts another chain there meanwhile only cheats itself.
                    self.done = offset;
                    self.queue.undo_pop();
                    return Ok(true);
                }
            }
        }
        Ok(true)
    }
}

/// Gives pages in the balloon back to the host: a list of page numbers of 32 bits.
pub fn inflate(
    memory: &GuestMemory,
    chain: &Chain,
    from: usize,
    allowance: &mut Allowance,
) -> Progress {
    let mut bytes = [[0; 4]; RANGES_PER_EVENT];
    let bytes = bytes[..allowance.ranges.min(RANGES_PER_EVENT)].as_flattened_mut();
    let got = chain.readable.read(memory, from, bytes).unwrap_or(0);
    let mut pages = [0u32; RANGES_PER_EVENT];
    let mut count = 0;
    for number in bytes[..got].as_chunks().0 {
        allowance.ranges -= 1;
        let page = u32::from_le_bytes(*number);
        if memory.check_range(address(page), PAGE as usize) {
            pages[count] = page;
            count += 1;
        } else {
            guest_warning!(page, "balloon: a page that is not memory");
        }
    }
    // A guest's allocator gives pages in any order; neighbours are cheaper given back together.
    let pages = &mut pages[..count];
    pages.sort_unstable();
    for run in pages.chunk_by(|page, next| next - page <= 1) {
        if let (Some(first), Some(last)) = (run.first(), run.last()) {
            discard_or_warn(memory, address(*first), u64::from(last - first + 1) * PAGE);
        }
    }
    let whole = got == bytes.len();
    let at = from + got;
    if whole && at < chain.readable.len() { Progress::At(at) } else { Progress::Finished }
}

/// Where a page is.
fn address(page: u32) -> GuestAddress {
    GuestAddress(u64::from(page) * PAGE)
}

/// Counts of what was given back: ranges, and bytes.
pub struct Given<'a> {
    pub count: &'a mut u64,
    pub freed: &'a mut u64,
}

/// Gives the ranges that a chain lets the device write to back to the host.
pub fn discard_writable(
    memory: &GuestMemory,
    chain: &Chain,
    from: usize,
    allowance: &mut Allowance,
    given: Given<'_>,
) -> Progress {
    let mut at = from;
    let bytes = from..from.saturating_add(allowance.bytes);
    for (start, length) in chain.writable.ranges(bytes).take(allowance.ranges) {
        discard_or_warn(memory, start, length as u64);
        at += length;
        allowance.ranges -= 1;
        allowance.bytes -= length;
        *given.count += 1;
        *given.freed += length as u64;
    }
    if at < chain.writable.len() { Progress::At(at) } else { Progress::Finished }
}

/// The guest is none the worse where memory stays, so that it hears nothing of it.
fn discard_or_warn(memory: &GuestMemory, start: GuestAddress, length: u64) {
    if let Err(error) = discard(memory, start, length) {
        guest_warning!(%error, "balloon: memory not given back");
    }
}
