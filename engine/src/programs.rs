//! Where the other programs are.

use std::path::{Path, PathBuf};

/// One of the programs is not there.
#[derive(Debug, thiserror::Error)]
#[error(
    "{name} is not installed: sought {sought}; build it with cargo xtask build, or name it with {variable}"
)]
pub struct ProgramError {
    name: &'static str,
    variable: &'static str,
    sought: String,
}

/// The monitor of one micro-VM.
pub fn vmm() -> Result<PathBuf, ProgramError> {
    find("vmrun-vmm", "VMRUN_VMM")
}

/// The guest's init.
pub fn init() -> Result<PathBuf, ProgramError> {
    find("vmrun-init", "VMRUN_INIT")
}

/// Named by the environment, or beside this program, or in its libexec folder.
fn find(name: &'static str, variable: &'static str) -> Result<PathBuf, ProgramError> {
    if let Some(path) = std::env::var_os(variable).filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let own = std::env::current_exe().unwrap_or_default();
    let folder = own.parent().unwrap_or(Path::new("/"));
    let places = [folder.join(name), folder.join("../libexec/vmrun").join(name)];
    places.iter().find(|path| path.exists()).cloned().ok_or_else(|| ProgramError {
        name,
        variable,
        sought: places.map(|path| path.display().to_string()).join(", "),
    })
}
