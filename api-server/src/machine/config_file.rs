//! A whole machine in one JSON file, as Firecracker's `--config-file` has it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    BootSource, Console, Drive, Entropy, Logger, MachineConfig, MachineError, MachineRequest,
    NetworkInterface, Vsock,
};

/// The file's objects. Those that are known and not carried out yet are read to be refused by name;
/// `null` and empty lists of them are what Firecracker's own examples have.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConfigFile {
    /// What to boot.
    pub boot_source: BootSource,
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
    #[serde(default, skip_serializing)]
    balloon: Value,
    #[serde(default, skip_serializing)]
    cpu_config: Value,
    #[serde(default, skip_serializing)]
    memory_hotplug: Value,
    #[serde(default, skip_serializing)]
    metrics: Value,
    #[serde(default, skip_serializing)]
    mmds_config: Value,
    #[serde(default, skip_serializing)]
    pmem: Value,
    #[serde(default, skip_serializing)]
    serial: Value,
}

impl ConfigFile {
    /// A machine that boots from here and has nothing else.
    pub fn new(boot_source: BootSource) -> ConfigFile {
        ConfigFile {
            boot_source,
            drives: Vec::new(),
            machine_config: None,
            network_interfaces: Vec::new(),
            vsock: None,
            entropy: None,
            logger: None,
            console: None,
            balloon: Value::Null,
            cpu_config: Value::Null,
            memory_hotplug: Value::Null,
            metrics: Value::Null,
            mmds_config: Value::Null,
            pmem: Value::Null,
            serial: Value::Null,
        }
    }

    /// Reads the text of a file.
    pub fn parse(text: &[u8]) -> Result<ConfigFile, MachineError> {
        let file: ConfigFile =
            serde_json::from_slice(text).map_err(|error| MachineError(error.to_string()))?;
        for (name, value) in [
            ("balloon", &file.balloon),
            ("cpu-config", &file.cpu_config),
            ("memory-hotplug", &file.memory_hotplug),
            ("metrics", &file.metrics),
            ("mmds-config", &file.mmds_config),
            ("pmem", &file.pmem),
            ("serial", &file.serial),
        ] {
            let empty = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
            if !empty {
                return Err(MachineError(format!("{name} is not supported yet")));
            }
        }
        Ok(file)
    }

    /// The requests that make this machine and start it.
    pub fn into_requests(self) -> impl Iterator<Item = MachineRequest> {
        let mut requests = Vec::new();
        requests.extend(self.logger.map(MachineRequest::PutLogger));
        requests.extend(self.machine_config.map(MachineRequest::PutMachineConfig));
        requests.push(MachineRequest::PutBootSource(self.boot_source));
        requests.extend(self.drives.into_iter().map(MachineRequest::PutDrive));
        let interfaces = self.network_interfaces.into_iter();
        requests.extend(interfaces.map(MachineRequest::PutNetworkInterface));
        requests.extend(self.vsock.map(MachineRequest::PutVsock));
        requests.extend(self.entropy.map(MachineRequest::PutEntropy));
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

    /// HOSTILE.md 23: unknown fields, wrong types, numbers out of range, duplicates.
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
