//! End to end, in the lab, as a user types it.

mod faults;
mod images;
mod network;
mod process;
