//! `cargo xtask demo`: from a fresh machine to a real image running as a micro-VM.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::command::{cache, output, run, target};
use crate::{build, debian, kernel, lab};

/// Builds, makes an image, runs it, and says how long each took.
pub fn demo() -> Result<()> {
    let mut phases = Vec::new();
    let mut timed = |name: &'static str, started: Instant| {
        phases.push((name, started.elapsed()));
    };
    debian::install(&["mmdebstrap", "umoci", "e2fsprogs", "nftables", "iproute2"])?;

    let started = Instant::now();
    build::build()?;
    timed("build vmrun", started);

    let started = Instant::now();
    let archive = debian_image()?;
    timed("make the image (Debian minbase, by mmdebstrap and umoci)", started);

    let folder = target().join("demo");
    fs::create_dir_all(&folder)?;
    let root = folder.join("root");
    let vmrun = || {
        let mut command = Command::new(build::dist().join("vmrun"));
        command.arg("--root").arg(&root);
        command
    };
    let started = Instant::now();
    run(vmrun().args(["image", "pull"]).arg(format!("oci-archive:{}", archive.display())))?;
    timed("pull it and make its root device", started);

    let started = Instant::now();
    let guest = kernel::guest()?;
    let name = output(vmrun().args(["kernel", "import", "--default"]).arg(&guest))?;
    eprintln!("demo: guest kernel {} from {}", name.trim(), kernel::named(&guest));
    timed("import the guest kernel", started);

    if lab::needs_machine() {
        println!(
            "demo: this host's KVM cannot boot Linux; the micro-VM runs in the lab, a machine emulated by QEMU"
        );
    }
    println!("demo: vmrun run --rm demo/debian sh -c 'uname -r; cat /etc/os-release'");
    let script = "echo \"guest kernel: $(uname -r)\"; cat /etc/os-release; exit 7";
    let started = Instant::now();
    let command = [
        "vmrun",
        "--root",
        &root.display().to_string(),
        "run",
        "--rm",
        "localhost/demo/debian",
        "sh",
        "-c",
        script,
    ];
    let mut arguments =
        lab::Arguments::new(command.iter().map(|word| (*word).to_owned()).collect());
    arguments.rw.push(folder);
    let status = lab::run(&arguments)?;
    timed("run it (the lab's own start included, where there is one)", started);

    println!("demo: exit status {status}; the program ended with 7");
    for (name, duration) in &phases {
        println!("demo: {:8.1} s  {name}", duration.as_secs_f64());
    }
    ensure!(status == 7, "the image's program did not end as it should");
    Ok(())
}

/// A Debian system as an OCI archive, made once.
fn debian_image() -> Result<PathBuf> {
    let archive = cache()?.join("demo-debian.oci.tar");
    if archive.exists() {
        return Ok(archive);
    }
    let work = tempfile::tempdir_in(archive.parent().context("the cache has no parent")?)?;
    let tar = work.path().join("debian.tar");
    run(Command::new("mmdebstrap").args(["--quiet", "--variant=minbase", "bookworm"]).arg(&tar))?;
    let layout = work.path().join("layout");
    let image = format!("{}:localhost/demo/debian:latest", layout.display());
    let umoci = |arguments: &[&str]| run(Command::new("umoci").args(arguments));
    let text = |path: &Path| path.display().to_string();
    umoci(&["init", "--layout", &text(&layout)])?;
    umoci(&["new", "--image", &image])?;
    umoci(&["raw", "add-layer", "--image", &image, &text(&tar)])?;
    umoci(&["config", "--image", &image, "--config.cmd", "/bin/bash"])?;
    let partial = archive.with_extension("partial");
    run(Command::new("tar").arg("-C").arg(&layout).arg("-cf").arg(&partial).arg("."))?;
    fs::rename(partial, &archive)?;
    Ok(archive)
}
