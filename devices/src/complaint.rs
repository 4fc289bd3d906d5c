//! Warnings that a guest causes, as few of them as a log can hold.

/// `tracing::warn!` for what a guest can cause.
macro_rules! guest_warning {
    ($($arguments:tt)+) => { telemetry::limited_warning!($($arguments)+) };
}
