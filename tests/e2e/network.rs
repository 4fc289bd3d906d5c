//! VMs on the default network, and without one.

use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;

use e2e::user::User;
use e2e::{Running, Session};

const BASE: &str = "localhost/base";

/// Starts a guest that serves, and returns its address once it listens.
fn server(session: &Session) -> (Running, String) {
    let script = "ip -4 -o address show eth0 | awk '{print $4}' | cut -d/ -f1; \
        mkdir /www; echo from the other machine > /www/index.html; httpd -h /www -p 80; echo ready; \
        while :; do sleep 1; done";
    let mut server = session.start([BASE, "sh", "-c", script]);
    server.wait_for("ready\n");
    let address = server.stdout().lines().next().unwrap().to_owned();
    (server, address)
}

fn stop(server: Running) {
    server.signal(nix::sys::signal::Signal::SIGKILL);
    drop(server.finish());
}

#[test]
fn two_machines_reach_each_other_and_the_host_reaches_them() {
    let session = Session::prepared();
    let (server, address) = server(&session);
    let script =
        format!("ping -c 2 -W 5 {address} | grep -c 'bytes from'; wget -qO- http://{address}/");
    session.run([BASE, "sh", "-c", &script]).exits(0).prints("2\nfrom the other machine\n");
    let fetched = Command::new("busybox")
        .args(["wget", "-qO-", &format!("http://{address}/")])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&fetched.stdout), "from the other machine\n");
    stop(server);
}

#[test]
fn a_guest_has_the_address_gateway_and_names_of_a_container() {
    let session = Session::prepared();
    let script = "ip route | awk '/default/ {print \"via\", $3}'; cat /sys/class/net/eth0/mtu; \
        grep -c localhost /etc/hosts; grep box /etc/hosts | wc -l; ping -c 1 -W 5 $(ip route | awk '/default/ {print $3}') >/dev/null && echo gateway answers; cat /etc/resolv.conf";
    let done = session
        .run([
            "--hostname",
            "box",
            "--dns",
            "10.9.8.7",
            "--add-host",
            "peer:10.1.1.1",
            BASE,
            "sh",
            "-c",
            script,
        ])
        .exits(0);
    let out = done.out();
    let lines: Vec<_> = out.lines().collect();
    assert!(lines[0].starts_with("via ") && lines[0].ends_with(".0.1"), "{out}");
    assert!(out.contains("gateway answers\n") && out.contains("nameserver 10.9.8.7\n"), "{out}");
}

#[test]
fn names_are_resolved_by_the_server_given() {
    let session = Session::prepared();
    // A VM's start makes the bridge, whose address the name server then listens on.
    let gateway =
        session.run([BASE, "sh", "-c", "ip route | awk '/default/ {print $3}'"]).exits(0).out();
    let gateway: Ipv4Addr = gateway.trim().parse().unwrap();
    let socket = UdpSocket::bind((gateway, 53)).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&answer(&buffer[..length]), from);
        }
    });
    let done =
        session.run(["--dns", &gateway.to_string(), BASE, "nslookup", "-type=a", "machine.test"]);
    let out = done.exits(0).out();
    assert!(out.contains("192.0.2.7"), "{out}");
}

/// A DNS reply that says 192.0.2.7 to any question (RFC 1035, 4.1).
fn answer(question: &[u8]) -> Vec<u8> {
    let mut reply = question.to_vec();
    // A response without error, with one answer and nothing else.
    reply[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    // The name of the question, type A, class IN, 60 seconds, four bytes.
    reply.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
    reply
}

#[test]
fn without_a_network_there_is_loopback_only() {
    let session = Session::prepared();
    let script = "ls /sys/class/net; ping -c 1 -W 2 127.0.0.1 > /dev/null && echo loopback";
    session.run(["--network", "none", BASE, "sh", "-c", script]).exits(0).prints("lo\nloopback\n");
    session.run(["--network", "no-such", BASE, "true"]).exits(125).complains(&["no-such"]);
}

#[test]
fn without_a_network_no_privilege_is_needed() {
    let user = User::with_kvm();
    // Nobody has given this user a cgroup of its own.
    let user = |arguments: &[&str]| {
        Running::start(user.command(arguments).env("VMRUN_UNCONFINED", "cgroup")).finish()
    };
    user(&["run", "--rm", "--network", "none", BASE, "id", "-u"]).exits(0).prints("0\n");
    // With one, what is missing is said.
    user(&["run", "--rm", BASE, "true"]).exits(125).complains(&["root", "--network none"]);
}

#[test]
fn nothing_of_a_machine_stays_on_the_network() {
    let session = Session::prepared();
    let (server, address) = server(&session);
    let interfaces = || {
        let output =
            Command::new("ip").args(["-o", "link", "show", "type", "tun"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).lines().count()
    };
    let before = interfaces();
    assert!(before >= 1);
    // Killed, not asked: the address is free for the next one.
    stop(server);
    let since = std::time::Instant::now();
    while interfaces() >= before {
        assert!(since.elapsed().as_secs() < 60, "{address} is still held");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}
