//! What machines are made of, as their VMM is told.

use std::path::Path;

use api_server::machine::config_file::ConfigFile;
use api_server::machine::{
    BootSource, CacheType, Console, Drive, Entropy, IoEngine, Level, Logger, MachineConfig,
    NetworkInterface, NetworkOverride, Vsock,
};

use super::{RunError, at};
use crate::confinement::Policy;
use crate::container::{Container, VSOCK};
use crate::kernel::Kernel;
use crate::network::Attachment;
use crate::programs;
use crate::vmm::Handed;
use crate::volume::Attached;

/// A machine that boots.
pub struct Plan<'a> {
    pub kernel: &'a Kernel,
    pub policy: &'a Policy,
    pub root_device: &'a Path,
    pub writable: Option<&'a Path>,
    pub cpus: u8,
    /// Bytes.
    pub memory: u64,
    pub debug: bool,
}

impl Plan<'_> {
    pub fn machine(
        &self,
        volumes: &[Attached],
        attachment: Option<&Attachment>,
        container: &Container,
        handed: &mut Handed,
    ) -> Result<ConfigFile, RunError> {
        let mut config = bare_machine(self.kernel, self.policy, container, handed)?;
        let mut drive = |id: String, path: &Path, is_read_only: bool| {
            let opened = if is_read_only { handed.read(path) } else { handed.write(path) };
            config.drives.push(Drive {
                drive_id: id,
                is_root_device: false,
                partuuid: None,
                path_on_host: Some(opened.map_err(at(path))?),
                is_read_only,
                cache_type: CacheType::Writeback,
                io_engine: IoEngine::Sync,
                rate_limiter: None,
                socket: None,
            });
            Ok::<_, RunError>(())
        };
        drive("image".to_owned(), self.root_device, true)?;
        if let Some(path) = self.writable {
            drive("writable".to_owned(), path, false)?;
        }
        for (index, volume) in volumes.iter().enumerate() {
            drive(format!("volume{index}"), &volume.path, volume.argument.read_only)?;
        }
        config.machine_config = Some(MachineConfig {
            vcpu_count: self.cpus,
            mem_size_mib: (self.memory >> 20) as usize,
            ..Default::default()
        });
        config.network_interfaces = attachment
            .iter()
            .map(|attachment| NetworkInterface {
                iface_id: "eth0".to_owned(),
                host_dev_name: attachment.tap_name.clone(),
                guest_mac: Some(mac(attachment)),
                mtu: Some(attachment.mtu),
                rx_rate_limiter: None,
                tx_rate_limiter: None,
            })
            .collect();
        let level = if self.debug { Level::Debug } else { Level::Warning };
        config.logger =
            Some(Logger { level: Some(level), show_level: Some(true), ..Default::default() });
        Ok(config)
    }
}

/// What every machine has: a kernel, a console, entropy, and the agent's vsock.
pub fn bare_machine(
    kernel: &Kernel,
    policy: &Policy,
    container: &Container,
    handed: &mut Handed,
) -> Result<ConfigFile, RunError> {
    let initrd = kernel.initrd(&programs::init()?)?;
    let console = container.path("console.log");
    let boot_args = "console=hvc0 quiet reboot=t panic=-1 8250.nr_uarts=0 \
        random.trust_cpu=on cryptomgr.notests tsc=reliable no_timer_check dummy.numdummies=0";
    let mut config = ConfigFile::new(BootSource {
        kernel_image_path: handed.read(&kernel.image).map_err(at(&kernel.image))?,
        initrd_path: Some(handed.read(&initrd).map_err(at(&initrd))?),
        boot_args: Some(boot_args.to_owned()),
    });
    let uds_path = policy.socket(container.run(), VSOCK);
    config.vsock = Some(Vsock { guest_cid: 3, uds_path, vsock_id: None });
    config.entropy = Some(Entropy::default());
    let output_path = Some(handed.append(&console).map_err(at(&console))?);
    // The agent is asked, not the keyboard; and probing one takes a distribution's kernel long.
    config.console = Some(Console { output_path, serial: false, keyboard: false });
    Ok(config)
}

/// An address in text.
fn mac(attachment: &Attachment) -> String {
    attachment.mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The interface of a restored machine.
pub fn interface_override(attachment: &Attachment) -> NetworkOverride {
    NetworkOverride {
        iface_id: "eth0".to_owned(),
        host_dev_name: attachment.tap_name.clone(),
        guest_mac: Some(mac(attachment)),
    }
}
