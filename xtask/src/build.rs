//! `cargo xtask build`: one folder with the three programs, each statically linked.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::{cargo, output, root, run, target};
use crate::kernel;

/// The platform that programs are built for.
pub const TRIPLE: &str = "x86_64-unknown-linux-gnu";

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
    let flags = Flags::new()?;
    for (profile, package, program) in programs {
        build_with(&flags, profile, package, program, &folder)?;
    }
    if let Some(vmlinux) = kernel::cached(false)? {
        place(&vmlinux, &folder.join("vmlinux"))?;
    }
    eprintln!("xtask: built into {}", folder.strip_prefix(root()).unwrap_or(&folder).display());
    Ok(())
}

/// Builds a program that needs no libraries into a folder.
pub fn build_static(profile: &str, package: &str, program: &str, folder: &Path) -> Result<()> {
    build_with(&Flags::new()?, profile, package, program, folder)
}

fn build_with(
    flags: &Flags,
    profile: &str,
    package: &str,
    program: &str,
    folder: &Path,
) -> Result<()> {
    // Naming the target keeps the flags away from build scripts and procedural macros.
    run(cargo()
        .args(["build", "--locked", "--profile", profile, "--target", TRIPLE])
        .args(["-p", package, "--bin", program])
        .env("CARGO_ENCODED_RUSTFLAGS", &flags.rust)
        .env("CFLAGS_x86_64_unknown_linux_gnu", &flags.c)
        // For C sources that ask for the date.
        .env("SOURCE_DATE_EPOCH", "1"))?;
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

/// Flags of the compilers. Where the sources, the crates, and what is built are must not show in the
/// programs: the same sources give the same bytes wherever they are built (`cargo xtask reproduce`).
struct Flags {
    /// For `CARGO_ENCODED_RUSTFLAGS`, whose parts may have spaces in them.
    rust: String,
    c: String,
}

impl Flags {
    fn new() -> Result<Flags> {
        let rustc = |argument: &[&str]| {
            let rustc = std::env::var_os("RUSTC").unwrap_or("rustc".into());
            output(Command::new(rustc).args(argument))
        };
        let sysroot = rustc(&["--print", "sysroot"])?;
        let version = rustc(&["-vV"])?;
        let commit = version.lines().find_map(|line| line.strip_prefix("commit-hash: "));
        let commit = commit.context("rustc -vV names no commit-hash")?;
        let path = |path: PathBuf| {
            let text = path.to_str().map(str::to_owned);
            text.with_context(|| format!("{} is not UTF-8", path.display()))
        };
        // Of several that match the last one counts.
        let places = [
            (path(cargo_home()?)?, "/cargo".to_owned()),
            (path(root().to_owned())?, "/vmrun".to_owned()),
            (path(target())?, "/target".to_owned()),
            // Where the standard library's sources are installed, they are found there.
            (format!("{}/lib/rustlib/src/rust", sysroot.trim()), format!("/rustc/{commit}")),
        ];
        let mut rust = vec!["-Ctarget-feature=+crt-static".to_owned()];
        rust.extend(places.iter().map(|(from, to)| format!("--remap-path-prefix={from}={to}")));
        // This variable is split at spaces, and there is none that is not.
        let c = places.iter().filter(|(from, _)| !from.contains(' '));
        let c: Vec<String> = c.map(|(from, to)| format!("-ffile-prefix-map={from}={to}")).collect();
        Ok(Flags { rust: rust.join("\x1f"), c: c.join(" ") })
    }
}

/// Where cargo keeps the sources of crates.
pub fn cargo_home() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("CARGO_HOME") {
        return Ok(folder.into());
    }
    let home = std::env::var_os("HOME").context("neither CARGO_HOME nor HOME is set")?;
    Ok(PathBuf::from(home).join(".cargo"))
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
