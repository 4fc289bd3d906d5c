//! Several processors that use devices on PCI at once.

use std::process::Command;

use e2e::guest::Tap;

use super::Machine;

/// On each processor one that copies to a drive and compares, and one that asks the host for an answer.
const INIT: &str = r#"$b mount -t tmpfs tmpfs /tmp
$b ifconfig eth0 10.79.0.2 netmask 255.255.255.0
work() {
    i=0
    while :; do
        i=$((i+1))
        $b dd if=/dev/urandom of=/tmp/made$1 bs=4096 count=64 2>/dev/null
        $b dd if=/tmp/made$1 of=/dev/vd$2 bs=4096 seek=$((i % 4 * 64)) oflag=direct 2>/dev/null
        $b dd if=/dev/vd$2 of=/tmp/read$1 bs=4096 skip=$((i % 4 * 64)) count=64 iflag=direct 2>/dev/null
        $b cmp /tmp/made$1 /tmp/read$1 || echo "DIFFERENT on $1"
        $b ping -c 1 -W 20 10.79.0.1 >/tmp/ping$1 || { echo "NO ANSWER on $1"; $b cat /tmp/ping$1; }
        echo "round $i on $1 by $($b awk '{print $39}' /proc/self/stat)"
    done
}
for number in 0 1; do
    name=a; [ $number = 1 ] && name=b
    (
        read self rest </proc/self/stat
        $b taskset -p $((1 << number)) $self >/dev/null
        work $number $name
    ) &
done
while :; do
    $b sleep 1
    echo "interrupts: $($b grep virtio /proc/interrupts | $b awk '{print $1 $2 "+" $3 "=" $NF}' | $b tr '\n' ' ')"
done
"#;

#[test]
fn two_processors_use_drives_and_network_at_once() {
    let tap = Tap::new("pcitap2", Some("10.79.0.1/24"));
    let mut machine = Machine::start(&["--enable-pci"]);
    machine.describe_with(INIT, 2);
    for name in ["first", "second"] {
        machine.put(&format!("/drives/{name}"), &machine.drive(name));
    }
    machine.put("/network-interfaces/eth0", &super::interface(&tap, "eth0"));
    machine.run();
    machine.wait_for("round 1 on 0");
    // From the other side too.
    let pings = Command::new("ping")
        .args(["-c", "20", "-i", "0.1", "-W", "20", "10.79.0.2"])
        .output()
        .unwrap();
    assert!(pings.status.success(), "{}", String::from_utf8_lossy(&pings.stdout));
    for text in ["round 5 on 0 by 0", "round 5 on 1 by 1"] {
        machine.wait_for(text);
    }
    let said = machine.vmm.process.stdout();
    assert!(!said.contains("DIFFERENT") && !said.contains("NO ANSWER"), "{said}");
    // Each processor has had messages of its own.
    let mut lines = said.lines().filter_map(|line| line.trim().strip_prefix("interrupts: "));
    let counts = lines.next_back().unwrap_or_else(|| panic!("no interrupts: {said}"));
    let of = |processor: usize| -> u64 {
        let each = counts.split(' ').filter_map(|entry| entry.split_once(':')?.1.split_once('='));
        each.filter_map(|(both, _)| both.split('+').nth(processor)?.parse::<u64>().ok()).sum()
    };
    assert!(of(0) > 0 && of(1) > 0, "{counts}");
    machine.end();
}
