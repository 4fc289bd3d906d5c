//! Loopback and `eth0`, set up over netlink.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use agent_protocol::Network;
use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkDeserializable,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::error::{Context, SetupError};

/// Brings loopback up, and the interface the host has described.
pub fn set_up(network: Option<&Network>) -> Result<(), SetupError> {
    let netlink = Netlink::open().context(|| "netlink".to_owned())?;
    netlink.up(1, None).context(|| "network: lo".to_owned())?;
    let Some(network) = network else { return Ok(()) };
    let index = find(&network.mac)?;
    let mtu = (network.mtu > 0).then_some(network.mtu);
    netlink.up(index, mtu).context(|| "network: eth0".to_owned())?;
    let (address, prefix) = network.address;
    netlink
        .add_address(index, address.into(), prefix)
        .context(|| format!("network: address {}/{prefix}", Ipv4Addr::from(address)))?;
    if let Some(gateway) = network.gateway {
        netlink
            .add_default_route(index, gateway.into())
            .context(|| format!("network: gateway {}", Ipv4Addr::from(gateway)))?;
    }
    Ok(())
}

/// Gives the machine's interface, which is down or may go down, this MAC address.
pub fn rename(mac: [u8; 6]) -> Result<(), SetupError> {
    let failed = || "network: MAC address".to_owned();
    let netlink = Netlink::open().context(|| "netlink".to_owned())?;
    let index = hardware().context(failed)?;
    netlink.down(index).context(failed)?;
    netlink.set_mac(index, mac).context(failed)
}

/// Gives the machine's interface the MAC address, address and route of `after`. What belonged to
/// the address before is gone.
pub fn replace(before: Option<&Network>, after: &Network) -> Result<(), SetupError> {
    // While it is down the interface has no routes.
    rename(after.mac)?;
    if let Some(Network { address: (address, prefix), .. }) = before {
        let netlink = Netlink::open().context(|| "netlink".to_owned())?;
        let index = hardware().context(|| "network: eth0".to_owned())?;
        // A program may have removed it.
        let _ = netlink.remove_address(index, (*address).into(), *prefix);
    }
    set_up(Some(after))
}

/// Index of the one interface that is not the kernel's own.
fn hardware() -> io::Result<u32> {
    let entries = std::fs::read_dir("/sys/class/net")?;
    let mut found = entries.flatten().filter(|entry| entry.path().join("device").exists());
    let entry = found.next().ok_or(io::ErrorKind::NotFound)?;
    let index = std::fs::read_to_string(entry.path().join("ifindex"))?;
    index.trim().parse().map_err(io::Error::other)
}

/// Index of the interface with this MAC address; sysfs says it in text.
fn find(mac: &[u8; 6]) -> Result<u32, SetupError> {
    let wanted = mac.map(|byte| format!("{byte:02x}")).join(":");
    // A driver that is a module may still be at it.
    for _ in 0..1000 {
        let entries =
            std::fs::read_dir("/sys/class/net").context(|| "/sys/class/net".to_owned())?;
        for entry in entries.flatten() {
            let read = |name| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
            if read("address").trim() == wanted
                && let Ok(index) = read("ifindex").trim().parse()
            {
                return Ok(index);
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    Err(SetupError::setup(format!("network: there is no interface with MAC address {wanted}")))
}

/// One kind of message, by its number. The crate's type for all kinds brings the writing and the
/// reading of each of them into a program that is copied into every VM's memory.
struct Request<M> {
    kind: u16,
    message: M,
}

impl<M: Emitable> NetlinkSerializable for Request<M> {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.message.buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        self.message.emit(buffer);
    }
}

/// What a reply holds beside its status: nothing that is wanted.
struct Unread;

impl NetlinkDeserializable for Unread {
    type Error = std::convert::Infallible;

    fn deserialize(_: &NetlinkHeader, _: &[u8]) -> Result<Unread, Self::Error> {
        Ok(Unread)
    }
}

struct Netlink {
    socket: Socket,
}

impl Netlink {
    fn open() -> io::Result<Netlink> {
        let socket = Socket::new(NETLINK_ROUTE)?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Netlink { socket })
    }

    fn up(&self, index: u32, mtu: Option<u16>) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        link.attributes.extend(mtu.map(|mtu| LinkAttribute::Mtu(mtu.into())));
        self.ask(libc::RTM_SETLINK, link, 0)
    }

    fn down(&self, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.change_mask = LinkFlags::Up;
        self.ask(libc::RTM_SETLINK, link, 0)
    }

    fn set_mac(&self, index: u32, mac: [u8; 6]) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes.push(LinkAttribute::Address(mac.to_vec()));
        self.ask(libc::RTM_SETLINK, link, 0)
    }

    fn add_address(&self, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let message = address_message(index, address, prefix);
        self.ask(libc::RTM_NEWADDR, message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn remove_address(&self, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        self.ask(libc::RTM_DELADDR, address_message(index, address, prefix), 0)
    }

    fn add_default_route(&self, index: u32, gateway: Ipv4Addr) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.table = libc::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Boot;
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        message.attributes =
            vec![RouteAttribute::Gateway(RouteAddress::Inet(gateway)), RouteAttribute::Oif(index)];
        self.ask(libc::RTM_NEWROUTE, message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Sends one request and waits for its acknowledgement.
    fn ask<M: Emitable>(&self, kind: u16, message: M, flags: u16) -> io::Result<()> {
        let payload = NetlinkPayload::InnerMessage(Request { kind, message });
        let mut request = NetlinkMessage::new(NetlinkHeader::default(), payload);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let (reply, _) = self.socket.recv_from_full()?;
        let reply = NetlinkMessage::<Unread>::deserialize(&reply)
            .map_err(|error| io::Error::other(error.to_string()))?;
        match reply.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            _ => Ok(()),
        }
    }
}

fn address_message(index: u32, address: Ipv4Addr, prefix: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.index = index;
    message.header.prefix_len = prefix;
    let ip = IpAddr::V4(address);
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    message
}
