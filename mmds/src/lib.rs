//! The microVM metadata service: a JSON document that the host writes and the guest reads by HTTP at
//! a link-local address, as Firecracker has it (docs/mmds), and EC2 before it.
//!
//! One [`Mmds`] is the service. Each network interface that leads to it has a [`Stack`] of its own,
//! that takes the guest's frames before they reach the TAP. Nothing here does I/O or has a thread,
//! and the time is passed in, counted from any fixed point, the same for all calls.

#![forbid(unsafe_code)]

mod http;
mod metrics;
pub mod random;
mod service;
mod stack;
mod store;
mod token;

pub use http::MAX_REQUEST;
pub use metrics::MmdsMetrics;
pub use service::{AddressError, DEFAULT_ADDRESS, Mmds, MmdsState, MmdsVersion, check_address};
pub use stack::{HEAD, IDLE_TIMEOUT, MAX_CONNECTIONS, MAX_FRAME, Stack, StackConfig, StackError};
pub use store::{DEFAULT_SIZE_LIMIT, StoreError};
pub use token::{MAX_TTL_SECONDS, MIN_TTL_SECONDS, TokenError};
