//! The objects of snapshots.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::MachineError;

/// `PATCH /vm`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// The state to be in.
    pub state: VmState,
}

/// Whether processors run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// They stand still.
    Paused,
    /// They run.
    Resumed,
}

/// `PUT /snapshot/create`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Whether all memory is written or only what changed.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// Where the state goes.
    pub snapshot_path: PathBuf,
    /// Where memory goes.
    pub mem_file_path: PathBuf,
}

/// How much memory a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// All.
    #[default]
    Full,
    /// What was written since the last snapshot, or since memory was loaded.
    Diff,
}

/// `PUT /snapshot/load`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// The state.
    pub snapshot_path: PathBuf,
    /// Deprecated name of a file backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<PathBuf>,
    /// Where memory comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemoryBackend>,
    /// Deprecated name of `track_dirty_pages`.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Record which pages are written.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Let processors run at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other TAP interfaces.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another Unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Other files behind drives; vmrun's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drive_overrides: Vec<DriveOverride>,
    /// Another file for the virtio console's output; vmrun's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console_override: Option<ConsoleOverride>,
    /// Let the guest's clock be what it would be, had the machine run on.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Pages that back guest memory.
    #[serde(default)]
    pub huge_pages: RestoredPages,
}

/// Pages that back the memory of a restored machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestoredPages {
    /// As the snapshot says.
    #[default]
    Snapshot,
    /// 4 KiB.
    None,
    /// Whatever the host's transparent huge pages make of it.
    Transparent,
    /// From hugetlbfs.
    #[serde(rename = "2M")]
    Explicit,
}

/// Where memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// A file, or a process that serves page faults.
    pub backend_type: BackendType,
    /// The file, or the Unix socket of that process.
    pub backend_path: PathBuf,
}

/// Kinds of [`MemoryBackend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendType {
    /// A file, mapped copy-on-write.
    File,
    /// A userfaultfd(2), handed to a process that listens on a Unix socket.
    Uffd,
}

/// A TAP interface in place of the one that the snapshot names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// Which interface.
    pub iface_id: String,
    /// The TAP interface on the host.
    pub host_dev_name: String,
    /// The MAC address that the guest is going to use in place of the one it had; vmrun's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
}

/// A file in place of the one that the snapshot names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// Which drive.
    pub drive_id: String,
    /// The file on the host, as large as the other was.
    pub path_on_host: PathBuf,
}

/// A file in place of the one that the snapshot names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleOverride {
    /// The file on the host.
    pub output_path: PathBuf,
}

/// A Unix socket in place of the one that the snapshot names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The Unix socket on the host.
    pub uds_path: PathBuf,
}

impl SnapshotLoad {
    /// The one place that memory comes from.
    pub fn memory(&self) -> Result<MemoryBackend, MachineError> {
        match (&self.mem_backend, &self.mem_file_path) {
            (Some(backend), None) => Ok(backend.clone()),
            (None, Some(path)) => {
                Ok(MemoryBackend { backend_type: BackendType::File, backend_path: path.clone() })
            }
            (Some(_), Some(_)) => Err(MachineError::new(
                "too many fields: either `mem_backend` or `mem_file_path` exclusively is required",
            )),
            (None, None) => Err(MachineError::new(
                "missing field: either `mem_backend` or `mem_file_path` is required",
            )),
        }
    }

    /// Whether writes are recorded, by whichever name.
    pub fn tracks_dirty_pages(&self) -> bool {
        self.track_dirty_pages || self.enable_diff_snapshots
    }
}
