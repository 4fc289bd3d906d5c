//! virtio-vsock (virtio 1.2, 5.10) with Unix sockets as the host's side.
//!
//! A host program reaches a port of the guest by connecting to the socket at `uds_path` and sending
//! `CONNECT <port>\n`; it gets `OK <port>\n` when the guest has accepted, and an end of file when it
//! has not. A guest program that connects to port P of the host (CID 2) reaches the socket at
//! `<uds_path>_<P>`. Firecracker has the same convention.
//!
//! A program that connects before the guest's driver is there waits for it. One half of a
//! connection can be closed without the other, from both ends, by shutdown(2). No connection is
//! ended by a clock: bytes for a slow reader on the host are kept, even when the guest has closed,
//! until he reads them or the place is needed.

mod connection;
mod handshake;
mod host;
mod metrics;
mod packet;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use telemetry::Readings;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use host::{FIRST_HOST_PORT, FIRST_TOKEN, Host, SocketNews};
pub use metrics::VsockMetrics;
use packet::{HEADER, Header};

use super::queue::{BUDGET, Chain, DeviceQueue, QueueError};
use super::{ActivateError, Activation, DeviceState, QueuePosition, RestoreError, VirtioDevice};

const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Events of the listening socket.
const LISTENER: u32 = 3;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, as it lies in memory.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// A vsock device.
pub struct Vsock {
    guest_cid: u64,
    host: Host,
    events: [EventFd; 3],
    queues: Option<[DeviceQueue; 3]>,
    chain: Chain,
    /// Packets of the guest wait until it has taken answers.
    stopped: bool,
    /// The driver is to be told that all connections are gone.
    reset_due: bool,
}

impl Vsock {
    /// A device for the guest with this address, that listens at this path. The path must not
    /// exist, and is removed with the device.
    pub fn new(guest_cid: u32, path: &Path) -> io::Result<Vsock> {
        let listener = Host::listen(path)?;
        Vsock::with_host(guest_cid, |cid| Host::new(cid, path, listener, true))
    }

    /// A device whose socket somebody else made at this path.
    pub fn listening(guest_cid: u32, path: &Path, listener: UnixListener) -> io::Result<Vsock> {
        Vsock::with_host(guest_cid, |cid| Host::new(cid, path, listener, false))
    }

    fn with_host(guest_cid: u32, host: impl FnOnce(u64) -> io::Result<Host>) -> io::Result<Vsock> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let guest_cid = guest_cid.into();
        Ok(Vsock {
            guest_cid,
            host: host(guest_cid)?,
            events: [event()?, event()?, event()?],
            queues: None,
            chain: Chain::default(),
            stopped: false,
            reset_due: false,
        })
    }

    /// Removes the socket's file now, for a process that ends without dropping its devices.
    pub fn remove_socket(&mut self) {
        self.host.remove_socket();
    }

    /// Ends all connections and tells the driver so (virtio 1.2, 5.10.6.7): a machine that was
    /// restored has none of those that its guest remembers.
    pub fn transport_reset(&mut self) {
        self.host.abandon();
        self.reset_due = true;
        let _ = self.events[EVENT].write(1);
    }

    /// Takes packets from the guest.
    fn transmit(&mut self) -> Result<(), QueueError> {
        let Some([_, queue, _]) = self.queues.as_mut() else { return Ok(()) };
        for _ in 0..BUDGET {
            if self.host.is_congested() {
                self.stopped = true;
                return queue.signal();
            }
            if !queue.pop(&mut self.chain)? {
                return queue.signal();
            }
            let buffers = &self.chain.readable;
            match Header::read(queue.memory(), buffers) {
                Some(header) => {
                    self.host.metrics.tx_packets_count += 1;
                    self.host.packet(&header, queue.memory(), buffers);
                }
                None => tracing::debug!("vsock: a packet shorter than a header"),
            }
            queue.push(&self.chain, 0)?;
        }
        // The rest in the next round of the event loop.
        let _ = self.events[TX].write(1);
        queue.signal()
    }

    /// Gives the guest what there is for it.
    fn receive(&mut self) -> Result<(), QueueError> {
        let Some([queue, ..]) = self.queues.as_mut() else { return Ok(()) };
        let mut budget = BUDGET;
        while self.host.has_packets() {
            if budget == 0 {
                let _ = self.events[RX].write(1);
                break;
            }
            budget -= 1;
            if !queue.pop(&mut self.chain)? {
                break;
            }
            let buffers = &self.chain.writable;
            if buffers.len() < HEADER {
                tracing::debug!("vsock: a receive buffer without room for a header");
                queue.push(&self.chain, 0)?;
                continue;
            }
            match self.host.next_packet(queue.memory(), buffers) {
                Some(header) => {
                    let whole = header.write(queue.memory(), buffers);
                    let length = if whole { HEADER + header.length as usize } else { 0 };
                    queue.push(&self.chain, length)?;
                    self.host.metrics.rx_packets_count += 1;
                    self.host.metrics.rx_bytes_count += u64::from(header.length);
                }
                None => queue.undo_pop(),
            }
        }
        queue.signal()?;
        if self.stopped && !self.host.is_congested() {
            self.stopped = false;
            let _ = self.events[TX].write(1);
        }
        Ok(())
    }

    /// Gives the guest an event.
    fn announce(&mut self) -> Result<(), QueueError> {
        let Some([.., queue]) = self.queues.as_mut() else { return Ok(()) };
        while self.reset_due && queue.pop(&mut self.chain)? {
            let written = self.chain.writable.write(queue.memory(), 0, &TRANSPORT_RESET);
            let whole = written.is_ok_and(|count| count == TRANSPORT_RESET.len());
            self.reset_due = !whole;
            queue.push(&self.chain, if whole { TRANSPORT_RESET.len() } else { 0 })?;
        }
        queue.signal()
    }

    /// Watches sockets that are new, and closes those that are done with.
    fn watch(&mut self, ops: &mut EventOps) {
        loop {
            for socket in self.host.closed.drain(..) {
                // Closing would do for the kernel; this keeps the event manager's books.
                if let Err(error) = ops.remove(Events::empty(&socket)) {
                    tracing::debug!(?error, "vsock: a socket was not watched");
                }
            }
            let Some(token) = self.host.opened.pop() else { return };
            let set =
                EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
            let Some(socket) = self.host.socket(token) else { continue };
            if let Err(error) = ops.add(Events::with_data(socket, token, set)) {
                tracing::warn!(?error, "vsock: cannot watch a socket");
                self.host.event(token, SocketNews { hung_up: true, ..SocketNews::default() });
            }
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE]
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues = super::take_queues("vsock", activation)
            .inspect_err(|_| self.host.metrics.activate_fails += 1)?;
        self.queues = Some(queues);
        // Host programs may have connected before the driver was there.
        for event in &self.events {
            let _ = event.write(1);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.stopped = false;
        // A driver resets its device before it first uses it; those who wait for it stay.
        if self.queues.take().is_some() {
            self.host.abandon();
            // To have the sockets closed on the thread that watches them.
            let _ = self.events[RX].write(1);
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock { next_host_port: self.host.next_host_port }
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock { next_host_port } = state else { return Err(state.mismatch()) };
        self.host.next_host_port = next_host_port.max(FIRST_HOST_PORT);
        Ok(())
    }

    fn queue_positions(&self) -> Vec<Option<QueuePosition>> {
        self.queues.iter().flatten().map(|queue| Some(queue.position(0))).collect()
    }

    fn metrics(&self) -> Option<Readings> {
        Some(self.host.metrics.readings())
    }
}

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps) {
        for (index, event) in self.events.iter().enumerate() {
            super::register(ops, event, index as u32, EventSet::IN);
        }
        super::register(
            ops,
            self.host.listener(),
            LISTENER,
            EventSet::IN | EventSet::EDGE_TRIGGERED,
        );
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let mut result = Ok(());
        let set = events.event_set();
        match events.data() {
            LISTENER => self.host.called(),
            token @ FIRST_TOKEN.. => {
                let hung_up = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
                let ended = set.contains(EventSet::READ_HANG_UP);
                let readable = set.contains(EventSet::IN);
                self.host.event(token, SocketNews { readable, ended, hung_up });
            }
            queue => {
                if let Some(event) = self.events.get(queue as usize) {
                    let _ = event.read();
                }
                let metrics = &mut self.host.metrics;
                match queue as usize {
                    TX => {
                        metrics.tx_queue_event_count += 1;
                        result = self.transmit();
                        self.host.metrics.tx_queue_event_fails += u64::from(result.is_err());
                    }
                    EVENT => {
                        result = self.announce();
                        self.host.metrics.ev_queue_event_fails += u64::from(result.is_err());
                    }
                    _ => metrics.rx_queue_event_count += 1,
                }
            }
        }
        if self.host.accept() {
            let _ = self.events[RX].write(1);
        }
        let result = result.and_then(|()| {
            self.receive().inspect_err(|_| self.host.metrics.rx_queue_event_fails += 1)
        });
        if let Err(error) = result {
            super::broken_all("vsock", &mut self.queues, &error);
            self.host.abandon();
        }
        self.watch(ops);
    }
}
