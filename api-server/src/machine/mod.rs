//! One micro-VM, as Firecracker's API (version 1.17) describes it.
//!
//! Everything that can be asked of a machine is one [`MachineRequest`], whether it comes from a
//! configuration file or, later, over HTTP, and one [`Machine`] answers it.

pub mod config_file;
pub mod exit_status;
mod model;

pub use model::*;

/// Something asked of a machine.
#[derive(Clone, Debug, PartialEq)]
pub enum MachineRequest {
    /// `PUT /boot-source`
    PutBootSource(BootSource),
    /// `PUT /machine-config`
    PutMachineConfig(MachineConfig),
    /// `PUT /drives/{drive_id}`
    PutDrive(Drive),
    /// `PUT /network-interfaces/{iface_id}`
    PutNetworkInterface(NetworkInterface),
    /// `PUT /vsock`
    PutVsock(Vsock),
    /// `PUT /entropy`
    PutEntropy(Entropy),
    /// `PUT /logger`
    PutLogger(Logger),
    /// `PUT /serial`, and where the virtio console's output goes.
    PutConsole(Console),
    /// `PUT /actions` with `InstanceStart`
    StartInstance,
}

/// What answers requests.
pub trait Machine {
    /// Carries out one request. Every request before `StartInstance` describes the machine; none
    /// but those that say so may come after.
    fn handle(&mut self, request: MachineRequest) -> Result<(), MachineError>;
}

/// A request that was refused, told in one line (`fault_message`).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct MachineError(pub String);
