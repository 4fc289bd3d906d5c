//! `cargo xtask kernel`: builds the micro-VM kernel, or the lab's, from Debian's kernel sources.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::command::{cache, root, run};
use crate::debian;

/// The sources: the kernel of Debian 12.
const SOURCE: &str = "linux-source-6.1";
const TOOLS: [&str; 9] =
    ["gcc", "make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "xz-utils", "dpkg-dev"];

#[derive(clap::Args)]
pub struct Arguments {
    /// Build the lab's kernel, a host of micro-VMs, instead
    #[arg(long)]
    lab: bool,
    /// Compile so many files at once
    #[arg(long, short)]
    jobs: Option<usize>,
}

/// The configuration, all lines of it.
fn config(lab: bool) -> Result<String> {
    let read = |name: &str| {
        let path = root().join("resources/kernel").join(name);
        fs::read_to_string(&path).with_context(|| path.display().to_string())
    };
    let base = read("microvm.config")?;
    if !lab {
        return Ok(base);
    }
    // The lab's lines take the place of those of the same option.
    let own = read("lab.config")?;
    let option = |line: &str| {
        let unset = line.strip_prefix("# ").and_then(|line| line.strip_suffix(" is not set"));
        let name = unset.or_else(|| line.split_once('=').map(|(name, _)| name));
        name.filter(|name| name.starts_with("CONFIG_")).map(str::to_owned)
    };
    let replaced: Vec<_> = own.lines().filter_map(option).collect();
    let kept =
        base.lines().filter(|line| option(line).is_none_or(|name| !replaced.contains(&name)));
    Ok(kept.chain(own.lines()).fold(String::new(), |text, line| text + line + "\n"))
}

/// Where a kernel of this configuration is kept.
fn place(lab: bool) -> Result<PathBuf> {
    let mut hash = Sha256::new();
    hash.update(SOURCE);
    hash.update(config(lab)?);
    let key: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let name = if lab { "lab" } else { "microvm" };
    Ok(cache()?.join("kernel").join(format!("{name}-{key}")).join("vmlinux"))
}

/// The kernel of today's configuration, where it was built before.
pub fn cached(lab: bool) -> Result<Option<PathBuf>> {
    Ok(Some(place(lab)?).filter(|path| path.exists()))
}

/// Builds the kernel where it is not there; its file.
pub fn build(arguments: &Arguments) -> Result<PathBuf> {
    let target = place(arguments.lab)?;
    if target.exists() {
        return Ok(target);
    }
    debian::install(&TOOLS)?;
    let package = debian::download(SOURCE)?;
    let sources = package.with_extension("");
    debian::unpack(&package, &sources)?;
    let folder = tempfile::Builder::new().prefix("vmrun-kernel").tempdir()?;
    eprintln!("xtask: unpacking the kernel's sources");
    let archive = sources.join(format!("usr/src/{SOURCE}.tar.xz"));
    run(Command::new("tar")
        .args(["--strip-components=1", "-xf"])
        .arg(&archive)
        .arg("-C")
        .arg(folder.path()))?;

    let wanted = config(arguments.lab)?;
    let fragment = folder.path().join("vmrun.config");
    fs::write(&fragment, &wanted)?;
    let make = || {
        let mut make = Command::new("make");
        make.arg("-s").current_dir(folder.path()).stdout(std::io::stderr());
        make
    };
    run(make().arg(format!("KCONFIG_ALLCONFIG={}", fragment.display())).arg("allnoconfig"))?;
    check(&wanted, &fs::read_to_string(folder.path().join(".config"))?)?;
    let jobs = arguments.jobs.unwrap_or_else(processors);
    eprintln!("xtask: building the kernel with {jobs} jobs; this takes minutes");
    run(make().arg(format!("-j{jobs}")).arg("vmlinux"))?;

    let parent = target.parent().context("the cache has no parent")?;
    fs::create_dir_all(parent)?;
    let stripped = parent.join(format!("vmlinux.{}", std::process::id()));
    run(Command::new("strip").arg("-o").arg(&stripped).arg(folder.path().join("vmlinux")))?;
    fs::rename(&stripped, &target)?;
    Ok(target)
}

fn processors() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// An option that the kernel does not know, or that depends on another, is dropped without a word;
/// a kernel that lacks it is found out late.
fn check(wanted: &str, got: &str) -> Result<()> {
    let missing: Vec<_> = wanted
        .lines()
        .filter(|line| line.starts_with("CONFIG_") && !got.lines().any(|other| other == *line))
        .collect();
    ensure!(missing.is_empty(), "the kernel's configuration did not take: {}", missing.join(", "));
    Ok(())
}

/// Debian's cloud kernel, as a package.
pub fn debian_cloud() -> Result<PathBuf> {
    debian::download(&debian::kernel_package("linux-image-cloud-amd64")?)
}

/// The same as the bzImage that the package holds.
pub fn debian_bzimage() -> Result<PathBuf> {
    let package = debian_cloud()?;
    let folder = package.with_extension("");
    debian::unpack(&package, &folder)?;
    let entries = fs::read_dir(folder.join("boot"))?;
    let mut files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let found = files.find(|path| named(path).starts_with("vmlinuz-"));
    found.with_context(|| format!("{} holds no kernel", package.display()))
}

/// The guest kernel to use: the one that was built, or else Debian's.
pub fn guest() -> Result<PathBuf> {
    match cached(false)? {
        Some(path) => Ok(path),
        None => debian_cloud(),
    }
}

/// Whether a file is there and readable; for messages.
pub fn named(path: &Path) -> String {
    path.file_name()
        .map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
