//! What a network interface counts. "Receive" and "transmit" are the guest's.

telemetry::metrics! {
    /// What a network interface has done since it was made.
    pub struct NetMetrics("net", Counter) {
        /// Times that the driver could not be served from the start.
        activate_fails,
        /// Times that the driver broke the rules, so that it had to reset the device.
        event_fails,
        /// Times that a frame waited because the driver offered too little room.
        no_rx_avail_buffer,
        /// Times that there was no frame to send.
        no_tx_avail_buffer,
        /// Notifications of the driver about receive buffers.
        rx_queue_event_count,
        /// Times that the timer of the rate limiter for received frames fired.
        rx_event_rate_limiter_count,
        /// Times that this rate limiter refused a frame for a while.
        rx_rate_limiter_throttled,
        /// Times that the TAP said that it has frames.
        rx_tap_event_count,
        /// Bytes of frames that the guest has received.
        rx_bytes_count,
        /// Frames that the guest has received.
        rx_packets_count,
        /// Frames for the guest that were lost.
        rx_fails,
        /// Reads from the TAP that gave a frame.
        rx_count,
        /// Reads from the TAP that failed.
        tap_read_fails,
        /// Writes to the TAP that failed.
        tap_write_fails,
        /// Bytes of frames that the guest has sent by the TAP.
        tx_bytes_count,
        /// Frames that the guest has sent by the TAP.
        tx_packets_count,
        /// Frames of the guest that make no sense.
        tx_malformed_frames,
        /// Frames of the guest that were lost, for whatever reason.
        tx_fails,
        /// Writes to the TAP that took a frame.
        tx_count,
        /// Notifications of the driver about frames to send.
        tx_queue_event_count,
        /// Times that the timer of the rate limiter for sent frames fired.
        tx_rate_limiter_event_count,
        /// Times that this rate limiter refused a frame for a while.
        tx_rate_limiter_throttled,
        /// Frames of the guest with another source than its own MAC address.
        tx_spoofed_mac_count,
    }
}
