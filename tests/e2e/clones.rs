//! Snapshots, and machines made of them.

use std::collections::HashSet;
use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use e2e::{Running, Session};
use nix::sys::signal::Signal;

const BASE: &str = "localhost/base";

/// A snapshot for one test, removed at its end.
struct Made<'a> {
    session: &'a Session,
    name: &'static str,
}

impl<'a> Made<'a> {
    fn warm(session: &'a Session, name: &'static str, flags: &[&str], image: &str) -> Made<'a> {
        let mut words = vec!["snapshot", "create", "--warm"];
        words.extend(flags);
        words.extend([image, name]);
        session.vmrun(words).exits(0).prints(&format!("{name}\n"));
        Made { session, name }
    }

    fn of(session: &'a Session, container: &str, name: &'static str) -> Made<'a> {
        session.vmrun(["snapshot", "create", container, name]).exits(0);
        Made { session, name }
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        let _ = self.session.vmrun(["snapshot", "rm", self.name]);
    }
}

#[test]
fn a_warm_snapshot_runs_commands() {
    let session = Session::prepared();
    let made = Made::warm(&session, "warm-run", &["--network", "none"], BASE);
    session.run(["--from", made.name, "echo", "-n", "hello"]).exits(0).prints("hello");
    session.run(["--from", made.name, "sh", "-c", "exit 7"]).exits(7);
    let mut command = session.command(["run", "--rm", "-i", "--from", made.name, "-e", "A=b"]);
    command.args(["-w", "/tmp", "sh", "-c", "echo $A; pwd; cat"]).stdin(Stdio::piped());
    let mut running = Running::start(&mut command);
    running.write(b"typed\n");
    running.finish().exits(0).prints("b\n/tmp\ntyped\n");
    // Twice: neither sees what the other wrote.
    for _ in 0..2 {
        let script = "cat /own 2>/dev/null; echo mine >/own; cat /own";
        session.run(["--from", made.name, "sh", "-c", script]).exits(0).prints("mine\n");
    }
    session
        .run(["--from", made.name, "--memory", "1g", "true"])
        .exits(125)
        .complains(&["--memory", made.name]);
}

#[test]
fn snapshots_are_listed_and_removed_and_what_is_wrong_with_one_is_said() {
    let session = Session::prepared();
    let made = Made::warm(&session, "warm-list", &["--network", "none"], BASE);
    let listed = session.vmrun(["snapshot", "ls"]).exits(0).out();
    assert!(listed.contains("warm-list") && listed.contains(BASE), "{listed}");
    let again = ["snapshot", "create", "--warm", BASE, made.name];
    session.vmrun(again).exits(125).complains(&["exists already"]);
    session.run(["--from", "none-such", "true"]).exits(125).complains(&["no such snapshot"]);
    session.vmrun(["snapshot", "create", "none-such", "some"]).exits(125).complains(&["none-such"]);

    let memory = session.root().join("snapshots/warm-list/memory");
    let size = fs::metadata(&memory).unwrap().len();
    fs::File::options().write(true).open(&memory).unwrap().set_len(size - 1).unwrap();
    session.run(["--from", made.name, "true"]).exits(125).complains(&["damaged", "memory"]);
    fs::File::options().write(true).open(&memory).unwrap().set_len(size).unwrap();
    let state = session.root().join("snapshots/warm-list/state");
    let mut bytes = fs::read(&state).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&state, bytes).unwrap();
    session.run(["--from", made.name, "true"]).exits(125).complains(&["damaged", "state"]);

    session.vmrun(["snapshot", "rm", made.name]).exits(0).prints("warm-list\n");
    session.vmrun(["snapshot", "rm", made.name]).exits(125).complains(&["no such snapshot"]);
    let left = fs::read_dir(session.root().join("snapshots")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("warm-list")), "{left:?}");
}

/// Counts, and says what tells its machine from others. By builtins: programs take long in the lab.
const PROGRAM: &str = r#"
i=0; while :; do
    i=$((i + 1)); read host </proc/sys/kernel/hostname; read id </etc/machine-id
    while read first rest; do address=$first; done </etc/hosts
    echo "$i $host $address ${id:-none}"; sleep 0.2
done"#;

/// The words of the last whole line.
fn last_line(running: &Running) -> Vec<String> {
    let out = running.stdout();
    let whole = out.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().last().unwrap_or_default().split(' ').map(str::to_owned).collect()
}

#[test]
fn a_running_container_goes_on_and_so_does_its_copy() {
    let session = Session::prepared();
    let mut original = session.start(["--name", "counting", BASE, "sh", "-c", PROGRAM]);
    original.wait_for("\n3 ");
    let made = Made::of(&session, "counting", "counted");
    let at = |running: &Running| last_line(running)[0].parse::<usize>().unwrap();
    let next = format!("\n{} ", at(&original) + 5);
    let mut copies = [0, 1].map(|_| session.start(["--from", made.name]));
    for running in copies.iter_mut().chain([&mut original]) {
        running.wait_for(&next);
    }
    let lines = [&original, &copies[0], &copies[1]].map(last_line);
    for (index, what) in ["host name", "address", "machine id"].iter().enumerate() {
        let values: HashSet<_> = lines.iter().map(|line| line[index + 1].as_str()).collect();
        assert_eq!(values.len(), 3, "{what}: {lines:?}");
    }
    for copy in copies {
        let first: usize = copy.stdout().split(' ').next().unwrap().parse().unwrap();
        assert!(first > 2, "{first}: it began anew");
        // It ends alone.
        copy.signal(Signal::SIGKILL);
        copy.finish();
    }
    let next = format!("\n{} ", at(&original) + 3);
    original.wait_for(&next);
    let error = session.run(["--from", made.name, "sh"]).exits(125);
    error.complains(&["counted", "a process runs"]);
    original.signal(Signal::SIGKILL);
    original.finish();
}

/// The bytes of memory that these processes have alone, and their share of what they have with
/// others.
fn pss(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).unwrap_or(0)
}

/// The VMMs of this session's containers.
fn vmms(session: &Session) -> Vec<i32> {
    let root = session.root().to_string_lossy().into_owned();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.contains("vmrun-vmm") && line.contains(&root) && line.contains("--level")
    })
    .collect()
}

#[test]
fn ten_clones_at_once_are_ten_machines() {
    const COUNT: usize = 10;
    let session = Session::prepared();
    let made = Made::warm(&session, "warm-ten", &["-m", "128m"], BASE);
    let script = r#"
echo "host $(hostname)"
echo "address $(ip -4 addr show eth0 | sed -n 's/.*inet \([^/]*\).*/\1/p')"
echo "mac $(cat /sys/class/net/eth0/address)"
echo "id $(cat /etc/machine-id)"
echo "random $(od -An -tx1 -N16 /dev/urandom)"
hostname >/written
echo "disk $(cat /written)"
echo ready
sleep 1000"#;
    let since = Instant::now();
    let count = COUNT.to_string();
    let words = ["clone", "-n", &count, made.name, "sh", "-c", script];
    let mut clones = Running::start(&mut session.command(words));
    let deadline = Instant::now() + Duration::from_secs(150);
    while clones.stdout().matches("| ready\n").count() < COUNT && Instant::now() < deadline {
        clones.wait_for("");
        std::thread::sleep(Duration::from_millis(20));
    }
    let out = clones.stdout();
    eprintln!("{COUNT} clones after {} ms", since.elapsed().as_millis());
    let different = |what: &str| {
        let marker = format!("| {what} ");
        let values: Vec<_> = out.lines().filter_map(|line| line.split_once(&marker)).collect();
        let distinct: HashSet<_> = values.iter().map(|(_, value)| value.trim()).collect();
        assert_eq!((values.len(), distinct.len()), (COUNT, COUNT), "{what}: {out}");
        assert!(!distinct.contains(""), "{what}: {out}");
    };
    for what in ["host", "address", "mac", "id", "random", "disk"] {
        different(what);
    }
    let ids: Vec<_> = out.lines().filter(|line| line.len() == 12).collect();
    assert_eq!(ids.len(), COUNT, "{out}");
    let listed = session.vmrun(["ps", "-q"]).out();
    assert!(ids.iter().all(|id| listed.contains(id)), "{listed}");

    let machines = vmms(&session);
    assert_eq!(machines.len(), COUNT);
    let each: Vec<_> = machines.iter().map(|pid| pss(*pid)).collect();
    let alone = machines.iter().map(|pid| {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap().to_owned();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    });
    let (shared, alone) = (each.iter().sum::<u64>(), alone.sum::<u64>());
    eprintln!("{COUNT} clones: {shared} KiB together, {alone} KiB if nothing were shared");
    assert!(shared < alone * 2 / 3, "{shared} KiB of {alone} KiB");

    clones.signal(Signal::SIGINT);
    clones.finish().exits(130);
    assert_eq!(vmms(&session).len(), 0);
}
