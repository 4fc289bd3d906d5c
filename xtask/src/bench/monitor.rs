//! The monitors that are compared: each boots the same kernel and initramfs, on one processor with
//! 128 MiB, and is watched from outside.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket,
};
use serde_json::json;

use crate::command::{output, run};

/// The vsock port on which the guest's init says that it listens.
pub const READY_PORT: u32 = 1024;
pub const MEMORY_MIB: u64 = 128;
pub const CMDLINE: &str = "console=hvc0 quiet reboot=t panic=-1 8250.nr_uarts=0 \
    random.trust_cpu=on cryptomgr.notests tsc=reliable no_timer_check";
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// How long a guest may take to its init, in the lab's milliseconds.
const LIMIT_MS: u16 = 60_000;

/// A program that boots micro-VMs.
pub enum Monitor {
    Vmrun(PathBuf),
    Firecracker(PathBuf),
    /// With its `microvm` machine; a folder with all that it loads.
    Qemu(PathBuf),
}

impl Monitor {
    /// Ours, and the peers that are here, with what they load below `work`: what is read from the
    /// host in between is time that nobody executes instructions in.
    pub fn installed(vmrun_vmm: &Path, work: &Path) -> Result<Vec<Monitor>> {
        let mut monitors = vec![Monitor::Vmrun(vmrun_vmm.to_owned())];
        if let Some(path) = std::env::var_os("FIRECRACKER").filter(|path| !path.is_empty()) {
            let copy = work.join("firecracker");
            fs::copy(&path, &copy).with_context(|| path.display().to_string())?;
            monitors.push(Monitor::Firecracker(copy));
        }
        let qemu = Path::new(QEMU);
        if qemu.exists() {
            let folder = work.join("qemu");
            fs::create_dir(&folder)?;
            let libraries = output(Command::new("ldd").arg(qemu))?;
            let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
            run(Command::new("cp").arg("-L").args(libraries).arg(qemu).arg(&folder))?;
            run(Command::new("cp").args(["-rL", "/usr/share/qemu"]).arg(folder.join("share")))?;
            monitors.push(Monitor::Qemu(folder));
        }
        Ok(monitors)
    }

    pub fn name(&self) -> &'static str {
        match self {
            Monitor::Vmrun(_) => "vmrun-vmm",
            Monitor::Firecracker(_) => "Firecracker",
            Monitor::Qemu(_) => "QEMU microvm",
        }
    }

    /// Starts it, and returns when the guest's init listens.
    pub fn boot(&self, kernel: &Path, initrd: &Path, work: &Path) -> Result<Boot> {
        let notice = Notice::new(self, work)?;
        let mut command = self.command(kernel, initrd, work)?;
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let started = Instant::now();
        let mut boot = Boot { monitor: command.spawn()?, to_init: Duration::ZERO };
        notice.wait()?;
        boot.to_init = started.elapsed();
        Ok(boot)
    }

    fn command(&self, kernel: &Path, initrd: &Path, work: &Path) -> Result<Command> {
        let program = match self {
            Monitor::Vmrun(program) | Monitor::Firecracker(program) => program,
            Monitor::Qemu(folder) => {
                let mut qemu = Command::new(folder.join("ld-linux-x86-64.so.2"));
                qemu.arg("--library-path").arg(folder).arg(folder.join("qemu-system-x86_64"));
                qemu.arg("-L").arg(folder.join("share"));
                qemu.args(["-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=on"])
                    .args(["-global", "virtio-mmio.force-legacy=false"])
                    .args(["-accel", "kvm", "-cpu", "host", "-smp", "1"])
                    .args(["-nodefaults", "-no-user-config", "-display", "none"])
                    .args(["-m", &MEMORY_MIB.to_string(), "-append", CMDLINE])
                    .arg("-kernel")
                    .arg(kernel)
                    .arg("-initrd")
                    .arg(initrd)
                    .args(["-device", "vhost-vsock-device,guest-cid=3"])
                    .args(["-device", "virtio-rng-device"]);
                return Ok(qemu);
            }
        };
        let mut config = json!({
            "boot-source": {
                "kernel_image_path": kernel,
                "initrd_path": initrd,
                "boot_args": CMDLINE,
            },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
            "drives": [],
            "vsock": { "guest_cid": 3, "uds_path": work.join("v") },
            "entropy": {},
        });
        if let Monitor::Vmrun(_) = self {
            // As the engine has it.
            config["console"] = json!({
                "serial": false, "keyboard": false, "output_path": work.join("console.log"),
            });
        }
        let file = work.join("vm.json");
        fs::write(&file, config.to_string())?;
        let mut command = Command::new(program);
        command.arg("--config-file").arg(&file).args(["--no-api", "--level", "Warn"]);
        if let Monitor::Firecracker(_) = self {
            // Its filters know the system calls of musl, with which few build it.
            command.arg("--no-seccomp");
        }
        Ok(command)
    }
}

/// Where the guest's init calls.
enum Notice {
    /// Firecracker's convention, which is ours.
    Unix(UnixListener),
    Vsock(std::os::fd::OwnedFd),
}

impl Notice {
    fn new(monitor: &Monitor, work: &Path) -> Result<Notice> {
        if let Monitor::Qemu(_) = monitor {
            let listener =
                socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, READY_PORT))?;
            listen(&listener, Backlog::new(1)?)?;
            return Ok(Notice::Vsock(listener));
        }
        let (socket, notice) = (work.join("v"), work.join(format!("v_{READY_PORT}")));
        for path in [&socket, &notice] {
            let _ = fs::remove_file(path);
        }
        Ok(Notice::Unix(UnixListener::bind(notice)?))
    }

    fn wait(&self) -> Result<()> {
        use std::os::fd::AsFd;
        let descriptor = match self {
            Notice::Unix(listener) => listener.as_fd(),
            Notice::Vsock(listener) => listener.as_fd(),
        };
        let ready = poll(&mut [PollFd::new(descriptor, PollFlags::POLLIN)], LIMIT_MS)?;
        ensure!(ready == 1, "the guest's init does not call");
        match self {
            Notice::Unix(listener) => drop(listener.accept()?),
            Notice::Vsock(listener) => nix::unistd::close(accept(listener.as_raw_fd())?)?,
        }
        Ok(())
    }
}

/// Memory of a monitor's process (Pss), KiB.
pub struct Memory {
    pub own: u64,
    pub guest: u64,
}

/// A monitor whose guest has come to its init. It does not outlive its measurement.
pub struct Boot {
    monitor: Child,
    /// From the start of the monitor.
    pub to_init: Duration,
}

impl Drop for Boot {
    fn drop(&mut self) {
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

impl Boot {
    /// How often the guest has left its processor, as KVM counted until now.
    pub fn exits(&self) -> Result<Vec<(&'static str, u64)>> {
        let begin = format!("{}-", self.monitor.id());
        for entry in fs::read_dir("/sys/kernel/debug/kvm").context("KVM's statistics")? {
            let entry = entry?;
            if !entry.file_name().to_string_lossy().starts_with(&begin) {
                continue;
            }
            let read = |name: &str| -> Result<u64> {
                Ok(fs::read_to_string(entry.path().join(name))?.trim().parse()?)
            };
            return Ok(vec![
                ("exits", read("exits")?),
                ("port accesses", read("io_exits")?),
                ("MMIO accesses", read("mmio_exits")?),
            ]);
        }
        bail!("KVM has no statistics of the machine")
    }

    /// The process's memory now.
    pub fn memory(&self) -> Result<Memory> {
        memory_of(self.monitor.id())
    }
}

/// A process's memory now. What is mapped at least nearly as large as the guest's memory is the
/// guest's.
pub fn memory_of(process: u32) -> Result<Memory> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps"))?;
    let mut memory = Memory { own: 0, guest: 0 };
    let mut in_guest = false;
    for line in text.lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim().trim_end_matches(" kB").parse();
        match (name, value) {
            ("Size", Ok(size)) => {
                let size: u64 = size;
                in_guest = size >= MEMORY_MIB * 1024 * 3 / 4;
            }
            ("Pss", Ok(pss)) if in_guest => memory.guest += pss,
            ("Pss", Ok(pss)) => memory.own += pss,
            _ => {}
        }
    }
    ensure!(memory.guest > 0, "no mapping of the process is as large as the guest's memory");
    Ok(memory)
}
