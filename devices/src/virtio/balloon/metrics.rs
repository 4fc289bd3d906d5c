//! What a balloon counts.

telemetry::metrics! {
    /// What a balloon has done since it was made.
    pub struct BalloonMetrics("balloon", Counter) {
        /// Times that the driver could not be served from the start.
        activate_fails,
        /// Times that the driver broke the rules, so that it had to reset the device.
        event_fails,
        /// Lists of pages that went into the balloon.
        inflate_count,
        /// Lists of pages that came out of the balloon.
        deflate_count,
        /// Times that the guest gave statistics.
        stats_updates_count,
        /// Times that the driver broke the rules of the queue of statistics.
        stats_update_fails,
        /// Ranges that the guest reported as free.
        free_page_report_count,
        /// Bytes that the guest reported as free.
        free_page_report_freed,
        /// Ranges that the guest hinted as free.
        free_page_hint_count,
        /// Bytes that the guest hinted as free.
        free_page_hint_freed,
    }
}
