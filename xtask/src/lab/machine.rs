//! The emulated machine: its kernel, its first program, and the job it does.

#![allow(unsafe_code, reason = "runs code between fork and exec")]

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};

use super::{Arguments, FAILURE, TIMED_OUT, tsc};
use crate::command::{cache, root, run as run_command};
use crate::{build, debian, kernel};

/// How long the machine may take to begin with the job; then it is started again.
const START_LIMIT: Duration = Duration::from_secs(60);
const STARTS: u32 = 6;
/// What the first program needs of Debian's kernel, which has all of it as modules.
const BOOT_MODULES: [&str; 3] = ["virtio_pci", "9pnet_virtio", "9p"];
/// And what the jobs need.
const JOB_MODULES: [&str; 15] = [
    "virtio_console",
    "overlay",
    "kvm-amd",
    "tun",
    "vhost_net",
    "vhost_vsock",
    "bridge",
    "veth",
    "loop",
    "erofs",
    "ext4",
    "nf_tables",
    "nft_masq",
    "nft_chain_nat",
    "nft_ct",
];

/// What the machine boots.
pub struct Boot {
    kernel: PathBuf,
    /// With the modules to reach the host's files; absent where they are built in.
    initrd: Option<PathBuf>,
    /// The folder that has `lib/modules`.
    modules: Option<PathBuf>,
}

/// Installs and makes what the machine needs, so that several may then be started at once.
pub fn prepare() -> Result<Boot> {
    debian::install(&["qemu-system-x86", "busybox-static", "kmod", "cpio", "iproute2"])?;
    choose_kernel()
}

/// Runs a command on the machine.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let boot = prepare()?;
    // The job's folder must not be below a tmpfs of the machine.
    let jobs = cache()?.join("jobs");
    fs::create_dir_all(&jobs)?;
    let job = tempfile::Builder::new().prefix("job").tempdir_in(&jobs)?;
    write_job(arguments, &boot, job.path())?;
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block()?;
    for attempt in 1..=STARTS {
        let mut machine = start(arguments, &boot, job.path())?;
        match watch(&mut machine, arguments, job.path(), &signals)? {
            Outcome::Done(status) => return Ok(status),
            Outcome::NotStarted => {}
        }
        drop(machine);
        // It may have begun between the last look and its end: then it is not done again.
        ensure!(!job.path().join("begun").exists(), "the lab's machine ended as the command began");
        eprintln!("xtask: the lab did not start (attempt {attempt} of {STARTS})");
    }
    bail!("the lab does not start; its console ends: {}", last_lines(&job.path().join("console")))
}

/// The end of a log, on one line; empty where there is none.
fn last_lines(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(5)..].join(" | ")
}

/// `VMRUN_LAB_KERNEL`, one that was built for the lab, or Debian's.
fn choose_kernel() -> Result<Boot> {
    let given = std::env::var_os("VMRUN_LAB_KERNEL").filter(|path| !path.is_empty());
    if let Some(path) = given {
        return Ok(Boot { kernel: path.into(), initrd: None, modules: None });
    }
    if let Some(path) = kernel::cached(true)? {
        return Ok(Boot { kernel: path, initrd: None, modules: None });
    }
    let name = debian::kernel_package("linux-image-amd64")?;
    let package = debian::download(&name)?;
    let folder = package.with_extension("");
    debian::unpack(&package, &folder)?;
    let version = name.trim_start_matches("linux-image-").to_owned();
    let image = folder.join(format!("boot/vmlinuz-{version}"));
    let ready = folder.join("lab-initrd.cpio");
    if !ready.exists() {
        run_command(Command::new("depmod").arg("-b").arg(&folder).arg(&version))?;
        make_initrd(&folder, &version, &ready)?;
    }
    Ok(Boot { kernel: image, initrd: Some(ready), modules: Some(folder) })
}

/// An initramfs that loads what it needs to mount the host's files, and goes there.
fn make_initrd(folder: &Path, version: &str, target: &Path) -> Result<()> {
    let tree = tempfile::tempdir()?;
    for name in ["bin", "modules", "proc", "dev", "host"] {
        fs::create_dir(tree.path().join(name))?;
    }
    fs::copy("/bin/busybox", tree.path().join("bin/busybox"))?;
    let mut script =
        String::from("#!/bin/busybox sh\nb=/bin/busybox\n$b mount -t proc proc /proc\n");
    let mut loaded = Vec::new();
    for module in BOOT_MODULES {
        let list = crate::command::output(Command::new("modprobe").arg("-d").arg(folder).args([
            "-S",
            version,
            "--show-depends",
            module,
        ]))?;
        for path in list.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let path = Path::new(path.split_whitespace().next().unwrap_or_default());
            let name = kernel::named(path);
            if loaded.contains(&name) {
                continue;
            }
            fs::copy(path, tree.path().join("modules").join(&name))?;
            script += &format!("$b insmod /modules/{name}\n");
            loaded.push(name);
        }
    }
    script += "for word in $($b cat /proc/cmdline); do case $word in lab=*) lab=${word#lab=};; esac; done\n\
        $b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /host\n\
        $b umount /proc\nexec $b switch_root /host $lab/init\n";
    let init = tree.path().join("init");
    fs::write(&init, script)?;
    fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let temporary = target.with_extension(format!("new{}", std::process::id()));
    let pack =
        format!("find . | cpio --quiet -o -H newc > {}", shell_word(&temporary.to_string_lossy()));
    run_command(Command::new("sh").args(["-c", &pack]).current_dir(tree.path()))?;
    Ok(fs::rename(temporary, target)?)
}

/// A word as a shell takes it literally.
fn shell_word(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// The machine's first program, and the command with its environment, in the job's folder.
fn write_job(arguments: &Arguments, boot: &Boot, job: &Path) -> Result<()> {
    let mut mounts = String::new();
    for (index, (folder, writable)) in shares(arguments)?.iter().enumerate() {
        let (cache, mode) = if *writable { ("none", "rw") } else { ("loose", "ro") };
        let path = shell_word(&folder.to_string_lossy());
        mounts += &format!(
            "mkdir -p {path} && mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache={cache},{mode} share{index} {path} || failed=\"$failed \"{path}\n"
        );
    }
    let mut modules = String::new();
    if let Some(folder) = &boot.modules {
        let folder = shell_word(&folder.to_string_lossy());
        for module in JOB_MODULES {
            modules += &format!("modprobe -d {folder} {module} 2>/dev/null\n");
        }
    }
    let early_overlay = boot.modules.as_ref().map_or_else(String::new, |folder| {
        format!("/sbin/modprobe -d {} overlay\n", shell_word(&folder.to_string_lossy()))
    });
    // A machine with one processor has none that executes what another patches.
    let keeper = match processors(arguments) {
        1 => String::new(),
        _ => format!(
            "mkfifo /run/kept; {} keep-vm >/run/kept & read kept </run/kept\n",
            shell_word(&std::env::current_exe()?.to_string_lossy())
        ),
    };
    let job_path = shell_word(&job.to_string_lossy());
    // The second half runs in the new root, reached by pivot_root: in a chroot the kernel refuses
    // user namespaces.
    let init = format!(
        "#!/bin/busybox sh\nb=/bin/busybox\n\
        $b mount -t proc proc /proc\n{early_overlay}\
        $b mount -t tmpfs -o size=90% tmpfs /mnt\n$b mkdir /mnt/upper /mnt/work /mnt/root\n\
        $b mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work,metacopy=off overlay /mnt/root\n\
        $b mount --move /proc /mnt/root/proc\n\
        cd /mnt/root\n$b mkdir -p lab.old\n$b pivot_root . lab.old\n\
        exec $b chroot . /bin/sh {job_path}/second\n"
    );
    // A kernel that is held up while it compares its timers takes the local one for broken: such a
    // machine is of no use, and another one is tried. Where time is counted nothing holds it up.
    let timer_check = if arguments.count {
        ""
    } else {
        "if [ $(grep -A1 'Per CPU device' /proc/timer_list | grep -c lapic) -ne $(nproc) ]; \
         then exec /bin/busybox reboot -f; fi\n"
    };
    let second = format!(
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n\
        mount -t sysfs sysfs /sys\nmount -t devtmpfs devtmpfs /dev\n\
        ln -s /proc/self/fd /dev/fd; for n in 0:stdin 1:stdout 2:stderr; do ln -s /proc/self/fd/${{n%:*}} /dev/${{n#*:}}; done\n\
        mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts; mount -t tmpfs -o mode=1777 tmpfs /dev/shm\n\
        mount -t tmpfs -o mode=755 tmpfs /run\n\
        mount -t cgroup2 cgroup2 /sys/fs/cgroup; mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null\n\
        {modules}{keeper}ip link set lo up; hostname lab\n{mounts}\
        mkdir -p {job_path}; mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none job {job_path}\n\
        {timer_check}cd {job_path}; echo > begun\n\
        if [ -n \"$failed\" ]; then echo \"xtask: the lab cannot mount$failed\" >/dev/hvc1; (exit {FAILURE})\n\
        else /bin/sh ./command </dev/null >/dev/hvc0 2>/dev/hvc1; fi\n\
        echo $? > status.new; mv status.new status\n\
        sync; exec /bin/busybox reboot -f\n"
    );
    let mut command = String::new();
    // Names and values that a shell script cannot carry are left out.
    let text = |text: std::ffi::OsString| text.into_string().ok();
    let variables =
        std::env::vars_os().filter_map(|(name, value)| Some((text(name)?, text(value)?)));
    for (name, value) in variables {
        if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            continue;
        }
        let passed = ["VMRUN_", "RUST_", "CARGO_", "FIRECRACKER"];
        if passed.iter().any(|begin| name.starts_with(begin)) && name != "VMRUN_LAB_KERNEL" {
            command += &format!("export {name}={}\n", shell_word(&value));
        }
    }
    let dist = shell_word(&build::dist().to_string_lossy());
    let cwd = shell_word(&std::env::current_dir()?.to_string_lossy());
    command += &format!(
        "export PATH={dist}:$PATH HOME=/root TERM=dumb VMRUN_LAB=vm\nstty -F /dev/hvc0 raw 2>/dev/null\nstty -F /dev/hvc1 raw 2>/dev/null\ncd {cwd} || exit {FAILURE}\n"
    );
    let words: Vec<_> = arguments.command.iter().map(|word| shell_word(word)).collect();
    command += &words.join(" ");
    command.push('\n');
    for (name, text) in [("init", init), ("second", second), ("command", command)] {
        let path = job.join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    Ok(())
}

/// A path as a value among QEMU's options, where a comma ends one.
fn option_value(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// The folders to be shown, with whether they are writable.
fn shares(arguments: &Arguments) -> Result<Vec<(PathBuf, bool)>> {
    let share = arguments.share.iter().map(|folder| (folder, false));
    let all = share.chain(arguments.rw.iter().map(|folder| (folder, true)));
    all.map(|(folder, writable)| {
        let path = fs::canonicalize(folder).with_context(|| folder.display().to_string())?;
        Ok((path, writable))
    })
    .collect()
}

/// A started machine, and how much of its output was passed on.
struct Machine {
    qemu: Child,
    output: Follower,
    error: Follower,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Passes on what is appended to a file.
struct Follower {
    path: PathBuf,
    done: u64,
}

impl Follower {
    fn pass_on(&mut self, to: &mut impl Write) -> Result<()> {
        let Ok(mut file) = File::open(&self.path) else { return Ok(()) };
        file.seek(SeekFrom::Start(self.done))?;
        let mut bytes = Vec::new();
        self.done += file.read_to_end(&mut bytes)? as u64;
        to.write_all(&bytes)?;
        Ok(to.flush()?)
    }
}

/// Instructions are counted on one processor alone.
fn processors(arguments: &Arguments) -> u32 {
    if arguments.count { 1 } else { arguments.cpus }
}

fn start(arguments: &Arguments, boot: &Boot, job: &Path) -> Result<Machine> {
    let follow = |name: &str| -> Result<Follower> {
        let path = job.join(name);
        File::create(&path)?;
        Ok(Follower { path, done: 0 })
    };
    let (output, error) = (follow("output")?, follow("error")?);
    let cpus = processors(arguments);
    // Before whatever else the host does: a machine that is held up measures its timers wrongly.
    let mut qemu = Command::new("nice");
    qemu.args(["-n", "-10", "qemu-system-x86_64"])
        .args(["-M", "q35", "-cpu", "max", "-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-m", &arguments.mem.to_string(), "-smp", &cpus.to_string()]);
    if arguments.count {
        qemu.args(["-accel", "tcg", "-icount", "shift=0,sleep=off"]);
    } else {
        qemu.args(["-accel", "tcg,thread=multi"]);
    }
    qemu.arg("-kernel").arg(&boot.kernel);
    let mut line =
        String::from("quiet loglevel=3 reboot=t panic=-1 mitigations=off console=ttyS0 ");
    if !arguments.count {
        line += &format!("tsc_early_khz={} ", tsc::khz());
    }
    match &boot.initrd {
        Some(initrd) => {
            qemu.arg("-initrd").arg(initrd);
            line += &format!("lab={}", job.display());
        }
        None => {
            line += &format!(
                "root=host rootfstype=9p rootflags=trans=virtio,version=9p2000.L,msize=512000,cache=loose ro init={}/init",
                job.display()
            );
        }
    }
    qemu.args(["-append", &line]);
    let local = "local,security_model=none,multidevs=remap";
    let mut share = |tag: &str, folder: &Path, read_only: bool| {
        let mode = if read_only { ",readonly=on" } else { "" };
        qemu.arg("-fsdev").arg(format!("{local},id={tag},path={}{mode}", option_value(folder)));
        qemu.arg("-device").arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
    };
    share("host", Path::new("/"), true);
    share("job", job, false);
    for (index, (folder, writable)) in shares(arguments)?.iter().enumerate() {
        share(&format!("share{index}"), folder, !writable);
    }
    qemu.args(["-device", "virtio-serial-pci"]);
    for (id, file) in [("out", "output"), ("err", "error")] {
        qemu.arg("-chardev").arg(format!("file,id={id},path={}", option_value(&job.join(file))));
        qemu.args(["-device", &format!("virtconsole,chardev={id}")]);
    }
    qemu.args(["-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"]);
    qemu.arg("-serial").arg(format!("file:{}", job.join("console").display()));
    let messages = File::create(job.join("qemu"))?;
    let parent = nix::unistd::getpid();
    // SAFETY: between fork and exec only system calls are made, and nothing is allocated.
    unsafe {
        qemu.pre_exec(move || {
            // The machine ends with us, also when we are killed; asked after, in case that was before.
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            if nix::unistd::getppid() != parent {
                return Err(std::io::ErrorKind::Interrupted.into());
            }
            Ok(())
        });
    }
    let qemu = qemu
        // A terminal's Ctrl-C is for us: we end the machine, and say why.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(messages.try_clone()?)
        .stderr(messages)
        .current_dir(root())
        .spawn()
        .context("cannot start qemu-system-x86_64")?;
    Ok(Machine { qemu, output, error })
}

enum Outcome {
    Done(u8),
    NotStarted,
}

fn watch(
    machine: &mut Machine,
    arguments: &Arguments,
    job: &Path,
    signals: &SigSet,
) -> Result<Outcome> {
    let started = Instant::now();
    let mut begun = None;
    loop {
        machine.output.pass_on(&mut std::io::stdout())?;
        machine.error.pass_on(&mut std::io::stderr())?;
        if begun.is_none() && job.join("begun").exists() {
            begun = Some(Instant::now());
        }
        if let Ok(status) = fs::read_to_string(job.join("status")) {
            // The last bytes are on their way through the emulated consoles.
            let end = Instant::now();
            while end.elapsed() < Duration::from_secs(10) && machine.qemu.try_wait()?.is_none() {
                thread::sleep(Duration::from_millis(10));
            }
            machine.output.pass_on(&mut std::io::stdout())?;
            machine.error.pass_on(&mut std::io::stderr())?;
            let status: i32 = status.trim().parse().context("the lab's exit status")?;
            return Ok(Outcome::Done(status as u8));
        }
        if let Some(ended) = machine.qemu.try_wait()? {
            if begun.is_none() {
                // Status 1 is QEMU's refusal of what it was told; another try would get the same.
                let refused = ended.code() == Some(1);
                ensure!(!refused, "the lab does not start: {}", last_lines(&job.join("qemu")));
                return Ok(Outcome::NotStarted);
            }
            let logs = ["qemu", "console"].map(|name| last_lines(&job.join(name)));
            let [qemu, console] = logs;
            eprintln!(
                "xtask: the lab's machine ended under the command; QEMU: {qemu}; console: {console}"
            );
            return Ok(Outcome::Done(FAILURE));
        }
        match begun {
            None if started.elapsed() > START_LIMIT => return Ok(Outcome::NotStarted),
            Some(begun) if begun.elapsed().as_secs() > arguments.timeout => {
                eprintln!("xtask: the command took more than {} s", arguments.timeout);
                return Ok(Outcome::Done(TIMED_OUT));
            }
            _ => {}
        }
        if let Some(signal) = pending(signals) {
            return Ok(Outcome::Done(128 + signal as i32 as u8));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// A signal that asks us to end, if one has come.
fn pending(signals: &SigSet) -> Option<Signal> {
    let flags = nix::sys::signalfd::SfdFlags::SFD_NONBLOCK;
    let descriptor = nix::sys::signalfd::SignalFd::with_flags(signals, flags).ok()?;
    let info = descriptor.read_signal().ok()??;
    Signal::try_from(info.ssi_signo as i32).ok()
}
