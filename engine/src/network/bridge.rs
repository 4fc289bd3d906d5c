//! The bridge that guests hang on, made and found over rtnetlink.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, RouteMessageBuilder};

use super::{BRIDGE, NetworkError, Subnet, subnet};

/// The bridge as it is now.
pub struct Bridge {
    index: u32,
    /// Its address and with it the guests' subnet.
    pub subnet: Subnet,
    /// The guests' gateway: the bridge's own address.
    pub gateway: Ipv4Addr,
    /// MTU in bytes of the way out of the host, which guests take over.
    pub mtu: u16,
}

impl Bridge {
    /// Finds the bridge or makes it.
    ///
    /// Safe against any number of callers at once: each step either finds the other's result or is
    /// refused with `EEXIST`, and all would choose the same subnet.
    pub async fn ensure(handle: &Handle) -> Result<Bridge, NetworkError> {
        // Routes first: a subnet that appears between the two looks is then seen as the bridge's.
        let routes = routes(handle).await?;
        let link = match find(handle, BRIDGE).await? {
            Some(link) => link,
            None => {
                let new = LinkBridge::new(BRIDGE).build();
                ignore_exists(handle.link().add(new).execute().await)?;
                // A guest can send router advertisements; the host must not believe them.
                disable_ipv6(BRIDGE);
                find(handle, BRIDGE).await?.ok_or(NetworkError::Vanished)?
            }
        };
        let index = link.header.index;
        let (gateway, prefix) = match address_of(handle, index).await? {
            Some(found) => found,
            None => {
                let routed: Vec<Subnet> = routes.iter().filter_map(destination).collect();
                let chosen = Subnet::choose(&routed).ok_or(NetworkError::NoFreeSubnet)?;
                let gateway = chosen.gateway();
                // A bridge without an address of its own takes that of a port, and changes it
                // when that guest ends: the others' ARP caches would be wrong.
                let fixed = LinkUnspec::new_with_index(index)
                    .address(subnet::mac_of(gateway).to_vec())
                    .build();
                handle.link().set(fixed).execute().await?;
                let request = handle.address().add(index, gateway.into(), chosen.prefix());
                ignore_exists(request.execute().await)?;
                (gateway, chosen.prefix())
            }
        };
        if !link.header.flags.contains(LinkFlags::Up) {
            let up = LinkUnspec::new_with_index(index).up().build();
            handle.link().set(up).execute().await?;
        }
        let mtu = outgoing_mtu(handle, &routes).await?;
        Ok(Bridge { index, subnet: Subnet::containing(gateway, prefix), gateway, mtu })
    }

    /// Hangs the interface `name` on the bridge and brings it up.
    pub async fn attach(&self, handle: &Handle, name: &str) -> Result<(), NetworkError> {
        disable_ipv6(name);
        let port = LinkUnspec::new_with_name(name)
            .controller(self.index)
            .mtu(self.mtu.into())
            .up()
            .build();
        handle.link().set(port).execute().await?;
        Ok(())
    }
}

/// Keeps the kernel from giving an interface an IPv6 address and from hearing advertisements on it.
/// Where the host has no IPv6 there is nothing to do.
fn disable_ipv6(interface: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    if let Err(error) = std::fs::write(&path, "1") {
        tracing::debug!(path, %error, "cannot disable IPv6");
    }
}

fn ignore_exists(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::EEXIST => {
            Ok(())
        }
        other => other,
    }
}

async fn find(handle: &Handle, name: &str) -> Result<Option<LinkMessage>, NetworkError> {
    match handle.link().get().match_name(name.to_owned()).execute().try_next().await {
        Ok(link) => Ok(link),
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::ENODEV => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

async fn address_of(handle: &Handle, index: u32) -> Result<Option<(Ipv4Addr, u8)>, NetworkError> {
    let mut addresses = handle.address().get().set_link_index_filter(index).execute();
    while let Some(message) = addresses.try_next().await? {
        let ip = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(IpAddr::V4(ip)) => Some(*ip),
            _ => None,
        });
        if let Some(ip) = ip {
            return Ok(Some((ip, message.header.prefix_len)));
        }
    }
    Ok(None)
}

async fn routes(handle: &Handle) -> Result<Vec<RouteMessage>, NetworkError> {
    let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
    Ok(handle.route().get(all).execute().try_collect().await?)
}

fn destination(route: &RouteMessage) -> Option<Subnet> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => {
            Some(Subnet::containing(*address, route.header.destination_prefix_length))
        }
        _ => None,
    })
}

/// MTU of the interface that the host's default route leaves by: a guest that sent larger packets
/// would see connections hang. Ethernet's 1500 where there is none, and never more.
async fn outgoing_mtu(handle: &Handle, routes: &[RouteMessage]) -> Result<u16, NetworkError> {
    const ETHERNET: u16 = 1500;
    let out = routes
        .iter()
        .filter(|route| route.header.destination_prefix_length == 0)
        .flat_map(|route| &route.attributes)
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        });
    let Some(index) = out else { return Ok(ETHERNET) };
    let link = handle.link().get().match_index(index).execute().try_next().await?;
    let mtu = link.iter().flat_map(|link| &link.attributes).find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    Ok(mtu.and_then(|mtu| u16::try_from(mtu).ok()).map_or(ETHERNET, |mtu| mtu.min(ETHERNET)))
}
