//! End to end, in the lab, as a user types it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod clones;
mod faults;
mod images;
mod monitor;
mod network;
mod process;
mod rootfs;
mod terminal;
