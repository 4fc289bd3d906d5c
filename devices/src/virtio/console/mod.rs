//! virtio-console (virtio 1.2, 5.3): one port, for the guest kernel's messages and a login.

use std::io::Write;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{BUDGET, Chain, DeviceQueue, QueueError};
use super::{ActivateError, Activation, DeviceState, QueuePosition, RestoreError, VirtioDevice};

const QUEUE_SIZE: u16 = 64;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// A console. What the guest writes goes to the output; where that fails, it is lost, so that a
/// full disk cannot stop a guest.
pub struct Console {
    output: Box<dyn Write + Send>,
    events: [EventFd; 2],
    queues: Option<[DeviceQueue; 2]>,
    chain: Chain,
    /// Bytes that may still be written to the output: a guest must not fill the host's disk.
    left: u64,
}

impl Console {
    /// A console that writes at most `limit` bytes to `output`.
    pub fn new(output: Box<dyn Write + Send>, limit: u64) -> std::io::Result<Console> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let events = [event()?, event()?];
        Ok(Console { output, events, queues: None, chain: Chain::default(), left: limit })
    }

    fn transmit(&mut self) -> Result<(), QueueError> {
        let Some(queues) = self.queues.as_mut() else { return Ok(()) };
        let queue = &mut queues[TRANSMIT];
        let mut bytes = [0; 4096];
        let mut budget = BUDGET;
        while queue.pop(&mut self.chain)? {
            let mut offset = 0;
            let length =
                self.chain.readable.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
            while offset < length {
                let part = bytes.len().min(length - offset);
                let Ok(got @ 1..) =
                    self.chain.readable.read(queue.memory(), offset, &mut bytes[..part])
                else {
                    break;
                };
                let _ = self.output.write_all(&bytes[..got]);
                offset += got;
            }
            self.left -= length as u64;
            queue.push(&self.chain, 0)?;
            budget -= 1;
            if budget == 0 {
                let _ = self.events[TRANSMIT].write(1);
                break;
            }
        }
        let _ = self.output.flush();
        queue.signal()
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.queues = Some(super::take_queues("console", activation)?);
        let _ = self.events[TRANSMIT].write(1);
        Ok(())
    }

    fn reset(&mut self) {
        self.queues = None;
    }

    fn queue_positions(&self) -> Vec<Option<QueuePosition>> {
        self.queues.iter().flatten().map(|queue| Some(queue.position(0))).collect()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console { left: self.left }
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Console { left } = state else { return Err(state.mismatch()) };
        self.left = self.left.min(left);
        Ok(())
    }
}

impl MutEventSubscriber for Console {
    fn init(&mut self, ops: &mut EventOps) {
        super::register(ops, &self.events[RECEIVE], RECEIVE as u32, EventSet::IN);
        super::register(ops, &self.events[TRANSMIT], TRANSMIT as u32, EventSet::IN);
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        // Buffers for input wait in the receive queue; nothing is connected to it yet.
        let _ = self.events[(events.data() as usize).min(TRANSMIT)].read();
        if let Err(error) = self.transmit() {
            super::broken_all("console", &mut self.queues, &error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::virtio::testing::{Driver, survives_broken_queues};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_arrives_and_stops_at_its_limit() {
        let sink = Sink::default();
        let mut driver = Driver::new(Console::new(Box::new(sink.clone()), 10).unwrap());
        for text in ["hello ", "wide ", "world"] {
            let buffer = driver.buffer(text.as_bytes());
            driver.send(TRANSMIT, &[(buffer, text.len() as u32)], &[]);
        }
        driver.notify(TRANSMIT);
        assert_eq!(sink.0.lock().unwrap().as_slice(), b"hello wide");
        assert_eq!(driver.used(TRANSMIT).len(), 3);
    }

    #[test]
    fn hostile_1_broken_queues_are_survived() {
        survives_broken_queues(|| Console::new(Box::new(std::io::sink()), 100).unwrap());
    }
}
