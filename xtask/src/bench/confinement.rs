//! What confinement costs: the same commands with the whole jail, without the filters of system calls,
//! and without either.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::measure::{Lab, first_line, lines, middle, milliseconds};

/// What stays, and the parts that are left out.
const CONFINEMENTS: [(&str, &str); 3] = [
    ("confined", ""),
    ("without filters of system calls", "seccomp"),
    ("without jail and filters", "cgroup,namespaces,landlock,seccomp"),
];

/// Files that are written and flushed one by one: requests that each wake the event loop.
const FLUSHES: &str = "echo begin; i=0; while [ $i -lt 100 ]; do i=$((i+1)); \
    dd if=/dev/zero of=/data bs=4k count=1 conv=fsync 2>/dev/null; done; echo end";

/// Boots, flushes and conversions, each way.
pub fn measure(lab: &Lab, put: &mut impl FnMut(&str, &str, f64, &str)) -> Result<()> {
    for (kept, parts) in CONFINEMENTS {
        eprintln!("measure: {kept}");
        let without_parts = |mut vmrun: Command| {
            if !parts.is_empty() {
                vmrun.env("VMRUN_UNCONFINED", parts);
            }
            vmrun
        };
        let mut put = |what: &str, time: Duration| {
            put("vmrun", &format!("{what}, {kept}"), milliseconds(time), "ms");
        };
        let run = |words: &[&str]| {
            let mut run = without_parts(lab.vmrun_run());
            run.args(["--network", "none", &lab.image]).args(words);
            run
        };
        put("vmrun run to the first byte", middle(|| first_line(run(&["echo", "x"])))?);
        let flushes = middle(|| {
            let times = lines(run(&["sh", "-c", FLUSHES]))?;
            let [begin, end] = times[..] else { bail!("what was to be flushed was not") };
            Ok(end - begin)
        })?;
        put("100 files of 4 KiB written and flushed", flushes);
        let root = lab.work.join("converted");
        let pull = middle(|| {
            let _ = fs::remove_dir_all(&root);
            let mut pull = without_parts(lab.vmrun(&["image", "pull", "-q", &lab.archive]));
            pull.env("VMRUN_ROOT", &root).stdout(Stdio::null());
            let started = Instant::now();
            let status = pull.status()?;
            ensure!(status.success(), "vmrun image pull: {status}");
            Ok(started.elapsed())
        })?;
        put("vmrun image pull of busybox", pull);
    }
    Ok(())
}
