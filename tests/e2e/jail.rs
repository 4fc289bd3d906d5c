//! What a VMM is confined to, seen from the host.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::api::Vmm;
use e2e::break_in::{Argument, Outcome, TakenOver};
use e2e::user::{UID, User};
use e2e::{Running, Session, guest};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;
use nix::sys::signal::Signal;
use serde_json::json;

const BASE: &str = "localhost/base";
const CGROUPS: &str = "/sys/fs/cgroup";
/// Users that VMMs become.
const USERS: std::ops::Range<u32> = 0x7000_0000..0x7001_0000;

/// A container that runs until it is dropped, and its VMM.
struct Confined {
    run: Running,
    id: String,
    vmm: u32,
    sockets: PathBuf,
    cgroup: PathBuf,
}

impl Confined {
    fn start(arguments: &[&str]) -> Confined {
        let folder = tempfile::tempdir().unwrap();
        let cidfile = folder.path().join("id");
        let session = Session::prepared();
        let mut command = session.command(["run", "--rm", "--cidfile"]);
        command.arg(&cidfile).args(arguments).args([BASE, "sh", "-c", "echo up; sleep 1000"]);
        let mut run = Running::start(&mut command);
        run.wait_for("up\n");
        let id = fs::read_to_string(cidfile).unwrap()[..12].to_owned();
        let cgroup = Path::new(CGROUPS).join("vmrun").join(&id);
        let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
        // KVM's own threads for the machine come after it.
        let vmm = processes.lines().next().unwrap_or_else(|| panic!("no VMM in {cgroup:?}"));
        let sockets = Session::prepared().root().canonicalize().unwrap().join("run").join(&id);
        assert!(sockets.join("api").exists(), "{sockets:?}");
        Confined { run, id, vmm: vmm.parse().unwrap(), sockets, cgroup }
    }

    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.vmm.to_string()).join(name)
    }

    fn status(&self, name: &str) -> String {
        let text = fs::read_to_string(self.proc("status")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name}: {text}")).trim().to_owned()
    }

    fn uid(&self) -> u32 {
        let ids = self.status("Uid");
        let ids: BTreeSet<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(ids.len(), 1, "{ids:?}");
        *ids.first().unwrap()
    }

    fn limit(&self, file: &str) -> String {
        fs::read_to_string(self.cgroup.join(file)).unwrap().trim().to_owned()
    }

    fn end(self) {
        self.run.signal(Signal::SIGKILL);
        self.run.finish();
    }
}

#[test]
fn a_vmm_has_nothing_of_the_host_but_what_it_was_given() {
    let one = Confined::start(&["--network", "none", "-m", "128m"]);
    // A user of its own, who may do nothing.
    assert!(USERS.contains(&one.uid()), "{}", one.uid());
    assert_eq!(one.status("Gid").split_whitespace().next(), Some(&*one.uid().to_string()));
    assert_eq!(one.status("Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(one.status(set), "0000000000000000", "{set}");
    }
    assert_eq!(one.status("NoNewPrivs"), "1");
    assert_eq!(one.status("NSpid").split_whitespace().nth(1), Some("1"));
    // Each thread has the filters of its kind (docs/seccomp.md), beside those it was made under.
    let mut threads = Vec::new();
    for entry in fs::read_dir(one.proc("task")).unwrap().map(Result::unwrap) {
        let status = fs::read_to_string(entry.path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {name}: {status}")).trim().to_owned()
        };
        assert_eq!(field("Seccomp"), "2", "{status}");
        threads.push((field("Name"), field("Seccomp_filters")));
    }
    for (name, count) in [("api", "1"), ("vcpu0", "3"), ("vmrun-vmm loop", "3")] {
        let thread = (name.to_owned(), count.to_owned());
        assert!(threads.contains(&thread), "{thread:?}: {threads:?}");
    }
    // Namespaces of its own.
    for name in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let name = format!("ns/{name}");
        let other = fs::read_link(Path::new("/proc/self").join(&name)).unwrap();
        assert_ne!(fs::read_link(one.proc(&name)).unwrap(), other, "{name}");
    }
    // An empty root, with one folder in which there are sockets, both read-only.
    let mounts = fs::read_to_string(one.proc("mountinfo")).unwrap();
    let mut seen = Vec::new();
    for line in mounts.lines() {
        let (left, right) = line.split_once(" - ").unwrap();
        let fields: Vec<_> = left.split(' ').collect();
        for option in ["ro", "nosuid", "nodev", "noexec"] {
            assert!(fields[5].split(',').any(|has| has == option), "{option}: {line}");
        }
        seen.push((fields[4].to_owned(), right.split(' ').next().unwrap().to_owned()));
    }
    seen.sort();
    assert_eq!(seen.len(), 2, "{mounts}");
    assert_eq!(seen[0], ("/".to_owned(), "tmpfs".to_owned()));
    assert!(seen[1].0.ends_with(&one.id), "{mounts}");
    let sockets = fs::read_dir(one.proc("root").join(&seen[1].0[1..])).unwrap();
    for entry in sockets.map(Result::unwrap) {
        let kind = entry.file_type().unwrap();
        assert!(std::os::unix::fs::FileTypeExt::is_socket(&kind), "{:?}", entry.path());
    }
    // Nothing of the environment, and only files of its machine.
    assert_eq!(fs::read(one.proc("environ")).unwrap(), b"");
    let root = Session::prepared().root().canonicalize().unwrap();
    for entry in fs::read_dir(one.proc("fd")).unwrap().map(Result::unwrap) {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let text = target.to_str().unwrap();
        let own = ["anon_inode:", "socket:", "/memfd:guest-memory", "/run/vmrun/users/"];
        let known = own.iter().any(|begin| text.starts_with(begin))
            || ["/dev/kvm", "/dev/null"].contains(&text)
            || (target.starts_with(root.join("containers")) && text.contains(&one.id))
            || target.starts_with(root.join("images"))
            || target.starts_with(root.join("kernels"));
        assert!(known, "{text}");
        if target.starts_with(root.join("images")) || target.starts_with(root.join("kernels")) {
            let mode = entry.path().symlink_metadata().unwrap().mode();
            assert_eq!(mode & 0o200, 0, "{text} is writable");
        }
    }
    // Its share of the host.
    assert_eq!(one.limit("memory.max"), ((128u64 << 20) + (128 << 12) + (64 << 20)).to_string());
    assert_eq!(one.limit("pids.max"), "17");
    assert_eq!(one.limit("cpu.max"), "150000 100000");
    let limits = fs::read_to_string(one.proc("limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(limit("Max core file size"), "0");
    assert_eq!(limit("Max open files"), "2048");
    assert_ne!(limit("Max file size"), "unlimited");
    // Another is another user in other namespaces, and sees none of this.
    let two = Confined::start(&["--network", "none", "-m", "128m"]);
    assert_ne!(one.uid(), two.uid());
    for name in ["user", "mnt", "pid", "net"] {
        let name = format!("ns/{name}");
        let (a, b) = (fs::read_link(one.proc(&name)), fs::read_link(two.proc(&name)));
        assert_ne!(a.unwrap(), b.unwrap(), "{name}");
    }
    // Killed, not asked: whoever comes next clears up.
    let cgroups = [one.cgroup.clone(), two.cgroup.clone()];
    one.end();
    two.end();
    let since = Instant::now();
    while cgroups.iter().any(|path| path.exists()) {
        assert!(since.elapsed() < Duration::from_secs(60), "{cgroups:?}");
        Session::prepared().vmrun(["ps"]).exits(0);
    }
}

#[test]
fn without_privileges_there_is_the_same_jail() {
    let user = User::with_kvm();
    let run = ["run", "--rm", "--network", "none", BASE, "id", "-u"];
    // Whoever has no cgroup is told, and may go on.
    user.vmrun(&run).exits(125).complains(&["cgroup", "--unconfined cgroup"]);
    let mut going_on = vec!["run", "--unconfined", "cgroup"];
    going_on.extend(&run[1..]);
    user.vmrun(&going_on).exits(0).prints("0\n");

    // As a service manager delegates one: with the controllers, and a leaf for the caller.
    let own = Path::new(CGROUPS).join("e2e-user");
    let leaf = own.join("leaf");
    let controllers = "+memory +pids +cpu";
    fs::write(Path::new(CGROUPS).join("cgroup.subtree_control"), controllers).unwrap();
    fs::create_dir_all(&leaf).unwrap();
    for file in ["", "cgroup.procs", "cgroup.subtree_control", "leaf/cgroup.procs"] {
        nix::unistd::chown(&own.join(file), Some(UID.into()), Some(UID.into())).unwrap();
    }
    let mut inside = Command::new("sh");
    inside.args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""]).arg(&leaf);
    let command = user.command(&[
        "run",
        "--rm",
        "--network",
        "none",
        BASE,
        "sh",
        "-c",
        "echo up; sleep 1000",
    ]);
    inside.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        inside.env(name, value.unwrap());
    }
    let mut machine = Running::start(inside.stdin(Stdio::null()));
    machine.wait_for("up\n");
    let all = own.join("vmrun");
    let group =
        fs::read_dir(&all).unwrap().flatten().find(|entry| entry.file_type().unwrap().is_dir());
    let group = group.expect("no cgroup of the VMM's").path();
    let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap();
    let vmm = processes.lines().next().unwrap();
    assert_ne!(fs::read_to_string(group.join("memory.max")).unwrap().trim(), "max");
    let status = fs::read_to_string(format!("/proc/{vmm}/status")).unwrap();
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"] {
        assert!(status.contains(line), "{line}: {status}");
    }
    assert!(status.contains(&format!("Uid:\t{UID}\t{UID}")), "{status}");
    assert_eq!(fs::read_dir(format!("/proc/{vmm}/root")).unwrap().count(), 1);
    machine.signal(Signal::SIGKILL);
    machine.finish();
    let since = Instant::now();
    while group.exists() {
        assert!(since.elapsed() < Duration::from_secs(60), "{group:?}");
        user.vmrun(&["ps"]).exits(0);
    }
    fs::remove_dir(&all).unwrap();
    fs::remove_dir(&leaf).unwrap();
    fs::remove_dir(&own).unwrap();
}

#[test]
fn the_jailers_options_do_what_they_do_there() {
    let place = tempfile::tempdir().unwrap();
    let base = place.path().canonicalize().unwrap();
    fs::set_permissions(&base, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let root = base.join("firecracker/the-one/root");
    fs::create_dir_all(&root).unwrap();
    let script = "echo up; while :; do $b sleep 1000; done\n";
    fs::copy(guest::initramfs(place.path(), script), root.join("initrd")).unwrap();
    fs::copy(guest::kernel(), root.join("vmlinux")).unwrap();
    let start = |id: &str, more: &[&str]| {
        let mut command = Command::new("vmrun-vmm");
        command.args(["--jail", "--id", id, "--exec-file", "/usr/bin/firecracker"]);
        command.args(["--uid", "4242", "--gid", "4343", "--chroot-base-dir"]).arg(&base);
        command.args(more).env("SECRET", "of the host");
        command
    };
    let socket = root.join("run/firecracker.socket");
    // What is handed in is still there in the jail, which clears the environment.
    let vsock = UnixListener::bind(root.join("vsock")).unwrap();
    fcntl(&vsock, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let mut command = start(
        "the-one",
        &[
            "--vsock-fd",
            &vsock.as_raw_fd().to_string(),
            "--cgroup",
            "pids.max=20",
            "--resource-limit",
            "no-file=300",
            "--new-pid-ns",
            "--",
            "--level",
            "Info",
        ],
    );
    let process = Running::start(command.stdin(Stdio::null()));
    let since = Instant::now();
    while !socket.exists() {
        assert!(since.elapsed() < Duration::from_secs(60), "no API socket");
        std::thread::sleep(Duration::from_millis(5));
    }
    let vmm = Vmm::over(&socket, process);
    let group = Path::new(CGROUPS).join("firecracker/the-one");
    assert_eq!(fs::read_to_string(group.join("pids.max")).unwrap(), "20\n");
    let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap();
    // The one that waits outside is the first.
    let pid = processes.lines().last().unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Uid:\t4242\t4242\t4242\t4242"), "{status}");
    assert!(status.contains("Gid:\t4343\t4343\t4343\t4343"), "{status}");
    assert!(fs::read_to_string(format!("/proc/{pid}/limits")).unwrap().contains("300 "));
    assert_eq!(fs::read(format!("/proc/{pid}/environ")).unwrap(), b"");
    assert_eq!(
        fs::metadata(format!("/proc/{pid}/root/initrd")).unwrap().ino(),
        fs::metadata(root.join("initrd")).unwrap().ino()
    );
    // Its paths are those of the root, and there is nothing beside it.
    let boot = |kernel: &str| json!({ "kernel_image_path": kernel, "initrd_path": "/initrd" });
    vmm.refused("PUT", "/boot-source", &boot("/../../../etc/passwd").to_string(), "passwd");
    vmm.done("PUT", "/boot-source", &boot("/vmlinux"));
    vmm.done("PUT", "/vsock", &json!({ "guest_cid": 3, "uds_path": "/vsock" }));
    vmm.done("PUT", "/serial", &json!({ "serial_out_path": "/serial.log" }));
    vmm.done("PUT", "/actions", &json!({ "action_type": "InstanceStart" }));
    vmm.done("PATCH", "/vm", &json!({ "state": "Paused" }));
    let snapshot = json!({ "snapshot_path": "/state", "mem_file_path": "/memory" });
    vmm.done("PUT", "/snapshot/create", &snapshot);
    assert_eq!(fs::metadata(root.join("state")).unwrap().uid(), 4242);
    assert!(fs::metadata(root.join("memory")).unwrap().len() >= 128 << 20);
    vmm.process.signal(Signal::SIGTERM);
    vmm.process.finish().exits(143);
    fs::remove_dir(&group).unwrap();

    // What cannot be done is an error, and leaves no process.
    for (more, why) in [
        (vec!["--cgroup", "no.such=1"], "no.such"),
        (vec!["--cgroup", "../x=1"], "../x"),
        (vec!["--netns", "/no/such"], "/no/such"),
        (vec!["--resource-limit", "stack=1"], "stack=1"),
        (vec!["--unconfined", "everything"], "everything"),
    ] {
        let done = Running::start(start("the-one", &more).stdin(Stdio::null())).finish();
        assert!(done.status.code().is_some_and(|code| code != 0), "{more:?}");
        assert!(done.err().contains(why), "{more:?}: {}", done.err());
    }
    // Root that leads elsewhere is no root.
    let elsewhere = tempfile::tempdir().unwrap();
    let link = base.join("firecracker/linked");
    std::os::unix::fs::symlink(elsewhere.path(), &link).unwrap();
    let mut command = start("linked", &[]);
    let done = Running::start(command.stdin(Stdio::null())).finish();
    assert!(done.err().contains("symbolic link"), "{}", done.err());
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
}

/// A system call by name, with six arguments: a number each, or bytes where there are any for it.
type Attempt = (&'static str, i64, Vec<Vec<u8>>, [i64; 6]);

/// What somebody tries who has broken into a VMM.
fn attempts(other: &Confined) -> Vec<Attempt> {
    let text = |text: &str| [text.as_bytes(), b"\0"].concat();
    let none = Vec::new;
    let at = i64::from(libc::AT_FDCWD);
    let vmm = i64::from(other.vmm);
    // An iovec: somewhere, and how long.
    let buffer = [0x10000u64.to_ne_bytes(), 16u64.to_ne_bytes()].concat();
    vec![
        (
            "open a file of the host",
            libc::SYS_openat,
            vec![none(), text("/etc/passwd")],
            [at, 0, 0, 0, 0, 0],
        ),
        (
            "open what is above the root",
            libc::SYS_openat,
            vec![none(), text("/../../etc/passwd")],
            [at, 0, 0, 0, 0, 0],
        ),
        (
            "list the root",
            libc::SYS_openat,
            vec![none(), text("/")],
            [at, 0, libc::O_DIRECTORY.into(), 0, 0, 0],
        ),
        (
            "make a file",
            libc::SYS_openat,
            vec![none(), text("/x")],
            [at, 0, (libc::O_CREAT | libc::O_WRONLY).into(), 0o600, 0, 0],
        ),
        ("make a folder", libc::SYS_mkdirat, vec![none(), text("/x")], [at, 0, 0o700, 0, 0, 0]),
        (
            "make a device",
            libc::SYS_mknodat,
            vec![none(), text("/x")],
            [at, 0, (libc::S_IFCHR | 0o600).into(), 0x0101, 0, 0],
        ),
        (
            "open memory of its own",
            libc::SYS_openat,
            vec![none(), text("/proc/self/mem")],
            [at, 0, 2, 0, 0, 0],
        ),
        ("run a program", libc::SYS_execve, vec![text("/bin/sh")], [0; 6]),
        ("signal another VMM", libc::SYS_kill, vec![], [vmm, 9, 0, 0, 0, 0]),
        ("signal everybody", libc::SYS_kill, vec![], [-1, 9, 0, 0, 0, 0]),
        (
            "trace another VMM",
            libc::SYS_ptrace,
            vec![],
            [libc::PTRACE_ATTACH.into(), vmm, 0, 0, 0, 0],
        ),
        ("have a handle of another VMM", libc::SYS_pidfd_open, vec![], [vmm, 0, 0, 0, 0, 0]),
        (
            "read another VMM's memory",
            libc::SYS_process_vm_readv,
            vec![none(), buffer.clone(), none(), buffer.clone()],
            [vmm, 0, 1, 0, 1, 0],
        ),
        ("mount", libc::SYS_mount, vec![text("x"), text("/"), text("tmpfs")], [0; 6]),
        ("leave the root", libc::SYS_chroot, vec![text("/")], [0; 6]),
        ("become root", libc::SYS_setuid, vec![], [0; 6]),
        (
            "load a program into the kernel",
            libc::SYS_bpf,
            vec![none(), vec![0; 64]],
            [0, 0, 64, 0, 0, 0],
        ),
        (
            "load a module",
            libc::SYS_init_module,
            vec![vec![0; 64], none(), text("")],
            [0, 64, 0, 0, 0, 0],
        ),
        (
            "open raw packets",
            libc::SYS_socket,
            vec![],
            [libc::AF_PACKET.into(), libc::SOCK_RAW.into(), 0, 0, 0, 0],
        ),
        ("set the clock", libc::SYS_clock_settime, vec![none(), vec![0; 16]], [0; 6]),
        (
            "restart the host",
            libc::SYS_reboot,
            vec![],
            [0xfee1_dead, 672_274_793, 0x0123_4567, 0, 0, 0],
        ),
    ]
}

#[test]
fn whoever_breaks_into_a_vmm_finds_nothing() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let other = Confined::start(&["--network", "none", "-m", "128m"]);
    // The jail alone holds, without the filter of system calls.
    let open = Confined::start(&["--network", "none", "-m", "128m", "--unconfined", "seccomp"]);
    let taken = TakenOver::new(open.vmm);
    let call = |taken: &TakenOver, number: i64, bytes: &[Vec<u8>], numbers: [i64; 6]| {
        let arguments: Vec<_> = (0..6)
            .map(|index| match bytes.get(index).filter(|bytes| !bytes.is_empty()) {
                Some(bytes) => Argument::Bytes(bytes),
                None => Argument::Number(numbers[index]),
            })
            .collect();
        taken.call(number, &arguments)
    };
    // It does what it is told.
    let process = call(&taken, libc::SYS_getpid, &[], [0; 6]);
    assert_eq!(process, Outcome::Returned(1));
    let attempts = attempts(&other);
    for (what, number, bytes, numbers) in &attempts {
        let outcome = call(&taken, *number, bytes, *numbers);
        assert!(matches!(outcome, Outcome::Failed(_)), "{what}: {outcome:?}");
    }
    // Sockets of its own lead nowhere: not to the host's loopback, not to another's.
    let connects = |family: i32, address: Vec<u8>| {
        let made = call(&taken, libc::SYS_socket, &[], [family.into(), 1, 0, 0, 0, 0]);
        let Outcome::Returned(socket) = made else { return made };
        let length = address.len() as i64;
        call(&taken, libc::SYS_connect, &[Vec::new(), address], [socket, 0, length, 0, 0, 0])
    };
    let mut loopback = vec![libc::AF_INET as u8, 0];
    loopback.extend(port.to_be_bytes());
    loopback.extend([127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    let outcome = connects(libc::AF_INET, loopback);
    assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
    for name in ["api", "v"] {
        let mut address = vec![libc::AF_UNIX as u8, 0];
        address.extend(other.sockets.join(name).to_str().unwrap().as_bytes());
        address.push(0);
        let outcome = connects(libc::AF_UNIX, address);
        assert!(matches!(outcome, Outcome::Failed(_)), "{name}: {outcome:?}");
    }
    drop(taken);
    open.end();
    // With the filter the first attempt is the last one.
    let filtered = Confined::start(&["--network", "none", "-m", "128m"]);
    let (what, number, bytes, numbers) = &attempts[7];
    let taken = TakenOver::new(filtered.vmm);
    let outcome = call(&taken, *number, bytes, *numbers);
    assert_eq!(outcome, Outcome::Killed(Signal::SIGSYS), "{what}");
    let done = filtered.run.finish();
    assert!(done.err().contains("SIGSYS"), "{}", done.err());
    other.end();
}

/// The state directory is root's alone, and the VMM is not root: without a root of its own it finds the
/// sockets all the same.
#[test]
fn without_namespaces_a_vmm_finds_its_sockets() {
    let session = Session::prepared();
    let run = ["--network", "none", "--unconfined", "namespaces", BASE, "echo", "said"];
    session.run(run).exits(0).prints("said\n");
}
