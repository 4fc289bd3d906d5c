//! Guests that attack: what is left of their monitor, and of a neighbour that was there before.

mod output;

use e2e::api::Vmm;
use e2e::attacker::Attack;
use e2e::{Running, Session, guest};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const BASE: &str = "localhost/base";

/// A machine that works all the time, with its disk, its memory and its network.
struct Neighbour(Running);

impl Neighbour {
    const SCRIPT: &str = r#"gateway=$(ip route | awk '/default/ {print $3}')
seq 1 20000 >/first; sum=$(md5sum </first); i=0
while :; do
    i=$((i+1)); cp /first /copy; sync; echo 1 >/proc/sys/vm/drop_caches 2>/dev/null
    [ "$(md5sum </copy)" = "$sum" ] || echo WRONG DATA
    ping -c 1 -W 60 $gateway >/dev/null || echo NO ANSWER
    echo "turn $i"; sleep 0.1
done"#;

    fn start() -> Neighbour {
        let session = Session::prepared();
        let mut run = session.start(["-m", "128m", BASE, "sh", "-c", Self::SCRIPT]);
        run.wait_for("turn 1\n");
        Neighbour(run)
    }

    /// It has gone on, and all was right.
    fn check(&mut self) {
        let turns = self.0.stdout().matches("turn ").count();
        self.0.wait_for(&format!("turn {}\n", turns + 2));
        let said = self.0.stdout();
        assert!(!said.contains("WRONG") && !said.contains("NO ANSWER"), "{said}");
    }

    fn end(self) {
        self.0.signal(Signal::SIGKILL);
        self.0.finish();
    }
}

/// Numbers of lines `device KIND: CHAINS chains, USED used, BROKEN times broken`.
fn devices(said: &str) -> Vec<[u64; 4]> {
    let lines = said.lines().filter(|line| line.starts_with("device ") && line.contains("chains"));
    let numbers = lines.map(|line| {
        let words = line.split(|letter: char| !letter.is_ascii_digit());
        let numbers: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
        numbers.try_into().unwrap_or_else(|_| panic!("{line}"))
    });
    numbers.collect()
}

/// docs/hostile.md 9: garbage in every register of every device, and beside them.
#[test]
fn hostile_9_registers_are_written_with_garbage() {
    let mut neighbour = Neighbour::start();
    for pci in [false, true] {
        let mut attack = Attack::start("registers", "attack=registers seed=1 rounds=30000", pci);
        let said = attack.wait();
        assert!(said.contains("10 devices"), "{said}");
        attack.check();
        neighbour.check();
        attack.end(Some(Signal::SIGTERM), 143);
    }
    neighbour.end();
}

/// docs/hostile.md 1 to 8, and 10 to 13: drivers that break every rule, of every device.
#[test]
fn hostile_1_to_8_and_10_to_13_drivers_lie_about_everything() {
    let mut neighbour = Neighbour::start();
    for pci in [false, true] {
        let mut attack = Attack::start("queues", "attack=queues seed=7 rounds=48", pci);
        let said = attack.wait();
        attack.check();
        let devices = devices(&said);
        let mut kinds: Vec<_> = devices.iter().map(|numbers| numbers[0]).collect();
        kinds.sort_unstable();
        // Network, three disks, console, entropy, balloon, socket, memory, persistent memory.
        assert_eq!(kinds, [1, 2, 2, 2, 3, 4, 5, 19, 24, 27], "{said}");
        for [_, chains, used, broken] in devices {
            // The attack has got in: requests were carried out, and others refused.
            assert!(chains > 50 && used > 5 && broken > 5, "{said}");
        }
        neighbour.check();
        attack.end(Some(Signal::SIGTERM), 143);
    }
    neighbour.end();
}

/// The number before this word.
fn number(said: &str, word: &str) -> u64 {
    let before = said.split(word).next().and_then(|before| before.trim_end().rsplit(' ').next());
    let line = before.and_then(|text| text.rsplit('\n').next());
    line.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no {word}: {said}"))
}

/// docs/hostile.md 9: BARs over memory, interrupt controllers, each other and nothing, and back.
#[test]
fn hostile_9_bars_are_moved_onto_everything() {
    let mut attack = Attack::start("bars", "attack=bars seed=3", true);
    let said = attack.wait();
    assert!(said.contains("10 of 10 devices serve"), "{said}");
    assert!(number(&said, "moves") > 200, "{said}");
    attack.check();
    attack.end(Some(Signal::SIGTERM), 143);
}

/// docs/hostile.md 6: rings, tables and requests that another processor writes while devices are at
/// them; and 7: notifications from all processors, as long as it takes to see what it costs others.
#[test]
fn hostile_6_and_7_two_processors_attack_at_once() {
    let mut neighbour = Neighbour::start();
    for pci in [false, true] {
        let orders = "attack=together seed=5 rounds=12 second";
        let mut attack = Attack::start("together", orders, pci);
        let said = attack.wait();
        attack.check();
        let devices = devices(&said);
        let mut kinds: Vec<_> = devices.iter().map(|numbers| numbers[0]).collect();
        kinds.sort_unstable();
        // All but the balloon.
        assert_eq!(kinds, [1, 2, 2, 2, 3, 4, 19, 24, 27], "{said}");
        for [_, chains, used, broken] in devices {
            // The attack has got in, beside what was carried out.
            assert!(chains > 10 && used > 3 && broken > 0, "{said}");
        }
        assert!(number(&said, "writes beside") > 1000, "{said}");
        neighbour.check();
        attack.end(Some(Signal::SIGTERM), 143);
    }

    let orders = "attack=storm seed=1 rounds=200000000 second";
    let mut attack = Attack::start("storms", orders, false);
    attack.vmm.process.wait_for("two processors notify\n");
    // It goes on and gets no more than its share; the API has its turn in that, the neighbour beside.
    let mut before = attack.processor_time();
    for _ in 0..2 {
        neighbour.check();
        attack.check();
        let now = attack.processor_time();
        assert!(now > before, "{now} us");
        before = now;
    }
    assert!(!attack.vmm.process.stdout().contains("attack over"));
    attack.end(Some(Signal::SIGTERM), 143);
    neighbour.end();
}

/// docs/hostile.md 7: notifications as fast as a processor makes them; 11 and 12: floods of frames and
/// connections. While they last, not only after.
#[test]
fn hostile_7_11_12_storms_and_floods_hold_nobody_up() {
    let mut neighbour = Neighbour::start();
    for (name, orders) in [
        ("storm", "attack=storm seed=1 rounds=60000"),
        ("flood", "attack=flood seed=1 rounds=3000"),
    ] {
        let mut attack = Attack::start(name, orders, false);
        // A host's program that takes connections, and never reads.
        let listener = std::os::unix::net::UnixListener::bind(attack.root().join("vsock_5000"));
        let path = attack.root().join("vsock_5000");
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .unwrap();
        attack.check();
        neighbour.check();
        attack.wait();
        attack.check();
        neighbour.check();
        attack.end(Some(Signal::SIGTERM), 143);
        drop(listener);
    }
    neighbour.end();
}

/// docs/hostile.md 14: ports, model-specific registers and the firmware's tables; then every way to end.
#[test]
fn hostile_14_ports_and_processor_registers_are_hammered() {
    let mut neighbour = Neighbour::start();
    for (name, orders) in [
        ("ports", "attack=ports seed=1"),
        ("msrs", "attack=msrs seed=1 rounds=3000"),
        ("tables", "attack=tables seed=1"),
        // Interrupts off, for ever: without a step, and without a pause.
        ("halt", "attack=halt"),
        ("spin", "attack=spin"),
    ] {
        let mut attack = Attack::start(name, orders, false);
        let said = attack.wait();
        match name {
            // Most registers are none, and what touches one is told so; then all of the tables.
            "msrs" => assert!(number(&said, "faults") > 1000, "{said}"),
            "tables" => assert_eq!(number(&said, "words of tables"), 16384, "{said}"),
            _ => {}
        }
        attack.check();
        neighbour.check();
        attack.end(Some(Signal::SIGTERM), 143);
    }
    for (name, status) in [("triple", 11), ("reset", 0), ("off", 0)] {
        Attack::start(name, &format!("attack={name}"), false).end(None, status);
    }
    neighbour.check();
    neighbour.end();
}

/// docs/hostile.md 13: a balloon as large as the guest.
#[test]
fn hostile_13_a_balloon_takes_all_of_the_memory() {
    let folder = tempfile::tempdir().unwrap();
    let script = "i=0; while :; do i=$((i+1)); echo \"turn $i\"; $b sleep 0.1; done\n";
    let initrd = guest::initramfs(folder.path(), script);
    let mut vmm = Vmm::start(&folder.path().join("api"), &[]);
    vmm.done("PUT", "/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 128 }));
    vmm.done(
        "PUT",
        "/boot-source",
        &json!({
            "kernel_image_path": guest::kernel(), "initrd_path": initrd,
            // Out of memory is not the end, but what a guest is in for the rest of the test.
            "boot_args": "console=ttyS0 reboot=k panic=0 quiet",
        }),
    );
    vmm.done("PUT", "/balloon", &json!({ "amount_mib": 0, "deflate_on_oom": false }));
    vmm.done("PUT", "/actions", &json!({ "action_type": "InstanceStart" }));
    vmm.process.wait_for("turn 2");
    let resident = || {
        let path = format!("/proc/{}/status", vmm.process.pid());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before = resident();
    vmm.refused("PATCH", "/balloon", r#"{"amount_mib": 129}"#, "higher than memory size");
    vmm.done("PATCH", "/balloon", &json!({ "amount_mib": 128 }));
    // The guest gives what it can, and it is the host's again.
    let since = std::time::Instant::now();
    while resident() >= before {
        assert!(since.elapsed().as_secs() < 100, "{} KiB of {before}", resident());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(vmm.told("/")["state"], json!("Running"));
    vmm.done("PATCH", "/balloon", &json!({ "amount_mib": 0 }));
    vmm.done("PATCH", "/vm", &json!({ "state": "Paused" }));
    assert_ne!(vmm.told("/balloon"), Value::Null);
    vmm.process.signal(Signal::SIGTERM);
    vmm.process.finish().exits(143);
}

/// A fork bomb, and a disk that is filled, in containers that do not know where they are.
#[test]
fn programs_that_take_all_they_can_get_take_their_own_machines() {
    let mut neighbour = Neighbour::start();
    let session = Session::prepared();
    let name = format!("bomb-{}", std::process::id());
    let bomb = "echo lit; bomb() { bomb | bomb & }; bomb; while :; do sleep 1; done";
    let options = ["--name", &name, "-m", "128m", "--network", "none", BASE, "sh", "-c", bomb];
    let mut run = session.start(options);
    run.wait_for("lit\n");
    neighbour.check();
    neighbour.check();
    run.signal(Signal::SIGKILL);
    run.finish();

    let fill = "dd if=/dev/zero of=/fill bs=64k 2>&1 | grep -c 'No space'; \
        rm /fill; echo some >/some && cat /some";
    let full = ["--storage-opt", "size=64m", "--network", "none", BASE, "sh", "-c", fill];
    session.run(full).exits(0).prints("1\nsome\n");
    neighbour.check();
    neighbour.end();
}
