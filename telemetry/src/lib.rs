//! What the monitor's parts tell of themselves: counts ([`metrics!`]), and warnings that others
//! cause ([`limited_warning!`]), as few of them as a log can hold.
//!
//! Nothing here is collected or written: that is the affair of whoever runs the parts.

#![forbid(unsafe_code)]

mod complaint;
mod reading;

pub use complaint::{Complaints, Line};
pub use reading::{Kind, Reading, Readings};

#[doc(hidden)]
pub use tracing;
