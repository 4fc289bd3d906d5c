//! Commands that are killed, or refused something, at each of their steps in turn.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::steps::{Deed, Followed, follow};
use e2e::{Finished, Running};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

const CGROUPS: &str = "/sys/fs/cgroup";
const IMAGE: &str = "localhost/base";
const NAME: &str = "followed";
/// In the subnet that the first bridge of a host takes.
const ADDRESS: &str = "172.20.0.77";
const TAP: &str = "vmtap4d";

/// A state directory, a network namespace and a cgroup of the test's own.
struct Place {
    folder: tempfile::TempDir,
    /// Of the network namespace and the cgroup.
    name: String,
}

impl Place {
    fn new(name: &str) -> Place {
        let name = format!("e2e-{name}-{}", std::process::id());
        let place = Place { folder: tempfile::tempdir().unwrap(), name };
        place.ip(&["netns", "add", &place.name]);
        place
    }

    /// With an image and a kernel.
    fn with_image(name: &str) -> Place {
        let place = Place::new(name);
        place.vmrun(&["image", "pull", "-q", &archive()]).exits(0);
        let kernel = e2e::images::kernel();
        place.vmrun(&["kernel", "import", "--default", kernel.to_str().unwrap()]).exits(0);
        place
    }

    fn ip(&self, arguments: &[&str]) {
        let status = Command::new("ip").args(arguments).status().unwrap();
        assert!(status.success(), "ip {arguments:?}");
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    fn cgroup(&self) -> PathBuf {
        Path::new(CGROUPS).join(&self.name)
    }

    /// `vmrun ARGUMENTS` in the namespace.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name)).arg("vmrun").args(arguments);
        command.env("VMRUN_ROOT", self.root()).stdin(Stdio::null());
        command
    }

    fn vmrun(&self, arguments: &[&str]) -> Finished {
        Running::start(&mut self.command(arguments)).finish()
    }

    /// A run that uses all there is: a volume, a writable layer, the network.
    fn run(&self) -> Command {
        let own: &[&str] = &["--name", NAME, "--ip", ADDRESS, "--cgroup-parent", &self.name];
        let mut words = vec!["run", "--rm", "-m", "64m", "-v", "data:/data"];
        words.extend(own);
        words.extend([IMAGE, "echo", "said"]);
        self.command(&words)
    }

    fn follow(&self, command: &Command, deed: &Deed) -> Followed {
        follow(command, self.folder.path(), deed)
    }

    /// Files and folders of the state directory, without what is different each time.
    fn listing(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut folders = vec![self.root()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap().map(Result::unwrap) {
                let path = entry.path();
                found.insert(path.strip_prefix(self.root()).unwrap().display().to_string());
                if entry.file_type().unwrap().is_dir() {
                    folders.push(path);
                }
            }
        }
        found
    }

    /// Waits until the command is gone with all that was its own; the next commands clear that up.
    fn is_clear(&self, after: &str) {
        let since = Instant::now();
        loop {
            let mut command = Command::new("vmrun");
            command.args(["ps", "-a"]).env("VMRUN_ROOT", self.root()).stdin(Stdio::null());
            let listed = Running::start(&mut command).finish().exits(0).out();
            let left = [
                listed.contains(NAME).then(|| listed.clone()),
                self.processes(),
                names(&self.root().join("containers"), |name| name != ".lock"),
                names(&self.root().join("run"), |_| true),
                names(&self.cgroup(), |name| self.cgroup().join(name).is_dir()),
                self.taps(),
            ];
            let left: Vec<_> = left.into_iter().flatten().collect();
            if left.is_empty() {
                return;
            }
            assert!(since.elapsed() < Duration::from_secs(20), "{after}: {left:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Processes that know the state directory.
    fn processes(&self) -> Option<String> {
        let root = self.root();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains(root.to_str().unwrap()) {
                found.push(format!("{}: {line}", entry.file_name().display()));
            }
        }
        (!found.is_empty()).then(|| found.join("\n"))
    }

    fn taps(&self) -> Option<String> {
        let output = Command::new("ip").args(["-n", &self.name, "-o", "link"]).output().unwrap();
        let links = String::from_utf8_lossy(&output.stdout).into_owned();
        links.contains(TAP).then_some(links)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
        let _ = fs::remove_dir(self.cgroup());
    }
}

fn archive() -> String {
    format!("oci-archive:{}", e2e::images::archive("base").display())
}

/// Names in a folder, where there are any.
fn names(folder: &Path, wanted: impl Fn(&str) -> bool) -> Option<String> {
    let names = fs::read_dir(folder).ok()?.flatten();
    let names = names.map(|entry| entry.file_name().into_string().unwrap());
    let names: Vec<_> = names.filter(|name| wanted(name)).collect();
    (!names.is_empty()).then(|| format!("{}: {}", folder.display(), names.join(" ")))
}

fn is_killed(followed: &Followed) -> bool {
    matches!(followed.end, WaitStatus::Signaled(_, Signal::SIGKILL, _))
}

#[track_caller]
fn said(followed: &Followed) {
    assert!(matches!(followed.end, WaitStatus::Exited(_, 0)), "{followed:?}");
    assert_eq!(followed.out, "said\n", "{followed:?}");
}

/// docs/hostile.md 27: at the first use of all, and at a later one, where most is there already.
#[test]
fn hostile_27_a_run_killed_at_each_step_leaves_nothing_behind() {
    let place = Place::with_image("run");
    let run = place.run();
    let fresh = place.listing();
    let first = place.follow(&run, &Deed::Watch);
    said(&first);
    place.is_clear("the first run");
    let used = place.listing();
    let again = place.follow(&run, &Deed::Watch);
    said(&again);
    assert!(again.steps.len() > 80 && first.steps.len() > again.steps.len(), "{again:?}");
    let mut missed = Vec::new();
    let mut kill_at = |step: &String| {
        let followed = place.follow(&run, &Deed::Kill(step.clone()));
        assert_eq!(is_killed(&followed), followed.reached, "{followed:?}");
        place.is_clear(step);
        if !followed.reached {
            missed.push(step.clone());
        }
    };
    again.steps.iter().for_each(&mut kill_at);
    for step in first.steps.iter().filter(|step| !again.steps.contains(step)) {
        // What the first use made is gone again, and so is the network. Not so what was half made:
        // the next run finds that.
        for name in used.difference(&fresh).filter(|name| place.root().join(name).is_file()) {
            fs::remove_file(place.root().join(name)).unwrap();
        }
        place.ip(&["netns", "delete", &place.name]);
        place.ip(&["netns", "add", &place.name]);
        kill_at(step);
    }
    said(&place.follow(&run, &Deed::Watch));
    place.is_clear("the last run");
    let left: Vec<_> = place.listing().difference(&used).cloned().collect();
    assert!(left.is_empty(), "{left:?}");
    // A thread may be faster than another, and a frame come in one piece or two.
    assert!(missed.len() < 6, "{missed:?}");
}

/// docs/hostile.md 27: the next pull finds a store that is as good as empty, or as good as whole.
#[test]
fn hostile_27_a_pull_killed_at_each_step_is_taken_up_by_the_next() {
    let place = Place::new("pull");
    let pull = place.command(&["image", "pull", "-q", &archive()]);
    let first = place.follow(&pull, &Deed::Watch);
    assert!(matches!(first.end, WaitStatus::Exited(_, 0)), "{first:?}");
    assert!(first.steps.len() > 40, "{first:?}");
    let whole = place.listing();
    for step in &first.steps {
        fs::remove_dir_all(place.root()).unwrap();
        let followed = place.follow(&pull, &Deed::Kill(step.clone()));
        assert!(followed.reached && is_killed(&followed), "{followed:?}");
        place.vmrun(&["image", "pull", "-q", &archive()]).exits(0);
        assert_eq!(place.listing(), whole, "{step}");
    }
}

/// docs/hostile.md 26: disks that fail, and quotas that are used up, wherever the command meets them.
#[test]
fn hostile_26_whatever_the_disk_refuses_is_told() {
    let place = Place::with_image("refuse");
    let run = place.run();
    said(&place.follow(&run, &Deed::Watch));
    let usual = place.follow(&run, &Deed::Watch);
    let of_disk = |step: &&String| step.starts_with("command: ") && step.contains("ROOT");
    let errors = [
        (Errno::EIO, "Input/output error", &[""][..]),
        (Errno::EDQUOT, "Disk quota exceeded", &["make room", "--root"]),
    ];
    let mut told = 0;
    for (number, step) in usual.steps.iter().filter(of_disk).enumerate() {
        let (error, text, help) = errors[number % 2];
        let done = place.follow(&run, &Deed::Refuse(step.clone(), error));
        place.is_clear(step);
        match done.end {
            WaitStatus::Exited(_, 125) => {
                let root = place.root();
                let (line, root) = (done.err.trim_end(), root.to_str().unwrap());
                assert_eq!(line.lines().count(), 1, "{step}: {line}");
                assert!(line.contains(text) && line.contains(root), "{step}: {line}");
                assert!(help.iter().any(|help| line.contains(help)), "{step}: {line}");
                told += 1;
            }
            // The program has run by then, or it is nothing but tidiness.
            _ => said(&done),
        }
    }
    assert!(told > 20, "{told}");
    said(&place.follow(&run, &Deed::Watch));
}
