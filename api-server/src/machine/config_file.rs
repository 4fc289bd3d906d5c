//! A whole machine in one JSON file, as Firecracker's `--config-file` has it.

use serde::{Deserialize, Serialize};

use super::{
    Balloon, BootSource, Console, CpuConfig, Drive, Entropy, Logger, MachineConfig, MachineError,
    MachineRequest, MemoryHotplug, Metrics, MmdsConfig, NetworkInterface, Pmem, Serial, Vsock,
};

/// The file's objects; `GET /vm/config` answers with the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConfigFile {
    /// What to boot; absent only in a restored machine's answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    /// Block devices, in the order in which the guest finds them, the root device before all.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// Processors and memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_config: Option<MachineConfig>,
    /// Network interfaces.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// The vsock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// The entropy device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// Where messages go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// The guest's consoles.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
    /// The balloon device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// A custom CPU template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<CpuConfig>,
    /// Memory to be plugged in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_hotplug: Option<MemoryHotplug>,
    /// Where metrics go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// The metadata service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmds_config: Option<MmdsConfig>,
    /// Files that the guest sees as memory.
    #[serde(default)]
    pub pmem: Vec<Pmem>,
    /// The serial port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
}

impl ConfigFile {
    /// A machine that boots from here and has nothing else.
    pub fn new(boot_source: BootSource) -> ConfigFile {
        ConfigFile { boot_source: Some(boot_source), ..ConfigFile::default() }
    }

    /// Reads the text of a file.
    pub fn parse(text: &[u8]) -> Result<ConfigFile, MachineError> {
        let file: ConfigFile =
            serde_json::from_slice(text).map_err(|error| MachineError::new(&error.to_string()))?;
        match file.boot_source {
            Some(_) => Ok(file),
            None => Err(MachineError::new("missing field `boot-source`")),
        }
    }

    /// The requests that make this machine and start it.
    pub fn into_requests(self) -> impl Iterator<Item = MachineRequest> {
        let mut requests = Vec::new();
        requests.extend(self.logger.map(MachineRequest::PutLogger));
        requests.extend(self.metrics.map(MachineRequest::PutMetrics));
        requests.extend(self.cpu_config.map(MachineRequest::PutCpuConfig));
        requests.extend(self.machine_config.map(MachineRequest::PutMachineConfig));
        requests.extend(self.boot_source.map(MachineRequest::PutBootSource));
        requests.extend(self.drives.into_iter().map(MachineRequest::PutDrive));
        let interfaces = self.network_interfaces.into_iter();
        requests.extend(interfaces.map(MachineRequest::PutNetworkInterface));
        requests.extend(self.vsock.map(MachineRequest::PutVsock));
        requests.extend(self.entropy.map(MachineRequest::PutEntropy));
        requests.extend(self.balloon.map(MachineRequest::PutBalloon));
        requests.extend(self.pmem.into_iter().map(MachineRequest::PutPmem));
        requests.extend(self.memory_hotplug.map(MachineRequest::PutMemoryHotplug));
        requests.extend(self.mmds_config.map(MachineRequest::PutMmdsConfig));
        requests.extend(self.serial.map(MachineRequest::PutSerial));
        requests.extend(self.console.map(MachineRequest::PutConsole));
        requests.push(MachineRequest::StartInstance);
        requests.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"{"boot-source": {"kernel_image_path": "k"}, "drives": [], "pmem": [],
        "balloon": null, "machine-config": {"vcpu_count": 2, "mem_size_mib": 256}}"#;

    #[test]
    fn a_file_becomes_requests_in_an_order_that_works() {
        let file = ConfigFile::parse(MINIMAL.as_bytes()).unwrap();
        let requests: Vec<_> = file.into_requests().collect();
        assert!(matches!(requests[0], MachineRequest::PutMachineConfig(_)));
        assert!(matches!(requests[1], MachineRequest::PutBootSource(_)));
        assert_eq!(requests[2], MachineRequest::StartInstance);
    }

    /// docs/hostile.md 23: unknown fields, wrong types, numbers out of range, duplicates.
    #[test]
    fn hostile_23_what_is_wrong_is_refused() {
        for text in [
            "",
            "[]",
            "{}",
            "null",
            r#"{"boot-source": {"kernel_image_path": "k"}, "unknown": 1}"#,
            r#"{"boot-source": {"kernel_image_path": "k", "unknown": 1}}"#,
            r#"{"boot-source": {"kernel_image_path": 7}}"#,
            r#"{"boot-source": {"kernel_image_path": "k"}, "boot-source": {"kernel_image_path": "k"}}"#,
            r#"{"boot-source": {"kernel_image_path": "k"}, "machine-config": {"vcpu_count": -1, "mem_size_mib": 1}}"#,
            r#"{"boot-source": {"kernel_image_path": "k"}, "machine-config": {"vcpu_count": 1000, "mem_size_mib": 1}}"#,
            r#"{"boot-source": {"kernel_image_path": "k"}, "machine-config": {"vcpu_count": 1, "mem_size_mib": 1e99}}"#,
            r#"{"boot-source": {"kernel_image_path": "k"}, "balloon": {"amount_mib": 1}}"#,
            r#"{"boot-source": {"kernel_image_path": "k"}, "drives": {}}"#,
        ] {
            assert!(ConfigFile::parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn hostile_23_numbers_in_type_and_out_of_reason_are_refused() {
        let config = |vcpu_count, mem_size_mib| MachineConfig {
            vcpu_count,
            mem_size_mib,
            ..Default::default()
        };
        for (cpus, memory) in [(0, 128), (33, 128), (255, 128), (1, 0)] {
            assert!(config(cpus, memory).check().is_err(), "{cpus} {memory}");
        }
        assert!(config(32, 1).check().is_ok());
        let interface = |mac: &str| NetworkInterface {
            iface_id: "eth0".to_owned(),
            host_dev_name: "tap".to_owned(),
            guest_mac: Some(mac.to_owned()),
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        };
        assert_eq!(interface("02:76:0a:00:00:ff").check(), Ok(Some([2, 0x76, 10, 0, 0, 255])));
        for mac in [
            "",
            "02",
            "02:76:0a:00:00",
            "02:76:0a:00:00:ff:00",
            "+2:76:0a:00:00:ff",
            "é:76:0a:00:00:ff",
        ] {
            assert!(interface(mac).check().is_err(), "{mac}");
        }
    }
}
