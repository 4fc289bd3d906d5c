//! Which system calls the VMMs of the end-to-end tests make, beside those that the policy lets them
//! make (docs/seccomp.md). An entry that nobody uses is one too many.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::command::root;

/// The policy's filters, and the names of the threads that they are for, as the kernel matches them.
const THREADS: [(&str, &str); 4] = [
    ("start", "vmrun-vmm start"),
    ("event_loop", "vmrun-vmm loop"),
    ("vcpu", "vcpu*"),
    ("api", "api"),
];
/// How the comment of an entry begins that tests need not use.
const RARE: &str = "rare: ";

/// A command for a shell that runs the words that follow, and has the kernel count the system calls
/// of threads meanwhile: tracepoints' histograms, in a tracing instance of their own (Linux,
/// Documentation/trace/histogram.rst). Where it can, they are in a file afterwards.
pub fn recorder(file: &Path) -> Result<[String; 4]> {
    let mut triggers = String::new();
    for (_, name) in THREADS {
        for (event, keys) in
            [("raw_syscalls/sys_enter", "id.syscall"), ("syscalls/sys_enter_ioctl", "cmd.hex")]
        {
            triggers += &format!(
                " && echo 'hist:keys={keys} if comm ~ \"{name}\"' >> $i/events/{event}/trigger"
            );
        }
    }
    let script = format!(
        "t=/sys/kernel/tracing; [ -e $t/trace ] || mount -t tracefs tracefs $t 2>/dev/null\n\
        i=$t/instances/vmrun-$$\n\
        mkdir $i 2>/dev/null && [ -e $i/events/syscalls ]{triggers} || echo 'system calls are not counted' >&2\n\
        \"$@\"; status=$?\n\
        cat $i/events/raw_syscalls/sys_enter/hist $i/events/syscalls/sys_enter_ioctl/hist >\"$0\" 2>/dev/null || rm -f \"$0\"\n\
        rmdir $i 2>/dev/null; exit $status\n"
    );
    let file = file.to_str().context("a path that is no text")?;
    Ok(["sh".to_owned(), "-c".to_owned(), script, file.to_owned()])
}

/// What threads did: the filter, the system call, and for ioctl the request.
type Used = BTreeSet<(String, String, Option<u64>)>;

/// Fails if the policy has an entry that no thread used, of what the files in this folder say.
pub fn compare(folder: &Path) -> Result<()> {
    let mut used = Used::new();
    let mut files = 0;
    for entry in fs::read_dir(folder)? {
        read(&fs::read_to_string(entry?.path())?, &mut used)?;
        files += 1;
    }
    if files == 0 {
        eprintln!(
            "xtask: the policy of system calls is not compared with their use: the lab's kernel \
             does not count (cargo xtask kernel --lab builds one that does)"
        );
        return Ok(());
    }
    let path = root().join("resources/seccomp/x86_64.json");
    let policy = serde_json::from_slice(&fs::read(&path)?)?;
    let Comparison { unused, rare } = against(&policy, &used)?;
    if !rare.is_empty() {
        eprintln!("xtask: marked as rare, but used this time: {}", rare.join(", "));
    }
    ensure!(
        unused.is_empty(),
        "{} allows what no end-to-end test uses: {}",
        path.display(),
        unused.join(", ")
    );
    Ok(())
}

/// Adds what the histograms in a file say.
fn read(text: &str, used: &mut Used) -> Result<()> {
    let mut filter = None;
    for line in text.lines() {
        if let Some(trigger) = line.strip_prefix("# trigger info: ") {
            let own = |(_, name): &&(&str, &str)| trigger.contains(&format!("comm ~ \"{name}\""));
            filter = THREADS.iter().find(own).map(|(filter, _)| *filter);
            continue;
        }
        let Some((key, _)) = line.strip_prefix("{ ").and_then(|line| line.split_once(" }")) else {
            ensure!(
                !line.trim_start().starts_with("Dropped:") || line.trim_end().ends_with(" 0"),
                "the kernel's histogram is too small: {line}"
            );
            continue;
        };
        let filter = filter.context("a histogram of no thread")?.to_owned();
        let words: Vec<_> = key.split_whitespace().collect();
        match words[..] {
            ["id:", name, ..] if name.starts_with("sys_") => {
                used.insert((filter, name.trim_start_matches("sys_").to_owned(), None));
            }
            // A call that the kernel itself does not know.
            ["id:", ..] => {}
            ["cmd:", request] => {
                let request = u64::from_str_radix(request.trim_start_matches("0x"), 16)?;
                used.insert((filter, "ioctl".to_owned(), Some(request)));
            }
            _ => bail!("not a line of a histogram: {line}"),
        }
    }
    Ok(())
}

/// Entries of the policy that are not what they seem.
#[derive(Default, Debug, PartialEq)]
struct Comparison {
    /// Nobody used them.
    unused: Vec<String>,
    /// Somebody used them, though their comment says that it is rare.
    rare: Vec<String>,
}

fn against(policy: &Value, used: &Used) -> Result<Comparison> {
    let mut comparison = Comparison::default();
    for (filter, _) in THREADS {
        let entries = policy[filter]["filter"].as_array();
        for entry in entries.with_context(|| format!("no filter {filter}"))? {
            let call = entry["syscall"].as_str().context("an entry without a name")?;
            let request = entry["args"]
                .as_array()
                .filter(|_| call == "ioctl")
                .and_then(|conditions| conditions.iter().find(|condition| condition["index"] == 1))
                .and_then(|condition| condition["val"].as_u64());
            // The kernel knows this one by another name.
            let name = if call == "sendfile" { "sendfile64" } else { call };
            let is_used = used.contains(&(filter.to_owned(), name.to_owned(), request));
            let comment = entry["comment"].as_str();
            let is_rare = comment.is_some_and(|text| text.starts_with(RARE));
            let odd = match (is_used, is_rare) {
                (false, false) => &mut comparison.unused,
                (true, true) => &mut comparison.rare,
                _ => continue,
            };
            let request = request.map_or(String::new(), |request| format!(" {request:#x}"));
            let comment = comment.map_or(String::new(), |text| format!(" ({text})"));
            odd.push(format!("{filter}: {call}{request}{comment}"));
        }
    }
    Ok(comparison)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const HISTOGRAMS: &str = r#"# event histogram
#
# trigger info: hist:keys=id.syscall:vals=hitcount:sort=hitcount:size=2048 if comm ~ "vmrun-vmm loop" [active]
#

{ id: sys_openat                    [257] } hitcount:          3
{ id: sys_ioctl                     [ 16] } hitcount:         13

Totals:
    Hits: 16
    Entries: 2
    Dropped: 0

# event histogram
#
# trigger info: hist:keys=cmd.hex:vals=hitcount:sort=hitcount:size=2048 if comm ~ "vcpu*" [active]
#

{ cmd:       ae80 } hitcount:          4
"#;

    #[test]
    fn what_nobody_used_is_named_and_what_is_not_rare() {
        let mut used = Used::new();
        read(HISTOGRAMS, &mut used).unwrap();
        let mut policy = json!({
            "start": { "filter": [] },
            "api": { "filter": [{ "syscall": "tgkill", "comment": "rare: abort" }] },
            "event_loop": { "filter": [{ "syscall": "openat" }] },
            "vcpu": { "filter": [{ "syscall": "ioctl", "args": [{ "index": 1, "val": 0xae80 }] }] },
        });
        assert_eq!(against(&policy, &used).unwrap(), Comparison::default());
        policy["start"]["filter"] = json!([{ "syscall": "openat" }]);
        policy["vcpu"]["filter"][0]["args"][0]["val"] = json!(0xae41);
        policy["event_loop"]["filter"][0]["comment"] = json!("rare: a file");
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let expected = Comparison {
            unused: names(&["start: openat", "vcpu: ioctl 0xae41"]),
            rare: names(&["event_loop: openat (rare: a file)"]),
        };
        assert_eq!(against(&policy, &used).unwrap(), expected);
    }

    #[test]
    fn a_histogram_that_lost_something_is_an_error() {
        let text = HISTOGRAMS.replace("Dropped: 0", "Dropped: 1");
        assert!(read(&text, &mut Used::new()).is_err());
    }
}
