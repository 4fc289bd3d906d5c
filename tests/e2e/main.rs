//! End to end, in the lab, as a user types it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod api;
mod clones;
mod converter;
mod faults;
mod hostile;
mod images;
mod jail;
mod monitor;
mod network;
mod pci;
mod process;
mod rootfs;
mod snapshots;
mod terminal;
