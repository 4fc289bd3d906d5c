//! What runs inside the lab: everything in memory, each thing three times, the middle one told.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Figure;
use super::api::Served;
use super::monitor::{Boot, Monitor};
use crate::command::run;

#[derive(clap::Args)]
pub struct Arguments {
    /// A state directory with the image and the kernels
    #[arg(long)]
    root: PathBuf,
    /// The image's name
    #[arg(long)]
    image: String,
    /// The same image as an archive
    #[arg(long)]
    archive: PathBuf,
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
    name: Option<super::Name>,
}

const ROUNDS: usize = 3;

/// Measures, and writes a line a figure.
pub fn measure(arguments: &Arguments) -> Result<()> {
    let work = tempfile::tempdir_in("/tmp")?;
    let copy = |from: &Path, name: &str| {
        run(Command::new("cp").arg("-a").arg(from).arg(work.path().join(name)))
    };
    copy(&arguments.dist, "dist")?;
    copy(&arguments.root, "root")?;
    copy(&arguments.archive, "image.tar")?;
    let lab = Lab {
        work: work.path().to_owned(),
        kernel: arguments.kernel.clone(),
        image: arguments.image.clone(),
        archive: format!("oci-archive:{}", work.path().join("image.tar").display()),
    };
    // Makes the initramfs and the template of the writable layer.
    lab.first_line(&["--network", "none"])?;
    lab.first_line(&[])?;

    let mut figures = Vec::new();
    let mut put = |monitor: &str, what: &str, value: f64, unit: &str| {
        eprintln!("measure: {monitor}: {what}: {value:.1} {unit}");
        let (monitor, what, unit) = (monitor.to_owned(), what.to_owned(), unit.to_owned());
        figures.push(Figure { monitor, what, kernel: String::new(), value, unit });
    };
    let wanted = |name| arguments.name.is_none_or(|wanted| wanted == name);
    for monitor in Monitor::installed(&work.path().join("dist/vmrun-vmm"), work.path())? {
        if wanted(super::Name::Snapshot) {
            eprintln!("measure: snapshots of {} with {}", monitor.name(), arguments.kernel);
            lab.snapshot(&monitor, &mut put)?;
        }
        if !wanted(super::Name::Init) && !wanted(super::Name::Memory) {
            continue;
        }
        eprintln!("measure: {} with {}", monitor.name(), arguments.kernel);
        let boot = || lab.boot(&monitor);
        // Its files, and what it loads, are in the page cache from now on.
        drop(boot().with_context(|| format!("{} does not boot", monitor.name()))?);
        if wanted(super::Name::Init) {
            let time = middle(|| Ok(boot()?.to_init))?;
            put(monitor.name(), "exec to the guest's init", milliseconds(time), "ms");
            for (what, count) in boot()?.exits()? {
                put(monitor.name(), &format!("{what} until init"), count as f64, "");
            }
        }
        if wanted(super::Name::Memory) {
            let memory = boot()?.memory()?;
            let mebibytes = |kibibytes: u64| kibibytes as f64 / 1024.0;
            put(monitor.name(), "own memory (Pss)", mebibytes(memory.own), "MiB");
            put(monitor.name(), "guest memory touched", mebibytes(memory.guest), "MiB");
        }
    }
    for (name, what, flags) in [
        (super::Name::Output, "vmrun run --network none to the first byte", ["--network", "none"]),
        (super::Name::OutputNetwork, "vmrun run to the first byte", ["--network", "default"]),
    ] {
        if wanted(name) {
            eprintln!("measure: {what} with {}", arguments.kernel);
            let time = middle(|| lab.first_line(&flags))?;
            put("vmrun", what, milliseconds(time), "ms");
        }
    }
    if wanted(super::Name::Confinement) {
        super::confinement::measure(&lab, &mut put)?;
    }
    if wanted(super::Name::Neighbour) {
        super::neighbour::measure(&lab, &mut put)?;
    }
    fs::write(&arguments.result, serde_json::to_vec(&figures)?)?;
    Ok(())
}

pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

pub fn middle(mut once: impl FnMut() -> Result<Duration>) -> Result<Duration> {
    let mut times = (0..ROUNDS).map(|_| once()).collect::<Result<Vec<_>>>()?;
    times.sort();
    Ok(times[ROUNDS / 2])
}

/// When each line of a command came, from its start.
pub fn lines(mut command: Command) -> Result<Vec<Duration>> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let started = Instant::now();
    let mut child = command.spawn()?;
    let output = BufReader::new(child.stdout.take().context("no output")?);
    let times: Result<Vec<_>, _> =
        output.lines().map(|line| line.map(|_| started.elapsed())).collect();
    let status = child.wait()?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(times?)
}

/// When the first line of a command came, from its start.
pub fn first_line(command: Command) -> Result<Duration> {
    lines(command)?.first().copied().context("a command that was to say something did not")
}

/// Everything that is measured, in memory.
pub struct Lab {
    pub work: PathBuf,
    pub kernel: String,
    pub image: String,
    /// What `vmrun image pull` takes for it.
    pub archive: String,
}

impl Lab {
    /// `vmrun ARGUMENTS`.
    pub fn vmrun(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.work.join("dist/vmrun"));
        command.args(arguments).env("VMRUN_ROOT", self.work.join("root"));
        command
    }

    /// `vmrun run`, of a machine of the usual size; the rest of its flags, the image and a command
    /// follow.
    pub fn vmrun_run(&self) -> Command {
        self.vmrun(&["run", "--rm", "-m", "128m", "--kernel", &self.kernel])
    }

    /// From the start of `vmrun run` to the program's first line.
    fn first_line(&self, flags: &[&str]) -> Result<Duration> {
        let mut command = self.vmrun_run();
        command.args(flags).args([&self.image, "echo", "x"]);
        first_line(command)
    }

    /// A monitor under its API, and a snapshot of its guest.
    fn snapshot(
        &self,
        monitor: &Monitor,
        put: &mut impl FnMut(&str, &str, f64, &str),
    ) -> Result<()> {
        let start = || Served::start(monitor, &self.work);
        // What it loads is in the page cache from now on.
        if start()?.is_none() {
            return Ok(());
        }
        let started = || start()?.context("no API");
        let name = monitor.name();
        let time = middle(|| Ok(started()?.to_socket))?;
        put(name, "exec to the API socket", milliseconds(time), "ms");
        let (kernel, initrd) = self.guest()?;
        let boot = || -> Result<_> {
            let served = started()?;
            let time = served.boot(&kernel, &initrd)?;
            Ok((served, time))
        };
        drop(boot()?);
        let time = middle(|| Ok(boot()?.1))?;
        put(name, "InstanceStart to the guest's init", milliseconds(time), "ms");
        let bytes = boot()?.0.save()?;
        put(name, "state file", bytes as f64 / 1024.0, "KiB");
        started()?.load()?;
        let time = middle(|| Ok(started()?.load()?.to_answer))?;
        put(name, "snapshot/load until it runs", milliseconds(time), "ms");
        let time = middle(|| Ok(started()?.load()?.to_guest))?;
        put(name, "snapshot/load until the guest answers on vsock", milliseconds(time), "ms");
        let served = started()?;
        served.load()?;
        let memory = served.memory()?;
        put(name, "own memory of a restored machine (Pss)", memory.own as f64 / 1024.0, "MiB");
        put(name, "its guest's memory (Pss)", memory.guest as f64 / 1024.0, "MiB");
        Ok(())
    }

    /// The kernel and the initramfs that vmrun would boot.
    fn guest(&self) -> Result<(PathBuf, PathBuf)> {
        let kernel = self.work.join("root/kernels").join(&self.kernel);
        let initrd = fs::read_dir(&kernel)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "cpio"))
            .context("there is no initramfs")?;
        Ok((kernel.join("vmlinux"), initrd))
    }

    fn boot(&self, monitor: &Monitor) -> Result<Boot> {
        let (kernel, initrd) = self.guest()?;
        monitor.boot(&kernel, &initrd, &self.work)
    }
}
