//! What a machine keeps of its throughput while another one, beside it, attacks.
//!
//! Each of the two has at most a third of the only processor, by its cgroup's `cpu.max`, and so both
//! have what they may use: as on a host that promises no more than it has. What is left is what the
//! host does in their name, which no cgroup counts.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::measure::Lab;
use crate::command::run;

const PERIOD: u64 = 100_000;
const QUOTA: u64 = PERIOD / 3;
/// How long turns are counted, in the lab's time.
const WINDOW: Duration = Duration::from_secs(6);
/// What a neighbour fetches in each turn, in bytes.
const FETCHED: usize = 256 << 10;
const PORT: u16 = 8000;
/// How many neighbours may stand still before that is the measurement's end.
const LOST_MAX: u32 = 4;

/// A turn is some of everything: processor, disk (with a flush) and network.
const WORK: &str = r#"gateway=$(ip route | awk '/default/ {print $3}'); turn=0
while :; do
    i=0; while [ $i -lt 500 ]; do i=$((i+1)); done
    dd if=/dev/zero of=/data bs=16k count=16 conv=fsync 2>/dev/null || { echo no file; exit 1; }
    got=$(nc $gateway 8000 </dev/null | wc -c); [ $got = 262144 ] || { echo only $got bytes; exit 1; }
    turn=$((turn+1)); echo $turn
done"#;

/// What attackers do: orders of the attacking kernel, or a shell's script.
const ATTACKS: [(&str, Attacker); 6] = [
    ("notifications", Attacker::Kernel("storm")),
    ("garbage in queues", Attacker::Kernel("queues")),
    ("garbage in registers", Attacker::Kernel("registers")),
    ("floods of frames and connections", Attacker::Kernel("flood")),
    (
        "a fork bomb",
        // Where memory is short, it goes first, and not the process that keeps the machine going.
        Attacker::Script(
            "(echo 1000 >/proc/self/oom_score_adj; bomb() { bomb | bomb & }; bomb) &
            while :; do sleep 1; done",
        ),
    ),
    (
        "a disk that is filled",
        Attacker::Script("while :; do dd if=/dev/zero of=/fill bs=64k; rm /fill; done"),
    ),
];

#[derive(Clone, Copy)]
enum Attacker {
    Kernel(&'static str),
    Script(&'static str),
}

/// Counts a neighbour's turns beside each attacker, and alone before and after; the shares it keeps.
pub fn measure(lab: &Lab, put: &mut impl FnMut(&str, &str, f64, &str)) -> Result<()> {
    serve()?;
    let mut neighbour = Neighbour::start(lab)?;
    let mut lost = 0;
    put("vmrun", "turns of a machine alone, in 6 s", neighbour.turns()? as f64, "");
    for (what, attacker) in ATTACKS {
        eprintln!("measure: a neighbour beside {what}");
        let share = loop {
            match neighbour.share(lab, attacker) {
                Ok(share) => break share,
                // The emulated processor at times delivers an interrupt to a guest that has them
                // switched off, in the middle of another one's handler, which then waits for its lock.
                Err(error) if lost < LOST_MAX => {
                    eprintln!("measure: {error:#}; once more, with another");
                    lost += 1;
                    neighbour = Neighbour::start(lab)?;
                }
                Err(error) => return Err(error),
            }
        };
        put("vmrun", &format!("its throughput beside {what}"), share, "%");
    }
    put("vmrun", "neighbours that stood still, and were replaced", f64::from(lost), "");
    Ok(())
}

/// Gives whoever connects some bytes.
fn serve() -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    thread::spawn(move || {
        let bytes = vec![b'x'; FETCHED];
        for mut connection in listener.incoming().flatten() {
            let _ = connection.write_all(&bytes);
        }
    });
    Ok(())
}

fn limit(cgroup: &Path) -> Result<()> {
    let file = cgroup.join("cpu.max");
    fs::write(&file, format!("{QUOTA} {PERIOD}")).with_context(|| file.display().to_string())
}

/// A container, and the cgroup of its VMM.
fn container(lab: &Lab, script: &str, options: &[&str]) -> Result<Child> {
    let file = lab.work.join("id");
    let _ = fs::remove_file(&file);
    let child = lab
        .vmrun_run()
        .arg("--cidfile")
        .arg(&file)
        .args(options)
        .args([&lab.image, "sh", "-c", &format!("echo up; {script}")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    Ok(child)
}

/// Waits for the first line of a container, and then limits it; the rest of what it says.
fn started(lab: &Lab, child: &mut Child) -> Result<impl BufRead + use<>> {
    let mut lines = BufReader::new(child.stdout.take().context("no output")?);
    let mut line = String::new();
    lines.read_line(&mut line)?;
    ensure!(line == "up\n", "a container does not start");
    let id = fs::read_to_string(lab.work.join("id"))?;
    let id = id.get(..12).context("a short id")?;
    limit(&Path::new("/sys/fs/cgroup/vmrun").join(id))?;
    Ok(lines)
}

struct Neighbour {
    run: Child,
    turns: Arc<AtomicU64>,
    /// Counts what it says, until it has ended.
    counter: JoinHandle<()>,
}

impl Neighbour {
    fn start(lab: &Lab) -> Result<Neighbour> {
        let mut run = container(lab, WORK, &[])?;
        let turns = Arc::new(AtomicU64::new(0));
        let lines = started(lab, &mut run)?;
        let counted = turns.clone();
        let counter = thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                if line.parse::<u64>().is_ok() {
                    counted.fetch_add(1, Ordering::Relaxed);
                } else {
                    eprintln!("measure: the neighbour says: {line}");
                }
            }
        });
        let neighbour = Neighbour { run, turns, counter };
        // What it loads is in the page cache from now on, and its disk's blocks are there.
        neighbour.turns()?;
        Ok(neighbour)
    }

    /// What it keeps of its turns beside an attacker, in percent.
    fn share(&self, lab: &Lab, attacker: Attacker) -> Result<f64> {
        let before = self.turns()?;
        let attack = Attack::start(lab, attacker)?;
        let beside = self.turns();
        attack.end()?;
        let beside = beside?;
        let after = self.turns()?;
        Ok(200.0 * beside as f64 / (before + after) as f64)
    }

    /// Turns in a window that begins now.
    fn turns(&self) -> Result<u64> {
        let begin = self.turns.load(Ordering::Relaxed);
        let since = Instant::now();
        while since.elapsed() < WINDOW {
            thread::sleep(WINDOW.saturating_sub(since.elapsed()));
        }
        let turns = self.turns.load(Ordering::Relaxed) - begin;
        ensure!(!self.counter.is_finished(), "the neighbour has ended");
        ensure!(turns > 0, "the neighbour stands still");
        Ok(turns)
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.run.kill();
        let _ = self.run.wait();
    }
}

struct Attack {
    run: Child,
    /// Of a monitor that was started by hand, and is ended so.
    folder: Option<PathBuf>,
}

impl Attack {
    fn start(lab: &Lab, attacker: Attacker) -> Result<Attack> {
        let orders = match attacker {
            Attacker::Kernel(orders) => orders,
            Attacker::Script(script) => {
                let options = ["--network", "none", "--storage-opt", "size=64m"];
                let mut run = container(lab, script, &options)?;
                let mut lines = started(lab, &mut run)?;
                thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
                return Ok(Attack { run, folder: None });
            }
        };
        let folder = lab.work.join("attack");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder)?;
        let path = |name: &str| folder.join(name);
        fs::File::create(path("disk"))?.set_len(1 << 20)?;
        let tap = "ip tuntap add attack0 mode tap vnet_hdr 2>/dev/null; ip link set attack0 up";
        run(Command::new("sh").args(["-c", tap]))?;
        let config = json!({
            "boot-source": {
                "kernel_image_path": lab.work.join("root/attacker"),
                "boot_args": format!("attack={orders} seed=1 rounds=1000000000"),
            },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
            "drives": [{ "drive_id": "d", "path_on_host": path("disk"), "is_root_device": false }],
            "network-interfaces": [{ "iface_id": "e", "host_dev_name": "attack0" }],
            "vsock": { "guest_cid": 3, "uds_path": path("v") },
            "entropy": {},
        });
        fs::write(path("vm.json"), config.to_string())?;
        let cgroup = Path::new("/sys/fs/cgroup/attack");
        fs::create_dir_all(cgroup)?;
        limit(cgroup)?;
        // In its cgroup before it is the monitor, so that nothing of it is anywhere else.
        let mut monitor = Command::new("sh");
        monitor.args(["-c", "echo $$ >\"$0\"/cgroup.procs && exec \"$@\""]).arg(cgroup);
        monitor.arg(lab.work.join("dist/vmrun-vmm")).arg("--config-file").arg(path("vm.json"));
        monitor.args(["--no-api", "--level", "Off"]);
        monitor.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let run = monitor.spawn()?;
        // Until it is in the midst of it.
        thread::sleep(Duration::from_secs(1));
        Ok(Attack { run, folder: Some(folder) })
    }

    fn end(mut self) -> Result<()> {
        // Still at it, or the figure would be of nothing.
        let ended = self.run.try_wait()?;
        self.run.kill()?;
        self.run.wait()?;
        if let Some(folder) = self.folder {
            fs::remove_dir_all(folder)?;
        }
        ensure!(ended.is_none(), "the attacker ended before it was told to: {ended:?}");
        Ok(())
    }
}
