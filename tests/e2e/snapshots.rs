//! Machines that are put into files and taken out again, under load.

mod foreign;
mod stream;
mod userfault;

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use e2e::api::Vmm;
use e2e::guest::{self, Tap};
use serde_json::{Value, json};

use stream::Streams;

/// Copies what it made itself to a disk and compares it, again and again, and keeps a timer.
const LOAD: &str = r#"$b mount -t tmpfs tmpfs /tmp
$b ifconfig eth0 10.78.0.2 netmask 255.255.255.0
[ -x /bin/guest-stream ] && guest-stream 5000 &
(
  i=0
  while :; do
    i=$((i+1))
    $b dd if=/dev/urandom of=/tmp/made bs=4096 count=64 2>/dev/null
    $b dd if=/tmp/made of=/dev/vda bs=4096 seek=$((i % 16 * 64)) conv=fsync 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    $b dd if=/dev/vda of=/tmp/read bs=4096 skip=$((i % 16 * 64)) count=64 2>/dev/null
    if $b cmp /tmp/made /tmp/read; then echo "copy $i"; else echo "DIFFERENT $i"; fi
  done
) &
i=0
while :; do
  i=$((i+1))
  read up rest </proc/uptime
  echo "tick $i $up"
  $b sleep 0.2
done
"#;

/// Waits, and then says a random number; a restored one says another.
const NUMBER: &str = r#"[ -d /sys/bus/acpi/drivers/vmgenid ] && echo "hears of restores"
while :; do
  echo "number=$($b hexdump -n 8 -e '8/1 "%02x"' /dev/urandom)"
  $b sleep 1
done
"#;

struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new(init: &str) -> Files {
        let folder = tempfile::tempdir().unwrap();
        guest::initramfs(folder.path(), init);
        Files { folder }
    }

    /// With the guest's end of streams over vsock.
    fn with_streams(init: &str) -> Files {
        let folder = tempfile::tempdir().unwrap();
        guest::add_stream(&guest::tree(folder.path(), init));
        guest::pack(folder.path());
        Files { folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn start(&self, number: u32) -> Vmm {
        Vmm::start(Path::new(&self.path(&format!("api{number}"))), &["--level", "Info"])
    }

    /// A machine that boots, with these processors and what `more` asks for.
    fn boot(&self, vcpus: u32, more: &[(&str, Value)]) -> Vmm {
        let vmm = self.start(0);
        let config = json!({ "vcpu_count": vcpus, "mem_size_mib": 128, "track_dirty_pages": true });
        vmm.done("PUT", "/machine-config", &config);
        vmm.done("PUT", "/boot-source", &guest::boot_source(Path::new(&self.path("initrd"))));
        for (path, body) in more {
            vmm.done("PUT", path, body);
        }
        vmm.done("PUT", "/actions", &json!({ "action_type": "InstanceStart" }));
        vmm
    }

    fn save(&self, vmm: &Vmm, state: &str, memory: &str, kind: &str) {
        vmm.done("PATCH", "/vm", &json!({ "state": "Paused" }));
        vmm.done(
            "PUT",
            "/snapshot/create",
            &json!({
                "snapshot_path": self.path(state), "mem_file_path": self.path(memory),
                "snapshot_type": kind,
            }),
        );
    }

    fn load(&self, vmm: &Vmm, state: &str, memory: &str) {
        vmm.done(
            "PUT",
            "/snapshot/load",
            &json!({
                "snapshot_path": self.path(state),
                "mem_backend": { "backend_type": "File", "backend_path": self.path(memory) },
                "track_dirty_pages": true, "resume_vm": true,
            }),
        );
    }
}

fn end(vmm: Vmm) -> String {
    vmm.process.signal(nix::sys::signal::Signal::SIGTERM);
    let done = vmm.process.finish().exits(143);
    done.out()
}

/// The last number said after this word, and how often it was said.
fn last(said: &str, word: &str) -> u64 {
    let numbers = said.lines().filter_map(|line| line.trim().strip_prefix(word));
    numbers.filter_map(|rest| rest.split_whitespace().next()?.parse().ok()).next_back().unwrap_or(0)
}

/// Waits until a machine has counted further than this by some.
#[track_caller]
fn goes_on(vmm: &Vmm, word: &str, from: u64) -> u64 {
    let since = Instant::now();
    loop {
        let said = vmm.process.stdout();
        assert!(!said.contains("DIFFERENT"), "{said}");
        let now = last(&said, word);
        if now > from + 1 {
            return now;
        }
        assert!(since.elapsed().as_secs() < 150, "no {word} after {from}: {said}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Copies with checksums, a flood of pings, a stream over vsock and a timer, through fifty snapshots,
/// every other one a difference laid over what there was, each loaded by another process.
#[test]
fn fifty_rounds_under_load() {
    let files = Files::with_streams(LOAD);
    let mut streams = Streams::new(&files.path("vsock"));
    File::create(files.path("disk")).unwrap().set_len(8 << 20).unwrap();
    let tap = Tap::new("snap0", Some("10.78.0.1/24"));
    let mut vmm = files.boot(
        2,
        &[
            (
                "/drives/disk",
                json!({
                    "drive_id": "disk", "is_root_device": false, "path_on_host": files.path("disk"),
                    "cache_type": "Writeback",
                }),
            ),
            (
                "/network-interfaces/eth0",
                json!({
                    "iface_id": "eth0", "host_dev_name": tap.name(), "guest_mac": "02:76:00:00:00:78",
                }),
            ),
            ("/entropy", json!({})),
            ("/vsock", json!({ "guest_cid": 3, "uds_path": files.path("vsock") })),
        ],
    );
    let (mut ticks, mut copies) = (goes_on(&vmm, "tick", 0), goes_on(&vmm, "copy", 0));
    let mut pings = Command::new("ping")
        .args(["-i", "0.02", "-q", "10.78.0.2"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    for round in 1..=50 {
        let kind = if round % 2 == 1 { "Full" } else { "Diff" };
        streams.flow();
        files.save(&vmm, "state", "memory", kind);
        let said = end(vmm);
        let arrived = streams.ended();
        assert!(!said.contains("DIFFERENT"), "round {round}: {said}");
        (ticks, copies) = (ticks.max(last(&said, "tick")), copies.max(last(&said, "copy")));
        vmm = files.start(round);
        files.load(&vmm, "state", "memory");
        // The guest hears that its end is gone, and not before it had sent back what arrived.
        let word = format!("stream {round}: sent back");
        vmm.process.wait_for(&word);
        vmm.process.wait_for(&format!("stream {}: open", round + 1));
        let sent = last(&vmm.process.stdout(), &word);
        assert!(sent >= arrived, "round {round}: {sent} bytes sent, {arrived} arrived");
        ticks = goes_on(&vmm, "tick", ticks);
        if round % 5 == 0 {
            copies = goes_on(&vmm, "copy", copies);
        }
    }
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pings.id() as i32),
        nix::sys::signal::Signal::SIGINT,
    )
    .unwrap();
    let mut report = String::new();
    pings.stdout.take().unwrap().read_to_string(&mut report).unwrap();
    pings.wait().unwrap();
    let words: Vec<_> = report.split_whitespace().collect();
    let received = words.iter().position(|word| word.starts_with("received")).unwrap();
    assert!(words[received - 1].parse::<u32>().unwrap() > 50, "{report}");
    // And still after the last one.
    let ping = Command::new("ping").args(["-c", "2", "-W", "20", "10.78.0.2"]).output().unwrap();
    assert!(ping.status.success(), "{}", String::from_utf8_lossy(&ping.stdout));
    end(vmm);
}

/// A clock that neither jumps nor stands, on every processor.
#[test]
fn a_restored_machine_keeps_time() {
    let files = Files::new(LOAD);
    let vmm = files.boot(4, &[]);
    goes_on(&vmm, "tick", 3);
    files.save(&vmm, "state", "memory", "Full");
    let uptime = |said: &str| -> Vec<f64> {
        let ticks = said.lines().filter_map(|line| line.trim().strip_prefix("tick "));
        ticks.filter_map(|rest| rest.split_whitespace().nth(1)?.parse().ok()).collect()
    };
    let before = end(vmm);
    // Long enough to be seen, had the clock run on.
    std::thread::sleep(std::time::Duration::from_secs(20));
    let vmm = files.start(1);
    files.load(&vmm, "state", "memory");
    let first = last(&before, "tick");
    goes_on(&vmm, "tick", first + 10);
    let after = end(vmm);
    let (before, after) = (uptime(&before), uptime(&after));
    let gap = after[0] - before[before.len() - 1];
    assert!((0.0..15.0).contains(&gap), "{gap} s between {before:?} and {after:?}");
    assert!(after.windows(2).all(|pair| pair[0] <= pair[1]), "{after:?}");
}

/// Differences kept in files of their own, laid over the full one in order, are the last state.
#[test]
fn a_chain_of_differences_is_merged_and_restored() {
    let files = Files::new(LOAD);
    let vmm = files.boot(1, &[]);
    let mut ticks = goes_on(&vmm, "tick", 0);
    files.save(&vmm, "state0", "base", "Full");
    for number in 1..=3 {
        vmm.done("PATCH", "/vm", &json!({ "state": "Resumed" }));
        ticks = goes_on(&vmm, "tick", ticks);
        files.save(&vmm, &format!("state{number}"), &format!("diff{number}"), "Diff");
    }
    let said = end(vmm);
    let last_tick = last(&said, "tick");
    for number in 1..=3 {
        let written = lay_over(&files.path(&format!("diff{number}")), &files.path("base"));
        assert!(written < 64 << 20, "difference {number} has {written} bytes");
    }
    let vmm = files.start(1);
    files.load(&vmm, "state3", "base");
    let now = goes_on(&vmm, "tick", last_tick);
    assert!(now < last_tick + 100, "{now} after {last_tick}");
    end(vmm);
}

/// Copies the data of a sparse file over another; the number of bytes.
fn lay_over(from: &str, to: &str) -> u64 {
    use rustix::fs::SeekFrom as Find;
    let (mut source, mut target) =
        (File::open(from).unwrap(), File::options().write(true).open(to).unwrap());
    let (mut at, mut written) = (0, 0);
    while let Ok(start) = rustix::fs::seek(&source, Find::Data(at)) {
        let end = rustix::fs::seek(&source, Find::Hole(start)).unwrap();
        let mut bytes = vec![0; (end - start) as usize];
        source.seek(SeekFrom::Start(start)).unwrap();
        source.read_exact(&mut bytes).unwrap();
        target.seek(SeekFrom::Start(start)).unwrap();
        target.write_all(&bytes).unwrap();
        (at, written) = (end, written + bytes.len() as u64);
    }
    written
}

/// Fifty machines of one snapshot at once: each with numbers of its own, and memory that they share.
#[test]
fn fifty_clones_at_once_share_memory_and_no_number() {
    let files = Files::new(NUMBER);
    let mut vmm = files.boot(1, &[]);
    vmm.process.wait_for("number=");
    files.save(&vmm, "state", "memory", "Full");
    let said = end(vmm);
    let numbers = |said: &str| -> Vec<String> {
        let lines = said.lines().filter_map(|line| line.trim().strip_prefix("number="));
        lines.filter(|number| number.len() == 16).map(str::to_owned).collect()
    };
    let mut seen: std::collections::HashSet<_> = numbers(&said).into_iter().collect();
    let clones: Vec<_> = (1..=50)
        .map(|number| {
            let vmm = files.start(number);
            files.load(&vmm, "state", "memory");
            vmm
        })
        .collect();
    for vmm in &clones {
        let since = Instant::now();
        while numbers(&vmm.process.stdout()).len() < 2 {
            assert!(since.elapsed().as_secs() < 180, "{}", vmm.process.stdout());
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
    let pss: u64 = clones.iter().map(|vmm| kib_of(vmm.process.pid().as_raw(), "Pss:")).sum();
    let rss: u64 = clones.iter().map(|vmm| kib_of(vmm.process.pid().as_raw(), "Rss:")).sum();
    eprintln!(
        "50 clones: {} KiB each of their own, {} KiB with what is shared",
        pss / 50,
        rss / 50
    );
    // As one machine would have it, times 50, were nothing shared.
    assert!(pss < rss / 2, "{pss} KiB of {rss} KiB");
    // A distribution's kernel may lack the driver of the generation ID. vmrun's agent does the same
    // for such a guest; here there is none.
    let hears_of_restores = said.contains("hears of restores");
    for vmm in clones {
        for number in numbers(&end(vmm)) {
            assert!(seen.insert(number.clone()) || !hears_of_restores, "{number} twice");
        }
    }
}

fn kib_of(process: i32, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// docs/hostile.md 25: whatever is wrong with the files, the answer is an error, and the process can
/// still load good ones.
#[test]
fn hostile_25_bad_snapshots_are_refused_and_good_ones_load_after_them() {
    let files = Files::new(NUMBER);
    let mut vmm = files.boot(1, &[]);
    vmm.process.wait_for("number=");
    vmm.refused(
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path": "/s", "mem_file_path": "/m"}"#,
        "save/restore unavailable while running",
    );
    files.save(&vmm, "state", "memory", "Full");
    let elsewhere = json!({ "snapshot_path": "/no/such/state", "mem_file_path": files.path("m2") });
    vmm.refused("PUT", "/snapshot/create", &elsewhere.to_string(), "/no/such/state");
    end(vmm);
    let good = fs::read(files.path("state")).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 4;
    let mut newer = good.clone();
    newer[8] = 99;
    fs::write(files.path("flipped"), flipped).unwrap();
    fs::write(files.path("cut"), &good[..good.len() - 1]).unwrap();
    fs::write(files.path("newer"), newer).unwrap();
    fs::write(files.path("empty"), "").unwrap();
    let memory = fs::metadata(files.path("memory")).unwrap().len();
    File::create(files.path("short")).unwrap().set_len(memory - 4096).unwrap();
    let vmm = files.start(1);
    for (state, memory, why) in [
        ("flipped", "memory", "checksum"),
        ("cut", "memory", "length is wrong"),
        ("newer", "memory", "version 99"),
        ("empty", "memory", "too short"),
        ("nothing", "memory", "nothing"),
        ("state", "short", "bytes"),
        ("state", "nothing", "nothing"),
        ("memory", "state", "does not begin"),
    ] {
        let load = json!({
            "snapshot_path": files.path(state),
            "mem_backend": { "backend_type": "File", "backend_path": files.path(memory) },
        });
        vmm.refused("PUT", "/snapshot/load", &load.to_string(), why);
        assert_eq!(vmm.told("/")["state"], json!("Not started"));
    }
    let overridden = json!({
        "snapshot_path": files.path("state"), "mem_file_path": files.path("memory"),
        "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "x" }],
    });
    vmm.refused("PUT", "/snapshot/load", &overridden.to_string(), "Unknown Network Device");
    files.load(&vmm, "state", "memory");
    assert_eq!(vmm.told("/")["state"], json!("Running"));
    end(vmm);
}
