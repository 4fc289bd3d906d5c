//! `vmrun-vmm` alone, with a configuration file in Firecracker's format: the ways a guest comes up,
//! what it sees of its machine, and the ways it ends.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use e2e::{Finished, Running, guest};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, tcgetattr};
use serde_json::json;

/// The guest's first program: says what it sees, and does what the command line asks for.
const INIT: &str = r#"echo "cpus=$($b nproc)"
echo "cores=$($b cat /sys/devices/system/cpu/cpu*/topology/core_id | $b sort -u | $b wc -l)"
echo "memory=$($b awk '/MemTotal/ {print $2}' /proc/meminfo)"
echo "x2apic=$($b grep -c x2apic /proc/cpuinfo) hypervisor=$($b grep -c hypervisor /proc/cpuinfo)"
echo "end of memory=$($b awk -F'[- ]' '/System RAM/ {last=$2} END {print last}' /proc/iomem)"
for word in $($b cat /proc/cmdline); do case $word in do=*) do=${word#do=};; esac; done
case $do in
poweroff) $b poweroff -f;;
reboot) $b reboot -f;;
panic) echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger;;
echo) echo ready; read line; echo "got $line"; $b poweroff -f;;
esac
echo waiting
while :; do $b sleep 1000; done
"#;

struct Machine {
    folder: tempfile::TempDir,
    kernel: PathBuf,
    vcpus: u32,
    mib: u64,
    boot_args: String,
}

impl Machine {
    fn new(kernel: &Path, what: &str) -> Machine {
        let folder = tempfile::tempdir().unwrap();
        guest::initramfs(folder.path(), INIT);
        let boot_args = format!("console=ttyS0 reboot=k panic=-1 do={what}");
        Machine { folder, kernel: kernel.to_owned(), vcpus: 1, mib: 256, boot_args }
    }

    fn start(&self) -> Running {
        Running::start(self.command().stdin(Stdio::piped()))
    }

    fn command(&self) -> Command {
        let config = json!({
            "boot-source": {
                "kernel_image_path": self.kernel,
                "initrd_path": self.folder.path().join("initrd"),
                "boot_args": self.boot_args,
            },
            "machine-config": { "vcpu_count": self.vcpus, "mem_size_mib": self.mib },
            "drives": [],
        });
        let file = self.folder.path().join("vm.json");
        fs::write(&file, config.to_string()).unwrap();
        let mut command = Command::new("vmrun-vmm");
        command.arg("--config-file").arg(file).arg("--no-api");
        command
    }

    fn run(&self) -> Finished {
        self.start().finish()
    }
}

/// The value that the guest's init gave.
#[track_caller]
fn value(done: &Finished, name: &str) -> String {
    let out = done.out();
    let line = out.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("no {name}: {out}\n{}", done.err())).to_owned()
}

#[test]
fn a_guest_that_switches_itself_off_ends_with_0() {
    let machine = Machine { mib: 128, ..Machine::new(&guest::kernel(), "poweroff") };
    let done = machine.run().exits(0);
    assert!(done.out().contains("Linux version"), "{}", done.out());
    assert_eq!(value(&done, "cpus"), "1");
    assert_eq!(value(&done, "x2apic"), "1 hypervisor=1");
    assert_eq!(value(&done, "end of memory"), "07ffffff");
}

#[test]
fn a_bzimage_boots_too() {
    let kernel = e2e::images::assets().join("bzimage");
    let done = Machine::new(&kernel, "poweroff").run().exits(0);
    assert_eq!(value(&done, "cpus"), "1");
}

#[test]
fn thirty_two_processors_and_more_memory_than_fits_below_the_hole() {
    let machine = Machine { vcpus: 32, mib: 5 << 10, ..Machine::new(&guest::kernel(), "reboot") };
    // Ended by the keyboard controller's reset.
    let done = machine.run().exits(10);
    assert_eq!((value(&done, "cpus"), value(&done, "cores")), ("32".into(), "32".into()));
    let kib: u64 = value(&done, "memory").parse().unwrap();
    assert!((4_800 << 10..=5_120 << 10).contains(&kib), "{kib} KiB");
    let end = u64::from_str_radix(&value(&done, "end of memory"), 16).unwrap();
    assert!(end > 4 << 30, "{end:#x}");
}

#[test]
fn a_crash_is_told_from_a_reset() {
    // A triple fault is how this kernel resets.
    let mut machine = Machine::new(&guest::kernel(), "reboot");
    machine.boot_args += " reboot=t";
    machine.run().exits(11);
    let mut machine = Machine::new(&guest::kernel(), "panic");
    machine.boot_args += " reboot=t";
    let done = machine.run().exits(11);
    assert!(done.out().contains("Kernel panic"), "{}", done.out());
}

#[test]
fn the_serial_port_takes_input_and_a_signal_ends_the_machine() {
    let machine = Machine::new(&guest::kernel(), "echo");
    let mut running = machine.start();
    running.wait_for("ready\r\n");
    running.write(b"some words\n");
    let done = running.finish().exits(0);
    assert!(done.out().contains("got some words"), "{}", done.out());

    for (signal, status) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let machine = Machine::new(&guest::kernel(), "wait");
        let mut running = machine.start();
        running.wait_for("waiting\r\n");
        running.signal(signal);
        running.finish().exits(status);
    }
}

/// Keys go to the guest as they are pressed, and the terminal is left as it was.
#[test]
fn a_terminal_is_the_serial_ports_while_the_machine_runs() {
    let OpenptyResult { master, slave } = openpty(None, None).unwrap();
    let is_cooked = || {
        let flags = tcgetattr(&slave).unwrap().local_flags;
        flags.contains(LocalFlags::ICANON | LocalFlags::ECHO)
    };
    assert!(is_cooked());
    let machine = Machine::new(&guest::kernel(), "echo");
    let mut command = machine.command();
    let mut running = Running::start(command.stdin(slave.try_clone().unwrap()));
    running.wait_for("ready\r\n");
    assert!(!is_cooked());
    // The guest's own terminal takes ^U for the end of all that was typed before.
    let mut keyboard = File::from(master);
    keyboard.write_all(b"something else\x15some words\r").unwrap();
    let done = running.finish().exits(0);
    assert!(done.out().contains("got some words"), "{}", done.out());
    assert!(is_cooked());
}
