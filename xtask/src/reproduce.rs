//! `cargo xtask reproduce`: the same sources, built twice in different places, give the same programs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::build;
use crate::command::{cargo, output, root, run, target};

const PROGRAMS: [&str; 3] = ["vmrun", "vmrun-vmm", "vmrun-init"];

/// Builds twice and compares. Nothing of one build is the other's: sources, target folder, and the
/// path of cargo's folder differ, in length too.
pub fn reproduce() -> Result<()> {
    let work = target().join("reproduce");
    match fs::remove_dir_all(&work) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| work.display().to_string());
        }
        _ => {}
    }
    let (one, other) = (work.join("a"), work.join("another-place"));
    // Both before either is built, so that they are the same.
    copy_sources(&one.join("src"))?;
    copy_sources(&other.join("src"))?;
    let first = build_in(&one, "target")?;
    let second = build_in(&other, "what is built")?;
    let mut different = Vec::new();
    for (program, one, other) in
        first.iter().zip(&second).zip(PROGRAMS).map(|((one, other), program)| (program, one, other))
    {
        println!("{one}  {program}");
        if one != other {
            println!("{other}  {program}, the second time");
            different.push(program);
        }
    }
    if !different.is_empty() {
        bail!("{} differ; both builds are left in {}", different.join(", "), work.display());
    }
    fs::remove_dir_all(&work).with_context(|| work.display().to_string())
}

/// Builds the sources in `folder`/src and returns the programs' hashes.
fn build_in(folder: &Path, target: &str) -> Result<Vec<String>> {
    let sources = folder.join("src");
    // The same crates, by another path.
    let home = folder.join("cargo");
    fs::create_dir_all(&home)?;
    for entry in fs::read_dir(build::cargo_home()?)? {
        let entry = entry?;
        symlink(entry.path(), home.join(entry.file_name()))?;
    }
    let target = folder.join(target);
    eprintln!("xtask: building in {}", sources.display());
    let mut build = cargo();
    build.args(["xtask", "build"]).current_dir(&sources);
    run(build.env("CARGO_HOME", &home).env("CARGO_TARGET_DIR", &target))?;
    PROGRAMS
        .iter()
        .map(|program| {
            let path = target.join("dist").join(program);
            let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
            Ok(Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect())
        })
        .collect()
}

/// Copies what git knows, or would: not what was built.
fn copy_sources(to: &Path) -> Result<()> {
    let list = output(Command::new("git").current_dir(root()).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]))?;
    for name in list.split('\0').filter(|name| !name.is_empty()) {
        let from = root().join(name);
        // Listed and deleted.
        if !from.is_file() {
            continue;
        }
        let path = to.join(name);
        fs::create_dir_all(path.parent().context("a file without a folder")?)?;
        fs::copy(&from, &path).with_context(|| from.display().to_string())?;
    }
    Ok(())
}
