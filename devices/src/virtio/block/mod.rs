//! virtio-blk (virtio 1.2, 5.2) on a raw file.
//!
//! Four parts: [`request`] says what a chain asks for, [`disk`] carries it out on the file, [`uring`]
//! has the kernel do so meanwhile, and [`Block`] is what the guest sees.

mod disk;
mod metrics;
mod request;
mod uring;

use std::time::Instant;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use telemetry::Readings;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

pub use disk::{Disk, DiskError};
pub use metrics::BlockMetrics;
use request::{Operation, Refused, Request};
use uring::{Finished, Uring};

use super::queue::{BUDGET, Chain, DeviceQueue, QueueError};
use super::{ActivateError, Activation, DeviceState, QueuePosition, RestoreError, VirtioDevice};
use crate::GuestMemory;
use crate::rate_limiter::{BucketUpdate, RateLimiter};

const QUEUE_SIZE: u16 = 256;
/// Events: the queue's, the limiter's timer, and what io_uring has completed.
const QUEUE: u32 = 0;
const TIMER: u32 = 1;
const COMPLETED: u32 = 2;
/// Most bytes moved for one event before other devices have their turn. One request is never split,
/// so that the last one may go past this.
const BYTES_PER_EVENT: usize = 16 << 20;
/// Ranges in one discard or write-zeroes request, and sectors in one range, that we offer.
const MAX_RANGES: u32 = 16;
const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// How requests are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// One after the other, on the event loop's thread.
    #[default]
    Sync,
    /// Many at once, by io_uring. They complete in any order.
    Async,
}

/// How a drive is presented.
#[derive(Debug, Default)]
pub struct BlockOptions {
    /// For log messages, and what get-id answers (its first 20 bytes).
    pub id: String,
    /// Offer flush, and make it durable. Without it a guest never asks.
    pub flush: bool,
    /// Limits on bytes read, written and zeroed, and on requests of any kind.
    pub rate_limiter: RateLimiter,
    /// How its requests are carried out.
    pub engine: Engine,
}

/// A drive.
pub struct Block {
    options: BlockOptions,
    disk: Disk,
    uring: Option<Uring>,
    features: u64,
    config: Vec<u8>,
    event: [EventFd; 1],
    queue: Option<DeviceQueue>,
    chain: Chain,
    metrics: BlockMetrics,
}

impl Block {
    /// A drive on this disk. Fails where the host has no eventfd, or no io_uring to spare for
    /// [`Engine::Async`].
    pub fn new(options: BlockOptions, disk: Disk) -> std::io::Result<Block> {
        let mut features = (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_BLK_F_SEG_MAX)
            | (1 << VIRTIO_BLK_F_BLK_SIZE);
        if disk.read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= (1 << VIRTIO_BLK_F_DISCARD) | (1 << VIRTIO_BLK_F_WRITE_ZEROES);
        }
        if options.flush {
            features |= 1 << VIRTIO_BLK_F_FLUSH;
        }
        let event = [EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?];
        let config = config_space(disk.sectors());
        let uring = match options.engine {
            Engine::Sync => None,
            Engine::Async => Some(Uring::new(&disk)?),
        };
        Ok(Block {
            options,
            disk,
            uring,
            features,
            config,
            event,
            queue: None,
            chain: Chain::default(),
            metrics: BlockMetrics::default(),
        })
    }

    /// Puts another disk in, or the same one with another size, and tells the guest. It must be
    /// writable or not as the first one was: the guest has been told. What is in flight is finished
    /// on the old one, which stays where io_uring does not take the new one.
    pub fn replace_disk(&mut self, disk: Disk) -> std::io::Result<()> {
        self.drain();
        if let Some(uring) = &mut self.uring {
            uring.replace_file(&disk)?;
        }
        self.config = config_space(disk.sectors());
        self.disk = disk;
        self.metrics.update_count += 1;
        if let Some(queue) = &self.queue {
            queue.config_changed();
        }
        Ok(())
    }

    /// Its limits, for a snapshot.
    pub fn rate_limiter(&self) -> &RateLimiter {
        &self.options.rate_limiter
    }

    /// Changes limits, also while the guest uses the drive. Fails as [`RateLimiter::update`] does.
    pub fn update_rate_limiter(
        &mut self,
        bandwidth: BucketUpdate,
        ops: BucketUpdate,
    ) -> std::io::Result<()> {
        self.options.rate_limiter.update(bandwidth, ops)?;
        // A request that was refused is asked for again.
        let _ = self.event[0].write(1);
        Ok(())
    }

    fn process(&mut self) -> Result<(), QueueError> {
        // What has completed makes room for what is taken.
        let result = self.complete().and_then(|()| self.take());
        if let Some(uring) = &mut self.uring {
            uring.submit();
        }
        result?;
        self.queue.as_mut().map_or(Ok(()), DeviceQueue::signal)
    }

    /// Returns what io_uring has completed. Without a queue, nobody waits for it.
    fn complete(&mut self) -> Result<(), QueueError> {
        let Some(uring) = &mut self.uring else { return Ok(()) };
        while let Some(finished) = uring.finished(&self.disk) {
            if let Some(queue) = &mut self.queue {
                finish(&self.options.id, queue, &finished, &mut self.metrics)?;
            }
        }
        Ok(())
    }

    /// Takes requests from the queue.
    fn take(&mut self) -> Result<(), QueueError> {
        let Some(queue) = self.queue.as_mut() else { return Ok(()) };
        let limiter = &mut self.options.rate_limiter;
        if limiter.is_blocked() {
            // The timer calls again.
            return Ok(());
        }
        let (mut budget, mut bytes) = (BUDGET, BYTES_PER_EVENT);
        loop {
            queue.disable_notifications()?;
            while budget > 0 && bytes > 0 {
                if self.uring.as_ref().is_some_and(Uring::is_full) {
                    // The next completion calls again.
                    return Ok(());
                }
                if !queue.pop(&mut self.chain)? {
                    break;
                }
                let request = Request::parse(queue.memory(), &self.chain);
                if !limiter.allows(request.as_ref().map_or(0, Request::bytes), 1) {
                    // Without asking for notifications: there is more to do than is allowed.
                    self.metrics.rate_limiter_throttled_events += 1;
                    queue.undo_pop();
                    return Ok(());
                }
                budget -= 1;
                bytes = bytes.saturating_sub(self.chain.readable.len());
                bytes = bytes.saturating_sub(self.chain.writable.len());
                match (&mut self.uring, request) {
                    // Without room for a status nothing is done, and an id needs no file.
                    (Some(uring), Ok(request))
                        if request != Operation::GetId && !self.chain.writable.is_empty() =>
                    {
                        let chain = std::mem::take(&mut self.chain);
                        if let Some(finished) = uring.start(&self.disk, chain, request) {
                            finish(&self.options.id, queue, &finished, &mut self.metrics)?;
                        }
                    }
                    (_, request) => {
                        let drive = Drive { id: &self.options.id, disk: &self.disk };
                        let metrics = &mut self.metrics;
                        let written = serve(drive, queue, &self.chain, request, metrics);
                        queue.push(&self.chain, written)?;
                    }
                }
            }
            if budget == 0 || bytes == 0 {
                // The rest in the next round of the event loop.
                let _ = self.event[0].write(1);
                return Ok(());
            }
            if !queue.enable_notifications()? {
                self.metrics.no_avail_buffer += u64::from(budget == BUDGET);
                return Ok(());
            }
        }
    }

    /// Stops the queue where its driver broke the rules. What is in flight completes for nobody.
    fn check(&mut self, result: Result<(), QueueError>) {
        if let Err(error) = result {
            self.metrics.event_fails += 1;
            super::broken(&self.options.id, &mut self.queue, &error);
        }
    }
}

/// A drive to carry requests out on.
struct Drive<'a> {
    id: &'a str,
    disk: &'a Disk,
}

/// Carries one request out and returns the number of bytes written to the guest, the status among
/// them.
fn serve(
    drive: Drive,
    queue: &DeviceQueue,
    chain: &Chain,
    request: Result<Request, Refused>,
    metrics: &mut BlockMetrics,
) -> usize {
    let Drive { id: drive, disk } = drive;
    let memory = queue.memory();
    let status = match request {
        // Nowhere to put a status: the chain goes back untouched.
        _ if chain.writable.is_empty() => {
            tracing::debug!(drive, "request without a status byte");
            metrics.invalid_reqs_count += 1;
            return 0;
        }
        Ok(request) => {
            let result = disk.run(&request, memory, chain, drive);
            status(drive, &request, result, metrics)
        }
        Err(Refused::Unsupported) => {
            metrics.invalid_reqs_count += 1;
            VIRTIO_BLK_S_UNSUPP
        }
        Err(Refused::Malformed(reason)) => {
            tracing::debug!(drive, reason, "malformed request");
            metrics.invalid_reqs_count += 1;
            VIRTIO_BLK_S_IOERR
        }
    };
    answer(drive, memory, chain, status)
}

/// Returns a request that is over.
fn finish(
    drive: &str,
    queue: &mut DeviceQueue,
    finished: &Finished,
    metrics: &mut BlockMetrics,
) -> Result<(), QueueError> {
    let Finished { chain, request, error } = finished;
    let result = error.as_ref().map_or(Ok(()), Err);
    let written = answer(drive, queue.memory(), chain, status(drive, request, result, metrics));
    queue.push(chain, written)
}

/// What the guest is told of a request that was carried out.
fn status(
    drive: &str,
    request: &Request,
    result: Result<(), impl std::fmt::Display>,
    metrics: &mut BlockMetrics,
) -> u32 {
    match result {
        Ok(()) => {
            metrics.done(request);
            VIRTIO_BLK_S_OK
        }
        Err(error) => {
            guest_warning!(drive, ?request, %error, "request failed");
            metrics.execute_fails += 1;
            VIRTIO_BLK_S_IOERR
        }
    }
}

/// Writes a status at the chain's end; the number of bytes written to the guest.
fn answer(drive: &str, memory: &GuestMemory, chain: &Chain, status: u32) -> usize {
    let length = chain.writable.len();
    match chain.writable.write(memory, length.saturating_sub(1), &[status as u8]) {
        // What lies between the data and the status was not written by us, but the length must
        // reach to the status.
        Ok(_) => length,
        Err(error) => {
            guest_warning!(drive, %error, "status not written");
            0
        }
    }
}

/// `struct virtio_blk_config` (virtio 1.2, 5.2.4).
fn config_space(sectors: u64) -> Vec<u8> {
    let mut config = vec![0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    // A header and a status take a descriptor each.
    put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
    put(20, &512u32.to_le_bytes());
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    // Discard in file system blocks.
    put(44, &8u32.to_le_bytes());
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]);
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.event
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if let Some(uring) = &mut self.uring {
            uring.begin(&activation.memory);
        }
        let [queue] = super::take_queues(&self.options.id, activation)
            .inspect_err(|_| self.metrics.activate_fails += 1)?;
        self.queue = Some(queue);
        // A notification may have come while the queue was not there yet.
        let _ = self.event[0].write(1);
        Ok(())
    }

    fn reset(&mut self) {
        self.queue = None;
        if let Some(uring) = &mut self.uring {
            uring.stop();
        }
    }

    fn drain(&mut self) {
        while self.uring.as_mut().is_some_and(Uring::wait) {
            let result = self.complete();
            self.check(result);
        }
        let result = self.queue.as_mut().map_or(Ok(()), DeviceQueue::signal);
        self.check(result);
    }

    fn metrics(&self) -> Option<Readings> {
        Some(self.metrics.readings())
    }

    fn queue_positions(&self) -> Vec<Option<QueuePosition>> {
        self.queue.iter().map(|queue| Some(queue.position(0))).collect()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(self.options.rate_limiter.save(Instant::now()))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Block(limits) = state else { return Err(state.mismatch()) };
        self.options.rate_limiter = super::restore_limits(&limits)?;
        Ok(())
    }
}

impl MutEventSubscriber for Block {
    fn init(&mut self, ops: &mut EventOps) {
        super::register(ops, &self.event[0], QUEUE, EventSet::IN);
        super::register_timer(ops, &mut self.options.rate_limiter, TIMER);
        if let Some(uring) = &self.uring {
            super::register(ops, uring.completed(), COMPLETED, EventSet::IN);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        super::register_timer(ops, &mut self.options.rate_limiter, TIMER);
        match (events.data(), &self.uring) {
            (TIMER, _) => {
                self.options.rate_limiter.timer_fired();
                self.metrics.rate_limiter_event_count += 1;
            }
            (COMPLETED, Some(uring)) => {
                let _ = uring.completed().read();
            }
            _ => {
                let _ = self.event[0].read();
                self.metrics.queue_event_count += 1;
            }
        }
        let result = Block::process(self);
        self.check(result);
    }
}

#[cfg(test)]
mod tests;
