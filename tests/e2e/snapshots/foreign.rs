//! Snapshots of other machines than this one, and of more than one at a time.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use e2e::api::Vmm;
use e2e::guest;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// A machine's files, `state` and `memory`, in this folder.
fn take(folder: &Path) {
    let mut vmm = Vmm::start(&folder.join("first"), &[]);
    vmm.done("PUT", "/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 128 }));
    let source = json!({ "kernel_image_path": guest::attacker(), "boot_args": "attack=spin" });
    vmm.done("PUT", "/boot-source", &source);
    vmm.done("PUT", "/actions", &json!({ "action_type": "InstanceStart" }));
    vmm.process.wait_for("attack over");
    vmm.done("PATCH", "/vm", &json!({ "state": "Paused" }));
    let files = files(folder, "state", "memory");
    vmm.done("PUT", "/snapshot/create", &files);
    vmm.process.signal(Signal::SIGTERM);
    vmm.process.finish().exits(143);
}

fn files(folder: &Path, state: &str, memory: &str) -> Value {
    json!({ "snapshot_path": folder.join(state), "mem_file_path": folder.join(memory) })
}

/// A state file with another payload, whose checksum is right (see `vmm::snapshot::file`).
fn with_payload(state: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    const HEADER: usize = 24;
    let (header, payload) = state.split_at(HEADER);
    let (mut header, mut payload) = (header.to_vec(), payload.to_vec());
    change(&mut payload);
    header[12..16].copy_from_slice(&crc32fast::hash(&payload).to_le_bytes());
    header[16..24].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    [header, payload].concat()
}

/// Where these bytes begin, which are there.
fn find(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).position(|window| window == what).unwrap()
}

/// The fields of a CPUID leaf's first entry: function, index, flags, EAX, EBX, ECX, EDX. It is bytes
/// of MessagePack (`bin 8`).
fn leaf(payload: &[u8], function: u32) -> usize {
    let begin = [&[0xc4, 40][..], &function.to_le_bytes(), &0u32.to_le_bytes()].concat();
    find(payload, &begin) + 2
}

/// docs/hostile.md 25: a state of a processor of another maker, of one with more features, and of one
/// whose registers cannot be, are refused by name; a register that is unknown here is told; and the
/// state of this processor loads after them.
#[test]
fn hostile_25_states_of_other_processors_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    take(folder);
    let good = fs::read(folder.join("state")).unwrap();
    let write = |name: &str, bytes: Vec<u8>| fs::write(folder.join(name), bytes).unwrap();
    write(
        "maker",
        with_payload(&good, |payload| {
            let at = leaf(payload, 0);
            payload[at + 16..at + 28].copy_from_slice(b"CyriteadInst");
        }),
    );
    write(
        "features",
        with_payload(&good, |payload| {
            let ebx = leaf(payload, 0x8000_0008) + 16;
            payload[ebx..ebx + 4].fill(0xff);
        }),
    );
    write(
        "registers",
        with_payload(&good, |payload| {
            // `kvm_sregs` (KVM API, 4.13), 312 bytes as `bin 16`; CR4 is behind eight segments, two
            // tables and three control registers.
            let begin = b"sregs\xc5\x01\x38";
            let cr4 = find(payload, begin) + begin.len() + 8 * 24 + 2 * 16 + 3 * 8;
            payload[cr4 + 5] ^= 1;
        }),
    );
    write(
        "unknown",
        with_payload(&good, |payload| {
            // The time stamp counter, which is the first.
            let msr = [&[0xc4, 16][..], &0x10u32.to_le_bytes(), &[0; 4]].concat();
            let at = find(payload, &msr) + 2;
            payload[at..at + 4].copy_from_slice(&0xdead_beefu32.to_le_bytes());
        }),
    );
    let vmm = Vmm::start(&folder.join("api"), &[]);
    for (state, why) in [
        ("maker", "another maker"),
        ("features", "CPUID leaf 0x80000008, subleaf 0, EBX"),
        ("registers", "KVM_SET_SREGS"),
    ] {
        let load = files(folder, state, "memory").to_string();
        vmm.refused("PUT", "/snapshot/load", &load, why);
        assert_eq!(vmm.told("/")["state"], json!("Not started"));
    }
    vmm.done("PUT", "/snapshot/load", &files(folder, "state", "memory"));
    vmm.done("PATCH", "/vm", &json!({ "state": "Resumed" }));
    vmm.process.signal(Signal::SIGTERM);
    vmm.process.finish().exits(143);

    let vmm = Vmm::start(&folder.join("other"), &["--level", "Warning"]);
    vmm.done("PUT", "/snapshot/load", &files(folder, "unknown", "memory"));
    vmm.process.signal(Signal::SIGTERM);
    let done = vmm.process.finish().exits(143);
    assert!(
        done.out().contains("0xdeadbeef") || done.err().contains("0xdeadbeef"),
        "{}",
        done.err()
    );
}

/// docs/hostile.md 25: files that are replaced again and again while they are loaded. Each is opened
/// once: it is the old one or the new one, and a machine is of whole files or there is none.
#[test]
fn hostile_25_files_that_are_replaced_while_they_are_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    take(folder);
    let size = fs::metadata(folder.join("memory")).unwrap().len();
    fs::File::create(folder.join("short")).unwrap().set_len(size - 4096).unwrap();
    let state = fs::read(folder.join("state")).unwrap();
    fs::write(folder.join("cut"), &state[..state.len() / 2]).unwrap();
    // What is there under the two names changes by renames alone.
    let put = |from: &str, name: &str| {
        let link = folder.join(format!("{name}.new"));
        fs::hard_link(folder.join(from), &link).unwrap();
        fs::rename(&link, folder.join(name)).unwrap();
        // Two names of one file are not renamed (rename(2)).
        let _ = fs::remove_file(link);
    };
    put("state", "a");
    put("memory", "b");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0.. {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                put(if round % 2 == 0 { "cut" } else { "state" }, "a");
                put(if round % 3 == 0 { "short" } else { "memory" }, "b");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        let load = files(folder, "a", "b").to_string();
        for round in 0..4 {
            let vmm = Vmm::start(&folder.join(format!("api{round}")), &[]);
            loop {
                let (code, answer) = vmm.ask("PUT", "/snapshot/load", &load);
                if code == 204 {
                    break;
                }
                let message = answer["fault_message"].as_str().unwrap_or_default();
                let known = ["length is wrong", "the memory file has"];
                assert!(known.iter().any(|known| message.contains(known)), "{code} {answer}");
                assert_eq!(vmm.told("/")["state"], json!("Not started"));
            }
            vmm.done("PATCH", "/vm", &json!({ "state": "Resumed" }));
            assert_eq!(vmm.told("/")["state"], json!("Running"));
            vmm.process.signal(Signal::SIGTERM);
            vmm.process.finish().exits(143);
        }
        over.store(true, Ordering::SeqCst);
    });
}
