//! What a host should have before strangers' machines run on it: `docs/production.md`.

#![allow(unsafe_code, reason = "asks for Landlock's version")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::{Finding, Verdict, bad, good};

/// Host files, below a root that tests make up.
struct Host<'r>(&'r Path);

impl Host<'_> {
    /// A file's text without the space around it; none where it cannot be read.
    fn text(&self, path: &str) -> Option<String> {
        Some(fs::read_to_string(self.0.join(path)).ok()?.trim().to_owned())
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The choice in brackets of a file such as `always [madvise] never`.
    fn chosen(&self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    }
}

/// Looks at the host, changing nothing. `root` is `/`, or a tree with `sys` and `proc` in it;
/// `landlock` is the kernel's version of Landlock, none where it has none.
pub fn examine(root: &Path, landlock: Option<u32>) -> Vec<Finding> {
    let host = Host(root);
    let mut findings = vulnerabilities(&host);
    findings.extend([smt(&host), ksm(&host), swap(&host), core_dumps(&host), nested(&host)]);
    findings.extend([cgroup(&host), seccomp(&host), self::landlock(landlock), namespaces(&host)]);
    findings.extend([bpf(&host), addresses(&host), log(&host), lockdown(&host)]);
    findings.extend([huge_pages(&host), halt_polling(&host)]);
    findings
}

/// The running kernel's version of Landlock (landlock(7), "ABI").
pub fn landlock_version() -> Option<u32> {
    /// `LANDLOCK_CREATE_RULESET_VERSION`
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call takes no pointer, makes no descriptor, and only answers.
    let answer = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, VERSION)
    };
    u32::try_from(answer).ok().filter(|version| *version > 0)
}

/// One finding for each weakness of the processor that is open, and one if none is.
fn vulnerabilities(host: &Host<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "CPU vulnerabilities";
    let folder = "sys/devices/system/cpu/vulnerabilities";
    let Ok(entries) = fs::read_dir(host.0.join(folder)) else {
        let fix = "run a kernel from 4.15 on that has them in sysfs";
        return vec![bad(SUBJECT, Verdict::Limited, format!("/{folder} cannot be read"), fix)];
    };
    let names: BTreeSet<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    let mut findings = Vec::new();
    for name in &names {
        let Some(text) = host.text(&format!("{folder}/{name}")) else { continue };
        let lower = text.to_lowercase();
        let found = format!("{name}: {text}");
        // The kernel says it with a small letter, too, of a part: `VMX: vulnerable`.
        if lower.contains("smt vulnerable") && !lower.starts_with("vulnerable") {
            let fix = "switch SMT off (nosmt, or off in /sys/devices/system/cpu/smt/control)";
            findings.push(bad(SUBJECT, Verdict::Missing, found, fix));
        } else if lower.contains("vulnerable") {
            let fix = "remove mitigations=off and the like from the kernel's command line; install new microcode and a new kernel";
            findings.push(bad(SUBJECT, Verdict::Missing, found, fix));
        } else if lower.starts_with("unknown") {
            let fix = "the host is itself a guest: ask who runs it";
            findings.push(bad(SUBJECT, Verdict::Limited, found, fix));
        }
    }
    if findings.is_empty() {
        findings.push(good(SUBJECT, format!("{} known to the kernel, none open", names.len())));
    }
    findings
}

fn smt(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "SMT";
    let control = host.text("sys/devices/system/cpu/smt/control");
    let control = control.unwrap_or_else(|| "unknown".to_owned());
    match host.number("sys/devices/system/cpu/smt/active") {
        Some(0) => good(SUBJECT, format!("off ({control})")),
        Some(_) => bad(
            SUBJECT,
            Verdict::Limited,
            "on: machines of two owners may share a core's caches and buffers",
            "nosmt on the kernel's command line, or vmrun-vmm --core-scheduling for each machine",
        ),
        None => bad(
            SUBJECT,
            Verdict::Limited,
            format!("not known ({control})"),
            "run a kernel with CONFIG_HOTPLUG_SMT, or switch SMT off in the firmware",
        ),
    }
}

fn ksm(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "KSM";
    match host.number("sys/kernel/mm/ksm/run") {
        None | Some(0) => good(SUBJECT, "off"),
        Some(2) => good(SUBJECT, "off, and what was merged is apart again"),
        Some(_) => bad(
            SUBJECT,
            Verdict::Limited,
            "on: guest memory is never merged, other programs' may be, and how long a write takes tells",
            "echo 2 > /sys/kernel/mm/ksm/run",
        ),
    }
}

fn swap(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "swap";
    let Some(text) = host.text("proc/swaps") else { return good(SUBJECT, "none") };
    let devices: Vec<&str> =
        text.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    let in_memory = |device: &&str| device.starts_with("/dev/zram");
    let mapped =
        |device: &&str| device.starts_with("/dev/dm-") || device.starts_with("/dev/mapper");
    if devices.iter().all(in_memory) {
        let found = if devices.is_empty() { "none".to_owned() } else { devices.join(" ") };
        return good(SUBJECT, found);
    }
    let verdict = match devices.iter().filter(|device| !in_memory(device)).all(mapped) {
        true => Verdict::Limited,
        false => Verdict::Missing,
    };
    let found = format!("{}: guest memory may be written there", devices.join(" "));
    let fix =
        "swapoff -a, or use zram; where it must be, encrypt it with a key that is made at boot";
    bad(SUBJECT, verdict, found, fix)
}

fn core_dumps(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "core dumps";
    let pattern = host.text("proc/sys/kernel/core_pattern").unwrap_or_default();
    match pattern.as_str() {
        "" | "|/bin/false" => good(SUBJECT, "not written"),
        // A program that is piped to is started whatever the limit of the size is.
        _ => bad(
            SUBJECT,
            Verdict::Limited,
            format!("go to {pattern}: a monitor that crashes may leave its guest's memory there"),
            "sysctl kernel.core_pattern='|/bin/false'",
        ),
    }
}

fn nested(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "nested virtualization";
    let module = ["kvm_intel", "kvm_amd"].into_iter().find_map(|module| {
        let value = host.text(&format!("sys/module/{module}/parameters/nested"))?;
        Some((module, value))
    });
    match module {
        None => good(SUBJECT, "no module of KVM is loaded"),
        Some((module, value)) if matches!(value.as_str(), "N" | "0") => {
            good(SUBJECT, format!("off ({module})"))
        }
        Some((module, _)) => bad(
            SUBJECT,
            Verdict::Limited,
            format!(
                "on ({module}): much code of the host's that guests can reach, and do not need"
            ),
            format!("options {module} nested=0 in /etc/modprobe.d, then load the module anew"),
        ),
    }
}

fn cgroup(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "cgroup v2";
    const NEEDED: [&str; 4] = ["cpu", "io", "memory", "pids"];
    let Some(text) = host.text("sys/fs/cgroup/cgroup.controllers") else {
        let found = "not mounted on /sys/fs/cgroup: machines cannot be held to their share";
        let fix = "systemd.unified_cgroup_hierarchy=1 on the kernel's command line";
        return bad(SUBJECT, Verdict::Missing, found, fix);
    };
    let have: BTreeSet<&str> = text.split_whitespace().collect();
    let lacking: Vec<&str> = NEEDED.into_iter().filter(|name| !have.contains(name)).collect();
    if lacking.is_empty() {
        return good(SUBJECT, NEEDED.join(" "));
    }
    bad(
        SUBJECT,
        Verdict::Missing,
        format!("without {}", lacking.join(" ")),
        "take cgroup_disable= off the kernel's command line; where cgroup v1 has them mounted, unmount that",
    )
}

fn seccomp(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "seccomp";
    let actions = host.text("proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    if actions.split_whitespace().any(|action| action == "kill_process") {
        return good(SUBJECT, "filters, which end a process");
    }
    let fix = "run a kernel with CONFIG_SECCOMP_FILTER";
    bad(SUBJECT, Verdict::Missing, "the kernel has no filters", fix)
}

fn landlock(version: Option<u32>) -> Finding {
    const SUBJECT: &str = "Landlock";
    match version {
        Some(version) => good(SUBJECT, format!("version {version}")),
        None => bad(
            SUBJECT,
            Verdict::Limited,
            "the kernel has none: files are kept away by mount namespaces only",
            "run a kernel from 5.13 on with CONFIG_SECURITY_LANDLOCK, and landlock in lsm=",
        ),
    }
}

fn namespaces(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "user namespaces";
    let off = [
        ("user.max_user_namespaces", "proc/sys/user/max_user_namespaces", 0),
        ("kernel.unprivileged_userns_clone", "proc/sys/kernel/unprivileged_userns_clone", 0),
        (
            "kernel.apparmor_restrict_unprivileged_userns",
            "proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            1,
        ),
    ]
    .into_iter()
    .find(|(_, path, off)| host.number(path) == Some(*off));
    match off {
        _ if !host.0.join("proc/sys/user/max_user_namespaces").exists() => bad(
            SUBJECT,
            Verdict::Missing,
            "the kernel has none",
            "run a kernel with CONFIG_USER_NS",
        ),
        None => good(SUBJECT, "there, for all users"),
        Some((name, _, 0)) if name.starts_with("user.") => bad(
            SUBJECT,
            Verdict::Missing,
            format!("{name} is 0: nobody can make one"),
            format!("sysctl {name}=10000"),
        ),
        Some((name, _, value)) => bad(
            SUBJECT,
            Verdict::Limited,
            format!("{name} is {value}: for root only"),
            "run machines as root, which jails each as a user of its own",
        ),
    }
}

fn bpf(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "unprivileged BPF";
    match host.number("proc/sys/kernel/unprivileged_bpf_disabled") {
        None => good(SUBJECT, "the kernel has none"),
        Some(0) => bad(
            SUBJECT,
            Verdict::Missing,
            "any user may load programs into the kernel, which Spectre attacks are made of",
            "sysctl kernel.unprivileged_bpf_disabled=1",
        ),
        Some(value) => good(SUBJECT, format!("off ({value})")),
    }
}

fn addresses(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "kernel addresses";
    match host.number("proc/sys/kernel/kptr_restrict") {
        Some(value @ 1..) => good(SUBJECT, format!("hidden (kptr_restrict is {value})")),
        _ => bad(
            SUBJECT,
            Verdict::Limited,
            "any user may read them, which who attacks the kernel needs",
            "sysctl kernel.kptr_restrict=1",
        ),
    }
}

fn log(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "kernel log";
    match host.number("proc/sys/kernel/dmesg_restrict") {
        Some(value @ 1..) => good(SUBJECT, format!("for root (dmesg_restrict is {value})")),
        _ => bad(
            SUBJECT,
            Verdict::Limited,
            "any user may read it, with addresses in it and what other machines did",
            "sysctl kernel.dmesg_restrict=1",
        ),
    }
}

fn lockdown(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "lockdown";
    match host.chosen("sys/kernel/security/lockdown").as_deref() {
        Some("none") | None => bad(
            SUBJECT,
            Verdict::Limited,
            "none: root can change the running kernel",
            "lockdown=integrity on the kernel's command line, with modules that are signed",
        ),
        Some(level) => good(SUBJECT, level),
    }
}

fn huge_pages(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "huge pages";
    match host.chosen("sys/kernel/mm/transparent_hugepage/enabled").as_deref() {
        Some(mode @ ("always" | "madvise")) => good(SUBJECT, format!("transparent: {mode}")),
        _ => bad(
            SUBJECT,
            Verdict::Limited,
            "no transparent ones: guests run slower",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
    }
}

fn halt_polling(host: &Host<'_>) -> Finding {
    const SUBJECT: &str = "halt polling";
    /// Nanoseconds, the kernel's own choice on x86.
    const USUAL: u64 = 200_000;
    match host.number("sys/module/kvm/parameters/halt_poll_ns") {
        None => good(SUBJECT, "no module of KVM is loaded"),
        Some(0) => good(SUBJECT, "off"),
        Some(time) if time <= USUAL => {
            good(SUBJECT, format!("{} us, charged to the machine that halts", time / 1000))
        }
        Some(time) => bad(
            SUBJECT,
            Verdict::Limited,
            format!("{} us: machines that do nothing use up their CPU time", time / 1000),
            format!("echo {USUAL} > /sys/module/kvm/parameters/halt_poll_ns"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with these files; each is looked for below it.
    fn found(files: &[(&str, &str)]) -> Vec<Finding> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        examine(root.path(), Some(4))
    }

    fn verdict(files: &[(&str, &str)], subject: &str) -> Verdict {
        let findings = found(files);
        let of = findings.iter().filter(|finding| finding.subject == subject);
        let worst = of.max_by_key(|finding| finding.verdict as u8).unwrap();
        assert_eq!(worst.fix.is_none(), worst.verdict == Verdict::Good, "{worst:?}");
        worst.verdict
    }

    const WEAK: &str = "sys/devices/system/cpu/vulnerabilities";

    #[test]
    fn a_host_as_it_should_be_has_nothing_to_be_told() {
        let findings = found(&[
            ("sys/devices/system/cpu/vulnerabilities/l1tf", "Not affected"),
            (
                "sys/devices/system/cpu/vulnerabilities/mds",
                "Mitigation: Clear CPU buffers; SMT disabled",
            ),
            ("sys/devices/system/cpu/smt/active", "0"),
            ("sys/devices/system/cpu/smt/control", "forceoff"),
            ("sys/kernel/mm/ksm/run", "0"),
            ("proc/swaps", "Filename\tType\tSize\tUsed\tPriority"),
            ("proc/sys/kernel/core_pattern", "|/bin/false"),
            ("sys/module/kvm_intel/parameters/nested", "N"),
            ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids"),
            ("proc/sys/kernel/seccomp/actions_avail", "kill_process kill_thread allow"),
            ("proc/sys/user/max_user_namespaces", "63000"),
            ("proc/sys/kernel/unprivileged_bpf_disabled", "2"),
            ("proc/sys/kernel/kptr_restrict", "1"),
            ("proc/sys/kernel/dmesg_restrict", "1"),
            ("sys/kernel/security/lockdown", "none [integrity] confidentiality"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never"),
            ("sys/module/kvm/parameters/halt_poll_ns", "200000"),
        ]);
        assert_eq!(findings.len(), 16);
        for finding in findings {
            assert_eq!(finding.verdict, Verdict::Good, "{finding:?}");
        }
    }

    #[test]
    fn open_weaknesses_of_the_processor_fail() {
        use Verdict::{Good, Limited, Missing};
        for (text, expected) in [
            ("Not affected", Good),
            ("Mitigation: PTI", Good),
            ("KVM: Mitigation: VMX disabled", Good),
            ("Vulnerable", Missing),
            ("Vulnerable: Clear CPU buffers attempted, no microcode; SMT vulnerable", Missing),
            ("KVM: Vulnerable", Missing),
            ("Mitigation: Retpolines; STIBP: disabled; RSB filling; BHI: Vulnerable", Missing),
            ("Mitigation: PTE Inversion; VMX: vulnerable, SMT disabled", Missing),
            ("Mitigation: Clear CPU buffers; SMT vulnerable", Missing),
            ("Mitigation: Clear CPU buffers; SMT Host state unknown", Good),
            ("Unknown: Dependent on hypervisor status", Limited),
        ] {
            let files =
                [(&*format!("{WEAK}/one"), text), (&*format!("{WEAK}/two"), "Not affected")];
            assert_eq!(verdict(&files, "CPU vulnerabilities"), expected, "{text}");
        }
        let smt = found(&[(&format!("{WEAK}/mds"), "Mitigation: x; SMT vulnerable")]);
        assert!(smt[0].fix.as_ref().unwrap().contains("SMT off"), "{smt:?}");
        // All that are open are told.
        let all =
            found(&[(&format!("{WEAK}/a"), "Vulnerable"), (&format!("{WEAK}/b"), "Vulnerable")]);
        assert_eq!(
            all.iter().filter(|f| f.verdict == Missing && f.found.contains(": V")).count(),
            2
        );
        assert_eq!(verdict(&[], "CPU vulnerabilities"), Limited);
    }

    #[test]
    fn each_thing_that_is_wrong_is_told() {
        use Verdict::{Good, Limited, Missing};
        let head = "Filename\tType\tSize\tUsed\tPriority";
        let swaps = |devices: &str| format!("{head}\n{devices}");
        for (file, text, subject, expected) in [
            ("sys/devices/system/cpu/smt/active", "1", "SMT", Limited),
            ("none", "", "SMT", Limited),
            ("sys/kernel/mm/ksm/run", "1", "KSM", Limited),
            ("sys/kernel/mm/ksm/run", "2", "KSM", Good),
            ("proc/swaps", &*swaps("/dev/sda2 partition 1 0 -2"), "swap", Missing),
            ("proc/swaps", &*swaps("/swapfile file 1 0 -2"), "swap", Missing),
            ("proc/swaps", &*swaps("/dev/dm-1 partition 1 0 -2"), "swap", Limited),
            ("proc/swaps", &*swaps("/dev/zram0 partition 1 0 -2"), "swap", Good),
            (
                "proc/swaps",
                &*swaps("/dev/zram0 partition 1 0 5\n/dev/sda1 partition 1 0 -2"),
                "swap",
                Missing,
            ),
            ("proc/sys/kernel/core_pattern", "core", "core dumps", Limited),
            ("proc/sys/kernel/core_pattern", "|/lib/systemd/x %P", "core dumps", Limited),
            ("sys/module/kvm_amd/parameters/nested", "1", "nested virtualization", Limited),
            ("sys/module/kvm_amd/parameters/nested", "0", "nested virtualization", Good),
            ("sys/module/kvm_intel/parameters/nested", "Y", "nested virtualization", Limited),
            ("sys/fs/cgroup/cgroup.controllers", "cpu memory pids", "cgroup v2", Missing),
            ("sys/fs/cgroup/cgroup.controllers", "cpuset io memory pids", "cgroup v2", Missing),
            ("none", "", "cgroup v2", Missing),
            ("proc/sys/kernel/seccomp/actions_avail", "allow", "seccomp", Missing),
            ("none", "", "seccomp", Missing),
            ("none", "", "user namespaces", Missing),
            ("proc/sys/user/max_user_namespaces", "0", "user namespaces", Missing),
            ("proc/sys/kernel/unprivileged_bpf_disabled", "0", "unprivileged BPF", Missing),
            ("proc/sys/kernel/kptr_restrict", "0", "kernel addresses", Limited),
            ("proc/sys/kernel/dmesg_restrict", "0", "kernel log", Limited),
            ("sys/kernel/security/lockdown", "[none] integrity", "lockdown", Limited),
            ("sys/kernel/security/lockdown", "none [integrity]", "lockdown", Good),
            (
                "sys/kernel/mm/transparent_hugepage/enabled",
                "always madvise [never]",
                "huge pages",
                Limited,
            ),
            ("sys/module/kvm/parameters/halt_poll_ns", "0", "halt polling", Good),
            ("sys/module/kvm/parameters/halt_poll_ns", "400000", "halt polling", Limited),
        ] {
            assert_eq!(verdict(&[(file, text)], subject), expected, "{file} {text}");
        }
        let users = |file| {
            let all = ("proc/sys/user/max_user_namespaces", "9");
            verdict(&[all, file], "user namespaces")
        };
        assert_eq!(users(("proc/sys/kernel/unprivileged_userns_clone", "0")), Limited);
        assert_eq!(users(("proc/sys/kernel/unprivileged_userns_clone", "1")), Good);
        let apparmor = "proc/sys/kernel/apparmor_restrict_unprivileged_userns";
        assert_eq!(users((apparmor, "1")), Limited);
        assert_eq!(landlock(None).verdict, Limited);
    }

    #[test]
    fn this_host_can_be_looked_at() {
        let findings = examine(Path::new("/"), landlock_version());
        assert!(findings.len() >= 16);
    }
}
