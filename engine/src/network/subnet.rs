//! IPv4 subnets: which one the bridge takes, and what follows from an address in it.

use std::net::Ipv4Addr;

/// An IPv4 network in CIDR notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    network: u32,
    prefix: u8,
}

impl Subnet {
    /// The subnet that contains `address`. A prefix above 32 is taken as 32.
    pub fn containing(address: Ipv4Addr, prefix: u8) -> Subnet {
        let prefix = prefix.min(32);
        Subnet { network: u32::from(address) & mask(prefix), prefix }
    }

    /// Prefix length in bits.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The network's own address.
    pub fn network(&self) -> Ipv4Addr {
        self.network.into()
    }

    /// The first usable address, which the bridge takes.
    pub fn gateway(&self) -> Ipv4Addr {
        self.network.saturating_add(1).into()
    }

    /// The address with this host part; `None` for the network's own, the gateway's, the broadcast
    /// address and what lies outside.
    pub fn host(&self, part: u32) -> Option<Ipv4Addr> {
        let address = self.network.checked_add(part)?;
        (part > 1 && part < !mask(self.prefix)).then_some(address.into())
    }

    /// The host part of an address a guest may have.
    pub fn host_part(&self, address: Ipv4Addr) -> Option<u32> {
        let part = u32::from(address).checked_sub(self.network)?;
        self.host(part).map(|_| part)
    }

    /// Whether the two share an address.
    pub fn overlaps(&self, other: &Subnet) -> bool {
        let common = mask(self.prefix.min(other.prefix));
        self.network & common == other.network & common
    }

    /// The first of the private subnets we use that is clear of everything the host routes.
    ///
    /// 172.17.0.0/16 to 172.19.0.0/16 are left to other container engines.
    pub fn choose(routed: &[Subnet]) -> Option<Subnet> {
        let private = (20..32u8).map(|second| Ipv4Addr::new(172, second, 0, 0));
        let more = (200..250u8).map(|second| Ipv4Addr::new(10, second, 0, 0));
        private
            .chain(more)
            .map(|address| Subnet::containing(address, 16))
            // A default route overlaps everything and says nothing.
            .find(|own| !routed.iter().any(|route| route.prefix > 0 && route.overlaps(own)))
    }
}

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.network(), self.prefix)
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

/// The MAC address that goes with an IPv4 address: locally administered and the same each time, so
/// that a neighbour's ARP cache stays true when an address is given to the next VM.
pub fn mac_of(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x76, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        let (address, prefix) = text.split_once('/').unwrap();
        Subnet::containing(address.parse().unwrap(), prefix.parse().unwrap())
    }

    #[test]
    fn the_first_subnet_clear_of_the_hosts_routes_is_taken() {
        let chosen = |routes: &[&str]| {
            let routes: Vec<_> = routes.iter().map(|text| subnet(text)).collect();
            Subnet::choose(&routes).map(|subnet| subnet.to_string())
        };
        assert_eq!(chosen(&["0.0.0.0/0"]).unwrap(), "172.20.0.0/16");
        assert_eq!(chosen(&["172.20.5.0/24", "172.21.0.1/32"]).unwrap(), "172.22.0.0/16");
        assert_eq!(chosen(&["172.16.0.0/12"]).unwrap(), "10.200.0.0/16");
        assert_eq!(chosen(&["172.16.0.0/12", "10.0.0.0/8"]), None);
    }

    #[test]
    fn only_addresses_a_guest_may_have_are_hosts() {
        let net = subnet("172.20.0.0/16");
        assert_eq!(net.gateway(), Ipv4Addr::new(172, 20, 0, 1));
        for part in [0, 1, 0xffff, 0x1_0000, u32::MAX] {
            assert_eq!(net.host(part), None, "{part}");
        }
        assert_eq!(net.host(2), Some(Ipv4Addr::new(172, 20, 0, 2)));
        assert_eq!(net.host_part(Ipv4Addr::new(172, 20, 1, 0)), Some(256));
        assert_eq!(net.host_part(Ipv4Addr::new(172, 19, 0, 2)), None);
        assert_eq!(net.host_part(Ipv4Addr::new(172, 21, 0, 2)), None);
    }

    #[test]
    fn a_prefix_of_any_size_is_handled() {
        for prefix in 0..=40 {
            let net = Subnet::containing(Ipv4Addr::new(255, 255, 255, 255), prefix);
            assert!(net.prefix() <= 32);
            assert!(net.overlaps(&net));
            net.host(u32::MAX);
            net.host_part(Ipv4Addr::UNSPECIFIED);
        }
    }
}
