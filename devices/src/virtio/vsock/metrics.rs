//! What a vsock device counts. "Receive" and "transmit" are the guest's.

telemetry::metrics! {
    /// What a vsock device has done since it was made.
    pub struct VsockMetrics("vsock", Counter) {
        /// Times that the driver could not be served from the start.
        activate_fails,
        /// Times that the driver broke the rules of the receive queue.
        rx_queue_event_fails,
        /// Times that the driver broke the rules of the transmit queue.
        tx_queue_event_fails,
        /// Times that the driver broke the rules of the event queue.
        ev_queue_event_fails,
        /// Notifications of the driver about receive buffers.
        rx_queue_event_count,
        /// Notifications of the driver about packets to send.
        tx_queue_event_count,
        /// Bytes of data that the guest has received.
        rx_bytes_count,
        /// Bytes of data that the guest has sent.
        tx_bytes_count,
        /// Packets that the guest has received.
        rx_packets_count,
        /// Packets that the guest has sent.
        tx_packets_count,
        /// Connections that were begun, from either side.
        conns_added,
        /// Connections that were ended by a reset from our side.
        conns_killed,
        /// Connections that have ended.
        conns_removed,
    }
}
