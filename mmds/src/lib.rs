//! The microVM metadata service: a JSON document that the host writes and the guest reads by HTTP at
//! a link-local address, as Firecracker has it (docs/mmds), and EC2 before it.
//!
//! Nothing here does I/O or has a thread.

mod store;
mod token;

pub use store::{DEFAULT_SIZE_LIMIT, Format, Store, StoreError};
pub use token::{MAX_TTL_SECONDS, MIN_TTL_SECONDS, TokenAuthority, TokenError};
