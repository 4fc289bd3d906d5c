//! The objects of the metadata service, of metrics, and of what is plugged in late.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{MachineError, RateLimiter};

/// How the metadata service is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// Whether a session token is needed.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The interfaces it answers on.
    pub network_interfaces: Vec<String>,
    /// Its link-local address.
    #[serde(default = "default_address")]
    pub ipv4_address: Ipv4Addr,
    /// Answer in plain text, whatever the guest accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

fn default_address() -> Ipv4Addr {
    Ipv4Addr::new(169, 254, 169, 254)
}

impl MmdsConfig {
    /// Refuses addresses that are not link-local, or reserved (RFC 3927, 2.1).
    pub fn check(&self) -> Result<(), MachineError> {
        let [.., third, _] = self.ipv4_address.octets();
        if !self.ipv4_address.is_link_local() || third == 0 || third == 255 {
            return Err(MachineError::new("The MMDS IPv4 address is not link local."));
        }
        if self.network_interfaces.is_empty() {
            return Err(MachineError::new("The list of network interface IDs provided is empty."));
        }
        Ok(())
    }
}

/// Versions of the metadata service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// Answers whoever asks.
    #[default]
    V1,
    /// Answers who has a session token.
    V2,
}

/// Where metrics go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file or FIFO.
    pub metrics_path: PathBuf,
    /// Whether each line names the machine.
    #[serde(default)]
    pub emit_id: bool,
    /// Names and values that each line repeats.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
}

/// A file that the guest sees as memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Its name.
    pub id: String,
    /// The file.
    pub path_on_host: PathBuf,
    /// The guest's root device.
    #[serde(default)]
    pub root_device: bool,
    /// Never written.
    #[serde(default)]
    pub read_only: bool,
    /// Limits on flushes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

impl Pmem {
    /// Refuses what is not carried out yet.
    pub fn check(&self) -> Result<(), MachineError> {
        match self.rate_limiter {
            Some(_) => Err(MachineError::new("pmem: rate_limiter is not supported yet")),
            None => Ok(()),
        }
    }
}

/// Memory that can be plugged in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplug {
    /// Most of it, in MiB.
    pub total_size_mib: u32,
    /// The least that the host plugs in, in MiB.
    #[serde(default = "default_slot")]
    pub slot_size_mib: u32,
    /// The least that the guest plugs in, in MiB.
    #[serde(default = "default_block")]
    pub block_size_mib: u32,
}

fn default_slot() -> u32 {
    128
}

fn default_block() -> u32 {
    2
}

/// `PATCH /hotplug/memory`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugUpdate {
    /// What the guest is to have of it, in MiB.
    pub requested_size_mib: u32,
}
