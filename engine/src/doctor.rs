//! What a host has and lacks for running machines.

pub mod production;

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

use crate::confinement::Policy;
use crate::kernel::{Kernel, Kernels};
use crate::paths::Paths;
use crate::programs;
use crate::run::{self, RunError};

/// What a finding means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// All is well.
    Good,
    /// Machines run, without something; or not as well kept apart as they could be.
    Limited,
    /// No machine runs; or strangers' machines should not.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Finding {
    /// What it is.
    pub subject: &'static str,
    /// What it means.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

fn good(subject: &'static str, found: impl Into<String>) -> Finding {
    Finding { subject, verdict: Verdict::Good, found: found.into(), fix: None }
}

fn bad(
    subject: &'static str,
    verdict: Verdict,
    found: impl Into<String>,
    fix: impl Into<String>,
) -> Finding {
    Finding { subject, verdict, found: found.into(), fix: Some(fix.into()) }
}

/// Looks at everything, changing nothing but the state directory's existence. Where nothing is
/// missing, a machine without an image is started, which tells more than any look.
pub fn examine(root: Option<&Path>, policy: &Policy) -> Vec<Finding> {
    let mut findings = vec![kvm(), vmm(), init()];
    match Paths::open(root) {
        Ok(paths) => {
            findings.push(state(&paths));
            match Kernels::open(paths.state()).resolve(None) {
                Ok(kernel) => {
                    findings.push(good("guest kernel", kernel.name.clone()));
                    if findings.iter().all(|finding| finding.verdict == Verdict::Good) {
                        findings.push(trial(&paths, &kernel, policy));
                    }
                }
                Err(error) => findings.push(bad(
                    "guest kernel",
                    Verdict::Missing,
                    error.to_string(),
                    "vmrun kernel import /boot/vmlinuz-VERSION, or a linux-image-*.deb",
                )),
            }
        }
        Err(error) => {
            findings.push(bad(
                "state directory",
                Verdict::Missing,
                error.to_string(),
                "use --root DIR",
            ));
        }
    }
    findings.extend([mkfs(), tun(), nft(), privilege()]);
    findings
}

fn kvm() -> Finding {
    const SUBJECT: &str = "KVM";
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => good(SUBJECT, "/dev/kvm can be read and written"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bad(
            SUBJECT,
            Verdict::Missing,
            "there is no /dev/kvm",
            "enable virtualization in the firmware, or nested virtualization in a VM, and modprobe kvm_intel or kvm_amd",
        ),
        Err(error) => bad(
            SUBJECT,
            Verdict::Missing,
            format!("/dev/kvm: {error}"),
            "join the group kvm (usermod -aG kvm USER) and log in again",
        ),
    }
}

fn vmm() -> Finding {
    match programs::vmm() {
        Ok(path) => good("vmrun-vmm", path.display().to_string()),
        Err(error) => bad("vmrun-vmm", Verdict::Missing, error.to_string(), "cargo xtask build"),
    }
}

fn init() -> Finding {
    match programs::init() {
        Ok(path) => good("vmrun-init", path.display().to_string()),
        Err(error) => bad("vmrun-init", Verdict::Missing, error.to_string(), "cargo xtask build"),
    }
}

fn state(paths: &Paths) -> Finding {
    let path = paths.state();
    match tempfile::tempfile_in(path) {
        Ok(_) => good("state directory", path.display().to_string()),
        Err(error) => bad(
            "state directory",
            Verdict::Missing,
            format!("{}: {error}", path.display()),
            "use another with --root DIR, or free space",
        ),
    }
}

fn trial(paths: &Paths, kernel: &Kernel, policy: &Policy) -> Finding {
    const SUBJECT: &str = "trial boot";
    match run::try_boot(paths, kernel, policy) {
        Ok(time) => good(SUBJECT, format!("a guest came up in {} ms", time.as_millis())),
        Err(error) => {
            let fix = match error {
                // The VMM did not get as far as the kernel.
                RunError::Machine(_) => {
                    "give the VMM what it says is not there; --unconfined PART tries without a part of its jail"
                }
                _ => {
                    "try another kernel (vmrun kernel import); if none comes up, this host's KVM cannot run Linux: in a VM, enable nested virtualization"
                }
            };
            bad(SUBJECT, Verdict::Missing, error.to_string(), fix)
        }
    }
}

fn runs(program: &str, argument: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    Command::new(program)
        .arg(argument)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok()
}

fn mkfs() -> Finding {
    if runs("mkfs.ext4", "-V") {
        return good("mkfs.ext4", "there");
    }
    let fix = "install e2fsprogs; until then use --read-only";
    bad("mkfs.ext4", Verdict::Limited, "not found: no writable layers and volumes", fix)
}

fn tun() -> Finding {
    const SUBJECT: &str = "TUN";
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => good(SUBJECT, "/dev/net/tun can be used"),
        Err(error) => bad(
            SUBJECT,
            Verdict::Limited,
            format!("/dev/net/tun: {error}: only --network none"),
            "modprobe tun, and run as root",
        ),
    }
}

fn nft() -> Finding {
    if runs("nft", "--version") {
        return good("nftables", "there");
    }
    let fix = "install nftables; until then use --network none";
    bad("nftables", Verdict::Limited, "nft not found: no default network", fix)
}

fn privilege() -> Finding {
    if nix::unistd::geteuid().is_root() {
        return good("privilege", "root");
    }
    let namespaces = fs::read_to_string("/proc/sys/user/max_user_namespaces");
    let some = namespaces.is_ok_and(|text| text.trim() != "0");
    let found = if some { "not root; user namespaces are allowed" } else { "not root" };
    bad(
        "privilege",
        Verdict::Limited,
        found,
        "the default network needs root; else use --network none",
    )
}
