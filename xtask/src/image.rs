//! Images for the demo and the benchmarks, made by tools that are not ours.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::{cache, output, run};
use crate::debian;

/// How long Debian's bootstrap may take before something smaller is taken.
const BOOTSTRAP_LIMIT: &str = "1200";

/// An image as an OCI archive.
pub struct Image {
    /// What `vmrun image pull` takes.
    pub source: String,
    /// The name it then has.
    pub name: &'static str,
}

/// Debian's smallest system, by mmdebstrap and umoci; made once.
pub fn debian() -> Result<Image> {
    debian::install(&["mmdebstrap", "umoci"])?;
    archive("localhost/demo/debian", "/bin/bash", |folder| {
        let tar = folder.join("debian.tar");
        run(Command::new("timeout")
            .args(["-k", "10", BOOTSTRAP_LIMIT])
            .args(["mmdebstrap", "--quiet", "--variant=minbase", "bookworm"])
            .arg(&tar))?;
        Ok(tar)
    })
}

/// Debian's static busybox with all its applets, by umoci; made once.
pub fn busybox() -> Result<Image> {
    debian::install(&["busybox-static", "umoci"])?;
    archive("localhost/demo/busybox", "/bin/sh", |folder| {
        let tree = folder.join("tree");
        for name in ["bin", "etc", "root", "tmp"] {
            fs::create_dir_all(tree.join(name))?;
        }
        let program = "/bin/busybox";
        fs::copy(program, tree.join("bin/busybox"))?;
        for applet in output(Command::new(program).arg("--list"))?.lines() {
            if applet != "busybox" {
                symlink("busybox", tree.join("bin").join(applet))?;
            }
        }
        fs::write(tree.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
        fs::write(tree.join("etc/group"), "root:x:0:\n")?;
        fs::write(tree.join("etc/os-release"), "PRETTY_NAME=\"busybox of Debian\"\n")?;
        let tar = folder.join("busybox.tar");
        run(Command::new("tar")
            .args(["--owner=0", "--group=0", "--numeric-owner", "-cf"])
            .arg(&tar)
            .arg("-C")
            .arg(&tree)
            .arg("."))?;
        Ok(tar)
    })
}

/// An image of one layer, which `layer` makes as a tar file in the folder that it is given.
fn archive(
    name: &'static str,
    command: &str,
    layer: impl FnOnce(&Path) -> Result<PathBuf>,
) -> Result<Image> {
    let cache = cache()?;
    let archive = cache.join(format!("{}.oci.tar", name.replace('/', "-")));
    let image = Image { source: format!("oci-archive:{}", archive.display()), name };
    if archive.exists() {
        return Ok(image);
    }
    let work = tempfile::tempdir_in(&cache)?;
    let tar = layer(work.path())?;
    let layout = work.path().join("layout");
    let tagged = format!("{}:{name}:latest", layout.display());
    let umoci = |arguments: &[&str]| run(Command::new("umoci").args(arguments));
    let text = |path: &Path| path.display().to_string();
    umoci(&["init", "--layout", &text(&layout)])?;
    umoci(&["new", "--image", &tagged])?;
    umoci(&["raw", "add-layer", "--image", &tagged, &text(&tar)])?;
    umoci(&["config", "--image", &tagged, "--config.cmd", command])?;
    let packed = work.path().join("packed.tar");
    run(Command::new("tar").arg("-cf").arg(&packed).arg("-C").arg(&layout).arg("."))?;
    fs::rename(&packed, &archive).with_context(|| archive.display().to_string())?;
    Ok(image)
}
