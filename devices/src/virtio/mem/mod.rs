//! virtio-mem (virtio 1.2, 5.15): memory that is plugged into a running guest and unplugged again.
//!
//! The memory is a region of its own, divided into *blocks*. The host says how much it wants plugged;
//! the guest chooses the blocks, and asks for each to be plugged or unplugged. Unplugged blocks go
//! back to the host.
//!
//! Blocks lie in *slots*, which are larger. The guest can reach a slot only while a block of it is
//! plugged; in such a slot it can also touch blocks that are not, and must be trusted not to, or be
//! limited by the memory that the process may have.

mod metrics;
mod region;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use telemetry::Readings;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{BUDGET, Chain, DeviceQueue, QueueError};
use super::{
    ActivateError, Activation, DeviceState, Interrupt, QueuePosition, RestoreError, VirtioDevice,
};
pub use metrics::MemMetrics;
pub use region::SlotSink;
use region::{MIB, Pending, Region};
use request::{ANSWER, Answer, Request};

const QUEUE_SIZE: u16 = 64;
/// Bytes given back in one event before others have their turn; the last slot may exceed it.
const BYTES_PER_EVENT: u64 = 128 << 20;

/// Least size of a block, so that huge pages of the host stay whole.
const MIN_BLOCK_MIB: u32 = 2;
/// Least size of a slot: KVM has a limited number, and Linux plugs no less than this.
const MIN_SLOT_MIB: u32 = 128;

/// Feature bit (virtio 1.2, 5.15.3), which virtio-bindings does not have.
const UNPLUGGED_INACCESSIBLE: u64 = 1;

/// How memory is divided. The names are those of Firecracker's `MemoryHotplugConfig`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemOptions {
    /// MiB that can be plugged: a multiple of the slot size.
    pub total_size_mib: u32,
    /// MiB that are made accessible to the guest at a time: a multiple of the block size, 128 or
    /// more. A guest whose own memory blocks are larger, as those of Linux with 64 GiB and more can
    /// be, needs slots of their size to use all that is requested.
    pub slot_size_mib: u32,
    /// MiB that are plugged at a time: a power of two, 2 or more.
    pub block_size_mib: u32,
}

/// How it stands. The names are those of Firecracker's `MemoryHotplugStatus`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemStatus {
    /// MiB that can be plugged.
    pub total_size_mib: u32,
    /// MiB of a slot.
    pub slot_size_mib: u32,
    /// MiB of a block.
    pub block_size_mib: u32,
    /// MiB that are plugged.
    pub plugged_size_mib: u32,
    /// MiB that the host wants plugged.
    pub requested_size_mib: u32,
}

/// What cannot be asked of memory.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// A block of this many MiB.
    #[error(
        "memory cannot have blocks of {0} MiB: their size must be a power of two, and 2 MiB at the \
         least"
    )]
    BlockSize(u32),
    /// A slot of this many MiB.
    #[error(
        "memory cannot have slots of {0} MiB: their size must be a multiple of the block size, and \
         128 MiB at the least"
    )]
    SlotSize(u32),
    /// So many MiB in all.
    #[error(
        "{0} MiB of memory cannot be hot-plugged: the size must be a multiple of the slot size, and \
         not zero"
    )]
    TotalSize(u32),
    /// A region there.
    #[error(
        "memory cannot be hot-plugged at {0:#x}: not a multiple of the block size, or too high"
    )]
    Address(u64),
    /// A request for so many MiB, which no blocks are.
    #[error("{requested_mib} MiB are not whole blocks of {block_mib} MiB")]
    Unaligned {
        /// What was asked for.
        requested_mib: u32,
        /// MiB of a block.
        block_mib: u32,
    },
    /// A request for more than there is.
    #[error("{requested_mib} MiB are more than the {total_mib} MiB that can be plugged")]
    TooMuch {
        /// What was asked for.
        requested_mib: u32,
        /// MiB there are.
        total_mib: u32,
    },
    /// A state of memory of other sizes or at another address.
    #[error("the saved state is of memory of other sizes or at another address")]
    OtherMemory,
    /// A state that contradicts itself.
    #[error("the saved state of hot-plugged memory is damaged")]
    Unsound,
    /// A slot of a saved state. The device is then of no use.
    #[error("slot {slot} of hot-plugged memory cannot be added: {error}")]
    Slot {
        /// Its index.
        slot: usize,
        /// What the host says.
        error: io::Error,
    },
    /// No eventfd.
    #[error("hot-plugged memory: no eventfd: {0}")]
    Event(io::Error),
}

/// What a snapshot keeps of a device beside its queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemState {
    /// A device to restore is made of these.
    pub options: MemOptions,
    /// Where its region begins: a device to restore is made with it.
    pub guest_address: u64,
    requested_blocks: usize,
    usable_blocks: usize,
    /// Runs of plugged blocks.
    plugged: Vec<Range<usize>>,
    pending: Option<Pending>,
}

impl MemOptions {
    /// Whether memory can be so divided.
    pub fn check(&self) -> Result<(), MemError> {
        let (block, slot, total) = (self.block_size_mib, self.slot_size_mib, self.total_size_mib);
        if block < MIN_BLOCK_MIB || !block.is_power_of_two() {
            Err(MemError::BlockSize(block))
        } else if slot < MIN_SLOT_MIB || !slot.is_multiple_of(block) {
            Err(MemError::SlotSize(slot))
        } else if total == 0 || !total.is_multiple_of(slot) {
            Err(MemError::TotalSize(total))
        } else {
            Ok(())
        }
    }

    /// Bytes of the region.
    pub fn region_size(&self) -> u64 {
        u64::from(self.total_size_mib) * MIB
    }

    /// Where a slot is in a region that begins at this address, and its bytes.
    pub fn slot(&self, region: GuestAddress, index: usize) -> Option<(GuestAddress, u64)> {
        let size = u64::from(self.slot_size_mib) * MIB;
        let offset = size.checked_mul(index as u64).filter(|at| *at < self.region_size())?;
        Some((GuestAddress(region.0.checked_add(offset)?), size))
    }
}

/// Memory that can be plugged.
pub struct Mem {
    region: Region,
    event: [EventFd; 1],
    queue: Option<DeviceQueue>,
    interrupt: Option<Arc<dyn Interrupt>>,
    chain: Chain,
    metrics: MemMetrics,
}

impl Mem {
    /// Memory of which nothing is plugged yet, at an address that is a multiple of the block size.
    /// (Linux wants a multiple of 128 MiB.) The caller makes the region part of guest memory as
    /// vm-memory knows it, but accessible to the guest only where `sink` is told to.
    pub fn new(
        options: MemOptions,
        guest_address: GuestAddress,
        sink: Box<dyn SlotSink>,
    ) -> Result<Mem, MemError> {
        options.check()?;
        let start = guest_address.0;
        let aligned = start.is_multiple_of(u64::from(options.block_size_mib) * MIB);
        if !aligned || start.checked_add(options.region_size()).is_none() {
            return Err(MemError::Address(start));
        }
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Mem {
            region: Region::new(options, start, sink),
            event: [event.map_err(MemError::Event)?],
            queue: None,
            interrupt: None,
            chain: Chain::default(),
            metrics: MemMetrics::default(),
        })
    }

    /// How it stands.
    pub fn status(&self) -> MemStatus {
        let MemOptions { total_size_mib, slot_size_mib, block_size_mib } = *self.region.options();
        MemStatus {
            total_size_mib,
            slot_size_mib,
            block_size_mib,
            plugged_size_mib: self.region.mib(self.region.plugged()),
            requested_size_mib: self.region.mib(self.region.requested()),
        }
    }

    /// Asks the guest to have so many MiB plugged, whole blocks. It may take its time, and may not
    /// get there: [`status`](Mem::status) tells how far it came.
    pub fn set_requested_mib(&mut self, requested_mib: u32) -> Result<(), MemError> {
        let &MemOptions { total_size_mib: total_mib, block_size_mib: block_mib, .. } =
            self.region.options();
        if requested_mib > total_mib {
            return Err(MemError::TooMuch { requested_mib, total_mib });
        }
        if !requested_mib.is_multiple_of(block_mib) {
            return Err(MemError::Unaligned { requested_mib, block_mib });
        }
        self.region.request(self.region.blocks(requested_mib));
        if let Some(interrupt) = &self.interrupt {
            interrupt.config_changed();
        }
        Ok(())
    }

    /// What a snapshot keeps, beside the queue, which is the transport's to save, and the memory. A
    /// request that is half done is still in its queue, and goes on where it was.
    pub fn save(&self) -> MemState {
        MemState {
            options: self.region.options().clone(),
            guest_address: self.region.start(),
            requested_blocks: self.region.requested(),
            usable_blocks: self.region.usable(),
            plugged: self.region.plugged_ranges(),
            pending: self.region.pending().cloned(),
        }
    }

    /// Makes this the device that was saved, and has its slots added. To be called before
    /// activation, on a device just made with the same sizes and address.
    pub fn restore(&mut self, state: MemState) -> Result<(), MemError> {
        let same = state.options == *self.region.options();
        if !same || state.guest_address != self.region.start() {
            return Err(MemError::OtherMemory);
        }
        let MemState { requested_blocks, usable_blocks, plugged, pending, .. } = state;
        self.region.restore(&plugged, requested_blocks, usable_blocks, pending)
    }

    fn process(&mut self) -> Result<(), QueueError> {
        let Some(queue) = self.queue.as_mut() else { return Ok(()) };
        let mut allowance = BYTES_PER_EVENT;
        let mut more = true;
        for _ in 0..BUDGET {
            if !queue.pop(&mut self.chain)? {
                more = false;
                break;
            }
            if self.chain.writable.len() < ANSWER {
                // The driver would not know what became of its request.
                guest_warning!("mem: a request without room for an answer");
                queue.push(&self.chain, 0)?;
                continue;
            }
            let memory = queue.memory();
            let answer = match Request::parse(memory, &self.chain) {
                Some(request) => {
                    let answer = self.region.run(request, memory, &mut allowance);
                    if let Some(answer) = answer {
                        self.metrics.answered(request, answer, self.region.block_size());
                    }
                    answer
                }
                None => {
                    guest_warning!("mem: an unknown request");
                    Some(Answer::Error)
                }
            };
            let Some(answer) = answer else {
                queue.undo_pop();
                break;
            };
            let written = self.chain.writable.write(memory, 0, &answer.bytes());
            let written = written.unwrap_or_else(|error| {
                guest_warning!(%error, "mem: answer not written");
                0
            });
            queue.push(&self.chain, written)?;
        }
        if more {
            // The rest in the next round of the event loop.
            let _ = self.event[0].write(1);
        }
        queue.signal()
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.event
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << UNPLUGGED_INACCESSIBLE)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `struct virtio_mem_config` (virtio 1.2, 5.15.4).
        let region = &self.region;
        let fields = [
            region.block_size(),
            // The node, which has no meaning without `VIRTIO_MEM_F_ACPI_PXM`, and padding.
            0,
            region.start(),
            region.options().region_size(),
            region.bytes(region.usable()),
            region.bytes(region.plugged()),
            region.bytes(region.requested()),
        ];
        super::read_bytes(fields.map(u64::to_le_bytes).as_flattened(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if activation.features & (1 << UNPLUGGED_INACCESSIBLE) == 0 {
            self.metrics.activate_fails += 1;
            // Such a driver may read memory that is not there (virtio 1.2, 5.15.5.2).
            return Err(ActivateError {
                device: "mem".to_owned(),
                reason: "the driver would read unplugged memory".to_owned(),
            });
        }
        let interrupt = activation.interrupt.clone();
        let [queue] = super::take_queues("mem", activation)
            .inspect_err(|_| self.metrics.activate_fails += 1)?;
        (self.queue, self.interrupt) = (Some(queue), Some(interrupt));
        // A notification may have come while the queue was not there yet.
        let _ = self.event[0].write(1);
        Ok(())
    }

    fn reset(&mut self) {
        // What is plugged stays so (virtio 1.2, 5.15.5.2): a driver that is loaded again finds it.
        self.queue = None;
        self.interrupt = None;
        self.region.forget_pending();
    }

    fn queue_positions(&self) -> Vec<Option<QueuePosition>> {
        self.queue.iter().map(|queue| Some(queue.position(0))).collect()
    }

    fn metrics(&self) -> Option<Readings> {
        Some(self.metrics.readings())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Mem(Mem::save(self))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Mem(state) = state else { return Err(state.mismatch()) };
        Mem::restore(self, state).map_err(|error| RestoreError(error.to_string()))
    }
}

impl MutEventSubscriber for Mem {
    fn init(&mut self, ops: &mut EventOps) {
        super::register(ops, &self.event[0], 0, EventSet::IN);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.event[0].read();
        self.metrics.queue_event_count += 1;
        if let Err(error) = Mem::process(self) {
            self.metrics.queue_event_fails += 1;
            super::broken("mem", &mut self.queue, &error);
        }
    }
}
