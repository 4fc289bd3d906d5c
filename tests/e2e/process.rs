//! What the image's process sees, and what its end says.

use std::fmt::Write as _;
use std::process::Stdio;

use e2e::{Running, Session};
use nix::sys::signal::Signal;

const BASE: &str = "localhost/base";

#[test]
fn the_guest_has_a_kernel_of_its_own() {
    let session = Session::prepared();
    let host = nix::sys::utsname::uname().unwrap();
    let done = session.run([BASE, "sh", "-c", "uname -r; cat /etc/os-release"]).exits(0);
    let lines: Vec<_> = done.out().lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert_ne!(lines[0], host.release().to_string_lossy());
    assert_eq!(lines[1], "NAME=e2e");
}

#[test]
fn an_image_name_alone_is_run() {
    let session = Session::prepared();
    session.vmrun([BASE, "echo", "short"]).exits(0).prints("short\n");
    session.vmrun(["--rm", BASE, "echo", "flags first"]).exits(0).prints("flags first\n");
}

#[test]
fn entrypoint_and_cmd_combine_as_docker_has_them() {
    let session = Session::prepared();
    let args = "localhost/args";
    session.run([args]).exits(0).prints("entry from-cmd\n");
    session.run([args, "mine", "two"]).exits(0).prints("entry mine two\n");
    session.run(["--entrypoint", "/bin/printf", args, "%s.", "a b", "c"]).exits(0).prints("a b.c.");
    // An entrypoint of one's own drops the image's CMD too.
    session.run(["--entrypoint", "/bin/echo", args]).exits(0).prints("\n");
    session.run(["--entrypoint", "", args, "/bin/echo", "bare"]).exits(0).prints("bare\n");
}

#[test]
fn user_workdir_and_environment_come_from_the_image() {
    let session = Session::prepared();
    session
        .run(["localhost/user"])
        .exits(0)
        .prints("1000\n1000\n1000 2000\n/home/app/made/here\n1 two words\n/home/app\n");
}

#[test]
fn user_workdir_and_environment_can_be_given() {
    let session = Session::prepared();
    let done = session.run([
        "-u",
        "1000:2000",
        "-w",
        "/tmp/new",
        "-e",
        "A=b=c",
        "-e",
        "EMPTY=",
        "--hostname",
        "box",
        BASE,
        "sh",
        "-c",
        "id -u; id -g; pwd; echo $A; env | grep ^EMPTY; hostname; cat /etc/hostname",
    ]);
    done.exits(0).prints("1000\n2000\n/tmp/new\nb=c\nEMPTY=\nbox\nbox\n");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "# comment\nFROM_FILE=yes\n\nTAKEN\n").unwrap();
    let mut command = session.command(["run", "--rm", "--env-file"]);
    command
        .arg(file.path())
        .args([BASE, "sh", "-c", "echo $FROM_FILE $TAKEN"])
        .env("TAKEN", "host");
    Running::start(&mut command).finish().exits(0).prints("yes host\n");
}

#[test]
fn output_and_error_are_apart_and_the_status_is_the_process_s() {
    let session = Session::prepared();
    let done = session.run([BASE, "sh", "-c", "echo out; echo err >&2; exit 42"]).exits(42);
    assert_eq!((done.out().as_str(), done.err().as_str()), ("out\n", "err\n"));
    // A process that a signal ended.
    session.run([BASE, "sh", "-c", "sh -c 'kill -9 $$'; echo $?"]).exits(0).prints("137\n");
}

#[test]
fn a_program_that_cannot_run_ends_with_dockers_statuses() {
    let session = Session::prepared();
    session.run([BASE, "no-such-program"]).exits(127).complains(&["no-such-program", "not found"]);
    session.run([BASE, "/usr/bin/plain-file"]).exits(126).complains(&["/usr/bin/plain-file"]);
    session.run([BASE, "/usr/bin/bad-format"]).exits(126).complains(&["/usr/bin/bad-format"]);
    session.run([BASE, "/data"]).exits(126).complains(&["/data"]);
    session.run(["-u", "nobody-here", BASE, "true"]).exits(125).complains(&["nobody-here"]);
    session.run(["--no-such-flag", BASE]).exits(125);
}

#[test]
fn standard_input_arrives_only_when_asked_for() {
    let session = Session::prepared();
    let mut command = session.command(["run", "--rm", "-i", BASE, "cat"]);
    let mut running = Running::start(command.stdin(Stdio::piped()));
    running.write(b"line one\n");
    running.wait_for("line one\n");
    running.write(b"line two\n");
    running.finish().exits(0).prints("line one\nline two\n");

    let mut command = session.command(["run", "--rm", BASE, "cat"]);
    let mut running = Running::start(command.stdin(Stdio::piped()));
    running.write(b"not for you\n");
    running.finish().exits(0).prints("");
}

#[test]
fn a_hundred_megabytes_go_through_unchanged() {
    const SIZE: usize = 100 << 20;
    let session = Session::prepared();
    // No repetition that a lost, doubled or swapped block could hide in.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(SIZE);
    while bytes.len() < SIZE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("input");
    std::fs::write(&path, &bytes).unwrap();
    let mut command = session.command(["run", "--rm", "-i", BASE, "cat"]);
    command.stdin(std::fs::File::open(&path).unwrap());
    let done = Running::start(&mut command).finish().exits(0);
    assert_eq!(done.stdout.len(), SIZE, "{}", done.err());
    assert!(done.stdout == bytes, "the bytes differ");
}

#[test]
fn signals_reach_the_process() {
    let session = Session::prepared();
    let script = "trap 'echo got TERM; exit 7' TERM; trap 'echo got INT; exit 8' INT; \
        trap 'echo got HUP' HUP; echo ready; while :; do sleep 1; done";
    let mut running = session.start([BASE, "sh", "-c", script]);
    running.wait_for("ready\n");
    running.signal(Signal::SIGHUP);
    running.wait_for("got HUP\n");
    running.signal(Signal::SIGTERM);
    running.finish().exits(7).prints("ready\ngot HUP\ngot TERM\n");

    let mut running = session.start([BASE, "sh", "-c", script]);
    running.wait_for("ready\n");
    running.signal(Signal::SIGINT);
    running.finish().exits(8).prints("ready\ngot INT\n");
}

#[test]
fn orphans_are_reaped_and_do_not_keep_the_machine() {
    let session = Session::prepared();
    // The shell goes; what it left behind still holds the output.
    session.run([BASE, "sh", "-c", "(sleep 600; echo late) & echo done"]).exits(0).prints("done\n");
}

#[test]
fn a_read_only_root_refuses_writes_and_a_tmpfs_takes_them() {
    let session = Session::prepared();
    let done = session.run(["--read-only", BASE, "sh", "-c", "echo x > /tmp/file"]).exits(1);
    assert!(done.err().contains("Read-only file system"), "{}", done.err());
    session
        .run([
            "--read-only",
            "--tmpfs",
            "/tmp:size=1m",
            BASE,
            "sh",
            "-c",
            "echo x > /tmp/file && cat /tmp/file; df -k /tmp | tail -n 1 | awk '{print $2}'",
        ])
        .exits(0)
        .prints("x\n1024\n");
}

#[test]
fn the_writable_layer_takes_all_kinds_of_changes() {
    let session = Session::prepared();
    let script = "set -e; echo changed > /data/greeting; cat /data/greeting; rm /etc/os-release; \
        test ! -e /etc/os-release; mkdir /data/new; mv /data/greeting /data/new/; \
        dd if=/dev/zero of=/big bs=1M count=64 2>/dev/null; stat -c %s /big; chown app /data; stat -c %U /data";
    session.run([BASE, "sh", "-c", script]).exits(0).prints("changed\n67108864\napp\n");
    // The image is as it was.
    session
        .run([BASE, "cat", "/data/greeting", "/etc/os-release"])
        .exits(0)
        .prints("hello\nNAME=e2e\n");
}

#[test]
fn a_named_volume_outlives_its_container() {
    let session = Session::prepared();
    let volume = format!("v{}", std::process::id());
    let mount = format!("{volume}:/data");
    session
        .run(["-v", &mount, BASE, "sh", "-c", "cat /data/greeting; echo kept > /data/file"])
        .exits(0)
        .prints("hello\n");
    session
        .run(["-v", &format!("{mount}:ro"), BASE, "cat", "/data/file"])
        .exits(0)
        .prints("kept\n");
    session.run(["-v", &format!("{mount}:ro"), BASE, "touch", "/data/file"]).exits(1);
    session.vmrun(["volume", "rm", &volume]).exits(0);
    session
        .run(["-v", "/etc:/host", BASE, "true"])
        .exits(125)
        .complains(&["/etc", "shared director"]);
}

#[test]
fn four_cpus_are_seen_and_used() {
    let session = Session::prepared();
    let mut script = String::from("nproc; grep -c ^processor /proc/cpuinfo;");
    for cpu in 0..4 {
        write!(
            script,
            "taskset -c {cpu} sh -c 'i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done; echo cpu' &"
        )
        .unwrap();
    }
    script.push_str("wait");
    session
        .run(["--cpus", "4", BASE, "sh", "-c", &script])
        .exits(0)
        .prints("4\n4\ncpu\ncpu\ncpu\ncpu\n");
}

#[test]
fn memory_is_as_asked_and_its_end_is_told() {
    let session = Session::prepared();
    let done =
        session.run(["-m", "256m", BASE, "awk", "/MemTotal/ {print $2}", "/proc/meminfo"]).exits(0);
    let total: u64 = done.out().trim().parse().unwrap();
    assert!((180_000..=262_144).contains(&total), "{total} KiB");
    let done = session.run(["-m", "128m", BASE, "sh", "-c", "tail /dev/zero"]);
    done.exits(137);
}

#[test]
fn a_python_program_from_a_real_distribution_runs() {
    let session = Session::prepared();
    let program = "import sys, os, threading, tempfile, subprocess\n\
        t = [threading.Thread(target=lambda: sum(range(10000))) for _ in range(8)]\n\
        [x.start() for x in t]; [x.join() for x in t]\n\
        f = tempfile.TemporaryFile(); f.write(b'x' * 100000); f.flush()\n\
        print(os.getpid(), sys.argv[1:], subprocess.run(['cat', '/etc/debian_version'], capture_output=True).stdout.startswith(b'12'))\n";
    session
        .run(["localhost/debian", "python3", "-c", program, "a", "b c"])
        .exits(0)
        .prints("1 ['a', 'b c'] True\n");
}

#[test]
fn file_capabilities_and_setuid_bits_work() {
    let session = Session::prepared();
    let done = session.run([
        "localhost/debian",
        "sh",
        "-c",
        "stat -c '%a %U' /usr/bin/su; ls -ln /etc/shadow",
    ]);
    let out = done.exits(0).out();
    assert!(out.starts_with("4755 root\n") && out.contains(" 0 42 "), "{out}");
}

#[test]
fn layers_merge_as_the_tools_that_made_them_say() {
    let session = Session::prepared();
    let script = "cd /l; find . | sort; cat replaced kept/a opaque/new file-to-dir/in dir-to-file link; \
        stat -c '%a %u %g %h %F' replaced kept/a hard-b fifo; stat -c %Y kept/a";
    session.run(["localhost/layers", "sh", "-c", script]).exits(0).prints(
        ".\n./dir-to-file\n./fifo\n./file-to-dir\n./file-to-dir/in\n./hard-b\n./kept\n./kept/a\n./link\n./opaque\n\
         ./opaque/new\n./replaced\nsecond\n1\n2\nin\nfile\n1\n\
         4755 0 0 1 regular file\n644 12 34 1 regular file\n644 0 0 1 regular file\n644 0 0 1 fifo\n\
         981173106\n",
    );
}

#[test]
fn mounts_devices_and_limits_are_those_of_a_container() {
    let session = Session::prepared();
    let script = "for f in /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/ptmx; do test -c $f || echo no $f; done; \
        echo x > /dev/shm/x; cat /dev/shm/x; test -d /dev/mqueue && mount | grep -oE 'on /(proc|sys|dev|dev/pts|dev/shm|dev/mqueue|sys/fs/cgroup) ' | sort -u | wc -l; \
        echo to-stdout > /dev/stdout; echo $$; ulimit -n";
    let done = session.run(["--ulimit", "nofile=1234", BASE, "sh", "-c", script]).exits(0);
    assert_eq!(done.out(), "x\n7\nto-stdout\n1\n1234\n", "{}", done.err());
}
