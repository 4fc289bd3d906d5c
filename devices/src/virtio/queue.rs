//! A virtqueue as devices use it, and the descriptor chains that come out of it.
//!
//! A chain is walked and checked once, when it is taken from the available ring; a device then only
//! holds ranges that are inside guest memory. What a driver must not do (virtio 1.2, 2.7) is one
//! error, [`QueueError`]: the device stops and reports `DEVICE_NEEDS_RESET`.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::{Interrupt, QueuePosition};
use crate::{GuestMemory, GuestSlice};

/// Most chains a device handles for one event before it lets others have their turn.
pub const BUDGET: usize = 256;

/// The driver broke the rules of virtqueues; there is no going on without a reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings themselves.
    #[error("queue {queue}: {error}")]
    Ring {
        /// Which queue.
        queue: u16,
        /// What virtio-queue says.
        error: virtio_queue::Error,
    },
    /// A descriptor chain.
    #[error("queue {queue}, chain {head}: {reason}")]
    Chain {
        /// Which queue.
        queue: u16,
        /// Index of the chain's first descriptor.
        head: u16,
        /// Which rule.
        reason: &'static str,
    },
}

/// Part of a chain: ranges of guest memory that were checked to exist.
#[derive(Debug, Default)]
pub struct Buffers {
    segments: Vec<(GuestAddress, u32)>,
    length: u32,
}

impl Buffers {
    /// Length of all ranges together, in bytes.
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    fn clear(&mut self) {
        self.segments.clear();
        self.length = 0;
    }

    /// The ranges of guest memory, address and length, that hold `range` of these bytes; fewer where
    /// it reaches past their end.
    pub fn ranges(&self, range: Range<usize>) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        let mut skip = range.start;
        let mut left = range.end.saturating_sub(range.start);
        self.segments.iter().filter_map(move |&(address, length)| {
            let length = length as usize;
            let from = skip.min(length);
            skip -= from;
            let take = left.min(length - from);
            left -= take;
            (take > 0).then(|| (GuestAddress(address.0 + from as u64), take))
        })
    }

    /// The pieces of guest memory that hold `range` of these bytes; fewer where it reaches past
    /// their end.
    pub fn slices<'a>(
        &'a self,
        memory: &'a GuestMemory,
        range: Range<usize>,
    ) -> impl Iterator<Item = Result<GuestSlice<'a>, GuestMemoryError>> + 'a {
        self.ranges(range).flat_map(move |(address, length)| memory.get_slices(address, length))
    }

    /// Copies out of guest memory, beginning at `offset`; the number of bytes there were.
    pub fn read(
        &self,
        memory: &GuestMemory,
        offset: usize,
        into: &mut [u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for slice in self.slices(memory, offset..offset.saturating_add(into.len())) {
            let slice = slice?;
            slice.copy_to(&mut into[done..done + slice.len()]);
            done += slice.len();
        }
        Ok(done)
    }

    /// Copies into guest memory, beginning at `offset`; the number of bytes that had room.
    pub fn write(
        &self,
        memory: &GuestMemory,
        offset: usize,
        from: &[u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for slice in self.slices(memory, offset..offset.saturating_add(from.len())) {
            let slice = slice?;
            slice.copy_from(&from[done..done + slice.len()]);
            done += slice.len();
        }
        Ok(done)
    }
}

/// A descriptor chain: what the device may read, then what it may write.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    /// Written by the driver.
    pub readable: Buffers,
    /// For the device to write.
    pub writable: Buffers,
}

impl Chain {
    /// Index of the first descriptor: all that is needed to return the chain later.
    pub fn head(&self) -> u16 {
        self.head
    }
}

/// An active virtqueue with the memory it lives in and the way to its driver.
pub struct DeviceQueue {
    queue: Queue,
    index: u16,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    /// The used index when the driver was last interrupted, or need not have been.
    signalled: u16,
}

impl DeviceQueue {
    /// The queue with this index of an activated device.
    pub fn new(
        queue: Queue,
        index: u16,
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
    ) -> DeviceQueue {
        let signalled = queue.next_used();
        DeviceQueue { queue, index, memory, interrupt, signalled }
    }

    /// The memory that its buffers are in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Where it is, had the last `pending` chains not been taken.
    pub fn position(&self, pending: usize) -> QueuePosition {
        QueuePosition {
            next_available: self.queue.next_avail().wrapping_sub(pending as u16),
            next_used: self.queue.next_used(),
        }
    }

    /// Tells the driver that the configuration space changed.
    pub fn config_changed(&self) {
        self.interrupt.config_changed();
    }

    /// Reports `DEVICE_NEEDS_RESET`.
    pub fn needs_reset(&self) {
        self.interrupt.needs_reset();
    }

    fn ring_error(&self, error: virtio_queue::Error) -> QueueError {
        QueueError::Ring { queue: self.index, error }
    }

    /// Takes the next available chain; false where there is none, and then the driver notifies us
    /// of the next. `chain` is reused, so that nothing is allocated for a request.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        // With EVENT_IDX a driver notifies of one chain only, the one it was asked to (virtio 1.2,
        // 2.7.10): whoever stops looking has to ask, or never hears of this queue again. One that
        // came while we asked is taken now.
        Ok(self.take(chain)? || (self.enable_notifications()? && self.take(chain)?))
    }

    fn take(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        let queue = self.index;
        let size = self.queue.size();
        let next = match self.queue.iter(&self.memory) {
            Ok(mut available) => available.next(),
            Err(error) => return Err(QueueError::Ring { queue, error }),
        };
        let Some(descriptors) = next else { return Ok(false) };
        let head = descriptors.head_index();
        let broken = |reason| QueueError::Chain { queue, head, reason };
        if head >= size {
            return Err(broken("head index outside the queue"));
        }
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        let mut count = 0u32;
        // The iterator ends at any error; a chain is whole when its last descriptor says so.
        let mut complete = false;
        for descriptor in descriptors {
            count += 1;
            if count > size.into() {
                return Err(broken("longer than the queue"));
            }
            complete = !descriptor.has_next();
            let part = if descriptor.is_write_only() {
                &mut chain.writable
            } else if chain.writable.segments.is_empty() {
                &mut chain.readable
            } else {
                return Err(broken("readable after writable"));
            };
            let length = descriptor.len();
            if length == 0 {
                continue;
            }
            if !self.memory.check_range(descriptor.addr(), length as usize) {
                return Err(broken("buffer outside guest memory"));
            }
            part.length = part.length.checked_add(length).ok_or(broken("longer than 4 GiB"))?;
            part.segments.push((descriptor.addr(), length));
        }
        if !complete {
            return Err(broken("does not end"));
        }
        Ok(true)
    }

    /// Gives the last chain taken back, as if it had not been taken.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver with `length` bytes written.
    pub fn push(&mut self, chain: &Chain, length: usize) -> Result<(), QueueError> {
        self.push_head(chain.head, length)
    }

    /// The same for a chain of which only the head was kept.
    pub fn push_head(&mut self, head: u16, length: usize) -> Result<(), QueueError> {
        self.push_heads(std::iter::once((head, length)))
    }

    /// Returns chains, each with the number of bytes written, all at once: a driver that looks at
    /// the used ring meanwhile sees none of them or all. The buffers of one frame need this
    /// (virtio 1.2, 5.1.6.4), and `Queue::add_used` publishes each for itself.
    pub fn push_together<'a>(
        &mut self,
        chains: impl Iterator<Item = (&'a Chain, usize)>,
    ) -> Result<(), QueueError> {
        self.push_heads(chains.map(|(chain, length)| (chain.head, length)))
    }

    fn push_heads(&mut self, heads: impl Iterator<Item = (u16, usize)>) -> Result<(), QueueError> {
        let failed = |error| self.ring_error(virtio_queue::Error::GuestMemory(error));
        // Flags and index, then elements of two 32-bit numbers (virtio 1.2, 2.7.8). No sum
        // overflows: activation has checked that the ring is inside memory.
        let ring = self.queue.used_ring();
        let mut used = self.queue.next_used();
        for (head, length) in heads {
            let slot = u64::from(used.checked_rem(self.queue.size()).unwrap_or(0));
            let length = u32::try_from(length).unwrap_or(u32::MAX);
            let element = u64::from(head) | u64::from(length) << 32;
            self.memory
                .write_obj(element.to_le(), GuestAddress(ring + 4 + 8 * slot))
                .map_err(failed)?;
            used = used.wrapping_add(1);
        }
        self.memory
            .store(used.to_le(), GuestAddress(ring + 2), Ordering::Release)
            .map_err(failed)?;
        self.queue.set_next_used(used);
        Ok(())
    }

    /// Interrupts the driver if something was returned and it wants to know (virtio 1.2, 2.7.7).
    pub fn signal(&mut self) -> Result<(), QueueError> {
        let used = self.queue.next_used();
        let before = std::mem::replace(&mut self.signalled, used);
        if used == before {
            return Ok(());
        }
        // What we wrote must be there before the driver's wish is read; it does the reverse.
        fence(Ordering::SeqCst);
        let wanted = if self.queue.event_idx_enabled() {
            // The wish is one index: whether it is among those that are new.
            self.used_event()
                .map(|event| used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before))
        } else {
            self.interrupts_suppressed().map(|suppressed| !suppressed)
        };
        if wanted.map_err(|error| self.ring_error(error))? {
            self.interrupt.used_buffers(self.index);
        }
        Ok(())
    }

    /// `used_event`, behind the available ring.
    fn used_event(&self) -> Result<u16, virtio_queue::Error> {
        let address = self.queue.avail_ring() + 4 + 2 * u64::from(self.queue.size());
        let event: u16 = self
            .memory
            .load(GuestAddress(address), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u16::from_le(event))
    }

    /// `VIRTQ_AVAIL_F_NO_INTERRUPT`, which virtio-queue leaves to us.
    fn interrupts_suppressed(&self) -> Result<bool, virtio_queue::Error> {
        const NO_INTERRUPT: u16 = 1;
        let flags: u16 = self
            .memory
            .read_obj(GuestAddress(self.queue.avail_ring()))
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u16::from_le(flags) & NO_INTERRUPT != 0)
    }

    /// Asks the driver to notify us of new chains again; true where some are there already.
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(&self.memory)
            .map_err(|error| QueueError::Ring { queue: self.index, error })
    }

    /// Tells the driver that it need not notify us: we are looking anyway.
    pub fn disable_notifications(&mut self) -> Result<(), QueueError> {
        self.queue
            .disable_notification(&self.memory)
            .map_err(|error| QueueError::Ring { queue: self.index, error })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoInterrupt;

    impl Interrupt for NoInterrupt {
        fn used_buffers(&self, _index: u16) {}
        fn config_changed(&self) {}
        fn needs_reset(&self) {}
    }

    #[derive(Default)]
    struct Counting(std::sync::atomic::AtomicUsize);

    impl Interrupt for Counting {
        fn used_buffers(&self, _index: u16) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
        fn config_changed(&self) {}
        fn needs_reset(&self) {}
    }

    const SIZE: u16 = 4;
    const DESCRIPTORS: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;

    fn queue(memory: &GuestMemory) -> DeviceQueue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_event_idx(true);
        queue.set_ready(true);
        assert!(queue.is_valid(memory));
        DeviceQueue::new(queue, 0, memory.clone(), Arc::new(NoInterrupt))
    }

    /// Makes `index` chains available in all, each of one descriptor of 16 bytes.
    fn make_available(memory: &GuestMemory, index: u16) {
        for slot in 0..SIZE {
            let at = DESCRIPTORS + 16 * u64::from(slot);
            memory.write_obj(0x4000u64, GuestAddress(at)).unwrap();
            memory.write_obj(16u64, GuestAddress(at + 8)).unwrap();
            memory.write_obj(slot, GuestAddress(AVAILABLE + 4 + 2 * u64::from(slot))).unwrap();
        }
        memory.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    /// `avail_event`: the chain that the driver is asked to notify of.
    fn asked_for(memory: &GuestMemory) -> u16 {
        memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(SIZE))).unwrap()
    }

    /// The index in the used ring.
    fn published(memory: &GuestMemory) -> u16 {
        memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    #[test]
    fn what_is_returned_together_is_seen_together() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut queue = queue(&memory);
        let mut chains: [Chain; 3] = Default::default();
        // Past the end of the ring, which has four slots.
        for round in 0..3 {
            make_available(&memory, 3 * (round + 1));
            for chain in &mut chains {
                assert!(queue.pop(chain).unwrap());
            }
            let before = 3 * round;
            queue
                .push_together(chains.iter().map(|chain| {
                    assert_eq!(published(&memory), before);
                    (chain, 7)
                }))
                .unwrap();
            assert_eq!(published(&memory), before + 3);
            for slot in before..before + 3 {
                let at = USED + 4 + 8 * u64::from(slot % SIZE);
                let element: u64 = memory.read_obj(GuestAddress(at)).unwrap();
                assert_eq!(element, u64::from(slot % SIZE) | 7 << 32);
            }
        }
    }

    /// docs/hostile.md 8: `used_event` anywhere in what was returned, at every index.
    #[test]
    fn hostile_8_the_driver_is_interrupted_exactly_where_it_asked() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut queue = queue(&memory);
        let line = Arc::new(Counting::default());
        queue.interrupt = line.clone();
        let chain = Chain::default();
        let mut used = 0u16;
        for round in 0..40_000u32 {
            let count = (round % 3) as u16 + 1;
            // From just before what is new to just behind it.
            let wish = used.wrapping_sub(1).wrapping_add((round / 3 % 5) as u16);
            let at = AVAILABLE + 4 + 2 * u64::from(SIZE);
            memory.write_obj(wish, GuestAddress(at)).unwrap();
            for _ in 0..count {
                queue.push(&chain, 0).unwrap();
            }
            queue.signal().unwrap();
            let expected = wish.wrapping_sub(used) < count;
            assert_eq!(line.0.swap(0, Ordering::SeqCst) == 1, expected, "at {used}, {wish}");
            used = used.wrapping_add(count);
            // Nothing new: nothing to say.
            queue.signal().unwrap();
            assert_eq!(line.0.load(Ordering::SeqCst), 0);
        }
    }

    /// docs/hostile.md 8, and every driver: at every index, the wrap-around among them.
    #[test]
    fn hostile_8_an_empty_queue_asks_for_the_next_notification() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut queue = queue(&memory);
        let mut chain = Chain::default();
        for index in (1..=u16::MAX).chain(0..8) {
            make_available(&memory, index);
            assert!(queue.pop(&mut chain).unwrap());
            queue.push(&chain, 0).unwrap();
            assert!(!queue.pop(&mut chain).unwrap());
            assert_eq!(asked_for(&memory), index);
        }
    }
}
