//! `cargo xtask demo`: from a fresh machine to a real image running as a micro-VM.

use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, ensure};

use crate::command::{output, run, target};
use crate::{build, debian, image, kernel, lab};

/// Builds, makes an image, runs it, and says how long each took.
pub fn demo() -> Result<()> {
    let mut phases = Vec::new();
    let mut timed = |name: &'static str, started: Instant| {
        phases.push((name, started.elapsed()));
    };
    debian::install(&["e2fsprogs", "nftables", "iproute2"])?;

    let started = Instant::now();
    build::build()?;
    timed("build vmrun", started);

    let started = Instant::now();
    let image = image::debian().or_else(|error| {
        println!("demo: no Debian image: {error:#}");
        println!("demo: going on with one of busybox");
        image::busybox()
    })?;
    timed("make the image, where it was not made before", started);

    let folder = target().join("demo");
    fs::create_dir_all(&folder)?;
    let root = folder.join("root");
    let vmrun = || {
        let mut command = Command::new(build::dist().join("vmrun"));
        command.arg("--root").arg(&root);
        command
    };
    let started = Instant::now();
    run(vmrun().args(["image", "pull"]).arg(&image.source))?;
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
    let script = "echo \"guest kernel: $(uname -r)\"; cat /etc/os-release; exit 7";
    println!("demo: vmrun run --rm {} sh -c '{script}'", image.name);
    let started = Instant::now();
    let command = [
        "vmrun",
        "--root",
        &root.display().to_string(),
        "run",
        "--rm",
        image.name,
        "sh",
        "-c",
        script,
    ];
    let arguments = lab::Arguments::new(command.iter().map(|word| (*word).to_owned()).collect());
    let status = lab::run(&arguments)?;
    timed("run it (the lab's own start included, where there is one)", started);

    println!("demo: exit status {status}; the program ended with 7");
    for (name, duration) in &phases {
        println!("demo: {:8.1} s  {name}", duration.as_secs_f64());
    }
    ensure!(status == 7, "the image's program did not end as it should");
    Ok(())
}
