//! The objects of Firecracker's API that this monitor knows, with their defaults. A field that is
//! not known is an error; one that is known and not yet carried out is refused with its name.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{MachineError, RateLimiter};

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: an ELF file with a PVH note, or a bzImage.
    pub kernel_image_path: PathBuf,
    /// An initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line, in place of the default one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

/// Processors and memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of virtual processors, 1 to 32.
    pub vcpu_count: u8,
    /// Memory in MiB.
    pub mem_size_mib: usize,
    /// Two threads a core.
    #[serde(default)]
    pub smt: bool,
    /// Record which pages are written, for differential snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Pages that back guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// A set of processor features.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<String>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        MachineConfig {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            cpu_template: None,
        }
    }
}

impl MachineConfig {
    /// Most virtual processors.
    const MAX_VCPUS: u8 = 32;

    /// Refuses what no machine can be made of, and what is not carried out yet.
    pub fn check(&self) -> Result<(), MachineError> {
        if self.vcpu_count == 0 || self.vcpu_count > Self::MAX_VCPUS {
            return refuse(
                "The vCPU number is invalid! The vCPU number can only be between 1 and 32.",
            );
        }
        if self.smt && self.vcpu_count > 1 && !self.vcpu_count.is_multiple_of(2) {
            return refuse(
                "The vCPU number is invalid! With SMT it can only be 1 or an even number.",
            );
        }
        if self.mem_size_mib == 0 {
            return refuse("The memory size (MiB) is invalid.");
        }
        if self.huge_pages == HugePages::Explicit && !self.mem_size_mib.is_multiple_of(2) {
            return refuse("The memory size (MiB) is not a multiple of the page size, 2 MiB.");
        }
        match self.cpu_template.as_deref() {
            None | Some("None") => Ok(()),
            Some(_) => refuse("cpu_template is not supported yet"),
        }
    }
}

/// `PATCH /machine-config`: what is not named stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigUpdate {
    /// Number of virtual processors.
    pub vcpu_count: Option<u8>,
    /// Memory in MiB.
    pub mem_size_mib: Option<usize>,
    /// Two threads a core.
    pub smt: Option<bool>,
    /// Record which pages are written.
    pub track_dirty_pages: Option<bool>,
    /// Pages that back guest memory.
    pub huge_pages: Option<HugePages>,
    /// A set of processor features.
    pub cpu_template: Option<String>,
}

impl MachineConfigUpdate {
    /// The configuration with these changes; refused where it names none.
    pub fn apply(self, to: &MachineConfig) -> Result<MachineConfig, MachineError> {
        if self == MachineConfigUpdate::default() {
            return refuse("Empty PATCH request.");
        }
        Ok(MachineConfig {
            vcpu_count: self.vcpu_count.unwrap_or(to.vcpu_count),
            mem_size_mib: self.mem_size_mib.unwrap_or(to.mem_size_mib),
            smt: self.smt.unwrap_or(to.smt),
            track_dirty_pages: self.track_dirty_pages.unwrap_or(to.track_dirty_pages),
            huge_pages: self.huge_pages.unwrap_or(to.huge_pages),
            cpu_template: self.cpu_template.or_else(|| to.cpu_template.clone()),
        })
    }
}

/// Pages that back guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// 4 KiB.
    #[default]
    None,
    /// Whatever the host's transparent huge pages make of it.
    Transparent,
    /// From hugetlbfs.
    #[serde(rename = "2M")]
    Explicit,
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name: letters, digits and underscores.
    pub drive_id: String,
    /// The guest's root device; at most one.
    pub is_root_device: bool,
    /// The partition of the root device to use, by its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// The raw file or block device behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    /// Never written.
    #[serde(default)]
    pub is_read_only: bool,
    /// Whether flush is offered, and durable.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How requests are carried out.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// Limits on bandwidth and operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// A vhost-user back end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

impl Drive {
    /// The file behind the drive, if the drive is one we can make.
    pub fn check(&self) -> Result<&PathBuf, MachineError> {
        check_id("drive_id", &self.drive_id)?;
        let id = &self.drive_id;
        if self.socket.is_some() {
            return refuse(&format!("drive {id}: socket (vhost-user) is not supported yet"));
        }
        match &self.path_on_host {
            Some(path) => Ok(path),
            None => refuse(&format!("drive {id}: path_on_host is missing")),
        }
    }
}

/// What a flush is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// Flush is not offered.
    #[default]
    Unsafe,
    /// A flush is on disk before it is acknowledged.
    Writeback,
}

/// How block requests are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// One after the other.
    #[default]
    Sync,
    /// By io_uring.
    Async,
}

/// A network interface on a TAP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name: letters, digits and underscores.
    pub iface_id: String,
    /// The TAP interface on the host.
    pub host_dev_name: String,
    /// The guest's MAC address, `aa:bb:cc:dd:ee:ff`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// MTU told to the guest, 68 to 65535.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Limits on what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits on what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

impl NetworkInterface {
    /// The guest's MAC address, if the interface is one we can make.
    pub fn check(&self) -> Result<Option<[u8; 6]>, MachineError> {
        check_id("iface_id", &self.iface_id)?;
        let id = &self.iface_id;
        if self.mtu.is_some_and(|mtu| mtu < 68) {
            return refuse(&format!("interface {id}: an MTU is at least 68"));
        }
        self.guest_mac.as_deref().map(parse_mac).transpose()
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], MachineError> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        // from_str_radix would take a sign.
        let digits = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        let part = parts.next().filter(digits);
        match part.and_then(|part| u8::from_str_radix(part, 16).ok()) {
            Some(value) => *byte = value,
            None => return refuse(&format!("{text:?} is not a MAC address")),
        }
    }
    match parts.next() {
        Some(_) => refuse(&format!("{text:?} is not a MAC address")),
        None => Ok(mac),
    }
}

/// The vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's address, at least 3.
    pub guest_cid: u32,
    /// The Unix socket on the host.
    pub uds_path: PathBuf,
    /// Deprecated, and without a meaning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

impl Vsock {
    /// Refuses reserved addresses.
    pub fn check(&self) -> Result<(), MachineError> {
        if self.guest_cid < 3 || self.guest_cid == u32::MAX {
            return refuse("guest_cid must be at least 3 and below 2^32 - 1");
        }
        Ok(())
    }
}

/// The entropy device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Limits on bandwidth and operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Where messages of the monitor go. What is not given stays as it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file or FIFO; standard error where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// The least important messages to show.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<Level>,
    /// Whether each message names its level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether each message names the file and line it comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only messages of this module.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// How important a message is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Level {
    /// None at all.
    #[serde(alias = "OFF", alias = "off")]
    Off,
    /// What failed.
    #[serde(alias = "ERROR", alias = "error")]
    Error,
    /// What looks wrong.
    #[serde(alias = "WARNING", alias = "warning", alias = "Warn", alias = "WARN", alias = "warn")]
    Warning,
    /// What happened.
    #[default]
    #[serde(alias = "INFO", alias = "info")]
    Info,
    /// What helps to find a fault.
    #[serde(alias = "DEBUG", alias = "debug")]
    Debug,
    /// Everything.
    #[serde(alias = "TRACE", alias = "trace")]
    Trace,
}

/// The guest's consoles; this object is vmrun's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// Adds a virtio console (`hvc0`) whose output goes to this file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_path: Option<PathBuf>,
    /// Whether there is a serial port (`ttyS0`), on standard input and output.
    #[serde(default = "yes")]
    pub serial: bool,
    /// Whether the guest is told of its keyboard, which `SendCtrlAltDel` presses keys of.
    #[serde(default = "yes")]
    pub keyboard: bool,
}

impl Default for Console {
    fn default() -> Self {
        Console { output_path: None, serial: true, keyboard: true }
    }
}

pub(super) fn yes() -> bool {
    true
}

pub(super) fn check_id(field: &str, id: &str) -> Result<(), MachineError> {
    if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return refuse(&format!("{field} {id:?} may only have letters, digits and underscores"));
    }
    Ok(())
}

fn refuse<T>(message: &str) -> Result<T, MachineError> {
    Err(MachineError::new(message))
}
