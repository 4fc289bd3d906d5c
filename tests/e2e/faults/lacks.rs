//! Hosts that lack something: the error says in one line what it is, and what helps.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::api::Vmm;
use e2e::user::User;
use e2e::{Finished, Running, Session, guest};
use nix::sys::signal::Signal;
use serde_json::json;

const BASE: &str = "localhost/base";

/// A shell that does this in a mount namespace of its own, and then runs the words that follow.
fn after(script: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &format!("{script}\nexec \"$@\""), "sh"]);
    command.stdin(Stdio::null());
    command
}

/// Has another command run by this one.
fn with(mut command: Command, other: &Command) -> Finished {
    command.arg(other.get_program()).args(other.get_args());
    for (name, value) in other.get_envs() {
        command.env(name, value.unwrap());
    }
    Running::start(&mut command).finish()
}

fn run(words: &[&str]) -> Command {
    let mut command = Session::prepared().command(["run", "--rm"]);
    command.args(words).args([BASE, "echo", "said"]);
    command
}

/// A /dev with these nodes of the host's only.
fn devices(nodes: &str) -> String {
    format!(
        "mount -t tmpfs -o mode=755 devices /mnt; cd /dev
        cp -a --parents null zero full random urandom tty {nodes} /mnt
        ln -s /proc/self/fd /mnt/fd; ln -s fd/0 /mnt/stdin; mount --move /mnt /dev; cd /"
    )
}

/// docs/hostile.md 26: no KVM, and one that is not this user's.
#[test]
fn hostile_26_a_host_without_kvm_is_told() {
    with(after(&devices("net/tun")), &run(&[])).exits(125).complains(&["/dev/kvm", "No such file"]);
    let nothing = after("mount --bind /dev/null /dev/kvm");
    with(nothing, &run(&[])).exits(125).complains(&["/dev/kvm"]);
    let user = User::with_kvm();
    let words = ["run", "--rm", "--network", "none", "--unconfined", "cgroup", BASE, "true"];
    let of_root = after(&format!("{}; chmod 600 /dev/kvm", devices("kvm")));
    with(of_root, &user.command(&words)).exits(125).complains(&[
        "/dev/kvm",
        "Permission denied",
        "may this user",
    ]);
}

/// docs/hostile.md 26: no TUN driver.
#[test]
fn hostile_26_a_host_without_tun_is_told() {
    let help = ["/dev/net/tun", "modprobe tun", "--network none"];
    with(after(&devices("kvm")), &run(&[])).exits(125).complains(&help);
    let nothing = after("mount --bind /dev/null /dev/net/tun");
    with(nothing, &run(&[])).exits(125).complains(&["modprobe tun", "--network none"]);
    with(after(&devices("kvm")), &run(&["--network", "none"])).exits(0).prints("said\n");
}

/// docs/hostile.md 26: no nft, and one that refuses: what it says is not lost, and not by itself.
#[test]
fn hostile_26_a_host_without_nft_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let nft = folder.path().join("nft");
    fs::write(&nft, "#!/bin/sh\necho rules >&2\necho 'Error: not today' >&2\nexit 1\n").unwrap();
    fs::set_permissions(&nft, fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap();
    let run = |path: &str| {
        // Where no rules are yet.
        let mut command = Command::new("unshare");
        command.args(["--net", "env"]).arg(format!("PATH={path}")).stdin(Stdio::null());
        with(command, &run(&[])).exits(125)
    };
    run(&format!("{}:{path}", folder.path().display())).complains(&["NAT rules", "not today"]);
    let own = path.split(':').find(|folder| Path::new(folder).join("vmrun").exists()).unwrap();
    run(own).complains(&["cannot run nft", "install nftables", "--network none"]);
}

/// docs/hostile.md 26: user namespaces are switched off.
#[test]
fn hostile_26_a_host_without_user_namespaces_is_told() {
    let user = User::with_kvm();
    // The limit is a user namespace's own, so that the host's is left alone.
    let limited = || {
        let id = e2e::user::UID.to_string();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--inh-caps=-all", "--"]);
        command.args(["unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-ec"]);
        let script = "echo 0 >/proc/sys/user/max_user_namespaces
            exec setpriv --ambient-caps=-all --inh-caps=-all \"$@\"";
        command.args([script, "sh"]).stdin(Stdio::null());
        command
    };
    let run = |without: &[&str]| {
        let mut words = vec!["run", "--rm", "--network", "none", "--unconfined", "cgroup"];
        words.extend(without);
        words.extend([BASE, "echo", "said"]);
        user.own(&words)
    };
    with(limited(), &run(&[]))
        .exits(125)
        .complains(&["user.max_user_namespaces", "--unconfined namespaces"]);
    let without = run(&["--unconfined", "namespaces"]);
    with(limited(), &without).exits(0).prints("said\n");
}

/// docs/hostile.md 26: cgroups of version 1 only.
#[test]
fn hostile_26_a_host_with_cgroups_of_version_1_is_told() {
    let legacy = "umount /sys/fs/cgroup; mount -t cgroup -o none,name=legacy cgroup /sys/fs/cgroup";
    let help = ["cgroup v2", "not mounted", "--unconfined cgroup"];
    with(after(legacy), &run(&[])).exits(125).complains(&help);
    with(after(legacy), &run(&["--unconfined", "cgroup"])).exits(0).prints("said\n");
}

#[test]
fn kernels_and_platforms_that_are_not_there_are_told() {
    let session = Session::prepared();
    let mut command = session.command(["run", "--rm", "--kernel", "/no/such/kernel", BASE, "true"]);
    Running::start(&mut command).finish().exits(125).complains(&["/no/such/kernel"]);
    session
        .vmrun(["run", "--platform", "linux/arm64", BASE, "true"])
        .exits(125)
        .complains(&["linux/arm64"]);
}

/// docs/hostile.md 26: few descriptors, for the command and what it starts.
#[test]
fn hostile_26_few_descriptors_are_told() {
    let words = run(&["-m", "64m"]);
    let refused = until_enough(|mut limited| {
        limited.arg(words.get_program()).args(words.get_args());
        for (name, value) in words.get_envs() {
            limited.env(name, value.unwrap());
        }
        let done = Running::start(&mut limited).finish();
        let is_refused = done.status.code() == Some(125);
        match is_refused {
            true => drop(done.complains(&["Too many open files"])),
            false => drop(done.exits(0).prints("said\n")),
        }
        is_refused
    });
    assert!(refused > 4, "{refused}");
}

/// docs/hostile.md 26: a monitor that cannot let in any more goes on, and lets in again later.
#[test]
fn hostile_26_a_monitor_without_descriptors_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let script = "i=0; while :; do i=$((i+1)); echo \"turn $i\"; $b sleep 0.1; done\n";
    let initrd = guest::initramfs(folder.path(), script);
    fs::write(path("log"), "").unwrap();
    let mut command = Command::new("prlimit");
    command.args(["--nofile=64:64", "vmrun-vmm", "--level", "Warn", "--log-path"]);
    command.arg(path("log")).arg("--api-sock").arg(path("api"));
    let process = Running::start(command.stdin(Stdio::null()));
    let since = Instant::now();
    while !path("api").exists() {
        assert!(since.elapsed() < Duration::from_secs(60), "no API socket");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut vmm = Vmm::over(&path("api"), process);
    vmm.done("PUT", "/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 128 }));
    let source = guest::boot_source(&initrd);
    vmm.done("PUT", "/boot-source", &source);
    vmm.done("PUT", "/vsock", &json!({ "guest_cid": 3, "uds_path": path("v") }));
    vmm.done("PUT", "/actions", &json!({ "action_type": "InstanceStart" }));
    vmm.process.wait_for("turn 1\r\n");
    let crowd: Vec<_> = (0..160)
        .filter_map(|number| UnixStream::connect(path(["v", "api"][number % 2])).ok())
        .collect();
    assert!(crowd.len() > 100, "{}", crowd.len());
    let open = || fs::read_dir(format!("/proc/{}/fd", vmm.process.pid())).unwrap().count();
    while open() < 64 {
        assert!(since.elapsed() < Duration::from_secs(150), "{} descriptors", open());
    }
    let turns = vmm.process.stdout().matches("turn ").count();
    vmm.process.wait_for(&format!("turn {}\r\n", turns + 5));
    drop(crowd);
    assert_eq!(vmm.told("/")["state"], json!("Running"));
    vmm.process.signal(Signal::SIGTERM);
    vmm.process.finish().exits(143);
    let log = fs::read_to_string(path("log")).unwrap();
    assert!(log.contains("Too many open files") && log.len() < 16 << 10, "{log}");
}

/// docs/hostile.md 26: one that cannot even start for that says so.
#[test]
fn hostile_26_a_monitor_needs_descriptors_to_start() {
    let folder = tempfile::tempdir().unwrap();
    let initrd = guest::initramfs(folder.path(), "$b poweroff -f\n");
    let config = json!({
        "boot-source": {
            "kernel_image_path": guest::kernel(), "initrd_path": initrd, "boot_args": "reboot=k",
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
        "drives": [],
    });
    let file = folder.path().join("vm.json");
    fs::write(&file, config.to_string()).unwrap();
    let refused = until_enough(|mut limited| {
        limited.args(["vmrun-vmm", "--no-api", "--config-file"]).arg(&file);
        let done = Running::start(&mut limited).finish();
        let is_refused = done.status.code() == Some(1);
        match is_refused {
            true => drop(done.complains(&["vmrun-vmm: ", "Too many open files"])),
            false => drop(done.exits(0)),
        }
        is_refused
    });
    assert!(refused > 8, "{refused}");
}

/// Has something tried with more and more descriptors, as long as that is refused; how often it was.
fn until_enough(mut is_refused: impl FnMut(Command) -> bool) -> usize {
    let limits = 4..64;
    let attempt = |limit: &usize| {
        let mut limited = Command::new("prlimit");
        limited.arg(format!("--nofile={limit}:{limit}")).stdin(Stdio::null());
        is_refused(limited)
    };
    limits.take_while(attempt).count()
}
