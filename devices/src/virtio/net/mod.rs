//! virtio-net (virtio 1.2, 5.1) on a TAP interface.
//!
//! Checksums and segmentation are left to the host where guest and TAP agree. A frame whose source
//! is not the guest's own MAC address is dropped, where the guest was given one: a guest cannot
//! speak for its neighbours. (So a guest that bridges, or has addresses of its own beside it, is to
//! be given none.)
//!
//! Frames are moved by one system call each between the TAP and the guest's buffers. Only a frame
//! that comes while the driver offers less than the largest one needs is copied once.

mod header;
mod metrics;
mod responder;
mod room;
mod tap;
#[cfg(test)]
mod tests;

use std::io::{self, ErrorKind};

use std::time::Instant;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use telemetry::Readings;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{BUDGET, Chain, DeviceQueue, QueueError};
use super::{
    ActivateError, Activation, DeviceState, QueuePosition, RestoreError, VirtioDevice, vectored,
};
use crate::rate_limiter::{BucketUpdate, RateLimiter};
use header::{ETHERNET, LENGTH, MAX_FRAME, SPOOFED};
pub use metrics::NetMetrics;
use responder::Answers;
pub use responder::Responder;
use room::Room;
pub use tap::{Backend, Tap};

const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;
/// Events beside those of the queues.
const TAP: u32 = 2;
const RX_TIMER: u32 = 3;
const TX_TIMER: u32 = 4;
const ANSWERS_TIMER: u32 = 5;
/// Bytes of the largest frame with its header.
const LARGEST: usize = LENGTH + MAX_FRAME;

/// How an interface is presented.
#[derive(Debug, Default)]
pub struct NetOptions {
    /// For log messages.
    pub id: String,
    /// The guest's MAC address; without one the guest makes up its own, and may use any.
    pub mac: Option<[u8; 6]>,
    /// MTU to advertise, in bytes.
    pub mtu: Option<u16>,
    /// Limits on what the guest receives: bytes of frames, without our header, and frames.
    pub rx_rate_limiter: RateLimiter,
    /// The same for what it sends; a frame that is dropped counts too.
    pub tx_rate_limiter: RateLimiter,
}

/// A network interface.
pub struct Net<B = Tap> {
    options: NetOptions,
    tap: B,
    /// The TAP had frames when last asked. It is watched edge-triggered.
    readable: bool,
    /// The TAP has failed, which was logged.
    failed: bool,
    /// Buffers of the driver for the frames to come.
    room: Room,
    /// For a frame that may be larger than the buffers there are.
    incoming: Vec<u8>,
    /// A frame that waits for more buffers, or until the limiter allows it.
    held: Option<Held>,
    mergeable: bool,
    answers: Option<Answers>,
    events: [EventFd; 2],
    queues: Option<[DeviceQueue; 2]>,
    chain: Chain,
    config: [u8; 12],
    metrics: NetMetrics,
}

/// A frame that was read, and that the driver does not know of yet.
struct Held {
    /// Bytes, its header among them.
    length: usize,
    /// It is in the driver's buffers, the first of `room`; otherwise in `incoming`.
    in_place: bool,
}

/// What asking the TAP for a frame gave.
enum Frame {
    /// One of so many bytes, its header among them.
    Of(usize),
    /// One that is no frame.
    Bad,
    /// None now.
    None,
    /// None any more, most likely.
    Failed,
}

/// Why a frame of the guest was not sent.
#[derive(Debug, thiserror::Error)]
enum Dropped {
    /// It must not be.
    #[error("{0}")]
    Fault(&'static str),
    /// Its buffers cannot be read.
    #[error("{0}")]
    Memory(GuestMemoryError),
    /// The TAP does not take it.
    #[error("{0}")]
    Tap(io::Error),
}

impl<B: Backend> Net<B> {
    /// An interface on this TAP.
    pub fn new(options: NetOptions, tap: B) -> io::Result<Net<B>> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let mut config = [0; 12];
        config[..6].copy_from_slice(&options.mac.unwrap_or_default());
        config[10..].copy_from_slice(&options.mtu.unwrap_or_default().to_le_bytes());
        Ok(Net {
            options,
            tap,
            readable: true,
            failed: false,
            room: Room::default(),
            // Memory of the host only as far as it is used.
            incoming: vec![0; LARGEST],
            held: None,
            mergeable: false,
            answers: None,
            events: [event()?, event()?],
            queues: None,
            chain: Chain::default(),
            config,
            metrics: NetMetrics::default(),
        })
    }

    /// Puts somebody on the link who answers some of the guest's frames. To be called before the
    /// interface is added to an event loop. Fails where no timer can be made.
    pub fn set_responder(&mut self, responder: Box<dyn Responder>) -> io::Result<()> {
        self.answers = Some(Answers::new(responder)?);
        Ok(())
    }

    /// Limits on what the guest receives, for a snapshot.
    pub fn rx_rate_limiter(&self) -> &RateLimiter {
        &self.options.rx_rate_limiter
    }

    /// Limits on what the guest sends, for a snapshot.
    pub fn tx_rate_limiter(&self) -> &RateLimiter {
        &self.options.tx_rate_limiter
    }

    /// Changes limits on what the guest receives, also while it does. Fails as
    /// [`RateLimiter::update`] does.
    pub fn update_rx_rate_limiter(
        &mut self,
        bandwidth: BucketUpdate,
        ops: BucketUpdate,
    ) -> io::Result<()> {
        self.options.rx_rate_limiter.update(bandwidth, ops)?;
        // A frame that was refused is asked for again.
        let _ = self.events[RX].write(1);
        Ok(())
    }

    /// The same for what the guest sends.
    pub fn update_tx_rate_limiter(
        &mut self,
        bandwidth: BucketUpdate,
        ops: BucketUpdate,
    ) -> io::Result<()> {
        self.options.tx_rate_limiter.update(bandwidth, ops)?;
        let _ = self.events[TX].write(1);
        Ok(())
    }

    /// Sends the guest's frames.
    fn transmit(&mut self) -> Result<(), QueueError> {
        let Some([_, queue]) = self.queues.as_mut() else { return Ok(()) };
        let limiter = &mut self.options.tx_rate_limiter;
        if limiter.is_blocked() {
            // The timer calls again.
            return Ok(());
        }
        let metrics = &mut self.metrics;
        let mut budget = BUDGET;
        loop {
            queue.disable_notifications()?;
            while budget > 0 && queue.pop(&mut self.chain)? {
                if !limiter.allows(frame_bytes(self.chain.readable.len()), 1) {
                    // Without asking for notifications: there is more to do than is allowed.
                    metrics.tx_rate_limiter_throttled += 1;
                    queue.undo_pop();
                    return queue.signal();
                }
                budget -= 1;
                match send(&self.tap, queue, &self.chain, self.options.mac, &mut self.answers) {
                    Ok(false) => {}
                    Ok(true) => {
                        metrics.tx_count += 1;
                        metrics.tx_packets_count += 1;
                        metrics.tx_bytes_count += frame_bytes(self.chain.readable.len());
                    }
                    Err(dropped) => {
                        // As on a wire: what cannot be sent is lost.
                        tracing::debug!(interface = self.options.id, %dropped, "frame dropped");
                        metrics.tx_fails += 1;
                        *match dropped {
                            Dropped::Fault(SPOOFED) => &mut metrics.tx_spoofed_mac_count,
                            Dropped::Fault(_) | Dropped::Memory(_) => {
                                &mut metrics.tx_malformed_frames
                            }
                            Dropped::Tap(_) => &mut metrics.tap_write_fails,
                        } += 1;
                    }
                }
                queue.push(&self.chain, 0)?;
            }
            if budget == 0 {
                let _ = self.events[TX].write(1);
                break;
            }
            if !queue.enable_notifications()? {
                break;
            }
        }
        metrics.no_tx_avail_buffer += u64::from(budget == BUDGET);
        if self.answers.is_some() {
            // There may be an answer.
            let _ = self.events[RX].write(1);
        }
        queue.signal()
    }

    fn register_timers(&mut self, ops: &mut EventOps) {
        super::register_timer(ops, &mut self.options.rx_rate_limiter, RX_TIMER);
        super::register_timer(ops, &mut self.options.tx_rate_limiter, TX_TIMER);
    }

    /// Hands the guest what the TAP has.
    fn receive(&mut self) -> Result<(), QueueError> {
        let Some([queue, _]) = self.queues.as_mut() else { return Ok(()) };
        let limiter = &mut self.options.rx_rate_limiter;
        if limiter.is_blocked() {
            // The timer calls again; frames wait in the TAP.
            return Ok(());
        }
        let metrics = &mut self.metrics;
        let mut budget = BUDGET;
        while budget > 0 {
            budget -= 1;
            self.room.fill(queue, self.mergeable, &mut budget)?;
            if budget == 0 {
                break;
            }
            if self.room.is_empty() {
                // The driver tells us when it has added buffers. Frames wait in the TAP, which
                // has room for more than we have.
                metrics.no_rx_avail_buffer += u64::from(self.readable);
                return queue.signal();
            }
            let Held { length, in_place } = if let Some(held) = self.held.take() {
                held
            } else if let Some(length) = answer(&mut self.answers, &mut self.incoming) {
                Held { length, in_place: false }
            } else if !self.readable {
                return queue.signal();
            } else {
                let in_place = self.room.fits_any();
                let read = if in_place {
                    vectored::read(&self.tap, queue.memory(), self.room.parts())
                } else {
                    nix::unistd::read(&self.tap, &mut self.incoming).map_err(io::Error::from)
                };
                let frame = judge(read, &mut self.readable, &self.options.id, &mut self.failed);
                match frame {
                    Frame::Of(length) => {
                        metrics.rx_count += 1;
                        Held { length, in_place }
                    }
                    Frame::Bad => continue,
                    Frame::None => return queue.signal(),
                    Frame::Failed => {
                        metrics.tap_read_fails += 1;
                        return queue.signal();
                    }
                }
            };
            let fits = in_place || self.room.fits(length);
            if !fits && self.room.is_all_there_can_be(self.mergeable) {
                tracing::debug!(interface = self.options.id, length, "receive buffers too small");
                metrics.rx_fails += 1;
                continue;
            }
            let allowed = fits && limiter.allows(frame_bytes(length), 1);
            metrics.no_rx_avail_buffer += u64::from(!fits);
            metrics.rx_rate_limiter_throttled += u64::from(fits && !allowed);
            if !allowed {
                self.held = Some(Held { length, in_place });
                return queue.signal();
            }
            if !in_place {
                self.room.write(queue.memory(), &self.incoming[..length]);
            }
            self.room.give_back(queue, length)?;
            metrics.rx_packets_count += 1;
            metrics.rx_bytes_count += frame_bytes(length);
        }
        let _ = self.events[RX].write(1);
        queue.signal()
    }
}

/// Bytes of a frame without our header, for a limit on bandwidth.
fn frame_bytes(length: usize) -> u64 {
    length.saturating_sub(LENGTH) as u64
}

/// An answer from within the monitor: a frame of so many bytes with its header.
fn answer(answers: &mut Option<Answers>, incoming: &mut [u8]) -> Option<usize> {
    let (header, frame) = incoming.split_at_mut_checked(LENGTH)?;
    let length = answers.as_mut()?.transmit(frame)?;
    // Nothing is left for the guest to do. The number of buffers is filled in later.
    header.fill(0);
    Some(LENGTH + length)
}

/// Sends one frame: its headers from a copy that was judged, the rest from where the guest put it.
/// False where the monitor itself is whom it is for.
fn send(
    tap: &impl Backend,
    queue: &DeviceQueue,
    chain: &Chain,
    mac: Option<[u8; 6]>,
    answers: &mut Option<Answers>,
) -> Result<bool, Dropped> {
    let buffers = &chain.readable;
    let mut head = [0; LENGTH + ETHERNET];
    let count = buffers.read(queue.memory(), 0, &mut head).map_err(Dropped::Memory)?;
    if let Some(fault) = header::fault(&head[..count], buffers.len(), mac) {
        return Err(Dropped::Fault(fault));
    }
    if let Some(answers) = answers {
        let mut head = [0; responder::HEAD];
        let count = buffers.read(queue.memory(), LENGTH, &mut head).map_err(Dropped::Memory)?;
        if answers.wants(&head[..count]) {
            let length = (buffers.len() - LENGTH).min(MAX_FRAME);
            answers.receive(length, |frame| {
                buffers.read(queue.memory(), LENGTH, frame).map(drop).map_err(io::Error::other)
            });
            return Ok(false);
        }
    }
    loop {
        let rest = head.len()..buffers.len();
        match vectored::write(tap, &head, queue.memory(), buffers, rest) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done.map(|_| true).map_err(Dropped::Tap),
        }
    }
}

/// What a read from the TAP means.
fn judge(
    read: io::Result<usize>,
    readable: &mut bool,
    interface: &str,
    failed: &mut bool,
) -> Frame {
    let error = match read {
        Ok(0) => ErrorKind::UnexpectedEof.into(),
        Ok(length) if length > LENGTH => return Frame::Of(length),
        Ok(_) => return Frame::Bad,
        Err(error) if error.kind() == ErrorKind::Interrupted => return Frame::Bad,
        Err(error) => error,
    };
    // Nothing more before the next edge.
    *readable = false;
    if error.kind() == ErrorKind::WouldBlock {
        return Frame::None;
    }
    if !std::mem::replace(failed, true) {
        tracing::warn!(interface, %error, "cannot read from the TAP; was it removed?");
    }
    Frame::Failed
}

impl<B: Backend> VirtioDevice for Net<B> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
        ];
        let given = [
            self.options.mac.map(|_| VIRTIO_NET_F_MAC),
            self.options.mtu.map(|_| VIRTIO_NET_F_MTU),
        ];
        always.into_iter().chain(given.into_iter().flatten()).fold(0, |sum, bit| sum | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        let size = activation.queues.first().and_then(Option::as_ref).map_or(0, Queue::size);
        self.mergeable = features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        let offloads = self.tap.set_offloads(features).map_err(|error| ActivateError {
            device: self.options.id.clone(),
            reason: format!("offloads: {error}"),
        });
        let queues = offloads
            .and_then(|()| super::take_queues(&self.options.id, activation))
            .inspect_err(|_| self.metrics.activate_fails += 1)?;
        self.room = Room::new(size);
        self.queues = Some(queues);
        self.readable = true;
        for event in &self.events {
            let _ = event.write(1);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.queues = None;
        self.held = None;
        self.room = Room::default();
        if let Err(error) = self.tap.set_offloads(0) {
            tracing::debug!(interface = self.options.id, %error, "offloads not reset");
        }
    }

    fn queue_positions(&self) -> Vec<Option<QueuePosition>> {
        let Some([rx, tx]) = &self.queues else { return Vec::new() };
        // Buffers without a frame are taken once more. A frame that is held is lost, as on a wire.
        vec![Some(rx.position(self.room.len())), Some(tx.position(0))]
    }

    fn metrics(&self) -> Option<Readings> {
        Some(self.metrics.readings())
    }

    fn save(&self) -> DeviceState {
        let now = Instant::now();
        DeviceState::Net {
            rx: self.options.rx_rate_limiter.save(now),
            tx: self.options.tx_rate_limiter.save(now),
        }
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Net { rx, tx } = state else { return Err(state.mismatch()) };
        self.options.rx_rate_limiter = super::restore_limits(&rx)?;
        self.options.tx_rate_limiter = super::restore_limits(&tx)?;
        Ok(())
    }
}

impl<B: Backend> MutEventSubscriber for Net<B> {
    fn init(&mut self, ops: &mut EventOps) {
        super::register(ops, &self.events[RX], RX as u32, EventSet::IN);
        super::register(ops, &self.events[TX], TX as u32, EventSet::IN);
        super::register(ops, &self.tap.as_fd(), TAP, EventSet::IN | EventSet::EDGE_TRIGGERED);
        self.register_timers(ops);
        if let Some(answers) = &self.answers {
            super::register(ops, &answers.timer(), ANSWERS_TIMER, EventSet::IN);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.register_timers(ops);
        let result = match events.data() {
            TAP => {
                self.readable = true;
                self.metrics.rx_tap_event_count += 1;
                self.receive()
            }
            RX_TIMER => {
                self.options.rx_rate_limiter.timer_fired();
                self.metrics.rx_event_rate_limiter_count += 1;
                self.receive()
            }
            TX_TIMER => {
                self.options.tx_rate_limiter.timer_fired();
                self.metrics.tx_rate_limiter_event_count += 1;
                self.transmit()
            }
            ANSWERS_TIMER => {
                if let Some(answers) = &mut self.answers {
                    answers.timer_fired();
                }
                self.receive()
            }
            queue => {
                let queue = (queue as usize).min(TX);
                let _ = self.events[queue].read();
                if queue == TX {
                    self.metrics.tx_queue_event_count += 1;
                    self.transmit()
                } else {
                    self.metrics.rx_queue_event_count += 1;
                    self.receive()
                }
            }
        };
        if let Err(error) = result {
            self.metrics.event_fails += 1;
            super::broken_all(&self.options.id, &mut self.queues, &error);
            self.held = None;
            self.room = Room::default();
        }
    }
}
