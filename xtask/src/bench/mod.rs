//! `cargo xtask bench`: figures in counted instructions, the same on every machine.
//!
//! The lab counts each executed instruction as a nanosecond, whatever else the machine does. It does
//! not see cache misses, nor what a real exit to the host costs.

mod measure;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::command::{output, run, target};
use crate::{build, kernel, lab};

pub use measure::Arguments as MeasureArguments;
pub use measure::measure;

#[derive(clap::Args)]
pub struct Arguments {
    /// Only what is measured under this name: init, output, output-network, memory
    name: Option<String>,
}

/// Runs the benchmarks and prints their table.
pub fn bench(arguments: &Arguments) -> Result<()> {
    build::build()?;
    let folder = target().join("bench");
    fs::create_dir_all(&folder)?;
    let root = folder.join("root");
    prepare(&root)?;
    let mut kernels = Vec::new();
    if let Some(path) = kernel::cached(false)? {
        kernels.push(("built", import(&root, &path)?));
    }
    kernels.push(("Debian cloud", import(&root, &kernel::debian_cloud()?)?));

    let mut table = String::from("| figure | kernel | value |\n| --- | --- | ---: |\n");
    for (name, kernel) in kernels {
        let result = folder.join("result");
        let _ = fs::remove_file(&result);
        let text = |path: &Path| path.display().to_string();
        let own = std::env::current_exe()?;
        let mut command = vec![
            text(&own),
            "measure".to_owned(),
            "--root".to_owned(),
            text(&root),
            "--kernel".to_owned(),
            kernel,
            "--dist".to_owned(),
            text(&build::dist()),
            "--result".to_owned(),
            text(&result),
        ];
        command.extend(arguments.name.clone());
        let lab = lab::Arguments {
            rw: vec![folder.clone()],
            count: true,
            timeout: 900,
            ..lab::Arguments::new(command)
        };
        let status = lab::run(&lab)?;
        ensure!(status == 0, "the measurement ended with status {status}");
        for line in fs::read_to_string(&result).context("the measurement left no result")?.lines() {
            let (what, value) = line.split_once(": ").unwrap_or((line, ""));
            let _ = writeln!(table, "| {what} | {name} | {value} |");
        }
    }
    fs::write(folder.join("table.md"), &table)?;
    println!("{table}");
    Ok(())
}

/// A state directory with one small image, as the end-to-end tests have it.
fn prepare(root: &Path) -> Result<()> {
    let archive = target().join("e2e/assets/base.oci.tar");
    ensure!(archive.exists(), "there is no image to run: cargo xtask test --e2e makes it");
    run(Command::new(build::dist().join("vmrun"))
        .args(["image", "pull", "-q"])
        .arg(format!("oci-archive:{}", archive.display()))
        .env("VMRUN_ROOT", root)
        .stdout(std::io::stderr()))
}

/// Imports a kernel; its name.
fn import(root: &Path, path: &PathBuf) -> Result<String> {
    let mut vmrun = Command::new(build::dist().join("vmrun"));
    let name = output(vmrun.args(["kernel", "import"]).arg(path).env("VMRUN_ROOT", root))?;
    Ok(name.trim().to_owned())
}
