//! `cargo xtask build`: one folder with the three programs, each statically linked.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::command::{cargo, root, run, target};
use crate::kernel;

const TRIPLE: &str = "x86_64-unknown-linux-gnu";
const STATIC: &str = "-C target-feature=+crt-static";

/// The tests' kernel that attacks its monitor, a workspace of its own.
pub const ATTACKER: &str = "tests/attacker/Cargo.toml";

/// Where the programs are after a build.
pub fn dist() -> PathBuf {
    target().join("dist")
}

/// Builds the programs, and puts the micro-VM kernel beside them where one was built.
pub fn build() -> Result<()> {
    let folder = dist();
    fs::create_dir_all(&folder)?;
    let programs = [
        ("release", "vmrun", "vmrun"),
        ("release", "vmm", "vmrun-vmm"),
        ("init", "guest", "vmrun-init"),
    ];
    for (profile, package, program) in programs {
        build_static(profile, package, program, &folder)?;
    }
    if let Some(vmlinux) = kernel::cached(false)? {
        place(&vmlinux, &folder.join("vmlinux"))?;
    }
    eprintln!("xtask: built into {}", folder.strip_prefix(root()).unwrap_or(&folder).display());
    Ok(())
}

/// Builds a program that needs no libraries into a folder.
pub fn build_static(profile: &str, package: &str, program: &str, folder: &Path) -> Result<()> {
    // Naming the target keeps the flag away from build scripts and procedural macros.
    run(cargo()
        .args(["build", "--profile", profile, "--target", TRIPLE, "-p", package, "--bin", program])
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", STATIC))?;
    place(&target().join(TRIPLE).join(profile).join(program), &folder.join(program))
}

/// Builds the tests' kernel that attacks its monitor into a folder.
pub fn build_attacker(folder: &Path) -> Result<()> {
    // Not beside the workspace's own builds: Cargo would take turns with their profiles.
    let place_of = target().join("attacker");
    run(cargo()
        .args(["build", "--quiet", "--release", "--manifest-path", ATTACKER, "--target-dir"])
        .arg(&place_of))?;
    place(&place_of.join("release/attacker"), &folder.join("attacker"))
}

/// Copies a file so that a reader sees the old one or the new one, whole.
fn place(from: &PathBuf, to: &PathBuf) -> Result<()> {
    let same = |path: &PathBuf| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.len(), metadata.modified().ok()?))
    };
    if same(from).is_some() && same(from) == same(to) {
        return Ok(());
    }
    let temporary = to.with_extension("new");
    fs::copy(from, &temporary).with_context(|| from.display().to_string())?;
    let modified = fs::metadata(from)?.modified()?;
    fs::File::options().write(true).open(&temporary)?.set_modified(modified)?;
    fs::rename(&temporary, to)?;
    Ok(())
}
