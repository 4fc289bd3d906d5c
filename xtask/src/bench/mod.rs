//! `cargo xtask bench`: figures in counted instructions, the same on every machine.
//!
//! The lab counts each executed instruction as a nanosecond, whatever else the machine does. It does
//! not see cache misses, nor what a real exit to the host costs.

mod api;
mod confinement;
mod measure;
mod monitor;
mod neighbour;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum as _;
use serde::{Deserialize, Serialize};

use crate::command::{output, run, target};
use crate::image::{self, Image};
use crate::{build, kernel, lab};

pub use measure::Arguments as MeasureArguments;
pub use measure::measure;

/// What can be measured.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    /// From exec of the monitor to the guest's init, with peers beside
    Init,
    /// Memory of the monitor and of its guest, with peers beside
    Memory,
    /// A monitor under its API: socket, snapshot, restore, with peers beside
    Snapshot,
    /// From `vmrun run --network none` to the program's first byte
    Output,
    /// The same with a network
    OutputNetwork,
    /// What the jail, the filters of system calls and the confined conversion cost
    Confinement,
    /// Throughput of a machine beside one that attacks
    Neighbour,
}

#[derive(clap::Args)]
pub struct Arguments {
    /// Only this
    name: Option<Name>,
}

/// One measured value.
#[derive(Serialize, Deserialize)]
struct Figure {
    monitor: String,
    what: String,
    #[serde(default)]
    kernel: String,
    value: f64,
    unit: String,
}

/// Runs the benchmarks, prints their table, and leaves `table.md` and `figures.json`.
pub fn bench(arguments: &Arguments) -> Result<()> {
    build::build()?;
    let folder = target().join("bench");
    fs::create_dir_all(&folder)?;
    let root = folder.join("root");
    let image = prepare(&root)?;
    let archive = image.source.strip_prefix("oci-archive:").context("no archive")?;
    build::build_attacker(&root)?;
    let mut kernels = Vec::new();
    match kernel::cached(false)? {
        Some(path) => kernels.push(("built", import(&root, &path)?)),
        None => eprintln!("xtask: there is no built kernel (cargo xtask kernel): without it"),
    }
    kernels.push(("Debian's cloud", import(&root, &kernel::debian_cloud()?)?));

    let mut figures = Vec::new();
    for (name, kernel) in kernels {
        let result = folder.join("result");
        let _ = fs::remove_file(&result);
        let text = |path: &Path| path.display().to_string();
        let mut command = vec![text(&std::env::current_exe()?), "measure".to_owned()];
        for (option, value) in [
            ("--root", text(&root)),
            ("--image", image.name.to_owned()),
            ("--archive", archive.to_owned()),
            ("--kernel", kernel),
            ("--dist", text(&build::dist())),
            ("--result", text(&result)),
        ] {
            command.extend([option.to_owned(), value]);
        }
        let wanted = arguments.name.and_then(|name| name.to_possible_value());
        command.extend(wanted.map(|name| name.get_name().to_owned()));
        let lab = lab::Arguments {
            rw: vec![folder.clone()],
            count: true,
            timeout: 900,
            ..lab::Arguments::new(command)
        };
        let status = lab::run(&lab)?;
        ensure!(status == 0, "the measurement ended with status {status}");
        let bytes = fs::read(&result).context("the measurement left no result")?;
        let measured: Vec<Figure> = serde_json::from_slice(&bytes)?;
        figures.extend(measured.into_iter().map(|figure| Figure { kernel: name.into(), ..figure }));
    }
    let mut table = String::from("| | kernel | figure | |\n| --- | --- | --- | ---: |\n");
    for Figure { monitor, what, kernel, value, unit } in &figures {
        let digits = if unit.is_empty() { 0 } else { 1 };
        let _ = writeln!(table, "| {monitor} | {kernel} | {what} | {value:.digits$} {unit} |");
    }
    fs::write(folder.join("figures.json"), serde_json::to_vec_pretty(&figures)?)?;
    fs::write(folder.join("table.md"), &table)?;
    println!("{table}");
    Ok(())
}

/// A state directory with one small image.
fn prepare(root: &Path) -> Result<Image> {
    let image = image::busybox()?;
    run(Command::new(build::dist().join("vmrun"))
        .args(["image", "pull", "-q", &image.source])
        .env("VMRUN_ROOT", root)
        .stdout(std::io::stderr()))?;
    Ok(image)
}

/// Imports a kernel; its name.
fn import(root: &Path, path: &PathBuf) -> Result<String> {
    let mut vmrun = Command::new(build::dist().join("vmrun"));
    let name = output(vmrun.args(["kernel", "import"]).arg(path).env("VMRUN_ROOT", root))?;
    Ok(name.trim().to_owned())
}
