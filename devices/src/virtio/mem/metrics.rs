//! What hot-plugged memory counts.

use super::request::{Answer, Request};

telemetry::metrics! {
    /// What a memory device has done since it was made.
    pub struct MemMetrics("memory_hotplug", Counter) {
        /// Times that the driver could not be served from the start.
        activate_fails,
        /// Times that the driver broke the rules, so that it had to reset the device.
        queue_event_fails,
        /// Notifications of the driver.
        queue_event_count,
        /// Requests to plug blocks.
        plug_count,
        /// Bytes plugged.
        plug_bytes,
        /// Requests to plug blocks that were refused.
        plug_fails,
        /// Requests to unplug blocks.
        unplug_count,
        /// Bytes unplugged by these.
        unplug_bytes,
        /// Requests to unplug blocks that were refused.
        unplug_fails,
        /// Requests to unplug all blocks.
        unplug_all_count,
        /// Requests to unplug all blocks that were refused.
        unplug_all_fails,
        /// Requests for the state of blocks.
        state_count,
        /// Requests for the state of blocks that were refused.
        state_fails,
    }
}

impl MemMetrics {
    /// Counts a request that was answered, of blocks of so many bytes.
    pub(super) fn answered(&mut self, request: Request, answer: Answer, block_size: u64) {
        let done = matches!(answer, Answer::Ack | Answer::State(_));
        let (count, fails) = match request {
            Request::Plug(_) => (&mut self.plug_count, &mut self.plug_fails),
            Request::Unplug(_) => (&mut self.unplug_count, &mut self.unplug_fails),
            Request::UnplugAll => (&mut self.unplug_all_count, &mut self.unplug_all_fails),
            Request::State(_) => (&mut self.state_count, &mut self.state_fails),
        };
        *count += 1;
        *fails += u64::from(!done);
        match request {
            Request::Plug(blocks) if done => {
                self.plug_bytes += u64::from(blocks.count) * block_size
            }
            Request::Unplug(blocks) if done => {
                self.unplug_bytes += u64::from(blocks.count) * block_size;
            }
            _ => {}
        }
    }
}
