//! What the service counts.

telemetry::metrics! {
    /// What the service has done since it was made, on all interfaces.
    pub struct MmdsMetrics("mmds", Counter) {
        /// Frames of the guest that were for the service.
        rx_accepted,
        /// Requests of the guest.
        rx_count,
        /// Requests with a session token that is not valid.
        rx_invalid_token,
        /// Requests without a session token where one is needed.
        rx_no_token,
        /// Frames that the guest got.
        tx_frames,
        /// Bytes of frames that the guest got.
        tx_bytes,
        /// Connections that the guest opened.
        connections_created,
        /// Connections that are over.
        connections_destroyed,
    }
}
