//! What a drive counts.

use super::request::Operation;

telemetry::metrics! {
    /// What a drive has done since it was made.
    pub struct BlockMetrics("block", Counter) {
        /// Times that the driver could not be served from the start.
        activate_fails,
        /// Times that the driver broke the rules, so that it had to reset the device.
        event_fails,
        /// Requests that the host's file did not carry out.
        execute_fails,
        /// Requests that made no sense, or of a type that was not offered.
        invalid_reqs_count,
        /// Requests to make data durable.
        flush_count,
        /// Requests to forget sectors.
        discard_count,
        /// Requests to fill sectors with zeroes.
        write_zeroes_count,
        /// Notifications of the driver.
        queue_event_count,
        /// Times that there was no request.
        no_avail_buffer,
        /// Times that the rate limiter's timer fired.
        rate_limiter_event_count,
        /// Times that the rate limiter refused a request for a while.
        rate_limiter_throttled_events,
        /// Times that another disk was put in.
        update_count,
        /// Bytes that the guest has read.
        read_bytes,
        /// Bytes that the guest has written.
        write_bytes,
        /// Requests that read.
        read_count,
        /// Requests that write.
        write_count,
    }
}

impl BlockMetrics {
    /// Counts a request that was carried out.
    pub(super) fn done(&mut self, request: &Operation) {
        match request {
            Operation::Read { length, .. } => {
                self.read_count += 1;
                self.read_bytes += *length as u64;
            }
            Operation::Write { length, .. } => {
                self.write_count += 1;
                self.write_bytes += *length as u64;
            }
            Operation::Flush => self.flush_count += 1,
            Operation::Discard(_) => self.discard_count += 1,
            Operation::WriteZeroes(_) => self.write_zeroes_count += 1,
            Operation::GetId => {}
        }
    }
}
