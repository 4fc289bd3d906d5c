//! Files as memory of the guest, with and without PCI. Here, since it takes the same guest kernel: a
//! distribution's has the drivers as modules that images do not need, and cannot begin with them.

use std::fs;
use std::path::{Path, PathBuf};

use e2e::api::Vmm;
use e2e::{guest, run, text};
use serde_json::{Value, json};

/// Runs on the root device; the others are of ext4, without a file system, and read-only.
const INIT: &str = r#"echo "root=$($b grep ' / ' /proc/mounts)"
echo "file=$($b cat /words)"
$b touch /words 2>/dev/null || echo "root is not written"

$b mount -t ext4 -o dax /dev/pmem1 /mnt
echo "data=$($b grep ' /mnt ' /proc/mounts)"
echo "from the host: $($b cat /mnt/words)"
echo "from the guest" >/mnt/answer
$b sync
$b umount /mnt

echo "some bytes" | $b dd of=/dev/pmem2 bs=1 seek=70000 conv=notrunc,fsync 2>/dev/null

echo "before writing: $($b dd if=/dev/pmem3 bs=16 count=1 2>/dev/null)"
echo "overwritten" | $b dd of=/dev/pmem3 conv=notrunc,fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
echo "after writing: $($b dd if=/dev/pmem3 bs=16 count=1 2>/dev/null)"
echo "all is said"
$b sleep 1000
"#;

/// A file of 4 MiB that begins with this.
fn raw(folder: &Path, name: &str, begin: &str) -> PathBuf {
    let mut bytes = begin.as_bytes().to_vec();
    bytes.resize(4 << 20, 0);
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// Boots from an EROFS image, reads and writes an ext4 file system, both without a page cache in the
/// guest, and files without any.
fn boots_from_memory(options: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let tree = guest::tree(folder, INIT);
    fs::write(tree.join("words"), "words of the image").unwrap();
    let (root, data) = (folder.join("root"), folder.join("data"));
    run("mkfs.erofs", &["--quiet", text(&root), text(&tree)]);
    let content = folder.join("content");
    fs::create_dir(&content).unwrap();
    fs::write(content.join("words"), "words of the host").unwrap();
    run("mkfs.ext4", &["-q", "-b", "4096", "-d", text(&content), text(&data), "16M"]);
    let scratch = raw(folder, "scratch", "");
    let fixed = raw(folder, "fixed", "written in stone");

    let mut vmm = Vmm::start(&folder.join("api"), options);
    let put = |path: &str, body: &Value| vmm.done("PUT", path, body);
    put("/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 128 }));
    put(
        "/boot-source",
        &json!({
            "kernel_image_path": guest::kernel(),
            "boot_args": "console=ttyS0 reboot=k panic=-1 rootfstype=erofs rootflags=dax init=/init",
        }),
    );
    let device = |id: &str, path: &Path, more: Value| {
        let mut body = json!({ "id": id, "path_on_host": path });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        put(&format!("/pmem/{id}"), &body);
    };
    device("root", &root, json!({ "root_device": true, "read_only": true }));
    device("data", &data, json!({}));
    device("scratch", &scratch, json!({}));
    device("fixed", &fixed, json!({ "read_only": true }));
    put("/actions", &json!({ "action_type": "InstanceStart" }));
    vmm.process.wait_for("all is said\r\n");
    let said = vmm.process.stdout();
    let line = |name: &str| {
        let found = said.lines().find_map(|line| line.trim().strip_prefix(name));
        found.unwrap_or_else(|| panic!("no {name}: {said}"))
    };
    let mount = line("root=");
    assert!(mount.starts_with("/dev/root / erofs ro") && mount.contains("dax=always"), "{mount}");
    assert_eq!(line("file="), "words of the image");
    assert!(said.contains("root is not written"), "{said}");
    let mount = line("data=");
    assert!(mount.contains("/dev/pmem1 /mnt ext4 rw") && mount.contains("dax=always"), "{mount}");
    assert_eq!(line("from the host: "), "words of the host");
    assert_eq!(line("before writing: "), "written in stone");
    assert_eq!(line("after writing: "), "written in stone");

    // What was flushed is in the files while the machine is still there.
    let bytes = fs::read(&scratch).unwrap();
    assert_eq!(&bytes[70_000..70_011], b"some bytes\n");
    assert_eq!(run("debugfs", &["-R", "cat answer", text(&data)]), "from the guest\n");
    assert!(fs::read(&fixed).unwrap().starts_with(b"written in stone\0"));
    // Nor can the monitor write what is read-only.
    let maps = fs::read_to_string(format!("/proc/{}/maps", vmm.process.pid())).unwrap();
    for (path, allowed) in [(&root, "r--s"), (&fixed, "r--s"), (&data, "rw-s"), (&scratch, "rw-s")]
    {
        let found: Vec<_> = maps.lines().filter(|line| line.ends_with(text(path))).collect();
        assert!(!found.is_empty() && found.iter().all(|line| line.contains(allowed)), "{found:?}");
    }
    let (_, metrics) = vmm.ask_text("GET", "/metrics", "");
    for (id, flushed) in [("data", true), ("scratch", true), ("root", false)] {
        let name = format!("vmrun_pmem_flush_total{{id=\"{id}\"}} ");
        let count = metrics.lines().find_map(|line| line.strip_prefix(&name));
        let count = count.unwrap_or_else(|| panic!("no {name}: {metrics}"));
        assert_eq!(count != "0", flushed, "{id}: {count}");
    }
    vmm.process.signal(nix::sys::signal::Signal::SIGTERM);
    vmm.process.finish().exits(143);
}

#[test]
fn a_guest_boots_from_memory_and_what_it_writes_is_in_files() {
    boots_from_memory(&[]);
}

#[test]
fn a_guest_boots_from_memory_on_pci() {
    boots_from_memory(&["--enable-pci"]);
}
