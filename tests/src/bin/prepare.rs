//! Makes what the end-to-end tests run: images by real tools, pulled into a state directory, and a
//! guest kernel there. Runs on the host, before the lab starts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use e2e::images::BUILT;

/// Make the images and the state directory that the end-to-end tests use.
#[derive(Parser)]
struct Options {
    /// The built command, to pull the images and import the kernel with.
    #[arg(long)]
    vmrun: PathBuf,
    /// A guest kernel to import (vmlinux, bzImage or Debian package); the last is the default one.
    #[arg(long)]
    kernel: Vec<PathBuf>,
    /// A kernel as a bzImage, for the monitor alone.
    #[arg(long)]
    bzimage: PathBuf,
    /// Where the results go.
    output: PathBuf,
}

fn main() -> Result<()> {
    let options = Options::parse();
    fs::create_dir_all(&options.output)?;
    let output = options.output.canonicalize()?;
    let root = output.join("root");
    let policy = output.join("policy.json");
    fs::write(&policy, r#"{"default":[{"type":"insecureAcceptAnything"}]}"#)?;

    for image in BUILT {
        println!("prepare: image {image}");
        build(&output, &policy, image)?;
    }
    let debian = output.join("debian.oci.tar");
    if !debian.exists() {
        println!("prepare: image debian (minbase with Python)");
        debootstrap(&output, &debian)?;
    }

    let vmrun = |arguments: &[&str]| {
        run(Command::new(&options.vmrun).arg("--root").arg(&root).args(arguments))
    };
    for image in BUILT.into_iter().chain(["debian"]) {
        let archive = e2e::images::archive_in(&output, image);
        vmrun(&["image", "pull", "--quiet", &format!("oci-archive:{}", archive.display())])?;
    }
    fs::copy(&options.bzimage, output.join("bzimage"))?;
    for kernel in &options.kernel {
        println!("prepare: kernel {}", kernel.display());
        let kernel = kernel.to_str().context("the kernel's path is not UTF-8")?;
        vmrun(&["kernel", "import", "--default", kernel])?;
        // A copy, which a user without privilege can read too.
        fs::copy(kernel, e2e::images::kernel_in(&output))?;
    }
    Ok(())
}

/// Builds `tests/images/IMAGE` with buildah into an OCI archive.
fn build(output: &Path, policy: &Path, image: &str) -> Result<()> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("images").join(image);
    let context = tempfile::tempdir()?;
    for entry in fs::read_dir(&sources)? {
        let entry = entry?;
        fs::copy(entry.path(), context.path().join(entry.file_name()))?;
    }
    if image == "base" {
        fs::copy("/bin/busybox", context.path().join("busybox"))
            .context("/bin/busybox: install busybox-static")?;
    }
    let storage = output.join("containers");
    let buildah = || {
        let mut command = Command::new("buildah");
        command.args(["--storage-driver", "vfs", "--root"]).arg(storage.join("root"));
        command.arg("--runroot").arg(storage.join("run"));
        command
    };
    let name = format!("localhost/{image}");
    run(buildah()
        .args(["bud", "--quiet", "--isolation", "chroot", "--layers=false", "--signature-policy"])
        .arg(policy)
        .args(["--tag", &name])
        .arg(context.path()))?;
    let archive = e2e::images::archive_in(output, image);
    let _ = fs::remove_file(&archive);
    let target = format!("oci-archive:{}:{name}:latest", archive.display());
    run(buildah()
        .args(["push", "--quiet", "--signature-policy"])
        .arg(policy)
        .args([&name, &target]))
}

/// A Debian system with Python, made by mmdebstrap, as an OCI image made by umoci.
fn debootstrap(output: &Path, archive: &Path) -> Result<()> {
    let work = tempfile::tempdir_in(output)?;
    let tar = work.path().join("debian.tar");
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--variant=minbase", "--include=python3-minimal,libcap2-bin"])
        .arg("bookworm")
        .arg(&tar))?;
    let layout = work.path().join("layout");
    let image = format!("{}:localhost/debian:latest", layout.display());
    let umoci = |arguments: &[&str]| run(Command::new("umoci").args(arguments));
    umoci(&["init", "--layout", &layout.display().to_string()])?;
    umoci(&["new", "--image", &image])?;
    umoci(&["raw", "add-layer", "--image", &image, &tar.display().to_string()])?;
    umoci(&["config", "--image", &image, "--config.cmd", "/bin/bash"])?;
    let partial = archive.with_extension("partial");
    run(Command::new("tar").arg("-C").arg(&layout).arg("-cf").arg(&partial).arg("."))?;
    fs::rename(partial, archive)?;
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
