//! The first moments: pseudo file systems and kernel modules.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};

use crate::error::{Context, SetupError};

/// Modules and the list that says in which order to load them.
const MODULES: &str = "/modules";

/// Mounts /proc, /sys and /dev of the initramfs, and loads the modules in it.
pub fn set_up() -> Result<(), SetupError> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target).context(|| target.to_owned())?;
        match mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>) {
            // The kernel may have mounted /dev itself.
            Ok(()) | Err(Errno::EBUSY) => {}
            Err(error) => return Err(error).context(|| format!("mount {target}")),
        }
    }
    kernel_log();
    load_modules()
}

fn load_modules() -> Result<(), SetupError> {
    let folder = Path::new(MODULES);
    let Ok(list) = fs::read_to_string(folder.join("load")) else { return Ok(()) };
    for name in list.lines().filter(|line| !line.is_empty()) {
        let path = folder.join(name);
        let module = File::open(&path).context(|| path.display().to_string())?;
        match finit_module(&module, &CString::default(), ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            // One that is not needed here must not keep the machine from starting; what lacks it
            // says so later.
            Err(error) => log(&format!("module {name}: {error}")),
        }
    }
    // Their memory is the guest's.
    let _ = fs::remove_dir_all(folder);
    Ok(())
}

/// The kernel's log. Open from the beginning: an image has no such device.
static LOG: OnceLock<Option<File>> = OnceLock::new();

fn kernel_log() -> Option<&'static File> {
    LOG.get_or_init(|| OpenOptions::new().write(true).open("/dev/kmsg").ok()).as_ref()
}

/// Leaves a line in the kernel's log, which reaches the console.
pub fn log(message: &str) {
    if let Some(mut log) = kernel_log() {
        // Level 3, an error: shown even with `quiet`.
        let _ = log.write_all(format!("<3>vmrun-init: {message}\n").as_bytes());
    }
}
