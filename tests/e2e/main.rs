//! End to end, in the lab, as a user types it.

mod process;
