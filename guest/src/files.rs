//! /etc/hosts, /etc/hostname and /etc/resolv.conf of a container.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use agent_protocol::Network;

/// Lines that every hosts file begins with, as other container engines write them.
const LOCAL: &str = "127.0.0.1\tlocalhost\n\
    ::1\tlocalhost ip6-localhost ip6-loopback\n\
    fe00::\tip6-localnet\n\
    ff00::\tip6-mcastprefix\n\
    ff02::1\tip6-allnodes\n\
    ff02::2\tip6-allrouters\n";

/// Contents of /etc/hosts.
pub fn hosts(hostname: &str, network: Option<&Network>) -> String {
    let mut text = LOCAL.to_owned();
    let Some(network) = network else { return text };
    for (name, address) in &network.extra_hosts {
        let _ = writeln!(text, "{address}\t{name}");
    }
    let _ = writeln!(text, "{}\t{hostname}", Ipv4Addr::from(network.address.0));
    text
}

/// Contents of /etc/resolv.conf.
pub fn resolv_conf(network: &Network) -> String {
    let mut text = String::new();
    for server in &network.dns {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !network.dns_search.is_empty() {
        let _ = writeln!(text, "search {}", network.dns_search.join(" "));
    }
    if !network.dns_options.is_empty() {
        let _ = writeln!(text, "options {}", network.dns_options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_say_what_the_request_does() {
        let network = Network {
            mac: [2; 6],
            address: ([172, 20, 0, 2], 16),
            gateway: None,
            mtu: 0,
            dns: vec!["10.0.0.1".to_owned(), "10.0.0.2".to_owned()],
            dns_search: vec!["a.test".to_owned(), "b.test".to_owned()],
            dns_options: vec!["ndots:2".to_owned()],
            extra_hosts: vec![("peer".to_owned(), "10.1.1.1".to_owned())],
        };
        let resolv =
            "nameserver 10.0.0.1\nnameserver 10.0.0.2\nsearch a.test b.test\noptions ndots:2\n";
        assert_eq!(resolv_conf(&network), resolv);
        let hosts = hosts("box", Some(&network));
        assert!(hosts.ends_with("10.1.1.1\tpeer\n172.20.0.2\tbox\n"), "{hosts}");
        assert!(hosts.starts_with("127.0.0.1\tlocalhost\n"));
    }
}
