//! The region of memory that blocks are plugged into, and the slots that make it accessible.

use std::io;
use std::ops::Range;

use fixedbitset::FixedBitSet;
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::request::{Answer, Blocks, Request, State};
use super::{MemError, MemOptions};
use crate::GuestMemory;
use crate::discard::discard;

pub const MIB: u64 = 1 << 20;

/// Makes parts of the region accessible to the guest: a memory slot of KVM for each.
pub trait SlotSink: Send {
    /// Adds the memory slot with this index, counted from the beginning of the region, or takes it
    /// away. Called with what it is not already, on the thread of the event loop (and of whoever
    /// restores a device), under the device's lock. Fails where it stays as it was.
    fn set_slot(&mut self, index: usize, plugged: bool) -> io::Result<()>;
}

/// A request that takes more than one event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    request: Request,
    /// Blocks that it has not come to.
    left: Range<usize>,
}

/// Blocks, counted from the beginning of the region, and the slots that they lie in.
pub struct Region {
    options: MemOptions,
    start: u64,
    /// A bit for each block.
    plugged: FixedBitSet,
    /// A bit for each slot that there is. Those with a plugged block are there; others are where
    /// they could not be taken away.
    slots: FixedBitSet,
    /// Blocks that the host wants plugged.
    requested: usize,
    /// Blocks that the driver may choose from, the first so many. Whole slots: a hostile driver
    /// gets at no other memory.
    usable: usize,
    pending: Option<Pending>,
    sink: Box<dyn SlotSink>,
}

impl Region {
    /// A region from an address on with nothing plugged. The options were checked.
    pub fn new(options: MemOptions, start: u64, sink: Box<dyn SlotSink>) -> Region {
        let count = |size: u32| (options.total_size_mib / size) as usize;
        Region {
            plugged: FixedBitSet::with_capacity(count(options.block_size_mib)),
            slots: FixedBitSet::with_capacity(count(options.slot_size_mib)),
            options,
            start,
            requested: 0,
            usable: 0,
            pending: None,
            sink,
        }
    }

    pub fn options(&self) -> &MemOptions {
        &self.options
    }

    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u64 {
        u64::from(self.options.block_size_mib) * MIB
    }

    /// Bytes of so many blocks.
    pub fn bytes(&self, blocks: usize) -> u64 {
        blocks as u64 * self.block_size()
    }

    /// MiB of so many blocks, not more than there are.
    pub fn mib(&self, blocks: usize) -> u32 {
        (blocks as u32).saturating_mul(self.options.block_size_mib)
    }

    /// Blocks of so many MiB, a multiple of their size.
    pub fn blocks(&self, mib: u32) -> usize {
        (mib / self.options.block_size_mib) as usize
    }

    /// How many blocks are plugged.
    pub fn plugged(&self) -> usize {
        self.plugged.count_ones(..)
    }

    pub fn requested(&self) -> usize {
        self.requested
    }

    pub fn usable(&self) -> usize {
        self.usable
    }

    pub fn pending(&self) -> Option<&Pending> {
        self.pending.as_ref()
    }

    /// Wants so many blocks plugged, not more than there are.
    pub fn request(&mut self, blocks: usize) {
        self.requested = blocks;
        self.usable = self.usable.max(self.usable_for_requested());
    }

    /// Forgets the request that was not finished.
    pub fn forget_pending(&mut self) {
        self.pending = None;
    }

    /// Carries a request out, as far as so many bytes given back go; `None` where it is to be asked
    /// again, since there is more to do.
    pub fn run(
        &mut self,
        request: Request,
        memory: &GuestMemory,
        allowance: &mut u64,
    ) -> Option<Answer> {
        // A driver that puts another request in its place meanwhile has it dealt with from its
        // beginning.
        let left = self.pending.take().filter(|pending| pending.request == request);
        let left = left.map(|pending| pending.left);
        let range = match (request, left) {
            (Request::Plug(blocks), _) => return Some(self.plug(blocks, memory)),
            (Request::State(blocks), _) => return Some(self.state(blocks)),
            (_, Some(left)) => left,
            (Request::UnplugAll, None) => 0..self.usable,
            (Request::Unplug(blocks), None) => match self.range(blocks) {
                Some(range) if self.plugged.contains_all_in_range(range.clone()) => range,
                _ => return Some(Answer::Error),
            },
        };
        let left = self.unplug(range, memory, allowance);
        if !left.is_empty() {
            self.pending = Some(Pending { request, left });
            return None;
        }
        if request == Request::UnplugAll {
            // Only now may it shrink (virtio 1.2, 5.15.4).
            self.usable = self.usable_for_requested();
        }
        Some(Answer::Ack)
    }

    /// Which blocks these are, if there are any and all may be used.
    fn range(&self, blocks: Blocks) -> Option<Range<usize>> {
        let offset = blocks.address.checked_sub(self.start)?;
        if !offset.is_multiple_of(self.block_size()) || blocks.count == 0 {
            return None;
        }
        let first = usize::try_from(offset / self.block_size()).ok()?;
        let end = first.checked_add(blocks.count.into())?;
        (end <= self.usable).then_some(first..end)
    }

    fn state(&self, blocks: Blocks) -> Answer {
        let Some(range) = self.range(blocks) else { return Answer::Error };
        Answer::State(if self.plugged.contains_all_in_range(range.clone()) {
            State::Plugged
        } else if self.plugged.contains_any_in_range(range) {
            State::Mixed
        } else {
            State::Unplugged
        })
    }

    fn plug(&mut self, blocks: Blocks, memory: &GuestMemory) -> Answer {
        let Some(range) = self.range(blocks) else { return Answer::Error };
        if self.plugged.contains_any_in_range(range.clone()) {
            return Answer::Error;
        }
        if self.plugged() + range.len() > self.requested {
            return Answer::Nack;
        }
        let slots = self.slot_of(range.start)..self.slot_of(range.end - 1) + 1;
        if let Err(error) = self.add_slots(slots.clone()) {
            guest_warning!(%error, "mem: memory not plugged");
            for slot in slots {
                self.remove_slot_if_empty(slot, memory);
            }
            return Answer::Busy;
        }
        self.plugged.insert_range(range);
        Answer::Ack
    }

    /// Unplugs those of a range that are plugged, as far as so many bytes go; what is left.
    fn unplug(
        &mut self,
        mut range: Range<usize>,
        memory: &GuestMemory,
        allowance: &mut u64,
    ) -> Range<usize> {
        while !range.is_empty() && *allowance > 0 {
            let slot = self.slot_of(range.start);
            let affordable = allowance.div_ceil(self.block_size());
            let part = range.start..range.end.min(self.blocks_of(slot).end);
            let part = part.start..part.end.min(part.start.saturating_add(affordable as usize));
            range.start = part.end;
            if !self.plugged.contains_any_in_range(part.clone()) {
                continue;
            }
            self.plugged.remove_range(part.clone());
            let bytes = if self.remove_slot_if_empty(slot, memory) {
                self.bytes(self.slot_blocks())
            } else {
                self.give_back(part, memory)
            };
            *allowance = allowance.saturating_sub(bytes);
        }
        range
    }

    fn slot_blocks(&self) -> usize {
        self.blocks(self.options.slot_size_mib)
    }

    fn slot_of(&self, block: usize) -> usize {
        block / self.slot_blocks()
    }

    fn blocks_of(&self, slot: usize) -> Range<usize> {
        slot * self.slot_blocks()..(slot + 1) * self.slot_blocks()
    }

    /// Blocks of the slots that those requested fill.
    fn usable_for_requested(&self) -> usize {
        self.requested.next_multiple_of(self.slot_blocks())
    }

    /// Adds those that are not there.
    fn add_slots(&mut self, slots: Range<usize>) -> io::Result<()> {
        for slot in slots {
            if !self.slots.contains(slot) {
                self.sink.set_slot(slot, true)?;
                self.slots.insert(slot);
            }
        }
        Ok(())
    }

    /// Takes a slot without a plugged block away, and gives its memory back; whether it did.
    fn remove_slot_if_empty(&mut self, slot: usize, memory: &GuestMemory) -> bool {
        let blocks = self.blocks_of(slot);
        if !self.slots.contains(slot) || self.plugged.contains_any_in_range(blocks.clone()) {
            return false;
        }
        if let Err(error) = self.sink.set_slot(slot, false) {
            guest_warning!(slot, %error, "mem: a slot stays though nothing is plugged into it");
            return false;
        }
        self.slots.remove(slot);
        // Only now can the guest not touch it again. All of it, because nobody could keep the guest
        // from blocks that were not plugged.
        self.give_back(blocks, memory);
        true
    }

    /// Gives blocks back to the host; their bytes. The guest is none the worse where they stay, so
    /// that it hears nothing of it.
    fn give_back(&self, blocks: Range<usize>, memory: &GuestMemory) -> u64 {
        let start = GuestAddress(self.start + self.bytes(blocks.start));
        let length = self.bytes(blocks.len());
        if let Err(error) = discard(memory, start, length) {
            guest_warning!(%error, "mem: memory not given back");
        }
        length
    }

    /// Runs of plugged blocks, in order.
    pub fn plugged_ranges(&self) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for block in self.plugged.ones() {
            match ranges.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => ranges.push(block..block + 1),
            }
        }
        ranges
    }

    /// Makes a region without a plugged block what another was, and adds its slots.
    pub fn restore(
        &mut self,
        plugged: &[Range<usize>],
        requested: usize,
        usable: usize,
        pending: Option<Pending>,
    ) -> Result<(), MemError> {
        let all = self.plugged.len();
        let fits = |range: &Range<usize>| range.start <= range.end && range.end <= usable;
        let sound = requested <= usable
            && usable <= all
            && usable.is_multiple_of(self.slot_blocks())
            && plugged.iter().all(fits)
            && pending.iter().all(|pending| pending.left.end <= all);
        if !sound {
            return Err(MemError::Unsound);
        }
        for range in plugged {
            self.plugged.insert_range(range.clone());
        }
        (self.requested, self.usable, self.pending) = (requested, usable, pending);
        for slot in 0..self.slots.len() {
            if self.plugged.contains_any_in_range(self.blocks_of(slot)) {
                self.add_slots(slot..slot + 1).map_err(|error| MemError::Slot { slot, error })?;
            }
        }
        Ok(())
    }
}
