//! Running `vmrun` as somebody without privileges.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::{Finished, Running};

/// The user's number, and that of its group.
pub const UID: u32 = 65534;

/// A user with a state directory that has an image and a kernel.
pub struct User {
    folder: tempfile::TempDir,
}

#[allow(clippy::new_without_default, reason = "none of its kind is the usual one")]
impl User {
    /// One who may use KVM.
    pub fn with_kvm() -> User {
        let folder = tempfile::tempdir().unwrap();
        nix::unistd::chown(folder.path(), Some(UID.into()), Some(UID.into())).unwrap();
        let mode = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions("/dev/kvm", mode).unwrap();
        let user = User { folder };
        let archive = format!("oci-archive:{}", crate::images::archive("base").display());
        user.vmrun(&["image", "pull", "-q", &archive]).exits(0);
        let vmlinux = crate::images::kernel();
        user.vmrun(&["kernel", "import", "--default", vmlinux.to_str().unwrap()]).exits(0);
        user
    }

    /// `vmrun ARGUMENTS`, ready to be changed further.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let id = UID.to_string();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--inh-caps=-all", "--"]);
        let own = self.own(arguments);
        command.arg(own.get_program()).args(own.get_args());
        for (name, value) in own.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        command.stdin(std::process::Stdio::null());
        command
    }

    /// The same for somebody who is this user already.
    pub fn own(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("vmrun");
        command
            .args(arguments)
            .env("VMRUN_ROOT", self.folder.path().join("root"))
            .env("HOME", self.folder.path());
        command
    }

    /// Runs `vmrun ARGUMENTS` to its end.
    pub fn vmrun(&self, arguments: &[&str]) -> Finished {
        Running::start(&mut self.command(arguments)).finish()
    }
}
