//! `vmrun-init`: PID 1 of a micro-VM. It comes up from the initramfs knowing nothing of the image,
//! answers on vsock, and runs what one `Start` request describes.

mod agent;
mod devices;
mod early;
mod error;
mod files;
mod freezer;
mod mounts;
mod network;
mod process;
mod streams;
mod users;

use nix::sys::reboot::{RebootMode, reboot};

fn main() {
    if nix::unistd::getpid().as_raw() != 1 {
        eprintln!("vmrun-init is the first process of a micro-VM; vmrun starts it there");
        std::process::exit(1);
    }
    // Whatever happens, the machine ends: nobody is there to look at a hung one.
    if let Err(error) = early::set_up().and_then(|()| agent::serve()) {
        early::log(&format!("{error}"));
    }
    power_off();
}

/// Writes what is dirty and switches the machine off.
fn power_off() -> ! {
    nix::unistd::sync();
    // Only fails without the privilege that PID 1 has.
    let _ = reboot(RebootMode::RB_POWER_OFF);
    std::process::exit(1)
}
