//! The name servers a guest gets when none are asked for.

use std::net::Ipv4Addr;
use std::path::Path;

use resolv_conf::ScopedIp;
use serde::{Deserialize, Serialize};

/// Contents for a guest's resolv.conf.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Name servers, in order.
    pub servers: Vec<String>,
    /// Search domains.
    pub search: Vec<String>,
    /// Options, as in resolv.conf.
    pub options: Vec<String>,
}

/// What to ask when the host itself names no server that a guest could reach; what other container
/// engines use too.
const PUBLIC: [Ipv4Addr; 2] = [Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(8, 8, 4, 4)];

/// The host's configuration as far as it holds in a guest: a server on the host's loopback is out
/// of reach there. systemd-resolved, which is such a server, keeps the list of the real ones aside.
pub fn of_host() -> Dns {
    let files = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
    first_usable(&files.map(Path::new))
}

fn first_usable(files: &[&Path]) -> Dns {
    let mut first = None;
    for file in files {
        let Some(dns) = std::fs::read(file).ok().and_then(|text| parse(&text)) else { continue };
        if !dns.servers.is_empty() {
            return dns;
        }
        first.get_or_insert(dns);
    }
    let servers = PUBLIC.iter().map(Ipv4Addr::to_string).collect();
    Dns { servers, ..first.unwrap_or_default() }
}

fn parse(text: &[u8]) -> Option<Dns> {
    let config = resolv_conf::Config::parse(text).ok()?;
    let servers = config
        .nameservers
        .iter()
        .filter_map(|server| match server {
            // Guests have no IPv6 address yet.
            ScopedIp::V4(address) if !address.is_loopback() && !address.is_unspecified() => {
                Some(address.to_string())
            }
            _ => None,
        })
        .collect();
    let search = config.get_last_search_or_domain().cloned().collect();
    // The parser knows more than these; they are the ones that change what a program sees.
    let mut options = Vec::new();
    if config.ndots != 1 {
        options.push(format!("ndots:{}", config.ndots));
    }
    if config.use_vc {
        options.push("use-vc".to_owned());
    }
    if config.edns0 {
        options.push("edns0".to_owned());
    }
    Some(Dns { servers, search, options })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_out_of_a_guests_reach_are_left_out() {
        let text =
            b"nameserver 127.0.0.53\nnameserver 10.1.2.3\nnameserver ::1\nnameserver 2001:db8::1\n\
            search corp.example lan\noptions ndots:2 edns0\n";
        let dns = parse(text).unwrap();
        assert_eq!(dns.servers, ["10.1.2.3"]);
        assert_eq!(dns.search, ["corp.example", "lan"]);
        assert_eq!(dns.options, ["ndots:2", "edns0"]);
    }

    #[test]
    fn the_second_file_serves_where_the_first_names_only_loopback() {
        let folder = tempfile::tempdir().unwrap();
        let (stub, real) = (folder.path().join("stub"), folder.path().join("real"));
        std::fs::write(&stub, "nameserver 127.0.0.53\nsearch lan\n").unwrap();
        assert_eq!(first_usable(&[&stub, &real]).servers, ["8.8.8.8", "8.8.4.4"]);
        assert_eq!(first_usable(&[&stub, &real]).search, ["lan"]);
        std::fs::write(&real, "nameserver 10.0.0.2\n").unwrap();
        assert_eq!(first_usable(&[&stub, &real]).servers, ["10.0.0.2"]);
        std::fs::write(&stub, b"nameserver \xff\xff\n").unwrap();
        assert_eq!(first_usable(&[&stub]).servers, ["8.8.8.8", "8.8.4.4"]);
    }
}
