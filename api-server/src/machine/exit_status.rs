//! How `vmrun-vmm` tells why it ended.

/// The guest switched itself off, or the machine was told to end.
pub const POWER_OFF: i32 = 0;
/// The machine could not be configured or started; one line on standard error says why.
pub const START_FAILED: i32 = 1;
/// The guest asked for a reset.
pub const REBOOT: i32 = 10;
/// The guest crashed: a triple fault, or a state that KVM cannot run.
pub const GUEST_CRASH: i32 = 11;
/// Ended by `SIGINT`.
pub const INTERRUPTED: i32 = 130;
/// Ended by `SIGTERM`.
pub const TERMINATED: i32 = 143;
