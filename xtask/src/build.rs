//! `cargo xtask build`: one folder with the three programs, each statically linked.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::command::{cargo, root, run, target};
use crate::kernel;

/// The platform that programs are built for.
pub const TRIPLE: &str = "x86_64-unknown-linux-gnu";
const STATIC: &str = "-C target-feature=+crt-static";

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
        // Naming the target keeps the flag away from build scripts and procedural macros.
        run(cargo()
            .args(["build", "--profile", profile, "--target", TRIPLE, "-p", package])
            .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", STATIC))?;
        place(&target().join(TRIPLE).join(profile).join(program), &folder.join(program))?;
    }
    if let Some(vmlinux) = kernel::cached(false)? {
        place(&vmlinux, &folder.join("vmlinux"))?;
    }
    eprintln!("xtask: built into {}", folder.strip_prefix(root()).unwrap_or(&folder).display());
    Ok(())
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
