//! virtio-net (virtio 1.2, 5.1) on a TAP interface.
//!
//! Checksums and segmentation are left to the host where guest and TAP agree. A frame whose source
//! is not the guest's own MAC address is dropped, where the guest was given one: a guest cannot
//! speak for its neighbours.

mod header;
mod tap;

use std::io::{ErrorKind, Read, Write};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{BUDGET, Chain, DeviceQueue, QueueError};
use super::{ActivateError, Activation, VirtioDevice};
use header::{LENGTH, MAX_FRAME};
pub use tap::Tap;

const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;
const TAP: u32 = 2;

/// How an interface is presented.
#[derive(Clone, Debug, Default)]
pub struct NetOptions {
    /// For log messages.
    pub id: String,
    /// The guest's MAC address; without one the guest makes up its own, and may use any.
    pub mac: Option<[u8; 6]>,
    /// MTU to advertise, in bytes.
    pub mtu: Option<u16>,
}

/// A network interface.
pub struct Net {
    options: NetOptions,
    tap: Tap,
    /// The TAP had frames when last asked. It is watched edge-triggered.
    readable: bool,
    /// A frame read from the TAP that waits for buffers: the first so many bytes of `incoming`.
    held: Option<usize>,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    mergeable: bool,
    events: [EventFd; 2],
    queues: Option<[DeviceQueue; 2]>,
    chain: Chain,
    chains: Vec<Chain>,
    config: [u8; 12],
}

impl Net {
    /// An interface on this TAP.
    pub fn new(options: NetOptions, tap: Tap) -> std::io::Result<Net> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let mut config = [0; 12];
        config[..6].copy_from_slice(&options.mac.unwrap_or_default());
        config[10..].copy_from_slice(&options.mtu.unwrap_or_default().to_le_bytes());
        Ok(Net {
            options,
            tap,
            readable: true,
            held: None,
            incoming: vec![0; LENGTH + MAX_FRAME],
            // One byte more than a frame may have, to see that it has too many.
            outgoing: vec![0; LENGTH + MAX_FRAME + 1],
            mergeable: false,
            events: [event()?, event()?],
            queues: None,
            chain: Chain::default(),
            chains: Vec::new(),
            config,
        })
    }

    /// Sends the guest's frames.
    fn transmit(&mut self) -> Result<(), QueueError> {
        let Some(queues) = self.queues.as_mut() else { return Ok(()) };
        let queue = &mut queues[TX];
        let mut budget = BUDGET;
        loop {
            queue.disable_notifications()?;
            while budget > 0 && queue.pop(&mut self.chain)? {
                budget -= 1;
                let got = self.chain.readable.read(queue.memory(), 0, &mut self.outgoing);
                let frame = &self.outgoing[..got.unwrap_or(0)];
                match header::fault(frame, self.options.mac) {
                    None => send(&self.options.id, &mut self.tap, frame),
                    Some(fault) => {
                        tracing::debug!(interface = self.options.id, fault, "frame dropped");
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
        queue.signal()
    }

    /// Hands the guest what the TAP has.
    fn receive(&mut self) -> Result<(), QueueError> {
        for _ in 0..BUDGET {
            if self.queues.is_none() {
                return Ok(());
            }
            let Some(length) = self.held.take().or_else(|| self.read_tap()) else {
                return self.signal_received();
            };
            if !self.deliver(length)? {
                // The driver tells us when it has added buffers.
                self.held = Some(length);
                return self.signal_received();
            }
        }
        let _ = self.events[RX].write(1);
        self.signal_received()
    }

    fn signal_received(&mut self) -> Result<(), QueueError> {
        match self.queues.as_mut() {
            Some(queues) => queues[RX].signal(),
            None => Ok(()),
        }
    }

    fn read_tap(&mut self) -> Option<usize> {
        while self.readable {
            match self.tap.read(&mut self.incoming) {
                Ok(length) if length > LENGTH => return Some(length),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.readable = false;
                    if error.kind() != ErrorKind::WouldBlock {
                        tracing::warn!(interface = self.options.id, %error, "cannot read from the TAP");
                    }
                }
            }
        }
        None
    }

    /// Puts a frame into the guest's buffers; false where there are not enough yet.
    fn deliver(&mut self, length: usize) -> Result<bool, QueueError> {
        let Some(queues) = self.queues.as_mut() else { return Ok(true) };
        let queue = &mut queues[RX];
        let most = if self.mergeable { usize::from(QUEUE_SIZE) } else { 1 };
        let mut room = 0;
        let mut used = 0;
        while room < length && used < most {
            if self.chains.len() == used {
                self.chains.push(Chain::default());
            }
            let chain = &mut self.chains[used];
            if !queue.pop(chain)? {
                for _ in 0..used {
                    queue.undo_pop();
                }
                return Ok(false);
            }
            room += chain.writable.len();
            used += 1;
        }
        let Some(first) = self.chains.first().filter(|_| used > 0) else { return Ok(true) };
        // Too small for the frame, or for the header alone: the frame is lost, the buffers are not.
        if room < length || first.writable.len() < LENGTH {
            tracing::debug!(interface = self.options.id, length, room, "receive buffers too small");
            for chain in &self.chains[..used] {
                queue.push(chain, 0)?;
            }
            return Ok(true);
        }
        // num_buffers; without mergeable buffers it is 1 too (virtio 1.2, 5.1.6.4.1).
        self.incoming[10..LENGTH].copy_from_slice(&(used as u16).to_le_bytes());
        let mut from = 0;
        for chain in &self.chains[..used] {
            let part = chain.writable.len().min(length - from);
            let bytes = &self.incoming[from..from + part];
            let written = chain.writable.write(queue.memory(), 0, bytes).unwrap_or(0);
            queue.push(chain, written)?;
            from += part;
        }
        Ok(true)
    }
}

fn send(interface: &str, tap: &mut Tap, frame: &[u8]) {
    loop {
        match tap.write(frame) {
            Ok(_) => return,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                // As on a wire: what cannot be sent is lost.
                tracing::debug!(interface, %error, "frame not sent");
                return;
            }
        }
    }
}

impl VirtioDevice for Net {
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
        self.mergeable = features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        self.tap.set_offloads(features).map_err(|error| ActivateError {
            device: self.options.id.clone(),
            reason: format!("offloads: {error}"),
        })?;
        self.queues = Some(super::take_queues(&self.options.id, activation)?);
        self.readable = true;
        for event in &self.events {
            let _ = event.write(1);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.queues = None;
        self.held = None;
        if let Err(error) = self.tap.set_offloads(0) {
            tracing::debug!(interface = self.options.id, %error, "offloads not reset");
        }
    }
}

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps) {
        super::register(ops, &self.events[RX], RX as u32, EventSet::IN);
        super::register(ops, &self.events[TX], TX as u32, EventSet::IN);
        super::register(ops, &self.tap, TAP, EventSet::IN | EventSet::EDGE_TRIGGERED);
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let result = match events.data() {
            TAP => {
                self.readable = true;
                self.receive()
            }
            queue => {
                let queue = (queue as usize).min(TX);
                let _ = self.events[queue].read();
                if queue == TX { self.transmit() } else { self.receive() }
            }
        };
        if let Err(error) = result {
            super::broken_all(&self.options.id, &mut self.queues, &error);
        }
    }
}
