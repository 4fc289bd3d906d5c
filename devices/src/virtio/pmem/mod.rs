//! virtio-pmem (virtio 1.2, 5.19): a file of the host as memory of the guest.
//!
//! The guest reads and writes the file without a request, and without a copy of it in its own page
//! cache. What it asks for is that the file be flushed.

mod file;

use std::io;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use telemetry::Readings;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Chain, DeviceQueue, QueueError};
use super::{ActivateError, Activation, QueuePosition, VirtioDevice};
use crate::GuestMemory;
pub use file::{ALIGNMENT, PmemError, PmemFile};

/// A request takes two descriptors.
const QUEUE_SIZE: u16 = 64;

// Request and answers (virtio 1.2, 5.19.6 and 5.19.7), which virtio-bindings does not have.
const FLUSH: u32 = 0;
const OK: i32 = 0;
const FAILED: i32 = -1;
/// Bytes of an answer.
const ANSWER: usize = 4;

telemetry::metrics! {
    /// What persistent memory has done since it was made.
    pub struct PmemMetrics("pmem", Counter) {
        /// Times that the driver could not be served from the start.
        activate_fails,
        /// Times that the driver broke the rules, so that it had to reset the device.
        event_fails,
        /// Notifications of the driver.
        queue_event_count,
        /// Times that the file was flushed, once for all requests that came together.
        flush_count,
        /// Times that this failed.
        flush_fails,
    }
}

/// Persistent memory. A snapshot keeps nothing of it beside its queue: every request taken in an
/// event is answered in it.
pub struct Pmem {
    /// `pmem` and the id, to be named in messages.
    name: String,
    file: PmemFile,
    address: GuestAddress,
    event: [EventFd; 1],
    queue: Option<DeviceQueue>,
    /// Requests of one event, which one flush is enough for.
    chains: Vec<Chain>,
    metrics: PmemMetrics,
}

impl Pmem {
    /// Persistent memory that the guest finds at this address, a multiple of [`ALIGNMENT`], where
    /// the caller maps the file. Fails where no eventfd can be made.
    pub fn new(id: &str, file: PmemFile, guest_address: GuestAddress) -> io::Result<Pmem> {
        Ok(Pmem {
            name: format!("pmem {id}"),
            file,
            address: guest_address,
            event: [EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?],
            queue: None,
            chains: (0..QUEUE_SIZE).map(|_| Chain::default()).collect(),
            metrics: PmemMetrics::default(),
        })
    }

    /// The file. Its mapping lasts as long as the device does, and so must outlast the memory slot.
    pub fn file(&self) -> &PmemFile {
        &self.file
    }

    /// Where the guest finds it.
    pub fn guest_address(&self) -> GuestAddress {
        self.address
    }

    fn process(&mut self) -> Result<(), QueueError> {
        let Some(queue) = self.queue.as_mut() else { return Ok(()) };
        let (name, file) = (&self.name, &self.file);
        let metrics = &mut self.metrics;
        let flush = || {
            let answer = flush(name, file);
            metrics.flush_count += 1;
            metrics.flush_fails += u64::from(answer != OK);
            answer
        };
        if serve(name, queue, &mut self.chains, flush)? {
            // The rest in the next round of the event loop.
            let _ = self.event[0].write(1);
        }
        queue.signal()
    }
}

/// Answers as many requests as there are chains to take them; whether there may be more.
fn serve(
    name: &str,
    queue: &mut DeviceQueue,
    chains: &mut [Chain],
    mut flush: impl FnMut() -> i32,
) -> Result<bool, QueueError> {
    let mut count = 0;
    for chain in &mut *chains {
        if !queue.pop(chain)? {
            break;
        }
        count += 1;
    }
    // What the guest wrote before any of these requests is flushed by one that follows them all.
    let mut flushed = None;
    for chain in &chains[..count] {
        let answer = match request(queue.memory(), chain) {
            Some(FLUSH) => *flushed.get_or_insert_with(&mut flush),
            kind => {
                guest_warning!(device = name, ?kind, "unknown request");
                FAILED
            }
        };
        let written = respond(name, queue.memory(), chain, answer);
        queue.push(chain, written)?;
    }
    Ok(count == chains.len())
}

/// The type of a request (`struct virtio_pmem_req`); `None` where the chain is too short for one.
fn request(memory: &GuestMemory, chain: &Chain) -> Option<u32> {
    let mut kind = [0; 4];
    let got = chain.readable.read(memory, 0, &mut kind).ok()?;
    (got == kind.len()).then(|| u32::from_le_bytes(kind))
}

fn flush(name: &str, file: &PmemFile) -> i32 {
    match file.flush() {
        Ok(()) => OK,
        Err(error) => {
            guest_warning!(device = name, path = %file.path().display(), %error, "not flushed");
            FAILED
        }
    }
}

/// Writes `struct virtio_pmem_resp`; the number of bytes written.
fn respond(name: &str, memory: &GuestMemory, chain: &Chain, answer: i32) -> usize {
    if chain.writable.len() < ANSWER {
        guest_warning!(device = name, "a request without room for an answer");
        return 0;
    }
    match chain.writable.write(memory, 0, &answer.to_le_bytes()) {
        Ok(written) => written,
        Err(error) => {
            guest_warning!(device = name, %error, "answer not written");
            0
        }
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_PMEM
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
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `struct virtio_pmem_config` (virtio 1.2, 5.19.4).
        let fields = [self.address.0, self.file.size()];
        super::read_bytes(fields.map(u64::to_le_bytes).as_flattened(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [queue] = super::take_queues(&self.name, activation)
            .inspect_err(|_| self.metrics.activate_fails += 1)?;
        self.queue = Some(queue);
        // A notification may have come while the queue was not there yet.
        let _ = self.event[0].write(1);
        Ok(())
    }

    fn reset(&mut self) {
        self.queue = None;
    }

    fn queue_positions(&self) -> Vec<Option<QueuePosition>> {
        self.queue.iter().map(|queue| Some(queue.position(0))).collect()
    }

    fn metrics(&self) -> Option<Readings> {
        Some(self.metrics.readings())
    }
}

impl MutEventSubscriber for Pmem {
    fn init(&mut self, ops: &mut EventOps) {
        super::register(ops, &self.event[0], 0, EventSet::IN);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.event[0].read();
        self.metrics.queue_event_count += 1;
        if let Err(error) = Pmem::process(self) {
            self.metrics.event_fails += 1;
            super::broken(&self.name, &mut self.queue, &error);
        }
    }
}

#[cfg(test)]
mod tests;
