//! The few devices of a PC that a guest without firmware still expects.

pub mod i8042;
pub mod power;
pub mod serial;
