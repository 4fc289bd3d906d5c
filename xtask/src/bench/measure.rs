//! What runs inside the lab: everything in memory, each thing three times, the middle one told.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::command::run;

#[derive(clap::Args)]
pub struct Arguments {
    /// A state directory with the image and the kernels
    #[arg(long)]
    root: PathBuf,
    /// The kernel's name
    #[arg(long)]
    kernel: String,
    /// The programs
    #[arg(long)]
    dist: PathBuf,
    /// Where the figures go
    #[arg(long)]
    result: PathBuf,
    /// Only this figure
    name: Option<String>,
}

const IMAGE: &str = "localhost/base";
const ROUNDS: usize = 3;

/// Measures, and writes a line a figure.
pub fn measure(arguments: &Arguments) -> Result<()> {
    let work = tempfile::tempdir_in("/tmp")?;
    let copy = |from: &Path, name: &str| {
        run(Command::new("cp").arg("-a").arg(from).arg(work.path().join(name)))
    };
    copy(&arguments.dist, "dist")?;
    copy(&arguments.root, "root")?;
    let lab = Lab { work: work.path().to_owned(), kernel: arguments.kernel.clone() };
    // Makes the initramfs and the template of the writable layer.
    lab.first_byte(&["--network", "none"])?;
    lab.first_byte(&[])?;

    let mut lines = String::new();
    let wanted = |name: &str| arguments.name.as_deref().is_none_or(|wanted| wanted == name);
    let mut put = |what: &str, value: String| lines.push_str(&format!("{what}: {value}\n"));
    if wanted("init") {
        let time = middle(|| lab.to_init())?;
        put(
            "exec of vmrun-vmm to the guest's init listening (1 vCPU, 128 MiB)",
            milliseconds(time),
        );
    }
    if wanted("output") {
        let time = middle(|| lab.first_byte(&["--network", "none"]))?;
        put("vmrun run --network none to the first byte of output", milliseconds(time));
    }
    if wanted("output-network") {
        let time = middle(|| lab.first_byte(&[]))?;
        put("vmrun run to the first byte of output", milliseconds(time));
    }
    if wanted("memory") {
        let (overhead, guest) = lab.memory()?;
        put("VMM memory less guest memory (Pss)", format!("{:.1} MiB", overhead as f64 / 1024.0));
        put("guest memory touched, at init", format!("{:.1} MiB", guest as f64 / 1024.0));
    }
    fs::write(&arguments.result, lines)?;
    Ok(())
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

fn middle(mut once: impl FnMut() -> Result<Duration>) -> Result<Duration> {
    let mut times = (0..ROUNDS).map(|_| once()).collect::<Result<Vec<_>>>()?;
    times.sort();
    Ok(times[ROUNDS / 2])
}

struct Lab {
    work: PathBuf,
    kernel: String,
}

/// A child that does not outlive its measurement.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Lab {
    /// From the start of `vmrun run` to the program's first byte.
    fn first_byte(&self, flags: &[&str]) -> Result<Duration> {
        let mut command = Command::new(self.work.join("dist/vmrun"));
        command
            .args(["run", "--rm", "-m", "128m", "--kernel", &self.kernel])
            .args(flags)
            .args([IMAGE, "echo", "x"])
            .env("VMRUN_ROOT", self.work.join("root"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn()?;
        let mut byte = [0];
        let got = child.stdout.as_mut().context("no output")?.read(&mut byte)?;
        let time = started.elapsed();
        let status = child.wait()?;
        ensure!(got == 1 && status.success(), "vmrun run: {status}");
        Ok(time)
    }

    /// Starts the monitor as the engine does, and returns it with the time until init listens.
    fn boot(&self) -> Result<(Machine, Duration)> {
        let kernel = self.work.join("root/kernels").join(&self.kernel);
        let initrd = fs::read_dir(&kernel)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "cpio"))
            .context("there is no initramfs")?;
        let vsock = self.work.join("v");
        let notice = self.work.join("v_1024");
        for path in [&vsock, &notice] {
            let _ = fs::remove_file(path);
        }
        let config = json!({
            "boot-source": {
                "kernel_image_path": kernel.join("vmlinux"),
                "initrd_path": initrd,
                "boot_args": "console=hvc0 quiet reboot=t panic=-1 8250.nr_uarts=0 random.trust_cpu=on cryptomgr.notests tsc=reliable no_timer_check",
            },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
            "vsock": { "guest_cid": 3, "uds_path": vsock },
            "entropy": {},
            "console": { "serial": false, "output_path": self.work.join("console.log") },
        });
        let path = self.work.join("vm.json");
        fs::File::create(&path)?.write_all(config.to_string().as_bytes())?;
        let listener = UnixListener::bind(&notice)?;
        let mut command = Command::new(self.work.join("dist/vmrun-vmm"));
        command.arg("--config-file").arg(&path).args(["--no-api", "--level", "warning"]);
        let started = Instant::now();
        let machine = Machine(command.stdin(Stdio::null()).spawn()?);
        listener.accept()?;
        Ok((machine, started.elapsed()))
    }

    fn to_init(&self) -> Result<Duration> {
        Ok(self.boot()?.1)
    }

    /// The monitor's memory without the guest's, and the guest's, in KiB.
    fn memory(&self) -> Result<(u64, u64)> {
        let (machine, _) = self.boot()?;
        let text = fs::read_to_string(format!("/proc/{}/smaps", machine.0.id()))?;
        let (mut guest, mut own, mut in_guest) = (0, 0, false);
        for line in text.lines() {
            if let Some(value) = line.strip_prefix("Pss:") {
                let value: u64 = value.trim().trim_end_matches(" kB").parse()?;
                *(if in_guest { &mut guest } else { &mut own }) += value;
            } else if line.split_whitespace().next().is_some_and(|word| !word.ends_with(':')) {
                in_guest = line.contains("memfd:guest-memory");
            }
        }
        Ok((own, guest))
    }
}
