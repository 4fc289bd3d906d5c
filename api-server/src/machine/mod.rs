//! One micro-VM, as Firecracker's API (version 1.17) describes it.
//!
//! Everything that can be asked of a machine is one [`MachineRequest`], whether it comes from a
//! configuration file or over HTTP, and one [`Machine`] answers it with a [`MachineAnswer`]. The
//! routes are in [`route`]; only [`server`] knows sockets.

mod balloon;
pub mod config_file;
mod cpu_config;
pub mod exit_status;
mod limits;
mod metadata;
mod model;
pub mod requests;
pub mod route;
pub mod server;
mod snapshot;

pub use balloon::*;
pub use cpu_config::*;
pub use limits::*;
pub use metadata::*;
pub use model::*;
pub use snapshot::*;

use serde::Serialize;
use serde_json::Value;

/// The version of Firecracker's API that is spoken, and told to clients that ask.
pub const API_VERSION: &str = "1.17.0";

/// Something asked of a machine. Where nothing else is said, before the guest runs only.
#[derive(Clone, Debug, PartialEq)]
pub enum MachineRequest {
    /// `GET /`, at any time
    GetInstance,
    /// `GET /version`, at any time
    GetVersion,
    /// `GET /vm/config`, at any time
    GetVmConfig,
    /// `GET /machine-config`, at any time
    GetMachineConfig,
    /// `PUT /machine-config`
    PutMachineConfig(MachineConfig),
    /// `PATCH /machine-config`
    PatchMachineConfig(MachineConfigUpdate),
    /// `PUT /boot-source`
    PutBootSource(BootSource),
    /// `PUT /cpu-config`
    PutCpuConfig(CpuConfig),
    /// `PUT /drives/{drive_id}`, where the machine has PCI also while the guest is there
    PutDrive(Drive),
    /// `DELETE /drives/{drive_id}`, while the guest is there; vmrun's own. Answered when the guest has
    /// let go of it.
    DeleteDrive(String),
    /// `PATCH /drives/{drive_id}`, while the guest is there
    PatchDrive(PartialDrive),
    /// `PUT /network-interfaces/{iface_id}`, where the machine has PCI also while the guest is there
    PutNetworkInterface(NetworkInterface),
    /// `DELETE /network-interfaces/{iface_id}`, as for a drive
    DeleteNetworkInterface(String),
    /// `PATCH /network-interfaces/{iface_id}`, while the guest is there
    PatchNetworkInterface(PartialNetworkInterface),
    /// `PUT /vsock`
    PutVsock(Vsock),
    /// `PUT /entropy`
    PutEntropy(Entropy),
    /// `PUT /serial`
    PutSerial(Serial),
    /// The virtio console's output, and whether there is a serial port; vmrun's own.
    PutConsole(Console),
    /// `PUT /balloon`
    PutBalloon(Balloon),
    /// `GET /balloon`, at any time
    GetBalloon,
    /// `PATCH /balloon`, while the guest is there
    PatchBalloon(BalloonUpdate),
    /// `GET /balloon/statistics`, while the guest is there
    GetBalloonStatistics,
    /// `PATCH /balloon/statistics`, while the guest is there
    PatchBalloonStatistics(BalloonStatsUpdate),
    /// `PATCH /balloon/hinting/start`, while the guest is there
    StartBalloonHinting(BalloonHintingStart),
    /// `GET /balloon/hinting/status`, while the guest is there
    GetBalloonHinting,
    /// `PATCH /balloon/hinting/stop`, while the guest is there
    StopBalloonHinting,
    /// `PUT /pmem/{id}`, where the machine has PCI also while the guest is there
    PutPmem(Pmem),
    /// `DELETE /pmem/{id}`, as for a drive
    DeletePmem(String),
    /// `PATCH /pmem/{id}`, while the guest is there
    PatchPmem(PartialPmem),
    /// `PUT /hotplug/memory`
    PutMemoryHotplug(MemoryHotplug),
    /// `PATCH /hotplug/memory`, while the guest is there
    PatchMemoryHotplug(MemoryHotplugUpdate),
    /// `GET /hotplug/memory`, while the guest is there
    GetMemoryHotplug,
    /// `PUT /mmds/config`
    PutMmdsConfig(MmdsConfig),
    /// `PUT /mmds`, at any time
    PutMmds(Value),
    /// `PATCH /mmds`, at any time
    PatchMmds(Value),
    /// `GET /mmds`, at any time
    GetMmds,
    /// `PUT /logger`, at any time
    PutLogger(Logger),
    /// `PUT /metrics`, once
    PutMetrics(Metrics),
    /// `PUT /actions` with `InstanceStart`
    StartInstance,
    /// `GET /metrics`, at any time; vmrun's own
    GetMetrics,
    /// `PUT /actions` with `FlushMetrics`, while the guest is there
    FlushMetrics,
    /// `PUT /actions` with `SendCtrlAltDel`, while the guest is there
    SendCtrlAltDel,
    /// `PATCH /vm` with `Paused`, while the guest is there
    Pause,
    /// `PATCH /vm` with `Resumed`, while the guest is there
    Resume,
    /// `PUT /snapshot/create`, while the guest is there
    CreateSnapshot(SnapshotCreate),
    /// `PUT /snapshot/load`
    LoadSnapshot(SnapshotLoad),
}

/// What a request that succeeded tells.
#[derive(Clone, Debug, PartialEq)]
pub enum MachineAnswer {
    /// It was done.
    Done,
    /// `GET /`
    Instance(InstanceInfo),
    /// `GET /version`
    Version,
    /// Whatever else is asked for, as its model has it.
    Object(Value),
    /// `GET /metrics`, in Prometheus's text format
    Text(String),
}

impl MachineAnswer {
    /// An object of the API.
    pub fn object(object: &impl Serialize) -> Result<MachineAnswer, MachineError> {
        serde_json::to_value(object)
            .map(MachineAnswer::Object)
            .map_err(|error| MachineError::new(&error.to_string()))
    }
}

/// `GET /`
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InstanceInfo {
    /// The machine's name.
    pub id: String,
    /// What it does.
    pub state: InstanceState,
    /// The monitor's version.
    pub vmm_version: String,
    /// The monitor's name.
    pub app_name: String,
}

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum InstanceState {
    /// It is being described.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its processors run.
    Running,
    /// Its processors stand still.
    Paused,
}

/// What answers requests.
pub trait Machine {
    /// Carries out one request.
    fn handle(&mut self, request: MachineRequest) -> Result<MachineAnswer, MachineError>;
}

/// A request that was refused, told in one line (`fault_message`).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct MachineError {
    /// Why.
    pub message: String,
    /// What was asked for is not there; everything else is a bad request.
    pub not_found: bool,
}

impl MachineError {
    /// A refusal.
    pub fn new(message: &str) -> MachineError {
        MachineError { message: message.to_owned(), not_found: false }
    }

    /// What was asked for is not there.
    pub fn not_found(message: &str) -> MachineError {
        MachineError { message: message.to_owned(), not_found: true }
    }
}
