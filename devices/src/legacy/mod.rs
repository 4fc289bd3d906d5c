//! The few devices of a PC that a guest without firmware still expects.

pub mod power;
pub mod serial;
