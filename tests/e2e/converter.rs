//! What the process that reads layers is confined to, seen from the host, and what becomes of an
//! image when it dies.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::{Running, Session};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Users that confined processes become.
const USERS: std::ops::Range<u32> = 0x7000_0000..0x7001_0000;
const LIMIT: Duration = Duration::from_secs(150);

/// An image whose layer takes a while, in a layout, so that nothing but layers is converted.
struct Layout {
    folder: tempfile::TempDir,
}

impl Layout {
    fn new() -> Layout {
        let folder = tempfile::tempdir().unwrap();
        let from = format!("oci-archive:{}", e2e::images::archive("debian").display());
        let to = format!("oci:{}:x", folder.path().join("layout").display());
        let mut skopeo = Command::new("skopeo");
        skopeo.arg("--policy").arg(e2e::images::assets().join("policy.json"));
        Running::start(skopeo.args(["copy", "--quiet", &from, &to])).finish().exits(0);
        Layout { folder }
    }

    fn source(&self) -> String {
        format!("oci:{}:x", self.folder.path().join("layout").display())
    }

    fn pull(&self, session: &Session) -> Running {
        Running::start(&mut session.command(["image", "pull", "-q", &self.source()]))
    }
}

/// The converter that works for this session, stopped.
struct Converter(Pid);

impl Converter {
    fn stop(session: &Session) -> Converter {
        let since = Instant::now();
        loop {
            let all = fs::read_dir("/proc").unwrap().flatten();
            let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
            if let Some(pid) = pids.map(Pid::from_raw).find(|pid| is_converter(*pid, session)) {
                kill(pid, Signal::SIGSTOP).unwrap();
                let found = Converter(pid);
                while !found.status("State").starts_with('T') {
                    assert!(since.elapsed() < LIMIT, "it does not stop");
                }
                return found;
            }
            assert!(since.elapsed() < LIMIT, "nothing is converted");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.0.to_string()).join(name)
    }

    fn status(&self, name: &str) -> String {
        let text = fs::read_to_string(self.proc("status")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name}: {text}")).trim().to_owned()
    }

    fn signal(&self, signal: Signal) {
        kill(self.0, signal).unwrap();
    }
}

/// Whether it is one, under its filter, and in the middle of writing to this session's store.
fn is_converter(pid: Pid, session: &Session) -> bool {
    let proc = Path::new("/proc").join(pid.to_string());
    let named = fs::read(proc.join("cmdline")).is_ok_and(|line| line.starts_with(b"vmrun-conv"));
    let status = || fs::read_to_string(proc.join("status")).unwrap_or_default();
    if !named || !status().contains("Seccomp:\t2") {
        return false;
    }
    let files = fs::read_dir(proc.join("fd")).into_iter().flatten().flatten();
    files.map(|entry| entry.path()).any(|file| {
        fs::read_link(&file).is_ok_and(|to| to.starts_with(session.root().join("images/tmp")))
            && file.metadata().is_ok_and(|output| output.len() > 0)
    })
}

fn files(session: &Session, folder: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(session.root().join("images").join(folder)).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn layers_are_read_by_a_process_that_has_nothing_but_them() {
    let (layout, session) = (Layout::new(), Session::empty());
    let pull = layout.pull(&session);
    let converter = Converter::stop(&session);
    let uid: u32 = converter.status("Uid").split_whitespace().next().unwrap().parse().unwrap();
    assert!(USERS.contains(&uid), "{uid}");
    assert_eq!(converter.status("Uid"), [uid; 4].map(|uid| uid.to_string()).join("\t"));
    assert_eq!(converter.status("Gid"), converter.status("Uid"));
    assert_eq!(converter.status("Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(converter.status(set), "0000000000000000", "{set}");
    }
    assert_eq!(converter.status("NoNewPrivs"), "1");
    assert_eq!(converter.status("Seccomp"), "2");
    assert_eq!(converter.status("Threads"), "1");
    assert_eq!(converter.status("NSpid").split_whitespace().nth(1), Some("1"));
    for name in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let name = format!("ns/{name}");
        let ours = fs::read_link(Path::new("/proc/self").join(&name)).unwrap();
        assert_ne!(fs::read_link(converter.proc(&name)).unwrap(), ours, "{name}");
    }
    // Nothing to see, and nothing of the caller's.
    assert_eq!(fs::read_dir(converter.proc("root")).unwrap().count(), 0);
    let mounts = fs::read_to_string(converter.proc("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / / ro,") && mounts.contains(" - tmpfs "), "{mounts}");
    assert_eq!(fs::read(converter.proc("environ")).unwrap(), b"");
    // Three pipes, the blobs to read, and one file to write.
    let (mut pipes, mut blobs, mut outputs) = (0, 0, 0);
    for entry in fs::read_dir(converter.proc("fd")).unwrap().map(Result::unwrap) {
        let target = fs::read_link(entry.path()).unwrap();
        let writable = entry.path().symlink_metadata().unwrap().mode() & 0o200 != 0;
        if target.starts_with(session.root().join("images/blobs")) {
            assert!(!writable, "{}", target.display());
            blobs += 1;
        } else if target.starts_with(session.root().join("images/tmp")) {
            assert!(writable);
            outputs += 1;
        } else {
            assert!(target.to_str().unwrap().starts_with("pipe:"), "{}", target.display());
            pipes += 1;
        }
    }
    assert_eq!((pipes, blobs, outputs), (3, 1, 1));
    let limits = fs::read_to_string(converter.proc("limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(limit("Max core file size"), "0");
    for name in ["Max file size", "Max address space", "Max open files"] {
        assert_ne!(limit(name), "unlimited", "{name}");
    }
    converter.signal(Signal::SIGCONT);
    pull.finish().exits(0);
    assert_eq!(files(&session, "erofs").len(), 1);
}

#[test]
fn a_conversion_that_is_killed_is_told_and_leaves_nothing() {
    let (layout, session) = (Layout::new(), Session::empty());
    let pull = layout.pull(&session);
    Converter::stop(&session).signal(Signal::SIGKILL);
    let failed = pull.finish().exits(125).complains(&["cannot convert", "SIGKILL", "sha256:"]);
    assert_eq!(failed.err().lines().count(), 1, "{}", failed.err());
    assert!(files(&session, "erofs").is_empty() && files(&session, "tmp").is_empty());

    // With its parent it is gone, and so is what it has written once anybody comes.
    let pull = layout.pull(&session);
    let converter = Converter::stop(&session);
    pull.signal(Signal::SIGKILL);
    pull.finish();
    let since = Instant::now();
    while converter.proc("status").exists() {
        assert!(since.elapsed() < LIMIT, "it outlives its parent");
    }
    assert!(files(&session, "erofs").is_empty());
    layout.pull(&session).finish().exits(0);
    assert_eq!(files(&session, "erofs").len(), 1);
    assert!(files(&session, "tmp").is_empty());
}

#[test]
fn without_namespaces_nothing_is_converted_unless_the_user_says_so() {
    // In a root that is not its mount namespace's nobody gets a user namespace.
    let (folder, session) = (tempfile::tempdir().unwrap(), Session::empty());
    let archive = format!("oci-archive:{}", e2e::images::archive("base").display());
    let pull = |more: &[&str]| {
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "sh",
            "-c",
            "mount --rbind / \"$0\" && exec chroot \"$0\" \"$@\"",
        ]);
        command.arg(folder.path()).args(["vmrun", "image", "pull", "-q"]).args(more).arg(&archive);
        command.env("VMRUN_ROOT", session.root()).stdin(Stdio::null());
        Running::start(&mut command).finish()
    };
    pull(&[]).exits(125).complains(&["namespaces", "--unconfined namespaces"]);
    pull(&["--unconfined", "namespaces"]).exits(0);
    assert_eq!(files(&session, "erofs").len(), 1);
}
