//! Against the kernel, each test in a network namespace of its own.

#![allow(unsafe_code, reason = "makes one thread of a test another user")]

use std::net::Ipv4Addr;
use std::process::Command;

use super::*;

/// Runs `test` in a thread with a fresh network namespace; says so and passes where none may be made.
fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let done = std::thread::spawn(move || {
        if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
            eprintln!("skipped: cannot make a network namespace: {error}");
            return;
        }
        if !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("skipped: no /dev/net/tun");
            return;
        }
        test();
    });
    done.join().unwrap();
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn addresses_are_distinct_and_free_again_when_the_descriptor_closes() {
    in_a_namespace(|| {
        let first = attach(None).unwrap();
        let second = attach(None).unwrap();
        assert_eq!(first.gateway, Ipv4Addr::new(172, 20, 0, 1));
        assert_eq!(first.address, Ipv4Addr::new(172, 20, 0, 2));
        assert_eq!(second.address, Ipv4Addr::new(172, 20, 0, 3));
        assert_ne!(first.mac, second.mac);
        let links = output("ip", &["link", "show", "master", BRIDGE]);
        assert!(links.contains(&first.tap_name) && links.contains(&second.tap_name), "{links}");

        drop(first);
        assert_eq!(attach(None).unwrap().address, Ipv4Addr::new(172, 20, 0, 2));
        let taken = attach(Some(second.address)).unwrap_err();
        assert!(matches!(taken, NetworkError::InUse(_)), "{taken}");
        let outside = attach(Some(Ipv4Addr::new(10, 0, 0, 1))).unwrap_err();
        assert!(matches!(outside, NetworkError::NotInSubnet { .. }), "{outside}");
    });
}

#[test]
fn the_bridge_keeps_out_of_subnets_the_host_routes() {
    in_a_namespace(|| {
        output("ip", &["link", "set", "lo", "up"]);
        output("ip", &["address", "add", "172.20.9.1/24", "dev", "lo"]);
        assert_eq!(attach(None).unwrap().gateway, Ipv4Addr::new(172, 21, 0, 1));
    });
}

#[test]
fn a_flushed_firewall_is_mended_at_the_next_start() {
    in_a_namespace(|| {
        let _first = attach(None).unwrap();
        let rules = output("nft", &["list", "table", "ip", "vmrun"]);
        for rule in [
            "ip saddr 172.20.0.0/16 oifname != \"vmrun0\" masquerade",
            "iifname \"vmrun0\" ip saddr != 172.20.0.0/16 drop",
            "oifname \"vmrun0\" ct state established,related accept",
            "oifname \"vmrun0\" drop",
        ] {
            assert!(rules.contains(rule), "{rule} is not in {rules}");
        }
        output("nft", &["flush", "ruleset"]);
        assert_eq!(output("nft", &["list", "tables"]), "");
        let _second = attach(None).unwrap();
        assert_eq!(output("nft", &["list", "table", "ip", "vmrun"]), rules);
    });
}

/// docs/hostile.md 28: two commands at once on one network.
#[test]
fn hostile_28_many_at_once_get_one_bridge_and_distinct_addresses() {
    in_a_namespace(|| {
        // Threads made here share this thread's namespace.
        let all: Vec<_> = (0..8).map(|_| std::thread::spawn(|| attach(None).unwrap())).collect();
        let all: Vec<_> = all.into_iter().map(|thread| thread.join().unwrap()).collect();
        let mut addresses: Vec<_> = all.iter().map(|one| one.address).collect();
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 8);
        let text = output("ip", &["-4", "-o", "address", "show", "dev", BRIDGE]);
        assert_eq!(text.lines().count(), 1, "{text}");
    });
}

#[test]
fn without_the_capability_the_error_says_what_to_do() {
    in_a_namespace(|| {
        // Only this thread changes: the raw call, not the process-wide one of the C library.
        // SAFETY: setresuid takes three integers and touches no memory.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(changed, 0);
        let error = attach(None).unwrap_err();
        assert!(matches!(error, NetworkError::NotPermitted), "{error}");
    });
}
