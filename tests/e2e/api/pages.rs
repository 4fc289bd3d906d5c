//! Guest memory of huge pages, as the host sees it.

use std::fs;
use std::path::Path;

use e2e::api::Vmm;
use e2e::guest;
use serde_json::{Value, json};

/// Writes memory in one piece, and then says so again and again.
const INIT: &str = r#"$b mount -t tmpfs tmpfs /tmp
$b dd if=/dev/zero of=/tmp/zeroes bs=1M count=48 2>/dev/null
i=0
while :; do
  i=$((i+1)); echo "written $i: $($b wc -c </tmp/zeroes)"
  $b sleep 0.2
done
"#;

/// Huge pages that the host keeps for whoever asks; what there was comes back.
struct Reserved(String);

impl Reserved {
    const FILE: &str = "/proc/sys/vm/nr_hugepages";

    fn new(pages: usize) -> Reserved {
        let before = Reserved(fs::read_to_string(Self::FILE).unwrap());
        fs::write(Self::FILE, pages.to_string()).unwrap();
        let got = fs::read_to_string(Self::FILE).unwrap();
        assert_eq!(got.trim(), pages.to_string(), "the host has no memory for huge pages");
        before
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = fs::write(Self::FILE, self.0.trim());
    }
}

fn boot(folder: &Path, pages: &str) -> Vmm {
    let initrd = guest::initramfs(folder, INIT);
    let mut vmm = Vmm::start(&folder.join("api0"), &[]);
    let config = json!({ "vcpu_count": 1, "mem_size_mib": 128, "huge_pages": pages });
    vmm.done("PUT", "/machine-config", &config);
    vmm.done("PUT", "/boot-source", &guest::boot_source(&initrd));
    vmm.done("PUT", "/actions", &json!({ "action_type": "InstanceStart" }));
    vmm.process.wait_for("written 1: 50331648");
    vmm
}

/// KiB of the process's memory that the host counts under these names.
fn kib(vmm: &Vmm, names: &[&str]) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/smaps", vmm.process.pid())).unwrap();
    let counted = text.lines().filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        names.contains(&name).then_some(())?;
        value.split_whitespace().next()?.parse::<u64>().ok()
    });
    counted.sum()
}

fn end(vmm: Vmm) -> String {
    vmm.process.signal(nix::sys::signal::Signal::SIGTERM);
    vmm.process.finish().exits(143).out()
}

fn save(vmm: &Vmm, folder: &Path) -> Value {
    vmm.done("PATCH", "/vm", &json!({ "state": "Paused" }));
    let (state, memory) = (folder.join("state"), folder.join("memory"));
    let create = json!({ "snapshot_path": state, "mem_file_path": memory });
    vmm.done("PUT", "/snapshot/create", &create);
    json!({ "snapshot_path": state, "mem_file_path": memory, "resume_vm": true })
}

#[test]
fn pages_of_2_mib_back_a_guest_whose_snapshot_is_restored_without_them() {
    const MORE: &str = "written 2";
    let folder = tempfile::tempdir().unwrap();
    let reserved = Reserved::new(80);
    let mut vmm = boot(folder.path(), "2M");
    // What the guest has written, and nothing of its memory in small pages.
    let huge = kib(&vmm, &["Private_Hugetlb", "Shared_Hugetlb"]);
    assert!((48 << 10..=128 << 10).contains(&huge), "{huge} KiB");
    vmm.process.wait_for(MORE);
    let load = save(&vmm, folder.path());
    let said = end(vmm);
    drop(reserved);

    let mut vmm = Vmm::start(&folder.path().join("api1"), &[]);
    vmm.refused("PUT", "/snapshot/load", &load.to_string(), "2M pages cannot be restored yet");
    let mut without = load;
    without["huge_pages"] = json!("None");
    vmm.done("PUT", "/snapshot/load", &without);
    assert_eq!(kib(&vmm, &["Private_Hugetlb", "Shared_Hugetlb"]), 0);
    let count = said.matches("written ").count();
    vmm.process.wait_for(&format!("written {}: 50331648", count + 2));
    end(vmm);
}

#[test]
fn pages_of_2_mib_that_the_host_does_not_have_are_an_error_and_not_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let vmm = Vmm::start(&folder.path().join("api"), &[]);
    // More than any reservation of a test beside this one.
    let config = json!({ "vcpu_count": 1, "mem_size_mib": 1024, "huge_pages": "2M" });
    vmm.done("PUT", "/machine-config", &config);
    let source = json!({ "kernel_image_path": guest::kernel() });
    vmm.done("PUT", "/boot-source", &source);
    let start = json!({ "action_type": "InstanceStart" }).to_string();
    vmm.refused("PUT", "/actions", &start, "1024 MiB of guest memory");
    // Another description of it can be started.
    vmm.done("PATCH", "/machine-config", &json!({ "huge_pages": "None" }));
    vmm.done("PUT", "/actions", &json!({ "action_type": "InstanceStart" }));
    end(vmm);
}

#[test]
fn the_hosts_transparent_huge_pages_back_a_guest() {
    let folder = tempfile::tempdir().unwrap();
    let vmm = boot(folder.path(), "Transparent");
    let huge = kib(&vmm, &["AnonHugePages"]);
    assert!((32 << 10..=128 << 10).contains(&huge), "{huge} KiB");
    let load = save(&vmm, folder.path());
    end(vmm);
    let mut vmm = Vmm::start(&folder.path().join("api1"), &[]);
    vmm.done("PUT", "/snapshot/load", &load);
    vmm.process.wait_for("written ");
    end(vmm);
}
