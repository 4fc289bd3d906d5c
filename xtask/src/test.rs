//! `cargo xtask test`: everything, in the order in which it fails fastest.

use std::fs;
use std::io::Seek;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::command::{cargo, run, target};
use crate::{build, debian, kernel, lab, supply, syscalls};

/// Tools that unit tests use beside the lab's.
const UNIT_TOOLS: [&str; 8] = [
    "e2fsprogs",
    "erofs-utils",
    "iproute2",
    "nftables",
    "skopeo",
    "docker-registry",
    "apache2-utils",
    "zstd",
];
/// Tools that make the end-to-end tests' images.
const IMAGE_TOOLS: [&str; 9] = [
    "buildah",
    "curl",
    "iputils-ping",
    "umoci",
    "mmdebstrap",
    "busybox-static",
    "procps",
    "util-linux",
    "libcap2-bin",
];

/// The end-to-end tests, each group on a machine of its own; those that take longest first.
const GROUPS: [&str; 13] = [
    "process::",
    "faults::",
    "snapshots::",
    "clones::",
    "images::",
    "rootfs::",
    "hostile::",
    "monitor::",
    "jail::",
    "api::",
    "terminal::",
    "network::",
    PCI,
];
/// The group that needs a guest kernel with PCI.
const PCI: &str = "pci::";
/// Statuses of a machine that died, or in which time stood still.
const LOST: [i32; 2] = [lab::FAILURE as i32, lab::TIMED_OUT as i32];
/// How often a machine may die under a group before that counts as a failure.
const MACHINES: u32 = 3;

#[derive(clap::Args)]
pub struct Arguments {
    /// Only formatting, lints and unit tests
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,
    /// Only the end-to-end tests whose names contain this; all of them without a value
    #[arg(long, num_args = 0..=1, default_missing_value = "", value_name = "FILTER")]
    e2e: Option<String>,
}

/// Runs the tests.
pub fn test(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let mut passed = 0;
    if arguments.e2e.is_none() {
        debian::install(&UNIT_TOOLS)?;
        step("format", || {
            run(cargo().args(["fmt", "--all", "--check"]))?;
            run(cargo().args(["fmt", "--check", "--manifest-path", build::ATTACKER]))
        })?;
        step("lints", || {
            run(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
            // Not among all targets, since a plain `cargo test` must not run it.
            run(cargo().args(["clippy", "-p", "e2e", "--test", "e2e", "--", "-D", "warnings"]))?;
            supply::check()?;
            let attacker = ["clippy", "--manifest-path", build::ATTACKER, "--", "-D", "warnings"];
            run(cargo().args(attacker))
        })?;
        step("unit tests", || run(cargo().args(["test", "--workspace"])))?;
        passed += 3;
    }
    if !arguments.unit {
        debian::install(&UNIT_TOOLS)?;
        debian::install(&IMAGE_TOOLS)?;
        step("build", build::build)?;
        let assets = step("images", prepare)?;
        let filter = arguments.e2e.as_deref().unwrap_or_default();
        step("end-to-end tests", || end_to_end(&assets, filter))?;
        passed += 3;
    }
    eprintln!("xtask: all done in {} s", started.elapsed().as_secs());
    println!("xtask: {passed} passed, 0 failed");
    Ok(())
}

fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    eprintln!("xtask: {name}");
    let result = work().with_context(|| format!("{name} failed"))?;
    eprintln!("xtask: {name}: {} s", started.elapsed().as_secs());
    Ok(result)
}

/// Makes images and a state directory on the host.
fn prepare() -> Result<PathBuf> {
    let folder = target().join("e2e/assets");
    fs::create_dir_all(&folder)?;
    build::build_static("release", "e2e", "guest-stream", &folder)?;
    build::build_attacker(&folder)?;
    run(cargo()
        .args(["run", "--quiet", "-p", "e2e", "--bin", "prepare", "--"])
        .arg("--vmrun")
        .arg(build::dist().join("vmrun"))
        .arg("--kernel")
        .arg(kernel::guest()?)
        .arg("--bzimage")
        .arg(kernel::debian_bzimage()?)
        .arg(&folder))?;
    Ok(folder)
}

/// The test program, built now.
fn test_program() -> Result<PathBuf> {
    let output = cargo()
        .args(["test", "-p", "e2e", "--test", "e2e", "--no-run", "--message-format=json"])
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the end-to-end tests do not compile");
    for line in output.stdout.split(|byte| *byte == b'\n') {
        let Ok(message) = serde_json::from_slice::<serde_json::Value>(line) else { continue };
        if message["target"]["name"] == "e2e"
            && let Some(program) = message["executable"].as_str()
        {
            return Ok(program.into());
        }
    }
    bail!("cargo named no test program")
}

/// Runs the groups, two at a time where each has a machine of its own.
fn end_to_end(assets: &Path, filter: &str) -> Result<()> {
    let program = test_program()?;
    let machines = lab::needs_machine();
    if machines {
        eprintln!("xtask: this host's KVM cannot boot Linux: the tests run in the lab");
        // Two package managers at once are one too many.
        lab::prepare()?;
    }
    let mut groups = if filter.is_empty() { GROUPS.to_vec() } else { vec![filter] };
    if filter.is_empty() && kernel::cached(false)?.is_none() {
        eprintln!(
            "xtask: {PCI} is left out: the guest is Debian's kernel, whose driver for PCI is a module \
             that images do not need (cargo xtask kernel builds one that has it)"
        );
        groups.retain(|group| *group != PCI);
    }
    let counted = tempfile::tempdir()?;
    let at_once = if machines { thread::available_parallelism()?.get().min(2) } else { 1 };
    let (waiting, failed) = (Mutex::new(groups.iter()), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(group) = next else { return };
            if let Err(error) = run_group(&program, assets, group, counted.path()) {
                eprintln!("xtask: {error:#}");
                failed.lock().unwrap_or_else(PoisonError::into_inner).push(*group);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(work);
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    ensure!(failed.is_empty(), "not all passed of {}", failed.join(" "));
    // A part of the tests uses a part of the policy.
    if groups == GROUPS { syscalls::compare(counted.path()) } else { Ok(()) }
}

/// Runs the tests of a group in the lab, in a process of its own, and shows what they said. Which
/// system calls VMMs made is in a file of the folder then.
fn run_group(program: &Path, assets: &Path, group: &str, counted: &Path) -> Result<()> {
    let started = Instant::now();
    let recorder = syscalls::recorder(&counted.join(group.trim_end_matches(':')))?;
    for machine in 1..=MACHINES {
        let mut said = tempfile::tempfile()?;
        let status = Command::new(std::env::current_exe()?)
            .args(["lab", "--mem", "6144", "--timeout", "600", "--rw"])
            .arg(counted)
            .arg("--")
            .args(&recorder)
            .arg("env")
            .arg(format!("VMRUN_E2E_ASSETS={}", assets.display()))
            .arg(program)
            // Half of a test is waiting for a guest.
            .args(["--test-threads=2", group])
            .stdin(Stdio::null())
            .stdout(said.try_clone()?)
            .stderr(said.try_clone()?)
            .status()?;
        said.rewind()?;
        std::io::copy(&mut said, &mut std::io::stderr().lock())?;
        eprintln!("xtask: {group} {status}, {} s", started.elapsed().as_secs());
        match status.code() {
            Some(0) => return Ok(()),
            // An emulated machine that dies or stalls says nothing of the tests. They leave nothing
            // behind on it.
            Some(code) if machine < MACHINES && LOST.contains(&code) => {
                eprintln!("xtask: the lab's machine died; the tests of {group} begin again");
            }
            _ => bail!("the end-to-end tests of {group} ended with {status}"),
        }
    }
    Ok(())
}
