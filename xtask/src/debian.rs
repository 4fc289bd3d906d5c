//! Debian packages: installed where a tool is missing, or downloaded for what is in them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::command::{cache, output, run};

/// Installs the packages that are missing, saying which.
pub fn install(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> =
        packages.iter().copied().filter(|package| !installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("xtask: installing Debian packages: {}", missing.join(" "));
    ensure!(
        Path::new("/usr/bin/apt-get").exists(),
        "this is no Debian-like system: install {} yourself",
        missing.join(" ")
    );
    ensure!(
        nix::unistd::geteuid().is_root(),
        "not root: run  sudo apt-get install {}",
        missing.join(" ")
    );
    let install = || {
        run(Command::new("apt-get")
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(&missing)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdout(std::io::stderr()))
    };
    // The lists may be old, or there may be none.
    install()
        .or_else(|_| {
            update()?;
            install()
        })
        .with_context(|| format!("cannot install {}", missing.join(" ")))
}

fn installed(package: &str) -> bool {
    let status = Command::new("dpkg-query").args(["-W", "-f", "${Status}", package]).output();
    status.is_ok_and(|output| output.stdout.ends_with(b"ok installed"))
}

fn update() -> Result<()> {
    run(Command::new("apt-get").args(["update", "-q"]).stdout(std::io::stderr()))
}

/// Downloads a package, once, and returns the file.
pub fn download(package: &str) -> Result<PathBuf> {
    let folder = cache()?.join("debs");
    fs::create_dir_all(&folder)?;
    let find = |folder: &Path| -> Result<Option<PathBuf>> {
        let begin = format!("{package}_");
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with(&begin) && name.ends_with(".deb") {
                return Ok(Some(path));
            }
        }
        Ok(None)
    };
    if let Some(found) = find(&folder)? {
        return Ok(found);
    }
    // apt-get writes under the final name: what is half there must not be found, now or later.
    let partial = tempfile::Builder::new().prefix("partial").tempdir_in(&folder)?;
    eprintln!("xtask: downloading Debian package {package}");
    let fetch = || {
        run(Command::new("apt-get")
            .args(["download", "-q", package])
            .current_dir(partial.path())
            .stdout(std::io::stderr()))
    };
    fetch().or_else(|_| {
        update()?;
        fetch()
    })?;
    let fetched = find(partial.path())?
        .with_context(|| format!("apt-get download {package} left no file"))?;
    let place = folder.join(fetched.file_name().context("a package without a name")?);
    fs::rename(&fetched, &place)?;
    Ok(place)
}

/// The versioned kernel package that a meta package such as `linux-image-amd64` stands for.
pub fn kernel_package(meta: &str) -> Result<String> {
    let show = || output(Command::new("apt-cache").args(["show", "--no-all-versions", meta]));
    let text = show().or_else(|_| {
        update()?;
        show()
    })?;
    for line in text.lines() {
        if let Some(list) = line.strip_prefix("Depends:") {
            let names = list.split([',', '|']).filter_map(|one| one.split_whitespace().next());
            if let Some(name) = names.into_iter().find(|name| name.starts_with("linux-image-")) {
                return Ok(name.to_owned());
            }
        }
    }
    bail!("{meta} depends on no kernel package")
}

/// Unpacks a package into a folder, once.
pub fn unpack(package: &Path, folder: &Path) -> Result<()> {
    if folder.exists() {
        return Ok(());
    }
    let temporary = folder.with_extension(format!("new{}", std::process::id()));
    let _ = fs::remove_dir_all(&temporary);
    fs::create_dir_all(&temporary)?;
    run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&temporary))?;
    match fs::rename(&temporary, folder) {
        Err(_) if folder.exists() => Ok(fs::remove_dir_all(&temporary)?),
        other => Ok(other?),
    }
}
