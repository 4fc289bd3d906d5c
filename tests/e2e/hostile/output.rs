//! Output that nobody reads, seen from the host's memory.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use e2e::{Running, Session};

/// Pieces that the program writes, and what of them may be on the way to who does not read.
const FLOOD: u64 = 512;
const ON_THE_WAY: u64 = FLOOD / 4;
/// Bytes of each.
const PIECE: u64 = 64 << 10;

/// Bytes of its own that a process has in memory.
fn own(process: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// docs/hostile.md 15: a program whose output is not read waits, in the guest. What it writes is neither
/// in the monitor nor in the command, its other output arrives meanwhile, and all of it does at last.
#[test]
fn hostile_15_output_that_nobody_reads_waits_in_the_guest() {
    let session = Session::prepared();
    let (mut unread, output) = std::io::pipe().unwrap();
    let script = format!(
        "(while :; do echo tick >&2; sleep 0.2; done) & i=0
        while [ $i -lt {FLOOD} ]; do
            head -c {PIECE} /dev/zero || exit 3
            i=$((i+1)); echo written >&2
        done; echo all written >&2"
    );
    // Standard error to where the harness collects, and standard output to where nobody does.
    let vmrun = "exec vmrun run --rm -m 128m --network none localhost/base sh -c \"$0\" \
        3>&1 1>&0 2>&3 3>&- </dev/null";
    let mut command = Command::new("sh");
    command.env("VMRUN_ROOT", session.root()).stdin(Stdio::from(output));
    let mut run = Running::start(command.args(["-c", vmrun, &script]));
    drop(command);
    // It stands still once so many ticks come without a word between them.
    run.wait_for("written\n");
    run.wait_for(&"tick\n".repeat(10));
    let written = |run: &Running| run.stdout().matches("written\n").count() as u64;
    let before = written(&run);
    assert!(before < ON_THE_WAY, "{before} pieces that nobody reads");
    let children = Command::new("pgrep").args(["-P", &run.pid().to_string()]).output().unwrap();
    let children = String::from_utf8_lossy(&children.stdout).into_owned();
    for process in children.lines().chain([run.pid().to_string().as_str()]) {
        assert!(own(process) < FLOOD * PIECE / 2, "{} in {process} of {children:?}", own(process));
    }

    let mut total = 0;
    let mut buffer = vec![0; 1 << 20];
    while let count @ 1.. = unread.read(&mut buffer).unwrap() {
        assert!(buffer[..count].iter().all(|byte| *byte == 0));
        total += count as u64;
    }
    assert_eq!(total, FLOOD * PIECE);
    run.wait_for("all written\n");
    assert!(before < written(&run));
    run.finish().exits(0);
}
