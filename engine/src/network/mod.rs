//! The default network: one bridge per host, a TAP and an address per VM, NAT by nftables.
//!
//! Nothing about it is kept in files. An address belongs to the VM whose TAP interface bears its
//! host part in the name; creating an interface is atomic and refused where the name exists, and
//! the kernel removes it with the VMM's descriptor. So an address cannot be given twice, and is
//! free again however the VM ended. The bridge and the rules stay for the next VM.

mod bridge;
mod dns;
mod nat;
mod subnet;
mod tap;

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

pub use dns::{Dns, of_host as dns_of_host};
pub use subnet::Subnet;

use bridge::Bridge;

/// Name of the bridge.
pub const BRIDGE: &str = "vmrun0";

/// Why a VM could not be given a network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The caller may not make interfaces.
    #[error("the default network needs root; run as root, or use --network none")]
    NotPermitted,
    /// There is no TUN driver.
    #[error("/dev/net/tun: {0}; load the tun module (modprobe tun), or use --network none")]
    NoTun(io::Error),
    /// The TAP interface could not be made.
    #[error(
        "cannot create TAP interface {name}: {error}; load the tun module (modprobe tun), or use --network none"
    )]
    Tap {
        /// Its name.
        name: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The kernel refused a change of links, addresses or routes.
    #[error("cannot set up bridge {BRIDGE}: {0}")]
    Netlink(#[from] rtnetlink::Error),
    /// The netlink socket failed.
    #[error("cannot talk to the kernel's network configuration: {0}")]
    Socket(io::Error),
    /// Somebody removed the bridge while we set it up.
    #[error("bridge {BRIDGE} vanished while it was set up; try again")]
    Vanished,
    /// Every private subnet we would use is routed elsewhere.
    #[error(
        "no free private subnet for bridge {BRIDGE}; give it an address yourself (ip address add)"
    )]
    NoFreeSubnet,
    /// All addresses are taken.
    #[error("no free address left in {0}")]
    Exhausted(Subnet),
    /// The address asked for is not one a guest may have.
    #[error("address {address} is not a guest address of {subnet}")]
    NotInSubnet {
        /// The address.
        address: Ipv4Addr,
        /// The bridge's subnet.
        subnet: Subnet,
    },
    /// The address asked for is taken.
    #[error("address {0} is in use by another VM")]
    InUse(Ipv4Addr),
    /// There is no `nft` program.
    #[error("cannot run nft: {0}; install nftables, or use --network none")]
    NftMissing(io::Error),
    /// The rules were refused.
    #[error("cannot install NAT rules: {0}")]
    Nft(String),
    /// Packets would not be forwarded.
    #[error("cannot enable IPv4 forwarding: {0}")]
    Forwarding(io::Error),
}

/// One VM's place on the network. The TAP interface, and with it the address, is released when the
/// last copy of its descriptor is closed.
#[derive(Debug)]
pub struct Attachment {
    /// Descriptor of the TAP interface, to be handed to the VMM.
    pub tap: OwnedFd,
    /// The interface's name on the host.
    pub tap_name: String,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The guest's IPv4 address.
    pub address: Ipv4Addr,
    /// Prefix length of its subnet.
    pub prefix: u8,
    /// Its default gateway.
    pub gateway: Ipv4Addr,
    /// MTU in bytes.
    pub mtu: u16,
}

/// Gives a VM an address, `wanted` where that is given, and a TAP interface on the bridge, making
/// the bridge and the NAT rules where they are missing. Needs `CAP_NET_ADMIN`.
pub fn attach(wanted: Option<Ipv4Addr>) -> Result<Attachment, NetworkError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(NetworkError::Socket)?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Socket)?;
        let connection = tokio::spawn(connection);
        let result = attach_over(&handle, wanted).await;
        connection.abort();
        result.map_err(told_as_permission)
    })
}

async fn attach_over(
    handle: &rtnetlink::Handle,
    wanted: Option<Ipv4Addr>,
) -> Result<Attachment, NetworkError> {
    let bridge = Bridge::ensure(handle).await?;
    // First what tells a caller without privilege so: the bridge may be there from another's run.
    let (address, tap_name, tap) = claim(&bridge.subnet, wanted)?;
    nat::ensure(&bridge.subnet)?;
    enable_forwarding().map_err(NetworkError::Forwarding)?;
    bridge.attach(handle, &tap_name).await?;
    Ok(Attachment {
        tap,
        tap_name,
        mac: subnet::mac_of(address),
        address,
        prefix: bridge.subnet.prefix(),
        gateway: bridge.gateway,
        mtu: bridge.mtu,
    })
}

/// Takes the address wanted, or the lowest free one, by making its interface.
fn claim(
    subnet: &Subnet,
    wanted: Option<Ipv4Addr>,
) -> Result<(Ipv4Addr, String, OwnedFd), NetworkError> {
    let parts = match wanted {
        Some(address) => {
            let part = subnet
                .host_part(address)
                .ok_or(NetworkError::NotInSubnet { address, subnet: *subnet })?;
            part..=part
        }
        None => 2..=u32::MAX,
    };
    for part in parts {
        let Some(address) = subnet.host(part) else { break };
        let name = format!("vmtap{part:x}");
        match tap::create(&name) {
            Ok(tap) => return Ok((address, name, tap)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(NetworkError::NoTun(error));
            }
            Err(error) => return Err(NetworkError::Tap { name, error }),
        }
    }
    Err(wanted.map_or(NetworkError::Exhausted(*subnet), NetworkError::InUse))
}

fn enable_forwarding() -> io::Result<()> {
    const SWITCH: &str = "/proc/sys/net/ipv4/ip_forward";
    if std::fs::read(SWITCH)?.first() == Some(&b'1') {
        return Ok(());
    }
    std::fs::write(SWITCH, "1")
}

/// However the kernel's refusal reached us, a user is told the one thing that helps.
fn told_as_permission(error: NetworkError) -> NetworkError {
    let refused = match &error {
        NetworkError::Netlink(rtnetlink::Error::NetlinkError(message)) => {
            message.raw_code() == -libc::EPERM
        }
        NetworkError::NoTun(error)
        | NetworkError::Tap { error, .. }
        | NetworkError::Forwarding(error) => error.kind() == io::ErrorKind::PermissionDenied,
        _ => false,
    };
    if refused { NetworkError::NotPermitted } else { error }
}

#[cfg(test)]
mod tests;
